"""Loads the compiled library fastseq._C once, at import; keeps the error for the messages that need it."""

import functools
import importlib
import json
import os
from pathlib import Path

import torch  # fastseq._C links to torch's libraries: they must be loaded before it

BUILD_HINT = (
    "To build it, install g++ and run: FASTSEQ_NATIVE=1 pip install --no-build-isolation --force-reinstall --no-deps ."
)
CUDA_BUILD_HINT = (
    "To build them, install the CUDA toolkit and run: "
    "FASTSEQ_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
)

operators = torch.ops.fastseq  # called by the native backend

_module = None
_error: ImportError | OSError | None = None


def load() -> None:
    """Import ``fastseq._C``, which registers ``torch.ops.fastseq.*``; keep the exception if that fails."""
    global _module, _error
    if _module is not None:
        return
    try:
        _module = importlib.import_module("fastseq._C")
        _error = None
    except (ImportError, OSError) as error:
        _error = error


def available() -> bool:
    """True if ``torch.ops.fastseq.*`` can be called."""
    return _module is not None


def device_of(t: torch.Tensor) -> str:
    """``t.device.type``, which selects the kernels. The tests' host-side device replaces this function."""
    return t.device.type


def on_cpu(t: torch.Tensor) -> bool:
    """``device_of(t) == "cpu"`` in a tenth of the time. The tests' host-side device replaces this function, too."""
    return t.is_cpu


def why_not() -> str:
    """Sentences: why the library is missing and how to build it; "" if it is loaded."""
    if available():
        return ""
    if _missing():
        reason = left_out().get("compiled operators")
        because = f" ({reason})" if reason else ""
        return f"the compiled library fastseq._C is not part of this installation{because}. {BUILD_HINT}"
    return f"the compiled library fastseq._C failed to load ({_error}). {BUILD_HINT}"


def why_not_cuda(index: int | None = None) -> str:
    """Sentences: why the compiled CUDA kernels cannot run and what to do; "" if they can, or if there is no GPU.

    index: of the GPU; None is the current one.
    """
    if not available():
        return why_not()
    if not _module.cuda_architectures:
        reason = left_out().get("CUDA kernels", "no nvcc was found")
        return f"the compiled library was built without CUDA kernels: {reason}. {CUDA_BUILD_HINT}"
    return _why_not_gpu(index) if torch.cuda.is_available() else ""


def _why_not_gpu(index: int | None) -> str:
    return _why_not_gpu_number(torch.cuda.current_device() if index is None else index)


# TorchDynamo calls this function instead of tracing it. The attribute is the one that
# torch.compiler.assume_constant_result sets; calling that would import all of TorchDynamo with fastseq.
_why_not_gpu._dynamo_marked_constant = True


@functools.cache
def _why_not_gpu_number(index: int) -> str:
    with torch.cuda.device(index):
        problem = _module.cuda_problem()
    if not problem:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    architectures = ", ".join(_module.cuda_architectures.split())
    driver = build_record().get("driver")
    driver = f"driver {driver} or later" if driver else "a driver as new as the CUDA toolkit that built them"
    return (
        f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor}) cannot run the compiled ones, which "
        f"are for {architectures} ({problem}). They need capability 8.0 and {driver}; use backend='torch'."
    )


def build_info() -> dict[str, str | tuple[str, ...]]:
    """Facts about the loaded library; empty if it is missing.

    compiler, flags, torch (the version built against), cpu (the instruction set in use on this machine),
    cuda_architectures (compiled CUDA kernels: their targets).
    """
    if _module is None:
        return {}
    return {
        "compiler": _module.compiler,
        "flags": _module.flags,
        "torch": _module.torch,
        "cpu": _module.cpu,
        "cuda_architectures": tuple(_module.cuda_architectures.split()),
    }


@functools.cache
def matrix_unit() -> bool:
    """True if the processor has AMX and ``ONEDNN_MAX_CPU_ISA`` does not hide it from oneDNN."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return torch.cpu._is_amx_tile_supported() and (limit == "DEFAULT" or "AMX" in limit)


@functools.cache
def instruction_set() -> str:
    """The instruction set of the CPU kernels, such as "avx2"; "" without them."""
    return build_info().get("cpu", "")


def left_out() -> dict[str, str]:
    """Parts that the build left out, with the reasons: {"CUDA kernels": "FASTSEQ_CUDA=0"}."""
    return build_record().get("left_out", {})


@functools.cache
def build_record() -> dict:
    """The contents of fastseq/_build.json, which setup.py writes: left_out, and nvcc and driver where CUDA kernels were
    compiled. Empty in a source tree that was never built.
    """
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def empty_cache() -> int:
    """Return the CPU kernels' unused buffers to the system.

    The compiled CPU kernels keep up to 1 GiB of unused buffers, since fresh pages cost more than a short call computes.

    Returns:
        The number of bytes released; 0 if the library is missing.
    """
    return operators.cpu_empty_cache() if available() else 0


def _missing() -> bool:
    return isinstance(_error, ModuleNotFoundError) and _error.name == "fastseq._C"


load()
