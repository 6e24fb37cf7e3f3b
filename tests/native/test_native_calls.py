"""The compiled LSTM operators: refusals, fakes for torch.compile, and the native backend's unsupported()."""

import re

import pytest
import torch
from native_cases import DIRECTIONS, LAYOUTS, Problem, dtype_id, ops

from fastseq import _native
from fastseq.ops.lstm import native as lstm_native
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.ops.lstm_cell import native as cell_native
from fastseq.ops.lstm_cell.spec import LSTMCellCall

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")


def weights(**changes):
    return list((dict(ih=torch.zeros(12, 5), hh=torch.zeros(12, 3)) | changes).values())


BIASES = dict(b_ih=torch.zeros(12), b_hh=torch.zeros(12))
BAD_CALLS = {
    "rank of input": (dict(input=torch.zeros(2, 5)), r"input must have the shape \(T, B, I\), got \(2, 5\)"),
    "batch of input": (dict(input=torch.zeros(4, 3, 5)), r"input must have the shape \(4, 2, 5\), got \(4, 3, 5\)"),
    "stride of input": (dict(input=torch.zeros(2, 4, 5).transpose(0, 1)), "input must be contiguous"),
    "batch of h0": (dict(h0=torch.zeros(1, 1, 3)), r"h0 must have the shape \(1, 2, 3\), got \(1, 1, 3\)"),
    "directions of h0": (dict(h0=torch.zeros(2, 2, 3)), r"h0 must have the shape \(1, 2, 3\), got \(2, 2, 3\)"),
    "rank of c0": (dict(c0=torch.zeros(2, 3)), r"c0 must have the shape \(D, B, H\), got \(2, 3\)"),
    "three directions": (dict(c0=torch.zeros(3, 2, 3)), "c0 must be for 1 or 2 directions, got 3"),
    "number of weights": (dict(weights=weights()[:1]), "for each of 1 directions, got 1 tensors"),
    "rank of weight_hr": (
        dict(weights=weights(hr=torch.zeros(3))),
        r"weight_hr must have the shape \(P, H\), got \(3,\)",
    ),
    "columns of weight_hr": (
        dict(weights=weights(hr=torch.zeros(2, 4), hh=torch.zeros(12, 2)), h0=torch.zeros(1, 2, 2)),
        r"weight_hr must have the shape \(2, 3\), got \(2, 4\)",
    ),
    "h0 of a projection": (
        dict(weights=weights(hr=torch.zeros(2, 3), hh=torch.zeros(12, 2))),
        r"h0 must have the shape \(1, 2, 2\), got \(1, 2, 3\)",
    ),
    "one bias": (dict(weights=weights(b_ih=torch.zeros(12))), r"weight_hr must have the shape \(P, H\), got \(12,\)"),
    "weight_ih": (dict(weights=weights(ih=torch.zeros(12, 3))), r"weight_ih must have the shape \(12, 5\)"),
    "weight_hh": (dict(weights=weights(hh=torch.zeros(3, 12))), r"weight_hh must have the shape \(12, 3\)"),
    "bias_ih": (dict(weights=weights(**BIASES | {"b_ih": torch.zeros(1)})), r"bias_ih must have the shape \(12,\)"),
    "bias_hh": (dict(weights=weights(**BIASES | {"b_hh": torch.zeros(1)})), r"bias_hh must have the shape \(12,\)"),
    "stride": (dict(weights=weights(hh=torch.zeros(3, 12).T)), "weight_hh must be contiguous"),
    "dtype of h0": (dict(h0=torch.zeros(1, 2, 3).double()), "h0 must have the dtype Float, got Double"),
    "dtype of a weight": (dict(weights=weights(hh=torch.zeros(12, 3).half())), "weight_hh must have the dtype Float"),
    "integers": (
        dict(
            input=torch.zeros(4, 2, 5).int(),
            h0=torch.zeros(1, 2, 3).int(),
            c0=torch.zeros(1, 2, 3).int(),
            weights=[w.int() for w in weights()],
        ),
        "the dtype must be Float, Double, BFloat16 or Half, got Int",
    ),
    "length above T": (dict(lengths=torch.tensor([5, 1])), r"lengths must lie in 0 .. 4, got lengths\[0\] = 5"),
    "negative length": (dict(lengths=torch.tensor([4, -1])), r"lengths must lie in 0 .. 4, got lengths\[1\] = -1"),
    "number of lengths": (dict(lengths=torch.tensor([4])), r"lengths must have the shape \(2,\)"),
    "dtype of lengths": (dict(lengths=torch.tensor([4, 4]).int()), "lengths must have the dtype Long"),
    "both layouts": (dict(lengths=torch.tensor([4, 4]), batch_sizes=torch.tensor([2, 2])), "exclude each other"),
}
BAD_BATCH_SIZES = {
    "increasing": ([2, 1, 2, 1], "never increase"),
    "zero": ([2, 2, 2, 0], "must be positive"),
    "short": ([2, 2, 1], "must sum to the 6 rows of the packed input, got 5"),
    "smaller than the batch": ([1, 1, 1, 1, 1, 1], r"batch_sizes\[0\] must be the batch size of h0 and c0, 2, got 1"),
    "larger than the batch": ([3, 3], r"batch_sizes\[0\] must be the batch size of h0 and c0, 2, got 3"),
}


def forward_with(**changes):
    arguments = dict(
        input=torch.zeros(4, 2, 5),
        h0=torch.zeros(1, 2, 3),
        c0=torch.zeros(1, 2, 3),
        weights=weights(),
        lengths=None,
        batch_sizes=None,
    )
    return ops.lstm_forward(*(arguments | changes).values(), False, True, True)


def test_unchanged_arguments_are_accepted():
    forward_with()
    forward_with(weights=weights(**BIASES))


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_arguments_get_a_sentence(changes, message):
    with pytest.raises(RuntimeError, match=f"lstm_forward: .*{message}"):
        forward_with(**changes)


@pytest.mark.parametrize(("sizes", "message"), BAD_BATCH_SIZES.values(), ids=BAD_BATCH_SIZES.keys())
def test_bad_batch_sizes_get_a_sentence(sizes, message):
    with pytest.raises(RuntimeError, match=f"lstm_forward: .*{message}"):
        forward_with(input=torch.zeros(6, 5), batch_sizes=torch.tensor(sizes))


GRADIENTS = ["grad_output", "grad_h_n", "grad_c_n", "grad_cell_states", "activations", "cell_states"]


@pytest.mark.parametrize("name", GRADIENTS)
def test_backward_refuses_every_tensor_of_another_kind(name):
    shapes = [(4, 2, 3), (1, 2, 3), (1, 2, 3), (4, 2, 3), (4, 2, 12), (4, 2, 3)]
    tensors = dict(zip(GRADIENTS, map(torch.zeros, shapes), strict=True))
    call = torch.zeros(4, 2, 5), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), weights()

    def backward(**changes):
        *grads, activations, cells = (tensors | changes).values()
        ops.lstm_backward(*grads, *call, activations, cells, None, None, False, True, True)

    backward()
    shape = tensors[name].shape
    for wrong, why in (
        (torch.zeros(5, *shape[1:]), "have the shape"),
        (torch.zeros(shape, dtype=torch.int32), "have the dtype"),
        (torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2], "be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"lstm_backward: {name} must {why}"):
            backward(**{name: wrong})


@pytest.mark.parametrize(("direction", "projection"), [*[(d, 0) for d in DIRECTIONS], ("both", 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_opcheck(dtype, layout, direction, projection):
    problem = Problem(4, 3, 2, 5, layout, dtype, direction, bias=direction != "reverse", projection=projection)
    forward = (*problem.arguments(), *problem.sizes())
    for need in ((True, True), (False, False)):
        torch.library.opcheck(ops.lstm_forward.default, (*forward, *need))
    output, h_n, c_n, *saved = problem.forward()
    rest = (*problem.arguments(), *saved, *problem.sizes())
    all_grads = (output, h_n, c_n, saved[1].to(dtype))
    for grads, need in ((all_grads, (True, True)), ((None, h_n, None, None), (False, False))):
        torch.library.opcheck(ops.lstm_backward.default, (*grads, *rest, *need))


LSTM_CALL = LSTMCall(device="cpu", dtype=torch.float32, input_size=3, hidden_size=5)
CELL_CALL = LSTMCellCall(device="cpu", dtype=torch.float32, hidden_size=5)
REFUSALS = {
    "device": (dict(device="mps"), r"runs on CPU and CUDA \(got mps\); use backend="),
    "dtype": (dict(dtype=torch.complex64), r"computes in float32, float64, bfloat16, float16 \(got torch.complex64\)"),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize(
    ("backend", "call"), [(lstm_native, LSTM_CALL), (cell_native, CELL_CALL)], ids=["lstm", "cell"]
)
def test_unsupported_names_the_limit(backend, call, change, sentence):
    assert backend.unsupported(call) is None
    assert re.search(sentence, backend.unsupported(call._replace(**change)))


@pytest.mark.parametrize(
    ("backend", "call"), [(lstm_native, LSTM_CALL), (cell_native, CELL_CALL)], ids=["lstm", "cell"]
)
def test_unsupported_names_the_missing_library(backend, call, monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_error", ImportError("libtorch_cpu.so: undefined symbol"))
    assert "failed to load (libtorch_cpu.so: undefined symbol)" in backend.unsupported(call)
    assert "FASTSEQ_NATIVE=1 pip install" in backend.unsupported(call)
