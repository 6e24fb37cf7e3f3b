"""``nn.Linear`` with int8 or bfloat16 weights at inference; made by :func:`fastseq.accelerate`."""

import torch
from torch import Tensor, nn

from fastseq.nn.narrow import check_call, narrow_weights
from fastseq.ops.common.narrow import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` that reads rounded copies of its weight at inference: half or a quarter of the bytes.

    ``weight_dtype``: torch.int8, with one scale for each output, or torch.bfloat16. None: as ``nn.Linear``.
    """

    weight_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input (..., K) -> (..., N).

        Raises:
            RuntimeError: with a ``weight_dtype``, a gradient would be recorded, or the call is not float32 on the CPU.
        """
        if self.weight_dtype is None:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        check_call(self, input, weight, bias)
        (narrow,) = narrow_weights(self, (weight,), self.weight_dtype)
        return linear(input, narrow, bias)
