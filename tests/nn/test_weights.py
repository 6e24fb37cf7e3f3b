"""Weights copied, tied, replaced and re-parametrised: each forward reads the current ones, once."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import serving_lstm
from pairs import assert_same, pair
from seq2seq_cases import make_batch, make_model
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

from fastseq import LSTM, Attention, LSTMCell

backends = pytest.mark.parametrize("backend", ["auto", *serving_lstm()])


@backends
@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
def test_copies(backend, method):
    module = LSTM(4, 5, 2, backend=backend)
    if method == "deepcopy":
        copied = copy.deepcopy(module)
    elif method == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 2, 4)
    assert_same(copied(x), module(x), rtol=0, atol=0)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    assert not torch.equal(copied(x)[0], module(x)[0])
    assert copied.backend == backend


@backends
def test_weight_drop_replaces_a_parameter_by_a_plain_tensor(backend):
    """As fastai's WeightDropout: delete weight_hh_l0, keep a raw parameter, set a plain tensor of that name."""
    theirs, ours = pair(4, 5, backend=backend)
    results = []
    for module in (theirs, ours):
        raw = nn.Parameter(module.weight_hh_l0.detach().clone())
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)
        torch.manual_seed(5)
        module.weight_hh_l0 = F.dropout(raw, 0.5)
        output = module(torch.ones(3, 2, 4))[0]
        output.sum().backward()
        results.append((output, raw.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


@backends
def test_weights_replaced_tied_and_reparametrised(backend):
    module = LSTM(5, 5, backend=backend)
    x = torch.randn(3, 2, 5)
    module.weight_hh_l0 = module.weight_ih_l0  # tied
    module(x)[0].sum().backward()
    theirs = nn.LSTM(5, 5)
    theirs.load_state_dict(module.state_dict())
    theirs.weight_hh_l0 = theirs.weight_ih_l0
    theirs(x)[0].sum().backward()
    torch.testing.assert_close(module.weight_ih_l0.grad, theirs.weight_ih_l0.grad, rtol=0, atol=1e-5)
    module = LSTM(5, 5, backend=backend)
    before = module(x)[0]
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(module(x)[0], before, rtol=0, atol=1e-6)
    swapped = torch.func.functional_call(module, {"bias_ih_l0": torch.ones(20)}, (x,))[0]
    assert not torch.allclose(swapped, before)


@backends
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_cell_weights_replaced_tied_and_reparametrised(backend, train):
    theirs, ours = pair(5, 5, backend=backend, cls=LSTMCell)
    x = torch.randn(3, 5)

    def check(call=lambda cell: cell(x)):
        with torch.set_grad_enabled(train):
            torch.testing.assert_close(call(ours), call(theirs), rtol=0, atol=1e-6)

    swapped = {"bias_ih": torch.ones(20), "weight_hh": torch.ones(20, 5)}
    check(lambda cell: torch.func.functional_call(cell, swapped, (x,)))
    for cell in (theirs, ours):
        cell.weight_hh = cell.weight_ih
    check()
    for cell in (theirs, ours):
        torch.manual_seed(0)
        nn.utils.spectral_norm(cell, "weight_hh")  # the same number of parameters, weight_hh a plain attribute
    check()
    for cell in (theirs, ours):
        nn.utils.parametrizations.weight_norm(cell, "weight_ih")
    check()


@backends
def test_data_parallel_style_replica(backend):
    """nn.DataParallel copies modules by _replicate_for_data_parallel and sets plain tensors as weights."""
    module = LSTM(4, 5, backend=backend)
    replica = module._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter * 1.0)
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(replica(x)[0], module(x)[0])
    replica(x)[0].sum().backward()
    assert module.weight_hh_l0.grad is not None


@backends
def test_weights_of_another_dtype_by_functional_call(backend):
    module = LSTM(4, 5, backend=backend)
    weights = {name: p.detach().bfloat16() for name, p in module.named_parameters()}
    output, _ = torch.func.functional_call(module, weights, (torch.randn(3, 2, 4).bfloat16(),))
    assert output.dtype == torch.bfloat16


class Counted(nn.Module):
    """A parametrisation that counts its evaluations; it doubles the weight."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return 2 * weight


def counted(module: nn.Module) -> dict[str, Counted]:
    """Parametrise every parameter of ``module`` itself -> its counters by name."""
    counters = {name: Counted() for name, _ in list(module.named_parameters(recurse=False))}
    for name, counter in counters.items():
        parametrize.register_parametrization(module, name, counter)
        counter.count = 0
    return counters


@backends
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
def test_lstm_evaluates_each_parametrisation_once(backend, form):
    module = LSTM(4, 5, 2, bidirectional=True, backend=backend)
    counters, x = counted(module), torch.randn(3, 2, 4)
    options = {"lengths": torch.tensor([3, 1])} if form == "lengths" else {}
    module(pack_padded_sequence(x, [3, 1]) if form == "packed" else x, **options)
    assert {name: c.count for name, c in counters.items()} == dict.fromkeys(counters, 1)
    assert len(counters) == 16


@backends
@pytest.mark.parametrize(
    ("train", "narrow"),
    [(True, None), (False, None), (False, torch.bfloat16), (False, torch.int8)],
    ids=["training", "inference", "bfloat16", "int8"],
)
def test_cell_evaluates_each_parametrisation_once(backend, train, narrow):
    module = LSTMCell(4, 5, backend=backend)
    module.weight_dtype = narrow
    counters = counted(module)
    with torch.set_grad_enabled(train):
        module(torch.randn(2, 4))
    assert [c.count for c in counters.values()] == [1] * 4


@pytest.mark.parametrize("score", ["general", "additive", "normed_additive"])
def test_attention_evaluates_each_parametrisation_once(score):
    module = Attention(4, 4, score=score)
    counters = [c for part in list(module.modules()) for c in counted(part).values()]
    module(torch.randn(2, 4), torch.randn(2, 3, 4), need_weights=True)
    assert [c.count for c in counters] == [1] * len(counters)
    assert len(counters) == {"general": 1, "additive": 4, "normed_additive": 5}[score]


@pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "no feeding"])
def test_a_decoder_step_evaluates_each_parametrisation_once(feeding):
    model = make_model(torch.float32, input_feeding=feeding).eval()
    counters = counted(model.decoder.lstm)
    src, lengths, tgt = make_batch(model)
    enc = model.encode(src, lengths)
    model.decode_step(tgt[:, 0], model.start(enc), enc)
    assert [c.count for c in counters.values()] == [1] * len(counters)


class OneAddress(nn.Module):
    """A parametrisation whose results are new tensors in the same memory, as after a free."""

    def __init__(self, size):
        super().__init__()
        self.memory = np.empty(size, np.float32)

    def forward(self, weight):
        self.memory[:] = 2 * weight.detach().numpy()
        return torch.from_numpy(self.memory)


@torch.no_grad()
def test_narrow_copies_of_a_parametrised_weight_are_never_stale():
    cell, plain, x = LSTMCell(8, 8), LSTMCell(8, 8), torch.randn(1, 8)
    cell.weight_dtype = plain.weight_dtype = torch.bfloat16
    for name in ("weight_ih", "weight_hh"):
        parametrize.register_parametrization(cell, name, OneAddress((32, 8)), unsafe=True)
    for factor in (1, -1):
        for parametrization in cell.parametrizations.values():
            parametrization.original.mul_(factor)
        for name, p in plain.named_parameters():
            p.copy_(getattr(cell, name))
        torch.testing.assert_close(cell(x), plain(x), rtol=0, atol=0)
