"""The records of the LSTM op: the call for the rules, the stack of layers, and one layer for the backends.

T steps, B sequences, I inputs, H hidden units, P outputs of a direction (H, or the projection's size), D directions,
L layers, N rows of a packed input. Gate order i, f, g, o.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LSTMCall(NamedTuple):
    """The properties of one ``lstm`` call that decide its backend. ``batch`` and ``steps`` are None in a traced graph.

    ``autocast``: on; ``dtype`` is then the dtype in which torch would multiply, and ``requires_grad`` the grad mode, by
    which torch chooses its kernel. ``fused``: under autocast torch would run the call by oneDNN or cuDNN, not op by op.
    ``vmapped``: within torch.func.vmap. ``forward_mode``: with forward-mode derivatives.
    ``subclass``: a tensor is of a type that is neither torch.Tensor nor nn.Parameter.
    ``tf32``: on CUDA, float32 products of a recurrence may be rounded to TF32.
    ``device_index``: the GPU's index, None for the current one. ``layers``: of the whole module.
    """

    device: str
    dtype: torch.dtype
    input_size: int
    hidden_size: int
    proj_size: int = 0
    packed: bool = False
    lengths: bool = False
    reverse: bool = False
    return_cell_states: bool = False
    requires_grad: bool = False
    autocast: bool = False
    fused: bool = False
    batch: int | None = None
    steps: int | None = None
    compiling: bool = False
    vmapped: bool = False
    forward_mode: bool = False
    subclass: bool = False
    tf32: bool = False
    device_index: int | None = None
    layers: int = 1


class Weights(NamedTuple):
    """The weights of one layer and direction."""

    ih: Tensor  # (4H, I)
    hh: Tensor  # (4H, P)
    bias_ih: Tensor | None  # (4H,), both biases or neither
    bias_hh: Tensor | None  # (4H,)
    hr: Tensor | None  # (P, H) projection


class Layer(NamedTuple):
    """One layer in one or two directions: the input of a backend's ``forward``."""

    input: Tensor  # (T, B, I), or packed (N, I)
    h0: Tensor  # (D, B, P)
    c0: Tensor  # (D, B, H)
    weights: tuple[Weights, ...]  # D
    lengths: Tensor | None = None  # (B,) int64
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU, of a packed input
    reverse: bool = False  # of a single direction; of two, the second is reversed
    zero_h0: bool = False  # h0 holds zeros that need no gradient: nn.LSTM's default

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The differentiable tensors: input, h0, c0, then the five weights of each direction."""
        return (self.input, self.h0, self.c0, *(w for direction in self.weights for w in direction))


class Want(NamedTuple):
    """The results of a forward besides output, h_n and c_n."""

    backward: bool  # the saved tensors that ``backward`` reads
    cell_states: bool


class Result(NamedTuple):
    """The results of a layer."""

    output: Tensor  # (T, B, D * P), or (N, D * P)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H)
    cell_states: Tensor | None  # (T, B, D * H), or (N, D * H); None unless wanted
    saved: tuple[Tensor, ...] = ()  # for ``backward``, in the backend's layout


class Grads(NamedTuple):
    """The gradients of a layer's results; None if the loss does not depend on one."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cell_states: Tensor | None


class LayerGrads(NamedTuple):
    """The gradients of a layer's inputs, None where unwanted; or, as ``needs``, one bool for each."""

    input: Tensor | bool | None
    h0: Tensor | bool | None
    c0: Tensor | bool | None
    weights: tuple[Weights, ...]  # D


class Stack(NamedTuple):
    """All layers of an LSTM: the input of ``api.run``."""

    input: Tensor  # (T, B, I), (B, T, I) with batch_first, or packed (N, I)
    h0: Tensor  # (L * D, B, P)
    c0: Tensor  # (L * D, B, H)
    weights: tuple[Tensor, ...]  # as nn.LSTM._flat_weights
    lengths: Tensor | None = None  # (B,) int64
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU, of a packed input
    num_layers: int = 1
    bias: bool = True
    proj_size: int = 0
    bidirectional: bool = False
    batch_first: bool = False
    reverse: bool = False  # of a single direction
    dropout: float = 0.0
    training: bool = False
    zero_h0: bool = False  # the caller gave no hx: h0 holds zeros that need no gradient

    def weights_of(self, k: int) -> Weights:
        """The weights of the k-th layer and direction."""
        count = 2 + 2 * self.bias + bool(self.proj_size)
        weights = self.weights[k * count : (k + 1) * count]
        biases = weights[2:4] if self.bias else (None, None)
        return Weights(*weights[:2], *biases, weights[-1] if self.proj_size else None)


def by_direction(flat) -> tuple[Weights, ...]:
    """Five values per direction, one direction after the other -> one record per direction."""
    return tuple(Weights(*flat[k : k + 5]) for k in range(0, len(flat), 5))
