"""The LSTM cell in plain torch: the definition of the op, with an explicit backward.

Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; gate order i, f, g, o as in ``torch.nn.LSTM``.
"""

import torch
from torch import Tensor

from fastseq.ops.lstm_cell.spec import Cell, Result

PLAIN_TORCH = True  # a compiler differentiates it by itself


def unsupported(call) -> str | None:
    """None: the reference serves every call."""
    return None


def forward(cell: Cell, need_backward: bool) -> Result:
    """Differentiable. Saved, in float32 at least: activations (N, 4H) and c_n (N, H)."""
    gates, c = cell
    wide = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = gates.to(wide).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_n = f * c.to(wide) + i * g
    h = o * c_n.tanh()
    return Result(h.to(c.dtype), c_n.to(c.dtype), (torch.cat((i, f, g, o), dim=-1), c_n))


def backward(cell: Cell, saved, grads) -> tuple[Tensor, Tensor]:
    """-> grad_gates (N, 4H), grad_c (N, H)."""
    activations, c_n = saved
    i, f, g, o = activations.chunk(4, dim=-1)
    tanh_c = c_n.tanh()
    dh = torch.zeros_like(c_n) if grads.h is None else grads.h.to(c_n.dtype)
    dc = dh * o * (1 - tanh_c * tanh_c)
    if grads.c is not None:
        dc = dc + grads.c
    di = dc * g * i * (1 - i)
    df = dc * cell.c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return torch.cat((di, df, dg, do), dim=-1).to(cell.gates.dtype), (dc * f).to(cell.c.dtype)
