"""The compiled operators against a plain float64 loop: values, gradients, layouts, threads, refusals, fakes."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import _native
from fastseq.backend import LSTMCall, LSTMCellCall
from fastseq.ops.lstm import native as lstm_native
from fastseq.ops.lstm_cell import native as cell_native
from fastseq.testing import assert_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
ops = torch.ops.fastseq

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 3, 7), (4, 9, 64), (3, 2, 257), (2, 67, 5)]  # T, B, H
LAYOUTS = ["full", "lengths", "packed"]


def shape_id(shape):
    return "T{}B{}H{}".format(*shape)


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """What an operator forgets to write is NaN (or the largest integer), not a lucky zero."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def loop(gates, h0, c0, weight_hh, lengths, reverse):
    """The LSTM recurrence, one sequence and one step at a time: output, h_n, c_n, cell states. Differentiable."""
    T, B, _ = gates.shape
    H = h0.size(1)
    zero = h0.new_zeros(H)
    columns = []
    for b in range(B):
        h, c, length = h0[b], c0[b], int(lengths[b])
        outputs, cells = [zero] * T, [zero] * T
        for t in reversed(range(length)) if reverse else range(length):
            i, f, g, o = (gates[t, b] + weight_hh @ h).split(H)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs[t], cells[t] = h, c
        columns.append((torch.stack(outputs), h, c, torch.stack(cells)))
    output, h_n, c_n, cells = zip(*columns, strict=True)
    return torch.stack(output, 1), torch.stack(h_n), torch.stack(c_n), torch.stack(cells, 1)


def ragged(T, B, smallest):
    """Lengths that contain the smallest and the largest value, in no order."""
    return torch.tensor([smallest + (5 * b + T - smallest) % (T - smallest + 1) for b in range(B)])


class Problem:
    """Inputs of one call, already rounded to the dtype, in the layout under test."""

    def __init__(self, shape, layout, dtype):
        T, B, H = shape
        self.lengths = torch.full((B,), T)
        if layout == "lengths":
            self.lengths = ragged(T, B, smallest=0)
        if layout == "packed":
            self.lengths = ragged(T, B, smallest=1).sort(descending=True).values
        self.layout = layout
        scale = H**-0.5
        self.gates = torch.randn(T, B, 4 * H).to(dtype)
        self.h0, self.c0 = torch.randn(B, H).to(dtype), torch.randn(B, H).to(dtype)
        self.weight_hh = (scale * torch.randn(4 * H, H)).to(dtype)
        self.batch_sizes = self.pack(self.gates)[1]

    def pack(self, padded):
        """(T, B, X) -> (data in the layout under test, batch_sizes or None)."""
        if self.layout != "packed":
            return padded.contiguous(), None
        packed = pack_padded_sequence(padded, self.lengths)
        return packed.data.contiguous(), packed.batch_sizes

    def pad(self, data):
        """What an operator returned, per step -> (T, B, X)."""
        if self.layout != "packed":
            return data
        return pad_packed_sequence(PackedSequence(data, self.batch_sizes), total_length=self.gates.size(0))[0]

    def layout_arguments(self):
        return (self.lengths if self.layout == "lengths" else None, self.batch_sizes)

    def forward(self, reverse, need_activations=True, need_cell_states=True):
        gates, _ = self.pack(self.gates)
        inputs = (gates, self.h0, self.c0, self.weight_hh, *self.layout_arguments())
        return ops.lstm_forward(*inputs, reverse, need_activations, need_cell_states)

    def loop(self, dtype, reverse, requires_grad=False):
        """The loop in one dtype: its results, and the leaves they can be differentiated by."""
        leaves = [
            t.detach().to(dtype).requires_grad_(requires_grad) for t in (self.gates, self.h0, self.c0, self.weight_hh)
        ]
        return loop(*leaves, self.lengths, reverse), leaves


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_lstm_matches_the_loop(dtype, shape, layout, reverse):
    problem = Problem(shape, layout, dtype)
    exact, exact_leaves = problem.loop(torch.float64, reverse, requires_grad=True)
    plain, plain_leaves = problem.loop(dtype, reverse, requires_grad=True)
    output, h_n, c_n, activations, cell_states = problem.forward(reverse)

    assert_accurate(problem.pad(output), exact[0], plain[0], name="output")
    assert_accurate(h_n, exact[1], plain[1], name="h_n")
    assert_accurate(c_n, exact[2], plain[2], name="c_n")
    assert_accurate(problem.pad(cell_states).to(dtype), exact[3], plain[3], name="cell_states")

    upstream = [torch.randn(t.shape).to(dtype) for t in exact]
    torch.autograd.backward(exact, [g.double() for g in upstream])
    torch.autograd.backward(plain, upstream)
    grad_gates, grad_h0, grad_c0 = ops.lstm_backward(
        problem.pack(upstream[0])[0],
        upstream[1],
        upstream[2],
        problem.pack(upstream[3])[0],
        activations,
        cell_states,
        problem.c0,
        problem.weight_hh,
        *problem.layout_arguments(),
        reverse,
    )
    for name, grad, i in (("gates", problem.pad(grad_gates), 0), ("h0", grad_h0, 1), ("c0", grad_c0, 2)):
        assert_accurate(grad, exact_leaves[i].grad, plain_leaves[i].grad, factor=3, name=f"grad_{name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_exactly_zero(layout):
    problem = Problem((5, 4, 3), layout, torch.float32)
    output, _, _, activations, cell_states = problem.forward(reverse=False)
    past = torch.arange(5).unsqueeze(1) >= problem.lengths
    grad_gates, *_ = ops.lstm_backward(
        torch.ones_like(output), None, None, None, activations, cell_states, problem.c0, problem.weight_hh,
        *problem.layout_arguments(), False,
    )  # fmt: skip
    for result in (output, activations, cell_states, grad_gates):
        assert (problem.pad(result)[past] == 0).all()


@pytest.mark.parametrize("present", range(4), ids=["output", "h_n", "c_n", "cell_states"])
def test_a_missing_gradient_counts_as_zero(present):
    problem = Problem((4, 3, 7), "lengths", torch.float64)
    results = problem.forward(reverse=True)
    shapes = (results[0], results[1], results[2], results[4])
    upstream = [torch.randn_like(t) if i == present else None for i, t in enumerate(shapes)]
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(shapes, upstream, strict=True)]
    rest = (*results[3:], problem.c0, problem.weight_hh, *problem.layout_arguments(), True)
    for a, b in zip(ops.lstm_backward(*upstream, *rest), ops.lstm_backward(*zeros, *rest), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("need", [(False, False), (True, False), (False, True)], ids=str)
def test_what_is_not_needed_has_no_elements(need):
    problem = Problem((4, 3, 7), "full", torch.float32)
    *results, activations, cell_states = problem.forward(False, *need)
    assert activations.shape == ((4, 3, 28) if need[0] else (0,))
    assert cell_states.shape == ((4, 3, 7) if need[1] else (0,))
    for a, b in zip(results, problem.forward(False), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_nothing(layout):
    problem = Problem((40, 70, 128), layout, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, *8 * (2, 3)):  # again and again: a race shows only when threads overlap
            torch.set_num_threads(threads)
            forward = problem.forward(reverse=True)
            rest = (problem.c0, problem.weight_hh, *problem.layout_arguments(), True)
            results.append([*forward, *ops.lstm_backward(forward[0], None, None, None, *forward[3:], *rest)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("T", "B"), [(0, 2), (3, 0), (0, 0)])
def test_empty_batch_or_no_steps(T, B):
    h0, c0, weight_hh = torch.randn(B, 5), torch.randn(B, 5), torch.randn(20, 5)
    output, h_n, c_n, *saved = ops.lstm_forward(torch.randn(T, B, 20), h0, c0, weight_hh, None, None, False, True, True)
    assert output.shape == (T, B, 5)
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, c0)
    grads = ops.lstm_backward(None, h0, c0, None, *saved, c0, weight_hh, None, None, False)
    assert grads[0].shape == (T, B, 20)
    assert torch.equal(grads[1], h0)
    assert torch.equal(grads[2], c0)


def test_no_packed_rows():
    empty = torch.tensor([], dtype=torch.int64)
    state, weight_hh = torch.randn(2, 5), torch.randn(20, 5)
    output, h_n, *_ = ops.lstm_forward(torch.randn(0, 20), state, state, weight_hh, None, empty, False, False, False)
    assert output.shape == (0, 5)
    assert torch.equal(h_n, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("B", "H"), [(1, 1), (3, 63), (9, 257), (0, 4)])
def test_cell_matches_torch(B, H, dtype):
    gates, c = torch.randn(B, 4 * H).to(dtype), torch.randn(B, H).to(dtype)
    upstream = torch.randn(B, H).to(dtype), torch.randn(B, H).to(dtype)

    def plain(kind):
        leaves = [t.detach().clone().to(kind).requires_grad_() for t in (gates, c)]
        i, f, g, o = leaves[0].chunk(4, 1)
        c_n = torch.sigmoid(f) * leaves[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c_n)
        torch.autograd.backward((h, c_n), [g.to(kind) for g in upstream])
        return h, c_n, leaves[0].grad, leaves[1].grad

    exact, baseline = plain(torch.float64), plain(dtype)
    h, c_n, activations = ops.lstm_cell_forward(gates, c)
    grads = ops.lstm_cell_backward(activations, c, c_n, *upstream)
    assert_accurate(h, exact[0], baseline[0], name="h")
    assert_accurate(c_n, exact[1], baseline[1], name="c_n")
    assert_accurate(grads[0], exact[2], baseline[2], factor=3, name="grad_gates")
    assert_accurate(grads[1], exact[3], baseline[3], factor=3, name="grad_c")
    only_h = ops.lstm_cell_backward(activations, c, c_n, upstream[0], None)
    assert torch.equal(only_h[0], ops.lstm_cell_backward(activations, c, c_n, upstream[0], torch.zeros_like(c))[0])


def activate(x):
    """sigmoid(x) and tanh(x) as the float32 kernels compute them."""
    H = x.numel()
    gates = torch.cat((x, torch.zeros(H), x, torch.zeros(H))).unsqueeze(0)
    activations = ops.lstm_cell_forward(gates, torch.zeros(1, H))[2][0]
    return activations[:H], activations[2 * H : 3 * H]


def test_float32_sigmoid_and_tanh_are_within_three_roundings():
    x = torch.cat((torch.linspace(-80, 80, 400_001), torch.logspace(-30, 1, 20_001), -torch.logspace(-30, 1, 20_001)))
    sigmoid, tanh = activate(x)
    eps = torch.finfo(torch.float32).eps
    exact = x.double().sigmoid(), x.double().tanh()
    assert ((sigmoid - exact[0]).abs() / exact[0]).max() < 3 * eps
    assert ((tanh - exact[1]).abs() / exact[1].abs().clamp_min(1e-45)).max() < 3 * eps


def test_activations_saturate_and_pass_nan_through():
    inf, nan = float("inf"), float("nan")
    sigmoid, tanh = activate(torch.tensor([-inf, -100.0, 0.0, 100.0, inf, nan]))
    torch.testing.assert_close(sigmoid, torch.tensor([0, 0, 0.5, 1, 1, nan]), rtol=0, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(tanh, torch.tensor([-1.0, -1, 0, 1, 1, nan]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_every_16_bit_value_survives_loading_and_storing(dtype):
    c = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(0)
    keep = torch.tensor([-100.0, 100.0, 0.0, 0.0], dtype=dtype).repeat_interleave(c.numel()).unsqueeze(0)
    c_n = ops.lstm_cell_forward(keep, c)[1]  # f = 1, i * g = 0
    assert torch.equal(c_n.isnan(), c.isnan())
    assert torch.equal(c_n[~c.isnan()], c[~c.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_16_bit_results_are_rounded_to_nearest_even(dtype):
    H = 50_000
    gates = torch.cat((torch.full((1, H), -100.0), torch.randn(1, 3 * H)), 1)
    gates[:, 2 * H : 3 * H] = 0
    c = torch.logspace(-8, 4.9, H).unsqueeze(0).to(dtype)
    _, c_n, activations = ops.lstm_cell_forward(gates.to(dtype), c)
    assert torch.equal(c_n, (activations[:, H : 2 * H] * c.float()).to(dtype))


BAD_CALLS = {
    "rank of gates": (dict(gates=torch.zeros(2, 12)), r"gates must have the shape \(T, B, columns\)"),
    "columns of gates": (dict(gates=torch.zeros(4, 2, 13)), r"gates must have the shape \(4, 2, 12\)"),
    "batch of gates": (dict(gates=torch.zeros(4, 3, 12)), r"gates must have the shape \(4, 2, 12\), got \(4, 3, 12\)"),
    "batch of h0": (dict(h0=torch.zeros(1, 3)), r"h0 must have the shape \(2, 3\), got \(1, 3\)"),
    "rank of c0": (dict(c0=torch.zeros(3)), r"c0 must have the shape \(B, H\), got \(3,\)"),
    "weight_hh": (dict(weight_hh=torch.zeros(3, 12)), r"weight_hh must have the shape \(12, 3\)"),
    "stride": (dict(weight_hh=torch.zeros(3, 12).T), "weight_hh must be contiguous"),
    "dtype": (dict(h0=torch.zeros(2, 3).double()), "h0 must have the dtype Float, got Double"),
    "integers": (
        dict(
            gates=torch.zeros(4, 2, 12).int(),
            h0=torch.zeros(2, 3).int(),
            c0=torch.zeros(2, 3).int(),
            weight_hh=torch.zeros(12, 3).int(),
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
        gates=torch.zeros(4, 2, 12),
        h0=torch.zeros(2, 3),
        c0=torch.zeros(2, 3),
        weight_hh=torch.zeros(12, 3),
        lengths=None,
        batch_sizes=None,
    )
    return ops.lstm_forward(*(arguments | changes).values(), False, True, True)


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_arguments_get_a_sentence(changes, message):
    with pytest.raises(RuntimeError, match=f"lstm_forward: .*{message}"):
        forward_with(**changes)


@pytest.mark.parametrize(("sizes", "message"), BAD_BATCH_SIZES.values(), ids=BAD_BATCH_SIZES.keys())
def test_bad_batch_sizes_get_a_sentence(sizes, message):
    with pytest.raises(RuntimeError, match=f"lstm_forward: .*{message}"):
        forward_with(gates=torch.zeros(6, 12), batch_sizes=torch.tensor(sizes))


@pytest.mark.parametrize("i", range(8))
def test_backward_refuses_every_argument_of_another_shape(i):
    shapes = [(4, 2, 3), (2, 3), (2, 3), (4, 2, 3), (4, 2, 12), (4, 2, 3), (2, 3), (12, 3)]
    arguments = [torch.zeros(shape) for shape in shapes]
    arguments[i] = torch.zeros(5, *shapes[i][1:])
    with pytest.raises(RuntimeError, match=r"lstm_backward: .* must have the shape"):
        ops.lstm_backward(*arguments, None, None, False)
    arguments[i] = torch.zeros(shapes[i], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"lstm_backward: .* must have the dtype"):
        ops.lstm_backward(*arguments, None, None, False)


def test_cell_refuses_bad_arguments():
    with pytest.raises(RuntimeError, match=r"lstm_cell_forward: gates must have the shape \(2, 12\), got \(2, 20\)"):
        ops.lstm_cell_forward(torch.zeros(2, 20), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"lstm_cell_backward: grad_h must have the shape \(2, 3\), got \(1, 3\)"):
        ops.lstm_cell_backward(*map(torch.zeros, [(2, 12), (2, 3), (2, 3), (1, 3)]), None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_opcheck_lstm(dtype, layout):
    problem = Problem((5, 3, 7), layout, dtype)
    gates, _ = problem.pack(problem.gates)
    sizes = problem.layout_arguments()
    arguments = (gates, problem.h0, problem.c0, problem.weight_hh, *sizes)
    for need in (True, False):
        torch.library.opcheck(ops.lstm_forward.default, (*arguments, False, need, need))
    output, h_n, c_n, activations, cell_states = ops.lstm_forward(*arguments, True, True, True)
    rest = (activations, cell_states, problem.c0, problem.weight_hh, *sizes, True)
    torch.library.opcheck(ops.lstm_backward.default, (output, h_n, c_n, output, *rest))
    torch.library.opcheck(ops.lstm_backward.default, (None, h_n, None, None, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck_lstm_cell(dtype):
    gates, c = torch.randn(3, 20).to(dtype), torch.randn(3, 5).to(dtype)
    torch.library.opcheck(ops.lstm_cell_forward.default, (gates, c))
    h, c_n, activations = ops.lstm_cell_forward(gates, c)
    torch.library.opcheck(ops.lstm_cell_backward.default, (activations, c, c_n, h, None))


LSTM_CALL = LSTMCall(device="cpu", dtype=torch.float32, input_size=3, hidden_size=5)
CELL_CALL = LSTMCellCall(device="cpu", dtype=torch.float32, hidden_size=5)
REFUSALS = {
    "device": (dict(device="cuda"), r"runs on CPU tensors \(got cuda\); use backend="),
    "dtype": (dict(dtype=torch.complex64), r"computes in float32, float64, bfloat16, float16 \(got torch.complex64\)"),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize(
    ("backend", "call"), [(lstm_native, LSTM_CALL), (cell_native, CELL_CALL)], ids=["lstm", "cell"]
)
def test_backend_says_what_it_cannot_do(backend, call, change, sentence):
    assert backend.unsupported(call) is None
    assert re.search(sentence, backend.unsupported(call._replace(**change)))


def test_backend_has_no_projection():
    assert "no projection (proj_size=2)" in lstm_native.unsupported(LSTM_CALL._replace(proj_size=2))


@pytest.mark.parametrize(
    ("backend", "call"), [(lstm_native, LSTM_CALL), (cell_native, CELL_CALL)], ids=["lstm", "cell"]
)
def test_backend_says_why_the_library_is_missing(backend, call, monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_error", ImportError("libtorch_cpu.so: undefined symbol"))
    assert "failed to load (libtorch_cpu.so: undefined symbol)" in backend.unsupported(call)
    assert "FASTSEQ_NATIVE=1 pip install" in backend.unsupported(call)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_of_this_machine(isa):
    environment = os.environ | {"FASTSEQ_CPU_ISA": isa}
    used = subprocess.check_output(
        [sys.executable, "-c", "from fastseq import _native; print(_native.build_info()['cpu'])"],
        env=environment,
        text=True,
    ).strip()
    if used != isa:
        pytest.skip(f"this machine has no {isa}")
    subset = "(matches and (float32 or float64) and not T2) or roundings or saturate or 16_bit"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-k", subset]
    subprocess.run(command, env=environment, check=True)
