"""Compile csrc/cuda with nvcc, without GPU and driver: one object per source; read PTX and kernel names from it.

Objects lie in build/cuda_build, named by a hash of flags, compiler and sources. Triton brings the tools that read them.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from includes import files_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/cuda_build"
SOURCES = sorted((ROOT / "csrc/cuda").glob("**/*.cu"))
INCLUDES = (ROOT / "csrc",)
ARCHITECTURES = (80, 90, 100)  # machine code
PTX_ARCHITECTURES = (80, 90)  # PTX
FLAGS = [f"-I{ROOT / 'csrc'}", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]


find_cuda = runpy.run_path(str(ROOT / "setup.py"))["find_cuda"]


def require() -> None:
    """Skip the tests of a file if nvcc or cuobjdump is missing."""
    pytest.importorskip("triton", reason="needs the cuobjdump that comes with Triton: pip install triton")
    if find_cuda() is None:
        pytest.skip("nvcc not found: install the CUDA toolkit, or set CUDA_HOME", allow_module_level=True)


def generate_code() -> list[str]:
    """Flags that compile machine code from the nearest PTX, as the driver does with the shipped PTX."""
    flags = []
    for ptx in PTX_ARCHITECTURES:
        codes = [f"sm_{a}" for a in ARCHITECTURES if nearest_ptx(a) == ptx]
        flags.append(f"-gencode=arch=compute_{ptx},code=[{','.join(codes)},compute_{ptx}]")
    return flags


def nearest_ptx(architecture: int) -> int:
    return max(ptx for ptx in PTX_ARCHITECTURES if ptx <= architecture)


@functools.cache
def objects() -> tuple[Path, ...]:
    """Compile each csrc/cuda/**/*.cu to an object; the output of ptxas is beside it, as .log."""
    nvcc, jobs = find_cuda() / "bin/nvcc", int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    common = hashlib.sha256(" ".join(FLAGS[1:] + generate_code()).encode() + run(nvcc, "--version").stdout.encode())

    def compiled(source: Path) -> Path:
        key = common.copy()
        for path in sorted(files_of(source, INCLUDES)):
            key.update(path.read_bytes())
        stem = "-".join(source.relative_to(ROOT / "csrc/cuda").with_suffix("").parts)
        out = FOLDER / f"{stem}-{key.hexdigest()[:16]}.o"
        if not out.exists():
            partial = out.with_suffix(".partial.o")
            done = run(nvcc, *FLAGS, *generate_code(), "--threads", jobs, "-c", source, "-o", partial)
            out.with_suffix(".log").write_text(done.stderr)
            partial.rename(out)
        return out

    with building(), ThreadPoolExecutor(jobs) as pool:
        return tuple(pool.map(compiled, SOURCES))


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Hold a file lock: one process builds, the others wait and use its objects."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def ptx(architecture: int) -> tuple[str, ...]:
    """Return the PTX of every object for ``architecture``."""
    from nvidia_binaries import tool

    texts = []
    for path in objects():
        for section in tool("cuobjdump", "-ptx", path).split("\nFatbin "):
            head, version, text = section.partition("\n.version")
            if version and f"arch = sm_{architecture}\n" in head:
                texts.append(version + text)
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
