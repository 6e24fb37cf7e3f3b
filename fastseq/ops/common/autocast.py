"""What the caller's modes mean to an op: autocast casts its inputs as for a matmul, gradients need its Function."""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

_UNCHANGED = contextlib.nullcontext()


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; never for "meta", which has none and where asking raises."""
    return device != "meta" and torch.is_autocast_enabled(device)


def cast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, floating-point tensors in the autocast dtype (float64 stays, as in torch); else as they are."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def without_autocast(device: str):
    """A context in which autocast does nothing: it has done its part when the inputs were cast."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else _UNCHANGED


def needs_function(backend: str, *tensors: Tensor | None) -> bool:
    """Whether an op must go through its autograd Function, since a derivative can be asked for.

    Not in a traced graph on the reference: that is plain torch, which the compiler differentiates by itself.

    In forward mode the Function raises, where a bare kernel would drop the tangents without a word.
    """
    if backend == "reference" and torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
