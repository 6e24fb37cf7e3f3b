"""The ``native`` backend of ``lstm_cell``: one compiled pass over the gates, on CPU and CUDA.

csrc checks the arguments.
"""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.common.checks import CPU_DTYPES, native_objection
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import contiguous
from fastseq.ops.common.narrow import Narrow
from fastseq.ops.lstm_cell.spec import Cell, Grads, Result


def forward(cell: Cell, need_backward: bool) -> Result:
    """Saved: activations (N, 4H) in float32 at least, and c_n (N, H)."""
    h, c_n, activations = _native.operators.lstm_cell_forward.default(cell.gates.contiguous(), cell.c.contiguous())
    return Result(h, c_n, (activations, c_n))


def update(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h and c_n for inference, from gates (N, 4H) and c (N, H)."""
    return _native.operators.lstm_cell_forward.default(gates.contiguous(), c.contiguous())[:2]


def backward(cell: Cell, saved: tuple[Tensor, ...], grads: Grads) -> tuple[Tensor, Tensor]:
    """-> grad_gates (N, 4H), grad_c (N, H)."""
    activations, c_n = saved
    return _native.operators.lstm_cell_backward.default(
        activations, cell.c.contiguous(), c_n, contiguous(grads.h), contiguous(grads.c)
    )


def step(input: Tensor, hx: tuple[Tensor, Tensor], weights: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Both products and the cell in one pass over the weights, without packing them; no gradients -> h, c.

    input: (B, I). hx: h and c, (B, H). weights: W_ih (4H, I) and W_hh (4H, H), optionally bfloat16 beside float32; b_ih
    (4H,) or (B, 4H), and b_hh (4H,), or None.
    """
    (h, c), (weight_ih, weight_hh, bias_ih, bias_hh) = hx, weights
    return _native.operators.lstm_step.default(
        input.contiguous(),
        h.contiguous(),
        c.contiguous(),
        weight_ih.contiguous(),
        weight_hh.contiguous(),
        bias_ih,
        bias_hh,
    )


def step_narrow(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: tuple[Narrow, Narrow], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """As ``step``, with rounded weights W_ih and W_hh, and biases (4H,) or None."""
    ih, hh = weights
    if ih.scale is None:
        return step(input, hx, (ih.values, hh.values, *biases))
    tensors = (t.contiguous() for t in (input, *hx))
    return _native.operators.lstm_step_int8.default(*tensors, ih.values, hh.values, ih.scale, hh.scale, *biases)


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCellCall``) and the way out, or None."""
    return native_objection("lstm_cell", call, CPU_DTYPES)


def _fake_forward(gates, c):
    B, H = c.shape
    return c.new_empty(B, H), c.new_empty(B, H), c.new_empty(B, 4 * H, dtype=accumulate_dtype(c.dtype))


def _fake_backward(activations, c, c_n, grad_h, grad_c_n):
    B, H = c.shape
    return c.new_empty(B, 4 * H), c.new_empty(B, H)


def _fake_step(input, h, c, *_):
    return torch.empty_like(c), torch.empty_like(c)


if _native.available():
    torch.library.register_fake("fastseq::lstm_step", _fake_step)
    torch.library.register_fake("fastseq::lstm_step_int8", _fake_step)
    torch.library.register_fake("fastseq::lstm_cell_forward", _fake_forward)
    torch.library.register_fake("fastseq::lstm_cell_backward", _fake_backward)
