"""Programs of tests/emulator that launch one kernel on the host-side device, built with sanitizers."""

import os
import subprocess

import emulator
import pytest


def sanitized(sanitizers: str, program: str, *kernels: str, level: str = "-O0") -> subprocess.CompletedProcess:
    """Build ``program`` of tests/emulator with ``kernels`` of csrc/cuda by ``-fsanitize=sanitizers`` and run it.

    ``level``: compilers take minutes to optimise instrumented kernels.
    """
    if emulator.compiler() is None:
        pytest.skip("the host-side device needs a C++ compiler")
    stem = program.removesuffix(".cpp")
    sources = [*(emulator.ROOT / "csrc/cuda" / name for name in kernels), emulator.HERE / program]
    flags = [
        *emulator.FLAGS,
        level,
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]
    path = emulator.build(f"{stem}-{sanitizers}", flags, sources, program=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([path], capture_output=True, text=True, env=environment, timeout=1200)
