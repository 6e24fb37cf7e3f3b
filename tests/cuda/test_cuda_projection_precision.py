"""Projections (``proj_size``) in TF32 and under autocast through the CUDA kernels, on the host-side device."""

import copy

import emulator
import pytest
import torch
from pairs import flat, pair
from tf32_products import tf32_products

from fastseq.parity import main as parity
from fastseq.parity.cases import ParityCase
from fastseq.testing.numerics import compare, evaluate

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")
CASES = [
    ParityCase("lstm", dict(shape=(5, 3, 4, 7), proj_size=6, form="lengths", reverse=True, cell_states=True)),
    ParityCase("lstm", dict(shape=(3, 2, 5, 257), proj_size=64)),
    ParityCase("LSTM", dict(shape=(5, 3, 4, 7), proj_size=2, num_layers=2, bidirectional=True, form="packed")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_tf32(case):
    """Results and every gradient against float64, where nn.LSTM rounds its operands to TF32 too."""
    with emulator.as_native(), tf32_products():
        (row,) = parity.check(case, torch.float32, ("native",), tf32=True)
    assert row.ok and not row.refusal, row.failure or row.refusal or [str(c) for c in row.comparisons if not c.ok]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one layer", "two, both ways"])
def test_autocast(options, dtype):
    """Float32 weights under autocast: as accurate as nn.LSTM of rounded weights, with gradients in float32.

    The baseline computes in ``dtype`` itself, as cuDNN does under autocast; on a CPU nn.LSTM keeps c in float32 there.
    """
    theirs, ours = pair(6, 24, proj_size=8, backend="native", **options)
    rounded, x = copy.deepcopy(theirs).to(dtype), torch.randn(7, 3, 6)
    oracle = _results(copy.deepcopy(rounded).double(), x.to(dtype).double())
    baseline = _results(rounded, x.to(dtype))
    with emulator.as_native(), torch.autocast("cpu", dtype):
        actual = _results(ours, x)
    assert {g.dtype for g in actual.gradients.values()} == {torch.float32}
    baseline = type(baseline)(*(_like(mine, results) for mine, results in zip(actual, baseline, strict=True)))
    wrong = [str(c) for c in compare(actual, oracle, baseline) if not c.ok]
    assert not wrong, "; ".join(wrong)


def _like(ours, theirs):
    return {name: t.to(ours[name].dtype) for name, t in theirs.items()}


def _results(module, x):
    x = x.clone().requires_grad_()
    outputs = dict(zip(("output", "h_n", "c_n"), flat(module(x)), strict=True))
    return evaluate(outputs, {"x": x, **dict(module.named_parameters())})
