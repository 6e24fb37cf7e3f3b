"""The recurrence of csrc/cuda where no kernel for all steps fits: one direction at a time, then step by step."""

import emulator
import pytest
import torch
from cuda_cases import DTYPES, GIVEN, check_forward, check_gradients, forward, place_of, recurrence

KINDS = [*DTYPES, "tf32"]
SMALL = {  # limits of devices that are smaller than an A100; L4 and RTX 4060 have capability 8.9
    "L4": {"multiprocessors": 58, "capability": 89, "shared_memory": 99 << 10},
    "RTX 4060": {"multiprocessors": 24, "capability": 89, "shared_memory": 99 << 10},
    "RTX 5060": {"multiprocessors": 30, "capability": 120, "shared_memory": 99 << 10},  # clusters in less memory
    "a seventh of an H100": {"multiprocessors": 16},
}


def _case(T, B, H, kind=torch.float32, **options):
    return recurrence(T, B, H, dtype=torch.float32 if kind == "tf32" else kind, tf32=kind == "tf32", **options)


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "steps")


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 16), (4, 9, 63), (2, 2, 300)], ids=str)
def test_steps(place, shape, kind):
    check_forward(place, _case(*shape, kind))
    check_gradients(place, _case(*shape, kind))


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("given", [GIVEN[:1], GIVEN[1:3], GIVEN], ids=str)
@pytest.mark.parametrize("directions", ["one", "reverse", "both"])
def test_steps_with_lengths(place, directions, given, kind):
    """Lengths from 0 to T: rows keep their state past the end; the reverse direction starts there."""
    D, reverse = (2 if directions == "both" else 1), directions == "reverse"
    case = _case(6, 9, 24, kind, D=D, reverse=reverse, lengths="mixed")
    check_forward(place, case)
    check_gradients(place, case, given)


@pytest.mark.usefixtures("steps")
def test_no_steps(place):
    case = _case(0, 3, 8)
    _, h_n, c_n, *_ = forward(place, case)
    assert torch.equal(h_n, case.h0) and torch.equal(c_n, case.c0)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_results_that_are_not_needed(place, wanted):
    case = _case(3, 2, 8, D=2)
    results, everything = forward(place, case, *wanted), forward(place, case)
    for k, (result, expected) in enumerate(zip(results, everything, strict=True)):
        assert result.numel() == 0 if k >= 3 and not wanted[k - 3] else torch.equal(result, expected)


@pytest.mark.parametrize("limits", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 2])
def test_no_shape_is_refused_on_a_small_device(limits, kind, D):
    """H = 512 does not fit these devices, at least in both directions at once. (2, 1100) fits no device in float32."""
    host = place_of("host")
    with emulator.device(**limits):
        check_gradients(host, _case(2, 2, 512, kind, D=D, lengths="mixed"))
    if D == 1 and kind == torch.float32:
        with emulator.device(**limits):
            check_gradients(host, _case(1, 2, 1100, kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_directions_run_one_after_the_other_where_one_fits(kind, monkeypatch):
    """On one multiprocessor a direction of 24 units takes the grid kernel, which the variable demands."""
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")
    host, case = place_of("host"), _case(4, 3, 24, kind, D=2, lengths="mixed")
    with emulator.device(multiprocessors=1, capability=80):
        check_forward(host, case)
        check_gradients(host, case)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_a_refused_launch_runs_step_by_step(kind, capability):
    """The attributes promise 132 multiprocessors, but a launch finds room for one block only."""
    host, case = place_of("host"), _case(3, 3, 40, kind, D=2, lengths="mixed")
    with emulator.device(capability=capability, resident=1):
        check_forward(host, case)
        check_gradients(host, case)


def test_a_refused_cluster_takes_the_grid(monkeypatch):
    """A cluster of two blocks finds no room; a grid of one does."""
    host, case = place_of("host"), _case(3, 3, 8, torch.bfloat16)
    with emulator.device(resident=1):
        results = forward(host, case)
        monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "cluster")
        with pytest.raises(RuntimeError, match="unset it"):
            forward(host, case)
        monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")
        expected = forward(host, case)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)
