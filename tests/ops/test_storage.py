"""No result or gradient shares storage with another result, gradient or input."""

import itertools

import pytest
import torch
from backends import serving_attention, serving_lstm

import fastseq
from fastseq import ops


def share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two non-empty tensors lie in one storage."""
    return a.numel() and b.numel() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check(inputs: dict, outputs: dict) -> None:
    """Assert that no output and no gradient of an input shares storage with any other tensor."""
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    loss = sum(t.square().sum() for t in outputs.values())
    grads = dict(
        zip((f"grad {name}" for name in leaves), torch.autograd.grad(loss, list(leaves.values())), strict=True)
    )
    for (a, x), (b, y) in itertools.combinations((inputs | outputs | grads).items(), 2):
        if not (a in inputs and b in inputs):
            assert not share(x, y), f"{a} and {b} share storage"


@pytest.mark.parametrize("backend", serving_lstm())
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_lstm(backend, form):
    shape = (4, 2) if form == "packed" else (3, 2, 2)
    given = {"input": torch.randn(shape), "h0": torch.randn(2, 3), "c0": torch.randn(2, 3)}
    given |= {
        "ih": torch.randn(12, 2),
        "hh": torch.randn(12, 3),
        "bias_ih": torch.randn(12),
        "bias_hh": torch.randn(12),
    }
    given = {name: t.requires_grad_() for name, t in given.items()}
    options = {"lengths": {"lengths": torch.tensor([0, 2])}, "packed": {"batch_sizes": torch.tensor([2, 1, 1])}}
    x, h0, c0, *weights = given.values()
    output, (h_n, c_n) = ops.lstm(x, (h0, c0), *weights, backend=backend, **options.get(form, {}))
    check(given, {"output": output, "h_n": h_n, "c_n": c_n})


@pytest.mark.parametrize("backend", serving_lstm())
def test_the_parameters_of_a_module(backend):
    module = fastseq.LSTM(4, 5, 2, bidirectional=True, backend=backend)
    inputs = {"input": torch.randn(3, 2, 4, requires_grad=True), **dict(module.named_parameters())}
    output, (h_n, c_n) = module(inputs["input"])
    check(inputs, {"output": output, "h_n": h_n, "c_n": c_n})


def test_halving_gradients_in_place_halves_each_once():
    module = fastseq.LSTM(4, 5, backend="native" if "native" in serving_lstm() else "reference")
    grads = torch.autograd.grad(module(torch.randn(3, 2, 4))[0].sum(), list(module.parameters()))
    expected = [0.5 * g for g in grads]
    torch._foreach_mul_(grads, 0.5)
    torch.testing.assert_close(list(grads), expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_a_cell(backend):
    cell = fastseq.LSTMCell(4, 5, backend=backend if backend in serving_lstm() else "reference")
    inputs = {name: torch.randn(2, n, requires_grad=True) for name, n in (("input", 4), ("h", 5), ("c", 5))}
    h, c = cell(inputs["input"], (inputs["h"], inputs["c"]))
    check(inputs | dict(cell.named_parameters()), {"h": h, "c": c})


@pytest.mark.parametrize("backend", serving_attention())
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_attention(backend, score):
    given = {"query": torch.randn(2, 3, 4), "keys": torch.randn(2, 5, 4), "values": torch.randn(2, 5, 6)}
    if score == "additive":
        given |= {"weight": torch.randn(4), "bias": torch.randn(4)}
    given = {name: t.requires_grad_() for name, t in given.items()}
    lengths = torch.tensor([5, 3])
    context, weights = ops.attention(**given, score=score, lengths=lengths, need_weights=True, backend=backend)
    check(given, {"context": context, "weights": weights})
