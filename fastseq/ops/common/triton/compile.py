"""Compile Triton kernels for a chip without having it: the launchers run on CPU tensors and launch nothing.

The binaries in Triton's cache are those that a call on that chip would compile."""

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastseq.ops.common.triton.runtime import Chip, compile_only

OPS = ("lstm_cell", "lstm", "lstm_variant", "attention", "linear_cross_entropy")
KERNELS = tuple(f"fastseq.ops.{op}.triton_kernels" for op in OPS)


class _NoDevice(DriverBase):
    """Triton driver of a chip for which kernels are compiled and not run."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.utils = self
        self.launches: list[str] = []  # hashes

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("nothing is launched")

    def get_current_target(self):
        if self.chip.is_nvidia:
            return GPUTarget("cuda", int(self.chip.name.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.chip.name, 64)

    def get_active_torch_device(self):
        raise NotImplementedError("tensors stay on the CPU")

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs")

    def get_current_device(self):
        return self.chip.name  # key of Triton's per-device cache of kernels

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": self.chip.shared_memory}

    def load_binary(self, name, binary, shared, device):
        return None, None, 0, 0, 1024  # module, function, registers, spills (unknown), maximum threads

    def launcher_cls(self, src, metadata):
        return lambda *args: self.launches.append(metadata.hash)


@contextlib.contextmanager
def compiling_for(chip: Chip) -> Iterator[list[str]]:
    """Let triton backends take CPU tensors and compile for ``chip``; results stay uninitialised.

    Process-wide, because Triton's driver is. A kernel that exceeds the chip's shared memory raises Triton's
    OutOfResources, as on the chip. Yields the list of launches: the hash of each kernel.
    """
    active = driver._active
    stub = _NoDevice(chip)
    driver.set_active(stub)
    try:
        with compile_only(chip):
            yield stub.launches
    finally:
        driver.set_active(active)


@contextlib.contextmanager
def counting() -> Iterator[Counter[bool]]:
    """Yield the numbers of kernels that Triton compiles (key False) and reads from its cache on disk (True)."""
    count: Counter[bool] = Counter()
    before = knobs.compilation.listener

    def listener(*, cache_hit: bool, **others) -> None:
        count[cache_hit] += 1
        if before is not None:
            before(cache_hit=cache_hit, **others)

    knobs.compilation.listener = listener
    try:
        yield count
    finally:
        knobs.compilation.listener = before


def compiled(chip: Chip) -> list:
    """Return all kernels that this process compiled for ``chip``, as Triton's CompiledKernel."""
    kernels = []
    for name in KERNELS:
        functions = [f for f in vars(importlib.import_module(name)).values() if isinstance(f, JITFunction)]
        kernels += [
            k for f in functions if chip.name in f.device_caches for k in f.device_caches[chip.name][0].values()
        ]
    return kernels
