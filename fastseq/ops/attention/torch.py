"""Attention as torch itself computes it, differentiated by torch.

Dot scores without weights go through scaled_dot_product_attention, the vendor's fused kernels; everything else, op by
op.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(call) -> str | None:
    return None


def run(
    query: Tensor,  # (B, T, A)
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    weight: Tensor | None,  # (A,) v of the additive score
    bias: Tensor | None,  # (A,) added inside its tanh
    lengths: Tensor | None,  # (B,)
    mask: Tensor | None,  # (B, 1 or T, S) bool, True = attend
    score: str,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> context (B, T, D), weights (B, T, S) or None. Differentiable as often as torch's kernels: SDPA on CPU once."""
    if lengths is not None:
        mask = (torch.arange(keys.size(1), device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1)
    if mask is not None:
        padding = ~mask.any(1).unsqueeze(-1)  # may hold anything, NaN too
        keys, values = keys.masked_fill(padding, 0), values.masked_fill(padding, 0)
    if score == "dot" and not need_weights:
        heads = (x.unsqueeze(1) for x in (query, keys, values))  # one head each: (B, 1, T or S, A or D)
        allowed = None if mask is None else mask.unsqueeze(1)
        context = F.scaled_dot_product_attention(*heads, attn_mask=allowed, scale=scale).squeeze(1)
        if mask is not None:  # not every kernel of SDPA gives 0, or a number, where nothing is attended to
            context = context.masked_fill(~mask.any(-1, keepdim=True), 0)
        return context, None
    context, weights = _op_by_op(query, keys, values, weight, bias, mask, score, scale)
    return context, weights if need_weights else None


def _op_by_op(query, keys, values, weight, bias, mask, score: str, scale: float) -> tuple[Tensor, Tensor]:
    if score == "dot":
        scores = scale * (query @ keys.mT)
    else:
        query = query if bias is None else query + bias
        scores = scale * ((query.unsqueeze(2) + keys.unsqueeze(1)).tanh() @ weight)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: an empty row stays free of NaN
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    return weights @ values, weights
