"""Coverage of the additive scores: the attention that each position has got so far, as a term inside the tanh."""

import pytest
import torch
from attention_cases import PADDINGS, allowed_positions, formula, gradients, make_inputs, make_padding
from backends import serving_attention
from torch import nn

import fastseq
from fastseq.nn.attention import Attention
from fastseq.ops.attention import attention, reference
from fastseq.ops.attention.spec import Grads, InputGrads, Inputs, Want
from fastseq.testing.numerics import assert_all_accurate, plain_attention

BACKENDS = serving_attention(coverage=True)
WITH_FUNCTION = [name for name in BACKENDS if name != "torch"]
SCORES = ("additive", "normed_additive")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_follow_the_formula(backend, score, padding):
    tensors, where = make_inputs(score, coverage=True), make_padding(padding)
    expected = formula(**tensors, score=score, allowed=allowed_positions(where), scale=0.7)
    actual = attention(**tensors, score=score, **where, scale=0.7, need_weights=True, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("shape", [{"t": 1}, {"s": 1}, {"a": 1}, {"d": 1}, {"b": 1}, {"a": 67, "s": 140}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_awkward_shapes(backend, shape):
    tensors = make_inputs("additive", **shape, coverage=True)
    sizes = {k: v for k, v in shape.items() if k in "bts"}
    where = make_padding("lengths", **sizes)
    expected = formula(**tensors, score="additive", allowed=allowed_positions(where, **sizes))
    actual = attention(**tensors, score="additive", **where, need_weights=True, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("padding", PADDINGS)
def test_written_backward_equals_autograd(padding):
    tensors, where = make_inputs("additive", coverage=True), make_padding(padding)
    leaves = [tensors[name] for name in InputGrads._fields]
    mask = where.get("mask")
    masks = (where.get("lengths"), mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else mask)
    inputs = Inputs(*leaves[:5], *masks, None, 0.7, *leaves[5:])
    context, weights, saved = reference.forward(inputs, Want(weights=True, backward=True))
    grads = Grads(torch.randn_like(context), torch.randn_like(weights))
    expected = torch.autograd.grad([context, weights], list(tensors.values()), grads)
    with torch.no_grad():
        actual = reference.backward(inputs, saved, grads, InputGrads(*[True] * 7))
    torch.testing.assert_close(tuple(actual), expected)


@pytest.mark.parametrize("padding", ["none", "step_mask"])
@pytest.mark.parametrize("backend", WITH_FUNCTION)
def test_first_and_second_derivative_numerically(backend, padding):
    tensors = make_inputs("additive", b=2, t=2, s=3, a=2, d=2, coverage=True)
    where = make_padding(padding, b=2, t=2, s=3)

    def run(*values):
        given = dict(zip(tensors, values, strict=True))
        return attention(**given, score="additive", **where, need_weights=True, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_in_every_dtype(backend, dtype):
    sizes = {"b": 3, "t": 5, "s": 19}
    where = make_padding("lengths", **sizes)
    allowed, draws = allowed_positions(where, **sizes), []
    for _ in range(8):  # in a single draw torch's error may be small by chance
        tensors = make_inputs("additive", **sizes, a=33, d=33, dtype=dtype, coverage=True)
        wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        options = {"score": "additive", "allowed": allowed}
        outputs = (
            (attention(**tensors, score="additive", **where, need_weights=True, backend=backend), tensors),
            (formula(**wide, **options), wide),
            (plain_attention(**tensors, **options), tensors),
        )
        grads = [gradients(result, leaves) for result, leaves in outputs]
        draws.append([(result, grad) for (result, _), grad in zip(outputs, grads, strict=True)])
    names = ("context", "weights"), tuple(tensors)
    for kind, factor in ((0, 2), (1, 3)):
        sides = [
            {name: torch.stack([draw[side][kind][k] for draw in draws]) for k, name in enumerate(names[kind])}
            for side in range(3)
        ]
        assert_all_accurate(*sides, factor=factor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    tensors, where = make_inputs("additive", coverage=True), make_padding("lengths")
    expected = attention(**tensors, score="additive", **where, need_weights=True, backend=backend)
    outside = ~allowed_positions(where)
    changed = {name: x.detach().clone() for name, x in tensors.items()}
    changed["coverage"][outside] = torch.nan
    for name in ("keys", "values"):
        changed[name][outside[:, 0]] = torch.nan
    changed = {name: x.requires_grad_() for name, x in changed.items()}
    actual = attention(**changed, score="additive", **where, need_weights=True, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, changed), gradients(expected, tensors))


def test_samples_of_vmap():
    tensors = {k: v.detach() for k, v in make_inputs("additive", coverage=True).items()}
    coverages = torch.stack([tensors["coverage"], 2 * tensors["coverage"]])
    weights = torch.stack([tensors["coverage_weight"], -tensors["coverage_weight"]])

    def run(coverage, weight):
        given = tensors | {"coverage": coverage, "coverage_weight": weight}
        return attention(**given, score="additive", backend="reference")[0]

    torch.testing.assert_close(
        torch.func.vmap(run, (0, None))(coverages, weights[0]), torch.stack([run(c, weights[0]) for c in coverages])
    )
    torch.testing.assert_close(
        torch.func.vmap(run)(coverages, weights), torch.stack(list(map(run, coverages, weights)))
    )


def test_a_module_with_coverage():
    torch.manual_seed(0)
    module = Attention(4, 6, attention_size=5, coverage=True).double()
    assert "coverage=True" in repr(module) and module.coverage_weight.abs().max() <= 5**-0.5
    query, keys, coverage = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4), (2, 3, 6), (2, 3)))
    context, weights = module(query, keys, coverage=coverage, need_weights=True)
    inner = module.query_proj(query)[:, None] + module.key_proj(keys) + coverage[..., None] * module.coverage_weight
    expected = (inner.tanh() @ module.v).softmax(-1)
    torch.testing.assert_close((weights, context), (expected, (expected[:, None] @ keys)[:, 0]))
    prepared = module.project_keys(keys, single_steps=True)
    torch.testing.assert_close(module(query, prepared, keys, coverage=coverage)[0], context)
    with pytest.raises(ValueError, match="coverage must be given"):
        module(query, keys)
    with pytest.raises(ValueError, match="no coverage was learnt"):
        Attention(4, 6)(query.float(), keys.float(), coverage=coverage)
    with pytest.raises(ValueError, match="'dot' has no use for coverage"):
        Attention(4, 4, score="dot", coverage=True)


def test_the_choice_is_explained():
    module = Attention(4, 4, coverage=True)
    report = str(fastseq.explain(module, torch.zeros(2, 4), torch.zeros(2, 3, 4), coverage=torch.zeros(2, 3)))
    assert "attention" in report
    for backend in set(serving_attention()) - set(BACKENDS):
        with pytest.raises(RuntimeError, match="has no coverage"):
            attention(**make_inputs("additive", coverage=True), score="additive", backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (dict(coverage=None), ValueError, "belong together"),
        (dict(score="dot", weight=None, bias=None), ValueError, "score 'dot' has no coverage"),
        (dict(coverage=torch.zeros(3, 4, 6).double()), RuntimeError, r"coverage must be \(3, 4, 5\) = \(B, T, S\)"),
        (dict(coverage_weight=torch.zeros(5).double()), RuntimeError, r"coverage_weight must be \(6,\)"),
        (dict(coverage=torch.zeros(3, 4, 5)), RuntimeError, "coverage is torch.float32; convert one"),
    ],
    ids=["one", "dot", "shape", "weight", "dtype"],
)
def test_refusals(change, error, sentence):
    with pytest.raises(error, match=sentence):
        attention(**make_inputs("additive", coverage=True) | {"score": "additive"} | change)


def test_a_single_step_of_the_wrong_shape():
    with pytest.raises(RuntimeError, match=r"coverage must be \(2, 5\) = \(B, S\), got \(2, 4\)"):
        attention(
            torch.zeros(2, 3), torch.zeros(2, 5, 3), score="additive", weight=torch.zeros(3),
            coverage=torch.zeros(2, 4), coverage_weight=torch.zeros(3),
        )  # fmt: skip


def test_autocast():
    module = Attention(8, 8, coverage=True)
    query, keys, coverage = torch.randn(2, 8), torch.randn(2, 3, 8), torch.rand(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        context, _ = module(query, keys, coverage=coverage)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.float(), module(query, keys, coverage=coverage)[0], rtol=0.05, atol=0.05)


def test_a_parametrised_coverage_weight():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    module = Attention(4, 4, coverage=True)
    query, keys, coverage = torch.randn(2, 4), torch.randn(2, 3, 4), torch.rand(2, 3)
    plain = module(query, keys, coverage=2 * coverage)[0]
    nn.utils.parametrize.register_parametrization(module, "coverage_weight", Doubled())
    torch.testing.assert_close(module(query, keys, coverage=coverage)[0], plain)
