"""torch.compile in one graph, and torch.export with dynamic sizes."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq import LSTM, Attention, LSTMCell, _native

needs_native = pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")


class Tagger(nn.Module):
    """An LSTM and attention over its own outputs."""

    def __init__(self, backend: str = "auto", score: str = "additive", proj_size: int = 0):
        super().__init__()
        options = {"bidirectional": True, "batch_first": True, "proj_size": proj_size, "backend": backend}
        self.lstm, width = LSTM(4, 6, 2, **options), 2 * (proj_size or 6)
        self.attention = Attention(width, width, score=score)

    def forward(self, x, lengths=None):
        output, _ = self.lstm(x, lengths=lengths)
        return self.attention(output, output, lengths=lengths)[0]


def batch(B, T, with_lengths):
    x = torch.randn(B, T, 4, requires_grad=True)
    return x, torch.randint(0, T + 1, (B,)) if with_lengths else None


@needs_native
@pytest.mark.parametrize(("with_lengths", "proj_size"), [(False, 0), (True, 5)], ids=["full", "lengths and projection"])
def test_compile_is_one_graph_for_all_sizes(with_lengths, proj_size):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Tagger(proj_size=proj_size)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in ((3, 5), (2, 7), (4, 9)):
        x, lengths = batch(B, T, with_lengths)
        actual, expected = compiled(x, lengths), model(x, lengths)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), (x, *model.parameters())) for y in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "another size compiled another graph"


@pytest.mark.parametrize("backend", ["native", "reference"] if _native.available() else ["reference"])
def test_compiled_gradients_through_all_cell_states(backend):
    torch._dynamo.reset()
    module, x = LSTM(4, 5, backend=backend), torch.randn(3, 2, 4, requires_grad=True)

    def run(x):
        output, (h, c), cells = module(x, return_cell_states=True)
        return output.sin().sum() + h.sum() + c.square().sum() + cells.square().sum()

    leaves = (x, *module.parameters())
    grads = [torch.autograd.grad(f(x), leaves) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@needs_native
def test_compile_with_inductor(monkeypatch, tmp_path):
    # Inductor's cache outlives processes and ignores the instruction set: kernels for a wider one gave garbage.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = Tagger()
    x, lengths = batch(3, 5, True)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(x, lengths), model(x, lengths), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_compile_with_the_other_backends(backend):
    torch._dynamo.reset()
    model = Tagger(backend)
    x, _ = batch(3, 4, False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


def test_the_torch_backend_says_that_lengths_cannot_be_traced():
    torch._dynamo.reset()
    x, lengths = batch(3, 4, True)
    with pytest.raises(RuntimeError, match="cannot be traced with lengths"):
        torch.compile(Tagger("torch"), backend="eager")(x, lengths)


@needs_native
def test_compile_with_a_packed_sequence():
    torch._dynamo.reset()
    module, packed = LSTM(4, 5), pack_padded_sequence(torch.randn(5, 3, 4), [5, 4, 1])
    expected, actual = module(packed)[0], torch.compile(module, backend="aot_eager")(packed)[0]
    torch.testing.assert_close(actual.data, expected.data, rtol=0, atol=1e-6)
    assert torch.equal(pad_packed_sequence(actual)[1], torch.tensor([5, 4, 1]))


def test_compile_cell():
    torch._dynamo.reset()
    cell = LSTMCell(4, 5)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(2, 4), (torch.randn(2, 5), torch.randn(2, 5))
    torch.testing.assert_close(compiled(x, hx), cell(x, hx), rtol=0, atol=1e-6)


@needs_native
@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
def test_export_with_dynamic_sizes(with_lengths):
    B, T = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=512)
    model = Tagger()
    args, shapes = [torch.randn(3, 5, 4)], [{0: B, 1: T}]
    if with_lengths:
        args, shapes = [*args, torch.tensor([1, 5, 0])], [*shapes, {0: B}]
    exported = torch.export.export(model, tuple(args), dynamic_shapes=tuple(shapes)).module()
    for size in ((2, 9), (6, 3)):
        x, lengths = batch(*size, with_lengths)
        given = (x, lengths) if with_lengths else (x,)
        torch.testing.assert_close(exported(*given), model(*given), rtol=0, atol=1e-6)
