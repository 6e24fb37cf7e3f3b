"""Autograd of the LSTM cell: one Function, shared by all backends."""

import torch
from torch import Tensor

from fastseq.dispatch import implementation
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import differentiable_backward, fold, forward_mode, needs_function, recompute
from fastseq.ops.lstm_cell import reference
from fastseq.ops.lstm_cell.spec import Cell, Grads


class LSTMCellFunction(torch.autograd.Function):
    """(backend, gates (N, 4H), c (N, H)) -> h (N, H), c_n (N, H), and the saved tensors."""

    @staticmethod
    def forward(backend: str, gates: Tensor, c: Tensor):
        h, c_n, saved = implementation("lstm_cell", backend).forward(Cell(gates, c), True)
        return h, c_n, *(t.view_as(t) if t is c_n else t for t in saved)  # no tensor is returned twice

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, gates, c = inputs
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, c, *outputs[2:])

    @staticmethod
    def backward(ctx, grad_h, grad_c_n, *_):
        gates, c, *saved = ctx.saved_tensors
        cell, grads = Cell(gates, c), Grads(grad_h, grad_c_n)
        with without_autocast(c.device.type):
            if recompute(grads):
                return None, *differentiable_backward(_reference, cell, grads, ctx.needs_input_grad[1:])
            return None, *implementation("lstm_cell", ctx.backend).backward(cell, tuple(saved), grads)

    @staticmethod
    def vmap(info, in_dims, backend: str, gates: Tensor, c: Tensor):
        """Fold the samples into the rows."""
        folded = (fold(t, dim, info.batch_size, 0) for t, dim in zip((gates, c), in_dims[1:], strict=True))
        results = LSTMCellFunction.apply(backend, *folded)[:2]
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in results), (0, 0)


def _reference(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return reference.forward(Cell(gates, c), False)[:2]


def apply(backend: str, cell: Cell) -> tuple[Tensor, Tensor]:
    """Run on the named backend -> h, c_n (N, H). Records a backward only if a gradient can be requested."""
    module = implementation("lstm_cell", backend)
    if hasattr(module, "run"):
        return module.run(cell)
    if forward_mode():
        return _reference(*cell)
    if needs_function(module, *cell):
        return LSTMCellFunction.apply(backend, *cell)[:2]
    return module.forward(cell, False)[:2]
