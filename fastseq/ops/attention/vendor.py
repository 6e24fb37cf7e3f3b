"""Dot attention by torch's scaled_dot_product_attention: the vendor's fused kernels, differentiated by torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(call) -> str | None:
    if call.score != "dot":
        return (
            f"attention: the torch backend has no {call.score} score, since scaled_dot_product_attention knows dot "
            "products only; use backend='auto' or 'reference', or one of the scores 'dot' and 'general'."
        )
    if call.need_weights:
        return (
            "attention: the torch backend never holds the weights, since scaled_dot_product_attention returns the "
            "context only; use need_weights=False, or backend='auto' or 'reference'."
        )
    return None


def run(
    query: Tensor,  # (B, T, A)
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    lengths: Tensor | None,  # (B,)
    mask: Tensor | None,  # (B, 1 or T, S) bool, True = attend
    scale: float,
) -> Tensor:
    """-> context (B, T, D). Differentiable as often as torch's kernels are: its CPU flash kernel once only."""
    if lengths is not None:
        mask = (torch.arange(keys.size(1), device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1)
    if mask is None:
        return _attend(query, keys, values, None, scale)
    looking = type(keys) is Tensor and keys.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking and not torch.is_grad_enabled():
        context = _attend(query, keys, values, mask, scale)
        if (
            not context.isnan().any()
        ):  # NaN and inf in the padding show here; looking costs less than copying keys, values
            return context
    padding = ~mask.any(1).unsqueeze(-1)
    return _attend(query, keys.masked_fill(padding, 0), values.masked_fill(padding, 0), mask, scale)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    heads = (x.unsqueeze(1) for x in (query, keys, values))  # one head each: (B, 1, T or S, A or D)
    mask = None if mask is None else mask.unsqueeze(1)
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).squeeze(1)
