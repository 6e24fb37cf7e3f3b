"""Checks of arguments shared by several ops and modules."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.common.autograd import vmapped
from fastseq.ops.common.dtypes import dtype_names

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_pair(hx) -> None:
    """RuntimeError unless ``hx`` holds two states, h and c."""
    if len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, h_0 and c_0, got {len(hx)}")


def as_lengths(lengths) -> Tensor:
    """Lengths (B,) as a tensor. Lists, tuples and arrays become CPU tensors, independent of torch's default device."""
    return lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")


def readable(t: Tensor) -> bool:
    """True if the values of ``t`` can be checked without synchronisation: on the CPU, neither traced nor under vmap."""
    return type(t) is Tensor and t.device.type == "cpu" and not (torch.compiler.is_compiling() or vmapped())


def check_lengths(lengths: Tensor, steps: int, batch: int, device: torch.device) -> Tensor:
    """Lengths as int64 (B,) on ``device``. Checked if they lie on the CPU; clamped to 0..T elsewhere and in a trace."""
    lengths = as_lengths(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.size(0) != batch:
        raise ValueError(
            f"lengths must have shape ({batch},), one per sequence of the batch, got {tuple(lengths.shape)}"
        )
    if not readable(lengths):
        return lengths.to(device, torch.int64).clamp(0, steps)
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(
            f"lengths must lie in 0..{steps} (the number of time steps), got {int(lengths.min())}..{int(lengths.max())}"
        )
    return lengths.to(device, torch.int64)


def native_objection(op: str, call, cuda_dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The checks of ``unsupported`` that all native backends share: library, device, dtype.

    call: a record with ``device``, ``device_index`` and ``dtype``. cuda_dtypes: the dtypes of the CUDA kernels.
    """
    if not _native.available():
        return f"{op}: the native backend is missing: {_native.why_not()}"
    missing = _native.why_not_cuda(call.device_index) if call.device == "cuda" else ""
    if missing:
        return f"{op}: the native backend has no CUDA kernels here: {missing}"
    if call.device not in ("cpu", "cuda"):
        return f"{op}: the native backend runs on CPU and CUDA (got {call.device}); use backend='torch' or 'reference'."
    dtypes, place = (cuda_dtypes, " on CUDA") if call.device == "cuda" else (CPU_DTYPES, "")
    if call.dtype not in dtypes:
        ways = "use backend='torch' or 'reference'."
        return f"{op}: the native backend computes in {dtype_names(dtypes)}{place} (got {call.dtype}); {ways}"
    return None
