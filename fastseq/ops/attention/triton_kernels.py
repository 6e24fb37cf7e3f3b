"""Triton kernels of ``attention``: forward in one pass over the keys, and two kernels of the backward.

Tensors are contiguous. A program computes BLOCK_T query steps of one sentence (1 for additive scores). One program
computes each sum, without atomics, so results repeat bit for bit.
"""

import triton
import triton.language as tl

from fastseq.ops.common.triton.math import tanh


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def _allowed(lengths, mask, b, step, s, T, S, MASK_PER_STEP: tl.constexpr):
    """Return (BLOCK_T, BLOCK_S) bool: step ``step[i]`` of sentence b attends to position ``s[j]``."""
    inside = (step[:, None] < T) & (s[None, :] < S)
    if lengths is not None:
        inside &= s[None, :] < tl.load(lengths + b)
    if mask is not None:
        row = b * T + step if MASK_PER_STEP else b + step * 0
        inside &= tl.load(mask + row[:, None] * S + s[None, :], mask=inside, other=0) != 0
    return inside


@triton.jit
def _dot_scores(
    query, keys, rows, key_rows, in_rows, in_keys, A: tl.constexpr, BLOCK_A: tl.constexpr, PRECISION: tl.constexpr
):
    """Return (BLOCK_T, BLOCK_S) dot products of query rows and key rows."""
    scores = tl.zeros([rows.shape[0], key_rows.shape[0]], tl.float32)
    for start in range(0, A, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        q = _load(query, rows[:, None] * A + a[None, :], in_rows[:, None] & (a[None, :] < A))
        k = _load(keys, key_rows[:, None] * A + a[None, :], in_keys[:, None] & (a[None, :] < A))
        scores = tl.dot(q, k.T, scores, input_precision=PRECISION)
    return scores


@triton.jit
def _additive_scores(
    query,
    keys,
    weight,
    bias,
    covered,  # coverage of the row's first position, or None
    coverage_weight,
    row,
    s,
    key_rows,
    in_keys,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Return (1, BLOCK_S) weight . tanh(q + k + bias + coverage * coverage_weight) for one query row."""
    scores = tl.zeros([key_rows.shape[0]], tl.float32)
    if covered is not None:
        c = _load(covered, s, in_keys).to(tl.float32)
    for start in range(0, A, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        q = _load(query, row * A + a, a < A).to(tl.float32)
        if bias is not None:
            q += _load(bias, a, a < A).to(tl.float32)
        v = _load(weight, a, a < A).to(tl.float32)
        k = _load(keys, key_rows[:, None] * A + a[None, :], in_keys[:, None] & (a[None, :] < A)).to(tl.float32)
        inner = q[None, :] + k
        if covered is not None:
            inner += c[:, None] * _load(coverage_weight, a, a < A).to(tl.float32)[None, :]
        scores += tl.sum(tanh(inner) * v[None, :], axis=1)
    return scores[None, :]


@triton.jit(do_not_specialize=["T", "S", "scale"])
def attention_forward_kernel(
    query,  # (B, T, A)
    keys,  # (B, S, A)
    values,  # (B, S, D)
    weight,  # (A,) v of the additive score; None: dot
    bias,  # (A,) or None
    coverage,  # (B, T, S) of the additive score, or None
    coverage_weight,  # (A,), with coverage
    lengths,  # (B,) or None
    mask,  # (B, 1 or T, S) bytes, or None
    context,  # (B, T, D) out
    scores,  # (B, T, S) float32 out; -inf where masked
    peaks,  # (B, T) float32 out: maximum of the scores
    totals,  # (B, T) float32 out: sum of exp(scores - peak); 1 in an empty row
    scale,
    T,
    S,
    A: tl.constexpr,
    D: tl.constexpr,
    MASK_PER_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,  # 1 for additive scores
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T, S = T.to(tl.int64), S.to(tl.int64)
    blocks = tl.cdiv(T, BLOCK_T)
    b = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_T
    step = first + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = b * T + step
    peak = tl.full([BLOCK_T], -3.0e38, tl.float32)  # finite, because -inf - -inf is NaN
    total = tl.zeros([BLOCK_T], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        allowed = _allowed(lengths, mask, b, step, s, T, S, MASK_PER_STEP)
        read = tl.max(allowed.to(tl.int32), axis=0) != 0  # masked positions may be NaN
        key_rows = b * S + s
        if weight is None:
            block = _dot_scores(query, keys, rows, key_rows, step < T, read, A, BLOCK_A, PRECISION)
        else:
            row = b * T + first
            covered = None if coverage is None else coverage + row * S
            block = _additive_scores(
                query, keys, weight, bias, covered, coverage_weight, row, s, key_rows, read, A, BLOCK_A
            )
        block = tl.where(allowed, block * scale, float("-inf"))
        if tl.program_id(1) == 0:
            tl.store(scores + rows[:, None] * S + s[None, :], block, mask=(step[:, None] < T) & (s[None, :] < S))
        new_peak = tl.maximum(peak, tl.max(block, axis=1))
        shrink = tl.exp(peak - new_peak)
        p = tl.exp(block - new_peak[:, None])
        value = _load(values, key_rows[:, None] * D + d[None, :], read[:, None] & (d[None, :] < D))
        if weight is None:
            part = tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
        else:
            part = tl.sum(p.trans() * value.to(tl.float32), axis=0)[None, :]
        sums = sums * shrink[:, None] + part
        total = total * shrink + tl.sum(p, axis=1)
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)
    result = sums / total[:, None]
    inside = (step[:, None] < T) & (d[None, :] < D)
    tl.store(context + rows[:, None] * D + d[None, :], result.to(context.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(peaks + rows, peak, mask=step < T)
        tl.store(totals + rows, total, mask=step < T)


@triton.jit
def _weights_and_gradient(
    values,
    grad_context,
    grad_weights,
    scores,
    peaks,
    totals,
    rows,
    key_rows,
    s,
    in_rows,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return (BLOCK_T, BLOCK_S) softmax weights and the gradient dL/dweights."""
    at = rows[:, None] * S + s[None, :]
    inside = in_rows[:, None] & (s[None, :] < S)
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    peak = tl.load(peaks + rows, mask=in_rows, other=0.0)[:, None]
    p = tl.exp(score - peak) / tl.load(totals + rows, mask=in_rows, other=1.0)[:, None]
    read = tl.max(score, axis=0) > float("-inf")  # masked positions may be NaN
    grad_p = tl.zeros(p.shape, tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = _load(grad_context, rows[:, None] * D + d[None, :], in_rows[:, None] & (d[None, :] < D))
        value = _load(values, key_rows[:, None] * D + d[None, :], read[:, None] & (d[None, :] < D))
        grad_p = tl.dot(grad, value.T, grad_p, input_precision=PRECISION)
    if grad_weights is not None:
        grad_p += tl.load(grad_weights + at, mask=inside, other=0.0).to(tl.float32)
    return p, tl.where(score > float("-inf"), grad_p, 0.0)


@triton.jit(do_not_specialize=["T", "S", "scale"])
def attention_grad_scores_kernel(
    values,  # (B, S, D)
    grad_context,  # (B, T, D)
    grad_weights,  # (B, T, S) or None
    scores,  # (B, T, S) float32, -inf where masked
    peaks,  # (B, T) float32
    totals,  # (B, T) float32
    weights,  # (B, T, S) out: softmax weights
    grad_scores,  # (B, T, S) out: gradient of the unscaled scores
    scale,
    T,
    S,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T, S = T.to(tl.int64), S.to(tl.int64)
    blocks = tl.cdiv(T, BLOCK_T)
    b = tl.program_id(0) // blocks
    step = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows, in_rows = b * T + step, step < T
    mean = tl.zeros([BLOCK_T], tl.float32)  # mean of dL/dweights under the weights
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        p, grad_p = _weights_and_gradient(
            values,
            grad_context,
            grad_weights,
            scores,
            peaks,
            totals,
            rows,
            b * S + s,
            s,
            in_rows,
            S,
            D,
            BLOCK_D,
            PRECISION,
        )
        mean += tl.sum(p * grad_p, axis=1)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        p, grad_p = _weights_and_gradient(
            values,
            grad_context,
            grad_weights,
            scores,
            peaks,
            totals,
            rows,
            b * S + s,
            s,
            in_rows,
            S,
            D,
            BLOCK_D,
            PRECISION,
        )
        at, inside = rows[:, None] * S + s[None, :], in_rows[:, None] & (s[None, :] < S)
        grad = p * (grad_p - mean[:, None]) * scale
        tl.store(weights + at, p.to(weights.dtype.element_ty), mask=inside)
        tl.store(grad_scores + at, grad.to(grad_scores.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "O", "part"])
def attention_additive_backward_kernel(
    side,  # (B, R, A): query or keys, the tensor that gets the gradient
    other,  # (B, O, A): keys or query
    weight,  # (A,)
    bias,  # (A,) or None
    coverage,  # (B, R, O), or (B, O, R) if TRANSPOSED; or None
    coverage_weight,  # (A,), with coverage
    grad_scores,  # (B, R, O) float32, or (B, O, R) if TRANSPOSED
    grad_side,  # (B, R, A) out
    grad_weight,  # (B, R, A) float32 out: per-row gradient of the weight; or None
    grad_coverage,  # (blocks of A, B, R, O) float32 out: a part for each block; or None
    grad_coverage_weight,  # (B, R, A) float32 out: per-row gradient of coverage_weight; with grad_coverage
    part,  # B * R * O
    R,
    O,  # noqa: E741
    A: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    R, O, part = R.to(tl.int64), O.to(tl.int64), part.to(tl.int64)  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    b, r = row // R, row % R
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    x = _load(side, row * A + a, a < A).to(tl.float32)
    if bias is not None:
        x += _load(bias, a, a < A).to(tl.float32)
    slopes = tl.zeros([BLOCK_A], tl.float32)  # sum of gradient * (1 - tanh^2)
    heights = tl.zeros([BLOCK_A], tl.float32)  # sum of gradient * tanh
    if coverage is not None:
        w = _load(coverage_weight, a, a < A).to(tl.float32)
    if grad_coverage is not None:
        vw = _load(weight, a, a < A).to(tl.float32) * w
        covered = tl.zeros([BLOCK_A], tl.float32)  # sum of coverage * gradient * (1 - tanh^2)
    for start in range(0, O, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        at = o * R + r if TRANSPOSED else r * O + o
        grad = tl.load(grad_scores + b * R * O + at, mask=o < O, other=0.0)
        y = _load(other, (b * O + o[:, None]) * A + a[None, :], (o[:, None] < O) & (a[None, :] < A)).to(tl.float32)
        inner = x[None, :] + y
        if coverage is not None:
            c = _load(coverage, b * R * O + at, o < O).to(tl.float32)
            c = tl.where(grad == 0.0, 0.0, c)
            inner += c[:, None] * w[None, :]
        hidden = tanh(inner)
        hidden = tl.where(grad[:, None] == 0.0, 0.0, hidden)  # padding may be NaN
        slope = grad[:, None] * (1.0 - hidden * hidden)
        slopes += tl.sum(slope, axis=0)
        if grad_coverage is not None:
            covered += tl.sum(c[:, None] * slope, axis=0)
            product = tl.sum(slope * vw[None, :], axis=1)
            tl.store(grad_coverage + tl.program_id(1) * part + b * R * O + at, product, mask=o < O)
        heights += tl.sum(grad[:, None] * hidden, axis=0)
    v = _load(weight, a, a < A).to(tl.float32)
    tl.store(grad_side + row * A + a, (slopes * v).to(grad_side.dtype.element_ty), mask=a < A)
    if grad_weight is not None:
        tl.store(grad_weight + row * A + a, heights, mask=a < A)
    if grad_coverage is not None:
        tl.store(grad_coverage_weight + row * A + a, covered * v, mask=a < A)
