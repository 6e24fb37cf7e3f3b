"""Clusters on the host-side device: a word overwritten before all blocks have read it must be reported."""

import emulator
import pytest

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")


def run(sanitizers: str, buffers: int, seed: int) -> str:
    """Return the output of cluster_check.cpp, with the sanitizer's report."""
    done = emulator.run_program("cluster_check", buffers, seed, sanitizers=sanitizers)
    return done.stdout + done.stderr


@pytest.mark.parametrize("sanitizers", ["", "thread"], ids=["plain", "thread"])
def test_two_buffers_are_right_in_any_order(sanitizers):
    assert {run(sanitizers, 2, seed) for seed in range(10)} == {"ok\n"}


def test_one_buffer_is_overwritten_in_some_order():
    assert "wrong\n" in {run("", 1, seed) for seed in range(10)}


def test_thread_sanitizer_finds_the_race_of_one_buffer():
    assert "WARNING: ThreadSanitizer: data race" in run("thread", 1, 0)
