"""The ``triton`` backend of ``lstm_cell``: one pass over the gates, on any GPU that Triton serves."""

import torch
from torch import Tensor

from fastseq.ops.common.triton.runtime import chip_of, power_of_two, ready, why_not
from fastseq.ops.lstm_cell.spec import Cell, Grads, Result


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCellCall``) and the way out, or None."""
    return why_not("lstm_cell", call)


def forward(cell: Cell, need_backward: bool) -> Result:
    """Nothing is saved: see ``backward``."""
    from fastseq.ops.lstm_cell.triton_kernels import lstm_cell_forward_kernel

    c = ready(cell.c)
    h_n, c_n = c.new_empty(c.shape), c.new_empty(c.shape)
    _launch(lstm_cell_forward_kernel, ready(cell.gates), c, h_n, c_n)
    return Result(h_n, c_n)


def backward(cell: Cell, saved: tuple[Tensor, ...], grads: Grads) -> tuple[Tensor, Tensor]:
    """-> grad_gates (N, 4H), grad_c (N, H).

    The activations are computed again: five exponentials an element cost less than writing and reading five floats.
    """
    from fastseq.ops.lstm_cell.triton_kernels import lstm_cell_backward_kernel

    gates, c = ready(cell.gates), ready(cell.c)
    grad_gates, grad_c = torch.empty_like(gates), torch.empty_like(c)
    _launch(lstm_cell_backward_kernel, gates, c, ready(grads.h), ready(grads.c), grad_gates, grad_c)
    return grad_gates, grad_c


def _launch(kernel, *tensors: Tensor | None) -> None:
    """A tile fills 128 threads with one 16-byte access each."""
    c = tensors[1]
    N, H = c.shape
    elements = 128 * 16 // c.element_size()
    columns = min(power_of_two(H), elements)
    rows = elements // columns
    grid = (-(-N // rows), -(-H // columns))
    with torch.cuda.device_of(c):
        kernel[grid](*tensors, N, H=H, ROWS=rows, COLUMNS=columns, num_warps=128 // chip_of(c).lanes)
