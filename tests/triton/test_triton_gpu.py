"""The triton backends on a GPU: accuracy against the reference, CUDA graphs, no synchronisation with the device."""

import importlib.util
from functools import partial

import pytest
import torch

from fastseq import ops
from fastseq.dispatch import objection
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.testing.numerics import assert_all_accurate, float32_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here"),
]


def lstm(T, B, H, dtype=torch.float32):
    """Draw input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh and lengths on the GPU."""
    sentence = objection("lstm", "triton", LSTMCall("cuda", dtype, H, H, batch=B, steps=T))
    if sentence is not None:
        pytest.skip(sentence)
    shapes = ((T, B, H), (B, H), (B, H), (4 * H, H), (4 * H, H), (4 * H,), (4 * H,))
    tensors = [(torch.randn(s, device="cuda") / (H**0.5 if s[0] == 4 * H else 1)).to(dtype) for s in shapes]
    return tensors, torch.randint(0, T + 1, (B,), device="cuda")


def run(backend, tensors, lengths, reverse=False):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    output, (h_n, c_n) = ops.lstm(
        tensors[0], tensors[1:3], *tensors[3:], lengths=lengths, reverse=reverse, backend=backend
    )
    grads = torch.autograd.grad(output.sum() + h_n.square().sum() + c_n.square().sum(), tensors)
    return dict(zip(("output", "h_n", "c_n"), (output, h_n, c_n), strict=True)), dict(enumerate(grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [1, 63, 128, 257, 512, 1024])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_lstm(H, dtype, reverse):
    tensors, lengths = lstm(7, 33, H, dtype)
    wide = [t.double() for t in tensors]
    with float32_products(tf32=False):
        sides = [
            run(*side, lengths, reverse) for side in (("triton", tensors), ("reference", wide), ("torch", tensors))
        ]
    for kind, factor in ((0, 2), (1, 3)):
        assert_all_accurate(*(side[kind] for side in sides), factor=factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [128, 512, 1024, 2048])
def test_the_same_bits_every_time(H, dtype):
    """Fails if an asynchronous copy is read before it arrives."""
    tensors, lengths = lstm(48, 130, H, dtype)
    expected = run("triton", tensors, lengths)
    for _ in range(20):
        for repeated, first in zip(run("triton", tensors, lengths), expected, strict=True):
            for name, result in repeated.items():
                assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("H", [64, 512])
def test_lstm_is_captured_in_a_graph(H):
    tensors, lengths = lstm(5, 8, H)
    call = partial(ops.lstm, tensors[0], tensors[1:3], *tensors[3:], lengths=lengths, backend="triton")
    expected = call()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()[0]
    output.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("H", [64, 512])
def test_a_call_never_synchronises_with_the_device(H):
    tensors, lengths = lstm(5, 8, H)
    run("triton", tensors, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", tensors, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_attention(score, dtype):
    lstm(1, 1, 16)  # skips where Triton refuses this GPU
    B, T, S, A, D = 5, 19, 77, 65, 130
    shapes = {"query": (B, T, A), "keys": (B, S, A), "values": (B, S, D)}
    shapes |= {"weight": (A,), "bias": (A,)} if score == "additive" else {}
    found = {
        n: (torch.randn(s, device="cuda") / (A**0.25 if score == "dot" else 1)).to(dtype) for n, s in shapes.items()
    }
    lengths = torch.tensor([S, 0, 1, 40, 76], device="cuda")

    def side(backend, dtype):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in found.items()}
        context, weights = ops.attention(**leaves, score=score, lengths=lengths, need_weights=True, backend=backend)
        grads = torch.autograd.grad(context.sum() + weights.square().sum(), list(leaves.values()))
        return {"context": context, "weights": weights}, dict(zip(leaves, grads, strict=True))

    sides = [side("triton", dtype), side("reference", torch.float64), side("torch", dtype)]
    for kind, factor in ((0, 2), (1, 3)):
        assert_all_accurate(*(s[kind] for s in sides), factor=factor)
