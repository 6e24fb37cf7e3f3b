"""The compiled attention operators: refusals of bad arguments, fakes, and the sentences of the native backend."""

import re

import pytest
import torch
from attention_cases import REFUSED_CALLS, gradients
from test_attention_native import PADDINGS, SCORES, make_inputs, padding_for

from fastseq import _native
from fastseq.ops.attention import native
from fastseq.ops.attention.api import attention
from fastseq.ops.attention.spec import AttentionCall

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
ops = torch.ops.fastseq

BAD_CALLS = REFUSED_CALLS | {
    "bias of dot": (dict(weight=None, bias=torch.zeros(4)), "belong to the additive score; pass weight"),
    "prepared": (dict(prepared=torch.zeros(2, 5, 4)), r"prepared must have the shape \(2, 5, 32\)"),
    "integers": (
        dict(query=torch.zeros(2, 3, 4).int(), keys=torch.zeros(2, 5, 4).int(), values=torch.zeros(2, 5, 6).int())
        | dict(weight=None),
        "must be Float, Double, BFloat16 or Half, got Int",
    ),
}
ARGUMENTS = dict(
    query=torch.zeros(2, 3, 4),
    keys=torch.zeros(2, 5, 4),
    values=torch.zeros(2, 5, 6),
    weight=torch.zeros(4),
    bias=None,
    lengths=None,
    mask=None,
    prepared=None,
)


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_arguments_get_a_sentence(changes, message):
    arguments = (ARGUMENTS | changes).values()
    with pytest.raises(RuntimeError, match=f"attention_forward: .*{message}"):
        ops.attention_forward(*arguments, 1.0, True)
    if changes.get("query", ARGUMENTS["query"]).is_floating_point():
        with pytest.raises(RuntimeError, match=f"attention_backward: .*{message}"):
            ops.attention_backward(torch.zeros(2, 3, 6), None, *arguments, torch.zeros(2, 3, 5), 1.0, True, True)


@pytest.mark.parametrize(
    ("i", "name"), [(0, "grad_context"), (1, "grad_weights"), (10, "weights")], ids=["context", "grads", "weights"]
)
def test_backward_refuses_gradients_of_another_shape(i, name):
    arguments = [torch.zeros(2, 3, 6), torch.zeros(2, 3, 5), *ARGUMENTS.values(), torch.zeros(2, 3, 5), 1.0]
    for wrong in (torch.zeros(2, 3, 7), arguments[i].double()):
        changed = [*arguments[:i], wrong, *arguments[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"attention_backward: {name} must have the"):
            ops.attention_backward(*changed, True, True)


def test_lengths_outside_the_tensor_are_clamped():
    query, keys = torch.randn(2, 1, 4), torch.randn(2, 5, 4)
    expected, actual = (
        ops.attention_forward(query, keys, keys, None, None, torch.tensor(lengths), None, None, 1.0, True)
        for lengths in ([5, 0], [2**40, -7])
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
def test_opcheck(score, kind):
    shape = (3, 4, 5, 6, 7)
    tensors = make_inputs(shape, score, torch.bfloat16)
    where = padding_for(kind, shape)
    inputs = [None if name not in tensors else tensors[name].detach() for name in ("query", "keys", "values")]
    inputs += [tensors[name].detach() if name in tensors else None for name in ("weight", "bias")]
    mask = where.get("mask")
    inputs += [where.get("lengths"), mask.unsqueeze(1) if kind == "mask" else mask]
    prepared = None if score == "dot" else ops.attention_prepare(inputs[1], where.get("lengths"))
    for need in (True, False):
        torch.library.opcheck(ops.attention_forward.default, (*inputs, prepared, 0.5, need))
    context, weights = ops.attention_forward(*inputs, prepared, 0.5, True)
    for grad_weights, needs in ((weights.bfloat16(), (True, True)), (None, (True, False)), (None, (False, True))):
        arguments = (context, grad_weights, *inputs, prepared, weights, 0.5, *needs)
        torch.library.opcheck(ops.attention_backward.default, arguments)
    torch.library.opcheck(ops.attention_prepare.default, (inputs[1], where.get("lengths")))


@pytest.mark.parametrize("score", SCORES)
def test_compiles_into_one_graph_with_dynamic_sizes(score):
    torch._dynamo.reset()

    def run(query, keys, values, lengths, weight=None, bias=None):
        options = dict(score=score, weight=weight, bias=bias, lengths=lengths, need_weights=True, backend="native")
        return attention(query, keys, values, **options)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for b, t, s in ((2, 3, 5), (5, 6, 7), (3, 2, 9)):
        tensors = make_inputs((b, t, s, 11, 8), score, torch.float32)
        lengths = torch.randint(0, s + 1, (b,))
        expected, actual = (function(lengths=lengths, **tensors) for function in (run, compiled))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


CALL = AttentionCall("additive", "cpu", torch.float32)
REFUSALS = {
    "device": (dict(device="mps"), r"runs on CPU and CUDA \(got mps\); use backend="),
    "dtype": (dict(dtype=torch.complex64), r"computes in float32, float64, bfloat16, float16 \(got torch.complex64\)"),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
def test_unsupported_names_the_limit(change, sentence):
    assert native.unsupported(CALL) is None
    assert re.search(sentence, native.unsupported(CALL._replace(**change)))


def test_unsupported_names_the_missing_library(monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_error", ImportError("libtorch_cpu.so: undefined symbol"))
    assert "failed to load (libtorch_cpu.so: undefined symbol)" in native.unsupported(CALL)
