"""Autocast: the backend that the same call in 16 bits takes, the result dtypes of ``nn.LSTM``, numbers, gradients."""

import contextlib
import copy
import itertools

import pytest
import torch
from backends import serving_lstm
from pairs import flat, pair
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastseq import LSTM, Attention, LSTMCell, _native, dispatch, ops
from fastseq.dispatch import select
from fastseq.ops.common.triton import runtime
from fastseq.ops.lstm import native_cuda, predicates
from fastseq.ops.lstm import torch as torch_backend
from fastseq.ops.lstm.spec import LSTMCall, Stack
from fastseq.ops.lstm.torch import runs_under_autocast
from fastseq.testing.numerics import compare, evaluate

BACKENDS = ["auto", *serving_lstm()]
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
backends = pytest.mark.parametrize("backend", BACKENDS)
half = pytest.mark.parametrize("dtype", HALVES, ids=str)


LENGTHS = [7, 6, 5, 4, 3, 3, 2, 1]


def run(module, x, form, hx=None, autocast=None):
    """The results of ``module`` on padded or packed x (T, B, I), under autocast to a dtype: output, h_n, c_n."""
    if form in ("packed", "one length"):  # outside autocast, which refuses to concatenate some dtypes
        x = pack_padded_sequence(x, LENGTHS[: x.size(1)] if form == "packed" else [len(x)] * x.size(1))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        return flat(module(x, hx))


@pytest.mark.parametrize("backend", ["auto", *serving_lstm(dtype=torch.bfloat16, autocast=True, fused=True)])
@pytest.mark.parametrize(("form", "batch"), [("padded", 8), ("padded", 2), ("packed", 8)])
def test_results_and_gradients_are_as_accurate_as_those_of_nn_lstm(backend, form, batch):
    theirs, ours = pair(8, 32, 2, backend=backend)
    x = torch.randn(7, batch, 8)
    rounded = copy.deepcopy(theirs).bfloat16()

    def results(module, x, autocast=torch.bfloat16):
        x = x.clone().requires_grad_()
        outputs = dict(zip(("output", "h_n", "c_n"), run(module, x, form, autocast=autocast), strict=True))
        return evaluate(outputs, {"x": x, **dict(module.named_parameters())})

    actual, oracle = results(ours, x), results(copy.deepcopy(rounded).double(), x.bfloat16().double(), autocast=None)
    if form == "packed" or runs_under_autocast(torch.bfloat16):
        baseline = results(theirs, x)
    else:  # this oneDNN has no LSTM in bfloat16: torch computes it op by op outside autocast
        baseline = results(rounded, x.bfloat16(), autocast=None)
        gradients = {name: g.to(actual.gradients[name]) for name, g in baseline.gradients.items()}
        baseline = baseline._replace(gradients=gradients)
    wrong = [str(c) for c in compare(actual, oracle, baseline) if not c.ok]
    assert not wrong, "; ".join(wrong)
    assert {g.dtype for g in actual.gradients.values()} == {torch.float32}


@backends
@half
@pytest.mark.parametrize("form", ["padded", "packed", "one length", "proj"])
def test_result_dtypes_are_those_of_nn_lstm(backend, form, dtype):
    """All combinations of the dtypes of weights, input, h_0 and c_0. Where nn.LSTM raises, ours must compute."""
    compared = 0
    for weights, input, h0, c0 in itertools.product((torch.float32, dtype), FLOATS, (None, *FLOATS), FLOATS):
        theirs, ours = pair(4, 5, proj_size=3 if form == "proj" else 0, dtype=weights)
        ours.backend = backend if form != "proj" or backend in serving_lstm(proj_size=3) else "auto"
        x = torch.randn(7, 2, 4).to(input)
        hx = None if h0 is None else (torch.randn(1, 2, 3 if form == "proj" else 5).to(h0), torch.randn(1, 2, 5).to(c0))
        try:
            expected = run(theirs, x, form, hx, dtype)
        except RuntimeError:  # this oneDNN lacks the dtype
            assert backend == "torch" or run(ours, x, form, hx, dtype)
            continue
        for a, b in zip(run(ours, x, form, hx, dtype), expected, strict=True):
            assert a.dtype == b.dtype, (weights, input, h0, c0)
        compared += 1
    assert compared > 0 or form in ("padded", "one length")


@pytest.mark.parametrize("backend", ["auto", *serving_lstm(dtype=torch.bfloat16, autocast=True, fused=True)])
def test_lengths_give_the_dtypes_of_packing_whatever_their_values(backend):
    theirs, ours = pair(4, 5, backend=backend)
    x = torch.randn(7, 8, 4)
    expected = run(theirs, x, "packed", autocast=torch.bfloat16)
    for lengths in (LENGTHS, [7] * 8):
        with torch.autocast("cpu", torch.bfloat16):
            actual = flat(ours(x, lengths=lengths))
        assert [t.dtype for t in actual] == [t.dtype for t in expected]


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_cell_states_have_the_dtype_of_c_n(form):
    module, x = LSTM(4, 5), torch.randn(3, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        *result, cells = module(pack_padded_sequence(x, [3, 1]) if form == "packed" else x, return_cell_states=True)
    assert (cells.data if form == "packed" else cells).dtype == flat(result)[2].dtype


def test_auto_takes_under_autocast_what_the_same_call_in_16_bits_takes(monkeypatch):
    monkeypatch.setattr(torch_backend, "runs_under_autocast", lambda *_: True)
    monkeypatch.setattr(native_cuda, "fits", lambda *args, **kwargs: True)
    monkeypatch.setattr(native_cuda, "modelled_gain", lambda call: 2.0)
    monkeypatch.setattr(_native, "why_not_cuda", lambda index=None: "")
    monkeypatch.setattr(runtime, "_installed", lambda: False)  # Triton would look for the GPU
    dispatch.forget()
    changes = {
        "device": ("cpu", "cuda"),
        "dtype": HALVES,
        "batch": (1, 4, 40),
        "hidden_size": (5, 256, 2000),
        "lengths": (False, True),
        "packed": (False, True),
        "requires_grad": (False, True),
        "return_cell_states": (False, True),
        "proj_size": (0, 2),
    }
    taken = set()
    for values in itertools.product(*changes.values()):
        call = LSTMCall("cpu", torch.bfloat16, 4, 5, batch=2, steps=7)  # of fewer steps, see the next test
        call = call._replace(**dict(zip(changes, values, strict=True)))
        explicit = select("lstm", "auto", call)
        assert select("lstm", "auto", call._replace(autocast=True, fused=True)) == explicit, call
        taken.add(explicit)
    assert taken >= {"torch", "native" if "native" in BACKENDS else "reference"}


@pytest.mark.skipif("native" not in BACKENDS, reason="the compiled operators are not part of this install")
def test_short_calls_of_many_sequences_train_on_torch(monkeypatch):
    monkeypatch.setattr(torch_backend, "runs_under_autocast", lambda *_: True)
    monkeypatch.setattr(predicates, "_instruction_set", lambda: "avx512_bf16")
    monkeypatch.setattr(predicates, "_amx", lambda: False)
    dispatch.forget()
    call = LSTMCall("cpu", torch.bfloat16, 4, 5, batch=5, steps=2, autocast=True, fused=True, requires_grad=True)
    assert select("lstm", "auto", call) == "torch"
    changes = (dict(steps=3), dict(batch=4), dict(autocast=False, fused=False), dict(packed=True, fused=False))
    assert [select("lstm", "auto", call._replace(**c)) for c in changes] == ["native"] * 4
    monkeypatch.setattr(torch_backend, "runs_under_autocast", lambda *_: False)
    dispatch.forget()
    assert select("lstm", "auto", call) == "native"


def test_a_module_under_autocast_is_served_as_in_bfloat16():
    module, x = LSTM(4, 5), torch.randn(7, 2, 4)
    with dispatch.record() as explicit:
        copy.deepcopy(module).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), dispatch.record() as choices:
        module(x)
    assert [c.backend for c in choices] == [c.backend for c in explicit]
    assert choices[0].call == explicit[0].call._replace(autocast=True, fused=True)


def test_auto_leaves_torch_where_onednn_lacks_the_dtype(monkeypatch):
    monkeypatch.setattr(torch_backend, "runs_under_autocast", lambda *_: False)
    call = LSTMCall("cpu", torch.bfloat16, 4, 5, batch=40, steps=7, autocast=True, fused=True)
    assert select("lstm", "auto", call) == ("native" if "native" in BACKENDS else "reference")
    with pytest.raises(RuntimeError, match=r"bfloat16, which oneDNN does not have .* use backend='native'"):
        select("lstm", "torch", call)
    for changes in (dict(packed=True), dict(proj_size=2)):
        assert select("lstm", "torch", call._replace(**changes, fused=False)) == "torch"
    assert select("lstm", "auto", call._replace(lengths=True, fused=False)) != "torch"  # they may be equal


def test_onednn_is_asked_in_the_grad_mode_of_the_call(monkeypatch):
    """On processors with AVX-512 FP16 torch takes oneDNN's float16 LSTM without gradients, and raises with them."""

    def smallest(device, autocast, input, grad_mode):
        if not grad_mode:
            return autocast
        return torch.float32 if input == torch.float16 else None

    monkeypatch.setattr(torch_backend, "_run_smallest", smallest)
    dispatch.forget()
    module, x = LSTM(4, 5), torch.randn(7, 40, 4)
    with torch.autocast("cpu", torch.float16):
        for input, grad_mode, fused in ((x, True, True), (x, False, True), (x.half(), True, False)):
            with torch.set_grad_enabled(grad_mode), dispatch.record() as choices:
                module(input)
            (choice,) = choices
            assert (choice.call.fused, choice.call.requires_grad) == (fused, grad_mode)
            assert ("torch" in choice.objections) == (grad_mode and fused)
    dispatch.forget()


@pytest.mark.parametrize("cudnn", [torch.float16, torch.bfloat16], ids=str)
def test_on_cuda_the_dtype_is_the_one_in_which_torch_computes(cudnn, monkeypatch):
    """torch casts the operands of cuDNN to float16 under autocast to bfloat16, too; a CPU stands for the GPU."""
    calls = []

    def kernel(input, hx, weights, *options):
        calls.append(input.dtype)
        return (input.to(cudnn),)

    monkeypatch.setattr(torch_backend, "_vf_lstm", kernel)
    zeros = torch.zeros
    monkeypatch.setattr(torch_backend.torch, "zeros", lambda shape, dtype, device: zeros(shape))
    torch_backend._run_smallest.cache_clear()
    with torch.autocast("cuda", torch.bfloat16, enabled=True):
        for _ in range(2):
            assert torch_backend.autocast_compute_dtype("cuda", torch.float32) == cudnn
    assert calls == [torch.float32]  # once per process
    torch_backend._run_smallest.cache_clear()
    stack = Stack(torch.empty(7, 4, device="meta"), *[torch.empty(1, 2, 5, device="meta")] * 2, (), proj_size=2)
    assert torch_backend.fused_under_autocast(stack, cudnn)
    call = LSTMCall("cuda", cudnn, 4, 5, packed=True, autocast=True, fused=True)
    assert torch_backend.autocast_result_dtypes(call, torch.float32) == (cudnn,) * 3


@backends
def test_a_nested_block_without_autocast_computes_in_float32(backend):
    module, x = LSTM(4, 5, backend=backend), torch.randn(3, 2, 4)
    expected = flat(module(x))
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16):
        inner = module(x)[0] if backend != "torch" or runs_under_autocast(torch.float16, True) else None
    assert inner is None or inner.dtype == torch.float16


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape to 16 bits."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_half = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") in HALVES
        self.count += to_half and args[0].shape == self.shape
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name not in ("auto", "torch"))])
@pytest.mark.parametrize(("cache", "train", "casts"), [(True, True, 1), (False, True, 3), (True, False, 3)])
def test_a_block_casts_each_matrix_once(backend, cache, train, casts):
    module, x = LSTM(4, 5, backend=backend), torch.randn(1, 2, 4)
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)
    with autocast, torch.set_grad_enabled(train), Casts((20, 5)) as counted:
        outputs = [module(k * x)[0] for k in range(3)]
    assert counted.count == casts
    if train:
        sum(outputs).sum().backward()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = sum(module(k * x)[0] for k in range(3)).sum()
        expected = torch.autograd.grad(loss, list(module.parameters()))
        for p, g in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=0, atol=3 * 2**-8 * float(g.abs().max()))


@pytest.mark.parametrize("before", ["no_grad", "checkpoint", "hooks"])
def test_cached_casts_lose_no_gradient(before):
    """After a call without gradients in the same block, within a checkpoint, under hooks on saved tensors."""
    module, x = LSTM(4, 5, backend="reference"), torch.randn(1, 2, 4)
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks if before == "hooks" else contextlib.nullcontext():
        if before == "no_grad":
            with torch.no_grad():
                torch.mm(torch.ones(1, 20), module.weight_ih_l0)
                module(x)
        output = checkpoint(module, x, use_reentrant=False)[0] if before == "checkpoint" else module(x)[0]
    grads = torch.autograd.grad(output.sum(), list(module.parameters()))
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=0.02 * float(exact.abs().max()))


@backends
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_float64_stays_float64(backend, form):
    theirs, ours = pair(4, 5, backend=backend, dtype=torch.float64)
    x = torch.randn(7, 8, 4, dtype=torch.float64)
    actual, expected = (run(module, x, form, autocast=torch.bfloat16) for module in (ours, theirs))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["auto", *serving_lstm(dtype=torch.bfloat16, autocast=True, fused=True)])
def test_a_compiled_module_has_the_dtypes_of_the_eager_one(backend):
    ours, x = LSTM(4, 5, backend=backend), torch.randn(3, 2, 4)
    torch._dynamo.reset()
    actual = run(torch.compile(ours, backend="eager", fullgraph=True), x, "padded", autocast=torch.bfloat16)
    assert {t.dtype for t in actual} == {torch.bfloat16}
    torch.testing.assert_close(actual, run(ours, x, "padded", autocast=torch.bfloat16), rtol=0, atol=0.02)


def test_the_op_has_the_dtypes_of_the_module():
    module, x, state = LSTM(4, 5), torch.randn(3, 2, 4), torch.zeros(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"lengths": torch.tensor([3, 1])}):
            output, (h_n, c_n) = ops.lstm(x, (state, state), *module._flat_weights, **options)
            assert [t.dtype for t in (output, h_n, c_n)] == [t.dtype for t in flat(module(x, **options))]


@backends
@half
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_a_cell_has_the_dtypes_of_nn_lstm_cell(backend, dtype, train):
    theirs, ours = pair(4, 5, backend=backend, cls=LSTMCell)
    for weights, input, state in itertools.product((torch.float32, dtype), FLOATS, (None, *FLOATS)):
        theirs.to(weights), ours.to(weights)
        x, hx = torch.randn(2, 4).to(input), None
        if state is not None:
            hx = torch.randn(2, 5).to(state), torch.randn(2, 5).to(state)
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(train):
            expected, actual = theirs(x, hx), ours(x, hx)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.03)  # dtypes are compared, too


@half
@pytest.mark.parametrize("score", ["dot", "general", "additive", "normed_additive"])
def test_attention_computes_in_the_dtype_of_autocast(dtype, score):
    module = Attention(4, 4, score=score)
    narrow = copy.deepcopy(module).to(dtype)
    query, keys, lengths = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4), torch.tensor([5, 2])
    with torch.autocast("cpu", dtype), dispatch.record() as choices:
        actual = module(query, keys, lengths=lengths, need_weights=True)
        sum(t.float().sum() for t in actual).backward()
    with dispatch.record() as explicit:
        expected = narrow(query.to(dtype), keys.to(dtype), lengths=lengths, need_weights=True)
    assert {t.dtype for t in actual} == {dtype} and query.grad.dtype == torch.float32
    assert [c.backend for c in choices] == [c.backend for c in explicit]
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "torch")])
def test_backward_inside_autocast_keeps_the_precision_of_the_forward(backend):
    module, x = LSTM(4, 5, backend=backend), torch.randn(3, 2, 4)
    grads = []
    for autocast in (False, True):
        loss = module(x)[0].square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)
