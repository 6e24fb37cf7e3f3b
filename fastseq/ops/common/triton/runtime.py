"""Shared by the Triton backends: refusals, chip, precision. Does not import triton."""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes; Triton recompiles a kernel for a pointer with less alignment


class Chip(NamedTuple):
    """The properties of a GPU that kernel configurations depend on."""

    name: str  # "sm_90", "gfx942"
    shared_memory: int  # bytes per program

    @property
    def is_nvidia(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def lanes(self) -> int:
        """Threads per warp."""
        return 32 if self.is_nvidia else 64


# Largest shared memory of one block. NVIDIA: CUDA programming guide, "technical specifications per compute
# capability"; AMD: the 64 KiB of LDS of a compute unit.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 163 * 1024),
        Chip("sm_86", 99 * 1024),
        Chip("sm_89", 99 * 1024),
        Chip("sm_90", 227 * 1024),
        Chip("sm_100", 227 * 1024),
        Chip("sm_120", 99 * 1024),
        Chip("gfx90a", 64 * 1024),
        Chip("gfx942", 64 * 1024),
    )
}
OLDEST = (8, 0)  # oldest compute capability that Triton supports

_compile_only: Chip | None = None


def interpreting() -> bool:
    """True if Triton kernels run in its CPU interpreter. Triton reads the variable when it defines a kernel."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def compile_only(chip: Chip) -> Iterator[None]:
    """Let the launchers treat CPU tensors as tensors on ``chip``. compile.py prevents the launches."""
    global _compile_only
    previous, _compile_only = _compile_only, chip
    try:
        yield
    finally:
        _compile_only = previous


def why_not(op: str, call) -> str | None:
    """Return the refusal of the call, a sentence with the way out, or None."""
    if call.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"{op}: the triton backend computes in {names} (got {call.dtype}); use backend='reference'."
    if call.device != "cuda" and not (call.device == "cpu" and (interpreting() or _compile_only)):
        return (
            f"{op}: the triton backend runs on CUDA and ROCm tensors (got {call.device}); use backend='auto', or set "
            "TRITON_INTERPRET=1 before Python starts to run it on the CPU, slowly."
        )
    if call.compiling:
        return (
            f"{op}: the triton backend is not registered with torch.compile and torch.export; "
            "use backend='auto' there, or call it outside the compiled region."
        )
    if not _installed():
        return f"{op}: triton is not installed; pip install triton (CUDA builds of torch bring it), or backend='auto'."
    if call.device != "cuda":
        return None
    if not _can_launch():
        return (
            f"{op}: triton compiles a small C module before its first launch; that needs gcc or clang, and Python.h of "
            "python3-dev, which are missing; use backend='auto'."
        )
    unfit = _unfit(torch.cuda.current_device() if call.device_index is None else call.device_index)
    return unfit and f"{op}: {unfit}"


def chip_of(t: Tensor) -> Chip:
    """Return the chip of a tensor. For a CPU tensor: the chip of compile_only(), else sm_90."""
    if not t.is_cuda:
        return _compile_only or CHIPS["sm_90"]
    return _chip(t.get_device())


def dot_precision(dtype: torch.dtype, chip: Chip) -> str:
    """Return ``input_precision`` of tl.dot. float32 follows torch.backends.cuda.matmul.fp32_precision.

    tf32x3 gives float32 accuracy on NVIDIA tensor cores. AMD matrix cores multiply float32 directly.
    """
    if dtype != torch.float32 or not chip.is_nvidia:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def ready(t: Tensor | None) -> Tensor | None:
    """Make a tensor contiguous and 16-byte aligned, so that one compilation serves every call."""
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _can_launch() -> bool:
    """True if a C compiler and Python.h exist, from which Triton builds its launchers (triton/runtime/build.py)."""
    import sysconfig  # here, to keep import of fastseq fast

    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) and headers.exists()


@functools.cache
def _unfit(index: int) -> str | None:
    name, alternative = torch.cuda.get_device_name(index), "use backend='torch' or 'reference'."
    if torch.version.hip:
        chip = _chip(index).name
        if chip.startswith("gfx9"):
            return None
        return f"the triton backend needs a CDNA GPU (gfx90a, gfx942), {name} is {chip}; {alternative}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return None
    oldest, actual = (".".join(map(str, c)) for c in (OLDEST, capability))
    return f"the triton backend needs compute capability {oldest} or newer, {name} has {actual}; {alternative}"


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Chip(properties.gcnArchName.split(":")[0], properties.shared_memory_per_block)
    return Chip(f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin)
