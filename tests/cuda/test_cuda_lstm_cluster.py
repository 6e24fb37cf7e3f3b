"""Cluster recurrence of csrc/cuda, on the host-side device and, if present, on a GPU (sm_90 and newer)."""

import emulator
import pytest
import torch
from cuda_cases import DTYPES, GIVEN, check_forward, check_gradients, forward, on, place_of, recurrence


@pytest.fixture(autouse=True)
def _clusters(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "cluster")


def _case(T, B, H, dtype, **options):
    return recurrence(T, B, H, dtype=dtype, tf32=dtype == torch.float32, **options)


# T, B, H: one step, one sequence, one unit, padded units, several tiles of the batch, every cluster size.
SHAPES = [(1, 3, 16), (5, 1, 1), (4, 17, 63), (3, 9, 128), (2, 3, 200), (2, 2, 257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(place, shape, dtype):
    check_forward(place, _case(*shape, dtype))


FEW = [*((B, 132) for B in (1, 2, 3, 4, 7, 9, 17)), (7, 2), (9, 4), (18, 2)]  # B, multiprocessors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "multiprocessors"), FEW)
def test_few_rows(B, multiprocessors, dtype):
    """Tiles of 2 and 4, and of 8, 16 and 32 that are not full. Every tile and any order give the same bits."""
    host, case, results = place_of("host"), _case(3, B, 20, dtype, D=2, lengths="mixed" if B > 8 else None), []
    with emulator.device(multiprocessors=multiprocessors):
        for beside in (False, True):
            check_forward(host, case, beside)
            results.append(check_gradients(host, case, beside=beside))
            for seed in range(2):
                with emulator.schedule(seed):
                    results.append(check_gradients(host, case, beside=beside))
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("B", range(1, 21))
def test_the_choice_of_tiles(B):
    """12 multiprocessors: 6 clusters of 2 blocks, of which 5 are free. A wavefront keeps tiles of 8 or more."""
    kernel, results = emulator.load(), []
    with emulator.device(multiprocessors=12):
        of_one, of_all = (kernel.lstm_recurrence_cost(0, n, 1, 20, 2, False) for n in (2, B))
        _, share, _, share_back = kernel.lstm_recurrence_share(B, 1, 20, 2, False)
        for case in (_case(2, B, 20, torch.bfloat16), _case(2, B, 20, torch.bfloat16, lengths="mixed", reverse=True)):
            results = [check_gradients(place_of("host"), case, beside=beside) for beside in (False, True)]
            assert all(map(torch.equal, *results))
    assert share == share_back == -(-B // 8) / 5
    assert (B > 1 and of_all == of_one) == (1 < B <= 10)


# float32 only up to H = 256: larger weights do not fit.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 16), (5, 1, 1), (4, 17, 63), (3, 9, 128), (2, 3, 200)], ids=str)
def test_gradients(place, shape, dtype):
    check_gradients(place, _case(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_the_largest_cluster(place, dtype):
    check_gradients(place, _case(2, 2, 257, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [GIVEN[:1], GIVEN[1:3], GIVEN], ids=str)
@pytest.mark.parametrize("directions", ["one", "reverse", "both"])
def test_gradients_of_lengths_and_directions(place, directions, given, dtype):
    D, reverse = (2 if directions == "both" else 1), directions == "reverse"
    check_gradients(place, _case(6, 9, 24, dtype, D=D, reverse=reverse, lengths="mixed"), given)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("longest", [0, 3])
def test_gradients_past_the_longest_sequence(place, longest, reverse):
    case = _case(5, 3, 12, torch.bfloat16, reverse=reverse)
    check_gradients(place, case._replace(lengths=torch.tensor([1, 0, 3]).clamp(max=longest)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_large_values(place, dtype):
    check_gradients(place, _case(4, 3, 16, dtype, scale=100.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"lengths": "mixed"}, {"reverse": True, "lengths": "mixed"}], ids=str)
@pytest.mark.parametrize("D", [1, 2])
def test_lengths_and_directions(place, options, D, dtype):
    if D == 2:
        options = {**options, "reverse": False}
    check_forward(place, _case(6, 9, 24, dtype, D=D, **options))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("longest", [0, 3])
def test_steps_past_the_longest_sequence(place, longest, reverse):
    case = _case(5, 3, 12, torch.bfloat16, reverse=reverse)
    check_forward(place, case._replace(lengths=torch.tensor([1, 0, 3]).clamp(max=longest)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_and_unneeded_results(place, dtype):
    case = _case(4, 3, 16, dtype, scale=100.0)
    check_forward(place, case)
    whole, part = forward(place, case), forward(place, case, activations=False, cell_states=False)
    assert part[3].numel() == part[4].numel() == 0
    assert whole[3].shape == (4, 3, 64) and torch.isfinite(whole[3]).all()
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], part[:3], strict=True))


def test_states_and_weights_that_are_views_at_odd_addresses(place, monkeypatch):
    case = _case(2, 3, 8, torch.bfloat16)
    gates, h0, c0, weight_hh, _ = on(place, *case[:5])
    odd = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t) for t in (h0, weight_hh)]
    for kernel in ("cluster", "grid"):
        monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", kernel)
        call = (None, False, False, False, False)
        aligned = place.operators.lstm_recurrence_forward(gates, h0, c0, weight_hh, *call)
        outputs = place.operators.lstm_recurrence_forward(gates, odd[0], c0, odd[1], *call)
        assert all(torch.equal(a, b) for a, b in zip(aligned, outputs, strict=True))


def test_activations(place):
    """Saved i, f, g, o within the lengths reproduce c = f c_before + i g and h = o tanh(c)."""
    case = _case(5, 3, 24, torch.bfloat16, lengths="mixed")
    output, _, _, activations, cells = (t.float() for t in forward(place, case))
    i, f, g, o = activations.chunk(4, dim=-1)
    valid = (torch.arange(5).unsqueeze(1) < case.lengths).unsqueeze(-1)
    before = torch.cat((case.c0.float(), cells[:-1]))
    torch.testing.assert_close(
        torch.where(valid, f * before + i * g, 0), torch.where(valid, cells, 0), rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(torch.where(valid, o * cells.tanh(), 0), output, rtol=0.02, atol=0.02)


def test_no_steps(place):
    case = _case(0, 2, 16, torch.bfloat16)
    output, h_n, c_n, *_ = forward(place, case)
    assert output.shape == (0, 2, 16) and torch.equal(h_n, case.h0) and torch.equal(c_n, case.c0)


# Few multiprocessors: tiles of 16 and 32 sequences; more clusters than are resident; no cluster of 16, so twice the
# units and threads per block, and part of the weights in shared memory.
@pytest.mark.parametrize(
    ("multiprocessors", "shape", "dtype"),
    [
        (4, (3, 17, 16), torch.bfloat16),
        (4, (3, 33, 16), torch.float32),
        (2, (3, 70, 8), torch.float16),
        (8, (2, 2, 257), torch.bfloat16),
    ],
    ids=str,
)
def test_small_devices(multiprocessors, shape, dtype):
    with emulator.device(multiprocessors=multiprocessors):
        check_forward(place_of("host"), _case(*shape, dtype, lengths="mixed"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_on_small_devices(dtype):
    with emulator.device(multiprocessors=2):
        check_gradients(place_of("host"), _case(3, 33, 16, dtype, lengths="mixed"))


def test_shapes_that_do_not_fit_are_refused():
    host = place_of("host")
    case = _case(2, 2, 16, torch.bfloat16)
    with pytest.raises(RuntimeError, match="no CUDA kernel fits"):
        forward(host, recurrence(2, 2, 16))  # exact float32
    with pytest.raises(RuntimeError, match="no CUDA kernel fits"):
        forward(host, _case(1, 1, 520, torch.bfloat16))
    for limits in [{"capability": 80}, {"multiprocessors": 1}, {"shared_memory": 4 << 10}]:
        with emulator.device(**limits), pytest.raises(RuntimeError, match="no CUDA kernel fits"):
            forward(host, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_gives_the_same_bits(dtype):
    host, case = place_of("host"), _case(5, 9, 24, dtype, D=2, lengths="mixed")
    first = forward(host, case)
    valid = (torch.arange(5).unsqueeze(1) < case.lengths).unsqueeze(-1)
    for seed in range(20):
        with emulator.schedule(seed):
            again = forward(host, case, beside=seed % 2 == 1)
        for a, b in zip(first, again, strict=True):
            a, b = (torch.where(valid, t, 0) if t.dim() == 3 and len(t) == 5 else t for t in (a, b))
            assert torch.equal(a, b), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_gives_the_same_gradients(dtype):
    host, case = place_of("host"), _case(4, 9, 24, dtype, D=2, lengths="mixed")
    first = check_gradients(host, case)
    for seed in range(20):
        with emulator.schedule(seed):
            again = check_gradients(host, case, beside=seed % 2 == 1)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b), seed


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizers):
    run = emulator.sanitized(sanitizers, "race_lstm_cluster")
    assert run.returncode == 0, run.stdout + run.stderr
