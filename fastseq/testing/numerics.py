"""Accuracy rule of tests, benchmarks and ``fastseq parity``.

A tolerance is derived, not chosen: the error against float64 may be at most ``factor`` times the error of plain torch
in the same dtype, plus one rounding of the largest value.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import dispatch

SMALL = 1024  # elements


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference to the float64 oracle; infinite where ``actual`` is not finite and the oracle is."""
    difference = (actual.detach().double() - oracle.detach()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if difference.numel() else 0.0


def bound(oracle: Tensor, torch_error: float, dtype: torch.dtype, factor: float = 2.0) -> float:
    """``factor * torch_error + eps(dtype) * max|oracle|``: the largest allowed error of a kernel of this dtype.

    A ``torch_error`` that is not finite counts as 0: torch may overflow, a kernel may not.

    In float64 the oracle is no wider than the result and rounds as well: the bound is at least 64 roundings, for sums
    of a few hundred terms through a few dozen operations.
    """
    eps, largest = torch.finfo(dtype).eps, _largest(oracle)
    allowed = factor * _finite(torch_error) + eps * largest
    return max(allowed, 64 * eps * largest) if dtype == torch.float64 else allowed


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


class Results(NamedTuple):
    """Outputs and gradients of a computation, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Comparison(NamedTuple):
    """One result beside the float64 oracle.

    ``error``, ``torch_error``: largest absolute errors of fastseq and of torch in the same dtype. ``limit``: the bound
    on ``error``. ``problem``: a wrong shape or dtype as a sentence, else "".
    """

    name: str
    error: float
    torch_error: float
    limit: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.limit

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: error {self.error:.3g} against float64 exceeds {self.limit:.3g} "
            f"(torch's own: {self.torch_error:.3g})"
        )


def evaluate(outputs: dict[str, Tensor], leaves: dict[str, Tensor], strided: bool = False) -> Results:
    """Outputs, and the gradients at ``leaves`` of a loss that weights every output element by its own factor.

    The factors are bfloat16 numbers, so they are exact in every dtype and on every device. ``strided``: they are
    transposed in memory. A leaf without influence gets a gradient of zeros.
    """
    if not leaves:
        return Results(outputs, {})
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs.values()]
    if strided:
        orders = (tuple(reversed(range(f.dim()))) for f in factors)
        factors = [f.permute(order).contiguous().permute(order) for f, order in zip(factors, orders, strict=True)]
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), factors, allow_unused=True, materialize_grads=True
    )
    return Results(outputs, dict(zip(leaves, grads, strict=True)))


def compare(actual: Results, oracle: Results, baseline: Results) -> list[Comparison]:
    """Judge each result of ``actual`` by the float64 rule: factor 2 for outputs, 3 for gradients.

    The one comparison of tests, benchmarks and ``fastseq parity``. Without gradients in ``actual``, outputs only.
    """
    gradients = [{f"grad {n}": t for n, t in r.gradients.items()} for r in (actual, oracle, baseline)]
    return [
        *compare_group(actual.outputs, oracle.outputs, baseline.outputs, factor=2.0),
        *(compare_group(*gradients, factor=3.0) if actual.gradients else ()),
    ]


def compare_group(
    actual: dict[str, Tensor], oracle: dict[str, Tensor], baseline: dict[str, Tensor], *, factor: float = 2.0
) -> list[Comparison]:
    """Compare a group of results of one computation.

    In a result of a few elements torch's rounding errors may cancel, even to 0. For results under ``SMALL`` elements
    the group's largest relative error (error / max|oracle|) replaces a smaller one.
    """
    errors = {name: _finite(max_error(baseline[name], want)) for name, want in oracle.items()}
    relative = max((errors[n] / _largest(want) for n, want in oracle.items() if _largest(want)), default=0.0)
    comparisons = []
    for name, want in oracle.items():
        torch_error = errors[name] if want.numel() >= SMALL else max(errors[name], relative * _largest(want))
        comparisons.append(_compare(actual[name], want, baseline[name], torch_error, factor, name))
    return comparisons


def _compare(
    actual: Tensor, oracle: Tensor, baseline: Tensor, torch_error: float, factor: float, name: str
) -> Comparison:
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    problem = ""
    if actual.shape != oracle.shape:
        problem = f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    elif actual.dtype != baseline.dtype:
        problem = f"dtype {actual.dtype}, expected {baseline.dtype}"
    if problem:
        return Comparison(name, float("inf"), torch_error, 0.0, problem)
    return Comparison(name, max_error(actual, oracle), torch_error, bound(oracle, torch_error, actual.dtype, factor))


def assert_accurate(
    actual: Tensor, oracle: Tensor, baseline: Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """Assert that ``actual`` is as accurate as torch's kernel.

    Args:
        actual: the result under test, any floating dtype.
        oracle: the same result computed in float64 from the same (already rounded) inputs.
        baseline: torch's result in the dtype of ``actual``.
        factor: 2 for outputs, 3 for gradients.
        name: the result's name in the message.

    Raises:
        AssertionError: shape, dtype or accuracy differ.
    """
    comparison = _compare(actual, oracle, baseline, max_error(baseline, oracle), factor, name)
    assert comparison.ok, str(comparison)


def assert_all_accurate(
    actual: dict[str, Tensor], oracle: dict[str, Tensor], baseline: dict[str, Tensor], *, factor: float = 2.0
) -> None:
    """:func:`assert_accurate` for a group of results of one computation; see :func:`compare_group`."""
    wrong = [c for c in compare_group(actual, oracle, baseline, factor=factor) if not c.ok]
    assert not wrong, "; ".join(map(str, wrong))


def is_refusal(error: RuntimeError) -> bool:
    """True for the refusal of a call by dispatch.select, False for a failure while a backend ran."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_code is dispatch.select.__code__


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Fill new memory with NaN in this block, which shows elements that a kernel leaves unwritten."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors; warn_only: CUDA refuses some ops
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def float32_products(tf32: bool | None) -> Iterator[None]:
    """Set float32 products of cuBLAS, cuDNN and fastseq on CUDA to TF32 or full float32; None changes nothing.

    torch's default mixes both: TF32 in cuDNN, full float32 in matmul.
    """
    if tf32 is None:
        yield
        return
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = tf32
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def plain_attention(
    query: Tensor,  # (B, T, A)
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    *,
    score: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    scale: float = 1.0,
    allowed: Tensor | None = None,
    coverage: Tensor | None = None,
    coverage_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as a user writes it in torch, op by op, in the dtype of its inputs -> context, weights.

    ``allowed``: bool, broadcastable to (B, T, S); a row without any True has weights 0.
    """
    if score in ("dot", "general"):
        scores = (query if score == "dot" else query @ weight) @ keys.mT
    else:
        v = weight if gain is None else gain * weight / weight.norm()
        q = query if bias is None else query + bias
        inner = q.unsqueeze(2) + keys.unsqueeze(1)
        inner = inner if coverage is None else inner + coverage.unsqueeze(-1) * coverage_weight
        scores = inner.tanh() @ v
    scores = scores * scale
    if allowed is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0)
    return weights @ values, weights
