"""Recurrent dropout, zoneout and layer normalisation as options of ``fastseq.LSTM``."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from backends import serving_variant
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import LSTM

backends = pytest.mark.parametrize("backend", ["auto", *serving_variant()])
OPTIONS = {
    "dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout_hidden": 0.3, "zoneout_cell": 0.5},
    "norm": {"layer_norm": True},
    "all": {"recurrent_dropout": 0.4, "zoneout_hidden": 0.3, "zoneout_cell": 0.5, "layer_norm": True},
}
options = pytest.mark.parametrize("option", OPTIONS)


def draw_norms(module: nn.Module) -> nn.Module:
    for name, p in module.named_parameters():
        if name.startswith("norm"):
            nn.init.normal_(p)
    return module


class Loop(nn.Module):
    """Two bidirectional layers by the equations of the papers, step by step; draws its masks as fastseq.LSTM does."""

    def __init__(self, lstm: LSTM):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, lengths):
        """x (T, B, I) -> output (T, B, 2H), h_n and c_n (4, B, H)."""
        states = []
        for k in range(2):
            if k:
                x = F.dropout(x, self.lstm.dropout, self.training)
            outputs = []
            for suffix in (f"_l{k}", f"_l{k}_reverse"):
                output, h, c = self.direction(x, lengths, suffix)
                outputs.append(output)
                states.append((h, c))
            x = torch.cat(outputs, -1)
        return x, *map(torch.stack, zip(*states, strict=True))

    def direction(self, x, lengths, suffix):
        m, (steps, batch, _) = self.lstm, x.shape
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(m, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        keep_h = torch.full((steps, batch, m.hidden_size), m.zoneout_hidden)
        keep_c = torch.full((steps, batch, m.hidden_size), m.zoneout_cell)
        if self.training:
            keep_h, keep_c = (
                torch.empty(p.shape, dtype=torch.bool).bernoulli_(float(p[0, 0, 0])).to(x) if p.any() else p
                for p in (keep_h, keep_c)
            )
        mask = F.dropout(torch.ones(batch, m.hidden_size), m.recurrent_dropout, self.training)
        rows, states = torch.zeros(steps, batch, m.hidden_size), []
        for b in range(batch):
            h = c = torch.zeros(m.hidden_size)
            order = range(int(lengths[b]))
            for t in reversed(order) if suffix.endswith("reverse") else order:
                products = [weight_ih @ x[t, b], weight_hh @ (h * mask[b])]
                if m.layer_norm:
                    gains = (getattr(m, name + suffix) for name in ("norm_ih", "norm_hh"))
                    products = [F.layer_norm(p, p.shape) * gain for p, gain in zip(products, gains, strict=True)]
                i, f, g, o = (products[0] + products[1] + bias_ih + bias_hh).chunk(4)
                new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                inner = new_c
                if m.layer_norm:
                    gain, shift = (getattr(m, name + suffix) for name in ("norm_c", "norm_c_bias"))
                    inner = F.layer_norm(new_c, new_c.shape) * gain + shift
                h = keep_h[t, b] * h + (1 - keep_h[t, b]) * o.sigmoid() * inner.tanh()
                c = keep_c[t, b] * c + (1 - keep_c[t, b]) * new_c
                rows = rows.index_put((torch.tensor(t), torch.tensor(b)), h)
            states.append((h, c))
        return rows, *map(torch.stack, zip(*states, strict=True))


@backends
@options
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_module_is_the_loop_of_the_papers(backend, option, training):
    torch.manual_seed(0)
    ours = draw_norms(LSTM(4, 6, 2, bidirectional=True, dropout=0.2, **OPTIONS[option], backend=backend)).train(
        training
    )
    x, lengths = torch.randn(5, 3, 4), torch.tensor([5, 0, 3])
    results = []
    for run in (lambda: ours(x, lengths=lengths), lambda: Loop(ours).train(training)(x, lengths)):
        torch.manual_seed(1)
        output, *states = run()
        h_n, c_n = states[0] if len(states) == 1 else states
        grads = torch.autograd.grad(output.square().sum() + h_n.sum() + c_n.sum(), list(ours.parameters()))
        results.append((output, h_n, c_n, *grads))
    torch.testing.assert_close(*results)


@options
def test_every_option_changes_the_results_in_training(option):
    torch.manual_seed(0)
    plain, x = LSTM(4, 6), torch.randn(5, 3, 4)
    for name, value in OPTIONS[option].items():
        varied = LSTM(4, 6, **{name: value})
        varied.load_state_dict(plain.state_dict(), strict=False)
        assert not torch.allclose(varied(x)[0], plain(x)[0])
        same = torch.allclose(varied.eval()(x)[0], plain(x)[0])
        assert same == (name == "recurrent_dropout")


@backends
@options
def test_layouts_agree(backend, option):
    """Packed, padded with lengths, batch_first and unbatched input; the masks are drawn in the order of the batch."""
    torch.manual_seed(0)
    module = draw_norms(LSTM(4, 6, 2, bidirectional=True, **OPTIONS[option], backend=backend))
    x, lengths = torch.randn(5, 3, 4), torch.tensor([5, 3, 1])

    def run(call):
        torch.manual_seed(1)
        output, (h_n, c_n), cells = call()
        return output, h_n, c_n, cells

    padded = run(lambda: module(x, lengths=lengths, return_cell_states=True))
    packed = run(lambda: module(pack_padded_sequence(x, lengths), return_cell_states=True))
    assert packed[0].data.shape == (9, 12)
    unpacked = (pad_packed_sequence(packed[0])[0], *packed[1:3], pad_packed_sequence(packed[3])[0])
    torch.testing.assert_close(unpacked, padded)
    module.batch_first = True
    first = run(lambda: module(x.transpose(0, 1), lengths=lengths, return_cell_states=True))
    torch.testing.assert_close((first[0].transpose(0, 1), *first[1:3], first[3].transpose(0, 1)), padded)
    module.batch_first = False
    one = run(lambda: module(x[:, :1], return_cell_states=True))
    alone = run(lambda: module(x[:, 0], return_cell_states=True))
    torch.testing.assert_close([t.unsqueeze(1) for t in alone], list(one))


def test_a_plain_lstm_keeps_its_parameters_and_seed():
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 6, 2)
    torch.manual_seed(0)
    ours = LSTM(4, 6, 2, recurrent_dropout=0.3, zoneout_cell=0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(0)
    norm = LSTM(4, 6, 2, layer_norm=True)
    for name, p in theirs.named_parameters():
        assert torch.equal(p, getattr(ours, name)) and torch.equal(p, getattr(norm, name))
    assert repr(LSTM(4, 6, 2)) == repr(theirs)
    assert repr(ours) == "LSTM(4, 6, num_layers=2, recurrent_dropout=0.3, zoneout_cell=0.1)"


def test_the_norms_are_parameters():
    module = LSTM(4, 6, bidirectional=True, layer_norm=True)
    names = [name for name in module.state_dict() if name.startswith("norm")]
    assert names == [n + s for s in ("_l0", "_l0_reverse") for n in ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")]
    draw_norms(module)
    again = LSTM(4, 6, bidirectional=True, layer_norm=True)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(torch.ones(2, 3, 4))[0], module(torch.ones(2, 3, 4))[0])
    module.reset_parameters()
    assert module.norm_ih_l0.eq(1).all() and module.norm_c_bias_l0.eq(0).all() and module.weight_ih_l0.abs().max() < 1
    moved = module.to(torch.float64)
    assert moved.norm_c_l0.dtype == torch.float64 and moved(torch.ones(2, 3, 4).double())[0].dtype == torch.float64


def test_recurrent_dropout_alone_is_a_plain_lstm_in_eval_mode():
    module = LSTM(4, 6, recurrent_dropout=0.5).eval()
    x = torch.randn(5, 3, 4)
    theirs = nn.LSTM(4, 6)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x)[0], theirs(x)[0])
    assert "lstm_variant" not in fastseq.explain(module, x)
    assert "lstm_variant" in fastseq.explain(module.train(), x)


def test_rates_change_between_calls():
    module, x = LSTM(4, 6), torch.randn(5, 3, 4)
    before = module(x)[0]
    module.zoneout_cell = 0.5
    assert not torch.allclose(module(x)[0], before)
    module.zoneout_cell = 0
    assert torch.equal(module(x)[0], before) and module.variant == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@options
def test_narrow_dtypes_and_autocast(option, dtype):
    torch.manual_seed(0)
    module = draw_norms(LSTM(4, 6, 2, **OPTIONS[option]))
    x = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    expected = module(x)[0]
    for run in (lambda: module.to(dtype)(x.to(dtype)), lambda: copy.deepcopy(module).float()(x)):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=module.weight_ih_l0.dtype == torch.float32):
            output, (h_n, c_n) = run()
        assert {output.dtype, h_n.dtype, c_n.dtype} <= {dtype, torch.float32}
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.1)
    module.float()
    with torch.autocast("cpu", dtype):
        output, _ = module(x)
    assert output.dtype == dtype
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@backends
@options
def test_torch_compile(backend, option):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = draw_norms(LSTM(3, 4, **OPTIONS[option], backend=backend)).eval()
    x, lengths = torch.randn(3, 2, 3), torch.tensor([3, 1])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for call in (module, compiled):
        output, (h_n, _) = call(x, lengths=lengths)
        grads = torch.autograd.grad(output.square().sum() + h_n.sum(), list(module.parameters()))
        results.append((output, *grads))
    torch.testing.assert_close(*results)
    module.train()
    output, _ = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    output.sum().backward()
    assert output.isfinite().all() and module.weight_hh_l0.grad.isfinite().all()


def test_copies_and_pickles():
    module = LSTM(4, 6, zoneout_hidden=0.3, layer_norm=True).eval()
    x = torch.randn(5, 3, 4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.variant == "zoneout_hidden=0.3, layer_norm=True"
        torch.testing.assert_close(other(x), module(x))


def test_accelerate_and_restore_name_the_options():
    model = nn.Sequential(nn.LSTM(4, 6), LSTM(6, 6, layer_norm=True))
    report = fastseq.accelerate(model, weight_dtype=torch.int8)
    assert "weight_dtype has no layer_norm=True" in str(report)
    fastseq.restore(model)
    fastseq.accelerate(model)
    model[0].recurrent_dropout = 0.5
    assert "has recurrent_dropout=0.5, which torch's lacks: set it to 0 first" in str(fastseq.restore(model))
    assert type(model[0]) is LSTM
    model[0].recurrent_dropout = 0
    fastseq.restore(model)
    assert type(model[0]) is nn.LSTM


def test_refusals():
    for name in ("recurrent_dropout", "zoneout_hidden", "zoneout_cell"):
        for rate in (-0.1, 1.1, True, "0.5"):
            with pytest.raises(ValueError, match=rf"{name} must be a number in 0\.\.1"):
                LSTM(4, 6, **{name: rate})
    for given in ({"layer_norm": True}, {"zoneout_cell": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} cannot be combined with a projection"):
            LSTM(4, 6, proj_size=2, **given)
    module = LSTM(4, 6, layer_norm=True)
    with pytest.raises(RuntimeError, match="unroll layer_norm=True for the traced length alone"):
        torch.jit.trace(module, torch.randn(2, 3, 4))
    module.weight_dtype = torch.int8
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"weight_dtype=torch\.int8 has no layer_norm=True"):
        module(torch.randn(2, 3, 4))
    with pytest.raises(RuntimeError, match="the torch backend has no recurrent dropout"):
        LSTM(4, 6, zoneout_hidden=0.1, backend="torch")(torch.randn(2, 3, 4))


def test_weight_drop_needs_no_option():
    """DropConnect of W_hh (haste's ``dropout``, AWD-LSTM) by torch's parametrisation, on the plain kernels."""

    class WeightDrop(nn.Module):
        def forward(self, weight):
            return F.dropout(weight, 0.5, self.training)

    module = LSTM(4, 6)
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", WeightDrop())
    x = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    actual = module(x)[0]
    torch.manual_seed(1)
    dropped = F.dropout(module.parametrizations.weight_hh_l0.original, 0.5)
    weights = (module.weight_ih_l0, dropped, module.bias_ih_l0, module.bias_hh_l0)
    expected = fastseq.ops.lstm(x, (torch.zeros(3, 6),) * 2, *weights)[0]
    torch.testing.assert_close(actual, expected)
