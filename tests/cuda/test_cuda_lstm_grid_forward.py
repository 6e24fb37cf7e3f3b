"""Forward grid recurrence of csrc/cuda, on the host-side device and, if present, on a GPU."""

import emulator
import pytest
import torch
from cuda_cases import DTYPES, check, on, place_of, recurrence

from fastseq.testing.numerics import Results

NAMES = ("output", "h_n", "c_n", "activations", "cell_states")
KINDS = [*DTYPES, "tf32"]
# Five steps use both buffers of h, each with either sequence tag.
SHAPES = [(1, 3, 16), (6, 1, 1), (3, 33, 16), (5, 17, 63), (2, 17, 128), (3, 2, 257)]


@pytest.fixture(autouse=True)
def grid(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")


def _case(T, B, H, kind=torch.float32, **options):
    return recurrence(T, B, H, dtype=torch.float32 if kind == "tf32" else kind, tf32=kind == "tf32", **options)


def _run(place, case, activations=True, cell_states=True):
    tensors = on(place, case.gates, case.h0, case.c0, case.weight_hh, case.lengths)
    operator = place.operators.lstm_recurrence_forward
    results = operator(*tensors, case.reverse, case.tf32, activations, cell_states)
    return dict(zip(NAMES, (t.cpu() for t in results), strict=True))


def _check(place, case):
    results = _run(place, case)
    results.pop("activations")
    check(Results(results, {}), case, gradients=False)


def _same_bits(results, wanted):
    for name in wanted:
        torch.testing.assert_close(results[name], wanted[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("T", "B", "H"), SHAPES)
def test_accuracy(place, T, B, H, kind):
    _check(place, _case(T, B, H, kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("D", "reverse"), [(1, False), (1, True), (2, False)])
def test_lengths(place, D, reverse, kind):
    """Lengths from 0 to T. Rows freeze at their end; the reverse direction starts there."""
    _check(place, _case(6, 19, 24, kind, D=D, reverse=reverse, lengths="mixed"))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_reverse_without_lengths(place, kind):
    _check(place, _case(4, 3, 16, kind, reverse=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activations(place, kind):
    """Saved i, f, g, o reproduce the cell states; results that are not requested are empty."""
    case = _case(4, 5, 40, kind, lengths="mixed")
    results = _run(place, case)
    H, dtype = 40, case.gates.dtype
    i, f, g, o = results["activations"].double().split(H, dim=-1)
    before = torch.cat((case.c0.double(), results["cell_states"].double()[:-1]))
    valid = (torch.arange(4).unsqueeze(1) < case.lengths).unsqueeze(-1)
    for ours, oracle in (
        (results["cell_states"].double(), f * before + i * g),
        (results["output"].double(), o * results["cell_states"].double().tanh()),
    ):
        error = (ours - oracle)[valid.expand_as(ours)].abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * max(1.0, float(oracle[valid.expand_as(ours)].abs().max()))
    for activations, cell_states in ((False, False), (True, False), (False, True)):
        less = _run(place, case, activations, cell_states)
        _same_bits({n: less[n] for n in ("output", "h_n", "c_n")}, {n: results[n] for n in ("output", "h_n", "c_n")})
        assert less["activations"].numel() == activations * 4 * 5 * 4 * H
        assert less["cell_states"].numel() == cell_states * 4 * 5 * H


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_large_values(place, kind):
    """Pre-activations of +-100 and abs(h0) > 1."""
    case = _case(4, 3, 16, kind, scale=100.0)
    _check(place, case._replace(h0=50 * case.h0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("unit", [4, 5])
def test_nan_stays_in_its_row(place, kind, unit):
    """A NaN reaches every unit of its row one step later and no other row, from either half of a word of two units."""
    case = _case(4, 3, 40, kind)
    case.gates[1, 1, unit] = float("nan")
    output = _run(place, case)["output"]
    assert output[1, 1].isnan().sum() == 1
    assert output[2:, 1].isnan().all()
    assert not output[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("multiprocessors", "T", "B", "H", "D"),
    [(1, 5, 3, 63, 1), (2, 5, 17, 40, 2), (3, 4, 19, 72, 1), (7, 5, 33, 40, 1)],
)
def test_few_multiprocessors(multiprocessors, T, B, H, D, kind):
    """Blocks with many groups: two a pass, several passes, a last block with fewer groups, several teams."""
    with emulator.device(multiprocessors=multiprocessors):
        _check(place_of("host"), _case(T, B, H, kind, D=D, lengths="mixed"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("multiprocessors", "H"), [(1, 80), (2, 264)])
def test_weights_in_shared_memory(multiprocessors, H, kind):
    """More chunks of K, or more groups, than fit in registers."""
    with emulator.device(multiprocessors=multiprocessors, shared_memory=4 << 20):
        _check(place_of("host"), _case(2, 9, H, kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("multiprocessors", [6, 2])
def test_any_order_of_threads_gives_the_same_bits(multiprocessors, kind, nan_memory):
    case = _case(5, 19, 24, kind, lengths="mixed")
    with emulator.device(multiprocessors=multiprocessors):
        first = _run(place_of("host"), case)
        for seed in range(20):
            with emulator.schedule(seed):
                _same_bits(_run(place_of("host"), case), first)


def _launch_nothing(B, H, kind, D):
    """Call with T = 0; raises if no kernel fits."""
    _run(place_of("host"), _case(0, B, H, kind, D=D))


H100 = {}
A100 = {"multiprocessors": 108, "capability": 80, "shared_memory": 163 << 10}


@pytest.mark.parametrize(
    ("B", "H", "kind", "D", "device"),
    [
        (16, 1024, torch.bfloat16, 1, H100),
        (16, 1024, "tf32", 1, H100),
        (1, 1024, torch.bfloat16, 2, H100),
        (1, 2048, torch.bfloat16, 1, H100),
        (16, 1024, torch.bfloat16, 1, A100),
    ],
)
def test_fits(B, H, kind, D, device):
    with emulator.device(**device):
        _launch_nothing(B, H, kind, D)


@pytest.mark.parametrize(
    ("B", "H", "kind", "D", "device"),
    [
        (1, 2048, torch.float32, 1, H100),
        (1, 2048, "tf32", 1, H100),
        (256, 1024, torch.bfloat16, 1, H100),
        (1, 2048, torch.bfloat16, 1, A100),
        (1, 16, torch.bfloat16, 1, {"capability": 75}),
        (1, 16, torch.bfloat16, 1, {"resident": 1}),
    ],
)
def test_does_not_fit(B, H, kind, D, device):
    with emulator.device(**device), pytest.raises(RuntimeError, match="no CUDA kernel fits"):
        _launch_nothing(B, H, kind, D)


def test_no_steps_return_the_initial_state(place):
    case = _case(0, 3, 16)
    results = _run(place, case)
    assert results["output"].shape == (0, 3, 16)
    _same_bits({n: results[n] for n in ("h_n", "c_n")}, {"h_n": case.h0, "c_n": case.c0})


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizers):
    run = emulator.sanitized(sanitizers, "race_lstm_grid_forward")
    assert run.returncode == 0, run.stdout + run.stderr
