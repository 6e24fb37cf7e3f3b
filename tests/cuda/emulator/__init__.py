"""The CUDA operators on a device made of CPU fibers: built from csrc/cuda by the C++ compiler, without CUDA.

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

__all__ = ["as_native", "compiler", "device", "load", "run_program", "sanitized", "schedule"]


@functools.cache
def load():
    """Compile what changed since the last time, load the library -> ``torch.ops.fastseq_sim``."""
    path = str(library())
    torch.ops.load_library(path)
    load.handle = ctypes.CDLL(path)
    return torch.ops.fastseq_sim


@contextlib.contextmanager
def schedule(seed: int | None) -> Iterator[None]:
    """Run threads in random order by this seed, some held back; None: in their own order."""
    load()
    load.handle.fastseq_host_schedule(int(seed is not None), ctypes.c_uint64(seed or 0))
    try:
        yield
    finally:
        load.handle.fastseq_host_schedule(0, ctypes.c_uint64(0))


@contextlib.contextmanager
def device(multiprocessors: int = 132, capability: int = 90, shared_memory: int = 227 << 10) -> Iterator[None]:
    """Make the host-side device smaller or older than the H100 that it is by default. shared_memory: bytes a block."""
    load()
    load.handle.fastseq_host_device(multiprocessors, capability, ctypes.c_size_t(shared_memory))
    try:
        yield
    finally:
        load.handle.fastseq_host_device(132, 90, ctypes.c_size_t(227 << 10))


@contextlib.contextmanager
def as_native() -> Iterator[None]:
    """``backend="native"`` runs the CUDA operators on CPU tensors, through all of the Python that CUDA tensors take."""
    from fastseq import _native
    from fastseq.ops.common.triton import runtime

    no_triton = None if runtime.interpreting() else "the host-side device runs no Triton kernels; use backend='native'."
    patches = [
        (torch.cuda, "current_device", lambda: 0),
        (runtime, "_unfit", lambda index: no_triton),
        (_native, "operators", load()),
        (_native, "why_not_cuda", lambda index=None: ""),
        (_native, "device_of", lambda t: "cuda"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
