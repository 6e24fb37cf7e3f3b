"""Every CUDA kernel, compiled for sm_80, sm_90, sm_100 and sm_120: no spills, fits the chip, stays within its budget.

cuda_budget.json holds registers, memory and instruction counts per kernel, except for sm_120. After an intended
change: python tests/cuda/test_cuda_budget.py --write
"""

import functools
import json
import re
import sys
from pathlib import Path

import cuda_build
import pytest

TABLE = Path(__file__).with_name("cuda_budget.json")
RENEW = "if this is intended, renew the table: python tests/cuda/test_cuda_budget.py --write"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # limit of one block, bytes
BUDGETED = (80, 90, 100)  # architectures in the table
PRINTF_STACK = 32  # bytes of stack for the arguments of abort_kernel's printf
# Kernel name (pattern), first architecture, kinds of instructions that the kernel must contain.
MUST_HAVE = (
    (r"lstm_cell_\w+<.*, [248]>", 80, ("wide_loads", "wide_stores")),
    (r"lstm_step_kernel<\w+, \w+, [48],", 80, ("wide_loads",)),
    (r"lstm_grid_\w+<.*(MmaHalf|MmaTf32)", 80, ("mma", "wide_loads")),
    (r"lstm_cluster_\w+<", 90, ("mma",)),
    (r"attention_(forward|product)_kernel<(__half|__nv_bfloat16)", 80, ("mma",)),
)
GROWS = ("registers", "shared", "stack")
KINDS = ("mma", "wide_loads", "wide_stores", "async_copies")


@functools.cache
def compiled_facts(architecture: int) -> dict[str, dict[str, int]]:
    """Return facts per kernel: nvidia_binaries.kernels plus ``threads`` and ``prints``."""
    from nvidia_binaries import kernels

    rows, limits = {}, _limits(architecture)
    for path in cuda_build.binaries(architecture):
        for name, facts in kernels(path, architecture).items():
            rows[cuda_build.readable(name)] = facts | limits[name]
    return rows


@functools.cache
def _limits(architecture: int) -> dict[str, dict[str, int]]:
    """Read from the PTX of each kernel: maximum threads of a block, and 1 if it calls printf."""
    limits = {}
    for text in cuda_build.ptx(cuda_build.nearest_ptx(architecture)):
        for kernel in text.split(".entry ")[1:]:
            name, _, body = kernel.partition("(")
            threads = re.search(r"\.(?:maxntid|reqntid) (\d+)", body[: body.index("{")])
            limits[name] = {"threads": int(threads[1]) if threads else 1024, "prints": int("vprintf" in body)}
    return limits


def expected(architecture: int) -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text()).get(f"sm_{architecture}", {})


def problems(name: str, facts: dict[str, int], row: dict[str, int] | None, architecture: int) -> list[str]:
    """Return the faults of a kernel as sentences. row: its row of the table."""
    faults, where = [], f"{name} on sm_{architecture}"
    if facts["local"] or facts["local_loads"] or facts["stack"] > (PRINTF_STACK if facts["prints"] else 0):
        faults.append(
            f"{where} spills, or keeps an array in local memory, stack {facts['stack']} bytes: give a thread a smaller "
            "tile or a block fewer threads, and index arrays by constants only"
        )
    if facts["registers"] * facts["threads"] > 65536:
        faults.append(f"{where}: {facts['threads']} threads of {facts['registers']} registers exceed the register file")
    if facts["shared"] > SHARED_MEMORY[architecture]:
        faults.append(f"{where}: {facts['shared']} bytes of static shared memory exceed the chip's")
    for pattern, since, kinds in MUST_HAVE:
        if architecture >= since and re.search(pattern, name):
            faults += [f"{where} has no {kind}" for kind in kinds if not facts[kind]]
    if architecture not in BUDGETED:
        return faults
    if row is None:
        return [*faults, f"{where} has no row in {TABLE.name}; {RENEW}"]
    more = [w for w in GROWS if facts[w] > 1.1 * row[w]]
    less = [w for w in KINDS if facts[w] < 0.9 * row[w]]
    faults += [f"{where}: {w} grew from {row[w]} to {facts[w]}, more than 10 %; {RENEW}" for w in more]
    return faults + [f"{where}: {w} fell from {row[w]} to {facts[w]}, more than 10 %; {RENEW}" for w in less]


@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_fits_the_chip_and_the_table(architecture):
    cuda_build.require()
    kernels, table = compiled_facts(architecture), expected(architecture)
    assert kernels
    wrong = [s for name, facts in kernels.items() for s in problems(name, facts, table.get(name), architecture)]
    wrong += [f"{name} on sm_{architecture} is in {TABLE.name} only; {RENEW}" for name in table.keys() - kernels.keys()]
    assert not wrong, "\n".join(wrong)


GOOD = {"registers": 100, "stack": 0, "shared": 1000, "local": 0, "local_loads": 0, "threads": 256}
GOOD |= {"prints": 0, "mma": 16, "wide_loads": 8, "wide_stores": 4, "async_copies": 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"registers": 120}, "registers grew from 100 to 120, more than 10 %; .* --write"),
        ({"shared": 2000}, "shared grew"),
        ({"local_loads": 1}, "spills, or keeps an array in local memory"),
        ({"stack": 8}, "an array in local memory, stack 8 bytes"),
        ({"stack": 80, "prints": 1}, "an array in local memory, stack 80 bytes"),
        ({"threads": 1024}, "exceed the register file"),
        ({"shared": 240_000}, "static shared memory"),
        ({"mma": 0}, "mma fell from 16 to 0"),
        ({"wide_loads": 4}, "wide_loads fell"),
    ],
    ids=str,
)
def test_each_fault_is_reported(change, sentence):
    assert problems("k", GOOD, GOOD, 90) == []
    assert re.search(sentence, "\n".join(problems("k", GOOD | change, GOOD, 90)))


def test_missing_instructions_are_reported():
    plain = GOOD | {"mma": 0, "wide_loads": 0}
    for name, kinds in (
        ("lstm_grid_backward_kernel<grid_backward::MmaHalf<__half>, 1>", 2),
        ("lstm_cluster_forward_kernel<float>", 1),
    ):
        assert len(problems(name, plain, plain, 90)) == kinds
    assert problems("lstm_cluster_forward_kernel<float>", plain, plain, 80) == []


def test_a_kernel_without_a_row():
    assert "k on sm_80 has no row in cuda_budget.json" in problems("k", GOOD, None, 80)[0]


PLANTED = """
__global__ void __launch_bounds__(1024) planted(float* x) {
  float v[200];
  #pragma unroll
  for (int i = 0; i < 200; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[199 - i];
}
"""


def test_a_spill_is_reported(tmp_path):
    """Compiles a kernel that needs 200 registers with a limit of 64."""
    cuda_build.require()
    from nvidia_binaries import kernels

    source, out = tmp_path / "planted.cu", tmp_path / "planted.cubin"
    source.write_text(PLANTED)
    flags = ("-cubin", "-gencode=arch=compute_80,code=sm_80")
    cuda_build.run(cuda_build.cuda.find_toolkit().nvcc, *flags, source, "-o", out)
    ((name, facts),) = kernels(out).items()
    assert facts["local_loads"] > 0
    assert "spills" in problems(name, facts | {"threads": 1024, "prints": 0}, None, 80)[0]


def write_table() -> None:
    """Write the table, one line per kernel."""
    columns = (*GROWS, "threads", *KINDS)
    table = {
        f"sm_{chip}": {name: {c: row[c] for c in columns} for name, row in sorted(compiled_facts(chip).items())}
        for chip in BUDGETED
    }
    sections = (
        f'"{chip}": {{\n' + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}"
        for chip, rows in table.items()
    )
    TABLE.write_text("{\n" + ",\n".join(sections) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: python {sys.argv[0]} --write")
    sys.path.append(
        str(cuda_build.ROOT / "tests/triton")
    )  # for nvidia_binaries; pytest reads the path from pyproject.toml
    write_table()
