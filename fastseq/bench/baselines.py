"""Further peers of ``fastseq bench --peers``: loops of cells, torch.compile, eager attention, onnxruntime."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.bench.cases import AttentionOp, Case, make_module
from fastseq.testing.numerics import plain_attention


class CellLoop(nn.Module):
    """One layer as a Python loop over ``nn.LSTMCell``, which may be compiled; the weights of ``nn.LSTM``."""

    def __init__(self, case: Case, compiled: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTMCell(case.input_size, case.hidden_size, dtype=case.dtype)
        self.step = _compile(self.cell) if compiled else self.cell

    def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = c = input.new_zeros(input.size(1), self.cell.hidden_size)
        outputs = []
        for x in input:
            h, c = self.step(x, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))

    def parameters(self, recurse: bool = True):
        """Each once: the compiled cell has the same ones."""
        return self.cell.parameters(recurse)


def _compile(module: nn.Module) -> nn.Module:
    """Compiled for the sizes it meets, with none of the recompilations of earlier cases counted against it."""
    torch.compiler.reset()
    return torch.compile(module, dynamic=False)


class EagerAttention(AttentionOp):
    """Attention op by op, whatever the score."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        super().__init__(case, None)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return plain_attention(query, keys, values, **self.options, weight=getattr(self, "weight", None))[0]


class OnnxRuntime(nn.Module):
    """The ONNX operator LSTM in onnxruntime, with as many threads as torch has: inference of one float32 layer."""

    def __init__(self, case: Case):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        model = _onnx_model(make_module(case, None))
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, h_n, c_n = self.session.run(None, {"X": input.detach().numpy()})
        return torch.from_numpy(output).squeeze(1), (torch.from_numpy(h_n), torch.from_numpy(c_n))


def _onnx_model(lstm: nn.LSTM) -> bytes:
    """A graph of one LSTM node; ONNX orders the gates i, o, f, g."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, *parts: Tensor) -> "onnx.TensorProto":
        gates = (part.detach().chunk(4) for part in parts)
        joined = torch.cat([torch.cat((i, o, f, g)) for i, f, g, o in gates])
        return numpy_helper.from_array(joined.unsqueeze(0).numpy(), name)

    weights = [
        constant("W", lstm.weight_ih_l0),
        constant("R", lstm.weight_hh_l0),
        constant("B", lstm.bias_ih_l0, lstm.bias_hh_l0),
    ]
    names = ("Y", "Y_h", "Y_c")
    node = helper.make_node("LSTM", ["X", "W", "R", "B"], names, hidden_size=lstm.hidden_size)
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, (None, None, lstm.input_size))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "lstm", [x], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


class Peer(NamedTuple):
    """How a peer is made, and which cases and modes it serves."""

    make: Callable[[Case], nn.Module]
    serves: Callable[[Case, bool], bool]


def _one_layer(case: Case, train: bool) -> bool:
    return case.kind == "lstm" and case.layers == 1 and not case.proj_size


PEERS = {
    "LSTMCell loop": Peer(CellLoop, _one_layer),
    "compiled cell loop": Peer(lambda case: CellLoop(case, compiled=True), _one_layer),
    "compiled": Peer(
        lambda case: _compile(EagerAttention(case) if case.keys else make_module(case, None)),
        lambda case, train: case.kind in ("cell", "additive", "dot"),
    ),
    "eager": Peer(EagerAttention, lambda case, train: case.kind == "dot"),
    "onnxruntime": Peer(
        OnnxRuntime, lambda case, train: _one_layer(case, train) and not train and case.dtype == torch.float32
    ),
}


def make_peers(case: Case, train: bool, names: tuple[str, ...]) -> tuple[dict[str, nn.Module], list[str]]:
    """The chosen peers that serve this case and mode, and a remark for each whose package is missing."""
    made, remarks = {}, []
    for name in names:
        if PEERS[name].serves(case, train):
            try:
                made[name] = PEERS[name].make(case)
            except ModuleNotFoundError as error:
                remarks.append(
                    f"peer {name} skipped: the package {error.name} is not installed; pip install {error.name}"
                )
    return made, remarks
