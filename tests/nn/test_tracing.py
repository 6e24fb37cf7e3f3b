"""torch.jit.trace, the TorchScript exporter of ONNX, and quantisation of swapped models."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import fastseq

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


class Model(nn.Module):
    """Two stacked layers in both directions, a cell, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)
        self.cell = nn.LSTMCell(10, 6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        """x (B, T, 4) -> (B, 3)."""
        return self.linear(self.cell(self.lstm(x)[0][:, -1])[0])


@pytest.fixture
def swapped():
    torch.manual_seed(0)
    model = Model()
    fastseq.accelerate(model)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_holds_the_operators_of_torch_and_serves_all_sizes(swapped, training):
    x, other = torch.randn(2, 7, 4), torch.randn(3, 9, 4)
    with torch.set_grad_enabled(training):
        swapped.train(training)(x)  # its choice is remembered
        traced = torch.jit.trace(swapped, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::lstm" in kinds
    assert not [kind for kind in kinds if "fastseq" in kind or "Python" in kind]
    torch.testing.assert_close(traced(other), swapped(other))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(other), swapped(other))


def test_a_named_backend_is_kept_while_tracing(swapped):
    with fastseq.use_backend("reference"):
        traced = torch.jit.trace(swapped, torch.randn(2, 7, 4), check_trace=False)
    assert "aten::lstm(" not in str(traced.inlined_graph)


def test_a_traced_op_with_lengths():
    lstm = fastseq.LSTM(4, 5, batch_first=True).eval()
    x, lengths = torch.randn(3, 6, 4), torch.tensor([6, 0, 3])

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, lengths):
            return self.lstm(x, lengths=lengths)[0]

    traced = torch.jit.trace(Padded(), (x, lengths))
    other = torch.tensor([2, 5, 6])
    torch.testing.assert_close(traced(x, other), lstm(x, lengths=other)[0])


def test_the_torchscript_exporter_of_onnx(swapped):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    file = io.BytesIO()
    axes = {"x": {0: "B", 1: "T"}}
    torch.onnx.export(swapped.eval(), (torch.randn(2, 7, 4),), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    x = torch.randn(3, 9, 4)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), swapped(x).detach())


def test_dynamic_quantisation_names_the_modules_that_it_passes_by(swapped):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = torch.ao.quantization.quantize_dynamic(swapped, {nn.LSTM, nn.LSTMCell, nn.Linear}, dtype=torch.qint8)
    named = [str(w.message).partition(", which stays")[0] for w in caught if "passes by" in str(w.message)]
    assert named == [
        "torch.ao.quantization passes by lstm, an LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)",
        "torch.ao.quantization passes by cell, an LSTMCell(10, 6)",
    ]
    assert type(small.lstm) is fastseq.LSTM
    assert not hasattr(small.lstm, "qconfig")
    assert small(torch.randn(2, 3, 4)).shape == (2, 3)
    fastseq.restore(swapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*deprecated.*")
        assert not hasattr(copy.deepcopy(swapped).lstm, "qconfig")
