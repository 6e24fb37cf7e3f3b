"""Autograd of attention: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.attention import reference
from fastseq.ops.attention.spec import CONTEXT, CONTEXT_AND_WEIGHTS, Grads, InputGrads, Inputs, Want
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import differentiable_backward, needs_function

TENSORS = len(Inputs._fields) - 1  # all fields but ``scale``


class AttentionFunction(torch.autograd.Function):
    """(backend, scale, need_weights, the tensors of ``Inputs``) -> context (B, T, D), weights (B, T, S) or None."""

    @staticmethod
    def forward(ctx, backend: str, scale: float, need_weights: bool, *tensors):
        module = implementation("attention", backend)
        context, weights, saved = module.forward(Inputs(*tensors, scale), Want(need_weights, backward=True))
        ctx.backend, ctx.scale, ctx.need_weights = backend, scale, need_weights
        ctx.save_for_backward(*tensors, *saved)
        return context, weights

    @staticmethod
    def backward(ctx, grad_context, grad_weights):
        inputs, saved = Inputs(*ctx.saved_tensors[:TENSORS], ctx.scale), ctx.saved_tensors[TENSORS:]
        needs, grads = InputGrads(*ctx.needs_input_grad[3:8]), Grads(grad_context, grad_weights)
        with without_autocast(grad_context.device.type):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True

                def forward(*tensors):
                    return _plain_torch(Inputs(*tensors, *inputs[5:]), ctx.need_weights)

                result = differentiable_backward(forward, inputs.differentiable(), grads, needs)
            else:
                result = implementation("attention", ctx.backend).backward(inputs, saved, grads, needs)
        return None, None, None, *result, None, None, None


def _plain_torch(inputs: Inputs, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """The reference, to be differentiated by torch: its padding is zeroed first, because 0 * NaN is NaN."""
    allowed = reference.allowed_positions(inputs)
    keys, values = (reference.without_padding(x, allowed) for x in (inputs.keys, inputs.values))
    context, weights, _ = reference.forward(
        inputs._replace(keys=keys, values=values), Want(need_weights, backward=False)
    )
    return context, weights


def _without_repeats(inputs: Inputs) -> Inputs:
    """Views in place of repeated tensors: TorchDynamo refuses one tensor as two arguments of a Function."""
    query, keys, values = inputs[:3]
    if keys is not query and values is not keys and values is not query:
        return inputs
    keys = keys.view_as(keys) if keys is query else keys
    values = values.view_as(values) if values is inputs.keys or values is query else values
    return inputs._replace(keys=keys, values=values)


def apply(backend: str, inputs: Inputs, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Context (B, T, D), and weights (B, T, S) or None, on the named backend.

    Records a backward only where a gradient can be requested.
    """
    module = implementation("attention", backend)
    with without_autocast(inputs.query.device.type):
        if not hasattr(module, "forward"):  # torch differentiates it
            return module.run(inputs, need_weights)
        if module is reference and torch.compiler.is_compiling():  # the compiler differentiates it
            return _plain_torch(inputs, need_weights)
        if needs_function(module, *inputs.differentiable()):
            tensors = _without_repeats(inputs).tensors()
            return AttentionFunction.apply(backend, inputs.scale, need_weights, *tensors)
        context, weights, _ = module.forward(inputs, CONTEXT_AND_WEIGHTS if need_weights else CONTEXT)
        return context, weights
