"""Autograd of the decoder: one Function for T steps with input feeding."""

import torch
from torch import Tensor

from fastseq.ops.common.autograd import differentiable_backward, distinct, one_by_one, recompute
from fastseq.ops.decoder import native, reference
from fastseq.ops.decoder.spec import Grads, Sequence, sequence_of


class DecoderFunction(torch.autograd.Function):
    """(layers, scale, the tensors of ``Sequence``) -> vectors, attention, h_n, c_n, and the saved tensors."""

    @staticmethod
    def forward(layers: int, scale: float, *tensors):
        result = native.forward(sequence_of(tensors, layers, scale))
        return *result[:4], *result.saved

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.layers, ctx.scale, *tensors = inputs
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *outputs[:2], *outputs[4:])

    @staticmethod
    def backward(ctx, *grads):
        given, grads = ctx.saved_tensors, Grads(*grads[:4])
        count = len(ctx.needs_input_grad) - 2
        inputs, saved = sequence_of(given[:count], ctx.layers, ctx.scale), given[count:]
        needs = ctx.needs_input_grad[2:]
        if recompute(grads):

            def forward(*tensors):
                return reference.forward(sequence_of(tensors, ctx.layers, ctx.scale))[:4]

            result = differentiable_backward(forward, inputs.tensors(), grads, needs)
        else:
            result = native.backward(inputs, saved, grads, needs)
        return None, None, *distinct(result)

    @staticmethod
    def vmap(info, in_dims, *args):
        """One sample at a time: the samples may differ in the weights."""
        return one_by_one(lambda *given: DecoderFunction.apply(*given)[:4], in_dims, args, info.batch_size)


def apply(s: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """vectors (T, N, H), attention (T, N, P), h_n, c_n (L, N, H)."""
    if torch.is_grad_enabled():
        return DecoderFunction.apply(s.layers(), s.scale, *s.tensors())[:4]
    return native.forward(s)[:4]
