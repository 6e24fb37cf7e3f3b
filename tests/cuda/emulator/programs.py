"""Stand-alone programs of this folder that launch kernels on the host-side device, optionally under sanitizers."""

import functools
import os
import subprocess
from pathlib import Path

import pytest

from .build import FLAGS, HERE, ROOT, compiler, link, objects

# program -> the sources of csrc/cuda that it launches
PROGRAMS = {
    "bank_conflicts": (),
    "cluster_check": (),
    "device_check": (),
    "race_attention": ("attention/forward", "attention/backward", "attention/coverage"),
    "race_lstm_cluster": ("lstm/cluster_forward", "lstm/cluster_backward"),
    "race_lstm_grid_backward": ("lstm/grid_backward", "common/stall"),
    "race_lstm_grid_forward": ("lstm/grid_forward", "common/stall"),
    "race_lstm_step": ("lstm_cell/step", "lstm/steps"),
    "tag_rounding": (),
}
STRICT = ("-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def run_program(name: str, *arguments, sanitizers: str = "") -> subprocess.CompletedProcess:
    """Build the program ``name`` with ``-fsanitize=sanitizers`` and run it until the first finding."""
    # Idle fibers count as threads, for which ThreadSanitizer sleeps a second at exit.
    tsan = "halt_on_error=1 atexit_sleep_ms=0"
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": tsan}
    command = [str(program(name, sanitizers)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)


def sanitized(sanitizers: str, name: str) -> subprocess.CompletedProcess:
    """Run a race program under sanitizers; skip the test if there is no compiler."""
    if compiler() is None:
        pytest.skip("the host-side device needs a C++ compiler")
    return run_program(name, sanitizers=sanitizers)


@functools.cache
def program(name: str, sanitizers: str) -> Path:
    """Link a program. Programs share one object per kernel source and sanitizer."""
    kind = sanitizers.replace(",", "-") or "plain"
    flags = [f"-fsanitize={sanitizers}", *STRICT] if sanitizers else []
    kernels = [ROOT / f"csrc/cuda/{kernel}.cu" for kernel in PROGRAMS[name]]
    parts = objects(kind, [*FLAGS, "-O0", *flags], [*kernels, HERE / f"{name}.cpp"])
    return link(f"{name}-{kind}", parts, flags[:1])
