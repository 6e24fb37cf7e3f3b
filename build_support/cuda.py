"""Finds nvcc, its headers and its runtime in the layouts that toolkits have, and tries them on one small kernel."""

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from build_support.compile import Job, compile_all, files_of

ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # Ampere, Hopper, Blackwell: where nvcc compiles for them
# The kernels use instructions of these two: nvcc's front end runs for them, and ptxas for each GPU, from the PTX of the
# newest that the GPU runs. Drivers of other GPUs compile PTX when the library is loaded: 9.0 serves 11.0 and later.
VIRTUAL_ARCHITECTURES = (8.0, 9.0)
SMALLEST_ARCHITECTURE = VIRTUAL_ARCHITECTURES[0]
SMALLEST_RELEASE = (12, 1)  # PTX ISA 8.1: st.async in csrc/cuda/common/cluster.cuh
DRIVERS = {12: "525.60.13", 13: "580.65.06"}  # by major release of nvcc: the oldest Linux driver that loads its code
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-warn-spills"]
COMPRESSION = ("--compress-mode=size",)  # of 12.8 and later, but drivers before CUDA 12.4 do not read it
OLD_COMPRESSION = ("-Xfatbin", "-compress-all")  # for toolkits whose code runs with older drivers
COMPRESSES_SINCE = (13, 0)
LINK_FLAGS = ["-lcudart_static", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]
USUAL_HOME = Path("/usr/local/cuda")
PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(float* x) { *x = __bfloat162float(__float2bfloat16(*x)); }
extern "C" int fastseq_probe(float* x) { probe<<<1, 1>>>(x); return cudaGetLastError(); }
"""


class Unusable(Exception):
    """The sentence that explains why the CUDA kernels cannot be built."""


class Toolkit(NamedTuple):
    nvcc: Path
    release: tuple[int, int]
    programs: Path  # contains ptxas
    include: Path  # contains cuda_runtime.h
    library: Path  # contains libcudart_static.a
    flags: tuple[str, ...]  # for nvcc: -I, if it does not find the headers by itself

    @property
    def version(self) -> str:
        return ".".join(map(str, self.release))

    @property
    def driver(self) -> str:
        """The oldest driver that loads the machine code; later majors than the listed ones need a newer driver."""
        return DRIVERS.get(self.release[0], f"of CUDA {self.release[0]}")


@functools.cache
def find_toolkit() -> Toolkit:
    """The first whole toolkit among the candidates; raises Unusable with the reason of the first incomplete one."""
    reasons = []
    for nvcc in candidates():
        try:
            return describe(nvcc)
        except Unusable as reason:
            reasons.append(reason)
    raise (
        reasons[0]
        if reasons
        else Unusable("no nvcc was found (install the CUDA toolkit, or set CUDA_HOME to its folder)")
    )


def candidates() -> Iterator[Path]:
    """Existing nvcc programs: of CUDA_HOME, PATH, /usr/local/cuda, and of pip's nvidia-cuda-nvcc wheels."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    paths = [home / "bin/nvcc" for home in homes] + ([Path(on_path)] if on_path else [])
    paths.append(USUAL_HOME / "bin/nvcc")
    for folder in filter(None, sys.path):
        paths += sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return (path for path in dict.fromkeys(paths) if os.access(path, os.X_OK))


def describe(nvcc: Path) -> Toolkit:
    """Release and folders of one nvcc: first the folders that --dryrun lists, then the known layouts."""
    version = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    if version is None:
        raise Unusable(f"{nvcc} --version names no release")
    release = (int(version[1]), int(version[2]))
    if release < SMALLEST_RELEASE:
        smallest = ".".join(map(str, SMALLEST_RELEASE))
        raise Unusable(f"{nvcc} is release {version[1]}.{version[2]}; the CUDA kernels need {smallest} or later")
    # An nvcc on PATH may be a script, and the HPC SDK's starts the one of ../../cuda: TOP is the toolkit in use.
    settings = run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)", settings, re.MULTILINE)
    tops = ([Path(top[1])] if top else []) + [
        nvcc.resolve().parents[1],
        nvcc.parents[1],
        nvcc.resolve().parents[2] / "cuda",
    ]
    machine = platform.machine()
    targets = [f"targets/{name}-linux" for name in ((machine,) if machine != "aarch64" else ("sbsa", "aarch64"))]

    listed = option(settings, "INCLUDES", "-I")
    places = [Path(top, name, "include") for top in tops for name in ("", *targets)]
    include = find("cuda_runtime.h", [*listed, *places])
    if include is None:
        raise Unusable(
            f"{nvcc} has no cuda_runtime.h beside it (packages: cuda-cudart-dev, conda's cuda-cudart-dev, pip's "
            "nvidia-cuda-runtime)"
        )
    names = ("lib64", "lib", *(f"{name}/lib" for name in targets), f"lib/{machine}-linux-gnu")
    places = [top / name for top in tops for name in names]
    library = find("libcudart_static.a", [*option(settings, "LIBRARIES", "-L"), *places])
    if library is None:
        raise Unusable(
            f"{nvcc} has no libcudart_static.a beside it (packages: cuda-cudart-dev, conda's cuda-cudart-static, pip's "
            "nvidia-cuda-runtime)"
        )
    known = {folder.resolve() for folder in listed} | {Path("/usr/include")}
    # CUDA 13 keeps nv/target, which cuda_fp16.h includes, in include/cccl.
    flags = () if include.resolve() in known else (f"-I{include}", "-isystem", f"{include / 'cccl'}")
    programs = find("ptxas", [top / "bin" for top in tops]) or nvcc.parent
    return Toolkit(nvcc, release, programs, include, library, flags)


def option(settings: str, variable: str, prefix: str) -> list[Path]:
    """The folders that ``nvcc --dryrun`` lists in a variable: '#$ INCLUDES="-I/usr/include"  ' -> [/usr/include]."""
    line = re.search(rf"^#\$ {variable}=(.*)", settings, re.MULTILINE)
    return [Path(word[len(prefix) :]) for word in shlex.split(line[1] if line else "") if word.startswith(prefix)]


def find(name: str, folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / name).exists()), None)


def run(*command) -> str:
    """Output of a command, stderr included; raises Unusable where it fails."""
    try:
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Unusable(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        raise Unusable(f"{command[0]} fails: {first_error(done.stdout)}")
    return done.stdout


def first_error(output: str) -> str:
    """The line to show of a failed compiler's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next((line for line in lines if re.search(r"error|fatal|unsupported", line, re.IGNORECASE)), None)
    return (line or " ".join(lines[-1:]) or "no output")[:300]


def architectures() -> tuple[list[str], list[str]]:
    """From TORCH_CUDA_ARCH_LIST, such as "7.5;8.0;9.0+PTX" -> (["8.0", "9.0+PTX"], ["7.5"]): to build, to leave out.

    Unset: default_architectures of the nvcc in use.
    """
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
    if not requested:
        return default_architectures(run(find_toolkit().nvcc, "--list-gpu-code")), []
    names = re.split(r"[;, ]+", requested)
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"fastseq: TORCH_CUDA_ARCH_LIST names {name!r}; expected versions such as 8.0;9.0+PTX.")
    old = [name for name in names if float(re.match(r"[\d.]+", name)[0]) < SMALLEST_ARCHITECTURE]
    if old == names:
        raise Unusable(f"they need compute capability 8.0 (TORCH_CUDA_ARCH_LIST has {' '.join(names)})")
    return [name for name in names if name not in old], old


def default_architectures(listed: str) -> list[str]:
    """The output of ``nvcc --list-gpu-code`` -> ARCHITECTURES as far as listed, with PTX of 9.0, or of the newest."""
    codes = set(listed.split())
    names = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in codes]
    if not names:
        raise Unusable(f"nvcc compiles for none of {', '.join(ARCHITECTURES)} (nvcc --list-gpu-code)")
    with_ptx = "9.0" if "9.0" in names else names[-1]
    return [f"{name}+PTX" if name == with_ptx else name for name in names]


def virtual_architecture(name: str) -> str:
    """The architecture whose PTX becomes code for ``name``: "8.6" -> "80", "12.0" -> "90"; "9.0a" -> "90a", its own."""
    if name[-1] in "af":
        return name.replace(".", "")
    return str(max(virtual for virtual in VIRTUAL_ARCHITECTURES if virtual <= float(name))).replace(".", "")


def generate_code(names: list[str]) -> list[str]:
    """["8.0", "9.0+PTX", "10.0"] -> the -gencode flags of nvcc, one for each virtual architecture."""
    codes: dict[str, list[str]] = {}
    for name in names:
        plain = name.removesuffix("+PTX")
        virtual = virtual_architecture(plain)
        codes.setdefault(virtual, []).append(f"sm_{plain.replace('.', '')}")
        if plain != name:
            codes[virtual].append(f"compute_{virtual}")
    return [f"-gencode=arch=compute_{v},code=[{','.join(dict.fromkeys(several))}]" for v, several in codes.items()]


def jobs(root: Path, names: list[str]) -> list[Job]:
    """One nvcc command per csrc/cuda/**/*.cu. They include no header of torch.

    The objects stay in build/cuda, named by the hash of all they are made of: setup.py and the tests share them.
    """
    toolkit = find_toolkit()
    compression = COMPRESSION if toolkit.release >= COMPRESSES_SINCE else OLD_COMPRESSION
    requested = shlex.split(os.environ.get("FASTSEQ_NVCCFLAGS", ""))
    flags = [*FLAGS, *compression, *toolkit.flags, *generate_code(names), *requested]
    common = " ".join(flags) + run(toolkit.nvcc, "--version")
    result = []
    for source in sorted(root.glob("csrc/cuda/**/*.cu")):
        key = hashlib.sha256(common.encode())
        for path in sorted(files_of(source, [root / "csrc"])):
            key.update(path.read_bytes())
        stem = "-".join(source.relative_to(root / "csrc/cuda").with_suffix("").parts)
        name, out = str(source.relative_to(root)), f"build/cuda/{stem}-{key.hexdigest()[:16]}.o"
        result.append(Job(name, out, [str(toolkit.nvcc), *flags, "-Icsrc", "-c", name], keyed=True))
    return result


def compile_kernels(root: Path, names: list[str], report: Callable[[str], None]) -> list[Path]:
    """Compile the kernels for these architectures -> the object files."""
    work = jobs(root, names)
    compile_all(work, report, root)
    return [root / job.out for job in work]


@functools.cache
def check(toolkit: Toolkit, names: tuple[str, ...], compiler: str) -> None:
    """Compile and link one small kernel; raises Unusable if nvcc refuses an architecture or the host compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text(PROBE)
        try:
            run(toolkit.nvcc, *FLAGS, *toolkit.flags, *generate_code(list(names)), "-c", source, "-o", out)
            run(*shlex.split(compiler), "-shared", out, *link_flags(toolkit), "-o", out.with_suffix(".so"))
        except Unusable as error:
            advice = "TORCH_CUDA_ARCH_LIST names the architectures, NVCC_CCBIN the host compiler"
            raise Unusable(f"nvcc {toolkit.version} was tried on {' '.join(names)}: {error} ({advice})") from error


def link_flags(toolkit: Toolkit) -> list[str]:
    """Link the CUDA runtime into the library, for machines that have none."""
    return [f"-L{toolkit.library}", *LINK_FLAGS]
