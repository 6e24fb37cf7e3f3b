"""Autocast: cast the inputs of an op as a matmul's, then compute outside autocast."""

import contextlib

import torch
from torch import Tensor

from fastseq.ops.common.autograd import peek_transform

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


def cast_weights(dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
    """Weights in ``dtype`` under autocast; matrices come from torch's cache, which lives as long as autocast's block.

    A loop of short calls thus casts each matrix once, and its gradients are summed before they are cast back. Without
    the cache 50 training steps of one time step took twice as long (H = 256, Zen 4).
    """
    caches = (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.is_autocast_cache_enabled()
        and dtype == torch.get_autocast_dtype(weights[0].device.type)
        and peek_transform() is None
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )
    copies = (_from_cache(w, dtype) if caches else None for w in weights)
    return tuple(cast(dtype, w)[0] if copied is None else copied for w, copied in zip(weights, copies, strict=True))


def _from_cache(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy of a matrix in torch's cache, made if missing; None for tensors that torch does not cache.

    Python cannot read the cache: a product of no rows saves the cached copy for its backward.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or not (weight.is_leaf and weight.requires_grad):
        return None
    no_rows = torch.empty(0, weight.size(0), dtype=dtype, device=weight.device, requires_grad=True)
    copied = torch.mm(no_rows, weight).grad_fn._saved_mat2
    return copied if copied.requires_grad else None  # cached by a call without gradients


def without_autocast(device: str):
    """A context without autocast, for a computation whose inputs were cast already."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else _UNCHANGED
