"""Compile Triton kernels for a chip that need not be there: the launchers run as ever, with CPU tensors, and launch
nothing. What is compiled is what a call on that chip would compile, and lies in Triton's cache for it."""

import contextlib
import importlib
from collections.abc import Iterator

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastseq.ops.common.triton.runtime import Chip, compile_only

KERNELS = tuple(f"fastseq.ops.{op}.triton_kernels" for op in ("lstm_cell", "lstm", "attention"))


class _NoDevice(DriverBase):
    """Triton's view of a chip that only compiles."""

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
        return self.chip.name  # any key will do: kernels are kept per device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": self.chip.shared_memory}

    def load_binary(self, name, binary, shared, device):
        return None, None, 0, 0, 1024  # module, function, registers, spills (not known here), most threads

    def launcher_cls(self, src, metadata):
        return lambda *args: self.launches.append(metadata.hash)


@contextlib.contextmanager
def compiling_for(chip: Chip) -> Iterator[list[str]]:
    """Within this block triton backends take CPU tensors, compile for ``chip``, and leave results as they are.

    Process-wide, like Triton's own driver. A kernel that needs more shared memory than the chip has raises Triton's
    OutOfResources, as it would there. Yields the list of launches, a kernel's hash each.
    """
    active = driver._active
    stub = _NoDevice(chip)
    driver.set_active(stub)
    try:
        with compile_only(chip):
            yield stub.launches
    finally:
        driver.set_active(active)


def compiled(chip: Chip) -> list:
    """All kernels compiled for ``chip`` in this process, as Triton's CompiledKernel."""
    found = []
    for name in KERNELS:
        functions = [f for f in vars(importlib.import_module(name)).values() if isinstance(f, JITFunction)]
        found += [k for f in functions if chip.name in f.device_caches for k in f.device_caches[chip.name][0].values()]
    return found
