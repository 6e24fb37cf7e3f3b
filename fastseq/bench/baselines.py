"""Further baselines of ``fastseq bench --baselines``: loops of cells, torch.compile, eager attention, onnxruntime."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.bench.cases import BenchCase
from fastseq.bench.timing import Setup


class CellLoop(nn.Module):
    """One layer as a Python loop over ``nn.LSTMCell``, compiled or not, with the weights of ``nn.LSTM``."""

    def __init__(self, setup: Setup, compiled: bool = False):
        super().__init__()
        case = setup.case
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
        """The cell's, each once: the compiled cell shares them."""
        return self.cell.parameters(recurse)


def _compile(call: Callable[..., object]) -> Callable[..., object]:
    """Compile for the sizes of the first call; recompilations of earlier cases do not count towards torch's limit."""
    torch.compiler.reset()
    return torch.compile(call, dynamic=False)


def _eager_attention(setup: Setup) -> Callable[..., object]:
    """Attention op by op, also for dot scores."""
    return partial(setup.baseline, need_weights=True)


class OnnxRuntime(nn.Module):
    """The ONNX operator LSTM in onnxruntime, on as many threads as torch: inference of one float32 layer."""

    def __init__(self, setup: Setup):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Else its threads spin on after a call and take a core from the candidate whose turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = _onnx_model(setup.make(None))
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


class Baseline(NamedTuple):
    """A further baseline: ``make`` builds its call, ``serves`` is True for the cases and modes that it supports."""

    make: Callable[[Setup], Callable[..., object]]
    serves: Callable[[BenchCase, bool], bool]


def _one_layer(case: BenchCase, train: bool) -> bool:
    return case.kind == "lstm" and case.layers == 1 and not case.proj_size


BASELINES = {
    "LSTMCell loop": Baseline(CellLoop, _one_layer),
    "compiled cell loop": Baseline(partial(CellLoop, compiled=True), _one_layer),
    "compiled": Baseline(
        lambda setup: _compile(_eager_attention(setup) if setup.case.keys else setup.make(None)),
        lambda case, train: case.kind in ("cell", "additive", "dot"),
    ),
    "eager": Baseline(_eager_attention, lambda case, train: case.kind == "dot"),
    "onnxruntime": Baseline(
        OnnxRuntime, lambda case, train: _one_layer(case, train) and not train and case.dtype == torch.float32
    ),
}


def make_baselines(
    setup: Setup, train: bool, names: tuple[str, ...]
) -> tuple[dict[str, Callable[..., object]], list[str]]:
    """The chosen baselines that serve this case and mode, and a remark for each whose package is missing."""
    made, remarks = {}, []
    for name in names:
        if BASELINES[name].serves(setup.case, train):
            try:
                made[name] = BASELINES[name].make(setup)
            except ModuleNotFoundError as error:
                remarks.append(
                    f"baseline {name} skipped: the package {error.name} is not installed; pip install {error.name}"
                )
    return made, remarks
