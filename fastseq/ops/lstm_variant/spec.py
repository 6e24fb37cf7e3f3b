"""The records of the LSTM variant op. T steps, B sequences, H hidden units; gate order i, f, g, o."""

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5  # of both layer normalisations, as in torch.nn.LayerNorm


class LSTMVariantCall(NamedTuple):
    """The properties of one ``lstm_variant`` call that decide its backend. ``batch`` and ``steps``: None in a trace.

    ``device_index``: the GPU's index, None for the current one.
    """

    device: str
    dtype: torch.dtype
    hidden_size: int
    recurrent_dropout: bool = False
    zoneout: bool = False
    layer_norm: bool = False
    lengths: bool = False
    reverse: bool = False
    return_cell_states: bool = False
    requires_grad: bool = False
    batch: int | None = None
    steps: int | None = None
    compiling: bool = False
    forward_mode: bool = False
    device_index: int | None = None


class Variant(NamedTuple):
    """The inputs without a gradient. A zoneout mask goes before its rate; without both, nothing is kept."""

    hidden_mask: Tensor | None = None  # (B, H) factor of h_{t-1} in the recurrent product, float32 at least
    keep_h: Tensor | None = None  # (T, B, H) bool, True where h_t = h_{t-1}
    keep_c: Tensor | None = None  # (T, B, H) bool, True where c_t = c_{t-1}
    rate_h: float = 0.0  # share of h_{t-1} in h_t: the expectation of keep_h
    rate_c: float = 0.0
    lengths: Tensor | None = None  # (B,) int64
    reverse: bool = False


class Recurrence(NamedTuple):
    """The differentiable inputs."""

    gates: Tensor  # (T, B, 4H) the input's part of the pre-activations, biases included
    h0: Tensor  # (B, H)
    c0: Tensor  # (B, H)
    weight_hh: Tensor  # (4H, H)
    norm_hh: Tensor | None = None  # (4H,) gain of LN(W_hh h); all three norms or none
    norm_c: Tensor | None = None  # (H,) gain of LN(c)
    norm_c_bias: Tensor | None = None  # (H,)


class Result(NamedTuple):
    """The results of a layer and direction."""

    output: Tensor  # (T, B, H)
    h_n: Tensor  # (B, H)
    c_n: Tensor  # (B, H)
    cell_states: Tensor | None  # (T, B, H); None unless wanted
    saved: tuple[Tensor, ...] = ()  # for ``backward``, in the backend's layout


class Grads(NamedTuple):
    """The gradients of the results; None if the loss does not depend on one."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cell_states: Tensor | None


class Want(NamedTuple):
    """The results of a forward besides output, h_n and c_n."""

    backward: bool  # the saved tensors that ``backward`` reads
    cell_states: bool
