"""What nvcc made of the CUDA kernels, run on tiny cases by the interpreter in tests/ptx: inline assembly included,
launched by the real launchers. The cases are those of the kernels' own tests, on another place.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import cuda_build
import pytest
import test_cuda_lstm_cell
import torch
from cuda_cases import Place
from ptx.device import running

cuda_build.require()
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    kernels: set[str]  # that it launches, without template arguments
    test: Callable  # of a place and the arguments
    arguments: tuple
    capabilities: tuple[int, ...] = cuda_build.PTX_ARCHITECTURES


CELL = {"lstm_cell_forward_kernel", "lstm_cell_backward_kernel"}
CASES = {
    f"lstm_cell {str(dtype)[6:]} {B}x{H}": Case(CELL, test_cuda_lstm_cell.test_parity, (B, H, dtype, "both"))
    for dtype in (F32, BF16, F16, F64)
    for B, H in ((3, 8), (2, 5))
}


def template(name: str) -> str:
    """A kernel's name without template arguments."""
    return cuda_build.readable(name).split("<")[0]


def check(name: str, capability: int, **options) -> None:
    """Everything is allocated while the device is there: only such tensors are its memory."""
    case = CASES[name]
    with running(capability, **options) as log:
        case.test(Place("ptx", torch.ops.fastseq_ptx, "cpu"), *case.arguments)
    assert {template(kernel) for kernel in log} == case.kernels


@pytest.mark.parametrize(("name", "capability"), [(name, c) for name, case in CASES.items() for c in case.capabilities])
def test_parity(name, capability):
    check(name, capability)


def test_every_kernel_is_in_a_case():
    there = {
        template(name) for architecture in cuda_build.PTX_ARCHITECTURES for name in cuda_build.kernels(architecture)
    }
    tested = set().union(*(case.kernels for case in CASES.values()))
    assert there == tested, f"without a row in CASES: {there - tested}; in CASES, but not compiled: {tested - there}"


# bug -> case, pattern in the PTX and its replacement, what is said of it.
PLANTED = {
    "no check for the end of the batch": (
        "lstm_cell float32 3x8", r"(setp\.ge\.s64 %p1,[^;]*;\s*)@%p1 bra [^;]*;", r"\1", "out of bounds: global load"
    ),
    "a load from the next element": (
        "lstm_cell float32 3x8", r"(ld\.global\.nc\.v4\.f32 \{[^}]*\}, \[%rd\d+)\]", r"\1+4]", "misaligned: global load"
    ),
    "a result that is not stored": ("lstm_cell float32 3x8", r"st\.global\.v4\.f32[^;]*;", "", "c_n: error"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(bug):
    name, pattern, replacement, said = PLANTED[bug]
    assert any(re.search(pattern, text) for text in cuda_build.ptx(90))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        check(name, 90, edit=lambda text: re.sub(pattern, replacement, text))
