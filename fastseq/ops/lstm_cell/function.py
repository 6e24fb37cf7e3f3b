"""Autograd of the LSTM cell: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import needs_function, without_autocast
from fastseq.ops.lstm_cell import reference


class LSTMCellFunction(torch.autograd.Function):
    """(backend, gates (N, 4H), c (N, H)) -> h (N, H), c_n (N, H)."""

    @staticmethod
    def forward(ctx, backend: str, gates: Tensor, c: Tensor):
        h, c_n, saved = implementation("lstm_cell", backend).forward(gates, c)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, c, *saved)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        gates, c, *saved = ctx.saved_tensors
        with without_autocast(c.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
                return None, *_differentiable_backward(grad_h, grad_c_n, gates, c)
            return None, *implementation("lstm_cell", ctx.backend).backward(grad_h, grad_c_n, gates, c, tuple(saved))


def _differentiable_backward(grad_h, grad_c_n, gates: Tensor, c: Tensor):
    """Recompute the forward through the reference, which torch can differentiate as often as is asked for."""
    gates, c = gates.view_as(gates), c.view_as(c)  # aliases: one input may be, or depend on, the other
    h, c_n, _ = reference.forward(gates, c)
    pairs = [(out, grad) for out, grad in ((h, grad_h), (c_n, grad_c_n)) if grad is not None]
    if not pairs:
        return None, None
    outputs, grad_outputs = zip(*pairs, strict=True)
    wanted = [t for t in (gates, c) if t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return tuple(next(found) if t.requires_grad else None for t in (gates, c))


def apply(backend: str, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Run on the named backend, recording a backward only where one can be asked for."""
    if backend == "torch":
        return implementation("lstm_cell", "torch").run(gates, c)
    if needs_function(backend, gates, c):
        return LSTMCellFunction.apply(backend, gates, c)
    h, c_n, _ = implementation("lstm_cell", backend).forward(gates, c)
    return h, c_n
