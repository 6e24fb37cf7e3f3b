"""The sentence about torch.ao.quantization, which passes by modules of classes that it does not list."""

import warnings
from typing import Any

from torch import nn


class Unquantized(nn.Module):
    """A module that torch.ao.quantization leaves in float32, and that says so.

    ``quantize_dynamic``, ``prepare`` and ``prepare_qat`` set ``qconfig`` on each module of a model, then replace the
    classes that they list: nn.LSTM is one, its replacements are not.
    """

    @property
    def qconfig(self) -> Any:
        """The quantisation that torch.ao.quantization set; AttributeError where it set none."""
        try:
            return vars(self)["_qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["_qconfig"] = value
        warnings.warn(
            f"torch.ao.quantization passes by {type(self).__name__}({self.extra_repr()}), which stays in float32: call "
            "fastseq.restore(model) first for torch's quantised LSTMs, or use fastseq.accelerate(model, "
            "weight_dtype=torch.int8)",
            stacklevel=2,
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        vars(self).pop("_qconfig", None)
