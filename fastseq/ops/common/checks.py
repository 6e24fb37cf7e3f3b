"""Checks that several ops and modules share."""

import torch

from fastseq import _native
from fastseq.ops.common.dtypes import dtype_names

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_pair(hx) -> None:
    """RuntimeError unless ``hx`` holds two states, h and c."""
    if len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, h_0 and c_0, got {len(hx)}")


def native_objection(op: str, call, cuda_dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The part of ``unsupported`` that all native backends share: library, device, dtype.

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
