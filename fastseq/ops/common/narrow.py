"""Weights rounded to bfloat16, or to int8 with a scale for each row, beside float32 tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native

MOST_ROWS = 64  # of the input of one call of the kernel, which reads the weight in place

DTYPES = (torch.int8, torch.bfloat16)


class Narrow(NamedTuple):
    """A rounded weight: ``values``, times ``scale`` row by row if it is int8."""

    values: Tensor  # (N, K)
    scale: Tensor | None  # (N,) float32

    def widen(self) -> Tensor:
        """The rounded weight in float32, (N, K)."""
        wide = self.values.to(torch.float32)
        return wide if self.scale is None else wide * self.scale.unsqueeze(1)


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """ValueError unless ``dtype`` is None or one of DTYPES."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"weight_dtype must be torch.int8, torch.bfloat16 or None, got {dtype!r}")
    return dtype


def why_no_kernels() -> str:
    """The reason why no kernel reads rounded weights here; "" if one does."""
    return "" if _native.available() else _native.why_not()


def round_weight(weight: Tensor, dtype: torch.dtype) -> Narrow:
    """Round a float32 weight (N, K).

    int8: ``scale = max |row| / 127``, the values to the nearest integer: an error of at most half a scale. bfloat16: a
    relative error of at most 2 ** -8. Rows with a NaN or an infinity become NaN in int8.
    """
    weight = weight.detach()
    if dtype == torch.bfloat16:
        return Narrow(weight.to(dtype).contiguous(), None)
    scale = weight.abs().amax(1) / 127 if weight.size(1) else weight.new_zeros(weight.size(0))
    scale = torch.where(scale.isinf(), torch.nan, scale)
    values = (weight / torch.where(scale > 0, scale, 1).unsqueeze(1)).round_()
    return Narrow(values.clamp_(-127, 127).nan_to_num_(0).to(dtype).contiguous(), scale)


def linear(input: Tensor, weight: Narrow, bias: Tensor | None) -> Tensor:
    """``F.linear`` of float32 input (..., K) on the CPU with a rounded weight (N, K); no gradients -> (..., N)."""
    rows = input.reshape(-1, input.size(-1))
    if rows.size(0) > MOST_ROWS:
        return F.linear(input, weight.widen(), bias)
    bias = bias if bias is None else bias.contiguous()
    output = _native.operators.linear_narrow.default(rows.contiguous(), weight.values, weight.scale, bias)
    return output.view(*input.shape[:-1], output.size(1))


def _fake_linear(input, weight, scale, bias):
    return input.new_empty(input.shape[0], weight.shape[0])


if _native.available():
    torch.library.register_fake("fastseq::linear_narrow", _fake_linear)
