"""Autograd of one LSTM layer in one or two directions: one Function, shared by all backends."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import (
    differentiable_backward,
    distinct,
    fold,
    forward_mode,
    needs_function,
    one_by_one,
    recompute,
)
from fastseq.ops.lstm import directions, projection, reference
from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Want, by_direction


class LSTMFunction(torch.autograd.Function):
    """(options, the flat tensors of a ``Layer``) -> output, h_n, c_n, cell states or None, and the saved tensors."""

    @staticmethod
    def forward(backend: str, reverse: bool, zero_h0: bool, cell_states: bool, lengths, batch_sizes, *tensors):
        module, layer = implementation("lstm", backend), _layer(tensors, lengths, batch_sizes, reverse, zero_h0)
        *results, saved = _lift(module, layer).forward(module, layer, Want(True, cell_states))
        return *results, *saved

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, ctx.reverse, ctx.zero_h0, _, lengths, batch_sizes, *tensors = inputs
        saved = outputs[4:]
        ctx.inputs = len(tensors)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, batch_sizes, *tensors, *saved)  # not the output, which users change in place

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cell_states, *_):
        lengths, batch_sizes, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.inputs], tuple(rest[ctx.inputs :])
        grads, needs = Grads(grad_output, grad_h_n, grad_c_n, grad_cell_states), ctx.needs_input_grad[6:]
        with without_autocast(tensors[0].device.type):
            if recompute(grads):
                forward = functools.partial(_reference, lengths, batch_sizes, ctx.reverse)
                result = differentiable_backward(forward, tensors, grads, needs)
            else:
                module = implementation("lstm", ctx.backend)
                layer = _layer(tensors, lengths, batch_sizes, ctx.reverse, ctx.zero_h0)
                needs = LayerGrads(*needs[:3], by_direction(needs[3:]))
                grads = _lift(module, layer).backward(module, layer, saved, grads, needs)
                result = distinct((*grads[:3], *(grad for direction in grads.weights for grad in direction)))
        return None, None, None, None, None, None, *result

    @staticmethod
    def vmap(info, in_dims, *args):
        """Padded input and shared weights: fold the samples into the batch. Otherwise run one sample at a time."""
        if args[5] is not None or any(dim is not None for dim in in_dims[9:]):
            return one_by_one(lambda *given: LSTMFunction.apply(*given)[:4], in_dims, args, info.batch_size)
        folded = list(args)
        for k, axis in ((4, 0), (6, 1), (7, 1), (8, 1)):  # lengths, input, h0, c0, and the axis of B in each
            folded[k] = None if args[k] is None else fold(args[k], in_dims[k], info.batch_size, axis)
        results = LSTMFunction.apply(*folded)[:4]
        unfolded = tuple(r if r is None else r.unflatten(1, (info.batch_size, -1)) for r in results)
        return unfolded, tuple(r if r is None else 1 for r in results)


def _reference(lengths, batch_sizes, reverse: bool, *tensors) -> tuple[Tensor, ...]:
    """output, h_n, c_n and cell states of the reference, in the order of ``Grads``."""
    return directions.forward(reference, _layer(tensors, lengths, batch_sizes, reverse), Want(False, True))[:4]


def _layer(tensors, lengths, batch_sizes, reverse: bool, zero_h0: bool = False) -> Layer:
    return Layer(*tensors[:3], by_direction(tensors[3:]), lengths, batch_sizes, reverse, zero_h0)


def _lift(module: ModuleType, layer: Layer) -> ModuleType:
    """The file that calls the backend: ``projection`` folds a projection, ``directions`` joins directions."""
    return projection if projection.folds(module, layer) else directions


def apply(backend: str, layer: Layer, cell_states: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run one layer on the named backend -> output, h_n, c_n, cell_states or None; shapes as in ``Result``.

    Records a backward only if a gradient can be requested.
    """
    module, tensors = implementation("lstm", backend), layer.tensors()
    if forward_mode():
        return directions.forward(reference, layer, Want(False, cell_states))[:4]
    if needs_function(module, *tensors):
        options = (backend, layer.reverse, layer.zero_h0, cell_states, layer.lengths, layer.batch_sizes)
        return LSTMFunction.apply(*options, *tensors)[:4]
    return _lift(module, layer).forward(module, layer, Want(False, cell_states))[:4]
