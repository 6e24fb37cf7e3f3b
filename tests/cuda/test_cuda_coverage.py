"""Attention kernels with coverage of csrc/cuda, on the host-side device and, if present, on a GPU."""

import math

import emulator
import pytest
import torch
from cuda_cases import DTYPES, on, place_of
from test_cuda_attention import make_inputs as make_plain
from test_cuda_attention import padding_for, shape_id, sliced

from fastseq import _native
from fastseq.ops.attention.api import attention
from fastseq.testing.numerics import compare, evaluate, plain_attention

SHAPES = [  # B, T, S, A, D: one step, several splits of the positions, tiles of 8, 16, 32 and 64, several parts
    (2, 1, 1, 1, 1),
    (3, 1, 131, 72, 40),
    (2, 33, 70, 63, 16),
    (2, 9, 130, 40, 8),
]


def make_inputs(shape, dtype):
    """Draw query, keys, values, weight, bias, coverage (B, T, S) >= 0 and coverage_weight (A,)."""
    generator = torch.Generator().manual_seed(11)
    coverage = torch.rand(shape[:3], generator=generator, dtype=torch.float64)
    vector = torch.randn(shape[3], generator=generator, dtype=torch.float64)
    return make_plain(shape, "additive", dtype) | {"coverage": coverage.to(dtype), "coverage_weight": vector.to(dtype)}


class Operators(torch.autograd.Function):
    """Runs both operators of a place -> context, weights in the dtype of the query."""

    @staticmethod
    def forward(ctx, place, lengths, mask, scale, *leaves):
        query, keys, values, weight, bias, coverage, vector = leaves
        ctx.inputs = on(place, query, keys, values, weight, bias, lengths, mask, coverage, vector)
        context, weights = place.operators.attention_coverage_forward(*ctx.inputs, scale, True)
        ctx.rest = place, weights, scale
        return context.cpu(), weights.to(query.dtype).cpu()

    @staticmethod
    def backward(ctx, *grads):
        place, weights, scale = ctx.rest
        grads = place.operators.attention_coverage_backward(*on(place, *grads), *ctx.inputs, weights, scale, True, True)
        return *(None for _ in range(4)), *(g.cpu() for g in grads)


def run(place, tensors, where, scale=1.0):
    """Return outputs and gradients in the form of :func:`fastseq.testing.evaluate`."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    context, weights = Operators.apply(place, *where[:2], scale, *leaves.values())
    return evaluate({"context": context, "weights": weights}, leaves)


def plain(tensors, dtype, allowed, scale):
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    context, weights = plain_attention(**leaves, score="additive", scale=scale, allowed=allowed)
    return evaluate({"context": context, "weights": weights}, leaves)


def assert_same_bits(expected, actual):
    for group, others in zip(expected, actual, strict=True):
        for name, x in group.items():
            assert torch.equal(x, others[name]), name


@pytest.mark.parametrize("kind", ["lengths", "step_mask"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(place, dtype, shape, kind):
    tensors, where = make_inputs(shape, dtype), padding_for(kind, shape)
    oracle, baseline = (plain(tensors, d, where[2], 0.7) for d in (torch.float64, dtype))
    wrong = [str(c) for c in compare(run(place, tensors, where, 0.7), oracle, baseline) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("layout", [sliced, lambda x: x.mT.contiguous().mT])
def test_strides(place, layout, steps):
    shape = (3, steps, 20, 24, 16)
    tensors, where = make_inputs(shape, torch.float32), padding_for("lengths", shape)
    changed = {name: layout(x) if x.dim() == 3 else x for name, x in tensors.items()}
    for actual, expected in zip(run(place, changed, where), run(place, tensors, where), strict=True):
        for name, x in expected.items():
            torch.testing.assert_close(actual[name], x, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("steps", [1, 4])
def test_padding_changes_no_bit(place, steps, kind):
    shape = (3, steps, 19, 24, 20)
    tensors, where = make_inputs(shape, torch.float32), padding_for(kind, shape)
    filled = {name: x.clone() for name, x in tensors.items()}
    filled["coverage"][~where[2]] = math.nan
    for name in ("keys", "values"):
        filled[name][~where[2].any(1)] = math.nan
    expected, actual = run(place, tensors, where), run(place, filled, where)
    assert_same_bits(expected, actual)
    assert (actual.gradients["coverage"].masked_select(~where[2]) == 0).all()
    assert (actual.gradients["coverage"].masked_select(where[2]) != 0).any()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 1, 4), (2, 0, 3, 1, 4), (2, 2, 0, 1, 4), (2, 2, 3, 0, 4), (2, 2, 3, 1, 0)])
def test_empty_sizes(place, sizes):
    tensors = make_inputs((*sizes[:3], 1, sizes[4]), torch.float32)
    tensors |= {name: tensors[name][..., : sizes[3]] for name in ("query", "keys", "weight", "bias", "coverage_weight")}
    outputs, gradients = run(place, tensors, (None, None))
    assert [x.shape for x in outputs.values()] == [(*sizes[:2], sizes[4]), sizes[:3]]
    assert all(g.shape == tensors[name].shape and not g.isnan().any() for name, g in gradients.items())
    if sizes[3] == 0:
        assert (gradients["coverage"] == 0).all()


def test_unneeded_gradients_are_not_computed(place):
    tensors = make_inputs((2, 3, 9, 16, 8), torch.float32)
    leaves = list(tensors.values())
    inputs = on(place, *leaves[:5], None, None, *leaves[5:])
    context, weights = place.operators.attention_coverage_forward(*inputs, 1.0, False)
    assert weights.shape == (0,)
    full, weights = place.operators.attention_coverage_forward(*inputs, 1.0, True)
    assert torch.equal(context, full)
    everything = place.operators.attention_coverage_backward(full, None, *inputs, weights, 1.0, True, True)
    for scores, values in ((True, False), (False, True)):
        grads = place.operators.attention_coverage_backward(full, None, *inputs, weights, 1.0, scores, values)
        needs = (scores, scores, values, *[scores] * 4)
        for grad, whole, need in zip(grads, everything, needs, strict=True):
            assert torch.equal(grad, whole) if need else grad.shape == (0,)


def test_one_step_on_few_and_on_many_multiprocessors():
    """No split of the positions, and several that are combined; context columns in two blocks."""
    shape = (2, 1, 200, 8, 2056)
    tensors, where, host = make_inputs(shape, torch.bfloat16), padding_for("lengths", shape), place_of("host")
    oracle, baseline = (plain(tensors, d, where[2], 1.0) for d in (torch.float64, torch.bfloat16))
    for multiprocessors in (1, 5):
        with emulator.device(multiprocessors):
            wrong = [str(c) for c in compare(run(host, tensors, where), oracle, baseline) if not c.ok]
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("shape", [(2, 1, 70, 40, 8), (1, 17, 70, 40, 8)], ids=shape_id)
def test_any_order_of_threads_gives_the_same_bits(shape):
    host, tensors, where = place_of("host"), make_inputs(shape, torch.bfloat16), padding_for("step_mask", shape)
    expected = run(host, tensors, where)
    for seed in range(6):
        with emulator.schedule(seed):
            assert_same_bits(expected, run(host, tensors, where))


@pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
def test_the_public_op_runs_them():
    tensors, (_, mask, allowed) = make_inputs((3, 2, 9, 6, 5), torch.float32), padding_for("mask", (3, 2, 9))
    leaves = {name: x.requires_grad_(name != "values") for name, x in tensors.items()}
    given = [x for x in leaves.values() if x.requires_grad]
    with emulator.as_native():
        outputs = attention(**leaves, score="additive", mask=mask.squeeze(1), need_weights=True, backend="native")
        grads = torch.autograd.grad(outputs[0].square().sum(), given)
    expected = plain_attention(**leaves, score="additive", allowed=allowed)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected[0].square().sum(), given))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("coverage", torch.zeros(2, 3, 4), r"coverage must have the shape \(2, 3, 5\)"),
        ("coverage", torch.zeros(3, 5), r"coverage must have the shape \(B, T, S\)"),
        ("coverage_weight", torch.zeros(5), r"coverage_weight must have the shape \(4,\)"),
        ("coverage", torch.zeros(2, 3, 5).bfloat16(), "coverage must have the dtype Float"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(place, name, wrong, message):
    tensors = make_inputs((2, 3, 5, 4, 6), torch.float32) | {name: wrong}
    leaves = list(tensors.values())
    with pytest.raises(RuntimeError, match=f"attention_coverage_forward: {message}"):
        place.operators.attention_coverage_forward(*on(place, *leaves[:5], None, None, *leaves[5:]), 1.0, True)
