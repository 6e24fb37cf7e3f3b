"""Autograd of attention: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.attention import reference
from fastseq.ops.attention.spec import CONTEXT, CONTEXT_AND_WEIGHTS, Grads, InputGrads, Inputs, Want, inputs_of
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import (
    differentiable_backward,
    fold,
    forward_mode,
    needs_function,
    one_by_one,
    recompute,
)

TENSORS = len(Inputs._fields) - 1  # all fields but ``scale``


class AttentionFunction(torch.autograd.Function):
    """(backend, scale, need_weights, the tensors of ``Inputs``) -> context, weights or None, and the saved tensors."""

    @staticmethod
    def forward(backend: str, scale: float, need_weights: bool, *tensors):
        module = implementation("attention", backend)
        context, weights, saved = module.forward(inputs_of(tensors, scale), Want(need_weights, backward=True))
        # Views where a tensor is returned twice or is an input, which autograd would not allow.
        return context, weights, *(t.view_as(t) if t is weights or t is tensors[-1] else t for t in saved)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, ctx.scale, ctx.need_weights, *tensors = inputs
        saved = outputs[2:]
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx, grad_context, grad_weights, *_):
        inputs, saved = inputs_of(ctx.saved_tensors[:TENSORS], ctx.scale), ctx.saved_tensors[TENSORS:]
        needs, grads = InputGrads(*ctx.needs_input_grad[3:10]), Grads(grad_context, grad_weights)
        with without_autocast(grad_context.device.type):
            if recompute(grads) and not torch.compiler.is_compiling():

                def forward(*tensors):
                    return _plain_torch(inputs_of((*tensors, *inputs[5:8]), ctx.scale), ctx.need_weights)

                result = differentiable_backward(forward, inputs.differentiable(), grads, needs)
            else:
                result = implementation("attention", ctx.backend).backward(inputs, saved, grads, needs)
        return None, None, None, *result, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        """Shared parameters: fold the samples into the batch. Otherwise run one sample at a time."""
        if any(in_dims[k] is not None for k in (6, 7, 9)):  # v, b and coverage_weight of the additive score
            return one_by_one(lambda *given: AttentionFunction.apply(*given)[:2], in_dims, args, info.batch_size)
        folded = list(args)
        for k in (3, 4, 5, 8, 10, 11, 12):  # query, keys, values, coverage, lengths, mask, prepared
            folded[k] = None if args[k] is None else fold(args[k], in_dims[k], info.batch_size, 0)
        results = AttentionFunction.apply(*folded)[:2]
        unfolded = tuple(r if r is None else r.unflatten(0, (info.batch_size, -1)) for r in results)
        return unfolded, tuple(r if r is None else 0 for r in results)


def _plain_torch(inputs: Inputs, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """The reference for torch to differentiate; the padding is zeroed first, because 0 * NaN is NaN."""
    allowed = reference.allowed_positions(inputs)
    keys, values = (reference.without_padding(x, allowed) for x in (inputs.keys, inputs.values))
    inputs = inputs._replace(keys=keys, values=values, coverage=reference.covered(inputs, allowed))
    context, weights, _ = reference.forward(inputs, Want(need_weights, backward=False))
    return context, weights


def _without_repeats(inputs: Inputs) -> Inputs:
    """Replace repeated tensors by views: TorchDynamo refuses one tensor as two arguments of a Function."""
    query, keys, values = inputs[:3]
    if keys is not query and values is not keys and values is not query:
        return inputs
    keys = keys.view_as(keys) if keys is query else keys
    values = values.view_as(values) if values is inputs.keys or values is query else values
    return inputs._replace(keys=keys, values=values)


def apply(backend: str, inputs: Inputs, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Context (B, T, D), and weights (B, T, S) or None, on the named backend.

    Records a backward only if a gradient can be requested.
    """
    module = implementation("attention", backend)
    with without_autocast(inputs.query.device.type):
        if forward_mode() or (module is reference and torch.compiler.is_compiling()):  # torch differentiates it
            return _plain_torch(inputs, need_weights)
        if hasattr(module, "run"):  # which torch differentiates, too
            return module.run(inputs, need_weights)
        if needs_function(module, *inputs.differentiable()):
            tensors = _without_repeats(inputs).tensors()
            return AttentionFunction.apply(backend, inputs.scale, need_weights, *tensors)[:2]
        context, weights, _ = module.forward(inputs, CONTEXT_AND_WEIGHTS if need_weights else CONTEXT)
        return context, weights
