"""``lstm_cell`` on the triton backend against float64, in Triton's interpreter."""

from functools import partial

import pytest
import torch
from triton_cases import DTYPES, check, draw

from fastseq import ops


def cell(gates, c, backend):
    return dict(zip(("h", "c_n"), ops.lstm_cell(gates, c, backend=backend), strict=True))


kernels, oracle = partial(cell, backend="triton"), partial(cell, backend="torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (5, 63), (3, 128), (300, 1), (2, 257), (0, 4), (2, 1025)], ids=str)
def test_accuracy(shape, dtype):
    N, H = shape
    check(kernels, oracle, draw(dtype, gates=(N, 4 * H), c=(N, H)), dtype)


def test_uninitialised_memory_is_nan():
    assert torch.empty(3).isnan().all() and torch.randn(2, 2).new_empty(3).isnan().all()


@pytest.mark.parametrize("scale", [100.0, 1e-3], ids=["saturated", "near 0"])
def test_extreme_gates(scale):
    tensors = draw(torch.float32, gates=(4, 28), c=(4, 7))
    tensors["gates"] *= scale
    tensors["gates"][0] = tensors["gates"][0].sign() * scale  # +-100 overflows e^x in a naive tanh
    tensors["c"] *= scale
    check(kernels, oracle, tensors, torch.float32)


@pytest.mark.parametrize("wanted", ["h", "c_n"])
def test_one_result_in_the_loss(wanted):
    def only(**tensors):
        return {wanted: kernels(**tensors)[wanted]}

    def only_oracle(**tensors):
        return {wanted: oracle(**tensors)[wanted]}

    check(only, only_oracle, draw(torch.float32, gates=(3, 20), c=(3, 5)), torch.float32)


def test_strided_inputs_and_gradients():
    def strided(gates, c):
        return kernels(gates.t().contiguous().t(), c[:, None].expand(-1, 2, -1)[:, 1])

    check(strided, oracle, draw(torch.float32, gates=(3, 20), c=(3, 5)), torch.float32)
    gates, c = torch.randn(4, 3, 20, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    grads = [torch.autograd.grad(ops.lstm_cell(gates, c, backend=b)[0].sum(), (gates, c)) for b in ("triton", "torch")]
    torch.testing.assert_close(*grads)
