"""The grid-persistent recurrence of csrc/cuda: on the host-side device everywhere, on a GPU where there is one."""

import cuda_on_cpu
import pytest
import torch
from cuda_cases import DTYPES, check, on, place, recurrence  # noqa: F401

from fastseq.testing import Results

NAMES = ("output", "h_n", "c_n", "activations", "cell_states")


@pytest.fixture(autouse=True)
def grid(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")


def _run(operators, case, device="cpu", activations=True, cell_states=True):
    tensors = case.gates, case.h0, case.c0, case.weight_hh, case.lengths
    tensors = [t if t is None else t.to(device) for t in tensors]
    found = operators.lstm_recurrence_forward(*tensors, case.reverse, case.tf32, activations, cell_states)
    return dict(zip(NAMES, (t.cpu() for t in found), strict=True))


def _check(place, case):  # noqa: F811
    found = _run(place.operators, case, place.device)
    found.pop("activations")
    check(Results(found, {}), case, gradients=False)


@pytest.mark.parametrize("kind", [*DTYPES, "tf32"], ids=str)
@pytest.mark.parametrize(("T", "B", "H"), [(6, 1, 1), (3, 3, 16), (5, 17, 63), (2, 33, 128)])
def test_parity(place, T, B, H, kind):  # noqa: F811
    dtype = torch.float32 if kind == "tf32" else kind
    _check(place, recurrence(T, B, H, dtype=dtype, tf32=kind == "tf32"))
