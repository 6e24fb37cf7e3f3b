"""Autograd of the LSTM variants: one Function, shared by all backends."""

import functools

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import (
    differentiable_backward,
    distinct,
    forward_mode,
    needs_function,
    one_by_one,
    recompute,
)
from fastseq.ops.common.layout import zero_padding
from fastseq.ops.lstm_variant import reference
from fastseq.ops.lstm_variant.spec import Grads, Recurrence, Variant, Want

FIELDS = len(Variant._fields)


class LSTMVariantFunction(torch.autograd.Function):
    """(backend, cell_states, the fields of ``Variant``, the fields of ``Recurrence``) -> the results, saved tensors."""

    @staticmethod
    def forward(backend: str, cell_states: bool, *fields):
        given, variant = Recurrence(*fields[FIELDS:]), Variant(*fields[:FIELDS])
        *results, saved = implementation("lstm_variant", backend).forward(given, variant, Want(True, cell_states))
        return *results, *saved

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, _, *fields = inputs
        saved, variant = outputs[4:], Variant(*fields[:FIELDS])
        ctx.variant = variant._replace(hidden_mask=None, keep_h=None, keep_c=None, lengths=None)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        masks = (variant.hidden_mask, variant.keep_h, variant.keep_c, variant.lengths)
        ctx.save_for_backward(*masks, *fields[FIELDS:], *saved)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cell_states, *_):
        hidden_mask, keep_h, keep_c, lengths, *rest = ctx.saved_tensors
        variant = ctx.variant._replace(hidden_mask=hidden_mask, keep_h=keep_h, keep_c=keep_c, lengths=lengths)
        count = len(Recurrence._fields)
        given, saved = Recurrence(*rest[:count]), tuple(rest[count:])
        grads, needs = Grads(grad_output, grad_h_n, grad_c_n, grad_cell_states), ctx.needs_input_grad[2 + FIELDS :]
        with without_autocast(given.gates.device.type):
            if recompute(grads):
                result = differentiable_backward(functools.partial(_reference, variant), given, grads, needs)
            else:
                backward = implementation("lstm_variant", ctx.backend).backward
                result = distinct(backward(given, variant, saved, grads, needs))
        return (None,) * (2 + FIELDS) + tuple(result)

    @staticmethod
    def vmap(info, in_dims, *args):
        """Run one sample at a time: samples may have masks of their own."""
        return one_by_one(lambda *given: LSTMVariantFunction.apply(*given)[:4], in_dims, args, info.batch_size)


def _reference(variant: Variant, *tensors) -> tuple[Tensor, ...]:
    """output, h_n, c_n and cell states of the reference, in the order of ``Grads``."""
    given = Recurrence(*tensors)
    if variant.lengths is not None:
        given = given._replace(gates=zero_padding(given.gates, variant.lengths))
    return reference.forward(given, variant, Want(False, True))[:4]


def apply(
    backend: str, given: Recurrence, variant: Variant, cell_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run on the named backend -> output, h_n, c_n, cell states or None.

    Records a backward only if a gradient can be requested.
    """
    module = implementation("lstm_variant", backend)
    if forward_mode():
        module = reference
    elif needs_function(module, *given):
        return LSTMVariantFunction.apply(backend, cell_states, *variant, *given)[:4]
    return module.forward(given, variant, Want(False, cell_states))[:4]
