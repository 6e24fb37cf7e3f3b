"""torch's products on the CPU with the operands of a GPU that computes in TF32."""

import contextlib
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FACTORS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "linear": (0, 1)}  # operator -> operands


class TF32Products(TorchDispatchMode):
    """Round the operands of torch's float32 products to TF32, as a GPU does where both of torch's flags allow it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        factors = FACTORS.get(func.__name__.partition(".")[0], ())
        args = [_round(a) if k in factors and a.dtype == torch.float32 else a for k, a in enumerate(args)]
        return func(*args, **kwargs or {})


def _round(x: torch.Tensor) -> torch.Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def tf32_products():
    """The mode, without oneDNN, whose LSTM is one operator: no mode sees its products."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False), TF32Products():
            yield
