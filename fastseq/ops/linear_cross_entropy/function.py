"""Autograd of linear_cross_entropy: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import (
    differentiable_backward,
    forward_mode,
    needs_function,
    one_by_one,
    recompute,
    transformed,
)
from fastseq.ops.linear_cross_entropy import reference
from fastseq.ops.linear_cross_entropy.spec import InputGrads, Inputs, Want

NO_GRADS = InputGrads(False, False, False)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(backend, per_row, the three flags of ``Want.grads``, the fields of ``Inputs``) -> loss, the saved tensors."""

    @staticmethod
    def forward(backend: str, per_row: bool, need_input: bool, need_weight: bool, need_bias: bool, *fields):
        want = Want(per_row, InputGrads(need_input, need_weight, need_bias))
        loss, saved = implementation("linear_cross_entropy", backend).forward(Inputs(*fields), want)
        return loss, *saved

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, ctx.per_row, *rest = inputs
        ctx.wanted, given = InputGrads(*rest[:3]), Inputs(*rest[3:])
        ctx.options = given[4:]
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*given[:4], *outputs[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        inputs, saved = Inputs(*ctx.saved_tensors[:4], *ctx.options), ctx.saved_tensors[4:]
        needs = InputGrads(*ctx.needs_input_grad[5:8])
        with without_autocast(inputs.input.device.type):
            if recompute((grad,)) and not torch.compiler.is_compiling():

                def forward(*tensors):
                    return (_plain_torch(Inputs(*tensors, *inputs[3:]), ctx.per_row),)

                result = differentiable_backward(forward, inputs.differentiable(), (grad,), needs)
            else:
                module = implementation("linear_cross_entropy", ctx.backend)
                result = module.backward(inputs, saved, grad, Want(ctx.per_row, ctx.wanted), needs)
        return *(None,) * 5, *result, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        """Run one sample at a time."""

        def apply_one(*given):
            return (LinearCrossEntropyFunction.apply(*given)[0],)

        return one_by_one(apply_one, in_dims, args, info.batch_size)


def _plain_torch(inputs: Inputs, per_row: bool) -> Tensor:
    """The reference for torch to differentiate."""
    return reference.forward(inputs, Want(per_row, NO_GRADS)).loss


def apply(backend: str, inputs: Inputs, per_row: bool) -> Tensor:
    """Losses (N,), or their sum (), on the named backend. Records a backward only if a gradient can be requested."""
    module = implementation("linear_cross_entropy", backend)
    with without_autocast(inputs.input.device.type):
        if forward_mode():
            return _plain_torch(inputs, per_row)
        if hasattr(module, "run"):
            return module.run(inputs, per_row)
        if not needs_function(module, *inputs.differentiable()):
            return module.forward(inputs, Want(per_row, NO_GRADS)).loss
        tracked = (t is not None and (t.requires_grad or transformed()) for t in inputs.differentiable())
        return LinearCrossEntropyFunction.apply(backend, per_row, *tracked, *inputs)[0]
