"""What nvcc made of the CUDA kernels, run on tiny cases by the interpreter in tests/ptx: inline assembly included,
launched by the real launchers.
"""

import re

import cuda_build
import pytest
import torch
from ptx.device import kernels, running

from fastseq.ops.lstm_cell import reference as cell
from fastseq.testing import Results, compare

cuda_build.require()
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def named(*results) -> Results:
    return Results(dict(zip(("h", "c_n"), results, strict=False)), dict(zip(("gates", "c"), results[2:], strict=True)))


def lstm_cell(dtype, B, H):
    tensors = [torch.randn(B, n).to(dtype) for n in (4 * H, H, H, H)]

    def plain(dtype):
        gates, c, grad_h, grad_c = (t.to(dtype) for t in tensors)
        h, c_n, saved = cell.forward(gates, c)
        return named(h, c_n, *cell.backward(grad_h, grad_c, gates, c, saved))

    def ours():
        gates, c, grad_h, grad_c = (t.clone() for t in tensors)
        h, c_n, activations = torch.ops.fastseq_ptx.lstm_cell_forward(gates, c)
        return named(h, c_n, *torch.ops.fastseq_ptx.lstm_cell_backward(activations, c, c_n, grad_h, grad_c))

    return ours, plain(F64), plain(dtype)


# name -> the kernels that it launches, and the case: what runs them, the oracle, torch in the same dtype.
CELL = {"lstm_cell_forward_kernel", "lstm_cell_backward_kernel"}
CASES = {
    f"lstm_cell {str(dtype)[6:]} {B}x{H}": (CELL, lambda dtype=dtype, B=B, H=H: lstm_cell(dtype, B, H))
    for dtype in (F32, BF16, F16, F64)
    for B, H in ((3, 8), (2, 5))
}


def template(name: str) -> str:
    """A kernel's name without template arguments."""
    return cuda_build.readable(name).split("<")[0]


def check(name: str, capability: int, **options) -> None:
    launched, case = CASES[name]
    ours, oracle, baseline = case()
    with running(capability, **options) as log:
        actual = ours()
    assert {template(kernel) for kernel in log} == launched
    wrong = [str(c) for c in compare(actual, oracle, baseline) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("capability", cuda_build.PTX_ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, capability):
    check(name, capability)


def test_every_kernel_is_in_a_case():
    there = {template(name) for architecture in cuda_build.PTX_ARCHITECTURES for name in kernels(architecture)}
    tested = set().union(*(launched for launched, _ in CASES.values()))
    assert there == tested, f"without a case in CASES: {there - tested}; in CASES, but not compiled: {tested - there}"


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
