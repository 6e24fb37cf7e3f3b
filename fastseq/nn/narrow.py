"""Narrow weights of modules at inference: rounded copies, and the calls that may read them."""

import weakref

import torch
from torch import Tensor, nn

from fastseq.ops.common.autocast import autocast_enabled
from fastseq.ops.common.autograd import vmapped
from fastseq.ops.common.narrow import Narrow, check_dtype, round_weight, why_no_kernels

# module -> references to the weights, their addresses and versions, the copies. Not part of the state_dict.
_copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def narrow_weights(module: nn.Module, weights: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Narrow, ...]:
    """Rounded copies of float32 weights, made again if one is another tensor or was changed in place."""
    key = (dtype, *((w.data_ptr(), None if w.is_inference() else w._version) for w in weights))
    known = _copies.get(module)
    # Equal addresses do not prove equal tensors: a parametrised weight often lands where the last one was freed.
    if known is None or known[1] != key or any(ref() is not w for ref, w in zip(known[0], weights, strict=True)):
        copies = tuple(round_weight(w, dtype) for w in weights)
        known = _copies[module] = tuple(map(weakref.ref, weights)), key, copies
    return known[2]


def check_inference(module: nn.Module, *tensors: Tensor | None) -> None:
    """ValueError for an unknown ``weight_dtype``; RuntimeError if a gradient would be recorded."""
    check_dtype(module.weight_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{_setting(module)} is for inference and has no gradient; call the module under torch.no_grad(), or set "
            "weight_dtype to None (fastseq.restore) to train it"
        )


def check_call(module: nn.Module, *tensors: Tensor | None) -> None:
    """RuntimeError unless narrow weights serve the call: float32 tensors on the CPU, no gradient, no autocast."""
    check_inference(module, *tensors)
    if missing := why_no_kernels():
        raise RuntimeError(f"{_setting(module)} needs the compiled library: {missing}")
    other = next((t for t in tensors if t is not None and (t.dtype != torch.float32 or not t.is_cpu)), None)
    if other is not None or autocast_enabled("cpu") or vmapped():
        found = "autocast or vmap" if other is None else f"{other.dtype} on {other.device}"
        raise RuntimeError(
            f"{_setting(module)} serves float32 tensors on the CPU, got {found}; set weight_dtype to None "
            "(fastseq.restore) there"
        )


def _setting(module: nn.Module) -> str:
    return f"{type(module).__name__}: weight_dtype={module.weight_dtype}"
