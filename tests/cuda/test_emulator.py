"""The host-side device itself: correct kernels pass, each planted fault is reported."""

import emulator
import pytest

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")

TOOLS = {"plain": "", "address": "address,undefined", "thread": "thread"}  # -> sanitizers


def run(tool: str, scenario: str, seed: int | None = None) -> str:
    """Return the output of the scenario, with the sanitizer's reports."""
    done = emulator.run_program("device_check", scenario, *([] if seed is None else [seed]), sanitizers=TOOLS[tool])
    return done.stdout + done.stderr


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("scenario", ["reverse", "enclosed", "copy", "ring", "cluster"])
def test_correct_kernels_pass_under_every_sanitizer(tool, scenario):
    assert run(tool, scenario) == "ok\n"
    for seed in range(5):
        assert run(tool, scenario, seed) == "ok\n"


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("deadlock", "deadlock: block (0, 0, 0) thread 0 waits in __syncthreads"),
        ("lost lane", "__shfl_sync: a lane of the mask has ended"),
        ("ring too large", "a cooperative launch of 200 blocks exceeds the resident blocks"),
        ("too much shared memory", "a block has less shared memory than 1048576 bytes"),
        ("copy without wait", "wrong"),
        ("cluster without wait", "mbarrier: more arrivals than the phase has"),
        ("ring with one buffer", "wrong"),
        ("ring without barrier", "wrong"),
    ],
)
def test_faulty_kernels_are_reported(scenario, message):
    assert message in run("plain", scenario)


RACES = ("reverse without barrier", "enclosed without barrier", "ring with one buffer", "ring without barrier")


@pytest.mark.parametrize("scenario", RACES)
def test_thread_sanitizer_finds_races(scenario):
    assert "WARNING: ThreadSanitizer: data race" in run("thread", scenario)


def test_shuffled_threads_expose_a_missing_barrier():
    assert "wrong\n" in {run("plain", "reverse without barrier", seed) for seed in range(3)}


def test_out_of_bounds_and_misaligned_accesses_are_found():
    assert "AddressSanitizer" in run("address", "out of bounds")
    assert "misaligned address" in run("address", "misaligned")
