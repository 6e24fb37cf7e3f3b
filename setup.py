"""Builds the compiled operators ahead of time; all metadata is in pyproject.toml.

FASTSEQ_NATIVE=0 leaves them out, FASTSEQ_NATIVE=1 turns a missing compiler into an error.
Without either they are built where a C++ compiler is found. FASTSEQ_CXXFLAGS are flags for the compiler, after our own.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
SWITCHES = ("", "0", "1")
FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-Wall",
    "-Wno-psabi",
]
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
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DFASTSEQ_BUILD_FLAGS="{" ".join(FLAGS)}"',
        f'-DFASTSEQ_BUILD_TORCH="{torch.__version__}"',
        f"-fmacro-prefix-map={ROOT}/=",  # paths in error messages are relative to the project, wherever it was built
    ]

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"fastseq: compiling the operators with {os.environ['CXX']} failed ({error}); its output is above. "
                    "Set FASTSEQ_NATIVE=0 to install without them."
                ) from error

    extension = CppExtension(
        "fastseq._C",
        sources=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp") if p.parent.name != "cuda"),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.[hi]*")),
        extra_compile_args=FLAGS + defines + shlex.split(os.environ.get("FASTSEQ_CXXFLAGS", "")),
        py_limited_api=True,  # abi3: torch adds Py_LIMITED_API
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def main() -> None:
    if switch("FASTSEQ_CUDA") == "1":
        raise SystemExit("fastseq: FASTSEQ_CUDA=1, but there are no CUDA kernels in this version yet; unset it.")
    reason = why_not_native()
    if reason is None:
        return setup(**native_build())
    if switch("FASTSEQ_NATIVE") == "1":
        raise SystemExit(f"fastseq: FASTSEQ_NATIVE=1, but {reason}.")
    print(f"fastseq: installing without the compiled operators: {reason}.", file=sys.stderr)
    return setup()


main()
