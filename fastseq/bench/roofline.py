"""The floors of ``fastseq bench``: the time below which this machine cannot do the matrix products of a case.

On a GPU it is a model of what no kernel can undercut, from published measurements of Hopper.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from fastseq.bench.cases import SHORT, Case, case_lengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NO_OP = "the compiled operator cpu_fma_chain, which measures the peak, is missing"


def has_floor(case: Case) -> bool:
    """On a GPU, where it is a Hopper. On a CPU not attention, which is bound by its exponentials; and not where no peak
    can be measured."""
    if case.device == "cuda":
        return torch.cuda.is_available() and any(name in torch.cuda.get_device_name() for name in HOPPER)
    return not case.keys and case.dtype in DTYPES and hasattr(torch.ops.fastseq, "cpu_fma_chain")


def floor_ms(case: Case, train: bool) -> float:
    """Milliseconds; on a CPU, all torch threads together.

    Per layer and direction: the input part, max(flops / peak, bytes of W_ih / bandwidth), and one max(flops / peak,
    bytes of W_hh / bandwidth) per step, with the rows that are valid in it. Training adds the backward's products:
    those at the inputs and states cost the same again, those at the weights are one product over all steps. Cells,
    packing and memory for activations count nothing.
    """
    if case.device == "cuda":
        return gpu_limit_us(case, train) / 1e3
    lengths = case_lengths(case)
    rows = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    hidden, size = case.hidden_size, case.dtype.itemsize
    recurrent = case.proj_size or hidden
    directions = 2 if case.bidirectional else 1

    def product(m: int, n: int, k: int) -> float:
        """Seconds of an (m, k) by (k, n) product whose second factor is read once."""
        return max(2 * m * n * k / peak(case.dtype), n * k * size / bandwidth(n * k * size))

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


@cache
def peak(dtype: torch.dtype) -> float:
    """Floating-point operations per second of all torch threads: the best of several chains of fused multiply-adds."""
    example = torch.ones((), dtype=dtype)
    steps, seconds = 1 << 15, 0.0
    while seconds < 5e-3:
        steps *= 2
        run = partial(torch.ops.fastseq.cpu_fma_chain, example, steps)
        seconds = _best_seconds(run, 1)
    return run() / _best_seconds(run, 20)


def bandwidth(size: int) -> float:
    """Bytes per second at which torch (sum or dot, whichever is faster) reads a buffer of ``size`` bytes.

    The buffer stays in the cache that has room for it, as the weights of that size would. Measured at powers of two.
    """
    return _bandwidth(max(16, (max(size, 1) - 1).bit_length()))


@cache
def _bandwidth(log2_size: int) -> float:
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
    """What was measured on the way to the floors, for the header of a report."""
    if device == "cuda":
        return {"floor": "modelled, for an H200, from published measurements (fastseq/bench_floor.py); elsewhere none"}
    if not hasattr(torch.ops.fastseq, "cpu_fma_chain"):
        return {"floor": f"– ({NO_OP})"}
    peaks = ", ".join(f"{str(d).removeprefix('torch.')} {peak(d) / 1e9:.0f}" for d in DTYPES)
    reads = ", ".join(f"{2**k >> 10} KiB {_bandwidth(k) / 1e9:.0f}" for k in (18, 20, 22, 24))
    return {
        "peak GFLOP/s (fused multiply-add chains)": peaks,
        "read GB/s (torch sum or dot, in cache)": reads,
        "no floor": "attention (bound by its exponentials) and float16 (no peak is measured)",
    }


class GPU(NamedTuple):
    """A Hopper GPU, as far as the limit needs it.

    Sources, measured on an H800: latency of other blocks' shared memory and of near and far L2, bandwidth of both, the
    63 % that mma.sync reaches of the tensor cores: arXiv 2402.13499, tables IV, V, VII, VIII; what a multicast copy
    adds: arXiv 2501.12084. Operations a cycle: the CUDA programming guide's table of arithmetic throughput. Clock,
    memory and large products: an H200.
    """

    multiprocessors: int = 132
    cycles: float = 1980.0  # a microsecond
    remote_latency: int = 180  # cycles; shared memory of another block of the cluster
    write_latency: int = 258  # cycles; near L2
    poll_latency: int = 414  # cycles; far L2
    multicast_latency: int = 170  # cycles
    cell_latency: int = 150 + 60  # cycles; the chain of exponentials and divisions of a unit, a barrier of the block
    product_latency: int = 220  # cycles; from a step's first product to its last sum
    remote_bandwidth: float = 25e3  # bytes a microsecond; of a block
    shared_bandwidth: float = 128 * 1980.0  # bytes a microsecond; of a multiprocessor, its own shared memory
    l2_bandwidth: float = 34.6 * 1980.0  # bytes a microsecond; of a multiprocessor
    memory_bandwidth: float = 4.3e6  # bytes a microsecond
    kernel_boundary: float = 0.8  # microseconds between kernels of a graph (RTX 3090; none published for Hopper)


H200 = GPU()
HOPPER = ("H100", "H200", "H800", "GH200")
REGISTER_WEIGHTS, ALL_WEIGHTS = 128 << 10, 320 << 10  # bytes that a multiprocessor keeps in registers, and in all
L2_BYTES = 40e6
# Of one step: a cycle and multiprocessor.
STEP_FLOPS = {"bf16": 4096 * 0.63, "f16": 4096 * 0.63, "tf32": 2048 * 0.63, "float32": 256}
GEMM_FLOPS = {"bf16": 790e6, "f16": 790e6, "tf32": 395e6, "float32": 67e6}  # a microsecond; whole GPU
EXPONENTIALS = 16  # a cycle of a multiprocessor


def _designs(gpu: GPU):
    """Persistent designs: weight slices, shares of the batch, latency of an exchange in cycles, bytes a microsecond."""
    for blocks, clusters in ((4, 30), (8, 15), (16, 7)):  # as many clusters as fit
        yield blocks, clusters, gpu.remote_latency, gpu.remote_bandwidth * blocks / (blocks - 1)
    round_trip = gpu.write_latency + gpu.poll_latency
    for slices in (128, 64):  # the whole GPU: every block reads all of h from L2, or a cluster of 8 reads it together
        yield slices, 128 // slices, round_trip, gpu.l2_bandwidth
        yield slices, 128 // slices, 2 * round_trip + gpu.multicast_latency, 8 * gpu.l2_bandwidth


def gpu_step_us(hidden: int, batch: int, precision: str, saved: int = 0, exchanged: int = 1, gpu: GPU = H200) -> float:
    """Microseconds below which no known design runs one recurrent step.

    One after the other: h reaches the other blocks, the cell is computed. Meanwhile, so that the longest counts: the
    products, weights that registers do not hold, the bytes of the exchange, activations to and from memory. Where the
    weights do not stay on the chip: a kernel a step that reads them again.

    Args:
        precision: a key of ``STEP_FLOPS``.
        saved: values a unit kept for the backward: 6 in training.
        exchanged: values a unit that all blocks need: h, or in the backward the gradients of 4 gates.
    """
    size = 4 if precision in ("tf32", "float32") else 2
    weights, values = 4 * hidden * hidden * size, batch * hidden * size
    memory = (4 + saved) * values / gpu.memory_bandwidth

    def products(rows: int, multiprocessors: int) -> float:
        columns = rows if precision == "float32" else 8 * math.ceil(rows / 8)  # what a tensor-core instruction computes
        return 8 * hidden * hidden * columns / multiprocessors / STEP_FLOPS[precision] / gpu.cycles

    times = []
    for slices, shares, latency, bandwidth in _designs(gpu):
        if weights / slices <= ALL_WEIGHTS:
            rows = math.ceil(batch / shares)
            from_shared = max(0.0, weights / slices - REGISTER_WEIGHTS) / gpu.shared_bandwidth
            exchange = exchanged * rows * hidden * size / bandwidth
            work = max(gpu.product_latency / gpu.cycles, products(rows, slices), from_shared, exchange, memory)
            times.append((latency + gpu.cell_latency) / gpu.cycles + work)
    bandwidth = gpu.multiprocessors * gpu.l2_bandwidth if weights < L2_BYTES else gpu.memory_bandwidth
    reread = max(weights / bandwidth, products(batch, gpu.multiprocessors), memory)
    return min(times, default=gpu.kernel_boundary + reread)


def gpu_limit_us(case: Case, train: bool) -> float:
    """Microseconds that a call of ``case`` takes at least on an H200, by this model; launches count nothing.

    An LSTM: one product for all inputs, and the steps one after the other, both directions at once. Training adds the
    steps backwards and, once each, the products that give the gradients of inputs and weights. A decoding step: its
    weights from L2. Attention: its tensors from memory, its products, its exponentials.
    """
    precision = "tf32" if case.tf32 else SHORT[case.dtype].strip() or "float32"
    if case.keys:
        return _attention_us(case, train, precision)
    hidden, size = case.hidden_size, case.dtype.itemsize
    if case.kind == "cell":
        weights = 4 * hidden * (case.input_size + hidden)
        read = weights * size / (H200.multiprocessors * H200.l2_bandwidth)
        return (3 if train else 1) * max(read, 2 * weights * case.batch / GEMM_FLOPS[precision])
    lengths = case_lengths(case)
    rows = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    directions, total = 2 if case.bidirectional else 1, 0.0
    for layer in range(case.layers):
        inputs = case.input_size if layer == 0 else directions * hidden
        product = 8 * sum(rows) * hidden * directions / GEMM_FLOPS[precision]  # times the depth
        total += inputs * product * (3 if train else 1) + (hidden * product if train else 0)
        for batch, steps in Counter(rows).items():
            total += steps * gpu_step_us(hidden, batch, precision, saved=6 if train else 1)
            total += steps * gpu_step_us(hidden, batch, precision, saved=6, exchanged=4) if train else 0
    return total


def _attention_us(case: Case, train: bool, precision: str) -> float:
    B, T, S, A = case.batch, case.steps, case.keys, case.hidden_size
    memory = B * A * (2 * T + 2 * S) * case.dtype.itemsize / H200.memory_bandwidth
    scores = B * T * S
    exponentials = scores * (A if case.kind == "additive" else 1) / (H200.multiprocessors * EXPONENTIALS * H200.cycles)
    products = 2 * scores * A * (2 if case.kind == "dot" else 1) / GEMM_FLOPS[precision]
    return max(memory, exponentials, products) * (3 if train else 1)
