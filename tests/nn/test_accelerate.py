"""``accelerate`` and ``restore``: same objects, same numbers, reports."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastseq
from fastseq import LSTM, LSTMCell


class WithOwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output * 2, states


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(4, 6, 2, bidirectional=True, dropout=0.3)
        self.layers = nn.ModuleList([nn.LSTMCell(12, 5), nn.GRU(5, 5)])
        self.special = WithOwnForward(5, 5)

    def forward(self, x):
        output, _ = self.encoder(x)
        h, _ = self.layers[0](output[-1])
        return self.special(self.layers[1](h.unsqueeze(0))[0])[0]


def test_same_numbers_and_the_same_parameter_objects():
    model = Model().eval()
    x = torch.randn(3, 2, 4)
    expected, parameters = model(x), dict(model.named_parameters())
    report = fastseq.accelerate(model)
    assert type(model.encoder) is LSTM
    assert type(model.layers[0]) is LSTMCell
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not model.encoder.training
    torch.testing.assert_close(model(x), expected)
    assert [(r.path, r.swapped) for r in report] == [("encoder", True), ("layers.0", True), ("special", False)]


def test_an_optimiser_made_before_stays_valid():
    losses = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if swap:
            fastseq.accelerate(model, "reference")
        x, curve = torch.randn(3, 2, 4), []
        for _ in range(5):
            torch.manual_seed(1)  # the same dropout masks
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_hooks_are_kept():
    model, calls = Model(), []
    model.encoder.register_forward_hook(lambda *_: calls.append("forward"))
    model.encoder.register_forward_pre_hook(lambda *_: calls.append("pre"))
    fastseq.accelerate(model)
    model(torch.randn(3, 2, 4))
    assert calls == ["pre", "forward"]


def test_report_prints_as_a_table():
    lines = str(fastseq.accelerate(Model())).splitlines()
    assert lines[0].split() == ["module", "class", "swapped", "why"]
    assert lines[1].split()[:3] == ["encoder", "nn.LSTM", "yes"]
    assert "code of its own" in lines[3]
    assert lines[3].split()[2] == "no"
    assert "nothing to swap" in str(fastseq.accelerate(nn.Linear(2, 2)))


def test_a_second_swap_reports_fastseq_modules():
    model = Model()
    fastseq.accelerate(model)
    report = fastseq.accelerate(model)
    assert [r.swapped for r in report] == [False, False, False]
    assert "already" in report[0].why


def test_restore_is_the_inverse():
    model = Model().eval()
    x = torch.randn(3, 2, 4)
    expected = model(x)
    fastseq.accelerate(model, "reference")
    report = fastseq.restore(model)
    assert type(model.encoder) is nn.LSTM
    assert type(model.layers[0]) is nn.LSTMCell
    assert [r.path for r in report if r.swapped] == ["encoder", "layers.0"]
    assert not hasattr(model.encoder, "backend")
    assert torch.equal(model(x), expected)


def test_the_model_itself_may_be_an_lstm():
    model = nn.LSTM(4, 5)
    report = fastseq.accelerate(model, "reference")
    assert type(model) is LSTM
    assert model.backend == "reference"
    assert "(the model)" in str(report)


def test_shared_modules_are_swapped_once():
    shared = nn.LSTM(4, 4)
    report = fastseq.accelerate(nn.Sequential(shared, shared))
    assert len(report) == 1


def test_an_instance_with_a_replaced_forward_is_left_alone():
    model = nn.LSTM(4, 5)
    model.forward = lambda x: x
    (row,) = fastseq.accelerate(model)
    assert not row.swapped
    assert type(model) is nn.LSTM


def test_swapped_models_copy_and_pickle():
    model = Model().eval()
    fastseq.accelerate(model)
    x = torch.randn(3, 2, 4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        assert type(copied.encoder) is LSTM


def test_restore_leaves_fastseq_modules_of_the_user_alone():
    model = nn.ModuleList([LSTM(4, 5, backend="reference"), nn.LSTM(4, 5)])
    fastseq.accelerate(model)
    report = fastseq.restore(model)
    assert [(r.path, r.swapped) for r in report] == [("0", False), ("1", True)]
    assert model[0].backend == "reference"
    seq2seq = fastseq.build_seq2seq_model(20, 8, 8)
    fastseq.restore(seq2seq)
    seq2seq(torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 1]), torch.ones(2, 4, dtype=torch.long))


def test_parametrised_modules_are_reported():
    model = nn.ModuleList([nn.LSTM(4, 5), nn.LSTM(4, 5)])
    nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    rows = fastseq.accelerate(model)
    assert [row.swapped for row in rows if row.path in ("0", "1")] == [False, True]
    assert "accelerate the model first" in rows[0].why
    nn.utils.parametrizations.weight_norm(model[1], "weight_hh_l0")
    (row,) = fastseq.restore(model)
    assert not row.swapped
    assert "remove the parametrisation" in row.why


def test_scripted_modules_are_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleList([torch.jit.script(nn.LSTM(4, 5))])
    (row,) = fastseq.accelerate(model)
    assert not row.swapped
    assert "scripted" in row.why
