"""Autograd of one LSTM layer in one or two directions: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import differentiable_backward, distinct, needs_function
from fastseq.ops.lstm import directions, reference
from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Want, by_direction


class LSTMFunction(torch.autograd.Function):
    """(..., the tensors of a Layer, flat) -> output, h_n, c_n and, on request, all cell states."""

    @staticmethod
    def forward(ctx, backend: str, reverse: bool, cell_states: bool, lengths, batch_sizes, *tensors):
        layer = _layer(tensors, lengths, batch_sizes, reverse)
        *results, saved = directions.forward(implementation("lstm", backend), layer, Want(True, cell_states))
        ctx.backend, ctx.reverse, ctx.inputs = backend, reverse, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, batch_sizes, *tensors, *saved)  # not the output: users change it in place
        return tuple(results) if cell_states else tuple(results[:3])

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cell_states=None):
        lengths, batch_sizes, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.inputs], tuple(rest[ctx.inputs :])
        grads, needs = Grads(grad_output, grad_h_n, grad_c_n, grad_cell_states), ctx.needs_input_grad[5:]
        with without_autocast(tensors[0].device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable

                def forward(*aliases):
                    layer = _layer(aliases, lengths, batch_sizes, ctx.reverse)
                    return directions.forward(reference, layer, Want(False, True))[:4]

                found = differentiable_backward(forward, tensors, grads, needs)
            else:
                layer = _layer(tensors, lengths, batch_sizes, ctx.reverse)
                needs = LayerGrads(*needs[:3], by_direction(needs[3:]))
                grads = directions.backward(implementation("lstm", ctx.backend), layer, saved, grads, needs)
                found = distinct((*grads[:3], *(grad for own in grads.weights for grad in own)))
        return None, None, None, None, None, *found


def _layer(tensors, lengths, batch_sizes, reverse: bool) -> Layer:
    return Layer(*tensors[:3], by_direction(tensors[3:]), lengths, batch_sizes, reverse)


def apply(backend: str, layer: Layer, cell_states: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One layer on the named backend -> output, h_n, c_n, cell_states (None unless wanted); shapes as in ``Result``.

    Records a backward only where a gradient can be asked for.
    """
    module, tensors = implementation("lstm", backend), layer.tensors()
    if needs_function(module, *tensors):
        results = LSTMFunction.apply(backend, layer.reverse, cell_states, layer.lengths, layer.batch_sizes, *tensors)
        return results if cell_states else (*results, None)
    return directions.forward(module, layer, Want(False, cell_states))[:4]
