"""Autocast: cast the inputs of an op as a matmul's, then compute outside autocast."""

import contextlib

import torch
from torch import Tensor

_UNCHANGED = contextlib.nullcontext()


def autocast_enabled(device: str) -> bool:
    """True if autocast is on for a device type. Always False for "meta", for which the query raises."""
    return device != "meta" and torch.is_autocast_enabled(device)


def casts(t: Tensor) -> bool:
    """True if autocast is on and :func:`cast_inputs` would cast ``t``."""
    device = t.device.type
    return autocast_enabled(device) and t.dtype not in (torch.float64, torch.get_autocast_dtype(device))


def cast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast: floating-point tensors in the autocast dtype, except float64. Otherwise unchanged."""
    device = tensors[0].device.type
    return cast(torch.get_autocast_dtype(device), *tensors) if autocast_enabled(device) else tensors


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating-point tensors in ``dtype``; float64 stays, as under torch's autocast."""
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def without_autocast(device: str):
    """A context without autocast, for a computation whose inputs were cast already."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else _UNCHANGED
