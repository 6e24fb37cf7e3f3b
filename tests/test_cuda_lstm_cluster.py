"""The LSTM recurrence of csrc/cuda in thread block clusters: on the host-side device, on a GPU from sm_90 on."""

import cuda_on_cpu
import pytest
import torch
from cuda_cases import DTYPES, check, on, place, recurrence  # noqa: F401

from fastseq.testing import Results


@pytest.fixture(autouse=True)
def _clusters(monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "cluster")


def _forward(place, case, activations=True, cell_states=True):  # noqa: F811
    call = case._replace(**dict(zip(case._fields[:5], on(place, *case[:5]), strict=True)))
    found = place.operators.lstm_recurrence_forward(*call, activations, cell_states)
    return [t.cpu() for t in found]


def _check_forward(place, case):  # noqa: F811
    output, h_n, c_n, _, cell_states = _forward(place, case)
    check(Results({"output": output, "h_n": h_n, "c_n": c_n, "cell_states": cell_states}, {}), case, gradients=False)


def _case(T, B, H, dtype, **options):
    return recurrence(T, B, H, dtype=dtype, tf32=dtype == torch.float32, **options)


# T, B, H: one step, one sequence, one unit, padded units, several tiles of the batch; every size of a cluster.
SHAPES = [(1, 3, 16), (5, 1, 1), (4, 17, 63), (3, 9, 128), (2, 3, 200), (2, 2, 257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(place, shape, dtype):  # noqa: F811
    _check_forward(place, _case(*shape, dtype))
