"""``LSTM.freeze_bias_hh``: the same results, one trained bias, and the step of a library with a single bias."""

import pytest
import torch
from backends import serving_lstm
from torch import nn
from torch.nn.utils import parametrize

from fastseq import LSTM, accelerate

backends = pytest.mark.parametrize("backend", ["auto", *serving_lstm()])


def output_of(module, x):
    return module(x)[0]


@backends
def test_a_step_moves_the_sum_of_the_biases_once(backend):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 4), torch.randn(5, 3, 12)
    double = LSTM(4, 6, 2, bidirectional=True, backend=backend)
    before = output_of(double, x)
    single = LSTM(4, 6, 2, bidirectional=True, backend=backend)
    single.load_state_dict(double.state_dict())
    assert single.freeze_bias_hh() is single
    torch.testing.assert_close(output_of(single, x), before)
    moved = []
    for module in (single, double):
        start = module.bias_ih_l1_reverse + module.bias_hh_l1_reverse
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        (output_of(module, x) * weight).sum().backward()
        optimiser.step()
        moved.append((module.bias_ih_l1_reverse + module.bias_hh_l1_reverse - start).detach())
    torch.testing.assert_close(2 * moved[0], moved[1])
    assert moved[0].abs().max() > 0.1
    assert all(not w.any() and w.grad is None for n, w in single.named_parameters() if n.startswith("bias_hh"))


def test_checkpoints_go_both_ways():
    single, theirs = LSTM(4, 6).freeze_bias_hh(), nn.LSTM(4, 6)
    x = torch.randn(5, 3, 4)
    theirs.load_state_dict(single.state_dict())
    torch.testing.assert_close(output_of(theirs, x), output_of(single, x))
    theirs = nn.LSTM(4, 6)
    single.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(output_of(single, x), output_of(theirs, x))
    assert not single.bias_hh_l0.requires_grad


def test_a_swapped_lstm_has_it_too():
    model = nn.Sequential(nn.LSTM(4, 6))
    accelerate(model)
    model[0].freeze_bias_hh()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.bias_hh_l0"]


def test_refusals():
    with pytest.raises(ValueError, match="needs bias=True"):
        LSTM(4, 6, bias=False).freeze_bias_hh()
    module = LSTM(4, 6)
    parametrize.register_parametrization(module, "bias_hh_l0", nn.Identity())
    with pytest.raises(ValueError, match="bias_hh_l0, which is parametrised"):
        module.freeze_bias_hh()
