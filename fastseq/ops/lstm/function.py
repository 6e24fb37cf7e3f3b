"""Autograd of one LSTM layer in one or two directions: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import needs_function, without_autocast
from fastseq.ops.lstm import directions, reference

PER_DIRECTION = 5  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; the last three may be None


class LSTMFunction(torch.autograd.Function):
    """(..., input, h0, c0, five weights per direction) -> output, h_n, c_n and, on request, all cell states."""

    @staticmethod
    def forward(ctx, backend: str, reverse: bool, need_cell_states: bool, lengths, batch_sizes, *tensors):
        output, h_n, c_n, cell_states, saved = _backend(backend).forward(
            *tensors[:3], _by_direction(tensors[3:]), lengths, batch_sizes, reverse, True, need_cell_states
        )
        ctx.backend, ctx.reverse, ctx.need_cell_states, ctx.inputs = backend, reverse, need_cell_states, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, batch_sizes, *tensors, *saved)  # not the output: users change it in place
        return (output, h_n, c_n, cell_states) if need_cell_states else (output, h_n, c_n)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cell_states=None):
        lengths, batch_sizes, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.inputs], tuple(rest[ctx.inputs :])
        grads = (grad_output, grad_h_n, grad_c_n, grad_cell_states)
        needs = ctx.needs_input_grad[5:]
        with without_autocast(tensors[0].device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
                result = _differentiable_backward(grads, tensors, lengths, batch_sizes, ctx.reverse, needs)
            else:
                weights = _by_direction(tensors[3:])
                result = _backend(ctx.backend).backward(
                    *grads, *tensors[:3], weights, saved, lengths, batch_sizes, ctx.reverse, needs
                )
        return None, None, None, None, None, *result


def _by_direction(weights) -> list[tuple]:
    return [tuple(weights[k : k + PER_DIRECTION]) for k in range(0, len(weights), PER_DIRECTION)]


def _backend(name: str):
    """A module with ``forward`` and ``backward`` of a whole layer."""
    module = implementation("lstm", name)
    return module if name == "native" else directions.one_by_one(module)


def _differentiable_backward(grads, tensors, lengths, batch_sizes, reverse: bool, needs):
    """Recompute the forward through the reference, which torch can differentiate as often as is asked for."""
    tensors = [t if t is None else t.view_as(t) for t in tensors]  # aliases: one input may be, or depend on, another
    *outputs, _ = directions.one_by_one(reference).forward(
        *tensors[:3], _by_direction(tensors[3:]), lengths, batch_sizes, reverse, True, True
    )
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    if not pairs:
        return (None,) * len(needs)
    outputs, grad_outputs = zip(*pairs, strict=True)
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def apply(
    backend: str,
    input: Tensor,  # (T, B, I), or (N, I) with batch_sizes
    h0: Tensor,  # (D, B, P)
    c0: Tensor,  # (D, B, H)
    weights: list[tuple[Tensor | None, ...]],  # per direction, PER_DIRECTION each
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,  # of a single direction; of two, the second is reversed
    need_cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One layer on the named backend: output (..., D*P), h_n (D, B, P), c_n (D, B, H), cell_states (None unless asked).

    A backward is recorded only where one can be asked for; the torch backend brings torch's own.
    """
    if backend == "torch":
        run = directions.one_by_one(implementation("lstm", "torch")).run
        return *run(input, h0, c0, weights, lengths, batch_sizes, reverse), None
    tensors = (input, h0, c0, *(w for own in weights for w in own))
    if needs_function(backend, *tensors):
        outputs = LSTMFunction.apply(backend, reverse, need_cell_states, lengths, batch_sizes, *tensors)
        return outputs if need_cell_states else (*outputs, None)
    *outputs, _ = _backend(backend).forward(
        input, h0, c0, weights, lengths, batch_sizes, reverse, False, need_cell_states
    )
    return tuple(outputs)
