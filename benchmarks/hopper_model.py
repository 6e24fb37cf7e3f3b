"""Model of a Hopper GPU from published measurements: a lower bound on the time of a case."""

import math
from collections import Counter
from typing import NamedTuple

import torch

from fastseq.bench.cases import SHORT, BenchCase, case_lengths


class GPU(NamedTuple):
    """The figures of a Hopper GPU that the model needs.

    Sources, measured on an H800: latency of other blocks' shared memory and of near and far L2, bandwidth of both, the
    63 % that mma.sync reaches of the tensor cores: arXiv 2402.13499, tables IV, V, VII, VIII; extra latency of a
    multicast copy: arXiv 2501.12084. Operations per cycle: the CUDA programming guide's table of arithmetic throughput.
    Clock, memory and large products: an H200.
    """

    multiprocessors: int = 132
    cycles: float = 1980.0  # a microsecond
    remote_latency: int = 180  # cycles; another block's shared memory in the cluster
    write_latency: int = 258  # cycles; near L2
    poll_latency: int = 414  # cycles; far L2
    multicast_latency: int = 170  # cycles
    cell_latency: int = 150 + 60  # cycles; a unit's dependent exponentials and divisions, a block barrier
    product_latency: int = 220  # cycles; from a step's first product to its last sum
    remote_bandwidth: float = 25e3  # bytes a microsecond; per block
    shared_bandwidth: float = 128 * 1980.0  # bytes a microsecond; per multiprocessor, its own shared memory
    l2_bandwidth: float = 34.6 * 1980.0  # bytes a microsecond; per multiprocessor
    memory_bandwidth: float = 4.3e6  # bytes a microsecond
    kernel_boundary: float = 0.8  # microseconds between kernels of a graph (RTX 3090; none published for Hopper)


H200 = GPU()
HOPPER = ("H100", "H200", "H800", "GH200")


def on_hopper() -> bool:
    """True if torch's first GPU is a Hopper."""
    return torch.cuda.is_available() and any(name in torch.cuda.get_device_name() for name in HOPPER)


REGISTER_WEIGHTS, ALL_WEIGHTS = 128 << 10, 320 << 10  # bytes per multiprocessor: in registers, in total
L2_BYTES = 40e6
# per cycle and multiprocessor
STEP_FLOPS = {"bf16": 4096 * 0.63, "f16": 4096 * 0.63, "tf32": 2048 * 0.63, "float32": 256}
GEMM_FLOPS = {"bf16": 790e6, "f16": 790e6, "tf32": 395e6, "float32": 67e6}  # per microsecond; whole GPU
EXPONENTIALS = 16  # per cycle and multiprocessor


def _designs(gpu: GPU):
    """Persistent designs: weight slices, shares of the batch, latency of an exchange in cycles, bytes a microsecond."""
    for blocks, clusters in ((4, 30), (8, 15), (16, 7)):  # as many clusters as fit
        yield blocks, clusters, gpu.remote_latency, gpu.remote_bandwidth * blocks / (blocks - 1)
    round_trip = gpu.write_latency + gpu.poll_latency
    for slices in (128, 64):  # the whole GPU: each block reads h from L2, or a cluster of 8 reads it once by multicast
        yield slices, 128 // slices, round_trip, gpu.l2_bandwidth
        yield slices, 128 // slices, 2 * round_trip + gpu.multicast_latency, 8 * gpu.l2_bandwidth


def step_us(
    hidden: int, batch: int, precision: str, saved: int = 0, exchanged: int = 1, gpu: GPU = H200, depth: int = 0
) -> float:
    """Microseconds below which no known design runs one recurrent step.

    In sequence: the exchange of h between blocks, the cell. Overlapped, so that the longest counts: the products, the
    reading of weights that exceed the registers, the bytes of the exchange, activations to and from memory. Weights
    that exceed the chip: one kernel per step that reads them again.

    Args:
        precision: a key of ``STEP_FLOPS``.
        saved: values per unit kept for the backward: 6 in training.
        exchanged: values per unit that all blocks need: h, or in the backward the gradients of 4 gates.
        depth: columns of W_hh, P of a projection, whose own product W_hr is not counted; 0: H.
    """
    depth = depth or hidden
    size = 4 if precision in ("tf32", "float32") else 2
    weights, values = 4 * hidden * depth * size, batch * hidden * size
    memory = (4 + saved) * values / gpu.memory_bandwidth

    def products(rows: int, multiprocessors: int) -> float:
        columns = rows if precision == "float32" else 8 * math.ceil(rows / 8)  # a tensor-core instruction computes 8
        return 8 * hidden * depth * columns / multiprocessors / STEP_FLOPS[precision] / gpu.cycles

    times = []
    for slices, shares, latency, bandwidth in _designs(gpu):
        if weights / slices <= ALL_WEIGHTS:
            rows = math.ceil(batch / shares)
            from_shared = max(0.0, weights / slices - REGISTER_WEIGHTS) / gpu.shared_bandwidth
            exchange = exchanged * rows * depth * size / bandwidth
            work = max(gpu.product_latency / gpu.cycles, products(rows, slices), from_shared, exchange, memory)
            times.append((latency + gpu.cell_latency) / gpu.cycles + work)
    bandwidth = gpu.multiprocessors * gpu.l2_bandwidth if weights < L2_BYTES else gpu.memory_bandwidth
    reread = max(weights / bandwidth, products(batch, gpu.multiprocessors), memory)
    return min(times, default=gpu.kernel_boundary + reread)


def limit_us(case: BenchCase, train: bool) -> float:
    """A lower bound on the microseconds of a call of ``case`` on an H200, by this model; launches are not counted.

    LSTM: one product for all inputs, then the steps in sequence, both directions concurrently. Training adds the
    backward's steps and, once each, the products for the gradients of inputs and weights. Decoding step: its weights
    from L2. Attention: the largest of its tensors from memory, its products, its exponentials.
    """
    precision = "tf32" if case.tf32 is not False else SHORT[case.dtype].strip() or "float32"
    if case.keys:
        return _attention_us(case, train, precision)
    hidden, size, depth = case.hidden_size, case.dtype.itemsize, case.proj_size or case.hidden_size
    if case.kind == "cell":
        weights = 4 * hidden * (case.input_size + hidden)
        read = weights * size / (H200.multiprocessors * H200.l2_bandwidth)
        return (3 if train else 1) * max(read, 2 * weights * case.batch / GEMM_FLOPS[precision])
    lengths = case_lengths(case)
    rows = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    directions, total = 2 if case.bidirectional else 1, 0.0
    for layer in range(case.layers):
        inputs = case.input_size if layer == 0 else directions * depth
        product = 8 * sum(rows) * hidden * directions / GEMM_FLOPS[precision]  # per unit of depth
        total += inputs * product * (3 if train else 1) + (depth * product if train else 0)
        for batch, steps in Counter(rows).items():
            total += steps * step_us(hidden, batch, precision, saved=6 if train else 1, depth=depth)
            if train:
                total += steps * step_us(hidden, batch, precision, saved=6, exchanged=4, depth=depth)
    return total


def _attention_us(case: BenchCase, train: bool, precision: str) -> float:
    B, T, S, A = case.batch, case.steps, case.keys, case.hidden_size
    memory = B * A * (2 * T + 2 * S) * case.dtype.itemsize / H200.memory_bandwidth
    scores = B * T * S
    exponentials = scores * (A if case.kind == "additive" else 1) / (H200.multiprocessors * EXPONENTIALS * H200.cycles)
    products = 2 * scores * A * (2 if case.kind == "dot" else 1) / GEMM_FLOPS[precision]
    return max(memory, exponentials, products) * (3 if train else 1)
