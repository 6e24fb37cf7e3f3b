"""Decoding step of csrc/cuda, on the host-side device and, if present, on a GPU."""

from typing import NamedTuple

import emulator
import pytest
import torch
from cuda_cases import DTYPES, on
from torch import Tensor

from fastseq.testing.numerics import Results, compare

# B, I, H: every size of the row tile, also partial; one column, odd sizes, several chunks per warp.
SHAPES = [(1, 1, 1), (1, 512, 24), (2, 8, 16), (3, 40, 24), (5, 63, 17), (17, 16, 8), (1, 2304, 2), (9, 7, 257)]
NARROW = "narrow"  # float32 with bfloat16 weights


class Step(NamedTuple):
    input: Tensor  # (B, I)
    h: Tensor  # (B, H)
    c: Tensor  # (B, H)
    weight_ih: Tensor  # (4H, I)
    weight_hh: Tensor  # (4H, H)
    bias_ih: Tensor | None = None  # (4H,) or (B, 4H)
    bias_hh: Tensor | None = None  # (4H,)

    def to(self, dtype) -> "Step":
        return Step(*(t if t is None else t.to(dtype) for t in self))


def _step(B, I, H, dtype, per_row=False):  # noqa: E741
    weights = torch.randn(4 * H, I) / I**0.5, torch.randn(4 * H, H) / H**0.5
    biases = torch.randn((B, 4 * H) if per_row else (4 * H,)), torch.randn(4 * H)
    step = Step(torch.randn(B, I), torch.randn(B, H), torch.randn(B, H), *weights, *biases)
    if dtype != NARROW:
        return step.to(dtype)
    return step._replace(weight_ih=step.weight_ih.bfloat16(), weight_hh=step.weight_hh.bfloat16())


def _run(place, step):
    return [t.cpu() for t in place.operators.lstm_step(*on(place, *step))]


def _plain(step):
    gates = step.input @ step.weight_ih.T + step.h @ step.weight_hh.T
    for bias in (step.bias_ih, step.bias_hh):
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * step.c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _check(actual, step):
    oracle, plain = (_plain(step.to(dtype)) for dtype in (torch.float64, step.c.dtype))
    named = (Results(dict(zip("hc", t, strict=True)), {}) for t in (actual, oracle, plain))
    wrong = [str(c) for c in compare(*named) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, NARROW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(place, shape, dtype):
    step = _step(*shape, dtype)
    _check(_run(place, step), step)


@pytest.mark.parametrize("biases", ["none", "first", "second", "per row"])
def test_biases(place, biases):
    step = _step(3, 8, 12, torch.float32, per_row=biases == "per row")
    if biases in ("none", "second"):
        step = step._replace(bias_ih=None)
    if biases in ("none", "first"):
        step = step._replace(bias_hh=None)
    _check(_run(place, step), step)


@pytest.mark.parametrize("dtype", [*DTYPES, NARROW], ids=str)
def test_unaligned_tensors_and_large_values(place, dtype):
    """Weights that are not 16-byte aligned, and pre-activations of +-100."""
    step = _step(3, 16, 8, dtype)
    step = step._replace(bias_ih=100 * step.bias_ih.sign())
    _check(_run(place, step), step)
    weight = step.weight_ih
    shifted = torch.cat((weight.flatten()[:1], weight.flatten()))[1:].view_as(weight)
    assert shifted.data_ptr() % 16
    _check(_run(place, step._replace(weight_ih=shifted)), step)


def test_no_sequences(place):
    h, c = _run(place, _step(0, 8, 16, torch.float32))
    assert h.shape == c.shape == (0, 16)


def test_wrong_arguments_are_refused(place):
    step = _step(2, 4, 3, torch.float32)
    for change, message in [
        ({"h": step.h[:1]}, r"lstm_step: h must have the shape \(2, 3\), got \(1, 3\)"),
        ({"input": torch.zeros(2, 5)}, r"lstm_step: weight_ih must have the shape \(12, 5\), got \(12, 4\)"),
        ({"weight_hh": step.weight_hh.bfloat16()}, "weight_hh must have the dtype Float, got BFloat16"),
        ({"weight_ih": step.weight_ih.T.contiguous().T}, "contiguous"),
        ({"c": step.c.int()}, "dtype"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            _run(place, step._replace(**change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_gives_the_same_bits(dtype):
    step = _step(5, 264, 8, dtype)
    operators = emulator.load()
    first = operators.lstm_step(*step)
    for seed in range(20):
        with emulator.schedule(seed):
            again = operators.lstm_step(*step)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_rows_do_not_depend_on_each_other(place):
    """B = 1 runs another instantiation than a batch; both give the same bits for a row."""
    step = _step(12, 24, 16, torch.float32)
    together = _run(place, step)
    alone = [
        _run(place, step._replace(input=step.input[b : b + 1], h=step.h[b : b + 1], c=step.c[b : b + 1]))
        for b in range(12)
    ]
    for got, rows in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizers):
    run = emulator.sanitized(sanitizers, "race_lstm_step")
    assert run.returncode == 0, run.stdout + run.stderr
