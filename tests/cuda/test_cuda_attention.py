"""Attention kernels of csrc/cuda, on the host-side device and, if present, on a GPU."""

import math

import emulator
import pytest
import torch
from attention_cases import REFUSED_CALLS, allowed_positions, make_padding
from cuda_cases import DTYPES, on, place_of

from fastseq import _native
from fastseq.ops.attention.api import attention, prepare_keys
from fastseq.testing.numerics import compare, evaluate, plain_attention

SCORES = ("dot", "additive")
PADDINGS = ("none", "lengths", "mask", "step_mask")
SHAPES = [  # B, T, S, A, D
    (2, 1, 1, 1, 1),
    (3, 1, 70, 64, 72),
    (2, 1, 131, 257, 63),
    (3, 1, 200, 16, 8),
    (3, 5, 9, 63, 16),
    (2, 33, 65, 128, 40),
    (2, 70, 130, 16, 136),
    (1, 40, 1, 1, 3),
]


def shape_id(shape):
    return "B{}T{}S{}A{}D{}".format(*shape)


def make_inputs(shape, score, dtype, spread=1.0):
    """Draw query, keys, values and, for the additive score, weight and bias; rounded to the dtype."""
    B, T, S, A, D = shape
    generator = torch.Generator().manual_seed(5)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = {"query": spread * draw(B, T, A), "keys": spread * draw(B, S, A), "values": draw(B, S, D)}
    if score == "dot":
        tensors["query"] /= A**0.5
    else:
        tensors |= {"weight": 2 * draw(A) / A**0.5, "bias": 0.1 * spread * draw(A)}
    return {name: x.to(dtype) for name, x in tensors.items()}


def padding_for(kind, shape):
    """Return lengths (B,) or None, mask (B, 1 or T, S) or None, and allowed (B, T, S)."""
    B, T, S, *_ = shape
    given = (
        {"lengths": torch.arange(B) * S // max(1, B - 1)} if kind == "lengths" else make_padding(kind, b=B, t=T, s=S)
    )
    mask = given.get("mask")
    mask = mask.unsqueeze(1) if kind == "mask" else mask
    return given.get("lengths"), mask, allowed_positions(given, b=B, t=T, s=S)


class Operators(torch.autograd.Function):
    """Runs attention_forward and attention_backward of a place. Returns context and weights (query's dtype) or None."""

    @staticmethod
    def forward(ctx, place, lengths, mask, scale, need_weights, query, keys, values, weight=None, bias=None):
        ctx.inputs = (*on(place, query, keys, values, weight, bias, lengths, mask), None)
        context, weights = place.operators.attention_forward(*ctx.inputs, scale, True)
        ctx.rest = place, weights, scale
        return context.cpu(), weights.to(query.dtype).cpu() if need_weights else None

    @staticmethod
    def backward(ctx, grad_context, grad_weights):
        place, weights, scale = ctx.rest
        grads = place.operators.attention_backward(
            *on(place, grad_context, grad_weights), *ctx.inputs, weights, scale, True, True
        )
        count = 5 if ctx.inputs[3] is not None else 3
        return *(None for _ in range(5)), *(g.cpu() for g in grads[:count])


def run(place, tensors, where, scale=1.0, need_weights=True):
    """Return outputs and gradients in the form of :func:`fastseq.testing.evaluate`."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = Operators.apply(place, *where[:2], scale, need_weights, *leaves.values())
    named = {name: x for name, x in zip(("context", "weights"), outputs, strict=True) if x is not None}
    return evaluate(named, leaves)


def plain(tensors, dtype, score, allowed, scale=1.0, need_weights=True):
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    context, weights = plain_attention(**leaves, score=score, scale=scale, allowed=allowed)
    return evaluate({"context": context, "weights": weights} if need_weights else {"context": context}, leaves)


def assert_accurate(place, tensors, score, where, scale=1.0, need_weights=True):
    dtype = tensors["query"].dtype
    oracle, baseline = (plain(tensors, d, score, where[2], scale, need_weights) for d in (torch.float64, dtype))
    wrong = [str(c) for c in compare(run(place, tensors, where, scale, need_weights), oracle, baseline) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(place, dtype, score, shape, kind):
    assert_accurate(place, make_inputs(shape, score, dtype), score, padding_for(kind, shape), 0.7, kind != "mask")


@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.4, 3.0, 100.0])
@pytest.mark.parametrize("shape", [(4, 1, 40, 100, 16), (2, 8, 40, 96, 32)], ids=shape_id)
def test_tanh_of_any_size_keeps_its_digits(place, shape, spread):
    """Covers the three formulations of tanh: addition, exponential, direct."""
    tensors = make_inputs(shape, "additive", torch.float32, spread)
    assert_accurate(place, tensors, "additive", padding_for("lengths", shape))


def test_opposite_hundreds_cancel(place):
    small = torch.linspace(-3, 3, 40).view(1, 8, 5)
    query = torch.full((1, 6, 5), 100.0) + torch.linspace(-1, 1, 6).view(1, 6, 1)
    keys, weight = small - 100, torch.linspace(-1, 1, 5)
    call = on(place, query, keys, keys, weight)
    context, weights = place.operators.attention_forward(*call, None, None, None, None, 1.0, True)
    exact = torch.softmax(torch.tanh(query.double()[:, :, None] + keys.double()[:, None]) @ weight.double(), -1)
    torch.testing.assert_close(weights.cpu().double(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(context.cpu().double(), exact @ keys.double(), rtol=1e-6, atol=1e-5)


def sliced(x):
    """Return x as a slice of a larger tensor of NaN: contiguous rows at unaligned addresses."""
    bigger = torch.full((x.size(0) + 1, 2 * x.size(1) + 1, x.size(2) + 3), math.nan, dtype=x.dtype)
    return bigger[1:, 1::2, 2:-1].copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "layout", [sliced, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.contiguous().mT]
)
def test_strides(place, layout, score, steps, dtype):
    shape = (3, steps, 20, 24, 16)
    tensors, where = make_inputs(shape, score, dtype), padding_for("step_mask", shape)
    changed = {name: layout(x) if x.dim() == 3 else x for name, x in tensors.items()}
    where = (None, sliced(where[1].to(torch.float32)).bool(), where[2])
    for actual, expected in zip(run(place, changed, where), run(place, tensors, where), strict=True):
        assert actual.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(actual[name], x, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("kind", PADDINGS[1:])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("score", SCORES)
def test_padding_changes_no_bit(place, score, steps, kind, garbage):
    shape = (3, steps, 19, 24, 20)
    tensors, where = make_inputs(shape, score, torch.float32), padding_for(kind, shape)
    unused = ~where[2].any(1)[..., None]
    assert unused.any()
    filled = tensors | {name: tensors[name].masked_fill(unused, garbage) for name in ("keys", "values")}
    expected, actual = run(place, tensors, where), run(place, filled, where)
    for group, others in zip(expected, actual, strict=True):
        for name, x in group.items():
            assert torch.equal(x, others[name]), name
    for name in ("keys", "values"):
        grad = actual.gradients[name]
        assert (grad.masked_select(unused) == 0).all(), name
        assert (grad.masked_select(~unused) != 0).all(), name
    assert (actual.outputs["weights"].masked_select(~where[2]) == 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("steps", [1, 3])
def test_masked_rows_are_exactly_zero(place, score, steps):
    shape = (4, steps, 6, 5, 7)
    mask = torch.ones(4, steps, 6, dtype=torch.bool)
    mask[0], mask[2, 0] = False, False
    outputs, gradients = run(place, make_inputs(shape, score, torch.float32), (None, mask, mask))
    for result in (*outputs.values(), gradients["query"]):
        assert (result[0] == 0).all()
        assert (result[2, 0] == 0).all()
        assert (result[1] != 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [1, 3])
def test_infinite_and_nan_keys_propagate_as_in_torch(place, steps, value):
    tensors = make_inputs((2, steps, 5, 6, 3), "additive", torch.float32)
    tensors["keys"][0, 0, 2] = value
    expected = plain_attention(**tensors, score="additive")
    arguments = on(place, *tensors.values(), None, None, None)
    actual = [x.cpu() for x in place.operators.attention_forward(*arguments, 1.0, True)]
    torch.testing.assert_close(actual, list(expected), equal_nan=True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("steps", [1, 5])
def test_unneeded_gradients_are_not_computed(place, score, steps):
    tensors = make_inputs((2, steps, 70, 16, 24), score, torch.float32)
    inputs = on(place, *tensors.values(), *[None] * (8 - len(tensors)))
    context, weights = place.operators.attention_forward(*inputs, 1.0, False)
    assert weights.shape == (0,)
    full, weights = place.operators.attention_forward(*inputs, 1.0, True)
    assert torch.equal(context, full)
    everything = place.operators.attention_backward(full, None, *inputs, weights, 1.0, True, True)
    for scores, values in ((True, False), (False, True)):
        grads = place.operators.attention_backward(full, None, *inputs, weights, 1.0, scores, values)
        additive = scores and score == "additive"
        for grad, whole, need in zip(grads, everything, (scores, scores, values, additive, additive), strict=True):
            assert torch.equal(grad, whole) if need else grad.shape == (0,)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)], ids=str)
def test_empty_batch_steps_or_positions(place, score, sizes):
    tensors = make_inputs((*sizes, 5, 4), score, torch.float32)
    outputs, gradients = run(place, tensors, (None, None))
    assert [x.shape for x in outputs.values()] == [(*sizes[:2], 4), sizes]
    assert (outputs["context"] == 0).all()
    assert all((g == 0).all() and g.shape == tensors[name].shape for name, g in gradients.items())


@pytest.mark.parametrize("steps", [1, 2])
def test_values_without_columns(place, steps):
    tensors = make_inputs((2, steps, 3, 5, 0), "additive", torch.float32)
    assert_accurate(place, tensors, "additive", (None, None, torch.ones(2, steps, 3, dtype=torch.bool)))


@pytest.mark.parametrize("steps", [1, 3])
def test_wide_values_are_summed_up_in_blocks_of_columns(steps):
    """Sums of all columns exceed the shared memory of a block, 100 KiB here."""
    shape = (2, steps, 70, 8, 2056 if steps == 1 else 520)
    tensors, where = make_inputs(shape, "additive", torch.float32), padding_for("lengths", shape)
    with emulator.device(shared_memory=100 << 10):
        assert_accurate(place_of("host"), tensors, "additive", where)


@pytest.mark.parametrize("score", SCORES)
def test_one_step_on_few_and_on_many_multiprocessors(score):
    """No split of the positions, and several that are combined."""
    shape = (3, 1, 300, 24, 40)
    tensors, where = make_inputs(shape, score, torch.float32), padding_for("lengths", shape)
    for multiprocessors in (1, 5, 132):
        with emulator.device(multiprocessors):
            assert_accurate(place_of("host"), tensors, score, where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", [(2, 1, 130, 40, 72), (2, 35, 70, 24, 72)], ids=shape_id)
def test_any_order_of_threads_gives_the_same_bits(shape, score, dtype):
    host, tensors, where = place_of("host"), make_inputs(shape, score, dtype), padding_for("step_mask", shape)
    expected = run(host, tensors, where)
    for seed in range(20):
        with emulator.schedule(seed):
            actual = run(host, tensors, where)
        for group, others in zip(expected, actual, strict=True):
            for name, x in group.items():
                assert torch.equal(x, others[name]), f"{name}, seed {seed}"


@pytest.mark.parametrize("steps", [1, 2])
def test_keys_further_apart_than_an_int_reaches(steps):
    """Only the pages of the rows themselves are allocated."""
    shape = (2, steps, 3, 8, 8)
    tensors, where = make_inputs(shape, "additive", torch.bfloat16), padding_for("none", shape)
    far = torch.empty(2**31 + 64 + 3 * 8, dtype=torch.bfloat16).as_strided((2, 3, 8), (2**31 + 64, 8, 1))
    expected = run(place_of("host"), tensors, where)
    actual = run(place_of("host"), tensors | {"keys": far.copy_(tensors["keys"])}, where)
    assert torch.equal(expected.outputs["context"], actual.outputs["context"])
    assert torch.equal(expected.gradients["keys"], actual.gradients["keys"])


def test_lengths_outside_the_tensor_are_clamped(place):
    query, keys = torch.randn(2, 1, 4), torch.randn(2, 5, 4)
    results = []
    for lengths in ([5, 0], [2**40, -7]):
        call = on(place, query, keys, keys, None, None, torch.tensor(lengths), None, None)
        results.append(place.operators.attention_forward(*call, 1.0, True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_prepared(place):
    keys, query, weight = on(place, torch.randn(2, 5, 4), torch.randn(2, 1, 4), torch.randn(4))
    prepared = place.operators.attention_prepare(keys, None)
    assert prepared.shape == (0,)
    expected, actual = (
        place.operators.attention_forward(query, keys, keys, weight, None, None, None, given, 1.0, False)[0]
        for given in (None, prepared)
    )
    assert torch.equal(actual, expected)
    with pytest.raises(RuntimeError, match=r"prepared must be what attention_prepare returned on this device: \(0,\)"):
        place.operators.attention_forward(query, keys, keys, weight, None, None, None, keys, 1.0, False)


BAD_CALLS = REFUSED_CALLS | {
    "bias of dot": (dict(weight=None, bias=torch.zeros(4)), "belongs to the additive score; pass weight"),
    "double": (
        {n: torch.zeros(s).double() for n, s in (("query", (2, 3, 4)), ("keys", (2, 5, 4)), ("values", (2, 5, 6)))}
        | {"weight": None},
        "must be Float, BFloat16 or Half, got Double",
    ),
}
ARGUMENTS = {
    "query": torch.zeros(2, 3, 4),
    "keys": torch.zeros(2, 5, 4),
    "values": torch.zeros(2, 5, 6),
    "weight": torch.zeros(4),
    **dict.fromkeys(("bias", "lengths", "mask", "prepared")),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_arguments_are_refused_with_a_sentence(place, changes, message):
    arguments = on(place, *(ARGUMENTS | changes).values())
    with pytest.raises(RuntimeError, match=f"attention_forward: .*{message}"):
        place.operators.attention_forward(*arguments, 1.0, True)
    grad, weights = on(place, torch.zeros(2, 3, 6), torch.zeros(2, 3, 5))
    with pytest.raises(RuntimeError, match=f"attention_backward: .*{message}"):
        place.operators.attention_backward(grad, None, *arguments, weights, 1.0, True, True)


@pytest.mark.parametrize(("i", "name"), [(0, "grad_context"), (1, "grad_weights"), (10, "weights")])
def test_backward_refuses_gradients_of_another_shape(place, i, name):
    arguments = [torch.zeros(2, 3, 6), torch.zeros(2, 3, 5), *ARGUMENTS.values(), torch.zeros(2, 3, 5)]
    for wrong in (torch.zeros(2, 3, 7), arguments[i].double()):
        changed = on(place, *arguments[:i], wrong, *arguments[i + 1 :])
        with pytest.raises(RuntimeError, match=f"attention_backward: {name} must have the"):
            place.operators.attention_backward(*changed, 1.0, True, True)


@pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
@pytest.mark.parametrize("score", SCORES)
def test_the_public_op_runs_them(score):
    """One mask for all steps, values without gradients, keys not prepared."""
    tensors, (_, mask, allowed) = make_inputs((3, 2, 9, 6, 5), score, torch.float32), padding_for("mask", (3, 2, 9))
    leaves = {name: x.requires_grad_(name != "values") for name, x in tensors.items()}
    with emulator.as_native():
        assert prepare_keys(tensors["keys"], score=score, backend="native").prepared is None
        outputs = attention(**leaves, score=score, mask=mask.squeeze(1), need_weights=True, backend="native")
        grads = torch.autograd.grad(outputs[0].square().sum(), [x for x in leaves.values() if x.requires_grad])
    expected = plain_attention(**leaves, score=score, allowed=allowed)
    wanted = torch.autograd.grad(expected[0].square().sum(), [x for x in leaves.values() if x.requires_grad])
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizers):
    """No race within a block, no access out of bounds or misaligned, in three shuffled schedules."""
    run = emulator.sanitized(sanitizers, "race_attention")
    assert run.returncode == 0, run.stdout + run.stderr
