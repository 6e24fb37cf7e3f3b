"""The ``triton`` backend of ``lstm_cell``: one pass over the gates, on any GPU that Triton supports."""

import torch
from torch import Tensor

from fastseq.ops.common.triton.runtime import chip_of, power_of_two, ready, why_not
from fastseq.ops.lstm_cell.spec import Cell, Grads, Result


def unsupported(call) -> str | None:
    """Return the refusal of an ``LSTMCellCall``, a sentence with the way out, or None."""
    return why_not("lstm_cell", call)


def forward(cell: Cell, need_backward: bool) -> Result:
    """Run the cell. Saves nothing; ``backward`` recomputes the activations."""
    from fastseq.ops.lstm_cell.triton_kernels import lstm_cell_forward_kernel

    c = ready(cell.c)
    h_n, c_n = c.new_empty(c.shape), c.new_empty(c.shape)
    _launch(lstm_cell_forward_kernel, ready(cell.gates), c, h_n, c_n)
    return Result(h_n, c_n)


def backward(cell: Cell, saved: tuple[Tensor, ...], grads: Grads) -> tuple[Tensor, Tensor]:
    """Return grad_gates (N, 4H) and grad_c (N, H).

    Recomputes the activations: five exponentials per element cost less than writing and reading five floats.
    """
    from fastseq.ops.lstm_cell.triton_kernels import lstm_cell_backward_kernel

    gates, c = ready(cell.gates), ready(cell.c)
    grad_gates, grad_c = torch.empty_like(gates), torch.empty_like(c)
    _launch(lstm_cell_backward_kernel, gates, c, ready(grads.h), ready(grads.c), grad_gates, grad_c)
    return grad_gates, grad_c


def _launch(kernel, *tensors: Tensor | None) -> None:
    """Launch a kernel with tiles of 128 threads, one 16-byte access per thread and tensor."""
    c = tensors[1]
    N, H = c.shape
    elements = 128 * 16 // c.element_size()
    columns = min(power_of_two(H), elements)
    rows = elements // columns
    grid = (-(-N // rows), -(-H // columns))
    with torch.cuda.device_of(c):
        kernel[grid](*tensors, N, H=H, ROWS=rows, COLUMNS=columns, num_warps=128 // chip_of(c).lanes)
