"""Waits that end: a cooperative grid of which some blocks begin only after the others have ended."""

import emulator
import pytest
import torch
from cuda_cases import DTYPES, forward, place_of, recurrence
from test_cuda_lstm_grid_backward import run as backward

KINDS = [*DTYPES, "tf32"]
SECONDS = "0.1"  # 320 rounds of the host-side device's scheduler


@pytest.fixture(autouse=True)
def grid(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")
    monkeypatch.setenv("FASTSEQ_SPIN_TIMEOUT", SECONDS)


def _case(kind, T=6, B=9, H=40):
    return recurrence(T, B, H, dtype=torch.float32 if kind == "tf32" else kind, tf32=kind == "tf32")


def _nan_or_right(results, expected):
    """Every number of a grid in pieces is NaN or has the bits of the whole grid, so no product mixed two steps."""
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(
            torch.where(result.isnan(), result.new_zeros(()), result), right.masked_fill(result.isnan(), 0)
        )


def next_call_raises(op, call, *arguments):
    """The first call after a vain wait raises; the one after it does not."""
    with pytest.raises(RuntimeError, match=f"{op}: an earlier LSTM .* Set FASTSEQ_SPIN_TIMEOUT to more"):
        call(*arguments)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("placed", [1, 2, 4])
@pytest.mark.parametrize(("T", "B"), [(6, 9), (1, 3)])
def test_a_grid_in_pieces_ends_with_nan(T, B, placed, kind, capfd):
    """The first blocks give up, and so do the others, which find NaN or what those finished."""
    host, case = place_of("host"), _case(kind, T, B)
    right, right_grads = forward(host, case), backward(host, case)
    with emulator.device(capability=80, placed=placed):
        results = forward(host, case)
        next_call_raises("lstm_recurrence_backward", backward, host, case)
        grads = backward(host, case)
    if placed < 3 or B > 8:  # two groups of rows, of three blocks each
        next_call_raises("lstm_recurrence_forward", forward, host, case)
    assert all(map(torch.equal, forward(host, case), right)), "the device is usable"
    _nan_or_right(results, right)
    _nan_or_right(grads.values(), right_grads.values())
    if placed < 3:
        assert all(h.isnan().any() for h in (*results[:3], grads["h0"]))
        lines = capfd.readouterr().out.count("longer than FASTSEQ_SPIN_TIMEOUT")
        assert 2 <= lines <= 6, "one for each launch and group of rows"


def test_a_grid_in_pieces_waits_for_ever_without_a_limit(monkeypatch):
    monkeypatch.setenv("FASTSEQ_SPIN_TIMEOUT", "0")
    with emulator.device(capability=80, placed=2), pytest.raises(RuntimeError, match="deadlock"):
        forward(place_of("host"), _case(torch.float32))


def test_the_limit_changes_no_bit_where_all_blocks_run(place):
    case = _case(torch.bfloat16)
    expected = forward(place, case)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTSEQ_SPIN_TIMEOUT")
        for result, other in zip(forward(place, case), expected, strict=True):
            assert torch.equal(result, other)
    assert not expected[0].isnan().any()


@pytest.mark.parametrize("text", ["-1", "ten", "1e9", "5 s", "nan"])
def test_other_limits_are_refused(text, monkeypatch):
    monkeypatch.setenv("FASTSEQ_SPIN_TIMEOUT", text)
    with pytest.raises(RuntimeError, match=f"between 0 and 30000 seconds, 0 to wait for ever, got '{text}'"):
        forward(place_of("host"), _case(torch.float32))
