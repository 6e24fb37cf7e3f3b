"""Autograd of the LSTM cell: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import differentiable_backward, needs_function
from fastseq.ops.lstm_cell import reference
from fastseq.ops.lstm_cell.spec import Cell, Grads


class LSTMCellFunction(torch.autograd.Function):
    """(backend, gates (N, 4H), c (N, H)) -> h (N, H), c_n (N, H)."""

    @staticmethod
    def forward(ctx, backend: str, gates: Tensor, c: Tensor):
        h, c_n, saved = implementation("lstm_cell", backend).forward(Cell(gates, c), True)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, c, *saved)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        gates, c, *saved = ctx.saved_tensors
        cell, grads = Cell(gates, c), Grads(grad_h, grad_c_n)
        with without_autocast(c.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
                return None, *differentiable_backward(_forward, cell, grads, ctx.needs_input_grad[1:])
            return None, *implementation("lstm_cell", ctx.backend).backward(cell, tuple(saved), grads)


def _forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return reference.forward(Cell(gates, c), False)[:2]


def apply(backend: str, cell: Cell) -> tuple[Tensor, Tensor]:
    """Run on the named backend -> h, c_n (N, H). Records a backward only where a gradient can be asked for."""
    module = implementation("lstm_cell", backend)
    if hasattr(module, "run"):
        return module.run(cell)
    if needs_function(module, *cell):
        return LSTMCellFunction.apply(backend, *cell)
    return module.forward(cell, False)[:2]
