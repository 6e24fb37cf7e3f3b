"""The roofline of ``fastseq bench``: a lower bound on the time of a case's matrix products on this CPU."""

import time
from collections.abc import Callable
from functools import cache, partial

import torch

from fastseq.bench.cases import BenchCase, case_lengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NO_OP = "the compiled operator cpu_fma_chain, which measures the peak, is missing"


def has_roofline(case: BenchCase) -> bool:
    """True on a CPU whose peak can be measured, except for attention, which is bound by its exponentials."""
    supported = case.device == "cpu" and not case.keys and case.dtype in DTYPES
    return supported and hasattr(torch.ops.fastseq, "cpu_fma_chain")


def roofline_ms(case: BenchCase, train: bool) -> float:
    """Lower bound in milliseconds, on all torch threads together.

    Per layer and direction: the input part, max(flops / peak, bytes of W_ih / bandwidth), and one max(flops / peak,
    bytes of W_hh / bandwidth) per step over its valid rows. Training adds the backward's products: the gradients of
    inputs and states cost the same again, the gradients of the weights are one product over all steps. Element-wise
    work, packing and the memory traffic of activations are not counted. The loss: one product, or three in training.
    """
    if case.classes:
        return 1e3 * (3 if train else 1) * _product(case, case.batch, case.classes, case.hidden_size)
    lengths = case_lengths(case)
    rows = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    hidden = case.hidden_size
    recurrent = case.proj_size or hidden
    directions = 2 if case.bidirectional else 1

    product = partial(_product, case)
    seconds = 0.0
    for layer in range(case.layers):
        inputs = case.input_size if layer == 0 else directions * recurrent
        batched = product(sum(rows), 4 * hidden, inputs)
        steps = sum(product(r, 4 * hidden, recurrent) for r in rows)
        weights = product(sum(rows), 4 * hidden, recurrent)
        if case.proj_size:
            steps += sum(product(r, case.proj_size, hidden) for r in rows)
            weights += product(sum(rows), case.proj_size, hidden)
        seconds += directions * (3 * batched + 2 * steps + weights if train else batched + steps)
    return 1e3 * seconds


def _product(case: BenchCase, m: int, n: int, k: int) -> float:
    """Seconds of an (m, k) by (k, n) product whose second factor is read once."""
    size = n * k * case.dtype.itemsize
    return max(2 * m * n * k / peak(case.dtype), size / bandwidth(size))


def peak(dtype: torch.dtype) -> float:
    """Floating-point operations per second of all torch threads, in chains of fused multiply-adds; the best run."""
    return _peak(dtype, torch.get_num_threads())


@cache
def _peak(dtype: torch.dtype, threads: int) -> float:
    example = torch.ones((), dtype=dtype)
    steps, seconds = 1 << 15, 0.0
    while seconds < 5e-3:
        steps *= 2
        run = partial(torch.ops.fastseq.cpu_fma_chain, example, steps)
        seconds = _best_seconds(run, 1)
    return run() / _best_seconds(run, 20)


def bandwidth(size: int) -> float:
    """Bytes per second at which torch (sum or dot, whichever is faster) reads a buffer of ``size`` bytes.

    The buffer stays in the smallest cache that holds it, as weights of that size do. Measured at powers of two.
    """
    return _bandwidth(max(16, (max(size, 1) - 1).bit_length()), torch.get_num_threads())


@cache
def _bandwidth(log2_size: int, threads: int) -> float:
    x = torch.ones(2**log2_size // 4)
    half = x.numel() // 2
    repeats = max(20, min(2000, 2**28 >> log2_size))
    reads = (x.sum, lambda: torch.dot(x[:half], x[half:]))
    return 2**log2_size / min(_best_seconds(read, repeats) for read in reads)


def _best_seconds(run: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter_ns()
        run()
        best = min(best, time.perf_counter_ns() - start)
    return best / 1e9


def describe(device: str) -> dict[str, str]:
    """Measured peaks and bandwidths behind the roofline, for the header of a report."""
    if device == "cuda":
        return {"roofline": "– (none on a GPU; benchmarks/gpu_check.py compares with a model of a Hopper)"}
    if not hasattr(torch.ops.fastseq, "cpu_fma_chain"):
        return {"roofline": f"– ({NO_OP})"}
    peaks = ", ".join(f"{str(d).removeprefix('torch.')} {peak(d) / 1e9:.0f}" for d in DTYPES)
    reads = ", ".join(f"{2**k >> 10} KiB {bandwidth(1 << k) / 1e9:.0f}" for k in (18, 20, 22, 24))
    return {
        "peak GFLOP/s (fused multiply-add chains)": peaks,
        "read GB/s (torch sum or dot, in cache)": reads,
        "no roofline": "attention (bound by its exponentials) and float16 (no peak is measured)",
    }
