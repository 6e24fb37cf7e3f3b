"""The records of the LSTM cell op. N rows, H hidden units; gate order i, f, g, o."""

from typing import NamedTuple

import torch
from torch import Tensor


class LSTMCellCall(NamedTuple):
    """The properties of one ``lstm_cell`` call that decide its backend. ``batch`` is None in a traced graph.

    ``with_gemms``: the call computes the gates, too (LSTMCell). ``device_index``: the GPU's index, None for the current
    one.
    """

    device: str
    dtype: torch.dtype
    hidden_size: int
    with_gemms: bool = False
    requires_grad: bool = False
    compiling: bool = False
    batch: int | None = None
    device_index: int | None = None


class Cell(NamedTuple):
    """The input of a backend's ``forward``."""

    gates: Tensor  # (N, 4H) pre-activations
    c: Tensor  # (N, H)


class Result(NamedTuple):
    """The next states, and the tensors for ``backward`` in the backend's layout."""

    h: Tensor  # (N, H)
    c: Tensor  # (N, H)
    saved: tuple[Tensor, ...] = ()


class Grads(NamedTuple):
    """The gradients of the next states; None if the loss does not depend on one."""

    h: Tensor | None  # (N, H)
    c: Tensor | None  # (N, H)
