"""Read the objects that nvcc makes of csrc/cuda, without GPU and driver: machine code, PTX and kernel names.

build_support.cuda compiles and keeps them, for setup.py and for the tests. As a program, this file compiles them ahead
of the tests. Triton brings the tools that read objects.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/cuda"
INCLUDES = (ROOT / "csrc",)
ARCHITECTURES = (80, 90, 100, 120)  # machine code
PTX_ARCHITECTURES = (80, 90)  # PTX
REQUESTED = ["8.0+PTX", "9.0+PTX"]  # equals TORCH_CUDA_ARCH_LIST in the Makefile

sys.path.append(str(ROOT))
cuda = importlib.import_module("build_support.cuda")
files_of = importlib.import_module("build_support.compile").files_of


def require() -> None:
    """Skip the tests of a file if nvcc or cuobjdump is missing."""
    pytest.importorskip("triton", reason="needs the cuobjdump that comes with Triton: pip install triton")
    try:
        cuda.find_toolkit()
    except cuda.Unusable as reason:
        pytest.skip(str(reason), allow_module_level=True)


def nearest_ptx(architecture: int) -> int:
    return max(ptx for ptx in PTX_ARCHITECTURES if ptx <= architecture)


@functools.cache
def objects() -> tuple[Path, ...]:
    """Return one object per csrc/cuda/**/*.cu: with machine code and PTX of PTX_ARCHITECTURES."""
    with building():
        return tuple(cuda.compile_kernels(ROOT, REQUESTED, print))


@functools.cache
def binaries(architecture: int) -> tuple[Path, ...]:
    """Return files with machine code for ``architecture``.

    Without any in the objects, ptxas assembles the nearest PTX, as the driver does with the shipped PTX.
    """
    if architecture in PTX_ARCHITECTURES:
        return objects()

    def assemble(number: int, text: str) -> Path:
        source = FOLDER / f"{number}-{hashlib.sha256((version + text).encode()).hexdigest()[:16]}.ptx"
        cubin = source.with_suffix(f".sm_{architecture}.cubin")
        if not cubin.exists():
            source.write_text(text)
            run(ptxas, "-O3", f"-arch=sm_{architecture}", source, "-o", source.with_suffix(".partial"))
            source.with_suffix(".partial").rename(cubin)
        return cubin

    texts, ptxas = ptx(nearest_ptx(architecture)), cuda.find_toolkit().programs / "ptxas"
    version = run(ptxas, "--version").stdout
    with building(), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return tuple(pool.map(assemble, range(len(texts)), texts))


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Hold a file lock: one process builds, the others wait and use its objects."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def ptx(architecture: int) -> tuple[str, ...]:
    """Return the PTX of every object for ``architecture``, without the lines of -lineinfo."""
    from nvidia_binaries import tool

    texts = []
    for path in objects():
        for section in tool("cuobjdump", "-ptx", path).split("\nFatbin "):
            head, version, text = section.partition("\n.version")
            if version and f"arch = sm_{architecture}\n" in head:
                code, *_ = (version + text).split("\n.section")  # .debug_str and the like stand at the end
                texts.append(re.sub(r"^\s*\.(loc|file)\b.*$", "", code, flags=re.MULTILINE))
    return tuple(texts)


def kernels(architecture: int) -> list[str]:
    """Return the mangled names of all kernels."""
    return [name for text in ptx(architecture) for name in re.findall(r"\.entry (\w+)\(", text)]


@functools.cache
def readable(name: str) -> str:
    """Demangle a name and drop namespaces and parameters: lstm_cell_forward_kernel<float, 4>."""
    full = run("c++filt", name).stdout.strip()
    full = full.replace("(anonymous namespace)::", "").replace("fastseq::cuda::", "")
    depth = 0
    for at, character in enumerate(full):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            full = full[:at]
            break
    return full.removeprefix("void ")


def run(*command) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[:4000]}")
    return done


if __name__ == "__main__":
    sys.path.append(str(ROOT / "tests/triton"))  # nvidia_binaries; pytest has it from pyproject.toml
    try:
        for architecture in ARCHITECTURES if importlib.util.find_spec("triton") else ():
            binaries(architecture)
    except cuda.Unusable as reason:
        print(f"The CUDA kernels are not compiled: {reason}.")
