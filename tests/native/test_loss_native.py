"""The compiled linear_cross_entropy: chunks of rows, threads, opcheck, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from operator_calls import linear_cross_entropy_backward, linear_cross_entropy_forward

from fastseq import _native
from fastseq.ops.linear_cross_entropy import linear_cross_entropy
from fastseq.testing.numerics import assert_all_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
ops = _native.operators
CHUNK = 24 << 20  # bytes of logits in one chunk, as in csrc/cpu/ops/linear_cross_entropy.cpp


def outcome(call, tensors, dtype, factors):
    """Losses of rows and of the sum, and the gradients of both."""
    given = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    each, total = call(**given, reduction="none"), call(**given, reduction="sum")
    loss = (factors * each.double()).sum() + total.double()
    grads = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
    return {"each": each.detach(), "total": total.detach()}, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_several_chunks(dtype, ignored):
    """V = 100,000: a chunk is 62 rows of float32, so that 150 rows are 3 chunks."""
    torch.manual_seed(0)
    N, V, H = 150, 100_000, 4
    assert N * V * 4 > 2 * CHUNK
    target = torch.where(torch.rand(N) < ignored, -100, torch.randint(V, (N,)))
    tensors = {"input": torch.randn(N, H), "weight": torch.randn(V, H) / 2, "bias": torch.randn(V)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    factors, options = torch.rand(N).double(), {"target": target, "label_smoothing": 0.1}

    def ours(**given):
        return linear_cross_entropy(**given, **options, backend="native")

    def plain(input, weight, bias, target, **more):
        logits = F.linear(input, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **more)

    def theirs(**given):
        return plain(**given, **options)

    sides = ((ours, dtype), (theirs, torch.float64), (theirs, dtype))
    outcomes = [outcome(call, tensors, width, factors) for call, width in sides]
    assert_all_accurate(*(values for values, _ in outcomes), factor=2)
    assert_all_accurate(*(grads for _, grads in outcomes), factor=3)


def test_results_do_not_depend_on_the_number_of_threads():
    """With small integers, whose products are exact: those are torch's, and BLAS may sum in another order."""
    x, weight, bias = (torch.randint(-3, 4, shape).float() for shape in ((200, 16), (3000, 16), (3000,)))
    arguments = x, weight, bias, torch.randint(3000, (200,)), -100, 0.1, False, False, True
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.linear_cross_entropy_forward(*arguments))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_probabilities_too_small_for_a_product_are_zero():
    """Logits 0 and -70 in float32: the gradient of the second is 0, not a number whose products are denormal."""
    weight = torch.tensor([[0.0], [-70.0]])
    arguments = torch.ones(1, 1), weight, None, torch.tensor([0]), -100, 0.0, False, True, False
    losses, _, _, grad, _ = ops.linear_cross_entropy_forward(*arguments)
    assert losses.item() == 0
    assert grad[1].item() == 0


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, needs):
    def cast(arguments):
        return (
            t.to(dtype) if isinstance(t, torch.Tensor) and t.dim() and t.dtype == torch.float32 else t
            for t in arguments
        )

    *forward, _, _, _ = cast(linear_cross_entropy_forward())
    torch.library.opcheck(ops.linear_cross_entropy_forward.default, (*forward, *needs))
    grad, statistics, *rest, _, _, _ = linear_cross_entropy_backward()
    torch.library.opcheck(ops.linear_cross_entropy_backward.default, (grad, statistics, *cast(rest), *needs))


BAD_CALLS = {
    "rank": (0, torch.zeros(5), r"input must have the shape \(N, H\), got \(5,\)"),
    "weight": (1, torch.zeros(7, 3), r"weight must have the shape \(7, 4\), got \(7, 3\)"),
    "no classes": (1, torch.zeros(0, 4), r"bias must have the shape \(0,\)"),
    "bias": (2, torch.zeros(6), r"bias must have the shape \(7,\), got \(6,\)"),
    "rows": (3, torch.zeros(4, dtype=torch.int64), r"target must have the shape \(5,\), got \(4,\)"),
    "target": (3, torch.zeros(5, dtype=torch.int32), "target must have the dtype Long, got Int"),
    "class": (
        3,
        torch.tensor([0, 1, 2, 3, 7]),
        r"target must lie in 0 .. 6 or be ignore_index = -100, .*target\[4\] = 7",
    ),
    "stride": (0, torch.zeros(4, 5).t(), "input must be contiguous"),
}


@pytest.mark.parametrize(("position", "value", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_arguments_get_a_sentence(position, value, message):
    arguments = list(linear_cross_entropy_forward())
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"linear_cross_entropy_forward: {message}"):
        ops.linear_cross_entropy_forward(*arguments)
