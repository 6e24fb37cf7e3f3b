"""Builds the compiled operators ahead of time; all metadata is in pyproject.toml.

FASTSEQ_NATIVE=0 leaves them out, FASTSEQ_NATIVE=1 turns a missing compiler into an error.
Without either they are built where a C++ compiler is found. FASTSEQ_CXXFLAGS are flags for the compiler, after our own.

The CUDA kernels are built too where nvcc is found (CUDA_HOME, PATH, /usr/local/cuda), with or without a GPU, beside a
CPU build of torch as well. FASTSEQ_CUDA=0 leaves them out, FASTSEQ_CUDA=1 turns a missing nvcc into an error.
TORCH_CUDA_ARCH_LIST names the architectures.

FASTSEQ_CPU_KERNELS="avx2" builds the CPU kernels of these instruction sets only (a list of baseline, avx2, avx512 and
avx512_bf16; unset: all), for a short build on one machine. The library then runs the widest of them that the processor
has, and its import fails where there is none. avx512_bf16 includes avx512, which has the kernels of all other types.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
SWITCHES = ("", "0", "1")
FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-Wall",
    "-Wno-psabi",
]
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")  # of the CPU kernels: csrc/cpu/isa/*.cpp
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-warn-spills"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # Ampere and Hopper; what is newer compiles the PTX when it loads the library
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that the built library loads in


def switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in SWITCHES:
        raise SystemExit(f"fastseq: {name} must be 0, 1 or unset, got {value!r}.")
    return value


def find_compiler() -> str | None:
    """The C++ compiler command, or None. $CXX wins, then the usual names."""
    if os.environ.get("CXX"):
        return os.environ["CXX"] if shutil.which(shlex.split(os.environ["CXX"])[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_not_native() -> str | None:
    """The reason for leaving the compiled operators out, or None."""
    if switch("FASTSEQ_NATIVE") == "0":
        return "FASTSEQ_NATIVE=0"
    if sys.platform == "win32":
        return "they are not built on Windows yet"
    if find_compiler() is None:
        return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h was not found (install the headers of this Python, such as python3-dev)"
    return None


def instruction_sets() -> list[str]:
    """From FASTSEQ_CPU_KERNELS, such as "avx2, avx512" -> ["avx2", "avx512"]; all if it is unset or empty."""
    names = set(re.split(r"[;, ]+", os.environ.get("FASTSEQ_CPU_KERNELS", "").strip())) - {""}
    if unknown := sorted(names - set(INSTRUCTION_SETS)):
        raise SystemExit(
            f"fastseq: FASTSEQ_CPU_KERNELS names {', '.join(map(repr, unknown))}; "
            f"expected a list of {', '.join(INSTRUCTION_SETS)}."
        )
    if "avx512_bf16" in names:
        names.add("avx512")
    return [name for name in INSTRUCTION_SETS if not names or name in names]


def find_cuda() -> Path | None:
    """The folder of the CUDA toolkit whose nvcc is used, or None."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda"]
    needed = ("bin/nvcc", "include/cuda_runtime.h")  # an nvcc on PATH may be a script that calls the real one
    return next((Path(c) for c in candidates if c and all(Path(c, name).exists() for name in needed)), None)


def why_not_cuda() -> str | None:
    """The reason for leaving the CUDA kernels out, or None."""
    if switch("FASTSEQ_CUDA") == "0":
        return "FASTSEQ_CUDA=0"
    if find_cuda() is None:
        return "no nvcc was found (install the CUDA toolkit, or set CUDA_HOME to its folder)"
    return None


def cuda_architectures() -> list[str]:
    """From TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX" -> ["8.0", "9.0+PTX"]."""
    names = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or CUDA_ARCHITECTURES)
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f"fastseq: TORCH_CUDA_ARCH_LIST names {name!r}; expected versions such as 8.0;9.0+PTX, from 8.0 on."
            )
        if float(re.match(r"[\d.]+", name)[0]) < 8.0:
            raise SystemExit(
                f"fastseq: the CUDA kernels need compute capability 8.0 (TORCH_CUDA_ARCH_LIST has {name})."
            )
    return names


def generate_code(architectures: list[str]) -> list[str]:
    """["8.0", "9.0+PTX"] -> the -gencode flags of nvcc."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", *([f"compute_{number}"] if name.endswith("+PTX") else [])]
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
    return flags


def files_of(source: Path, folders: Iterable[Path]) -> set[Path]:
    """Return ``source`` and the files that it includes, transitively.

    Resolves ``#include "name"`` beside the including file and below ``folders``, in both branches of an #if.
    """
    folders, known, new = tuple(folders), set(), [source.resolve()]
    while new:
        path = new.pop()
        if path in known:
            continue
        known.add(path)
        for name in re.findall(r'^\s*#include "(.*)"', path.read_text(), re.MULTILINE):
            candidates = ((folder / name).resolve() for folder in (path.parent, *folders))
            new += [p for p in candidates if p.exists()][:1]
    return known


def compile_cuda(architectures: list[str]) -> list[Path]:
    """Compile every csrc/cuda/**/*.cu with nvcc -> the object files. They include no header of torch.

    Objects are kept in build/cuda, named by the hash of all they are made of: the tests read the same ones.
    """
    folder, nvcc = ROOT / "build/cuda", str(find_cuda() / "bin/nvcc")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*NVCC_FLAGS, *generate_code(architectures), *shlex.split(os.environ.get("FASTSEQ_NVCCFLAGS", ""))]
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(" ".join(flags).encode() + version)
        for path in sorted(files_of(source, [ROOT / "csrc"])):
            key.update(path.read_bytes())
        stem = "-".join(source.relative_to(ROOT / "csrc/cuda").with_suffix("").parts)
        out = folder / f"{stem}-{key.hexdigest()[:16]}.o"
        if not out.exists():
            partial = out.with_suffix(f".{os.getpid()}.o")
            command = [nvcc, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(partial)]
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
            partial.rename(out)
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sorted(ROOT.glob("csrc/cuda/**/*.cu"))))


def cuda_link_flags() -> list[str]:
    """The CUDA runtime goes into the library: a machine without CUDA has none to load."""
    home = find_cuda()
    folder = next((home / name for name in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib")
                   if (home / name / "libcudart_static.a").exists()), None)  # fmt: skip
    if folder is None:
        raise SystemExit(f"fastseq: {home} has nvcc but no libcudart_static.a; install all of the CUDA toolkit.")
    # -ltorch: its libtorch_cuda, where there is one, has the current stream. The library must load without it, too.
    return [f"-L{folder}", "-lcudart_static", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL",
            "-Wl,--no-as-needed", "-ltorch"]  # fmt: skip


def native_build() -> dict:
    """The arguments of setup() that build fastseq._C."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"fastseq: building the compiled operators needs torch in this environment ({error}). "
            "Install torch>=2.11 first, or set FASTSEQ_NATIVE=0 to install without them."
        ) from error

    os.environ["CXX"] = find_compiler()
    cuda = why_not_cuda() is None
    left_out = [name for name in INSTRUCTION_SETS if name not in instruction_sets()]
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DFASTSEQ_BUILD_FLAGS="{" ".join(FLAGS)}"',
        f'-DFASTSEQ_BUILD_TORCH="{torch.__version__}"',
        f'-DFASTSEQ_CUDA_ARCHITECTURES="{" ".join(cuda_architectures()) if cuda else ""}"',
        f"-DFASTSEQ_WITH_CUDA={int(cuda)}",
        f"-fmacro-prefix-map={ROOT}/=",  # paths in error messages are relative to the project, wherever it was built
        *(f"-DFASTSEQ_WITHOUT_{name.upper()}" for name in left_out),  # read by csrc/cpu/isa/isa.h
    ]

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                if cuda:
                    self.extensions[0].extra_objects += map(str, compile_cuda(cuda_architectures()))
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"fastseq: compiling the operators failed ({error}); its output is above. "
                    "Set FASTSEQ_NATIVE=0 to install without them."
                ) from error

    without = {ROOT / f"csrc/cpu/isa/{name}.cpp" for name in left_out}
    sources = [p.relative_to(ROOT) for p in ROOT.glob("csrc/**/*.cpp") if p not in without]
    extension = CppExtension(
        "fastseq._C",
        sources=sorted(str(p) for p in sources if cuda or "cuda" not in p.parts),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        extra_compile_args=FLAGS + defines + shlex.split(os.environ.get("FASTSEQ_CXXFLAGS", "")),
        extra_link_args=cuda_link_flags() if cuda else [],
        py_limited_api=True,  # abi3: torch adds Py_LIMITED_API
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def main() -> None:
    reason = why_not_native()
    without_cuda = reason or why_not_cuda()
    if without_cuda and switch("FASTSEQ_CUDA") == "1":
        raise SystemExit(f"fastseq: FASTSEQ_CUDA=1, but {without_cuda}.")
    if reason is None and without_cuda:
        print(f"fastseq: installing without the CUDA kernels: {without_cuda}.", file=sys.stderr)
    if reason is None:
        return setup(**native_build())
    if switch("FASTSEQ_NATIVE") == "1":
        raise SystemExit(f"fastseq: FASTSEQ_NATIVE=1, but {reason}.")
    print(f"fastseq: installing without the compiled operators: {reason}.", file=sys.stderr)
    return setup()


if __name__ == "__main__":  # setuptools runs it so; tests read its functions
    main()
