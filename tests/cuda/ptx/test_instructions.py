"""Single-thread instructions against numpy, and PTX that the interpreter must refuse."""

from fractions import Fraction

import numpy as np
import pytest

from . import PtxError, formats
from .handwritten import apply, execute

RNG = np.random.default_rng(7)
F = RNG.standard_normal(32).astype(np.float32) * 3
G = RNG.standard_normal(32).astype(np.float32)
P = np.abs(F) + np.float32(0.25)
D, E = RNG.standard_normal(32), RNG.standard_normal(32)
K, J = RNG.integers(-(2**31), 2**31, (2, 32)).astype(np.int32)
U, V = K.view(np.uint32), J.view(np.uint32)
L, M = RNG.integers(-(2**63), 2**63 - 1, (2, 32))
MOST = 2**31 - 1
SMALL = RNG.integers(0, 40, 32).astype(np.uint32)
SPECIAL = np.resize(np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, 300.7, -2.5, 3e9, -3e9], np.float32), 32)
TRUE = RNG.integers(0, 2, 32).astype(bool)
H = F.astype(np.float16)
B = formats.to_bf16(F)


def signed(x):
    return x.astype(np.int64)


def python(function, *arrays):
    """Apply a function to Python integers, element by element; keep 32 bits."""
    return np.array([function(*map(int, lane)) % 2**32 for lane in zip(*arrays, strict=True)], np.uint32)


def fused(a, b, c):
    """Compute a * b + c, rounded once."""
    return np.array([float(Fraction(x) * Fraction(y) + Fraction(c)) for x, y in zip(a, b, strict=True)])


def unbf16(bits):
    return formats.from_bf16(bits)


def pair(low, high):
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


CASES = [
    ("add.f32 $0, $1, $2", F, G, F + G),
    ("sub.rn.f32 $0, $1, $2", F, G, F - G),
    ("mul.f32 $0, $1, 0f40490FDB", F, F * np.float32(np.pi)),
    ("fma.rn.f32 $0, $1, $2, $1", F, G, (F.astype(float) * G + F).astype(np.float32)),
    ("div.rn.f32 $0, $1, $2", F, G, F / G),
    ("rcp.approx.ftz.f32 $0, $1", F, 1 / F),
    ("rcp.approx.ftz.f32 $0, $1", np.full(32, np.inf, np.float32), np.zeros(32, np.float32)),
    ("sqrt.rn.f32 $0, $1", P, np.sqrt(P)),
    ("rsqrt.approx.f32 $0, $1", P, (1 / np.sqrt(P.astype(float))).astype(np.float32)),
    ("ex2.approx.ftz.f32 $0, $1", F, np.exp2(F.astype(float)).astype(np.float32)),
    ("lg2.approx.f32 $0, $1", P, np.log2(P.astype(float)).astype(np.float32)),
    ("min.f32 $0, $1, $2", SPECIAL, G, np.fmin(SPECIAL, G)),
    ("max.NaN.f32 $0, $1, $2", SPECIAL, G, np.maximum(SPECIAL, G)),
    ("abs.f32 $0, $1", F, np.abs(F)),
    ("neg.f32 $0, $1", F, -F),
    ("copysign.f32 $0, $1, $2", F, G, np.copysign(G, F)),
    ("add.ftz.f32 $0, $1, 0f00000000", np.full(32, 1e-40, np.float32), np.zeros(32, np.float32)),
    ("add.sat.f32 $0, $1, $2", F, G, np.clip(F + G, 0, 1)),
    ("add.f64 $0, $1, $2", D, E, D + E),
    ("fma.rn.f64 $0, $1, $2, 0d3FF8000000000000", D, E, fused(D, E, 1.5)),
    ("add.s32 $0, $1, $2", K, J, K + J),
    ("sub.s32 $0, $1, -7", K, K + np.int32(7)),
    ("mul.lo.s32 $0, $1, $2", K, J, K * J),
    ("mul.hi.u32 $0, $1, $2", U, V, python(lambda a, b: a * b >> 32, U, V)),
    ("mul.wide.s32 $0, $1, $2", K, J, signed(K) * J),
    ("mul.hi.s64 $0, $1, $2", L, M, np.array([int(a) * int(b) >> 64 for a, b in zip(L, M, strict=True)], np.int64)),
    ("mad.lo.s32 $0, $1, $2, $2", K, J, K * J + J),
    ("mad.wide.u32 $0, $1, 12, $2", U, L.view(np.uint64), U.astype(np.uint64) * np.uint64(12) + L.view(np.uint64)),
    ("div.s32 $0, $1, 7", K, np.trunc(K / 7).astype(np.int32)),
    ("rem.s32 $0, $1, 7", K, np.fmod(K, 7).astype(np.int32)),
    ("min.s32 $0, $1, $2", K, J, np.minimum(K, J)),
    ("max.u32 $0, $1, $2", U, V, np.maximum(U, V)),
    ("shl.b32 $0, $1, $2", U, SMALL, python(lambda a, n: a << n, U, SMALL)),
    ("shr.u32 $0, $1, $2", U, SMALL, python(lambda a, n: a >> n, U, SMALL)),
    ("shr.s32 $0, $1, $2", K, SMALL, python(lambda a, n: a >> n, K, SMALL).view(np.int32)),
    ("shf.l.wrap.b32 $0, $1, $2, 5", U, V, python(lambda low, high: (high << 5) | low >> 27, U, V)),
    ("shf.r.clamp.b32 $0, $1, $2, 32", U, V, V),
    ("and.b32 $0, $1, $2", U, V, U & V),
    ("xor.b32 $0, $1, 0xFF", U, U ^ np.uint32(255)),
    ("not.b32 $0, $1", U, ~U),
    ("lop3.b32 $0, $1, $2, 15, 0xE8", U, V, (U & V) | (U & np.uint32(15)) | (V & np.uint32(15))),
    ("prmt.b32 $0, $1, $2, 0x7531", U, V, python(lambda a, b: sum(((a | b << 32) >> 8 * (2 * i + 1) & 255) << 8 * i
                                                                 for i in range(4)), U, V)),
    ("bfe.u32 $0, $1, 5, 9", U, python(lambda a: a >> 5 & 511, U)),
    ("bfe.s32 $0, $1, 5, 9", K, python(lambda a: (a >> 5 & 511) - 2 * (a >> 5 & 256), K).view(np.int32)),
    ("bfi.b32 $0, $1, $2, 4, 8", U, V, python(lambda a, b: b & ~0xFF0 | a << 4 & 0xFF0, U, V)),
    ("popc.b32 $0, $1", U, python(lambda a: a.bit_count(), U)),
    ("clz.b32 $0, $1", U, python(lambda a: 32 - a.bit_length(), U)),
    ("brev.b32 $0, $1", U, python(lambda a: int(f"{a:032b}"[::-1], 2), U)),
    ("selp.f32 $0, $1, $2, $3", F, G, TRUE, np.where(TRUE, F, G)),
    ("setp.lt.s32 $0, $1, $2", K, J, K < J),
    ("setp.lt.u32 $0, $1, $2", U, V, U < V),
    ("setp.ne.f32 $0, $1, $2", SPECIAL, G, (SPECIAL != G) & ~np.isnan(SPECIAL)),
    ("setp.geu.f32 $0, $1, $2", SPECIAL, G, (SPECIAL >= G) | np.isnan(SPECIAL)),
    ("setp.nan.f32 $0, $1, $1", SPECIAL, np.isnan(SPECIAL)),
    ("setp.gt.and.s32 $0, $1, $2, $3", K, J, TRUE, (K > J) & TRUE),
    ("not.pred $0, $1", TRUE, ~TRUE),
    ("mov.b64 $0, {$1, $2}", U, V, U.astype(np.uint64) | (V.astype(np.uint64) << np.uint64(32))),
    ("cvt.rn.bf16.f32 $0, $1", F, B),
    ("cvt.rz.bf16.f32 $0, $1", F, (F.view(np.uint32) >> 16).astype(np.uint16)),
    ("cvt.f32.bf16 $0, $1", B, unbf16(B)),
    ("cvt.rn.f16.f32 $0, $1", F, H),
    ("cvt.f32.f16 $0, $1", H, H.astype(np.float32)),
    ("cvt.rn.bf16x2.f32 $0, $1, $2", F, G, pair(formats.to_bf16(G), formats.to_bf16(F))),
    ("cvt.rn.f16x2.f32 $0, $1, $2", F, G, pair(*(x.astype(np.float16).view(np.uint16) for x in (G, F)))),
    ("cvt.rna.tf32.f32 $0, $1", F, (F.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)),
    ("cvt.rn.f32.f64 $0, $1", D, D.astype(np.float32)),
    ("cvt.f64.f32 $0, $1", F, F.astype(np.float64)),
    ("cvt.rn.f32.s32 $0, $1", K, K.astype(np.float32)),
    ("cvt.rzi.s32.f32 $0, $1", SPECIAL,
     np.resize(np.int32([0, MOST, -MOST - 1, 0, 0, 0, 300, -2, MOST, -MOST - 1]), 32)),
    ("cvt.rni.f32.f32 $0, $1", F, np.rint(F)),
    ("cvt.s64.s32 $0, $1", K, signed(K)),
    ("cvt.u64.u32 $0, $1", U, U.astype(np.uint64)),
    ("cvt.u32.u64 $0, $1", L.view(np.uint64), L.view(np.uint64).astype(np.uint32)),
    ("cvt.u32.u16 $0, $1", B, B.astype(np.uint32)),
    ("cvt.s32.s8 $0, $1", K, K.astype(np.int8).astype(np.int32)),
    ("fma.rn.bf16 $0, $1, $1, $1", B, formats.to_bf16(unbf16(B).astype(float) ** 2 + unbf16(B))),
    ("mul.bf16x2 $0, $1, $1", pair(B, B[::-1]), pair(*(formats.to_bf16(unbf16(x) ** 2) for x in (B, B[::-1])))),
    ("add.f16 $0, $1, $1", H, H + H),
    ("add.f16x2 $0, $1, $1", pair(H.view(np.uint16), H[::-1].view(np.uint16)),
     pair((H + H).view(np.uint16), (H + H)[::-1].view(np.uint16))),
    ("mov.b32 $0, %laneid", np.arange(32, dtype=np.uint32)),
    ("mov.u32 $0, %ntid.x", np.full(32, 32, np.uint32)),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "values"), [(c[0], c[1:]) for c in CASES], ids=[c[0] for c in CASES])
def test_against_numpy(instruction, values):
    *inputs, expected = values
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(apply(instruction, expected.dtype, *inputs), expected)


def test_tanh_approx_has_the_error_of_the_ptx_isa():
    exact = np.tanh(F.astype(float))
    error = np.abs(apply("tanh.approx.f32 $0, $1", np.float32, F) / exact - 1).max()
    assert 2**-13 < error <= 2**-11


def test_tf32_products_do_not_read_the_low_bits():
    assert formats.decode(np.array([0x3F801FFF], np.uint32), "tf32") == 1.0


def test_vectors_widths_and_order():
    x = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    body = """
    mad.wide.u32 %d0, %tid, 16, %a0; mad.wide.u32 %d1, %tid, 16, %a1;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d0];
    mov.b32 {%h0, %h1}, %r10; mov.b32 %r20, {%h1, %h0};
    st.global.v2.b32 [%d1], {%r20, %r11}; st.global.u16 [%d1+8], %r12; st.global.v2.u16 [%d1+12], {%h0, %h0};
    """
    out = execute(body, x, np.zeros_like(x))[1]
    np.testing.assert_array_equal(out, x[:, [1, 0, 2, 3, 4, 0, 0, 0]] * np.array([1, 1, 1, 1, 1, 0, 1, 1], np.uint16))


def test_bytes_keep_their_sign_or_not():
    x = np.arange(-16, 16, dtype=np.int8)
    body = (
        "ld.global.s8 %h0, [%ptr0]; ld.global.u8 %h1, [%ptr0]; mov.b32 %r10, {%h0, %h1}; st.global.b32 [%ptr1], %r10;"
    )
    out = execute(body, x, np.zeros(32, np.uint32))[1]
    np.testing.assert_array_equal(out.astype(np.uint16).view(np.int16), x)
    np.testing.assert_array_equal(out >> 16, x.view(np.uint8))


def test_predicates_guard_lanes_and_inner_scopes_have_their_own_names():
    body = """
    setp.lt.u32 %p0, %tid, 20; mov.u32 %r10, 1;
    @%p0 mov.u32 %r10, 2;
    { .reg .pred p; setp.lt.u32 p, %tid, 10; @!p bra DONE; add.u32 %r10, %r10, 10; DONE: }
    { .reg .pred p; setp.lt.u32 p, %tid, 5; @!p bra DONE; add.u32 %r10, %r10, 100; DONE: }
    st.global.u32 [%ptr0], %r10;
    """
    tid = np.arange(32)
    expected = np.where(tid < 20, 2, 1) + np.where(tid < 10, 10, 0) + np.where(tid < 5, 100, 0)
    np.testing.assert_array_equal(execute(body, np.zeros(32, np.uint32))[0], expected)


def test_a_loop_of_different_length_per_lane():
    body = """
    mov.u32 %r10, 0; mov.u32 %r11, 0;
    LOOP: setp.gt.u32 %p0, %r10, %tid; @%p0 bra DONE;
    add.u32 %r11, %r11, %r10; add.u32 %r10, %r10, 1; bra.uni LOOP;
    DONE: st.global.u32 [%ptr0], %r11;
    """
    tid = np.arange(32)
    np.testing.assert_array_equal(execute(body, np.zeros(32, np.uint32))[0], tid * (tid + 1) // 2)


def test_parameters_by_value_and_arrays_of_the_module():
    module = ".const .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 255};"
    body = "mov.u64 %d0, table; ld.const.u32 %r10, [%d0+4]; st.global.u32 [%ptr0], %r10;"
    assert execute(body, np.zeros(32, np.uint32), module=module)[0][0] == 65535


@pytest.mark.parametrize(
    ("atomic", "kind", "expected"),
    [
        ("red.release.gpu.global.add.u32 [%a0], %tid", np.uint32, 7 + 31 * 16),
        ("atom.global.max.s32 %r10, [%a0], %tid", np.int32, 31),
        ("atom.global.add.f32 %f0, [%a0], 0f3F000000", np.float32, 23.0),
        ("atom.global.inc.u32 %r10, [%a0], 9", np.uint32, 9),
        ("atom.global.exch.b32 %r10, [%a0], %tid", np.uint32, 31),
        ("atom.global.cas.b32 %r10, [%a0], 7, 3", np.uint32, 3),
        ("red.global.or.b32 [%a0], %tid", np.uint32, 31),
    ],
)
def test_atomics(atomic, kind, expected):
    assert execute(atomic + ";", np.full(1, 7, kind))[0][0] == expected


REFUSED = {
    "an unknown opcode": ("wgmma.mma_async.sync.aligned.m64n8k16.f32 %r1;", "opcode 'wgmma' is not supported"),
    "an unknown modifier": ("add.rz.f32 %f0, %f1, %f2;", r"\.rz of 'add' is not supported"),
    "another function": ("call.uni (%r0), sinf, (%r1);", "a call of a function"),
    "past the end": ("ld.global.u32 %r10, [%a0+128];", r"out of bounds: global load .* byte 128 .*uint32\[32\]"),
    "before the start": ("st.global.u32 [%a0-4], %tid;", "out of bounds: global store"),
    "no buffer": ("mov.u64 %d0, 0; ld.global.u32 %r10, [%d0];", "out of bounds"),
    "misaligned vector": ("ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%a0+4];", "misaligned: global load of 16 bytes"),
    "misaligned word": ("ld.global.u32 %r10, [%a0+2];", "misaligned"),
    "shared memory past its end": ("ld.shared.u32 %r10, [0];", "out of bounds: shared load"),
    "an address of global memory as a shared one": ("ld.shared.u32 %r10, [%a0];", "shared"),
    "written, then read-only": ("st.global.u32 [%ptr0], %tid; ld.global.nc.u32 %r10, [%ptr0];", "after it was written"),
    "read-only, then written": ("ld.global.nc.u32 %r10, [%ptr0]; st.global.u32 [%ptr0], %tid;", "read-only cache"),
    "too narrow a register": ("ld.global.u32 %h0, [%a0];", "does not fit"),
    "an endless loop": ("LOOP: bra.uni LOOP;", "does not end"),
    "trap": ("setp.eq.u32 %p0, %tid, 3; @%p0 trap;", "trap.*"),
    "an unknown register": ("mov.u32 %r10, %foo;", "the register %foo is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_sentence(what, monkeypatch):
    from . import run

    monkeypatch.setattr(run, "LIMIT", 10_000)
    body, sentence = REFUSED[what]
    with pytest.raises(PtxError, match=sentence):
        execute(body, np.zeros(32, np.uint32))


def test_errors_name_block_thread_and_line():
    with pytest.raises(PtxError, match=r"block \(1, 0, 0\), thread 32 and its warp, PTX line \d+: ld.global"):
        execute("ld.global.u32 %r10, [%ptr0];", np.zeros(96, np.uint32), grid=2, block=64)
