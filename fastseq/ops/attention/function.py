"""Autograd of attention: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.attention import reference
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import needs_function


class AttentionFunction(torch.autograd.Function):
    """Arguments as of ``apply`` -> context (B, T, D), weights (B, T, S) or None."""

    @staticmethod
    def forward(ctx, backend, score, scale, need_weights, query, keys, values, weight, bias, lengths, mask, *prepared):
        inputs = (query, keys, values, weight, bias, lengths, mask)
        run = implementation("attention", backend).forward
        context, weights, saved = run(*inputs, score, scale, need_weights, True, *prepared)
        ctx.options = (backend, score, scale, need_weights)
        ctx.save_for_backward(*inputs, *saved)
        return context, weights

    @staticmethod
    def backward(ctx, grad_context, grad_weights):
        backend, score, scale, need_weights = ctx.options
        inputs, saved = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        needs = tuple(ctx.needs_input_grad[4:9])
        with without_autocast(grad_context.device.type):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                grads = _differentiable_backward(grad_context, grad_weights, inputs, score, scale, need_weights, needs)
            else:
                run = implementation("attention", backend).backward
                grads = run(grad_context, grad_weights, *inputs, saved, score, scale, needs)
        return None, None, None, None, *grads, *(None for _ in ctx.needs_input_grad[9:])


def _differentiable_backward(grad_context, grad_weights, inputs, score, scale, need_weights, needs):
    # Views: one input may be made from another (values from keys), and the gradient must stop at this call's inputs.
    views = [x.view_as(x) if need else x for x, need in zip(inputs[:5], needs, strict=True)]
    context, weights = _differentiable_forward(*views, *inputs[5:], score, scale, need_weights)
    outputs, grad_outputs = [context], [grad_context]
    if need_weights:
        outputs.append(weights)
        grad_outputs.append(grad_weights)
    wanted = [x for x, need in zip(views, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True))
    return tuple(next(grads) if need else None for need in needs)


def _differentiable_forward(query, keys, values, weight, bias, lengths, mask, score, scale, need_weights):
    """The reference for torch to differentiate, whatever the padding holds."""
    allowed = reference.allowed_positions(lengths, mask, keys.size(1))
    keys, values = reference.without_padding(keys, allowed), reference.without_padding(values, allowed)
    inputs = (query, keys, values, weight, bias, lengths, mask)
    context, weights, _ = reference.forward(*inputs, score, scale, need_weights)
    return context, weights


def apply(
    backend: str,
    score: str,
    scale: float,
    need_weights: bool,
    query: Tensor,  # (B, T, A)
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    weight: Tensor | None,  # (A,)
    bias: Tensor | None,  # (A,)
    lengths: Tensor | None,  # (B,)
    mask: Tensor | None,  # (B, 1 or T, S)
    *prepared: Tensor,  # what the backend's prepare() returned for these keys, or nothing
) -> tuple[Tensor, Tensor | None]:
    """Run on the named backend, recording a backward only where one can be asked for."""
    with without_autocast(query.device.type):
        inputs = (query, keys, values, weight, bias, lengths, mask)
        if backend == "torch":
            return implementation("attention", "torch").run(*inputs, score, scale, need_weights)
        if backend == "reference" and torch.compiler.is_compiling():  # plain torch, which the compiler differentiates
            return _differentiable_forward(*inputs, score, scale, need_weights)
        # TorchDynamo refuses one tensor as two arguments of a Function.
        keys = keys.view_as(keys) if keys is query else keys
        values = values.view_as(values) if values is keys or values is query else values
        inputs = (query, keys, values, weight, bias, lengths, mask)
        if needs_function(implementation("attention", backend), *inputs[:5]):
            return AttentionFunction.apply(backend, score, scale, need_weights, *inputs, *prepared)
        run = implementation("attention", backend).forward
        context, weights, _ = run(*inputs, score, scale, need_weights, False, *prepared)
        return context, weights
