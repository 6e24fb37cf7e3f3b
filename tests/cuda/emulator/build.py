"""Compile csrc/cuda for the host-side device: one library for Python, and programs under sanitizers.

Objects lie in build/emulator/<kind>, named by a hash of flags, torch version, source and included files. An edit
recompiles only the sources that include the edited file.
"""

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cuda_build import files_of
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build/emulator"
INCLUDES = (ROOT / "csrc", HERE)
KERNELS = sorted((ROOT / "csrc/cuda").glob("**/*.cu"))
OPERATORS = sorted((ROOT / "csrc/cuda").glob("**/*.cpp"))
FLAGS = [
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-psabi"),
    *("-DFASTSEQ_HOST_DEVICE", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


def compiler() -> str | None:
    """Return the command of the C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def library() -> Path:
    """Build the shared library of the operators ``torch.ops.fastseq_sim``."""
    sources = [*KERNELS, *OPERATORS, HERE / "library.cpp"]
    return link("sim", objects("sim", [*FLAGS, "-O1"], sources), shared=True)


def link(name: str, parts: list[Path], flags: list[str] = (), shared: bool = False) -> Path:
    """Link objects into build/emulator/<name>-<hash> unless it exists."""
    digest = hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()[:16]
    out = FOLDER / f"{name}-{digest}{'.so' if shared else ''}"
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"] if shared else []
    with locked(out.name):
        if not out.exists():
            run([*(["-shared"] if shared else []), *flags, *parts, *libraries], out)
    return out


def objects(kind: str, flags: list[str], sources: list[Path]) -> list[Path]:
    """Compile each source to an object in build/emulator/<kind>."""
    common = hashlib.sha256(" ".join([compiler(), torch.__version__, *flags]).encode())

    def compiled(source: Path) -> Path:
        key = common.copy()
        for path in sorted(files_of(source, INCLUDES)):
            key.update(path.read_bytes())
        stem = "-".join(source.relative_to(ROOT).with_suffix("").parts[2:])
        out = FOLDER / kind / f"{stem}-{key.hexdigest()[:16]}.o"
        with locked(f"{kind}-{stem}"):
            if not out.exists():
                folders = (*INCLUDES, *include_paths())
                run([*flags, *(f"-I{folder}" for folder in folders), "-x", "c++", "-c", source], out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a file lock: one of several test processes builds ``name``, the others wait."""
    folder = FOLDER / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(arguments: list, out: Path) -> None:
    """Compile into a temporary file and rename it, so that an interrupted compiler leaves no partial object."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(f".{os.getpid()}{out.suffix}")
    command = [*shlex.split(compiler()), *map(str, arguments), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[:4000]}")
    partial.rename(out)
