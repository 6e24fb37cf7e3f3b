"""Links a library to stubs of an old glibc: it asks for no newer symbol, and runs."""

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "build_support/glibc.py"
SOURCE = """
#include <math.h>
#include <pthread.h>
static void* work(void* x) { *(double*)x = exp(*(double*)x); return 0; }
double in_a_thread(double x) {
  pthread_t thread;
  pthread_create(&thread, 0, work, &x);
  pthread_join(thread, 0);
  return x;
}
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64", reason="needs glibc on x86-64")
def test_a_library_asks_for_no_newer_glibc(tmp_path):
    (tmp_path / "threads.c").write_text(SOURCE)
    stubs = subprocess.run(
        [sys.executable, TOOL, "2.28", tmp_path / "stubs"], capture_output=True, text=True, check=True
    )
    library = tmp_path / "threads.so"
    command = ["gcc", "-shared", "-fPIC", tmp_path / "threads.c", *stubs.stdout.split(), "-lm", "-o", library]
    subprocess.run(command, check=True)
    table = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", table)}
    assert versions and max(versions) <= (2, 28)
    function = ctypes.CDLL(str(library)).in_a_thread
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    assert function(1.0) == pytest.approx(2.718281828459045)
