"""Multi-thread instructions against numpy, in several orders; planted bugs must be reported."""

import numpy as np
import pytest

from . import PtxError, formats
from .handwritten import execute

LANE = np.arange(32)
ZEROS = np.zeros(32, np.uint32)
X = (np.arange(32) * 17 % 101).astype(np.uint32)
SHARED = ".shared .align 16 .b8 s[512];"


def run(body: str, *, out=ZEROS, x=X, **options) -> np.ndarray:
    """Run ``body``, which computes %r11 from %r10, the thread's element of ``x``."""
    whole = f"ld.global.u32 %r10, [%ptr0];\n{body}\nst.global.u32 [%ptr1], %r11;"
    return execute(whole, x, out, **options)[1]


def test_shuffles():
    def shuffled(mode, by, clamp=31, mask="0xffffffff"):
        return run(f"shfl.sync.{mode}.b32 %r11|%p0, %r10, {by}, {clamp}, {mask};")

    np.testing.assert_array_equal(shuffled("bfly", 5), X[LANE ^ 5])
    np.testing.assert_array_equal(shuffled("down", 3), X[np.where(LANE + 3 < 32, LANE + 3, LANE)])
    np.testing.assert_array_equal(shuffled("up", 3, 0), X[np.where(LANE >= 3, LANE - 3, LANE)])
    np.testing.assert_array_equal(shuffled("idx", 9), np.full(32, X[9]))
    groups_of_8 = 31 | (24 << 8)
    np.testing.assert_array_equal(shuffled("idx", 2, groups_of_8), X[LANE // 8 * 8 + 2])


def test_shuffle_reports_lanes_in_range():
    out = run("shfl.sync.down.b32 %r12|%p0, %r10, 3, 31, 0xffffffff; selp.u32 %r11, 1, 0, %p0;")
    np.testing.assert_array_equal(out, LANE + 3 < 32)


def test_lanes_converge_from_different_branches():
    """Each half of the warp takes a branch with a shuffle within it; then all lanes meet in one shuffle."""
    body = """
    setp.lt.u32 %p0, %tid, 16; @%p0 bra LOW;
    shfl.sync.bfly.b32 %r12, %r10, 1, 31, 0xffff0000; bra.uni JOIN;
    LOW: shfl.sync.bfly.b32 %r12, %r10, 2, 31, 0x0000ffff;
    JOIN: shfl.sync.bfly.b32 %r11, %r12, 16, 31, 0xffffffff;
    """
    halves = np.where(LANE < 16, X[LANE ^ 2], X[LANE ^ 1])
    np.testing.assert_array_equal(run(body), halves[LANE ^ 16])


def test_votes_and_reductions():
    odd = "and.b32 %r12, %r10, 1; setp.eq.u32 %p0, %r12, 1;"
    bits = int(sum(1 << i for i in LANE[X % 2 == 1]))
    np.testing.assert_array_equal(run(f"{odd} vote.sync.ballot.b32 %r11, %p0, 0xffffffff;"), bits)
    np.testing.assert_array_equal(run(f"{odd} vote.sync.any.pred %p1, %p0, -1; selp.u32 %r11, 1, 0, %p1;"), 1)
    np.testing.assert_array_equal(run(f"{odd} vote.sync.all.pred %p1, %p0, -1; selp.u32 %r11, 1, 0, %p1;"), 0)
    np.testing.assert_array_equal(run("redux.sync.add.u32 %r11, %r10, 0xffffffff;"), X.sum())
    np.testing.assert_array_equal(run("activemask.b32 %r11;"), 2**32 - 1)
    body = (
        "mov.u32 %r11, 0; setp.lt.u32 %p9, %tid, 4; @%p9 bra E; elect.sync %r12|%p0, -16; selp.u32 %r11, 1, 0, %p0; E:"
    )
    np.testing.assert_array_equal(run(body), LANE == 4)


def through_shared(barrier: str, seed: int) -> np.ndarray:
    """128 threads pass their element to a thread of another warp."""
    x = np.arange(128, dtype=np.uint32)
    body = f"""
    {SHARED}
    mov.u32 %r20, s; shl.b32 %r21, %tid, 2; add.u32 %r21, %r20, %r21; st.shared.u32 [%r21], %r10;
    {barrier}
    xor.b32 %r22, %tid, 127; shl.b32 %r22, %r22, 2; add.u32 %r22, %r20, %r22; ld.shared.u32 %r11, [%r22];
    """
    return run(body, x=x, out=x.copy(), block=128, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_barrier(seed):
    for barrier in ("bar.sync 0;", "barrier.sync 1, 128;", "mov.u32 %r30, 2; bar.sync %r30;"):
        np.testing.assert_array_equal(through_shared(barrier, seed), np.arange(128)[::-1])


def test_a_missing_barrier_reads_poison():
    assert (through_shared("", 0) == 0xFFFFFFFF).any()


def test_barrier_with_a_vote():
    body = "setp.lt.u32 %p0, %tid, 70; bar.red.popc.u32 %r11, 0, %p0; bar.red.and.pred %p1, 0, %p0; @%p1 trap;"
    x = np.zeros(96, np.uint32)
    np.testing.assert_array_equal(run(body, x=x, out=x.copy(), block=96), 70)


COPY = f"""
{SHARED}
mov.u32 %r20, s; shl.b32 %r21, %tid, 4; add.u32 %r21, %r20, %r21; mad.wide.u32 %d0, %tid, 16, %a0;
st.shared.u32 [%r21], 7; cp.async.cg.shared.global [%r21], [%d0], 16; cp.async.commit_group;
"""


@pytest.mark.parametrize(
    ("wait", "arrived"),
    [
        ("", False),
        ("cp.async.wait_group 1;", False),
        ("cp.async.wait_group 0;", True),
        ("cp.async.wait_all;", True),
        ("cp.async.commit_group; cp.async.wait_group 1;", True),
    ],
)
def test_copies_arrive_only_at_the_wait(wait, arrived):
    x = np.arange(128, dtype=np.uint32) + 1000
    out = execute(f"{COPY} {wait} ld.shared.u32 %r11, [%r21]; st.global.u32 [%ptr1], %r11;", x, ZEROS)[1]
    np.testing.assert_array_equal(out, x[::4] if arrived else 7)


def test_a_copy_of_fewer_bytes_fills_with_zeros():
    x = np.arange(128, dtype=np.uint32) + 1000
    body = COPY.replace("], 16;", "], 16, 4;") + "cp.async.wait_all; ld.shared.v2.u32 {%r11, %r12}, [%r21];"
    out = execute(body + "add.u32 %r11, %r11, %r12; st.global.u32 [%ptr1], %r11;", x, ZEROS)[1]
    np.testing.assert_array_equal(out, x[::4])


def fragments(matrix, place):
    """Distribute a matrix over lanes: place(lane, element) -> index; 16-bit elements in pairs."""
    count = 4 if place.__name__.startswith("c") else matrix.size // 32
    held = np.array([[matrix[place(lane, e)] for e in range(count)] for lane in range(32)], matrix.dtype)
    return held.view(np.uint32)


# Transcribed from the tables of the PTX ISA, row by row.
def a16(lane, e):
    group, quad = lane >> 2, lane % 4
    row = group if e in (0, 1, 4, 5) else group + 8
    return row, quad * 2 + (e & 1) + (8 if e >= 4 else 0)


def b16(lane, e):
    return (lane % 4) * 2 + (e & 1) + (8 if e >= 2 else 0), lane >> 2


def a_tf32(lane, e):
    group, quad = lane >> 2, lane % 4
    return (group if e in (0, 2) else group + 8), (quad if e in (0, 1) else quad + 4)


def b_tf32(lane, e):
    return (lane % 4 if e == 0 else lane % 4 + 4), lane >> 2


def c_any(lane, e):
    return (lane >> 2 if e in (0, 1) else (lane >> 2) + 8), (lane % 4) * 2 + (e & 1)


MMA = {"bf16": ("m16n8k16", a16, b16), "f16": ("m16n8k16", a16, b16), "tf32": ("m16n8k8", a_tf32, b_tf32)}


def multiply(kind: str, swap: bool = False, **change) -> tuple[np.ndarray, np.ndarray]:
    """Multiply random matrices by mma -> actual and expected result, (16, 8)."""
    rng, (shape, a_place, b_place) = np.random.default_rng(3), MMA[kind]
    depth = int(shape.split("k")[1])
    a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8)))
    narrow = {"bf16": formats.to_bf16, "f16": lambda x: x.astype(np.float16), "tf32": lambda x: x}[kind]
    wide = {"bf16": formats.from_bf16, "f16": lambda x: x, "tf32": lambda x: (x.view("u4") & 0xFFFFE000).view("f4")}[
        kind
    ]
    a, b = narrow(a), narrow(b)
    registers = ["%r40", "%r42" if swap else "%r41", "%r41" if swap else "%r42", "%r43"]
    body = f"""
    mad.wide.u32 %d0, %tid, 16, %a0; ld.global.v4.b32 {{%r40, %r41, %r42, %r43}}, [%d0];
    mad.wide.u32 %d1, %tid, 8, %a1; ld.global.v2.b32 {{%r44, %r45}}, [%d1];
    mad.wide.u32 %d2, %tid, 16, %a2; ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%d2];
    mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
      {{%f0, %f1, %f2, %f3}}, {{{", ".join(registers)}}}, {{%r44, %r45}}, {{%f0, %f1, %f2, %f3}};
    st.global.v4.f32 [%d2], {{%f0, %f1, %f2, %f3}};
    """
    held = execute(body, fragments(a, a_place), fragments(b, b_place), fragments(c, c_any).view(np.float32), **change)[
        2
    ]
    out = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for e in range(4):
            out[c_any(lane, e)] = held[lane, e]
    return out, wide(a).astype(float) @ wide(b).astype(float) + c


@pytest.mark.parametrize("kind", MMA)
def test_matrix_product(kind):
    out, expected = multiply(kind)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MMA)
def test_swapped_operands_are_another_product(kind):
    out, expected = multiply(kind, swap=True)
    assert np.abs(out - expected).max() > 0.1


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    registers = ", ".join(f"%r{40 + n}" for n in range(count))
    stores = "".join(f"st.global.u32 [%d1+{4 * n}], %r{40 + n};" for n in range(count))
    body = f"""
    {SHARED}
    mov.u32 %r20, s; shl.b32 %r21, %tid, 4; add.u32 %r21, %r20, %r21; mad.wide.u32 %d0, %tid, 16, %a0;
    ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%d0]; st.shared.v4.b32 [%r21], {{%r30, %r31, %r32, %r33}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r21];
    mad.wide.u32 %d1, %tid, 16, %a1; {stores}
    """
    out = execute(body, matrices, np.zeros((32, 8), np.uint16))[1].reshape(32, 4, 2)
    for n, matrix in enumerate(matrices[:count]):
        matrix = matrix.T if trans else matrix
        np.testing.assert_array_equal(out[:, n], matrix.reshape(32, 2))


def test_blocks_one_after_another_or_together():
    """Only a cooperative launch can pass a barrier of the grid."""
    body = """
    bar.sync 0; setp.ne.u32 %p0, %tid, 0; @%p0 bra WAIT;
    red.release.gpu.global.add.u32 [%a0], 1;
    SPIN: ld.acquire.gpu.global.u32 %r10, [%a0]; setp.lt.u32 %p1, %r10, 4; @%p1 bra SPIN;
    WAIT: bar.sync 0;
    """
    zero = np.zeros(1, np.uint32)
    for seed in range(3):
        assert execute(body, zero, grid=4, block=64, cooperative=True, seed=seed)[0][0] == 4
    with pytest.raises(PtxError, match=r"deadlock in k(.|\n)*63 threads .*bar.sync 0"):
        execute(body, zero, grid=4, block=64)


def cluster_ring(*changes: tuple[str, str], blocks: int = 2, **options) -> np.ndarray:
    """Run pairs of blocks; each sends its thread numbers to the other's shared memory, with an mbarrier."""
    body = """
    .shared .align 8 .b8 bar[8]; .shared .align 16 .b8 data[256];
    mov.u32 %r20, bar; mov.u32 %r21, data; mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1;
    setp.ne.u32 %p0, %tid, 0; @%p0 bra READY;
    mbarrier.init.shared.b64 [%r20], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 256;
    READY: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    mapa.shared::cluster.u32 %r22, %r20, %r3; shl.b32 %r24, %tid, 3; add.u32 %r25, %r21, %r24;
    mapa.shared::cluster.u32 %r23, %r25, %r3; cvt.u64.u32 %d1, %index;
    SEND: st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%r23], %d1, [%r22];
    SPIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r20], 0; @!%p1 bra SPIN;
    READ: ld.shared.u64 %d2, [%r25]; st.global.u64 [%ptr0], %d2;
    END: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    """
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    numbers = np.zeros(32 * blocks, np.uint64)
    return execute(body, numbers, grid=blocks, cluster=(2,), **options)[0]


@pytest.mark.parametrize("seed", range(4))
def test_cluster(seed):
    others = np.arange(128).reshape(2, 2, 32)[:, ::-1].flatten()
    np.testing.assert_array_equal(cluster_ring(blocks=4, seed=seed), others)
    np.testing.assert_array_equal(cluster_ring(blocks=4, seed=seed, cooperative=True), others)


def test_sent_words_arrive_only_at_the_wait():
    read = "ld.shared.u64 %d2, [%r25];"
    assert (cluster_ring((read, ""), ("SPIN:", f"{read} SPIN:")) == 2**64 - 1).all()


PLANTED = {
    "too many bytes are expected": ("[%r20], 256;", "[%r20], 264;", "deadlock"),
    "the other parity is waited for": ("[%r20], 0;", "[%r20], 1;", "deadlock|in flight"),
    "no wait": ("SPIN:", "bra READ; SPIN:", "st.async to it are in flight"),
    "mbarrier without init": ("mbarrier.init.shared.b64 [%r20], 1;", "", "no mbarrier was initialised"),
    "the mbarrier of another block": ("%d1, [%r22]", "%d1, [%r20]", "different blocks"),
    "arrives twice": ("arrive.expect_tx.shared.b64 _, [%r20], 256", "arrive.shared.b64 _, [%r20], 2", "2 arrivals at"),
    "a rank outside the cluster": ("xor.b32 %r3, %r2, 1", "add.u32 %r3, %r2, 1", "rank 2 in a cluster of 2"),
    "shared::cta for another block": ("%d2, [%r25]", "%d2, [%r23]", "another block's shared memory"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted_in_a_cluster(what):
    *change, sentence = PLANTED[what]
    with pytest.raises(PtxError, match=sentence):
        cluster_ring(tuple(change))


def test_access_to_a_block_that_has_returned():
    body = """
    .shared .align 8 .b8 data[8];
    mov.u32 %r20, data; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p0, %r2, 1; @%p0 ret;
    mov.u32 %r4, 0; LOOP: nanosleep.u32 20; add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 5; @%p1 bra LOOP;
    mapa.shared::cluster.u32 %r22, %r20, 1; ld.shared::cluster.u32 %r10, [%r22];
    """
    with pytest.raises(PtxError, match=r"block \(1, 0, 0\), which has returned"):
        execute(body, ZEROS, grid=2, cluster=(2,))


def test_distributed_shared_memory():
    body = """
    .shared .align 8 .b8 data[128];
    mov.u64 %d3, data; cvta.shared.u64 %d3, %d3; mad.wide.u32 %d3, %tid, 4, %d3; st.u32 [%d3], %index;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mov.u32 %r2, %cluster_ctarank; add.u32 %r2, %r2, 1; and.b32 %r2, %r2, 3;
    mapa.u64 %d4, %d3, %r2; ld.u32 %r10, [%d4]; getctarank.u64 %r11, %d4; mad.lo.u32 %r10, %r11, 1000, %r10;
    st.global.u32 [%ptr0], %r10;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    out = execute(body, np.zeros(128, np.uint32), grid=4, cluster=(4,))[0]
    neighbour = (np.arange(128) // 32 + 1) % 4
    np.testing.assert_array_equal(out, neighbour * 1032 + np.arange(128) % 32)


def test_mbarrier_phases():
    """Before the first phase, parity 1 counts as ended; 32 arrivals end a phase and reset the count."""
    body = """
    .shared .align 8 .b8 bar[8];
    mov.u32 %r20, bar; setp.eq.u32 %p0, %tid, 0; @%p0 mbarrier.init.shared.b64 [%r20], 32; bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r20], 1; selp.u32 %r11, 1, 0, %p1;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r20], 0; selp.u32 %r12, 2, 0, %p1; add.u32 %r11, %r11, %r12;
    bar.sync 0; mbarrier.arrive.shared.b64 %d2, [%r20]; bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r20], 0; selp.u32 %r12, 4, 0, %p1; add.u32 %r11, %r11, %r12;
    mbarrier.test_wait.shared.b64 %p1, [%r20], %d2; selp.u32 %r12, 8, 0, %p1; add.u32 %r11, %r11, %r12;
    bar.sync 0; mbarrier.arrive.shared.b64 %d2, [%r20]; bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r20], 0; selp.u32 %r12, 16, 0, %p1; add.u32 %r11, %r11, %r12;
    """
    np.testing.assert_array_equal(run(body), 1 + 4 + 8)


WRONG = {
    "a barrier that half of the threads skip": ("setp.lt.u32 %p0, %tid, 16; @%p0 bar.sync 0;", "deadlock"),
    "a barrier after some returned": ("setp.lt.u32 %p0, %tid, 16; @%p0 ret; bar.sync 0;", "deadlock"),
    "a shuffle after some returned": (
        "setp.lt.u32 %p0, %tid, 16; @%p0 ret; shfl.sync.bfly.b32 %r10, %tid, 1, 31, -1;",
        "lane 0 is in the mask, but has returned",
    ),
    "a lane outside its mask": ("shfl.sync.bfly.b32 %r10, %tid, 1, 31, 0xff;", "lane 8 is not in its mask"),
    "a shuffle from outside the mask": (
        "setp.ge.u32 %p0, %tid, 16; @%p0 bra E; shfl.sync.bfly.b32 %r10, %tid, 16, 31, 0xffff; E:",
        "from a lane outside its mask",
    ),
    "half a warp multiplies": (
        "setp.lt.u32 %p0, %tid, 16; @%p0 mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%f0,%f1,%f2,%f3}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f0,%f1,%f2,%f3};",
        "lane 16 is in the mask, but has returned",
    ),
    "too many registers of a matrix": (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%f0,%f1,%f2,%f3}, {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7}, {%f0,%f1,%f2,%f3};",
        "wrong number of registers",
    ),
    "a flag that is never raised": (
        "SPIN: ld.acquire.gpu.global.u32 %r10, [%a0]; setp.eq.u32 %p0, %r10, 0; @%p0 bra SPIN;",
        "deadlock",
    ),
    "cp.async at an odd address": ("cp.async.ca.shared.global [2], [%a0], 4;", "misaligned: cp.async"),
    "a wait for a cluster without arriving": ("barrier.cluster.wait.aligned;", "wait without an arrive"),
}


@pytest.mark.parametrize("what", WRONG)
def test_reported(what):
    body, sentence = WRONG[what]
    with pytest.raises(PtxError, match=sentence):
        execute(f"{SHARED} {body}", ZEROS)


def test_a_launch_that_does_not_fit_the_kernel():
    for options, sentence in (
        ({"block": 64, "header": ".maxntid 32, 1, 1\n"}, "at most 32 threads"),
        ({"grid": 3, "cluster": (2,)}, "not divisible into clusters"),
    ):
        with pytest.raises(PtxError, match=sentence):
            execute("ret;", ZEROS, **options)


def test_a_trap_reports_the_last_printf():
    module = ".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n"
    module += ".global .align 1 .b8 form[10] = {108, 97, 110, 101, 32, 37, 117, 33};"  # "lane %u!"
    body = """
    .local .align 8 .b8 depot[8]; mov.u64 %d0, depot; cvta.local.u64 %d1, %d0;
    setp.lt.u32 %p0, %tid, 9; @%p0 bra E;
    st.local.u32 [%d0], %tid; mov.u64 %d2, form; cvta.global.u64 %d2, %d2;
    { .param .b64 param0; st.param.b64 [param0+0], %d2; .param .b64 param1; st.param.b64 [param1+0], %d1;
    .param .b32 retval0; call.uni (retval0), vprintf, (param0, param1); ld.param.b32 %r10, [retval0+0]; }
    trap; E:
    """
    with pytest.raises(PtxError, match=r"trap: .*lane 9!"):
        execute(body, ZEROS, module=module)
