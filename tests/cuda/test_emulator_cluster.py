"""Clusters on the host-side device: what overwrites words that others still read must show, right kernels must not."""

import subprocess

import emulator
import pytest

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")
THREADS = ["-fsanitize=thread"]


def run(flags: list[str], buffers: int, seed: int) -> str:
    """What cluster_check.cpp printed, the sanitizer's report included."""
    name = "cluster_check_thread" if flags else "cluster_check"
    sources = [emulator.HERE / "cluster_check.cpp"]
    program = emulator.build(name, [*emulator.FLAGS, "-O1", *flags], sources, program=True)
    done = subprocess.run([program, str(buffers), str(seed)], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.parametrize("flags", [[], THREADS], ids=["plain", "thread"])
def test_two_buffers_are_right_in_any_order(flags):
    assert {run(flags, 2, seed) for seed in range(10)} == {"ok\n"}


def test_one_buffer_is_overwritten_in_some_order():
    assert "wrong\n" in {run([], 1, seed) for seed in range(10)}


def test_thread_sanitizer_finds_the_race_of_one_buffer():
    assert "WARNING: ThreadSanitizer: data race" in run(THREADS, 1, 0)
