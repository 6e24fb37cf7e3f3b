"""Attention in plain torch: the definition of right, and its backward by hand.

Dot scores of Luong et al. 2015, additive scores of Bahdanau et al. 2015; everything is computed in float32 at least.
What lies at positions that no step attends to (padding), NaN and inf too, reaches no result and no gradient.
"""

import torch
from torch import Tensor

PLAIN_TORCH = True  # a compiler differentiates it by itself


def unsupported(call) -> str | None:
    return None


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
    """-> context (B, T, D), weights (B, T, S) or None, saved. Differentiable where the padding is finite."""
    acc = wide_dtype(query.dtype)
    allowed = allowed_positions(lengths, mask, keys.size(1))
    q, k = query.to(acc) * scale if score == "dot" else query.to(acc), keys.to(acc)
    scores = q @ k.mT if score == "dot" else _hidden(q, k, bias) @ (weight.to(acc) * scale)
    if allowed is not None:
        scores = scores.where(allowed, torch.finfo(acc).min)  # finite: an empty row stays free of NaN
    p = scores.softmax(-1)
    if allowed is not None:
        p = p.where(allowed, 0)
    context = _weighted_sum(p, values.to(acc), allowed)
    return context.to(query.dtype), p.to(query.dtype) if need_weights else None, (p,) if need_backward else ()


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
    """Gradients of query, keys, values, weight, bias; the (B, T, S, A) tanh is computed again rather than kept."""
    (p,) = saved
    acc = p.dtype
    allowed = allowed_positions(lengths, mask, keys.size(1))
    q, k, grad_context = query.to(acc), keys.to(acc), grad_context.to(acc)
    grad_p = grad_context @ values.to(acc).mT
    if grad_weights is not None:
        grad_p = grad_p + grad_weights
    if allowed is not None:
        grad_p = grad_p.where(allowed, 0)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale  # (B, T, S)
    grad_values = p.mT @ grad_context if needs[2] else None
    if score == "dot":
        grads = (_weighted_sum(grad_scores, k, allowed), grad_scores.mT @ q, grad_values, None, None)
    else:
        hidden = _hidden(q, without_padding(k, allowed), bias)
        grad_weight = grad_scores.flatten() @ hidden.flatten(0, 2)
        grad_inner = grad_scores.unsqueeze(-1) * (weight.to(acc) * (1 - hidden * hidden))  # (B, T, S, A)
        grad_query = grad_inner.sum(2)
        grads = (grad_query, grad_inner.sum(1), grad_values, grad_weight, grad_query.sum((0, 1)))
    inputs = (query, keys, values, weight, bias)
    return tuple(g.to(x.dtype) if need else None for g, x, need in zip(grads, inputs, needs, strict=True))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What attention computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _hidden(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """tanh(q + k + b), (B, T, S, A)."""
    return ((q if bias is None else q + bias).unsqueeze(2) + k.unsqueeze(1)).tanh()


def _weighted_sum(p: Tensor, x: Tensor, allowed: Tensor | None) -> Tensor:
    """p (B, T, S) @ x (B, S, D), where 0 * NaN is 0 in the padding."""
    if allowed is None:
        return p @ x
    if type(p) is Tensor and p.device.type == "cpu" and not torch.compiler.is_compiling():
        # Looking for NaN costs less than copying x without its padding.
        total = p @ x
        if not total.isnan().any():
            return total
    return p @ without_padding(x, allowed)


def allowed_positions(lengths: Tensor | None, mask: Tensor | None, size: int) -> Tensor | None:
    """Where attention may go: (B, 1 or T, S) bool, or None for everywhere."""
    if lengths is None:
        return mask
    return (torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1)  # (B, 1, S)


def without_padding(x: Tensor, allowed: Tensor | None) -> Tensor:
    """x (B, S, ...) with zeros where no step attends to."""
    return x if allowed is None else x.masked_fill(~allowed.any(1).unsqueeze(-1), 0)
