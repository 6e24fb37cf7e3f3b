"""The compiled LSTM layer against a plain float64 loop: values, gradients, layouts, every path through the kernels."""

import copy
import gc
import random

import fuzz_native
import pytest
import torch
from native_cases import DIRECTIONS, DTYPES, LAYOUTS, Problem, check, dtype_id, ops, threads

from fastseq import _native
from fastseq.ops import lstm

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")

SHAPES = {  # T, B, I, H, with bias
    "T1B1I1H1": (1, 1, 1, 1, True),
    "T5B3I4H7": (5, 3, 4, 7, False),
    "T4B9I33H64": (4, 9, 33, 64, True),
    "T3B2I5H257": (3, 2, 5, 257, True),
    "T2B67I3H5": (2, 67, 3, 5, False),
}
# One shape per path that the kernels choose by size; see the constants in csrc/cpu.
PATHS = {  # T, B, I, H
    "rows of W in place": (20, 2, 40, 130),
    "rows of W_hh in place, W_ih packed": (100, 3, 20, 70),
    "panels of a short batch": (40, 4, 20, 70),
    "panels of 6 rows": (12, 6, 40, 130),
    "several blocks of the batch": (4, 150, 9, 20),
    "several chunks of inputs and depths": (120, 9, 5, 17),
    "several chunks of wide gates": (30, 9, 4, 200),
    "several chains, deep gradients": (3, 5, 300, 300),
    "one direction after the other": (6, 2, 9, 260),
    "panels of a team of threads": (2, 9, 9, 384),
    "inputs of one column": (9, 7, 1, 75),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_layer_matches_the_loop(dtype, shape, layout, direction):
    *sizes, bias = SHAPES[shape]
    check(Problem(*sizes, layout, dtype, direction, bias))


@pytest.mark.parametrize(("layout", "direction"), [("full", "forward"), ("lengths", "both"), ("packed", "reverse")])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_every_path_matches_the_loop(dtype, path, layout, direction):
    check(Problem(*PATHS[path], layout, dtype, direction))


# T, B, I, H, P, with bias: P of 1, of parts of vectors, of one panel and of several; blocks and teams of several sizes.
PROJECTIONS = {
    "rows of W in place": (5, 2, 3, 7, 1, True),
    "P wider than a vector": (20, 3, 40, 70, 33, False),
    "panels": (12, 9, 20, 130, 67, True),
    "odd depths in pairs": (6, 7, 5, 33, 31, True),
    "several blocks of the batch": (3, 150, 4, 20, 5, True),
    "several chunks of depths": (120, 9, 5, 17, 9, False),
    "several chains, several panels of P": (3, 6, 20, 300, 140, True),
    "panels of a team of threads": (2, 9, 9, 384, 200, True),
    "a panel that threads share by rows": (8, 7, 40, 130, 20, True),
}


@pytest.mark.parametrize(("layout", "direction"), [("full", "forward"), ("lengths", "both"), ("packed", "reverse")])
@pytest.mark.parametrize("shape", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_projection_matches_the_loop(dtype, shape, layout, direction):
    *sizes, projection, bias = PROJECTIONS[shape]
    check(Problem(*sizes, layout, dtype, direction, bias, projection))


# A product runs in tiles of one to six rows. Their heights depend on how threads divide the work, and on descheduled
# threads, so no bit of a result may depend on them.
@pytest.mark.parametrize(
    ("T", "batches"),
    [(1, range(1, 8)), (128, range(1, 4)), (32, range(5, 14))],
    ids=["rows of W in place", "rows of W_hh in place, W_ih packed", "panels"],
)
@pytest.mark.parametrize("projection", [0, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_other_rows_of_the_batch_change_nothing(dtype, projection, T, batches):
    widest = Problem(T, batches[-1], 40, 130, dtype=dtype, projection=projection)
    upstream = torch.randn(T, batches[-1], projection or 130).to(dtype)

    def first_row(B):
        problem = copy.copy(widest)
        problem.packed_x, problem.h0, problem.c0 = (t[:, :B].contiguous() for t in (widest.x, widest.h0, widest.c0))
        results = problem.forward()
        grads = problem.backward((upstream[:, :B].contiguous(), None, None, None), results[3:])
        return [t[:, 0] for t in (*results, *grads[:3])]

    expected = first_row(batches[0])
    for B in batches[1:]:
        for a, b in zip(first_row(B), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", fuzz_native.OPS)
def test_random_calls(op):
    rng = random.Random(1)
    for _ in range(40):
        case = fuzz_native.draw(rng, op, budget=2_000_000)
        try:
            fuzz_native.check(case)
        except AssertionError as error:
            raise AssertionError(f"{error}\nfuzz_native.check({case!r})") from error


@pytest.mark.parametrize("projection", [0, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_padding_is_exactly_zero(dtype, direction, projection):
    problem = Problem(5, 6, 2, 3, "lengths", dtype, direction, projection=projection)
    problem.x[torch.arange(5).unsqueeze(1) >= problem.lengths] = torch.nan  # must reach no result
    output, h_n, c_n, activations, cells = problem.forward()
    past = torch.arange(5).unsqueeze(1) >= problem.lengths
    grads = problem.backward((torch.ones_like(output), None, None, None), (activations, cells))
    for result in (output, cells, grads[0]):
        assert (result[past] == 0).all()
    assert not any(t.isnan().any() for t in (h_n, c_n, *grads[1:3], *grads[3]))
    empty = problem.lengths == 0
    assert empty.any()
    assert torch.equal(h_n[:, empty], problem.h0[:, empty])
    assert torch.equal(c_n[:, empty], problem.c0[:, empty])


@pytest.mark.parametrize("present", range(5), ids=["output", "h_n", "c_n", "cell_states", "none"])
@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_missing_gradient_counts_as_zero(direction, projection, present):
    problem = Problem(4, 3, 5, 7, "lengths", torch.float64, direction, projection=projection)
    output, h_n, c_n, activations, cells = problem.forward()
    upstream = [torch.randn_like(t) if i == present else None for i, t in enumerate((output, h_n, c_n, cells))]
    zeros = [torch.zeros_like(t) for t in (output, h_n, c_n, cells)]
    zeros = [zero if given is None else given for given, zero in zip(upstream, zeros, strict=True)]
    *actual, weights = problem.backward(upstream, (activations, cells))
    *expected, expected_weights = problem.backward(zeros, (activations, cells))
    for a, b in zip([*actual, *weights], [*expected, *expected_weights], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("need", [(False, False), (True, False), (False, True)], ids=str)
def test_results_not_needed_have_no_elements(need, direction, projection):
    problem = Problem(4, 3, 5, 7, direction=direction, projection=projection)
    D = len(problem.backwards)
    *results, activations, cells = problem.forward(*need)
    assert activations.shape == ((4, 3, D * (28 + projection)) if need[0] else (0,))
    assert cells.shape == ((4, 3, D * 7) if need[1] else (0,))
    expected = problem.forward()
    for a, b in zip(results, expected, strict=False):
        assert torch.equal(a, b)
    upstream = (expected[0], None, None, None)
    *grads, weights = problem.backward(upstream, expected[3:], *need)
    *all_grads, all_weights = problem.backward(upstream, expected[3:])
    assert grads[0].shape == ((4, 3, 5) if need[0] else (0,))
    assert len(weights) == (len(all_weights) if need[1] else 0)
    for a, b in zip([*grads[1:], *weights], [*all_grads[1:], *all_weights], strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("T", "B"), [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_empty_batch_or_no_steps(direction, T, B):
    h0 = torch.randn(len(DIRECTIONS[direction]), B, 5)
    weights = [torch.randn(20, 4), torch.randn(20, 5)] * len(h0)
    call = (torch.randn(T, B, 4), h0, 2 * h0, weights)
    sizes = (None, None, direction == "reverse")
    output, h_n, c_n, *saved = ops.lstm_forward(*call, *sizes, True, True)
    assert output.shape == (T, B, 5 * len(h0))
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, 2 * h0)
    *grads, grad_weights = ops.lstm_backward(None, 3 * h0, 4 * h0, None, *call, *saved, *sizes, True, True)
    assert grads[0].shape == (T, B, 4)
    assert torch.equal(grads[1], 3 * h0)
    assert torch.equal(grads[2], 4 * h0)
    assert all((grad == 0).all() for grad in grad_weights)


def test_no_packed_rows():
    empty, state = torch.tensor([], dtype=torch.int64), torch.randn(1, 2, 5)
    weights = [torch.randn(20, 4), torch.randn(20, 5)]
    output, h_n, *_ = ops.lstm_forward(torch.randn(0, 4), state, state, weights, None, empty, False, False, False)
    assert output.shape == (0, 5)
    assert torch.equal(h_n, state)


def test_strided_tensors_through_the_public_op():
    problem = Problem(6, 5, 9, 17)
    tensors = problem.x, problem.h0[0], problem.c0[0], *problem.weights
    strided = [torch.stack([t, t], -1)[..., 0].detach().requires_grad_() for t in tensors]
    plain = [t.detach().clone().requires_grad_() for t in tensors]
    results = []
    for x, h0, c0, *weights in (strided, plain):
        output, (h_n, c_n) = lstm(x, (h0, c0), *weights, backend="native")
        grads = torch.autograd.grad((output, h_n, c_n), (x, h0, c0, *weights), (output.mT.mT.clone(), h_n, c_n))
        results.append([output, h_n, c_n, *grads])
    assert not strided[0].is_contiguous()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B", [2, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_pre_activations_of_a_hundred(dtype, B):
    problem = Problem(4, B, 9, 17, dtype=dtype, direction="both")
    for bias in problem.weights[2::4]:
        bias.copy_(100 * (torch.randint(0, 3, bias.shape) - 1))
    assert all(t.isfinite().all() for t in problem.both())
    check(problem)


TINY = torch.finfo(torch.float32).tiny  # the smallest normal number; smaller ones count as zero


def denormals(*tensors):
    return sum(int(((t != 0) & (t.abs() < TINY)).sum()) for t in tensors)


@pytest.mark.parametrize("B", [2, 6])
def test_denormal_cell_states(B):
    problem = Problem(5, B, 9, 17)
    problem.c0.mul_(1e-40)
    for weight in problem.weights:
        weight[2 * 17 : 3 * 17] = 0  # g = 0: c stays denormal
    output, h_n, c_n, activations, cells = problem.forward()
    (exact, _, exact_c, _), _ = problem.loop(torch.float64)
    torch.testing.assert_close(c_n.double(), exact_c.detach(), rtol=0, atol=TINY)
    torch.testing.assert_close(output.double(), exact.detach(), rtol=0, atol=TINY)
    assert denormals(output, h_n, c_n, cells) == 0
    *grads, weights = problem.backward((output, h_n, c_n, cells), (activations, cells))
    assert all(t.isfinite().all() for t in (*grads, *weights))


@pytest.mark.parametrize("B", [2, 6])
@pytest.mark.parametrize("count", [1, 2])
def test_fading_gradients_contain_no_denormals(B, count):
    """An operation on denormals takes up to 150 cycles, which made a backward over many steps 50 times slower."""
    problem = Problem(200, B, 9, 17)
    with threads(count):
        output, h_n, c_n, activations, cells = problem.forward()
        grads = (
            torch.zeros_like(output),
            1e-20 * torch.randn_like(h_n),
            torch.zeros_like(c_n),
            torch.zeros_like(cells),
        )
        grad_input, grad_h0, grad_c0, _ = problem.backward(grads, (activations, cells))
        assert denormals(torch.full((100_000,), 1e-40) * 1) == 100_000  # the caller's threads are as before
    assert denormals(grad_input, grad_h0, grad_c0) == 0
    assert (grad_input == 0).any() and (grad_input != 0).any()


def test_results_outlive_later_calls():
    problem = Problem(50, 8, 40, 64, direction="both")  # large enough for the pool
    problem.both()  # leaves blocks in the pool
    kept = problem.both()
    copies = [t.clone() for t in kept]
    for _ in range(3):
        Problem(50, 8, 40, 64, direction="both").both()
    for a, b in zip(kept, copies, strict=True):
        assert torch.equal(a, b)
    del kept
    gc.collect()  # not between the two calls: it may free results of earlier tests
    assert ops.cpu_empty_cache() > 0
    assert ops.cpu_empty_cache() == 0
