"""Autocast, the same for every op: inputs are cast as for a matmul, and backends then choose their own precision."""

import contextlib

import torch
from torch import Tensor


def cast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, floating-point tensors in the autocast dtype (float64 stays, as in torch); else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def without_autocast(device: str):
    """A context in which autocast does nothing: it has done its part when the inputs were cast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
