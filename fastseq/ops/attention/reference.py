"""Attention in plain torch: the definition of the op, with an explicit backward.

Dot scores of Luong et al. 2015, additive scores of Bahdanau et al. 2015; computed in float32 at least. Positions to
which no step attends (padding) reach no result and no gradient, even if they hold NaN or inf.
"""

import torch
from torch import Tensor

from fastseq.ops.attention.spec import Grads, InputGrads, Inputs, Result, Want
from fastseq.ops.common.autograd import transformed
from fastseq.ops.common.dtypes import accumulate_dtype

PLAIN_TORCH = True  # a compiler differentiates it by itself


def unsupported(call) -> str | None:
    """None: the reference serves every call."""
    return None


def forward(inputs: Inputs, want: Want) -> Result:
    """Differentiable if the padding is finite. Saved: the weights, (B, T, S), in float32 at least."""
    dtype, acc = inputs.query.dtype, accumulate_dtype(inputs.query.dtype)
    allowed = allowed_positions(inputs)
    q, k = inputs.query.to(acc), inputs.keys.to(acc)
    if inputs.weight is None:
        scores = (q * inputs.scale) @ k.mT
    else:
        scores = _hidden(inputs, q, k, inputs.coverage) @ (inputs.weight.to(acc) * inputs.scale)
    if allowed is not None:
        scores = scores.where(allowed, torch.finfo(acc).min)  # finite: an empty row stays free of NaN
    p = scores.softmax(-1)
    if allowed is not None:
        p = p.where(allowed, 0)
    context = _weighted_sum(p, inputs.values.to(acc), allowed)
    return Result(context.to(dtype), p.to(dtype) if want.weights else None, (p,) if want.backward else ())


def backward(inputs: Inputs, saved: tuple[Tensor, ...], grads: Grads, needs: InputGrads) -> InputGrads:
    """The (B, T, S, A) tanh of the additive score is recomputed rather than saved."""
    (p,) = saved
    acc = p.dtype
    allowed = allowed_positions(inputs)
    q, k, grad_context = inputs.query.to(acc), inputs.keys.to(acc), grads.context.to(acc)
    grad_p = grad_context @ inputs.values.to(acc).mT
    if grads.weights is not None:
        grad_p = grad_p + grads.weights
    if allowed is not None:
        grad_p = grad_p.where(allowed, 0)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * inputs.scale  # (B, T, S)
    grad_values = p.mT @ grad_context if needs.values else None
    if inputs.weight is None:
        result = (_weighted_sum(grad_scores, k, allowed), grad_scores.mT @ q, grad_values, *[None] * 4)
    else:
        coverage = covered(inputs, allowed)
        hidden = _hidden(inputs, q, without_padding(k, allowed), coverage)
        grad_weight = grad_scores.flatten() @ hidden.flatten(0, 2)
        grad_inner = grad_scores.unsqueeze(-1) * (inputs.weight.to(acc) * (1 - hidden * hidden))  # (B, T, S, A)
        grad_query = grad_inner.sum(2)
        result = (grad_query, grad_inner.sum(1), grad_values, grad_weight, grad_query.sum((0, 1)))
        result += (None, None) if coverage is None else _of_coverage(inputs, coverage.to(acc), grad_inner)
    tensors = inputs.differentiable()
    return InputGrads(*(g.to(x.dtype) if need else None for g, x, need in zip(result, tensors, needs, strict=True)))


def _hidden(inputs: Inputs, q: Tensor, k: Tensor, coverage: Tensor | None) -> Tensor:
    """tanh(q + k + b + coverage * coverage_weight), (B, T, S, A)."""
    inner = (q if inputs.bias is None else q + inputs.bias).unsqueeze(2) + k.unsqueeze(1)
    if coverage is not None:
        inner = inner + coverage.to(inner.dtype).unsqueeze(-1) * inputs.coverage_weight
    return inner.tanh()


def _of_coverage(inputs: Inputs, coverage: Tensor, grad_inner: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of coverage (B, T, S) and coverage_weight (A,) from the one inside the tanh, (B, T, S, A)."""
    return grad_inner @ inputs.coverage_weight.to(coverage.dtype), coverage.flatten() @ grad_inner.flatten(0, 2)


def covered(inputs: Inputs, allowed: Tensor | None) -> Tensor | None:
    """The coverage (B, T, S) with zeros at positions that no step attends to."""
    if inputs.coverage is None or allowed is None:
        return inputs.coverage
    return inputs.coverage.masked_fill(~allowed.any(1, keepdim=True), 0)


def _weighted_sum(p: Tensor, x: Tensor, allowed: Tensor | None) -> Tensor:
    """p (B, T, S) @ x (B, S, D), with 0 * NaN = 0 in the padding."""
    if allowed is None:
        return p @ x
    if type(p) is Tensor and p.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed()):
        # A search for NaN costs less than a copy of x without its padding.
        total = p @ x
        if not total.isnan().any():
            return total
    return p @ without_padding(x, allowed)


def allowed_positions(inputs: Inputs) -> Tensor | None:
    """Positions that may be attended to: (B, 1 or T, S) bool, or None for all."""
    if inputs.lengths is None:
        return inputs.mask
    positions = torch.arange(inputs.keys.size(1), device=inputs.lengths.device)
    return (positions < inputs.lengths.unsqueeze(1)).unsqueeze(1)  # (B, 1, S)


def without_padding(x: Tensor, allowed: Tensor | None) -> Tensor:
    """x (B, S, ...) with zeros at positions that no step attends to."""
    return x if allowed is None else x.masked_fill(~allowed.any(1).unsqueeze(-1), 0)
