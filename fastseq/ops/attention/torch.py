"""The ``torch`` backend of ``attention``, differentiated by torch.

Dot scores without weights go through scaled_dot_product_attention, torch's fused kernels; all other calls op by op.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.attention.spec import Inputs


def unsupported(call) -> str | None:
    """None: torch serves every call."""
    return None


def run(inputs: Inputs, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Context (B, T, D), weights (B, T, S) or None. Twice differentiable, except SDPA on CPU: once."""
    mask = inputs.mask
    if inputs.lengths is not None:
        positions = torch.arange(inputs.keys.size(1), device=inputs.lengths.device)
        mask = (positions < inputs.lengths.unsqueeze(1)).unsqueeze(1)
    if mask is not None:
        padding = ~mask.any(1).unsqueeze(-1)  # (B, S, 1); its keys and values may be NaN
        inputs = inputs._replace(
            keys=inputs.keys.masked_fill(padding, 0), values=inputs.values.masked_fill(padding, 0), mask=mask
        )
        if inputs.coverage is not None:
            inputs = inputs._replace(coverage=inputs.coverage.masked_fill(padding.transpose(1, 2), 0))
    if inputs.weight is None and not need_weights:
        return _sdpa(inputs), None
    context, weights = _op_by_op(inputs)
    return context, weights if need_weights else None


def context(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The context (B, T, D) of a dot score without padding, for inference."""
    query, keys, values = query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)
    return F.scaled_dot_product_attention(query, keys, values, scale=scale).squeeze(1)


def _sdpa(inputs: Inputs) -> Tensor:
    heads = (x.unsqueeze(1) for x in inputs[:3])  # one head each: (B, 1, T or S, A or D)
    allowed = None if inputs.mask is None else inputs.mask.unsqueeze(1)
    context = F.scaled_dot_product_attention(*heads, attn_mask=allowed, scale=inputs.scale).squeeze(1)
    if inputs.mask is not None:  # some SDPA kernels return NaN or the mean of the values for an empty row
        context = context.masked_fill(~inputs.mask.any(-1, keepdim=True), 0)
    return context


def _op_by_op(inputs: Inputs) -> tuple[Tensor, Tensor]:
    query, keys, values, weight, bias, coverage, coverage_weight = inputs.differentiable()
    if weight is None:
        scores = inputs.scale * (query @ keys.transpose(1, 2))
    else:
        query = query if bias is None else query + bias
        inner = query.unsqueeze(2) + keys.unsqueeze(1)
        if coverage is not None:
            inner = inner + coverage.unsqueeze(-1) * coverage_weight
        scores = inputs.scale * (inner.tanh() @ weight)
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask, torch.finfo(scores.dtype).min)  # finite: an empty row is not NaN
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    if inputs.mask is not None:
        weights = weights.masked_fill(~inputs.mask, 0)
    return weights @ values, weights
