"""The records of linear_cross_entropy. N rows, H features, V classes."""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearCrossEntropyCall(NamedTuple):
    """The properties of one ``linear_cross_entropy`` call that decide its backend.

    ``per_row``: a loss for each row (reduction "none"). ``rows`` is None in a traced graph (dynamic). ``device_index``:
    the GPU's index, None for the current one.
    """

    device: str
    dtype: torch.dtype
    hidden_size: int
    classes: int
    per_row: bool = False
    requires_grad: bool = False
    compiling: bool = False
    rows: int | None = None
    device_index: int | None = None


class Inputs(NamedTuple):
    """The inputs of a backend."""

    input: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64 in [0, V), or ignore_index
    ignore_index: int
    label_smoothing: float

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The fields that may require gradients, in the order of ``InputGrads``."""
        return self[:3]


class InputGrads(NamedTuple):
    """Gradients of the inputs, None where not needed; as ``Want.grads`` and ``needs``: one bool each."""

    input: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)


class Want(NamedTuple):
    """The form of the loss, and the gradients that ``backward`` will be asked for."""

    per_row: bool  # (N,) losses, 0 in ignored rows; otherwise their sum, ()
    grads: InputGrads  # bool each


class Result(NamedTuple):
    """The results of a forward."""

    loss: Tensor  # (N,) or (), in the accumulation dtype
    saved: tuple[Tensor, ...]  # for ``backward``, in the backend's form; empty if ``Want.grads`` are all False
