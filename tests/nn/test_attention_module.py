"""The Attention module: parameters, options, graphs."""

import copy
import inspect
import pickle

import pytest
import torch
from attention_cases import (
    SCORES,
    B,
    S,
    T,
    allowed_positions,
    formula,
    gradients,
)
from torch import nn

from fastseq import _native
from fastseq.nn.attention import Attention
from fastseq.ops.attention import native
from fastseq.ops.attention.spec import Inputs, Want


def test_module_follows_the_formula_of_its_score():
    query, keys = torch.randn(B, T, 4), torch.randn(B, S, 6)
    lengths = torch.tensor([2, 5, 1])
    allowed = allowed_positions({"lengths": lengths})
    for score in ("general", "additive", "normed_additive"):
        module = Attention(4, 6, score=score, scale=0.5)
        p = dict(module.named_parameters())
        projected, weight, gain = query, p.get("v"), p.get("gain")
        if score != "general":
            projected = query @ p["query_proj.weight"].T + p["query_proj.bias"]
        options = dict(
            score="dot" if score == "general" else score, allowed=allowed, weight=weight, gain=gain, scale=0.5
        )
        expected = formula(projected, keys @ p["key_proj.weight"].T, keys, **options)
        torch.testing.assert_close(module(query, keys, lengths=lengths, need_weights=True), expected)
        for single_steps in (False, True):
            projected = module.project_keys(keys, lengths, single_steps=single_steps)
            torch.testing.assert_close(module(query, projected, keys, lengths=lengths)[0], expected[0])


def test_module_initialisation_and_layout():
    torch.manual_seed(0)
    shapes = {s: {k: tuple(v.shape) for k, v in Attention(4, 6, score=s).state_dict().items()} for s in SCORES[1:]}
    assert shapes["general"] == {"key_proj.weight": (4, 6)}
    assert shapes["additive"] == {
        "v": (4,),
        "query_proj.weight": (4, 4),
        "query_proj.bias": (4,),
        "key_proj.weight": (4, 6),
    }
    assert shapes["normed_additive"] == shapes["additive"] | {"gain": ()}
    assert not list(Attention(4, 4, score="dot").parameters())
    normed = Attention(256, 6, score="normed_additive", attention_size=64)
    assert normed.gain.item() == pytest.approx(1 / 8)
    assert normed.query_proj.bias.eq(0).all()
    for tensor, bound in ((normed.v, 1 / 8), (normed.query_proj.weight, 1 / 16), (normed.key_proj.weight, 6**-0.5)):
        assert 0.9 * bound < tensor.abs().max() <= bound


BASE = dict(query_size=4, key_size=4, score="additive")
LIVE = {
    "query_size": dict(query_size=5),
    "key_size": dict(key_size=5),
    "score": dict(score="normed_additive"),
    "attention_size": dict(attention_size=3),
    "scale": dict(scale=2.0),
    "bias": dict(bias=False),
    "coverage": dict(coverage=True),
    "backend": dict(backend="triton"),
    "device": dict(device="meta"),
    "dtype": dict(dtype=torch.float64),
}


def signature_of(options):
    """Everything an option can change: parameters, the output for fixed parameters, or the message of an error."""
    torch.manual_seed(0)
    try:
        module = Attention(**options)
        parameters = {k: (tuple(v.shape), v.dtype, v.device) for k, v in module.state_dict().items()}
        if "dtype" in options or "device" in options:
            return parameters
        return parameters, module(torch.ones(1, module.query_size), torch.arange(2.0 * module.key_size).view(1, 2, -1))[
            0
        ].tolist()
    except (ValueError, RuntimeError) as error:
        return str(error)


def test_every_option_of_the_module_is_alive():
    assert set(LIVE) == set(inspect.signature(Attention).parameters)
    for name, change in LIVE.items():
        assert signature_of(BASE | change) != signature_of(BASE), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(query_size=4, key_size=6, score="dot"),
            "sizes must be equal, got 4 and 6; choose 'general' or 'additive'",
        ),
        (dict(query_size=4, key_size=4, score="mlp"), "unknown score 'mlp'; choose one of 'dot'"),
        (dict(query_size=0, key_size=4), "query_size must be at least 1, got 0"),
        (dict(query_size=4, key_size=4, score="dot", attention_size=3), "'dot' has no use for attention_size"),
        (dict(query_size=4, key_size=4, score="general", bias=True), "'general' has no use for bias"),
        (dict(query_size=4, key_size=4, backend="fast"), "unknown backend 'fast'"),
    ],
    ids=["sizes", "score", "zero", "attention_size", "bias", "backend"],
)
def test_contradictory_options_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Attention(**options)


def test_module_checks_sizes():
    module = Attention(4, 6)
    with pytest.raises(RuntimeError, match=r"keys must have shape \(B, S, 6\), got \(3, 5, 4\)"):
        module(torch.ones(3, 4), torch.ones(3, 5, 4))
    with pytest.raises(RuntimeError, match=r"query must have shape \(B, T, 4\) or \(B, 4\), got \(3, 6\)"):
        module(torch.ones(3, 6), torch.ones(3, 5, 6))
    with pytest.raises(ValueError, match="values must be given with projected keys"):
        module(torch.ones(3, 4), module.project_keys(torch.ones(3, 5, 6)))


def test_module_repr_copy_and_pickle():
    module = Attention(4, 6, attention_size=3, scale=0.5)
    assert repr(module).startswith("Attention(\n  4, 6, score='additive', attention_size=3, scale=0.5\n")
    query, keys = torch.randn(B, 4), torch.randn(B, S, 6)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(query, keys)[0], module(query, keys)[0], rtol=0, atol=0)


@pytest.mark.parametrize("score", SCORES)
def test_module_is_twice_differentiable(score):
    module = Attention(3, 3, score=score, dtype=torch.float64)
    query, keys = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 4))
    assert torch.autograd.gradgradcheck(lambda q, k: module(q, k, lengths=torch.tensor([0, 3]))[0], (query, keys))


class Readers(nn.Module):
    """Both kinds of score, with and without weights, values by default the keys: every case of a traced graph."""

    def __init__(self):
        super().__init__()
        self.additive, self.dot = Attention(4, 4), Attention(4, 4, score="dot")

    def forward(self, query, keys, lengths):
        context, weights = self.additive(query, keys, lengths=lengths, need_weights=True)
        dot_context, dot_weights = self.dot(query, keys, lengths=lengths, need_weights=True)
        return context + self.dot(query, keys, lengths=lengths)[0], weights, dot_context, dot_weights


def random_batch(b, t, s):
    return torch.randn(b, t, 4, requires_grad=True), torch.randn(b, s, 4), torch.randint(0, s + 1, (b,))


@pytest.mark.skipif(not _native.available(), reason=_native.why_not())
def test_native_returns_the_saved_weights_themselves():
    """The Function replaces repeated outputs, found by ``is``: in torch 2.11 a traced alias loses its gradient."""
    query, keys = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    inputs = Inputs(query, keys, keys, torch.randn(4), torch.randn(4), None, None, None, 1.0)
    result = native.forward(inputs, Want(weights=True, backward=True))
    assert result.weights is result.saved[0]


def test_compiles_into_one_graph_with_dynamic_sizes():
    torch._dynamo.reset()
    module = Readers()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for sizes in ((2, 3, 5), (5, 6, 7), (3, 2, 9)):  # distinct sizes: a tracer unifies equal ones
        batch = random_batch(*sizes)
        actual, expected = compiled(*batch), module(*batch)
        torch.testing.assert_close(actual, expected)
        inputs = {"query": batch[0], **dict(module.named_parameters())}
        torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports_with_dynamic_sizes(strict):
    module = Readers()
    b, t, s = (torch.export.Dim(name, min=2, max=64) for name in "bts")
    program = torch.export.export(
        module, random_batch(2, 3, 4), dynamic_shapes=({0: b, 1: t}, {0: b, 1: s}, {0: b}), strict=strict
    )
    batch = random_batch(5, 6, 7)
    torch.testing.assert_close(program.module()(*batch), module(*batch))
