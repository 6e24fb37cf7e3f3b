"""Every Triton kernel, compiled ahead of time through its launcher, without a GPU.

triton_table.json holds registers, memory and instruction counts of the binaries. After an intended change, renew the
rows of the installed Triton: python tests/triton/test_triton_binaries.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import triton
import triton_cache
from triton_binaries import facts

import fastseq
from fastseq import ops
from fastseq.ops.common.triton.compile import compiled, compiling_for
from fastseq.ops.common.triton.runtime import CHIPS
from fastseq.warmup import warmup

VARIANT = ("recurrent_dropout", "zoneout_cell", "layer_norm")
TABLE = Path(__file__).with_name("triton_table.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def zeros(dtype, *shapes):
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def cell(H, dtype, N=3):
    h, c = ops.lstm_cell(*zeros(dtype, (N, 4 * H), (N, H)), backend="triton")
    (h.sum() + c.sum()).backward()


def lstm(H, dtype, T=2, B=2):
    input, h0, c0, *weights = zeros(dtype, (T, B, H), (B, H), (B, H), (4 * H, H), (4 * H, H), (4 * H,), (4 * H,))
    output, (h_n, c_n) = ops.lstm(input, (h0, c0), *weights, lengths=torch.full((B,), T), backend="triton")
    (output.sum() + h_n.sum() + c_n.sum()).backward()


def variant(H, dtype, T=2, B=2):
    """All options: masks of 0 drop and keep nothing that matters to a compiler."""
    gates, h0, c0, weight, *norms = zeros(dtype, (T, B, 4 * H), (B, H), (B, H), (4 * H, H), (4 * H,), (H,), (H,))
    keep = torch.zeros(T, B, H, dtype=torch.bool)
    output, (h_n, c_n), cells = ops.lstm_variant(
        gates, (h0, c0), weight, hidden_mask=torch.ones(B, H), zoneout_hidden=keep, zoneout_cell=keep,
        norms=tuple(norms), lengths=torch.full((B,), T), return_cell_states=True, backend="triton",
    )  # fmt: skip
    (output.sum() + h_n.sum() + c_n.sum() + cells.sum()).backward()


def attention(score, A, D, dtype, T=3, S=4, B=2, coverage=False):
    query, keys, values, *more = zeros(dtype, (B, T, A), (B, S, A), (B, S, D), *([(A,)] * 2 if score != "dot" else []))
    covered = {}
    if coverage:
        covered = dict(zip(("coverage", "coverage_weight"), zeros(dtype, (B, T, S), (A,)), strict=True))
    context, weights = ops.attention(
        query, keys, values, score=score, **dict(zip(("weight", "bias"), more, strict=False)), **covered,
        lengths=torch.full((B,), S), need_weights=True, backend="triton",
    )  # fmt: skip
    (context.sum() + weights.sum()).backward()


def loss(V, H, dtype, N=3):
    input, weight, bias = zeros(dtype, (N, H), (V, H), (V,))
    target, options = torch.zeros(N, dtype=torch.int64), {"label_smoothing": 0.1, "backend": "triton"}
    ops.linear_cross_entropy(input, weight, target, bias, reduction="sum", **options).backward()
    ops.linear_cross_entropy(input, weight, target, bias, reduction="none", **options).sum().backward()


CASES = {
    "lstm_cell 512 float32": lambda: cell(512, F32),
    "lstm_cell 512 bfloat16": lambda: cell(512, BF16),
    "lstm 16 float16": lambda: lstm(16, F16),
    "lstm 64 float32": lambda: lstm(64, F32),
    "lstm 128 bfloat16": lambda: lstm(128, BF16),
    "lstm 128 float32": lambda: lstm(128, F32),
    "lstm 257 bfloat16": lambda: lstm(257, BF16),
    "lstm 512 float32": lambda: lstm(512, F32),
    "lstm 512 bfloat16": lambda: lstm(512, BF16),
    "lstm 1024 float32": lambda: lstm(1024, F32),
    "lstm 1024 bfloat16": lambda: lstm(1024, BF16),
    "lstm_variant 1024 bfloat16": lambda: variant(1024, BF16),
    "attention dot 512 512 bfloat16": lambda: attention("dot", 512, 512, BF16),
    "attention dot 256 1024 float32": lambda: attention("dot", 256, 1024, F32),
    "attention additive 512 1024 bfloat16": lambda: attention("additive", 512, 1024, BF16),
    "attention dot 257 300 float32": lambda: attention("dot", 257, 300, F32),
    "attention additive 257 300 float16": lambda: attention("additive", 257, 300, F16),
    "attention additive 256 512 float32": lambda: attention("additive", 256, 512, F32),
    "attention additive, coverage 256 512 float32": lambda: attention("additive", 256, 512, F32, coverage=True),
    "loss 16384 float32": lambda: loss(16384, 16, F32),
    "loss 16384 bfloat16": lambda: loss(16384, 16, BF16),
    "loss 257 float32": lambda: loss(257, 16, F32),
}
NO_PRODUCT = ("lstm_cell_", "lstm_variant_", "attention_additive_", "cross_entropy_")  # kernels without tl.dot


def build(case: str, target: str) -> dict[str, dict[str, int]]:
    """Run a case for a chip; return the facts of each launched kernel, by name."""
    chip = CHIPS[target]
    with compiling_for(chip) as launches:
        CASES[case]()
    return {k.name: facts(k, chip) for k in compiled(chip) if k.hash in launches}


def expected_of(case: str, target: str) -> dict[str, dict[str, int]] | None:
    return json.loads(TABLE.read_text()).get(triton.__version__, {}).get(f"{case} {target}")


def check_limits(name: str, actual: dict[str, int], chip, case: str) -> None:
    assert actual["spilled"] == 0, f"{name} spills registers: {actual}"
    assert actual["shared"] <= chip.shared_memory, f"{name} needs more shared memory than {chip}: {actual}"
    if chip.is_nvidia:
        assert actual["registers"] * actual["threads"] <= 65536, (
            f"{name}: one program exceeds the register file: {actual}"
        )
    else:
        waves = -(-actual["threads"] // 64 // 4)  # per SIMD; four SIMDs of 512 registers
        assert actual["registers"] * waves <= 512, f"{name}: one program exceeds the register file: {actual}"
    products = sum(actual.get(kind, 0) for kind in ("mma", "wgmma", "tcgen05", "mfma"))
    additive_forward = name == "attention_forward_kernel" and "additive" in case
    if not name.startswith(NO_PRODUCT) and not additive_forward:
        assert products > 0, f"{name} multiplies without tensor cores: {actual}"
    if not any(odd in case for odd in ("257", "lstm 16 ")):
        assert actual["wide_loads"] > 0, f"{name} has no 16-byte loads: {actual}"


def check_growth(name: str, actual: dict[str, int], expected: dict[str, int], case: str) -> None:
    for what in ("registers", "shared"):
        assert actual[what] <= 1.1 * expected[what], (
            f"{name}, {case}: {what} grew from {expected[what]} to {actual[what]}, more than 10 %; if intended, "
            "renew the table: python tests/triton/test_triton_binaries.py"
        )
    for what in ("mma", "wgmma", "tcgen05", "mfma", "wide_loads"):
        assert bool(actual.get(what)) == bool(expected.get(what)), f"{name}, {case}: {what} was {expected}, is {actual}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_fits_the_chip_and_the_table(case, target):
    actual, expected = build(case, target), expected_of(case, target)
    assert actual
    for name, kernel in actual.items():
        check_limits(name, kernel, CHIPS[target], case)
    if expected is None:
        warnings.warn(
            f"tests/triton/triton_table.json has no row for Triton {triton.__version__}, {case}", stacklevel=1
        )
        return
    assert actual.keys() == expected.keys()
    for name, kernel in actual.items():
        check_growth(name, kernel, expected[name], f"{case} on {target}")


@pytest.mark.parametrize("case", ["lstm 1024 bfloat16", "lstm 1024 float32"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_large_products_take_the_widest_reliable_instruction(case, target):
    """wgmma on Hopper from Triton 3.7.1 on, else mma. See _wide_products_work."""
    trusted = target == "sm_90" and triton.__version__ != "3.6.0"
    for name, kernel in build(case, target).items():
        assert (kernel["wgmma"] > 0) == trusted, f"{name}: {kernel}"
        assert kernel["tcgen05"] == 0, f"{name}: {kernel}"
        assert (kernel["mma"] > 0) != trusted, f"{name}: {kernel}"


@pytest.mark.parametrize("case", ["lstm 64 float32", "lstm 128 bfloat16"])
def test_chips_with_little_shared_memory(case):
    """99 KiB instead of 227. A launch that needs more raises OutOfResources, as on the GPU."""
    for name, kernel in build(case, "sm_89").items():
        check_limits(name, kernel, CHIPS["sm_89"], case)


def test_a_kernel_that_does_not_fit_is_refused(monkeypatch):
    from fastseq.ops.lstm import triton as backend

    keep_all = backend.Config(16, 128, 0, warps=8, stages=2)
    monkeypatch.setattr(backend, "configure", lambda *_, **__: keep_all)
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        build("lstm 128 bfloat16", "sm_89")


LENGTHS, BATCHES = range(1, 21), (1, 2, 3, 7, 16, 17, 32, 48, 64, 100)


@pytest.mark.parametrize(("H", "dtype"), [(16, F32), (63, BF16), (512, F32), (512, BF16)], ids=str)
def test_lengths_and_batch_sizes_compile_nothing(H, dtype):
    """Every T, B and S runs the same compiled kernels."""
    chip = CHIPS["sm_90"]

    def kernels():
        return {(k.name, k.hash) for k in compiled(chip)}

    def work(T, B):
        cell(H, dtype, N=B)
        lstm(H, dtype, T, B)
        attention("additive", H, H, dtype, T, S=T, B=B)
        if H == 16:
            variant(H, dtype, T, B)

    with compiling_for(chip):
        work(2, 5)
        before = kernels()
        for T in LENGTHS:
            work(T, 5)
        for B in BATCHES:
            work(2, B)
    assert kernels() == before


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Fill a Triton cache by ``fastseq warmup`` for H = 24; return it and the finished process."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, run_warmup(folder, "--coverage", "--variant", *VARIANT)


def run_warmup(folder: Path, *options) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSEQ_", "PYTEST"))}
    command = [sys.executable, "-m", "fastseq", "warmup", "--hidden-size", "24", "--dtype", "bf16", "--chip", "sm_90"]
    environment = kept | {"TRITON_CACHE_DIR": str(folder)}
    return subprocess.run([*command, *options], env=environment, text=True, capture_output=True)


def binaries(folder: Path) -> set[Path]:
    return set(folder.rglob("*.cubin"))


@pytest.mark.slow
def test_warmup_compiles_into_the_cache(warm):
    folder, process = warm
    assert process.returncode == 0, process.stderr
    count = len(binaries(folder))
    assert re.fullmatch(
        rf"compiled for sm_90, H=24, bf16: [\d.]+ s, {count} kernels; 0 were in the cache\n", process.stdout
    )
    names = {path.stem for path in binaries(folder)}
    assert {"lstm_cell_forward_kernel", "lstm_sequence_backward_kernel", "attention_grad_scores_kernel"} <= names
    assert "lstm_variant_backward_kernel" in names


@pytest.mark.slow
def test_a_moved_cache_serves_after_its_paths_are_mended(warm, tmp_path):
    """gpu_check.py brings one to the machine with the GPU. Triton's groups of files have absolute paths."""
    moved = shutil.copytree(warm[0], tmp_path / "moved")
    triton_cache.relocate(moved)
    for group in moved.glob("*/__grp__*.json"):
        assert str(warm[0]) not in group.read_text()
    hidden = warm[0].rename(tmp_path / "gone")
    try:
        again = run_warmup(moved)
    finally:
        hidden.rename(warm[0])
    assert re.search(r" 0 kernels; \d\d were in the cache\n", again.stdout), again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("H", [24, 264])
def test_warmup_leaves_nothing_to_compile(H, warm, monkeypatch):
    """Training and decoding after ``fastseq warmup``: an encoder, a decoder, steps of cells, attention.

    For H = 24, to keep the other case short, also a variant of the LSTM and coverage.
    """
    folder = warm[0]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    chip, before = CHIPS["sm_90"], binaries(folder)
    warmup(H, BF16, variant=VARIANT if H == 24 else (), coverage=H == 24, chip=chip.name)
    assert H != 24 or binaries(folder) == before, "this process must use the cache of the command"
    before = {k.hash for k in compiled(chip)}
    encoder = fastseq.LSTM(H, H, bidirectional=True, dtype=BF16, backend="triton")
    decoder = fastseq.LSTM(H, H, dtype=BF16, backend="triton")
    additive = fastseq.Attention(H, H, score="additive", dtype=BF16, backend="triton")
    covered = fastseq.Attention(H, H, score="additive", coverage=True, dtype=BF16, backend="triton")
    options = {"recurrent_dropout": 0.1, "zoneout_cell": 0.1, "layer_norm": True}
    variant = fastseq.LSTM(H, H, bidirectional=True, **options, dtype=BF16, backend="triton")
    with compiling_for(chip) as launches:
        for train in (True, False):
            variant.train(train)
            with torch.set_grad_enabled(train):
                source, target = torch.zeros(7, 20, H, dtype=BF16), torch.zeros(4, 20, H, dtype=BF16)
                lengths = torch.arange(20) % 8
                memory, (h, c) = encoder(source, lengths=lengths)
                memory = memory[..., :H] + memory[..., H:]
                output, _ = decoder(target, (h[:1].contiguous(), c[1:]))
                query, keys = output.transpose(0, 1), memory.transpose(0, 1)
                context, _ = ops.attention(query, keys, lengths=lengths.int(), backend="triton")
                context = context + additive(query, keys, mask=torch.ones(20, 7, dtype=torch.bool))[0]
                if H == 24:
                    coverage = torch.zeros(20, 4, 7, dtype=BF16, requires_grad=train)
                    context = context + covered(query, keys, coverage=coverage, lengths=lengths)[0]
                    normed, _ = variant(source, lengths=lengths)
                    context = context + normed[:1, :, :H].transpose(0, 1)
                _, (last, _) = decoder(target)
                steps = ops.lstm_cell(target[0].repeat(1, 4), target[0].requires_grad_(train), backend="triton")
                if train:
                    (context.sum() + steps[0].sum()).backward()
                    last.sum().backward()
    assert launches
    assert {k.hash for k in compiled(chip)} == before


def write_table() -> None:
    """Write one line per case and chip."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = {f"{case} {target}": build(case, target) for case in CASES for target in TARGETS}
    versions = (
        f'"{version}": {{\n' + ",\n".join(f'"{case}": {json.dumps(rows[case])}' for case in sorted(rows)) + "\n}"
        for version, rows in sorted(table.items())
    )
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


if __name__ == "__main__":
    write_table()
