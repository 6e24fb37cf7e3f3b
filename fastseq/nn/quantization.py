"""The sentence about torch.ao.quantization, which passes by modules of classes that it does not list."""

import inspect
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
        path, kind = _path(), type(self).__name__
        name = f"{path}, an {kind}" if path else kind
        warnings.warn(
            f"torch.ao.quantization passes by {name}({self.extra_repr()}), which stays in float32: call "
            "fastseq.restore(model) first for torch's quantised LSTMs, or use fastseq.accelerate(model, "
            "weight_dtype=torch.int8)",
            stacklevel=2,
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        vars(self).pop("_qconfig", None)


def _path() -> str:
    """The path of the module whose qconfig is being set; "" for the whole model, and outside torch.ao.quantization.

    A module does not know its path. torch's walk over the modules has it, as the argument ``prefix``.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_propagate_qconfig_helper":
        frame = frame.f_back
    return "" if frame is None else frame.f_locals.get("prefix", "")
