"""The compiled LSTM cell: values, gradients, the accuracy of its functions, the rounding of 16-bit results."""

import pytest
import torch
from native_cases import DTYPES, dtype_id, ops

from fastseq import _native
from fastseq.testing.numerics import assert_all_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("B", "H"), [(1, 1), (3, 63), (9, 257), (0, 4)])
def test_cell_matches_torch(B, H, dtype):
    draws = [cell_sides(B, H, dtype) for _ in range(32 if H < 100 else 1)]  # torch may be exact in a few numbers
    sides = [[torch.stack(results) for results in zip(*side, strict=True)] for side in zip(*draws, strict=True)]
    assert_all_accurate(*({"h": h, "c_n": c_n} for h, c_n, *_ in sides))
    assert_all_accurate(*({"grad_gates": gates, "grad_c": c} for *_, gates, c in sides), factor=3)


def cell_sides(B, H, dtype):
    """Return h, c_n and the gradients for one draw: of the kernel, of torch in float64, of torch in the dtype."""
    gates, c = torch.randn(B, 4 * H).to(dtype), torch.randn(B, H).to(dtype)
    upstream = torch.randn(B, H).to(dtype), torch.randn(B, H).to(dtype)

    def plain(kind):
        leaves = [t.detach().clone().to(kind).requires_grad_() for t in (gates, c)]
        i, f, g, o = leaves[0].chunk(4, 1)
        c_n = torch.sigmoid(f) * leaves[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c_n)
        torch.autograd.backward((h, c_n), [g.to(kind) for g in upstream])
        return h, c_n, leaves[0].grad, leaves[1].grad

    h, c_n, activations = ops.lstm_cell_forward(gates, c)
    grads = ops.lstm_cell_backward(activations, c, c_n, *upstream)
    only_h = ops.lstm_cell_backward(activations, c, c_n, upstream[0], None)
    assert torch.equal(only_h[0], ops.lstm_cell_backward(activations, c, c_n, upstream[0], torch.zeros_like(c))[0])
    return (h, c_n, *grads), plain(torch.float64), plain(dtype)


def activate(x):
    """Compute sigmoid(x) and tanh(x) by the float32 kernels."""
    H = x.numel()
    gates = torch.cat((x, torch.zeros(H), x, torch.zeros(H))).unsqueeze(0)
    activations = ops.lstm_cell_forward(gates, torch.zeros(1, H))[2][0]
    return activations[:H], activations[2 * H : 3 * H]


def test_float32_sigmoid_and_tanh_are_within_three_roundings():
    x = torch.cat((torch.linspace(-80, 80, 400_001), torch.logspace(-30, 1, 20_001), -torch.logspace(-30, 1, 20_001)))
    sigmoid, tanh = activate(x)
    eps = torch.finfo(torch.float32).eps
    exact = x.double().sigmoid(), x.double().tanh()
    assert ((sigmoid - exact[0]).abs() / exact[0]).max() < 3 * eps
    assert ((tanh - exact[1]).abs() / exact[1].abs().clamp_min(1e-45)).max() < 3 * eps


def test_activations_saturate_and_pass_nan_through():
    inf, nan = float("inf"), float("nan")
    sigmoid, tanh = activate(torch.tensor([-inf, -100.0, 0.0, 100.0, inf, nan]))
    torch.testing.assert_close(sigmoid, torch.tensor([0, 0, 0.5, 1, 1, nan]), rtol=0, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(tanh, torch.tensor([-1.0, -1, 0, 1, 1, nan]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_every_16_bit_value_survives_loading_and_storing(dtype):
    c = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(0)
    keep = torch.tensor([-100.0, 100.0, 0.0, 0.0], dtype=dtype).repeat_interleave(c.numel()).unsqueeze(0)
    c_n = ops.lstm_cell_forward(keep, c)[1]  # f = 1, i * g = 0
    assert torch.equal(c_n.isnan(), c.isnan())
    assert torch.equal(c_n[~c.isnan()], c[~c.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_16_bit_results_are_rounded_to_nearest_even(dtype):
    H = 50_000
    gates = torch.cat((torch.full((1, H), -100.0), torch.randn(1, 3 * H)), 1)
    gates[:, 2 * H : 3 * H] = 0
    c = torch.logspace(-8, 4.9, H).unsqueeze(0).to(dtype)
    _, c_n, activations = ops.lstm_cell_forward(gates.to(dtype), c)
    assert torch.equal(c_n, (activations[:, H : 2 * H] * c.float()).to(dtype))


def test_cell_refuses_bad_arguments():
    with pytest.raises(RuntimeError, match=r"lstm_cell_forward: gates must have the shape \(2, 12\), got \(2, 20\)"):
        ops.lstm_cell_forward(torch.zeros(2, 20), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"lstm_cell_backward: grad_h must have the shape \(2, 3\), got \(1, 3\)"):
        ops.lstm_cell_backward(*map(torch.zeros, [(2, 12), (2, 3), (2, 3), (1, 3)]), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck_lstm_cell(dtype):
    gates, c = torch.randn(3, 20).to(dtype), torch.randn(3, 5).to(dtype)
    torch.library.opcheck(ops.lstm_cell_forward.default, (gates, c))
    h, c_n, activations = ops.lstm_cell_forward(gates, c)
    for grads in ((h, c_n), (h, None), (None, c_n)):
        torch.library.opcheck(ops.lstm_cell_backward.default, (activations, c, c_n, *grads))
