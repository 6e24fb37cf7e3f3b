"""The ``triton`` backend of ``linear_cross_entropy``: products of chunks of rows by torch, and one kernel for the
softmax of a chunk. Not tuned on a GPU yet.

The gradients of a sum of losses are made in the forward, so that the logits are computed once. Ignored rows are
computed and get gradient 0: to leave them out would wait for the device.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.common.autograd import scaled
from fastseq.ops.common.triton.runtime import chip_of, power_of_two, ready, why_not
from fastseq.ops.linear_cross_entropy.spec import InputGrads, Inputs, Result, Want

CHUNK_LOGITS = 1 << 26  # elements, 256 MiB in float32


def unsupported(call) -> str | None:
    """Return the refusal of a ``LinearCrossEntropyCall``, a sentence with the way out, or None."""
    return why_not("linear_cross_entropy", call)


def forward(inputs: Inputs, want: Want) -> Result:
    """Saved: the wanted gradients of the sum, or the softmax statistics (2, N) for losses of rows."""
    rows = inputs.input.size(0)
    losses = inputs.input.new_zeros(rows, dtype=torch.float32)
    statistics = inputs.input.new_zeros(2, rows, dtype=torch.float32)
    now = InputGrads(False, False, False) if want.per_row else want.grads
    grads = _run(inputs, losses, statistics, None, now)
    if want.per_row:
        return Result(losses, (statistics,) if any(want.grads) else ())
    return Result(losses.sum(), tuple(g for g in grads if g is not None))


def backward(inputs: Inputs, saved: tuple[Tensor, ...], grad: Tensor, want: Want, needs: InputGrads) -> InputGrads:
    """grad: (N,), or () for the sum, whose gradients were made in the forward."""
    if want.per_row:
        grads = _run(inputs, None, *saved, ready(grad), needs)
    else:
        of_sum = iter(saved)
        grads = [scaled(next(of_sum), grad) if wanted else None for wanted in want.grads]
    dtype = inputs.input.dtype
    return InputGrads(*(g.to(dtype) if need else None for g, need in zip(grads, needs, strict=True)))


def _run(
    inputs: Inputs, losses: Tensor | None, statistics: Tensor, scale: Tensor | None, needs: InputGrads
) -> InputGrads:
    """Compute losses (N,) and statistics (2, N), or read the statistics where losses is None; then the gradients."""
    (input, weight, bias, target), (N, H), V = inputs[:4], inputs.input.shape, inputs.weight.size(0)
    grads = InputGrads(
        torch.empty_like(input, memory_format=torch.contiguous_format) if needs.input else None,
        input.new_zeros(V, H, dtype=torch.float32) if needs.weight else None,
        input.new_zeros(V, dtype=torch.float32) if needs.bias else None,
    )
    for chunk in _chunks(N, V):
        logits = ready(F.linear(input[chunk], weight, bias))
        _softmax(logits, ready(target[chunk]), losses, statistics, scale, chunk, inputs, any(needs))
        if grads.input is not None:
            torch.mm(logits, weight, out=grads.input[chunk])
        if grads.weight is not None:
            grads.weight.add_(logits.mT @ input[chunk])
        if grads.bias is not None:
            grads.bias.add_(logits.sum(0, dtype=torch.float32))
    return grads


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    """Slices of nearly equal height with at most CHUNK_LOGITS logits, or one row."""
    count = -(-rows * classes // CHUNK_LOGITS)
    height = -(-rows // count) if count else 1
    return (slice(first, min(first + height, rows)) for first in range(0, rows, height))


def _softmax(  # noqa: PLR0917
    logits: Tensor,  # (R, V); replaced by the gradients if `gradients`
    target: Tensor,  # (R,)
    losses: Tensor | None,  # (N,) out
    statistics: Tensor,  # (2, N) out, or read where losses is None
    scale: Tensor | None,  # (N,)
    chunk: slice,
    inputs: Inputs,
    gradients: bool,
) -> None:
    from fastseq.ops.linear_cross_entropy.triton_kernels import cross_entropy_kernel

    R, V = logits.shape
    block = min(4096, max(16, power_of_two(V)))
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(R,)](
            logits,
            target,
            losses,
            statistics,
            scale,
            chunk.start,
            statistics.size(1),
            inputs.ignore_index,
            inputs.label_smoothing,
            V=V,
            GRADIENTS=gradients,
            BLOCK=block,
            num_warps=max(1, min(8, block // (8 * chip_of(logits).lanes))),
        )
