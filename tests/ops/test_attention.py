"""The attention op against a formula in float64."""

import itertools
import math

import pytest
import torch
from attention_cases import (
    PADDINGS,
    SCORES,
    A,
    B,
    D,
    S,
    T,
    allowed_positions,
    formula,
    gradients,
    make_inputs,
    make_padding,
)
from backends import serving_attention

from fastseq import _native, dispatch
from fastseq.dispatch import record, use_backend
from fastseq.ops.attention import api, attention, reference
from fastseq.ops.attention.rules import fast_path
from fastseq.ops.attention.spec import Grads, InputGrads, Inputs, Keys, Want
from fastseq.testing.numerics import assert_all_accurate

WITH_FUNCTION = [name for name in serving_attention() if name != "torch"]  # differentiable twice, also by the weights


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", WITH_FUNCTION)
def test_outputs_and_gradients_follow_the_formula(backend, score, padding):
    tensors, where = make_inputs(score), make_padding(padding)
    expected = formula(**tensors, score=score, allowed=allowed_positions(where), scale=0.7)
    actual = attention(**tensors, score=score, **where, scale=0.7, need_weights=True, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("shape", [{"t": 1}, {"s": 1}, {"a": 1}, {"d": 1}, {"b": 1}, {"a": 257, "d": 63}], ids=str)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_awkward_shapes(score, shape):
    tensors = make_inputs(score, **shape)
    sizes = {k: v for k, v in shape.items() if k in "bts"}
    where = make_padding("lengths", **sizes)
    expected = formula(**tensors, score=score, allowed=allowed_positions(where, **sizes))
    actual = attention(**tensors, score=score, **where, need_weights=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("need_weights", [False, True], ids=["context", "context+weights"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_written_backward_equals_autograd(score, padding, need_weights):
    tensors, where = make_inputs(score), make_padding(padding)
    leaves = [tensors.get(name) for name in InputGrads._fields]
    mask = where.get("mask")
    masks = (where.get("lengths"), mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else mask)
    inputs = Inputs(*leaves[:5], *masks, prepared=None, scale=0.7)
    context, weights, saved = reference.forward(inputs, Want(need_weights, backward=True))
    outputs = [context, weights] if need_weights else [context]
    grads = [torch.randn_like(out) for out in outputs]
    expected = torch.autograd.grad(outputs, list(tensors.values()), grads)
    needs = InputGrads(*(x is not None for x in leaves))
    with torch.no_grad():
        actual = reference.backward(inputs, saved, Grads(grads[0], grads[1] if need_weights else None), needs)
    torch.testing.assert_close(tuple(g for g in actual if g is not None), expected)


def test_unneeded_gradients_are_none():
    tensors = make_inputs("additive")
    query, keys, values, weight, _ = (tensors[name].detach() for name in ("query", "keys", "values", "weight", "bias"))
    for wanted in (query, keys, values, weight):
        wanted.requires_grad_()
        attention(query, keys, values, score="additive", weight=weight)[0].sum().backward()
        assert [x.grad is not None for x in (query, keys, values, weight)] == [
            x is wanted for x in (query, keys, values, weight)
        ]
        wanted.grad = None
        wanted.requires_grad_(False)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", WITH_FUNCTION)
def test_first_and_second_derivative_numerically(backend, score, padding):
    tensors, where = make_inputs(score, b=2, t=2, s=3, a=2, d=2), make_padding(padding, b=2, t=2, s=3)

    def run(*values):
        return attention(
            **dict(zip(tensors, values, strict=True)), score=score, **where, need_weights=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()))


def test_second_derivative_where_one_input_is_made_from_another():
    query = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(query):
        keys = query.tanh()
        apart = attention(query, keys, keys * query, need_weights=True, backend="reference")[0]
        return apart + attention(query, query, backend="reference")[0]

    assert torch.autograd.gradcheck(run, query)
    assert torch.autograd.gradgradcheck(run, query)
    first, again = (torch.autograd.grad(run(query).square().sum(), query, create_graph=create)[0] for create in (0, 1))
    torch.testing.assert_close(again, first)


def naive(query, keys, values, weight=None, bias=None, *, allowed):
    """Plain torch in the dtype of the inputs: the baseline of accuracy."""
    scores = query @ keys.mT if weight is None else (query[:, :, None] + keys[:, None] + bias).tanh() @ weight
    scores = scores.masked_fill(~allowed, -math.inf)
    p = torch.nan_to_num(scores.softmax(-1))
    return p @ values, p


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", serving_attention())
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_accuracy_in_every_dtype(score, backend, dtype):
    sizes = {"b": 3, "t": 5, "s": 19}
    where = make_padding("lengths", **sizes)
    allowed, draws = allowed_positions(where, **sizes), []
    for _ in range(8):  # in a single draw torch's error may be small by chance
        tensors = make_inputs(score, **sizes, a=33, d=33, dtype=dtype)
        wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        outputs = (
            (attention(**tensors, score=score, **where, need_weights=True, backend=backend), tensors),
            (formula(**wide, score=score, allowed=allowed), wide),
            (naive(**tensors, allowed=allowed), tensors),
        )
        grads = (gradients(result, leaves) for result, leaves in outputs)
        draws.append(
            [
                (dict(zip(("context", "weights"), result, strict=True)), dict(zip(leaves, grad, strict=True)))
                for (result, leaves), grad in zip(outputs, grads, strict=True)
            ]
        )
    for kind, factor in ((0, 2), (1, 3)):
        sides = [
            {name: torch.stack([draw[side][kind][name] for draw in draws]) for name in draws[0][side][kind]}
            for side in range(3)
        ]
        assert_all_accurate(*sides, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("backend", WITH_FUNCTION)
def test_scores_of_hundreds_stay_finite(backend, score, dtype):
    tensors = make_inputs(score, dtype=dtype, spread=100.0 if score == "additive" else 10.0)
    outputs = attention(**tensors, score=score, **make_padding("lengths"), need_weights=True, backend=backend)
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, tensors)))
    torch.testing.assert_close(outputs[1][1:].float().sum(-1), torch.ones(B - 1, T), atol=2e-2, rtol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("padding", ["lengths", "mask", "step_mask"])
@pytest.mark.parametrize(("score", "backend"), list(itertools.product(["dot", "additive"], serving_attention())))
def test_padding_may_hold_anything(score, backend, padding, garbage):
    tensors, where = make_inputs(score), make_padding(padding)
    unused = ~allowed_positions(where).any(1)[..., None]
    dirty = {
        name: x.detach().masked_fill(unused, garbage).requires_grad_() if name in ("keys", "values") else x
        for name, x in tensors.items()
    }
    options = dict(score=score, **where, need_weights=backend in WITH_FUNCTION, backend=backend)
    expected, actual = attention(**tensors, **options), attention(**dirty, **options)
    with torch.no_grad():
        torch.testing.assert_close(attention(**dirty, **options)[0], expected[0])
    outputs = 1 if actual[1] is None else 2
    torch.testing.assert_close(actual[:outputs], expected[:outputs])
    torch.testing.assert_close(gradients(actual[:outputs], dirty), gradients(expected[:outputs], tensors))
    if backend in WITH_FUNCTION:
        (grad,) = torch.autograd.grad(attention(**dirty, **options)[0].sum(), dirty["query"], create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), dirty["keys"])
        assert second.isfinite().all()


@pytest.mark.parametrize(("score", "backend"), list(itertools.product(["dot", "additive"], serving_attention())))
def test_a_step_without_positions_gives_zeros(score, backend):
    tensors = make_inputs(score, dtype=torch.float32)
    need_weights = backend in WITH_FUNCTION
    context, weights = attention(
        **tensors, score=score, lengths=torch.tensor([0, S, 0]), need_weights=need_weights, backend=backend
    )
    assert context[[0, 2]].eq(0).all()
    assert context[1].ne(0).all()
    grads = dict(zip(tensors, gradients([context, weights] if need_weights else [context], tensors), strict=True))
    for name in ("query", "keys", "values"):
        assert grads[name][[0, 2]].eq(0).all(), name
        assert grads[name][1].ne(0).any(), name
    assert all(g.isfinite().all() for g in grads.values())
    if need_weights:
        assert weights[[0, 2]].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_torch_sdpa_equals_reference(padding, dtype):
    tensors, where = make_inputs("dot", dtype=dtype), make_padding(padding)
    results = [attention(**tensors, **where, scale=0.3, backend=backend)[0] for backend in ("torch", "reference")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(gradients([out], tensors) for out in results))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
def test_torch_op_by_op_equals_reference(score, padding):
    tensors, where = make_inputs(score), make_padding(padding)
    options = dict(score=score, **where, scale=0.3, need_weights=True)
    results = [attention(**tensors, **options, backend=backend) for backend in ("torch", "reference")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(gradients(result, tensors) for result in results))


@pytest.mark.skipif("native" not in WITH_FUNCTION, reason="the compiled operators are not part of this install")
def test_auto_on_cpu_takes_what_was_measured_fastest():
    def chosen(score, **options):
        tensors = make_inputs(score, dtype=options.pop("dtype", torch.float32), t=options.pop("t", T))
        with record() as choices, torch.set_grad_enabled(options.pop("grad", True)):
            attention(**tensors, score=score, **options)
        return choices[0].backend

    assert chosen("dot") == chosen("dot", grad=False) == chosen("additive", t=1) == "native"
    assert chosen("dot", t=1, grad=False) == chosen("dot", t=1) == "native"
    assert chosen("dot", dtype=torch.bfloat16, t=1, grad=False) == "torch"
    assert chosen("dot", dtype=torch.bfloat16, t=1, grad=False, **make_padding("lengths")) == "native"
    assert chosen("dot", dtype=torch.bfloat16, t=1) == chosen("dot", dtype=torch.bfloat16, grad=False) == "native"
    assert chosen("dot", dtype=torch.float64) == chosen("additive", dtype=torch.float64, t=1) == "reference"
    assert chosen("additive", dtype=torch.float64) == "native"


@pytest.mark.parametrize("score", SCORES)
def test_strided_inputs_equal_contiguous_ones(score):
    tensors = make_inputs(score)
    expected = attention(**tensors, score=score, **make_padding("lengths"), need_weights=True)

    def strided(x):
        bigger = torch.full([2 * n + 1 for n in x.shape], math.nan, dtype=x.dtype)
        view = bigger[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x.detach())
        return view.requires_grad_()

    views = {name: strided(x) for name, x in tensors.items()}
    assert not views["keys"].is_contiguous()
    actual = attention(**views, score=score, **make_padding("lengths"), need_weights=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, views), gradients(expected, tensors))


@pytest.mark.parametrize("padding", ["none", "lengths", "mask"])
@pytest.mark.parametrize("score", SCORES)
def test_single_step_query_is_a_query_of_one_step(score, padding):
    tensors = make_inputs(score, t=1)
    context, weights = attention(**tensors, score=score, **make_padding(padding), need_weights=True)
    step = tensors | {"query": tensors["query"].squeeze(1)}
    step_context, step_weights = attention(**step, score=score, **make_padding(padding), need_weights=True)
    assert step_context.shape == (B, D)
    torch.testing.assert_close((step_context, step_weights), (context.squeeze(1), weights.squeeze(1)))


def test_values_default_to_the_keys():
    tensors = make_inputs("dot")
    torch.testing.assert_close(
        attention(tensors["query"], tensors["keys"])[0],
        attention(tensors["query"], tensors["keys"], tensors["keys"])[0],
    )


def test_lengths_of_any_integer_type_equal_the_mask():
    tensors = make_inputs("dot")
    lengths = torch.tensor([2, 5, 3], dtype=torch.int32)
    expected = attention(**tensors, mask=torch.arange(S) < lengths[:, None])[0]
    torch.testing.assert_close(attention(**tensors, lengths=lengths)[0], expected)
    assert not torch.allclose(attention(**tensors)[0], expected)


@pytest.mark.parametrize("backend", WITH_FUNCTION)
def test_additive_keeps_no_hidden_layer_for_the_backward(backend):
    tensors = make_inputs("additive", b=2, t=6, s=8, a=16, d=4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attention(**tensors, score="additive", backend=backend)
    assert max(sizes) < 2 * 6 * 8 * 16


@pytest.mark.parametrize("backend", WITH_FUNCTION)
def test_autocast_casts_the_inputs_and_keeps_the_softmax_wide(backend):
    tensors = make_inputs("additive", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = attention(**tensors, score="additive", need_weights=True, backend=backend)
        inside = gradients([context, weights], tensors)
    narrow = {name: x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}
    expected = attention(**narrow, score="additive", need_weights=True, backend=backend)
    assert context.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close((context, weights), expected, rtol=0, atol=0)
    wanted = tuple(g.float() for g in gradients(expected, narrow))
    torch.testing.assert_close(inside, wanted, rtol=0, atol=0)


REFUSED = {
    "unknown score": (
        dict(score="cosine"),
        ValueError,
        "unknown score 'cosine'.*'dot', 'general', 'additive', 'normed_additive'",
    ),
    "unknown backend": (dict(backend="cudnn"), ValueError, "unknown backend 'cudnn'"),
    "missing weight": (dict(score="additive"), ValueError, "'additive' needs weight"),
    "missing gain": (dict(score="normed_additive", weight=torch.ones(A)), ValueError, "'normed_additive' needs gain"),
    "useless bias": (dict(bias=torch.ones(A)), ValueError, "'dot' has no use for bias"),
    "useless gain": (dict(score="additive", weight=torch.ones(A), gain=torch.ones(())), ValueError, "no use for gain"),
    "rank": (dict(query=torch.ones(A)), RuntimeError, r"expected query \(B, T, A\)"),
    "rank of keys": (dict(keys=torch.ones(S, A)), RuntimeError, r"keys \(B, S, A\)"),
    "batch": (dict(query=torch.ones(B + 1, T, A)), RuntimeError, "agree on B"),
    "value steps": (dict(values=torch.ones(B, S + 1, D)), RuntimeError, "keys and values on S"),
    "size": (dict(query=torch.ones(B, T, A + 1)), RuntimeError, "one size A for score 'dot', got 7 and 6"),
    "weight of general": (
        dict(score="general", weight=torch.ones(A, A + 1)),
        RuntimeError,
        r"weight must be \(6, 6\) = \(Q, A\)",
    ),
    "weight of additive": (
        dict(score="additive", weight=torch.ones(A + 1)),
        RuntimeError,
        r"weight must be \(6,\) = \(A,\)",
    ),
    "dtype": (
        dict(keys=torch.ones(B, S, A, dtype=torch.float64)),
        RuntimeError,
        "query is torch.float32 but keys is torch.float64",
    ),
    "integer": (
        dict(query=torch.ones(B, T, A).long(), keys=torch.ones(B, S, A).long()),
        RuntimeError,
        "floating point",
    ),
    "device": (dict(keys=torch.ones(B, S, A, device="meta")), RuntimeError, "query is on cpu but keys is on meta"),
    "lengths and mask": (dict(lengths=torch.ones(B).long(), mask=torch.ones(B, S).bool()), ValueError, "both given"),
    "lengths too long": (dict(lengths=torch.tensor([1, S + 1, 2])), ValueError, r"lie in \[0, 5\].*got 1 to 6"),
    "negative lengths": (dict(lengths=torch.tensor([1, -1, 2])), ValueError, r"lie in \[0, 5\].*got -1 to 2"),
    "number of lengths": (dict(lengths=torch.tensor([1, 2])), RuntimeError, r"lengths must be \(3,\) integers"),
    "float lengths": (dict(lengths=torch.ones(B)), RuntimeError, "integers, got .* torch.float32"),
    "float mask": (dict(mask=torch.ones(B, S)), RuntimeError, "mask must be bool"),
    "shape of mask": (
        dict(mask=torch.ones(B, S + 1).bool()),
        RuntimeError,
        r"mask must be \(3, 5\) or \(3, 4, 5\), got \(3, 6\)",
    ),
    "no such kernel": (dict(backend="triton"), RuntimeError, "attention: the triton backend .*; (use|install)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_a_sentence(case):
    arguments, kind, sentence = REFUSED[case]
    good = dict(query=torch.ones(B, T, A), keys=torch.ones(B, S, A), values=torch.ones(B, S, D))
    if "keys" in arguments:
        good["values"] = arguments["keys"]
    with pytest.raises(kind, match=sentence):
        attention(**(good | arguments))


def test_step_mask_needs_a_query_of_steps():
    with pytest.raises(RuntimeError, match=r"mask must be \(3, 5\), got \(3, 1, 5\)"):
        attention(torch.ones(B, A), torch.ones(B, S, A), mask=torch.ones(B, 1, S).bool())


needs_native = pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")


def plain_inputs():
    return torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 6)


@needs_native
@pytest.mark.parametrize(
    ("vectors", "shape", "backend"),
    [
        ("avx2", (32, 33, 80), "torch"),
        ("avx2", (32, 32, 80), "native"),
        ("avx512", (32, 33, 64), "torch"),
        ("avx512", (32, 33, 65), "native"),
        ("baseline", (32, 33, 64), "native"),
    ],
)
@torch.no_grad()
def test_the_fast_path_leaves_many_scores_to_sdpa(vectors, shape, backend, monkeypatch):
    monkeypatch.setattr(_native, "instruction_set", lambda: vectors)
    dispatch.forget()
    steps, positions, size = shape
    query, keys = torch.randn(2, steps, size), torch.randn(2, positions, size)
    with record() as choices:  # takes no fast path
        expected, _ = attention(query, keys, scale=0.7)
    assert [choice.backend for choice in choices] == [backend]
    assert torch.equal(fast_path(query, keys, keys, 0.7), expected)


@needs_native
@torch.no_grad()
def test_the_fast_path_takes_the_backend_of_the_rules(monkeypatch):
    query, keys, values = plain_inputs()
    with record() as choices:  # takes no fast path
        expected, _ = attention(query, keys, values, scale=0.7)
    assert [choice.backend for choice in choices] == ["native"]
    assert torch.equal(fast_path(query, keys, values, 0.7), expected)
    monkeypatch.delattr(api, "select")
    assert torch.equal(attention(query, keys, values, scale=0.7)[0], expected)
    assert torch.equal(attention(query, Keys(keys), values, scale=0.7)[0], expected)
    assert attention(query, keys, scale=0.7)[0].shape == (2, 3, 5)


@pytest.mark.parametrize("option", ["gradient", "named", "use_backend", "weights", "lengths", "mask", "double"])
def test_all_other_calls_go_through_select(option, monkeypatch):
    query, keys, values = (x.double() if option == "double" else x for x in plain_inputs())
    options = {
        "named": {"backend": "reference"},
        "weights": {"need_weights": True},
        "lengths": {"lengths": torch.tensor([1, 4])},
        "mask": {"mask": torch.ones(2, 4, dtype=torch.bool)},
    }
    selected = []
    monkeypatch.setattr(api, "select", lambda *args: selected.append(args) or "reference")
    with use_backend("reference" if option == "use_backend" else "auto"), torch.set_grad_enabled(option == "gradient"):
        attention(query, keys, values, **options.get(option, {}))
    assert len(selected) == 1


@torch.no_grad()
def test_a_plain_dot_is_cast_by_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*plain_inputs())[0].dtype == torch.bfloat16


@torch.no_grad()
def test_the_fast_path_leaves_wrong_shapes_to_the_checks():
    query, keys, values = plain_inputs()
    for bad in ((query[:1], keys, values), (query, keys[:, :3], values), (query[:, :, :4], keys, values)):
        with pytest.raises(RuntimeError, match=r"^attention: query"):
            attention(*bad)
