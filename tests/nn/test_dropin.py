"""Uses of ``nn.LSTM`` besides plain calls; each must work the same with ``fastseq.LSTM``."""

import inspect

import pytest
import torch
from backends import serving_lstm
from pairs import assert_same, flat, pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastseq
from fastseq import LSTM, LSTMCell

BACKENDS = ["auto", *serving_lstm()]
OWN = [name for name in BACKENDS if name not in ("auto", "torch")]
backends = pytest.mark.parametrize("backend", BACKENDS)
own_backends = pytest.mark.parametrize("backend", OWN)


@pytest.mark.parametrize(
    "options", [{}, dict(num_layers=2, bidirectional=True, bias=False), dict(num_layers=2, proj_size=2)], ids=str
)
def test_same_seed_same_weights(options):
    torch.manual_seed(3)
    theirs = nn.LSTM(4, 5, **options)
    after_theirs = torch.rand(1)
    torch.manual_seed(3)
    ours = LSTM(4, 5, **options)
    assert torch.equal(torch.rand(1), after_theirs)  # and the generator is left in the same place
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())
    theirs.load_state_dict(ours.state_dict())
    assert [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
    assert ours.extra_repr() == theirs.extra_repr()


def test_cell_same_seed_same_weights():
    torch.manual_seed(3)
    theirs = nn.LSTMCell(4, 5)
    torch.manual_seed(3)
    ours = LSTMCell(4, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_cell_parity(backend, dtype, batched):
    theirs, ours = pair(3, 5, backend=backend, cls=LSTMCell, dtype=dtype)
    x = torch.randn(4, 3).to(dtype)
    given = (torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype))
    if not batched:
        x, given = x[0], (given[0][0], given[1][0])
    tolerance = dict(rtol=0, atol=8 * torch.finfo(dtype).eps)
    for state in (None, given):
        results, grads = [], []
        for module in (theirs, ours):
            leaf = x.clone().requires_grad_()
            hx = state and tuple(s.clone().requires_grad_() for s in state)
            h, c = module(leaf, hx)
            (h.sum() + (c * c).sum()).backward()
            results.append((h, c))
            grads.append([leaf.grad, *(s.grad for s in hx or ()), *(p.grad for p in module.parameters())])
            module.zero_grad()
        torch.testing.assert_close(results[1], results[0], **tolerance)
        for a, b in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps * max(1.0, float(b.abs().max())))


@backends
@pytest.mark.parametrize("form", ["padded", "batch_first", "packed"])
def test_dropout_between_layers_repeats_nn_lstm(backend, form):
    theirs, ours = pair(4, 6, 3, dropout=0.5, bidirectional=True, batch_first=form == "batch_first", backend=backend)
    x = torch.randn(5, 3, 4)
    if form == "packed":
        x = pack_padded_sequence(x, [5, 3, 1])
    results = []
    for module in (theirs, ours):
        torch.manual_seed(11)
        results.append(module(x))
    assert_same(results[1], results[0], rtol=0, atol=1e-6)
    theirs.eval(), ours.eval()
    assert_same(ours(x), theirs(x), rtol=0, atol=1e-6)


@own_backends
def test_backward_in_eval_mode(backend):
    module = LSTM(4, 5, backend=backend).eval()
    x = torch.randn(3, 2, 4, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0 and module.weight_hh_l0.grad.abs().sum() > 0


@own_backends
def test_biases_get_separate_gradients(backend):
    module = LSTM(4, 5, backend=backend)
    module(torch.randn(3, 2, 4))[0].sum().backward()
    assert torch.equal(module.bias_ih_l0.grad, module.bias_hh_l0.grad)
    assert module.bias_ih_l0.grad.data_ptr() != module.bias_hh_l0.grad.data_ptr()


@backends
def test_frozen_parameters_get_no_gradient(backend):
    module = LSTM(4, 5, backend=backend)
    module.weight_hh_l0.requires_grad_(False)
    module(torch.randn(3, 2, 4))[0].sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None


@backends
def test_gradcheck_and_gradgradcheck(backend):
    module = LSTM(2, 3, 2, bidirectional=True, backend=backend, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    lengths = torch.tensor([3, 0, 2])

    def call(x, h, c, *weights):
        output, states = torch.func.functional_call(
            module, dict(zip(names, weights, strict=True)), (x, (h, c)), {"lengths": lengths}
        )
        return output, *states

    x, h, c = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 3, 2), (4, 3, 3), (4, 3, 3)))
    leaves = (x, h, c, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@backends
def test_cell_gradcheck_and_gradgradcheck(backend):
    module = LSTMCell(2, 3, backend=backend, dtype=torch.float64)
    leaves = [torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3)]
    assert torch.autograd.gradcheck(lambda x, h, c: module(x, (h, c)), leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, h, c: module(x, (h, c)), leaves)


@own_backends
def test_double_backward_when_one_input_depends_on_another(backend):
    """hx = (s, tanh(s)): the gradient at h0 must not run through c0 a second time."""
    x, weight_ih, weight_hh = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 2, 2), (12, 2), (12, 3)))
    grads = []
    for name in ("torch", backend):
        torch.manual_seed(0)
        s = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        output, _ = fastseq.ops.lstm(x, (s, s.tanh()), weight_ih, weight_hh, backend=name)
        (first,) = torch.autograd.grad(output.sin().sum(), s, create_graph=True)
        grads.append((first.detach(), *torch.autograd.grad(first.square().sum(), s)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_flatten_parameters_half_and_to():
    module = LSTM(4, 5)
    module.flatten_parameters()
    assert module.double()(torch.randn(3, 2, 4, dtype=torch.float64))[0].dtype == torch.float64
    assert module.bfloat16()(torch.randn(3, 2, 4, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert module.to("meta").weight_ih_l0.device.type == "meta"


def test_replacing_nn_lstm_at_run_time_cannot_recurse(monkeypatch):
    expected = LSTM(4, 5)
    monkeypatch.setattr(torch.nn, "LSTM", fastseq.LSTM)
    monkeypatch.setattr(torch.nn, "LSTMCell", fastseq.LSTMCell)
    module = torch.nn.LSTM(4, 5, backend="torch")
    module.load_state_dict(expected.state_dict())
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(module(x)[0], expected(x)[0])
    assert torch.nn.LSTMCell(4, 5, backend="torch")(x[0])[0].shape == (2, 5)


@backends
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
def test_lengths_equal_running_each_sequence_alone(backend, batch_first):
    module = LSTM(3, 4, 2, bidirectional=True, batch_first=batch_first, backend=backend, dtype=torch.float64)
    lengths = torch.tensor([2, 0, 6, 1, 5])
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    h0, c0 = torch.randn(4, 5, 4, dtype=torch.float64), torch.randn(4, 5, 4, dtype=torch.float64)
    output, (h, c) = module(x if batch_first else x.transpose(0, 1), (h0, c0), lengths=lengths)
    output = output if batch_first else output.transpose(0, 1)
    for b, n in enumerate(lengths.tolist()):
        state = (h0[:, b : b + 1].contiguous(), c0[:, b : b + 1].contiguous())
        if n == 0:
            expected = (output.new_zeros(1, 0, 8), state)
        else:
            alone = x[b : b + 1, :n]
            expected = module(alone if batch_first else alone.transpose(0, 1), state)
            expected = (expected[0] if batch_first else expected[0].transpose(0, 1), expected[1])
        torch.testing.assert_close(output[b : b + 1, :n], expected[0])
        assert output[b, n:].eq(0).all()
        torch.testing.assert_close((h[:, b : b + 1], c[:, b : b + 1]), expected[1])


@backends
def test_garbage_past_the_length_reaches_nothing(backend):
    """Padding may hold anything: it changes no result and no gradient."""
    module = LSTM(3, 4, bidirectional=True, backend=backend)
    lengths = torch.tensor([2, 0, 4])
    x = torch.randn(4, 3, 3)
    results = []
    for garbage in (0.0, float("nan")):
        filled = x.clone()
        for b, n in enumerate(lengths.tolist()):
            filled[n:, b] = garbage
        filled.requires_grad_()
        module.zero_grad()
        output, (h, c) = module(filled, lengths=lengths)
        (output.sum() + h.sum() + c.sum()).backward()
        results.append([output, h, c, filled.grad, *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.isfinite(a).all()


@own_backends
def test_cell_states_may_be_changed_in_place(backend):
    module, grads = LSTM(4, 5, backend=backend), []
    for change in (False, True):
        output, _, cells = module(torch.ones(3, 2, 4), return_cell_states=True)
        if change:
            cells.zero_()
        grads.append(torch.autograd.grad(output.sum(), list(module.parameters())))
    torch.testing.assert_close(*grads)


@own_backends
@pytest.mark.parametrize("form", ["padded", "batch_first", "packed", "unbatched"])
def test_cell_states_of_every_step(backend, form):
    module = LSTM(3, 4, 2, bidirectional=True, batch_first=form == "batch_first", backend=backend)
    x = torch.randn(5, 2, 3)
    given = {
        "padded": x,
        "batch_first": x.transpose(0, 1),
        "unbatched": x[:, 0],
        "packed": pack_padded_sequence(x, [5, 5]),
    }[form]
    output, (h, c), cells = module(given, return_cell_states=True)
    if form == "packed":
        output, cells = pad_packed_sequence(output)[0], pad_packed_sequence(cells)[0]
    elif form == "batch_first":
        output, cells = output.transpose(0, 1), cells.transpose(0, 1)
    elif form == "unbatched":
        output, cells, h, c = output.unsqueeze(1), cells.unsqueeze(1), h.unsqueeze(1), c.unsqueeze(1)
    assert cells.shape == output.shape
    torch.testing.assert_close(cells[-1, :, :4], c[-2])  # forward direction ends at the last step,
    torch.testing.assert_close(cells[0, :, 4:], c[-1])  # the reverse direction at the first
    assert (output.abs() <= cells.tanh().abs() + 1e-6).all()  # h = o tanh(c), 0 < o < 1
    cells.sum().backward()
    assert module.weight_ih_l0.grad.abs().sum() > 0


@own_backends
def test_large_preactivations_stay_finite_and_right(backend):
    theirs, ours = pair(3, 4, backend=backend, dtype=torch.float64)
    with torch.no_grad():
        for module in (theirs, ours):
            module.weight_ih_l0.mul_(100)
    x = torch.randn(6, 2, 3, dtype=torch.float64) * 50
    reference = theirs(x)
    single = ours.float()(x.float())
    for a, b in zip(flat(single), flat(reference), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-3)
    single[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@backends
def test_input_is_not_modified(backend):
    module = LSTM(3, 4, backend=backend)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([1, 5])
    h, c = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    before = [t.clone() for t in (x, lengths, h, c)]
    module(x, (h, c), lengths=lengths)[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, lengths, h, c), strict=True))


@backends
def test_packed_from_pack_sequence_without_indices(backend):
    theirs, ours = pair(3, 4, 2, bidirectional=True, backend=backend)
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 4, 1)])
    assert_same(ours(packed), theirs(packed), rtol=0, atol=1e-6)


@backends
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_output_may_be_changed_in_place(backend, form):
    """nn.LSTM trains through an in-place change of its output, packed or float64, and so must every backend."""
    theirs, ours = pair(4, 5, backend=backend, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    grads = []
    for module in (theirs, ours):
        output, _ = module(pack_padded_sequence(x, [5, 4, 1]) if form == "packed" else x)
        data = output.data if form == "packed" else output
        data.mul_(2)
        data.sum().backward()
        grads.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*grads)


def test_meta_device():
    x = torch.randn(3, 2, 4, device="meta")
    for options in ({}, {"lengths": torch.tensor([3, 1])}):
        output, (h, _) = LSTM(4, 5, device="meta")(x, **options)
        assert (output.shape, output.device.type, h.shape) == ((3, 2, 5), "meta", (1, 2, 5))


def test_default_device_does_not_leak_into_index_arithmetic():
    module, packed = LSTM(4, 5, backend="reference"), pack_padded_sequence(torch.randn(3, 2, 4), [3, 1])
    expected = module(packed)
    with torch.device("meta"):
        actual = module(packed)
        actual[0].data.sum().backward()
    assert_same(actual, expected)


@backends
def test_forward_mode_keeps_the_tangents(backend):
    theirs, ours = pair(4, 5, 2, bidirectional=True, backend=backend, dtype=torch.float64)  # float32 raises in nn.LSTM
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for a, b in zip(flat(ours(dual)), flat(theirs(dual)), strict=True):
            torch.testing.assert_close(*(torch.autograd.forward_ad.unpack_dual(t).tangent for t in (a, b)))


@own_backends
def test_double_backward_without_incoming_gradients(backend):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(3, 2, 4, requires_grad=True)
    loss = Stop.apply(LSTM(4, 5, backend=backend)(x)[0])
    assert torch.autograd.grad(loss, x, create_graph=True, allow_unused=True) == (None,)


LIVE_BASE = dict(input_size=4, hidden_size=6, num_layers=2)
LIVE = {
    "input_size": 5,
    "hidden_size": 7,
    "num_layers": 3,
    "bias": False,
    "batch_first": True,
    "dropout": 0.5,
    "bidirectional": True,
    "proj_size": 3,
    "device": "meta",
    "dtype": torch.float64,
    "backend": "triton",
    "recurrent_dropout": 0.5,
    "zoneout_hidden": 0.5,
    "zoneout_cell": 0.5,
    "layer_norm": True,
}


def behaviour(**options):
    """Everything an option can change: parameters, the output, or the message of an error."""
    torch.manual_seed(0)
    module = LSTM(**LIVE_BASE | options)
    parameters = [(name, p.shape, p.dtype, p.device) for name, p in module.named_parameters()]
    if {"device", "dtype", "input_size"} & set(options):
        return parameters
    try:
        return parameters, module(torch.ones(3, 2, 4))[0].tolist()
    except RuntimeError as error:
        return parameters, str(error)


def test_every_option_of_the_constructor_is_alive():
    assert list(LIVE) == list(inspect.signature(LSTM.__init__).parameters)[1:]
    for name, value in LIVE.items():
        assert behaviour(**{name: value}) != behaviour(), name


def test_every_option_of_forward_is_alive():
    module, x = LSTM(4, 5), torch.randn(3, 2, 4)
    (output, _), cells = module(x), module(x, return_cell_states=True)
    assert len(cells) == 3
    assert not torch.equal(module(x, lengths=torch.tensor([1, 3]))[0], output)
    assert not torch.equal(module(x, (torch.ones(1, 2, 5), torch.ones(1, 2, 5)))[0], output)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_another_dtype_gets_the_sentence_of_nn_lstm(form):
    theirs, ours = pair(4, 5)
    x = torch.randn(3, 2, 4).double()
    with pytest.raises(ValueError) as expected:  # noqa: PT011  the sentence is compared below
        theirs(x)
    kind, given = (ValueError, x) if form == "padded" else (RuntimeError, pack_padded_sequence(x, [3, 1]))
    with pytest.raises(kind) as actual:
        ours(given)
    assert str(actual.value) == str(expected.value)


@backends
@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_lengths_stay_on_the_cpu_under_another_default_device(backend, as_list):
    module, x, lengths = LSTM(4, 5, backend=backend), torch.randn(3, 2, 4), torch.tensor([3, 1])
    expected = module(x, lengths=lengths)
    try:
        torch.set_default_device("meta")
        actual = module(x, lengths=[3, 1] if as_list else lengths)
    finally:
        torch.set_default_device(None)
    assert_same(actual, expected)
