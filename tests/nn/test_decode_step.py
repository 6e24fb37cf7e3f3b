"""The decode step: one compiled call for both products and the cell, weights in bfloat16 on request, kept memory."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import fastseq
from fastseq import _native, ops
from fastseq.testing.numerics import assert_all_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")
SHAPES = [(1, 5, 1), (1, 64, 64), (3, 7, 257), (4, 33, 16), (9, 16, 70)]  # B, I, H


def draw(B, I, H, dtype=torch.float32):  # noqa: E741
    cell = nn.LSTMCell(I, H).to(dtype)
    return cell, torch.randn(B, I).to(dtype), (torch.randn(B, H).to(dtype), torch.randn(B, H).to(dtype))


def parameters(cell):
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_step_is_as_accurate_as_torch(shape, dtype):
    cell, x, hx = draw(*shape, dtype)
    wide = copy.deepcopy(cell).double()
    actual, plain = ops.lstm_step(x, hx, *parameters(cell)), cell(x, hx)
    exact = wide(x.double(), tuple(t.double() for t in hx))
    assert_all_accurate(*(dict(zip("hc", t, strict=True)) for t in (actual, exact, plain)))


@torch.no_grad()
def test_bias_may_differ_from_row_to_row():
    cell, x, hx = draw(3, 4, 20)
    rows = torch.randn(3, 80)
    actual = ops.lstm_step(x, hx, cell.weight_ih, cell.weight_hh, rows)
    for b in range(3):
        row = [t[b : b + 1] for t in (x, *hx)]
        alone = ops.lstm_step(row[0], row[1:], cell.weight_ih, cell.weight_hh, rows[b])
        assert torch.equal(alone[0][0], actual[0][b])


@torch.no_grad()
def test_strided_inputs_and_threads_change_nothing():
    cell, x, hx = draw(2, 300, 512)
    expected = ops.lstm_step(x, hx, *parameters(cell))
    strided = torch.stack((x, x), -1)[..., 0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(ops.lstm_step(strided, hx, *parameters(cell)), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_step_with_pre_activations_of_a_hundred(dtype):
    cell, x, hx = draw(3, 7, 20, dtype)
    cell.bias_ih.copy_(100 * (torch.randint(0, 3, cell.bias_ih.shape) - 1))
    wide = copy.deepcopy(cell).double()
    actual, plain = ops.lstm_step(x, hx, *parameters(cell)), cell(x, hx)
    exact = wide(x.double(), tuple(t.double() for t in hx))
    assert_all_accurate(*(dict(zip("hc", t, strict=True)) for t in (actual, exact, plain)))


def test_step_refuses_what_it_cannot_do():
    cell, x, hx = draw(2, 4, 3)
    with pytest.raises(RuntimeError, match="lstm_step: has no gradient"):
        ops.lstm_step(x, hx, *parameters(cell))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"lstm_step: h must have the shape \(2, 3\), got \(1, 3\)"):
            ops.lstm_step(x, (hx[0][:1], hx[1]), *parameters(cell))
        with pytest.raises(RuntimeError, match=r"lstm_step: weight_ih must have the shape \(12, 5\), got \(12, 4\)"):
            ops.lstm_step(torch.zeros(2, 5), hx, *parameters(cell))
        with pytest.raises(RuntimeError, match="lstm_step: weight_hh must have the dtype Float, got BFloat16"):
            ops.lstm_step(x, hx, cell.weight_ih, cell.weight_hh.bfloat16())


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["none", "row", "rows"])
@torch.no_grad()
def test_opcheck(narrow, bias):
    cell, x, hx = draw(2, 4, 5)
    biases = {"none": (None, None), "row": (cell.bias_ih, cell.bias_hh), "rows": (torch.randn(2, 20), None)}[bias]
    weights = (cell.weight_ih.to(narrow), cell.weight_hh.to(narrow), *biases)
    torch.library.opcheck(torch.ops.fastseq.lstm_step.default, (x, *hx, *weights))


@pytest.mark.parametrize("I", [40, 33])
@torch.no_grad()
def test_narrow_weights_are_the_rounded_ones_and_never_stale(I):  # noqa: E741
    cell = fastseq.LSTMCell(I, 33)
    cell.weight_dtype = torch.bfloat16
    x, hx = torch.randn(1, I), (torch.randn(1, 33), torch.randn(1, 33))

    def check():
        rounded = copy.deepcopy(cell)
        rounded.weight_dtype = None
        for weight in (rounded.weight_ih, rounded.weight_hh):
            weight.copy_(weight.bfloat16())
        for a, b in zip(cell(x, hx), rounded(x, hx), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    check()
    cell.weight_hh.mul_(1.5)
    check()
    cell.load_state_dict(fastseq.LSTMCell(I, 33).state_dict())
    check()
    cell.weight_ih = nn.Parameter(torch.randn(132, I))
    check()


def test_narrow_weights_are_for_inference_only_and_no_state():
    cell = fastseq.LSTMCell(8, 8)
    cell.weight_dtype = torch.bfloat16
    plain = fastseq.LSTMCell(8, 8)
    plain.load_state_dict(cell.state_dict())
    x = torch.randn(1, 8)
    with pytest.raises(
        RuntimeError, match=r"LSTMCell: weight_dtype=torch.bfloat16 is for inference and has no gradient"
    ):
        cell(x)
    with torch.no_grad():
        assert not torch.equal(cell(x)[0], plain(x)[0])
        again = pickle.loads(pickle.dumps(cell))
        assert torch.equal(again(x)[0], cell(x)[0])
    assert set(cell.state_dict()) == set(plain.state_dict())


def test_empty_cache_frees_what_a_call_left():
    fastseq.LSTM(64, 64, backend="native")(torch.randn(50, 20, 64))[0].sum().backward()
    gc.collect()  # not between the two calls: it may free results of earlier tests
    assert fastseq.empty_cache() > 0
    assert fastseq.empty_cache() == 0
