"""Layers as a wavefront, on the host-side device: streams run in any order that their events allow."""

import re
from pathlib import Path

import emulator
import pytest
import torch

import fastseq
from fastseq import dispatch
from fastseq.ops.common import streams
from fastseq.ops.lstm import native_cuda, wavefront
from fastseq.testing.numerics import compare, evaluate

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")
STEPS, BATCH, INPUT, HIDDEN = 22, 3, 5, 16


@pytest.fixture(params=range(3))
def waves(monkeypatch, request):
    """Chunks of 8 steps: 22 steps are cut into 8, 8 and 6. Return the plans that were taken."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("FASTSEQ_LSTM_WAVEFRONT", "8")
    dispatch.forget()  # plans of another kernel
    plans, run = [], wavefront.run
    monkeypatch.setattr(wavefront, "run", lambda *given: plans.append(given[-1]) or run(*given))
    with emulator.as_native():
        streams.run = emulator.shuffled(request.param)  # as_native restores it
        yield plans


def module(dtype=torch.float32, backend="native", **options):
    torch.manual_seed(0)
    return fastseq.LSTM(INPUT, HIDDEN, **options, backend=backend).to(dtype)


def results(lstm, dtype, lengths=None, **options):
    """Outputs and all gradients, by name, of inputs and states that are always the same."""
    torch.manual_seed(1)
    x = torch.randn(STEPS, BATCH, INPUT).to(dtype).requires_grad_()
    hx = [torch.randn(lstm.num_layers, BATCH, HIDDEN).to(dtype).requires_grad_() for _ in range(2)]
    output, (h_n, c_n), *rest = lstm(x, tuple(hx), lengths=lengths, **options)
    outputs = {"output": output, "h_n": h_n, "c_n": c_n} | ({"cell_states": rest[0]} if rest else {})
    return evaluate(outputs, {"input": x, "h0": hx[0], "c0": hx[1], **dict(lstm.named_parameters())})


def differences(cut, whole):
    """Names of outputs and gradients of which a bit differs."""
    pairs = [*zip(cut.outputs.items(), whole.outputs.values(), strict=True)]
    pairs += zip(cut.gradients.items(), whole.gradients.values(), strict=True)
    return [name for (name, a), b in pairs if not torch.equal(a, b)]


KINDS = [("cluster", "tf32"), ("cluster", "bfloat16"), ("grid", "float32"), ("grid", "tf32"), ("grid", "float16")]


@pytest.mark.parametrize(("kernel", "kind"), KINDS)
def test_cutting_changes_no_bit(waves, monkeypatch, kernel, kind):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", kernel)
    dispatch.forget()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == "tf32")
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    lengths = torch.tensor([STEPS, 0, 13])
    lstm = module(dtype, num_layers=2)
    cut = results(lstm, dtype, lengths, return_cell_states=True)
    assert waves == [(8, 2, 2)]
    monkeypatch.setenv("FASTSEQ_LSTM_WAVEFRONT", "0")
    assert not differences(cut, results(lstm, dtype, lengths, return_cell_states=True))
    assert len(waves) == 1


@pytest.mark.parametrize(("layers", "options"), [(3, {}), (4, {"bias": False})], ids=str)
def test_deeper_stacks(waves, layers, options):
    lstm = module(num_layers=layers, **options)
    oracle = module(num_layers=layers, backend="reference", **options).double()
    plain = module(num_layers=layers, backend="torch", **options)
    kinds = [(lstm, torch.float32), (oracle, torch.float64), (plain, torch.float32)]
    assert not [str(c) for c in compare(*(results(one, dtype) for one, dtype in kinds)) if not c.ok]
    assert waves == [(8, layers, layers)]


def test_dropout_draws_the_numbers_of_layer_by_layer(waves, monkeypatch):
    lstm = module(num_layers=3, dropout=0.5)
    cut = results(lstm, torch.float32)
    assert len(waves) == 1
    monkeypatch.setenv("FASTSEQ_LSTM_WAVEFRONT", "0")
    assert not differences(cut, results(lstm, torch.float32))


def test_more_layers_than_fit_share_streams(waves):
    lstm = module(num_layers=4)
    free = results(lstm, torch.float32)
    dispatch.forget()
    with emulator.device(multiprocessors=6):
        narrow = results(lstm, torch.float32)
    dispatch.forget()
    assert [plan.forward for plan in waves] == [4, 3]
    assert not differences(narrow, free)


def test_inference_keeps_nothing(waves):
    lstm = module(num_layers=2)
    x = torch.randn(STEPS, BATCH, INPUT)
    with torch.no_grad():
        output, (h_n, c_n) = lstm(x)
    expected = lstm(x)
    assert len(waves) == 2 and not output.requires_grad
    for ours, theirs in zip((output, h_n, c_n), (expected[0], *expected[1]), strict=True):
        assert torch.equal(ours, theirs)


def test_only_what_is_wanted(waves):
    lstm = module(num_layers=2)
    for name, p in lstm.named_parameters():
        p.requires_grad_(name == "weight_hh_l1")
    _, (h_n, _) = lstm(torch.randn(STEPS, BATCH, INPUT))
    h_n[0].sum().backward()
    assert lstm.weight_hh_l1.grad.abs().sum() == 0
    assert {name for name, p in lstm.named_parameters() if p.grad is not None} == {"weight_hh_l1"}


def test_double_backward(waves):
    ours, plain = module(num_layers=2), module(num_layers=2, backend="reference")
    x = torch.randn(STEPS, BATCH, INPUT)

    def penalty(lstm):
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(lstm(given)[0].square().sum(), given, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(lstm.parameters()))

    for a, b in zip(penalty(ours), penalty(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_calls_that_stay_layer_by_layer(waves):
    x = torch.randn(STEPS, BATCH, INPUT)
    module(num_layers=1)(x)
    module(num_layers=2, bidirectional=True)(x)
    lstm = module(num_layers=2)
    lstm(torch.nn.utils.rnn.pack_sequence([x[:, 0]]))
    torch.func.vmap(lambda x: lstm(x)[0])(x.unsqueeze(0))
    assert not waves


@pytest.mark.parametrize("switch", ["12", "00", "x"])
def test_a_switch_that_is_no_chunk(waves, monkeypatch, switch):
    monkeypatch.setenv("FASTSEQ_LSTM_WAVEFRONT", switch)
    with pytest.raises(ValueError, match=f"multiple of 8, got '{switch}'"):
        module(num_layers=2)(torch.randn(STEPS, BATCH, INPUT))


def test_plans_follow_the_model():
    """Where a kernel holds a small part of the device and the sequence is long; not where it holds half of it."""

    def planned(batch, hidden, layers, steps, training=False, switch=""):
        with emulator.as_native():
            return wavefront._plan((batch, hidden, torch.bfloat16, False, None), layers, steps, training, switch)

    assert planned(16, 512, 2, 1000).forward == 2
    assert planned(16, 512, 4, 1000).forward == 3  # 29 % of the device each
    assert planned(16, 512, 2, 1000, training=True) is not None
    assert planned(16, 512, 2, 20) is None  # shorter than two chunks
    assert planned(16, 256, 2, 256) is None  # layer by layer, each spreads its rows over more clusters
    assert planned(1, 256, 2, 64) is None  # the host would need longer than the device
    assert planned(64, 1024, 2, 1000) is planned(64, 1024, 2, 1000, switch="16") is None  # no room, whatever is asked


def test_schedule():
    order, end = wavefront.schedule(2, 3, 2, 1000.0)
    assert order[:3] == [(0, 0), (0, 1), (1, 0)]
    assert 4000 < end < 4000 + 7 * wavefront.HOST_US
    assert wavefront.schedule(2, 3, 1, 1000.0)[1] > 6000
    for layers, chunks, width in ((4, 5, 2), (3, 1, 3), (5, 4, 4)):
        order, _ = wavefront.schedule(layers, chunks, width, 10.0)
        for layer, chunk in order:
            position = order.index((layer, chunk))
            assert not layer or order.index((layer - 1, chunk)) < position
            assert not chunk or order.index((layer, chunk - 1)) < position


def test_the_page_states_the_modelled_gain():
    page = (Path(__file__).parents[2] / "docs" / "kernels" / "cuda-wavefront.md").read_text()
    kinds = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True)}
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+) \| (bf16|tf32) \| (.*) \|$", page, re.MULTILINE)
    for hidden, batches, kind, cells in rows:
        for batch in batches.split(", "):
            shape = (int(batch), int(hidden), *kinds[kind], None)
            stated = [_stated(shape, layers, training) for layers in (2, 4) for training in (False, True)]
            assert cells.split(" | ") == stated, (hidden, batch, kind)
    assert len(rows) == 8


def _stated(shape, layers, training, steps=1024):
    with emulator.as_native():
        dispatch.forget()
        plan = wavefront._plan(shape, layers, steps, training, "")
        (us, _), (us_back, _) = native_cuda.shares(*shape)
        alone = native_cuda.best_us(*shape)
    if plan is None:
        return "no room"
    passes = [(us, plan.forward)] + [(us_back, plan.backward)] * training
    serial = wavefront._total(layers, steps, steps, [(us, 1) for us in alone[: len(passes)]])
    gain = serial / wavefront._total(layers, steps, plan.chunk, passes)
    return f"{gain:.2f} ({plan.chunk}; {plan.forward}, {plan.backward})"
