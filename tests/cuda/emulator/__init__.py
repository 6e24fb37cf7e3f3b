"""The CUDA operators on a device made of CPU fibers: built from csrc/cuda by the C++ compiler, without CUDA.

operators = emulator.load()       # torch.ops.fastseq_sim, on CPU tensors
with emulator.as_native(): ...    # backend="native" runs them
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = [
    *sorted((ROOT / "csrc/cuda").glob("*.cu")),
    *sorted((ROOT / "csrc/cuda").glob("*_ops.cpp")),
    HERE / "library.cpp",
]
FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-psabi"),
    *("-DFASTSEQ_HOST_DEVICE", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


def compiler() -> str | None:
    """The C++ compiler's command, or None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@functools.cache
def load():
    """Compile what changed since the last time, load the library -> ``torch.ops.fastseq_sim``."""
    library = build("sim", FLAGS)
    torch.ops.load_library(str(library))
    load.handle = ctypes.CDLL(str(library))
    return torch.ops.fastseq_sim


def build(name: str, flags: list[str], sources: list[Path] = SOURCES, program: bool = False) -> Path:
    """Objects by the hash of all they are made of, in build/emulator -> the library, or the program, of them."""
    folder = ROOT / "build/emulator" / name
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("csrc/**/*.[hi]*"), *ROOT.glob("csrc/**/*.cu*"), *HERE.glob("*.h")]
    common = hashlib.sha256(" ".join(flags).encode() + torch.__version__.encode())
    for header in sorted(headers):
        common.update(header.read_bytes())

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        out = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not out.exists():
            run([*flags, *(f"-I{path}" for path in (HERE, *include_paths())), "-x", "c++", "-c", source], out)
        return out

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test processes, one builds and the other waits
        objects = sorted(pool.map(compiled, sources))
        digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
        out = folder / f"{name}-{digest}{'' if program else '.so'}"
        if not out.exists():
            kind = [] if program else ["-shared"]
            libraries = [] if program else [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
            run([*kind, *[f for f in flags if f.startswith("-fsanitize")], *objects, *libraries], out)
    return out


def run(arguments: list, out: Path) -> None:
    """The compiler into a file of its own, which then takes its place: an interrupted one leaves nothing half done."""
    partial = out.with_suffix(f".{os.getpid()}{out.suffix}")
    command = [*shlex.split(compiler()), *map(str, arguments), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[:4000]}")
    partial.rename(out)


@contextlib.contextmanager
def schedule(seed: int | None) -> Iterator[None]:
    """Threads in random order, by this seed, some held back; None: in their own order."""
    load()
    load.handle.fastseq_host_schedule(int(seed is not None), ctypes.c_uint64(seed or 0))
    try:
        yield
    finally:
        load.handle.fastseq_host_schedule(0, ctypes.c_uint64(0))


@contextlib.contextmanager
def device(multiprocessors: int = 132, capability: int = 90, shared_memory: int = 227 << 10) -> Iterator[None]:
    """A smaller or older device than the H100 that the host-side device is by default."""
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

    patches = [
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
