"""Drop-in LSTMCell: parameters, arguments and results of ``torch.nn.LSTMCell``, computed by the best backend."""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastseq.dispatch import check_name
from fastseq.nn.narrow import check_inference, narrow_weights
from fastseq.nn.quantization import Unquantized
from fastseq.ops.common.checks import check_pair
from fastseq.ops.lstm_cell.api import run
from fastseq.ops.lstm_cell.rules import FAST_STEP, trains_on_torch

_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTMCell(Unquantized, nn.RNNCellBase):
    """A drop-in replacement for ``torch.nn.LSTMCell``: same arguments, parameters, initialisation and results.

    Args:
        input_size, hidden_size, bias, device, dtype: as in ``torch.nn.LSTMCell``.
        backend: "auto", "reference", "torch", "native" or "triton".

    ``cell.weight_dtype = torch.bfloat16`` or ``torch.int8`` (default None) makes steps in float32 on a CPU and of at
    most 8 rows read rounded copies of the weights: half or a quarter of the bytes, up to 2.9 times as fast for one
    sequence. int8 has one scale for each row. The copies are renewed after a weight is replaced or changed in place,
    but not after a change through ``.data``. A step that would record gradients raises a RuntimeError.

    Raises:
        ValueError: unknown backend.
    """

    backend = "auto"  # for modules that were pickled without one
    weight_dtype: torch.dtype | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = check_name(backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: input (B, I) or (I,), hx = (h (B, H), c (B, H)), zeros by default -> the next h and c.

        Without a batch dimension of the input, the states have none.

        Raises:
            RuntimeError, ValueError, TypeError: as ``torch.nn.LSTMCell``.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None:
            if isinstance(hx, Tensor):
                raise TypeError("LSTMCell: hx must be a tuple of two tensors (h, c), not one tensor")
            check_pair(hx)
            for k, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            zeros = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
            hx = (zeros, zeros)
        elif not batched:
            hx = tuple(state.unsqueeze(0) for state in hx)
        h, c = self._step(input, *hx)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    if TYPE_CHECKING:  # nn.Module declares __call__ without types
        __call__ = forward

    def _step(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._weights()
        narrow = None
        if self.weight_dtype is not None:
            check_inference(self, input, h, c, *weights)
            if c.dtype == torch.float32 and c.size(0) <= 8 and (c.is_cpu or self.weight_dtype == torch.bfloat16):
                narrow = functools.partial(narrow_weights, self, weights[:2], self.weight_dtype)
        elif trains_on_torch(weights[0], self.backend):
            return FAST_STEP(input, (h, c), *weights)
        return run(input, (h, c), weights, backend=self.backend, check=self._check, narrow=narrow)

    def _weights(self) -> tuple[Tensor | None, ...]:
        """The current weight_ih, weight_hh, bias_ih and bias_hh."""
        if tuple(self._parameters) == _CELL_NAMES:  # no computed weight; getattr takes three times as long
            return tuple(self._parameters.values())
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _check(self, input: Tensor, h: Tensor, c: Tensor) -> None:
        batch = input.shape[0]
        if (
            input.shape == (batch, self.input_size)
            and h.shape == c.shape == (batch, self.hidden_size)
            and input.device == h.device == c.device
            and input.is_floating_point()
        ):
            return  # a step is short: one expression for valid input, the checks below for the message
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        if not input.is_floating_point():
            raise RuntimeError(f"LSTMCell: input must be floating point, got {input.dtype}")
        for k, state in enumerate((h, c)):
            if state.device != input.device:
                raise RuntimeError(
                    f"LSTMCell: hidden{k} is on {state.device}, the input on {input.device}; move them to one device"
                )
            if state.dim() != 2 or state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )
