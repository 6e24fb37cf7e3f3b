"""Triton kernel of ``linear_cross_entropy``: a program computes one row of logits. Tensors are contiguous."""

import triton
import triton.language as tl


@triton.jit
def _block(row, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the columns of a block, and True for those below V."""
    column = start + tl.arange(0, BLOCK)
    return row + column, column, column < V


@triton.jit(do_not_specialize=["first", "N", "ignore_index", "smoothing"])
def cross_entropy_kernel(
    logits,  # (R, V); replaced by the gradients if GRADIENTS
    target,  # (R,) int64 in [0, V), or ignore_index
    losses,  # (N,) float32 out, or None: read the statistics
    statistics,  # (2, N) float32: largest logit, log of the sum of exp(logit - largest)
    scale,  # (N,) float32 factors of the gradients, or None
    first,  # row of losses, statistics and scale that belongs to row 0 of the logits
    N,
    ignore_index,
    smoothing,
    V: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    n, N, row = first + r, N.to(tl.int64), logits + r * V
    hit = tl.load(target + r)
    valid = hit != ignore_index
    hit = tl.where(valid & (hit >= 0) & (hit < V), hit, 0)
    if losses is not None:
        peak = tl.full([], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            at, _, inside = _block(row, start, V, BLOCK)
            x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            peak = tl.maximum(peak, tl.max(x, axis=0))
        total = tl.zeros([], tl.float32)
        differences = tl.zeros([], tl.float32)
        for start in range(0, V, BLOCK):
            at, _, inside = _block(row, start, V, BLOCK)
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32) - peak
            total += tl.sum(tl.where(inside, tl.exp(x), 0.0), axis=0)
            differences += tl.sum(tl.where(inside, x, 0.0), axis=0)
        log_total = tl.log(total)
        of_target = tl.load(row + hit).to(tl.float32) - peak
        loss = log_total - (1.0 - smoothing) * of_target
        if smoothing > 0.0:
            loss -= smoothing / V * differences
        tl.store(losses + n, tl.where(valid, loss, 0.0))
        tl.store(statistics + n, peak)
        tl.store(statistics + N + n, log_total)
    else:
        peak = tl.load(statistics + n)
        log_total = tl.load(statistics + N + n)
    if GRADIENTS:
        factor = tl.full([], 1.0, tl.float32)
        if scale is not None:
            factor = tl.load(scale + n)
        for start in range(0, V, BLOCK):
            at, column, inside = _block(row, start, V, BLOCK)
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp((x - peak) - log_total) - smoothing / V - tl.where(column == hit, 1.0 - smoothing, 0.0)
            gradient = tl.where(valid, factor * gradient, 0.0)
            tl.store(at, gradient.to(logits.dtype.element_ty), mask=inside)
