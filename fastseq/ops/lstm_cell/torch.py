"""The ``torch`` backend of ``lstm_cell``: torch's operators, differentiated by torch."""

import torch
from torch import Tensor

from fastseq.ops.lstm_cell.spec import Cell

_vf_lstm_cell = torch._VF.lstm_cell


def unsupported(call) -> str | None:
    """None: torch serves every call."""
    return None


def run(cell: Cell) -> tuple[Tensor, Tensor]:
    """-> h (N, H), c_n (N, H)."""
    i, f, g, o = cell.gates.chunk(4, dim=-1)
    c_n = f.sigmoid() * cell.c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_n.tanh(), c_n


def run_step(input: Tensor, hx: tuple[Tensor, Tensor], weights: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The whole cell with the checks of nn.LSTMCell: input (B, I), h and c (B, H) -> the next h and c."""
    return _vf_lstm_cell(input, hx, *weights)
