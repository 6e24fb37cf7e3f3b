"""Links the CUDA operators as setup.py does, and loads them in a process without a GPU, beside any build of torch."""

import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fastseq import _native

OPERATORS = (
    "lstm_cell_forward",
    "lstm_cell_backward",
    "lstm_step",
    "lstm_recurrence_forward",
    "lstm_recurrence_backward",
    "tf32_product",
    "attention_forward",
    "attention_backward",
)
PROBLEM = """
#include "cuda/lstm_cell/cell.h"
extern "C" __attribute__((visibility("default"))) const char* problem() {
  static const std::string text = fastseq::cuda::device_problem();
  return text.c_str();
}
"""
LOAD = """
import ctypes, sys, torch, fastseq
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
library.problem.restype = ctypes.c_char_p
print(library.problem().decode())
print(*(name for name in sys.argv[2:] if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseq::{name}", "CUDA")))
"""


@pytest.mark.skipif(not _native.available(), reason=_native.why_not())
@pytest.mark.skipif(bool(_native.build_info().get("cuda_architectures")), reason="tests/install loads the kernels")
def test_the_operators_load_without_a_gpu(tmp_path):
    cuda_build.require()
    link_flags = cuda_build.cuda.link_flags(cuda_build.cuda.find_toolkit())
    (tmp_path / "problem.cpp").write_text(PROBLEM)
    sources = [*sorted((cuda_build.ROOT / "csrc/cuda").glob("**/*.cpp")), tmp_path / "problem.cpp"]
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    includes = [f"-I{folder}" for folder in (*cuda_build.INCLUDES, *include_paths())]
    library = tmp_path / "operators.so"
    torch_flags = [
        *(f"-L{folder}" for folder in library_paths()),
        "-lc10",
        "-ltorch_cpu",
        "-Wl,--no-as-needed",
        "-ltorch",
    ]
    cuda_build.run(
        *(
            "c++",
            *flags,
            *includes,
            "-shared",
            *sources,
            *cuda_build.objects(),
            *link_flags,
            *torch_flags,
            "-o",
            library,
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(library), *OPERATORS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    problem, registered = done.stdout.splitlines()
    assert registered.split() == list(OPERATORS)
    assert ("driver" in problem) != torch.cuda.is_available()
