"""The float64 rule: how tests, benchmarks and ``fastseq parity`` decide that a result is right.

A tolerance is derived, not chosen: the error against float64 may be at most ``factor`` times the error of torch's own
computation in the same dtype, plus one rounding of the largest value.
"""

import torch
from torch import Tensor

SMALL = 1024  # elements


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference to the float64 oracle; infinite where ``actual`` is not finite and the oracle is."""
    difference = (actual.detach().double() - oracle.detach()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if difference.numel() else 0.0


def bound(oracle: Tensor, torch_error: float, dtype: torch.dtype, factor: float = 2.0) -> float:
    """``factor * torch_error + eps(dtype) * max|oracle|``: what a kernel of this dtype may be off by.

    In float64 the oracle is no wider than the result, and its own roundings count: sums of a few hundred terms through
    a few dozen operations, taken as 64 roundings.
    """
    largest = _largest(oracle)
    if dtype == torch.float64:
        return 64 * torch.finfo(dtype).eps * largest
    return factor * torch_error + torch.finfo(dtype).eps * largest


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def assert_accurate(
    actual: Tensor, oracle: Tensor, baseline: Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """Assert that ``actual`` is as accurate as torch's own kernel.

    Args:
        actual: the result under test, any floating dtype.
        oracle: the same result computed in float64 from the same (already rounded) inputs.
        baseline: torch's own result in the dtype of ``actual``.
        factor: 2 for outputs, 3 for gradients.
        name: what is compared, for the message.

    Raises:
        AssertionError: shape, dtype or accuracy differ.
    """
    _assert_within(actual, oracle, baseline, max_error(baseline, oracle), factor, name)


def assert_all_accurate(
    actual: dict[str, Tensor], oracle: dict[str, Tensor], baseline: dict[str, Tensor], *, factor: float = 2.0
) -> None:
    """:func:`assert_accurate` for a group of results of one computation.

    In a result of a few elements torch's own error is a matter of luck: it may be 0. There the largest error of the
    group, relative to the size of the result it occurs in, stands for all results under ``SMALL`` elements.
    """
    relative = max(
        (max_error(baseline[n], oracle[n]) / _largest(oracle[n]) for n in oracle if _largest(oracle[n])), default=0.0
    )
    for name, want in oracle.items():
        own = max_error(baseline[name], want)
        torch_error = own if want.numel() >= SMALL else max(own, relative * _largest(want))
        _assert_within(actual[name], want, baseline[name], torch_error, factor, name)


def _assert_within(
    actual: Tensor, oracle: Tensor, baseline: Tensor, torch_error: float, factor: float, name: str
) -> None:
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, expected {baseline.dtype}"
    error, limit = max_error(actual, oracle), bound(oracle, torch_error, actual.dtype, factor)
    assert error <= limit, (
        f"{name}: error {error:.3g} against float64 exceeds {limit:.3g} (torch's own: {torch_error:.3g})"
    )
