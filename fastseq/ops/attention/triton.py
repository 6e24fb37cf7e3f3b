"""The ``triton`` backend of ``attention``, for any GPU that Triton serves.

Forward is one kernel: an online softmax (Milakov & Gimelshein 2018) over blocks of keys. It leaves the scores,
(B, T, S), for the weights and for backward; nothing of size (B, T, S, A) is ever stored.
"""

import torch
from torch import Tensor

from fastseq.ops.common.triton.runtime import chip_of, dot_precision, power_of_two, ready, why_not


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``AttentionCall``) and the way out, or None."""
    return why_not("attention", call)


def forward(
    query: Tensor,  # (B, T, A)
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    weight: Tensor | None,  # (A,) v of the additive score
    bias: Tensor | None,  # (A,) added inside its tanh
    lengths: Tensor | None,  # (B,)
    mask: Tensor | None,  # (B, 1 or T, S) bool, True = attend; not together with lengths
    score: str,
    scale: float,
    need_weights: bool,
    need_backward: bool = True,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """-> context (B, T, D), weights (B, T, S) or None, saved for ``backward``."""
    from fastseq.ops.attention.triton_kernels import attention_forward_kernel

    B, T, A = query.shape
    S, D = values.shape[1:]
    context = query.new_empty(B, T, D)
    scores = query.new_empty(B, T, S, dtype=torch.float32)
    peaks, totals = scores.new_empty(B, T), scores.new_empty(B, T)
    blocks = _blocks(score, A, D, query.dtype)
    grid = (B * -(-T // blocks["BLOCK_T"]), -(-D // blocks["BLOCK_D"]))
    masks = (
        ready(None if lengths is None else lengths.to(torch.int64)),
        None if mask is None else ready(mask).view(torch.uint8),
    )
    per_step = mask is not None and mask.size(1) > 1
    with torch.cuda.device_of(query):
        attention_forward_kernel[grid](
            *map(ready, (query, keys, values, weight, bias)), *masks, context, scores, peaks, totals, scale, T, S,
            A=A, D=D, MASK_PER_STEP=per_step, PRECISION=dot_precision(query.dtype, chip_of(query)), **blocks,
        )  # fmt: skip
    weights = None
    if need_weights:
        weights = (torch.exp(scores - peaks.unsqueeze(-1)) / totals.unsqueeze(-1)).to(query.dtype)
    return context, weights, (scores, peaks, totals) if need_backward else ()


def backward(
    grad_context: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    saved: tuple[Tensor, ...],
    score: str,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, keys, values, weight, bias; None where not needed."""
    need_query, need_keys, need_values, need_weight, need_bias = needs
    scores = saved[0]
    p, grad_scores = _grad_scores(grad_context, grad_weights, values, saved, score, scale)
    grad_values = p.mT @ grad_context if need_values else None
    if score == "dot":
        # 0 * NaN is NaN: what no step attends to is taken out of the keys
        keys = keys if lengths is None and mask is None else keys.masked_fill(_padding(scores), 0)
        grad_query = grad_scores @ keys if need_query else None
        return grad_query, grad_scores.mT @ query if need_keys else None, grad_values, None, None
    grad_query, grad_keys, grad_weight = _additive_backward(grad_scores, query, keys, weight, bias, needs)
    return (
        grad_query.to(query.dtype) if need_query else None,
        grad_keys,
        grad_values,
        grad_weight.sum((0, 1)).to(weight.dtype) if need_weight else None,
        grad_query.sum((0, 1)).to(weight.dtype) if need_bias else None,
    )


def _grad_scores(grad_context, grad_weights, values, saved, score: str, scale: float) -> tuple[Tensor, Tensor]:
    """(B, T, S) softmax weights in the dtype of the values, and the gradient before ``scale`` (additive: float32)."""
    from fastseq.ops.attention.triton_kernels import attention_grad_scores_kernel

    scores, peaks, totals = saved
    B, T, S = scores.shape
    D = values.size(2)
    p = values.new_empty(B, T, S)
    grad_scores = torch.empty_like(p if score == "dot" else scores)
    block_d = min(32, max(16, power_of_two(D)))
    with torch.cuda.device_of(values):
        attention_grad_scores_kernel[(B * -(-T // 16),)](
            *map(ready, (values, grad_context, grad_weights)), scores, peaks, totals, p, grad_scores, scale, T, S,
            D=D, BLOCK_T=16, BLOCK_S=32, BLOCK_D=block_d, num_warps=128 // chip_of(values).lanes,
            PRECISION=dot_precision(values.dtype, chip_of(values)),
        )  # fmt: skip
    return p, grad_scores


def _additive_backward(grad_scores, query, keys, weight, bias, needs) -> tuple[Tensor | None, ...]:
    """Gradients of query (float32), keys, and each query row's share of that of the weight (B, T, A)."""
    query, keys, weight, bias = map(ready, (query, keys, weight, bias))
    grad_query = grad_keys = grad_weight = None
    with torch.cuda.device_of(query):
        if needs[0] or needs[3] or needs[4]:
            grad_query = torch.empty_like(query, dtype=torch.float32)
            grad_weight = torch.empty_like(grad_query)
            _one_side(query, keys, weight, bias, grad_scores, grad_query, grad_weight)
        if needs[1]:
            grad_keys = torch.empty_like(keys)
            _one_side(keys, query, weight, bias, grad_scores, grad_keys, None, transposed=True)
    return grad_query, grad_keys, grad_weight


def _one_side(own, other, weight, bias, grad_scores, grad_own, grad_weight, transposed: bool = False) -> None:
    from fastseq.ops.attention.triton_kernels import attention_additive_backward_kernel

    B, R, A = own.shape
    block_a = min(128, power_of_two(A))
    attention_additive_backward_kernel[(B * R, -(-A // block_a))](
        own, other, weight, bias, grad_scores, grad_own, grad_weight, R, other.size(1),
        A=A, TRANSPOSED=transposed, BLOCK_O=16, BLOCK_A=block_a, num_warps=4,
    )  # fmt: skip


def _padding(scores: Tensor) -> Tensor:
    """(B, S, 1) bool: positions that no step attends to."""
    return (scores == -torch.inf).all(1).unsqueeze(-1)


def _blocks(score: str, A: int, D: int, dtype: torch.dtype) -> dict:
    """The blocks of the forward kernel; never by T or S. Chosen as in lstm/triton.py; not tuned on a GPU yet."""
    if score == "dot":
        wide = dtype == torch.float32
        return {
            "BLOCK_T": 16,
            "BLOCK_S": 32,
            "BLOCK_A": min(32 if wide else 64, max(16, power_of_two(A))),
            "BLOCK_D": min(128 if wide else 256, max(16, power_of_two(D))),
            "num_warps": 4,
        }
    warps = 8 if D > 512 else 4
    return {
        "BLOCK_T": 1,
        "BLOCK_S": 16,
        "BLOCK_A": min(32 * warps, power_of_two(A)),
        "BLOCK_D": min(1024, power_of_two(D)),
        "num_warps": warps,
    }
