"""The backward recurrence of csrc/cuda on a grid: on the host-side device everywhere, on a GPU where there is one."""

import os
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from cuda_cases import DTYPES, Recurrence, on, place, plain, recurrence  # noqa: F401
from torch import Tensor

from fastseq.testing import Results, compare, evaluate

LENGTHS, TF32, NO_TF32 = "mixed", True, False
KINDS = [(torch.float32, NO_TF32), (torch.float32, TF32), (torch.bfloat16, NO_TF32), (torch.float16, NO_TF32)]
NAMES = ["float32", "tf32", "bfloat16", "float16"]
GIVEN = ("output", "h_n", "c_n", "cell_states")  # results that have a gradient


@pytest.fixture(autouse=True)
def _grid(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")


def saved(case: Recurrence) -> tuple[Tensor, Tensor]:
    """What a forward kernel keeps: activations (T, B, D * 4H), cell_states (T, B, D * H) in float32; NaN past the
    lengths, as they are not written there."""
    dtype = case.gates.dtype
    T, B, D, H = len(case.gates), *case.c0.shape[1::-1], case.c0.size(2)
    activations, cells = torch.empty(T, B, D, 4 * H), torch.empty(T, B, D, H)
    for d in range(D):
        h, c, weight = case.h0[d].float(), case.c0[d].float(), case.weight_hh[d].float()
        gates = case.gates.view(T, B, D, 4 * H)[:, :, d].float()
        for t in reversed(range(T)) if case.reverse or d == 1 else range(T):
            i, f, g, o = (gates[t] + h @ weight.T).chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c_t = f * c + i * g
            valid = torch.ones(B, 1, dtype=torch.bool) if case.lengths is None else (t < case.lengths).unsqueeze(1)
            activations[t, :, d] = torch.where(valid, torch.cat((i, f, g, o), 1), torch.nan)
            cells[t, :, d] = torch.where(valid, c_t, torch.nan)
            h, c = torch.where(valid, (o * c_t.tanh()).to(dtype).float(), h), torch.where(valid, c_t, c)
    return activations.to(dtype).view(T, B, D * 4 * H), cells.view(T, B, D * H)


def factors(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that fastseq.testing.evaluate gives these outputs."""
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for n, t in outputs.items()}


def run(place, case: Recurrence, given=GIVEN) -> dict[str, Tensor]:  # noqa: F811
    results, _ = plain(case, case.gates.dtype)
    grads = factors({n: results[n] for n in given})
    call = (*(grads.get(n) for n in GIVEN), *saved(case), case.c0, case.weight_hh, case.lengths)
    found = place.operators.lstm_recurrence_backward(*on(place, *call), case.reverse, case.tf32)
    return dict(zip(("gates", "h0", "c0"), (t.cpu() for t in found), strict=True))


def check(actual: dict[str, Tensor], case: Recurrence, given=GIVEN) -> None:
    """Every gradient by the float64 rule."""
    found = []
    for dtype in (torch.float64, case.gates.dtype):
        results, leaves = plain(case, dtype)
        found.append(Results({}, evaluate({n: results[n] for n in given}, leaves).gradients))
    wrong = [str(c) for c in compare(Results({}, actual), *found) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=NAMES)
@pytest.mark.parametrize(
    ("T", "B", "H", "D", "lengths", "reverse"),
    [
        (1, 1, 1, 1, None, False),
        (5, 3, 16, 2, LENGTHS, False),
        (4, 17, 63, 1, LENGTHS, True),
        (6, 33, 20, 2, LENGTHS, False),
        (3, 9, 128, 1, None, False),
        (2, 2, 257, 1, LENGTHS, False),
    ],
)
def test_parity(place, T, B, H, D, lengths, reverse, dtype, tf32):  # noqa: F811
    case = recurrence(T, B, H, D, dtype, lengths, reverse, tf32)
    check(run(place, case), case)
