"""Pointwise LSTM cell of csrc/cuda, on the host-side device and, if present, on a GPU."""

import emulator
import pytest
import torch
from cuda_cases import DTYPES, on

from fastseq.ops.lstm_cell import reference
from fastseq.ops.lstm_cell.spec import Cell, Grads
from fastseq.testing.numerics import Results, compare

SHAPES = [(17, 1), (1, 16), (3, 8), (5, 63), (2, 257), (33, 64), (0, 8)]


def _inputs(B, H, dtype):
    return [torch.randn(B, n).to(dtype) for n in (4 * H, H, H, H)]  # gates, c, grad_h, grad_c_n


def _run(place, gates, c, grad_h, grad_c):
    gates, c, grad_h, grad_c = on(place, gates, c, grad_h, grad_c)
    h, c_n, activations = place.operators.lstm_cell_forward(gates, c)
    grads = place.operators.lstm_cell_backward(activations, c, c_n, grad_h, grad_c)
    return [t.cpu() for t in (h, c_n, *grads)]


def _plain(dtype, gates, c, grad_h, grad_c):
    gates, c, grad_h, grad_c = (t if t is None else t.to(dtype) for t in (gates, c, grad_h, grad_c))
    h, c_n, saved = reference.forward(Cell(gates, c), need_backward=True)
    return h, c_n, *reference.backward(Cell(gates, c), saved, Grads(grad_h, grad_c))


def _named(results) -> Results:
    h, c_n, grad_gates, grad_c = results
    return Results({"h": h, "c_n": c_n}, {"gates": grad_gates, "c": grad_c})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("B", "H"), SHAPES)
@pytest.mark.parametrize("grads", ["both", "h", "c"])
def test_accuracy(place, B, H, dtype, grads):
    gates, c, grad_h, grad_c = _inputs(B, H, dtype)
    call = (gates, c, grad_h if grads != "c" else None, grad_c if grads != "h" else None)
    ours, oracle, plain = (_named(x) for x in (_run(place, *call), _plain(torch.float64, *call), _plain(dtype, *call)))
    wrong = [str(c) for c in compare(ours, oracle, plain) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_rows_and_large_values(place, dtype):
    """Tensors that are not 16-byte aligned, and pre-activations of +-100."""
    B, H = 3, 8
    gates, c, grad_h, grad_c = _inputs(B, H, dtype)
    gates = 100 * gates.sign()
    shifted = torch.cat((gates.flatten()[:1], gates.flatten()))[1:].view_as(gates)
    assert shifted.data_ptr() % 16
    for ours, again in zip(_run(place, gates, c, grad_h, grad_c), _run(place, shifted, c, grad_h, grad_c), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, again, rtol=0, atol=0)


def test_wrong_arguments_are_refused(place):
    gates, c = on(place, torch.randn(2, 32), torch.randn(2, 8))
    with pytest.raises(RuntimeError, match=r"gates must have the shape \(2, 32\), got \(2, 31\)"):
        place.operators.lstm_cell_forward(gates[:, :31].contiguous(), c)
    with pytest.raises(RuntimeError, match="contiguous"):
        place.operators.lstm_cell_forward(gates.T.contiguous().T, c)
    with pytest.raises(RuntimeError, match="dtype"):
        place.operators.lstm_cell_forward(gates.int(), c.int())


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads_gives_the_same_bits(seed):
    inputs = _inputs(7, 24, torch.float32)
    operators = emulator.load()
    first = operators.lstm_cell_forward(*inputs[:2])
    with emulator.schedule(seed):
        again = operators.lstm_cell_forward(*inputs[:2])
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
