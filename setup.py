"""Builds the compiled operators ahead of time; all metadata is in pyproject.toml.

FASTSEQ_NATIVE=0 leaves the operators out, FASTSEQ_NATIVE=1 turns a missing compiler into an error.
Unset, they are built if a C++ compiler is found. FASTSEQ_CXXFLAGS are appended to the compiler's flags.

The CUDA kernels are built if a usable nvcc is found (CUDA_HOME, PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc), with or
without a GPU, beside a CPU build of torch as well. FASTSEQ_CUDA=0 leaves them out, FASTSEQ_CUDA=1 turns a missing or
unusable nvcc into an error. TORCH_CUDA_ARCH_LIST names the architectures; FASTSEQ_NVCCFLAGS are appended to its flags.

FASTSEQ_CPU_KERNELS="avx2" builds the CPU kernels of these instruction sets only (a list of baseline, avx2, avx512 and
avx512_bf16; unset: all), for a short build on one machine. The library then runs the widest of them that the processor
has, and its import fails where there is none. avx512_bf16 includes avx512, which has the kernels of all other types.

MAX_JOBS limits the compilers that run at once. fastseq/_build.json records what was left out, and why; `fastseq info`
shows it.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # build front ends leave it out
from build_support import compile, cuda  # noqa: E402

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
SMALLEST_SETUPTOOLS = 77  # reads `license = "MIT"` of pyproject.toml; as in its build-system.requires
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that the built library loads in
SMALLEST_COMPILERS = {"g++": 12, "clang++": 14}  # GCC 12 is the first with __builtin_shufflevector
LEFT_OUT_OPERATORS, LEFT_OUT_CUDA = "compiled operators", "CUDA kernels"  # keys of _build.json, read by fastseq._native


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


def too_old(compiler: str) -> str | None:
    """The sentence that refuses an old release of g++ or clang++, or None; any other compiler is accepted."""
    done = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True)
    text = done.stdout.partition("\n")[0]
    name = "clang++" if "clang" in text else "g++" if re.search(r"g\+\+|c\+\+|GCC", text) else None
    release = re.search(r"(?:clang version |\) )(\d+)\.", text)
    if name is None or release is None or "Apple" in text or int(release[1]) >= SMALLEST_COMPILERS[name]:
        return None
    return f"{compiler} is {name} {release[1]}; {name} {SMALLEST_COMPILERS[name]} or later is needed (set CXX)"


@functools.cache
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
    return too_old(find_compiler())


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


@functools.cache
def find_cuda() -> tuple[cuda.Toolkit | None, str]:
    """The toolkit that builds the CUDA kernels, tried on a small one; else None and the reason."""
    if why_not_native():
        return None, why_not_native()
    if switch("FASTSEQ_CUDA") == "0":
        return None, "FASTSEQ_CUDA=0"
    try:
        toolkit = cuda.find_toolkit()
        names, _ = cuda.architectures()
        cuda.check(toolkit, tuple(names), find_compiler())
    except cuda.Unusable as reason:
        return None, str(reason)
    return toolkit, ""


def left_out() -> dict[str, str]:
    """Parts that the build leaves out, each with the reason."""
    if reason := why_not_native():
        return {LEFT_OUT_OPERATORS: reason}
    parts = {}
    if missing := [name for name in INSTRUCTION_SETS if name not in instruction_sets()]:
        parts[f"CPU kernels for {', '.join(missing)}"] = f"FASTSEQ_CPU_KERNELS={os.environ['FASTSEQ_CPU_KERNELS']}"
    toolkit, reason = find_cuda()
    if toolkit is None:
        parts[LEFT_OUT_CUDA] = reason
    elif old := cuda.architectures()[1]:
        parts[f"{LEFT_OUT_CUDA} for {', '.join(old)}"] = "they need compute capability 8.0"
    return parts


def record(package: Path) -> None:
    """Write fastseq/_build.json, which fastseq._native reads."""
    toolkit, _ = find_cuda()
    facts = {"left_out": left_out()}
    if toolkit:
        facts |= {"nvcc": toolkit.version, "driver": toolkit.driver}
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildPython(build_py):
    """Adds _build.json to the package. Starts from an empty folder: deleted modules must not be installed again."""

    def run(self):
        package = ROOT / "fastseq" if self.editable_mode else Path(self.build_lib, "fastseq")
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        record(package)
        for part, reason in left_out().items():
            print(f"fastseq: installing without the {part}: {reason}.", file=sys.stderr)


def config_header(folder: Path, torch_version: str) -> Path:
    """Write build_config.h, which csrc/ops.cpp includes; an unchanged one keeps its time."""
    toolkit, _ = find_cuda()
    lines = [
        f"#define FASTSEQ_BUILD_FLAGS {json.dumps(' '.join(FLAGS))}",
        f"#define FASTSEQ_BUILD_TORCH {json.dumps(torch_version)}",
        f"#define FASTSEQ_CUDA_ARCHITECTURES {json.dumps(' '.join(cuda.architectures()[0]) if toolkit else '')}",
        f"#define FASTSEQ_WITH_CUDA {int(toolkit is not None)}",
    ]
    path, text = folder / "build_config.h", "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


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

    os.environ["CC"] = os.environ["CXX"] = find_compiler()  # distutils takes one or the other for C++
    left_out_sets = [name for name in INSTRUCTION_SETS if name not in instruction_sets()]
    without = {ROOT / f"csrc/cpu/isa/{name}.cpp" for name in left_out_sets}

    class Build(BuildExtension):
        """Takes the flags from torch; build_support.compile runs the commands, nvcc's among them."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"use_ninja": False})

        def finalize_options(self):
            super().finalize_options()
            self.force = (
                True  # compile_all skips what is current; distutils would keep a library built with other switches
            )

        def run(self):
            if self.editable_mode:  # else a temporary folder, in which nothing is found to be up to date
                self.build_temp = str(Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}"))
            super().run()
            record(Path(self.get_ext_fullpath("fastseq._C")).parent)

        def build_extensions(self):
            extension = self.extensions[0]
            extension.include_dirs.append(str(config_header(Path(self.build_temp), torch.__version__).parent))
            extension.sources = sorted(
                str(path.relative_to(ROOT))
                for path in ROOT.glob("csrc/**/*.cpp")
                if path not in without and (find_cuda()[0] or "cuda" not in path.parts)
            )
            if toolkit := find_cuda()[0]:
                # -ltorch: its libtorch_cuda, where there is one, has the current stream. The library loads without it.
                extension.extra_link_args += [*cuda.link_flags(toolkit), "-Wl,--no-as-needed", "-ltorch"]
            one_by_one, self.compiler._compile = self.compiler.compile, self.collect
            self.compiler.compile = lambda *args, **kwargs: self.compile_all(one_by_one, *args, **kwargs)
            try:
                super().build_extensions()
            except Exception as error:
                if output := getattr(error, "output", None):  # also with --quiet
                    print(output, file=sys.stderr)
                raise SystemExit(f"fastseq: {error}; the output is above. {advice(error)}") from error

        def collect(self, obj, src, ext, cc_args, extra_postargs, pp_opts) -> None:
            """Stands in for the compiler's _compile: keeps the command instead of running it."""
            compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
            self.jobs.append(compile.Job(src, obj, [*compiler, *cc_args, src, *extra_postargs]))

        def compile_all(self, one_by_one, *args, **kwargs) -> list[str]:
            """Collect the commands of distutils, then run them and nvcc's in one pool."""
            self.jobs = cuda.jobs(ROOT, cuda.architectures()[0]) if find_cuda()[0] else []
            one_by_one(*args, **kwargs)
            self.jobs.sort(key=lambda job: not job.source.startswith("csrc/cpu/isa/"))  # the longest first
            verbose = self.distribution.verbose
            compile.compile_all(self.jobs, lambda line: verbose and print(f"fastseq: {line}", flush=True), ROOT)
            return [job.out for job in self.jobs]

    extension = CppExtension(
        "fastseq._C",
        sources=[],  # find_cuda decides them, when the build begins
        include_dirs=["csrc"],
        extra_compile_args=[
            *FLAGS,
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *(f"-DFASTSEQ_WITHOUT_{name.upper()}" for name in left_out_sets),  # read by csrc/cpu/isa/isa.h
            *shlex.split(os.environ.get("FASTSEQ_CXXFLAGS", "")),
        ],
        py_limited_api=True,  # abi3: torch adds Py_LIMITED_API
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build, "build_py": BuildPython},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def advice(error: Exception) -> str:
    """The setting that lets the install succeed."""
    if find_cuda()[0] and not (isinstance(error, compile.Failed) and error.job.source.endswith(".cpp")):
        return (
            "Set FASTSEQ_CUDA=0 to install without the CUDA kernels, or TORCH_CUDA_ARCH_LIST to the architectures that "
            "this nvcc compiles for."
        )
    return "Set FASTSEQ_NATIVE=0 to install without the compiled operators."


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < SMALLEST_SETUPTOOLS:
        raise SystemExit(
            f"fastseq: the build needs setuptools {SMALLEST_SETUPTOOLS} or later (this environment has "
            f"{setuptools.__version__}). Install it first: pip install 'setuptools>={SMALLEST_SETUPTOOLS}'"
        )
    reason = why_not_native()
    if switch("FASTSEQ_NATIVE") == "1" and reason:
        raise SystemExit(f"fastseq: FASTSEQ_NATIVE=1, but {reason}.")
    if switch("FASTSEQ_CUDA") == "1" and find_cuda()[0] is None:
        raise SystemExit(f"fastseq: FASTSEQ_CUDA=1, but {find_cuda()[1]}.")
    setuptools.setup(**native_build() if reason is None else {"cmdclass": {"build_py": BuildPython}})


if __name__ == "__main__":  # setuptools runs it so; tests read its functions
    main()
