"""The compiled LSTM on 1, 2 and 3 threads, and called from several threads at once."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from native_cases import Problem, dtype_id, threads
from test_native_lstm import PATHS, PROJECTIONS

from fastseq import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")

TESTS = Path(__file__).parent


def assert_same_bits(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # saved values past the lengths are NaN


@pytest.mark.parametrize("direction", ["reverse", "both"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_threads_change_nothing(dtype, path, direction):
    problem = Problem(*PATHS[path], "lengths", dtype, direction)
    expected = problem.both()
    for count in (2, 3, 1, *4 * (3, 2)):  # repeated: a race shows only when threads overlap
        with threads(count):
            assert_same_bits(problem.both(), expected)


@pytest.mark.parametrize("direction", ["reverse", "both"])
@pytest.mark.parametrize("shape", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_threads_change_nothing_of_a_projection(dtype, shape, direction):
    *sizes, projection, bias = PROJECTIONS[shape]
    problem = Problem(*sizes, "lengths", dtype, direction, bias, projection)
    expected = problem.both()
    for count in (2, 3, *4 * (3, 2)):  # repeated: a race shows only when threads overlap
        with threads(count):
            assert_same_bits(problem.both(), expected)


def test_python_threads_at_once():
    problems = [Problem(*PATHS[path], "lengths", direction="both") for path in PATHS]
    expected = [problem.both() for problem in problems]

    def caller(number):
        with threads(2):  # applies to this thread and to all that torch starts later
            for k in range(3 * len(problems)):
                k = (k + number) % len(problems)
                assert_same_bits(problems[k].both(), expected[k])

    with ThreadPoolExecutor(4) as callers:
        for result in [callers.submit(caller, number) for number in range(4)]:
            result.result()


def openmp():
    """Return the OpenMP library that torch uses on this machine, or None."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().split() if maps.exists() else []
    paths = [line for line in lines if "libgomp" in line]
    return ctypes.CDLL(paths[0]) if paths else None


def test_calls_within_a_parallel_region():
    library = openmp()
    if library is None:
        pytest.skip("torch does not use libgomp, the library whose entry point this test calls")
    problem = Problem(*PATHS["panels of 6 rows"], "lengths", direction="both")
    expected, results = problem.both(), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        results.append(problem.both())

    with threads(3):
        library.GOMP_parallel(region, None, 2, 0)
    assert len(results) == 2
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize("flags", [(), ("-O1", "-fsanitize=thread")], ids=["plain", "ThreadSanitizer"])
def test_team_with_descheduled_members(flags, tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "team_check"
    command = [compiler, "-std=c++20", "-O2", "-pthread", f"-I{TESTS.parents[1] / 'csrc'}", *flags]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    build = subprocess.run([*command, probe, "-o", program], capture_output=True)
    if build.returncode or subprocess.run(program).returncode:
        pytest.skip(f"{compiler} cannot build and run with {' '.join(flags)}")
    subprocess.run([*command, TESTS / "team_check.cpp", "-o", program], check=True)
    result = subprocess.run(program, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
