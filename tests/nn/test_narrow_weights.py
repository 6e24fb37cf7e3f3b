"""int8 and bfloat16 weights at inference: errors against float64 of the rounded weights, refusals, the way back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import _native
from fastseq.nn.linear import Linear
from fastseq.ops.common.narrow import linear, round_weight
from fastseq.testing.numerics import assert_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
dtypes = pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bfloat16"])
EPSILON = torch.finfo(torch.float32).eps
INTEGERS = 2 * 16383  # half a step of the quantised activations is max |row| / INTEGERS


def rounded(module, dtype):
    """A copy of ``module`` in float64 with the rounded weights."""
    exact = copy.deepcopy(module).double()
    for p, q in zip(module.parameters(), exact.parameters(), strict=True):
        if p.dim() == 2:
            q.data = round_weight(p, dtype).widen().double()
    return exact


@dtypes
def test_rounding_is_within_half_a_step_of_each_row(dtype):
    weight = torch.randn(9, 50) * torch.logspace(-6, 6, 9).unsqueeze(1)
    weight[4] = 0
    narrow = round_weight(weight, dtype)
    error = (narrow.widen().double() - weight.double()).abs()
    step = weight.abs().amax(1, keepdim=True) / 254 if dtype == torch.int8 else weight.abs() * 2**-8
    assert (error <= step * (1 + 1e-5)).all()
    assert narrow.values.dtype == dtype


@pytest.mark.parametrize("B", [1, 2, 3, 4, 9, 70])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (15, 8), (16, 33), (130, 17), (513, 40), (20001, 9)])
@dtypes
def test_linear_is_within_its_error(dtype, B, K, N):
    weight, bias, x = torch.randn(N, K), torch.randn(N), torch.randn(B, K)
    narrow = round_weight(weight, dtype)
    wide = narrow.widen().double()
    actual = linear(x, narrow, bias)
    error = (actual.double() - torch.nn.functional.linear(x.double(), wide, bias.double())).abs()
    magnitude = x.double().abs() @ wide.abs().T
    bound = 4 * EPSILON * (magnitude * K**0.5 + actual.double().abs())
    if dtype == torch.int8:
        bound = bound + x.double().abs().amax(1, keepdim=True) / INTEGERS * wide.abs().sum(1)
    assert (error <= bound).all()


@pytest.mark.skipif(_native.build_info().get("cpu") in (None, "baseline"), reason="no integer products")
@pytest.mark.parametrize("B", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (31, 8), (64, 33), (513, 40), (1500, 16)])
def test_int8_products_are_exact_in_integers(B, K, N):
    """The same bits with every instruction set, with VNNI and without."""
    narrow, x = round_weight(torch.randn(N, K), torch.int8), torch.randn(B, K)
    most = x.abs().amax(1, keepdim=True)
    integers = (x * (torch.tensor(16383.0) / most)).round().long() @ narrow.values.long().T
    assert torch.equal(linear(x, narrow, None), integers.float() * (most / 16383) * narrow.scale)


@pytest.mark.parametrize("form", ["one", "few", "batch", "lengths", "packed", "unbatched", "batch_first"])
@pytest.mark.parametrize(("layers", "bidirectional", "bias"), [(1, False, True), (2, True, False)])
@dtypes
def test_lstm_follows_its_rounded_weights(dtype, form, layers, bidirectional, bias):
    """The products err far less than the weights: 129 times less with int8, by a few roundings with bfloat16."""
    B = {"one": 1, "few": 3, "unbatched": 1}.get(form, 9)
    module = nn.LSTM(37, 35, layers, bias, form == "batch_first", bidirectional=bidirectional)
    x, lengths = torch.randn(20, B, 37), torch.randint(1, 21, (B,))
    x = x.transpose(0, 1) if form == "batch_first" else x[:, 0] if form == "unbatched" else x
    pack = lambda t: pack_padded_sequence(t, lengths, enforce_sorted=False)  # noqa: E731
    inputs = pack if form in ("packed", "lengths") else lambda t: t
    with torch.no_grad():
        exact, oracle = (m(inputs(x.double())) for m in (copy.deepcopy(module).double(), rounded(module, dtype)))
        baseline = rounded(module, dtype).float()(inputs(x))
        fastseq.accelerate(module, weight_dtype=dtype)
        results = module(x, lengths=lengths) if form == "lengths" else module(inputs(x))
    flat = lambda r: [getattr(r[0], "data", r[0]), *r[1]]  # noqa: E731
    first = 1 if form == "lengths" else 0  # the padded output is compared through the final states
    for actual, want, full, torchs in zip(*(flat(r)[first:] for r in (results, oracle, exact, baseline)), strict=True):
        if dtype == torch.bfloat16:
            assert_accurate(actual, want, torchs)
        else:
            assert (actual.double() - want).abs().max() <= (want - full).abs().max() / 8


@pytest.mark.parametrize("B", [1, 5])
@dtypes
def test_cell_follows_its_rounded_weights(dtype, B):
    cell = nn.LSTMCell(40, 33)
    x, hx = torch.randn(B, 40), (torch.randn(B, 33), torch.randn(B, 33))
    with torch.no_grad():
        args = x.double(), tuple(t.double() for t in hx)
        exact, oracle = copy.deepcopy(cell).double()(*args), rounded(cell, dtype)(*args)
        fastseq.accelerate(cell, weight_dtype=dtype)
        for actual, want, full in zip(cell(x, hx), oracle, exact, strict=True):
            assert (actual.double() - want).abs().max() <= (want - full).abs().max() / 8


@torch.no_grad()
def test_cell_states_and_dropout_are_those_of_the_rounded_module():
    module = fastseq.LSTM(12, 16, 2, dropout=0.5)
    plain = copy.deepcopy(module)
    module.weight_dtype = torch.bfloat16
    for p in plain.parameters():
        if p.dim() == 2:
            p.copy_(p.bfloat16())
    x = torch.randn(7, 2, 12)
    results = []
    for m in (module, plain):
        torch.manual_seed(3)
        output, states, cells = m(x, return_cell_states=True)
        results.append((output, *states, cells))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@torch.no_grad()
def test_activations_that_are_not_finite_reach_the_result():
    narrow = round_weight(torch.randn(20, 30), torch.int8)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, 30)
        x[1, 29] = value
        output = linear(x, narrow, None)
        assert not output[1].isfinite().any()
        assert output[[0, 2]].isfinite().all()
    assert (linear(torch.zeros(1, 30), narrow, None) == 0).all()
    assert (linear(torch.full((1, 30), 1e-40), narrow, None).abs() < 1e-30).all()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell, self.out = nn.LSTM(6, 5), nn.LSTMCell(5, 5), nn.Linear(5, 9)

    def forward(self, x):
        return self.out(self.cell(self.lstm(x)[0][-1])[0])


@dtypes
def test_accelerate_and_the_way_back(dtype):
    model, x = Model(), torch.randn(4, 2, 6)
    expected, parameters = model(x), dict(model.named_parameters())
    report = fastseq.accelerate(model, weight_dtype=dtype)
    assert [(r.path, r.swapped) for r in report] == [("lstm", True), ("cell", True), ("out", True)]
    assert all(f"weight_dtype={dtype}" in r.why for r in report)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    with torch.no_grad():
        narrow = model(x)
        assert 1e-6 < (narrow - expected).abs().max() < 0.1
        model.out.weight.mul_(2)  # the copy is renewed
        torch.testing.assert_close(model(x) - model.out.bias, 2 * (narrow - model.out.bias), rtol=1e-2, atol=1e-2)
        model.out.weight.div_(2)
    for module in (model.lstm, model.cell, model.out):
        with pytest.raises(RuntimeError, match=f"weight_dtype={dtype} is for inference and has no gradient"):
            module(
                torch.randn(2, module.weight_ih.size(1) if module is model.cell else 6 if module is model.lstm else 5)
            )
    assert all(r.swapped for r in fastseq.restore(model))
    assert type(model.out) is nn.Linear
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()


def test_modules_of_fastseq_change_too():
    model = nn.Sequential(fastseq.LSTM(4, 4))
    fastseq.accelerate(model, weight_dtype=torch.int8)
    assert model[0].weight_dtype == torch.int8
    fastseq.restore(model)
    assert model[0].weight_dtype is None


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (fastseq.LSTM, (3, 2, 4)),
        (fastseq.LSTMCell, (2, 4)),
        (fastseq.LSTMCell, (9, 4)),
        (Linear, (2, 4)),
        (Linear, (99, 4)),
    ],
    ids=["LSTM", "LSTMCell", "LSTMCell, 9 rows", "Linear", "Linear, 99 rows"],
)
def test_an_unknown_dtype_gets_a_sentence_for_any_number_of_rows(module, shape):
    """With 9 rows a cell reads its float32 weights; with 65 a linear layer widens the rounded ones for torch."""
    module = module(4, 5)
    module.weight_dtype = torch.float16
    with torch.no_grad(), pytest.raises(ValueError, match=r"weight_dtype must be torch.int8, torch.bfloat16 or None"):
        module(torch.randn(shape))


@torch.no_grad()
def test_refusals():
    model = Model()
    with pytest.raises(ValueError, match=r"weight_dtype must be torch.int8, torch.bfloat16 or None, got torch.float16"):
        fastseq.accelerate(model, weight_dtype=torch.float16)
    fastseq.accelerate(model, weight_dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"LSTM: weight_dtype=torch.int8 serves float32 .* torch.float64"):
        copy.deepcopy(model).double()(torch.randn(4, 2, 6).double())
    with pytest.raises(RuntimeError, match="got autocast"), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 2, 6))
    projected = fastseq.LSTM(4, 4, proj_size=2)
    projected.weight_dtype = torch.int8
    with pytest.raises(RuntimeError, match=r"has no projection, got proj_size=2; set weight_dtype to None"):
        projected(torch.randn(2, 1, 4))


@torch.no_grad()
def test_accelerate_leaves_the_weights_of_a_projection():
    """The swapped model computes as before: a projection has no narrow weights."""
    for lstm, swapped in ((nn.LSTM(4, 4, proj_size=2), True), (fastseq.LSTM(4, 4, proj_size=2), False)):
        model, x = nn.Sequential(lstm), torch.randn(3, 2, 4)
        expected = model(x)[0]
        (row,) = fastseq.accelerate(model, weight_dtype=torch.int8)
        assert row.swapped is swapped and "weight_dtype has no projection (proj_size=2)" in row.why
        torch.testing.assert_close(model(x)[0], expected)
