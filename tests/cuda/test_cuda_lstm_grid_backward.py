"""Backward grid recurrence of csrc/cuda, on the host-side device and, if present, on a GPU."""

import emulator
import pytest
import torch
from cuda_cases import Recurrence, on, place_of, plain, recurrence
from torch import Tensor

from fastseq.testing.numerics import Results, compare, evaluate

LENGTHS, TF32, NO_TF32 = "mixed", True, False
KINDS = [(torch.float32, NO_TF32), (torch.float32, TF32), (torch.bfloat16, NO_TF32), (torch.float16, NO_TF32)]
NAMES = ["float32", "tf32", "bfloat16", "float16"]
GIVEN = ("output", "h_n", "c_n", "cell_states")  # results that may have a gradient


@pytest.fixture(autouse=True)
def _grid(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")


def saved(case: Recurrence) -> tuple[Tensor, Tensor]:
    """Compute what a forward kernel saves: activations (T, B, D * 4H), cell_states (T, B, D * H) in float32.

    NaN past the lengths, where a kernel writes nothing.
    """
    dtype = case.gates.dtype
    T, B, D, H = len(case.gates), *case.c0.shape[1::-1], case.c0.size(2)
    activations, cells = torch.empty(T, B, D, 4 * H), torch.empty(T, B, D, H)
    for d in range(D):
        h, c, weight = case.h0[d].float(), case.c0[d].float(), case.weight_hh[d].float()
        gates = case.gates.view(T, B, D, 4 * H)[:, :, d].float()
        for t in reversed(range(T)) if case.reverse or d == 1 else range(T):
            i, f, g, o = (gates[t] + h @ weight.T).chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c_t = f * c + i * g
            valid = torch.ones(B, 1, dtype=torch.bool) if case.lengths is None else (t < case.lengths).unsqueeze(1)
            activations[t, :, d] = torch.where(valid, torch.cat((i, f, g, o), 1), torch.nan)
            cells[t, :, d] = torch.where(valid, c_t, torch.nan)
            h, c = torch.where(valid, (o * c_t.tanh()).to(dtype).float(), h), torch.where(valid, c_t, c)
    return activations.to(dtype).view(T, B, D * 4 * H), cells.view(T, B, D * H)


def factors(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draw the gradients of these outputs as fastseq.testing.evaluate does."""
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for n, t in outputs.items()}


def run(place, case: Recurrence, given=GIVEN) -> dict[str, Tensor]:
    results, _ = plain(case, case.gates.dtype)
    grads = factors({n: results[n] for n in given})
    call = (*(grads.get(n) for n in GIVEN), *saved(case), case.c0, case.weight_hh, case.lengths)
    grads = place.operators.lstm_recurrence_backward(*on(place, *call), case.reverse, case.tf32)
    return dict(zip(("gates", "h0", "c0"), (t.cpu() for t in grads), strict=True))


def check(actual: dict[str, Tensor], case: Recurrence, given=GIVEN) -> None:
    """Check every gradient by the float64 rule."""
    oracles = []
    for dtype in (torch.float64, case.gates.dtype):
        results, leaves = plain(case, dtype)
        oracles.append(Results({}, evaluate({n: results[n] for n in given}, leaves).gradients))
    wrong = [str(c) for c in compare(Results({}, actual), *oracles) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=NAMES)
@pytest.mark.parametrize(
    ("T", "B", "H", "D", "lengths", "reverse"),
    [
        (1, 1, 1, 1, None, False),
        (5, 3, 16, 2, LENGTHS, False),
        (4, 17, 63, 1, LENGTHS, True),
        (6, 33, 20, 2, LENGTHS, False),
        (3, 9, 128, 1, None, False),
        (2, 2, 257, 1, LENGTHS, False),
    ],
)
def test_accuracy(place, T, B, H, D, lengths, reverse, dtype, tf32):
    case = recurrence(T, B, H, D, dtype, lengths, reverse, tf32)
    check(run(place, case), case)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=NAMES)
@pytest.mark.parametrize("given", [("output",), ("h_n", "cell_states"), ("c_n",)], ids=" ".join)
def test_missing_output_gradients_are_zero(place, given, dtype, tf32):
    case = recurrence(3, 4, 24, 2, dtype, LENGTHS, tf32=tf32)
    check(run(place, case, given), case, given)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=NAMES)
def test_saturated_gates(place, dtype, tf32):
    case = recurrence(4, 5, 32, 1, dtype, tf32=tf32, scale=100)
    check(run(place, case), case)


def test_no_steps(place):
    """With T = 0, grad_h0 = grad_h_n and grad_c0 = grad_c_n."""
    case = recurrence(0, 3, 8)
    nothing, grad_h, grad_c = torch.empty(0, 3, 32), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    call = (None, grad_h, grad_c, None, nothing, torch.empty(0, 3, 8), case.c0, case.weight_hh, None)
    gates, h0, c0 = place.operators.lstm_recurrence_backward(*on(place, *call), False, False)
    assert gates.shape == (0, 3, 32)
    torch.testing.assert_close((h0.cpu(), c0.cpu()), (grad_h, grad_c), rtol=0, atol=0)


SMALL_DEVICES = [  # multiprocessors, KiB of shared memory, dtype, tf32, T, B, H, D, path of the kernel
    (2, 227, torch.bfloat16, NO_TF32, 3, 77, 20, 1, "three passes over the rows"),
    (3, 48, torch.float32, TF32, 3, 41, 40, 1, "shared memory limits the rows of a pass"),
    (9, 8, torch.bfloat16, NO_TF32, 2, 16, 144, 1, "one tile a pass, more threads than cells"),
    (4, 227, torch.float32, NO_TF32, 3, 70, 60, 2, "blocks of 32 units, two directions, two passes"),
    (18, 227, torch.bfloat16, NO_TF32, 2, 3, 576, 1, "32 units, weights in shared memory"),
    (9, 227, torch.float32, TF32, 2, 3, 288, 1, "32 units, weights in shared memory"),
    (8, 227, torch.float32, NO_TF32, 2, 3, 256, 1, "32 units, weights in shared memory"),
    (132, 227, torch.float32, NO_TF32, 2, 2, 448, 1, "weights in shared memory"),
    (132, 227, torch.float32, TF32, 1, 2, 528, 1, "weights in shared memory"),
]


@pytest.mark.parametrize(
    ("multiprocessors", "kilobytes", "dtype", "tf32", "T", "B", "H", "D", "path"), SMALL_DEVICES, ids=str
)
def test_small_devices(multiprocessors, kilobytes, dtype, tf32, T, B, H, D, path):
    case = recurrence(T, B, H, D, dtype, LENGTHS, tf32=tf32)
    host = place_of("host")
    with emulator.device(multiprocessors, 80, kilobytes << 10):
        check(run(host, case), case)


def test_shapes_that_do_not_fit_are_refused():
    host = place_of("host")
    case = recurrence(1, 1, 100)
    for limits in ((3, 90, 227 << 10), (132, 75, 227 << 10), (132, 90, 1 << 10)):
        with emulator.device(*limits), pytest.raises(RuntimeError, match="no CUDA kernel fits batch 1"):
            run(host, case)
    with emulator.device(4, 80, 227 << 10):
        check(run(host, case), case)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=NAMES)
def test_any_order_of_threads_gives_the_same_bits(dtype, tf32):
    case = recurrence(3, 9, 40, 2, dtype, LENGTHS, tf32=tf32)
    host = place_of("host")
    with emulator.device(multiprocessors=6):
        first = run(host, case)
        for seed in range(20):
            with emulator.schedule(seed):
                again = run(host, case)
            torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_numbers_that_carry_a_tag_are_rounded_to_nearest():
    """All 16-bit numbers and points between them; float32 at random. NaN and infinity survive."""
    run = emulator.sanitized("", "tag_rounding")
    assert run.stdout == "ok\n" and run.returncode == 0, (run.stdout + run.stderr)[:4000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_parity_of_the_step_gives_the_same_bits(place, dtype):
    """The reader clears the tag: one more step past all lengths shifts all tags and changes no bit."""
    case = recurrence(4, 3, 24, dtype=dtype, lengths=LENGTHS)
    longer = case._replace(gates=torch.cat((case.gates, case.gates[:1])))
    first, second = run(place, case, ("h_n", "c_n")), run(place, longer, ("h_n", "c_n"))
    assert torch.equal(first["gates"], second["gates"][:4]) and torch.equal(first["h0"], second["h0"])


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizers):
    """Stand-alone program under ThreadSanitizer (races) and AddressSanitizer (bounds)."""
    run = emulator.sanitized(sanitizers, "race_lstm_grid_backward")
    assert run.returncode == 0, (run.stdout + run.stderr)[:4000]
