"""Autograd of one LSTM layer and direction: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.backend import implementation
from fastseq.ops.lstm import reference
from fastseq.ops.modes import needs_function, without_autocast


class LSTMFunction(torch.autograd.Function):
    """(..., 8 tensors) -> output, h_n, c_n and, on request, the cell states of every step.

    The tensors are input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; the last three may be None.
    """

    @staticmethod
    def forward(ctx, backend: str, reverse: bool, need_cell_states: bool, lengths, batch_sizes, *tensors):
        output, h_n, c_n, cell_states, saved = implementation("lstm", backend).forward(
            *tensors, lengths, batch_sizes, reverse, True, need_cell_states
        )
        ctx.backend, ctx.reverse, ctx.need_cell_states = backend, reverse, need_cell_states
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, batch_sizes, *tensors, *saved)  # not the output: users change it in place
        return (output, h_n, c_n, cell_states) if need_cell_states else (output, h_n, c_n)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cell_states=None):
        lengths, batch_sizes, *rest = ctx.saved_tensors
        tensors, saved = rest[:8], tuple(rest[8:])
        grads = (grad_output, grad_h_n, grad_c_n, grad_cell_states)
        needs = ctx.needs_input_grad[5:]
        with without_autocast(tensors[0].device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
                result = _differentiable_backward(grads, tensors, lengths, batch_sizes, ctx.reverse, needs)
            else:
                run = implementation("lstm", ctx.backend).backward
                result = run(*grads, *tensors, saved, lengths, batch_sizes, ctx.reverse, needs)
        return None, None, None, None, None, *result


def _differentiable_backward(grads, tensors, lengths, batch_sizes, reverse: bool, needs):
    """Recompute the forward through the reference, which torch can differentiate as often as is asked for."""
    tensors = [t if t is None else t.view_as(t) for t in tensors]  # aliases: one input may be, or depend on, another
    *outputs, _ = reference.forward(*tensors, lengths, batch_sizes, reverse, True, True)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    if not pairs:
        return (None,) * len(needs)
    outputs, grad_outputs = zip(*pairs, strict=True)
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def apply(
    backend: str, tensors: tuple[Tensor | None, ...], lengths, batch_sizes, reverse: bool, need_cell_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run on the named backend: output, h_n, c_n, cell_states (None unless asked for).

    A backward is recorded only where one can be asked for; the torch backend brings torch's own.
    """
    if backend == "torch":
        return *implementation("lstm", "torch").run(*tensors, lengths, batch_sizes, reverse), None
    if needs_function(backend, *tensors):
        outputs = LSTMFunction.apply(backend, reverse, need_cell_states, lengths, batch_sizes, *tensors)
        return outputs if need_cell_states else (*outputs, None)
    *outputs, _ = implementation("lstm", backend).forward(
        *tensors, lengths, batch_sizes, reverse, False, need_cell_states
    )
    return tuple(outputs)
