"""The compiled operators: loaded once, when fastseq is imported; a failure is kept and told when it matters."""

import functools
import importlib

import torch  # the library needs torch's own libraries in the process

BUILD_HINT = (
    "To build it, install g++ and run: FASTSEQ_NATIVE=1 pip install --no-build-isolation --force-reinstall --no-deps ."
)

operators = torch.ops.fastseq  # what the native backend calls

_module = None
_error: ImportError | OSError | None = None


def load() -> None:
    """Import ``fastseq._C``, which registers ``torch.ops.fastseq.*``. Keeps the exception where that fails."""
    global _module, _error
    if _module is not None:
        return
    try:
        _module = importlib.import_module("fastseq._C")
        _error = None
    except (ImportError, OSError) as error:
        _error = error


def available() -> bool:
    """Whether ``torch.ops.fastseq.*`` can be called."""
    return _module is not None


def device_of(t: torch.Tensor) -> str:
    """The device whose kernels serve ``t``: its type. The host-side device of the tests replaces this function."""
    return t.device.type


def why_not() -> str:
    """Why the library is missing and how to build it, as sentences; empty where it is loaded."""
    if available():
        return ""
    if _missing():
        return f"the compiled library fastseq._C is not part of this installation. {BUILD_HINT}"
    return f"the compiled library fastseq._C failed to load ({_error}). {BUILD_HINT}"


def why_not_cuda(index: int | None = None) -> str:
    """Why no compiled CUDA kernel can run and what to do, as sentences; empty where they can, or there is no GPU.

    index: which of several GPUs; None is the current one.
    """
    if not available():
        return why_not()
    if not _module.cuda_architectures:
        return "the compiled library was built without nvcc. To build them, install the CUDA toolkit and fastseq again."
    return _why_not_gpu(index) if torch.cuda.is_available() else ""


def _why_not_gpu(index: int | None) -> str:
    return _why_not_gpu_number(torch.cuda.current_device() if index is None else index)


# TorchDynamo asks, too, and calls it instead of tracing it: as torch.compiler.assume_constant_result does, which would
# import all of TorchDynamo with fastseq.
_why_not_gpu._dynamo_marked_constant = True


@functools.cache
def _why_not_gpu_number(index: int) -> str:
    with torch.cuda.device(index):
        problem = _module.cuda_problem()
    if not problem:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    architectures = ", ".join(_module.cuda_architectures.split())
    return (
        f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor}) cannot run the compiled ones, which "
        f"are for {architectures} ({problem}). They need capability 8.0 and a driver "
        "as new as the CUDA toolkit that built them; use backend='torch'."
    )


def build_info() -> dict[str, str | tuple[str, ...]]:
    """How the library was built and what it uses here; empty where it is missing.

    compiler, flags, torch (the version built against), cpu (the instruction set in use on this machine),
    cuda_architectures (those that CUDA kernels were compiled for).
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


def empty_cache() -> int:
    """Give the memory that finished calls left for later ones back to the system.

    The compiled CPU kernels keep up to 1 GiB of unused buffers, since fresh pages cost more than a short call computes.

    Returns:
        How many bytes that were; 0 where the library is missing.
    """
    return operators.cpu_empty_cache() if available() else 0


def _missing() -> bool:
    return isinstance(_error, ModuleNotFoundError) and _error.name == "fastseq._C"


load()
