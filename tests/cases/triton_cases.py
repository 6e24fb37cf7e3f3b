"""Helpers of the suites in Triton's interpreter. tests/triton/test_triton.py starts them with TRITON_INTERPRET=1.

An operation is a function of named tensors that returns named results. The kernels under test, the float64 oracle and
torch in the same dtype run it, with gradients of a loss in which every element has a different factor.
"""

import os

import torch
import triton_interpreter  # noqa: F401  repairs bfloat16

from fastseq.testing.numerics import assert_all_accurate

assert os.environ.get("TRITON_INTERPRET") == "1", "run this file with TRITON_INTERPRET=1"
torch.use_deterministic_algorithms(True)  # fills memory of torch.empty, new_empty, ... with NaN
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(dtype, **shapes):
    """Draw named leaves from the standard normal distribution, rounded to ``dtype``; None stays None."""
    return {name: None if shape is None else torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def run(operation, tensors, dtype):
    """Return results and gradients, both by name."""
    leaves = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    results = operation(**leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
        for out in results.values()
    )
    wanted = {n: t for n, t in leaves.items() if t is not None}
    return results, dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def check(kernels, oracle, tensors, dtype, baseline=None) -> None:
    """Check outputs within 2 times and gradients within 3 times the error of torch (fastseq/testing/numerics.py).

    tensors: one draw of named tensors, or several if results are few, so that torch's error varies by chance.
    """
    draws = tensors if isinstance(tensors, list) else [tensors]
    sides = ((kernels, dtype), (oracle, torch.float64), (baseline or oracle, dtype))
    outcomes = [[run(operation, draw, width) for draw in draws] for operation, width in sides]
    for kind, factor in ((0, 2), (1, 3)):
        stacked = [{name: torch.stack([r[kind][name] for r in side]) for name in side[0][kind]} for side in outcomes]
        assert_all_accurate(*stacked, factor=factor)
