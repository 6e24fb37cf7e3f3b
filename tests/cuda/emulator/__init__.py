"""The host-side device: the CUDA operators of csrc/cuda, compiled by the C++ compiler, run by fibers on the CPU.

operators = emulator.load()       # torch.ops.fastseq_sim, on CPU tensors
with emulator.device(...):        # a smaller or older device
with emulator.schedule(seed):     # threads in random order
with emulator.as_native(): ...    # backend="native" runs them
emulator.run_program("race_lstm_step", sanitizers="thread")    # a program of this folder, alone
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from .build import compiler, library
from .programs import run_program, sanitized
from .streams import shuffled

__all__ = ["as_native", "compiler", "device", "load", "run_program", "sanitized", "schedule", "shuffled"]


@functools.cache
def load():
    """Compile changed sources, load the library and return ``torch.ops.fastseq_sim``."""
    path = str(library())
    torch.ops.load_library(path)
    load.handle = ctypes.CDLL(path)
    return torch.ops.fastseq_sim


@contextlib.contextmanager
def schedule(seed: int | None) -> Iterator[None]:
    """Run threads in the random order of ``seed``, some held back; None: in the order of their indices."""
    load()
    load.handle.fastseq_host_schedule(int(seed is not None), ctypes.c_uint64(seed or 0))
    try:
        yield
    finally:
        load.handle.fastseq_host_schedule(0, ctypes.c_uint64(0))


@contextlib.contextmanager
def device(
    multiprocessors: int = 132,
    capability: int = 90,
    shared_memory: int = 227 << 10,
    resident: int | None = None,
    placed: int = 0,
) -> Iterator[None]:
    """Change the limits of the host-side device (default: an H100).

    shared_memory: bytes per block. resident: blocks of a cooperative launch or a cluster that find room, by default one
    a multiprocessor; fewer where other work holds a part of the device. placed: blocks of a cooperative launch that run
    before the others begin, as if the driver placed a grid in pieces; 0: all run together.
    """
    load()

    def limit(multiprocessors: int, capability: int, shared_memory: int, *blocks: int) -> None:
        load.handle.fastseq_host_device(multiprocessors, capability, ctypes.c_size_t(shared_memory), *blocks)

    limit(multiprocessors, capability, shared_memory, multiprocessors if resident is None else resident, placed)
    try:
        yield
    finally:
        limit(132, 90, 227 << 10, 132, 0)


@contextlib.contextmanager
def as_native() -> Iterator[None]:
    """Let ``backend="native"`` run the CUDA operators on CPU tensors, along the Python path of CUDA tensors."""
    from fastseq import _native
    from fastseq.ops.common import streams
    from fastseq.ops.common.triton import runtime

    no_triton = (
        None if runtime.interpreting() else "the host-side device cannot run Triton kernels; use backend='native'."
    )
    patches = [
        (torch.cuda, "current_device", lambda: 0),
        (runtime, "_unfit", lambda index: no_triton),
        (_native, "operators", load()),
        (_native, "why_not_cuda", lambda index=None: ""),
        (_native, "device_of", lambda t: "cuda"),
        (_native, "on_cpu", lambda t: False),
        (streams, "run", shuffled(0)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
