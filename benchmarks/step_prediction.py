"""Microseconds of a step that the cost model predicts for the recurrences, to print beside measured ones."""

import statistics

import torch
from hopper_model import GEMM_FLOPS

from fastseq.bench.cases import SHORT, BenchCase
from fastseq.ops.lstm.native_cuda import COSTS, modelled_us


def predicted_us(case: BenchCase, kernel: str, train: bool) -> float | None:
    """Microseconds of a step of one layer and direction by csrc/cuda/lstm/cost.h; None where the kernel does not fit.

    Training adds the backward. Products over all steps, launches and failed polls are not counted, so a layer with a
    projection, whose fold has several, has no prediction.

    Args:
        kernel: one of ``fastseq.ops.lstm.native_cuda.COSTS``; None for any other name.
    """
    if case.layers > 1 or case.bidirectional or case.kind != "lstm" or case.proj_size or kernel not in COSTS:
        return None
    tf32 = case.dtype == torch.float32 and case.tf32 is not False
    total = sum(modelled_us(kernel, case.batch, case.hidden_size, case.dtype, tf32)[: 1 + train])
    return None if total == float("inf") else total


def products_us(case: BenchCase, train: bool) -> float:
    """Microseconds a step of the products over all steps: of the input, in training also its gradients and W_hh's."""
    precision = "tf32" if case.tf32 is not False else SHORT[case.dtype].strip() or "float32"
    of_one_column = 8 * case.batch * case.hidden_size / GEMM_FLOPS[precision]
    return of_one_column * (3 * case.input_size + case.hidden_size if train else case.input_size)


def scales(rows: list[dict]) -> list[tuple[str, str, int, float]]:
    """Kernel, "forward" or "backward", cases, median of measured over predicted: the scales of cost.h, anew.

    Rows without a prediction are left out. Products over all steps are subtracted from the measured time first.
    """
    found: dict[tuple[str, str], list[float]] = {}
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if "predicted_us_per_step" in row:
            cases.setdefault((row["case"], row["kernel"]), {})[row["mode"]] = row
    for (_, kernel), modes in cases.items():
        if "inference" not in modes:
            continue
        forward = [modes["inference"][name] for name in FIGURES]
        found.setdefault((kernel, "forward"), []).append(_ratio(*forward))
        if "training" in modes:
            both = [modes["training"][name] for name in FIGURES]
            backward = [b - f for b, f in zip(both, forward, strict=True)]
            found.setdefault((kernel, "backward"), []).append(_ratio(*backward))
    return [(*key, len(ratios), statistics.median(ratios)) for key, ratios in sorted(found.items())]


FIGURES = ("us_per_step", "products_us_per_step", "predicted_us_per_step")


def _ratio(measured: float, products: float, predicted: float) -> float:
    return (measured - products) / predicted
