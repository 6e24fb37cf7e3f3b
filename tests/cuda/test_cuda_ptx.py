"""Compiled PTX of the CUDA kernels, inline assembly included, run on tiny cases by the PTX interpreter.

The real launchers launch it. Each case calls a check of the kernel's test file, with the interpreter as the place.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import cuda_build
import pytest
import test_cuda_attention
import test_cuda_coverage
import test_cuda_lstm_cell
import test_cuda_lstm_cluster
import test_cuda_lstm_grid_backward
import test_cuda_lstm_grid_forward
import test_cuda_lstm_step
import test_cuda_lstm_steps
import torch
from cuda_cases import Place
from ptx import running

cuda_build.require()
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    kernels: str  # names of the launched kernels, without template arguments, sorted
    test: Callable  # called with a place and the arguments
    arguments: tuple
    capabilities: tuple[int, ...] = cuda_build.PTX_ARCHITECTURES
    recurrence: str = ""  # FASTSEQ_LSTM_KERNEL


def cell(dtype, B, H):
    kernels = "lstm_cell_backward_kernel lstm_cell_forward_kernel"
    return Case(kernels, test_cuda_lstm_cell.test_accuracy, (B, H, dtype, "both"))


def step(dtype, *shape):
    return Case("lstm_step_kernel", test_cuda_lstm_step.test_accuracy, (shape, dtype))


def grid_forward(kind, T=3, B=3, H=16):
    arguments = (T, B, H, kind)
    return Case("lstm_grid_forward_kernel", test_cuda_lstm_grid_forward.test_accuracy, arguments, recurrence="grid")


def grid_backward(dtype, tf32=False, D=1, lengths="mixed"):
    arguments = (3, 3, 16, D, lengths, D == 1, dtype, tf32)
    return Case("lstm_grid_backward_kernel", test_cuda_lstm_grid_backward.test_accuracy, arguments, recurrence="grid")


def cluster_forward(dtype, *shape):
    return Case("lstm_cluster_forward_kernel", test_cuda_lstm_cluster.test_accuracy, (shape, dtype), (90,), "cluster")


def cluster_backward(dtype, *shape):
    kernels = "lstm_cluster_backward_kernel lstm_cluster_forward_kernel"
    return Case(kernels, test_cuda_lstm_cluster.test_gradients, (shape, dtype), (90,), "cluster")


def steps(kind, *shape):
    kernels = "lstm_backward_step_kernel lstm_forward_step_kernel"
    return Case(kernels, test_cuda_lstm_steps.test_steps, (shape, kind), recurrence="steps")


def attention(dtype, score, padding, kernels, T=5, S=9):
    kernels = {f"attention_{name}_kernel" for name in ("grad_softmax", "product", *kernels.split())}
    if score == "additive":
        kernels |= {f"attention_{name}_kernel" for name in ("query", "sum", "tanh")}
    arguments = (dtype, score, (2, T, S, 16, 8), padding)
    return Case(" ".join(sorted(kernels)), test_cuda_attention.test_accuracy, arguments)


def coverage(dtype, padding, forward, T, S, A, D):
    kernels = [
        forward,
        "grad_softmax",
        "product",
        "query",
        "sum",
        *(f"coverage_{name}" for name in ("score", "sum", "tanh")),
    ]
    names = " ".join(sorted(f"attention_{name}_kernel" for name in kernels))
    return Case(names, test_cuda_coverage.test_accuracy, (dtype, (2, T, S, A, D), padding), (90,))


CASES = {
    **{
        f"cell {str(dtype)[6:]} {B}x{H}": cell(dtype, B, H)
        for dtype in (F32, BF16, F16, F64)
        for B, H in ((3, 8), (2, 5))
    },
    "step float32": step(F32, 5, 12, 8),
    "step bfloat16": step(BF16, 2, 8, 16),
    "step float16, one sequence": step(F16, 1, 40, 8),
    "step narrow, odd sizes": step(test_cuda_lstm_step.NARROW, 3, 7, 9),
    "grid forward bfloat16": grid_forward(BF16),
    "grid forward float16, odd sizes": grid_forward(F16, 2, 5, 21),
    "grid forward float32": grid_forward(F32),
    "grid forward tf32": grid_forward("tf32"),
    "grid backward bfloat16": grid_backward(BF16, D=2),
    "grid backward float16": grid_backward(F16),
    "grid backward float32": grid_backward(F32, lengths=None),
    "grid backward tf32": grid_backward(F32, tf32=True),
    "cluster forward bfloat16": cluster_forward(BF16, 3, 3, 100),
    "cluster forward float16, odd sizes": cluster_forward(F16, 2, 5, 63),
    "cluster forward tf32": cluster_forward(F32, 3, 3, 40),
    "cluster backward bfloat16": cluster_backward(BF16, 3, 3, 100),
    "cluster backward float16, odd sizes": cluster_backward(F16, 2, 5, 63),
    "cluster backward tf32": cluster_backward(F32, 3, 3, 40),
    "step by step bfloat16": steps(BF16, 3, 3, 20),
    "step by step float16": steps(F16, 2, 5, 9),
    "step by step float32": steps(F32, 3, 2, 16),
    "attention dot bfloat16": attention(BF16, "dot", "mask", "forward"),
    "attention dot float16": attention(F16, "dot", "none", "forward"),
    "attention dot float32": attention(F32, "dot", "step_mask", "forward"),
    "attention additive float32": attention(F32, "additive", "step_mask", "forward"),
    "attention additive bfloat16": attention(BF16, "additive", "lengths", "forward"),
    "attention additive, one step": attention(F32, "additive", "lengths", "step", T=1),
    "attention dot, one step of many keys": attention(F16, "dot", "lengths", "step combine", T=1, S=300),
    "attention coverage float32": coverage(F32, "step_mask", "forward", 5, 9, 40, 8),
    "attention coverage bfloat16, one step": coverage(BF16, "lengths", "step", 1, 20, 16, 8),
}


def template(name: str) -> str:
    """Strip the template arguments of a kernel's name."""
    return cuda_build.readable(name).split("<")[0].split("::")[-1]


def check(name: str, capability: int, **options) -> None:
    """Run a case on PTX. Allocates all tensors inside running(), because only those are device memory."""
    case = CASES[name]
    with pytest.MonkeyPatch.context() as patch, running(capability, **options) as log:
        patch.setenv("FASTSEQ_LSTM_KERNEL", case.recurrence)
        case.test(Place("ptx", torch.ops.fastseq_ptx, "cpu"), *case.arguments)
    assert " ".join(sorted({template(kernel) for kernel in log})) == case.kernels


@pytest.mark.parametrize(("name", "capability"), [(name, c) for name, case in CASES.items() for c in case.capabilities])
def test_accuracy(name, capability):
    check(name, capability)


def test_every_kernel_is_in_a_case():
    compiled = {
        template(name) for architecture in cuda_build.PTX_ARCHITECTURES for name in cuda_build.kernels(architecture)
    }
    tested = {kernel for case in CASES.values() for kernel in case.kernels.split()}
    assert compiled == tested, f"without a row in CASES: {compiled - tested}; not compiled: {tested - compiled}"


# bug -> case, pattern in the PTX and its replacement, pattern of the error message
SWAP_A = r"(mma\.sync\.[^;]*?\{[^}]*\}, *\{[^,}]*,)([^,}]*),([^,}]*),", r"\1\3,\2,"  # a[1] and a[2]
SWAP_B = r"(mma\.sync\.[^;]*?\{[^}]*\}, *\{[^}]*\}, *)\{([^,}]*), *([^,}]*)\}", r"\1{\3, \2}"
PLANTED = {
    "no check for the end of the batch": (
        "cell float32 3x8", r"(setp\.ge\.s64 %p1,[^;]*;\s*)@%p1 bra [^;]*;", r"\1", "out of bounds: global load"
    ),
    "a load from the next element": (
        "cell float32 3x8", r"(ld\.global\.nc\.v4\.f32 \{[^}]*\}, \[%rd\d+)\]", r"\1+4]", "misaligned: global load"
    ),
    "a result that is not stored": ("cell float32 3x8", r"st\.global\.v4\.f32[^;]*;", "", "c_n: error"),
    "swapped A, grid forward": ("grid forward bfloat16", *SWAP_A, "output: error"),
    "swapped A, grid forward, TF32": ("grid forward tf32", *SWAP_A, "output: error"),
    "swapped A, grid backward": ("grid backward float16", *SWAP_A, "grad gates: error"),
    "swapped A, cluster": ("cluster forward bfloat16", *SWAP_A, "output: error"),
    "swapped B, cluster, TF32": ("cluster forward tf32", *SWAP_B, "output: error"),
    "swapped A, attention": ("attention dot bfloat16", *SWAP_A, "context: error"),
    "no barriers, grid forward": ("grid forward bfloat16", r"bar\.sync \t?0;", "", "output: error"),
    "no barriers, cluster": ("cluster forward bfloat16", r"bar\.sync \t?0;", "", "output: error"),
    "a block that does not arrive": ("grid forward bfloat16", r"red\.release[^;]*;", "", "deadlock"),
    "no cluster barrier at start and end": (
        "cluster forward bfloat16", r"barrier\.cluster\.(arrive|wait)[^;]*;", "", "no mbarrier was init|has returned"
    ),
    "too few bytes expected": (
        "cluster forward bfloat16", r"(mbarrier\.arrive\.expect_tx[^;]*\], *)%r\d+", r"\g<1>16", "in flight|deadlock"
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_reported(bug):
    name, pattern, replacement, message = PLANTED[bug]
    assert any(re.search(pattern, text) for text in cuda_build.ptx(90))
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(name, 90, edit=lambda text: re.sub(pattern, replacement, text))
