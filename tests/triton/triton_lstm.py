"""``lstm`` on the triton backend against float64, in Triton's interpreter."""

from functools import partial

import pytest
import torch
from triton_cases import DTYPES, check, draw

from fastseq import LSTM, ops
from fastseq.ops.common.triton.runtime import CHIPS
from fastseq.ops.lstm import triton as backend

configure = backend.configure


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch):
    """Enlarge the blocks of the step kernels: interpreter time grows with programs, not with elements."""

    def coarse(*args, **kwargs):
        config = configure(*args, **kwargs)
        return config._replace(block_h=64, block_k=128) if config.block_k else config

    monkeypatch.setattr(backend, "configure", coarse)


def lstm(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, *, backend, cells=False, weight_hr=None, **options):
    options |= {"weight_hr": weight_hr}
    output, (h_n, c_n), *rest = ops.lstm(
        input, (h0, c0), weight_ih, weight_hh, bias_ih, bias_hh, return_cell_states=cells, backend=backend, **options
    )
    return {"output": output, "h_n": h_n, "c_n": c_n} | dict(zip(["cell_states"], rest, strict=False))


def tensors(dtype, T, B, H, I=3, bias=True, rows=None):  # noqa: E741
    """Draw leaves, weights scaled as in nn.LSTM. rows: of packed input."""
    leaves = draw(
        dtype, input=(T, B, I) if rows is None else (rows, I), h0=(B, H), c0=(B, H), weight_ih=(4 * H, I),
        weight_hh=(4 * H, H), bias_ih=(4 * H,) if bias else None, bias_hh=(4 * H,) if bias else None,
    )  # fmt: skip
    for name in ("weight_ih", "weight_hh"):
        leaves[name] = (leaves[name].float() / H**0.5).to(dtype)
    return leaves


def check_lstm(leaves, dtype, baseline="torch", **options):
    """Compare with torch's own LSTM as the baseline, or with the reference where torch lacks a requested result."""
    check(*(partial(lstm, backend=b, **options) for b in ("triton", "reference")), leaves, dtype,
          baseline=partial(lstm, backend=baseline, **options))  # fmt: skip


# T, B, H, lengths, reverse. All steps in one launch: H <= 63, 128 in 16 bits. One launch per step: 128 float32, 257.
CASES = [
    (1, 1, 1, None, False),
    (3, 1, 16, None, True),
    (4, 18, 16, None, False),
    (4, 5, 63, [4, 0, 2, 1, 4], False),
    (4, 5, 63, [4, 0, 2, 1, 4], True),
    (3, 2, 128, [3, 1], True),
    (1, 1, 257, None, True),
    (4, 34, 129, None, False),
    (4, 4, 257, [0, 4, 3, 1], False),
    (4, 4, 257, [0, 4, 3, 1], True),
]


@pytest.mark.parametrize(
    ("T", "B", "H", "lengths", "reverse", "dtype"),
    [(*case, dtype) for case in CASES for dtype in (DTYPES if case[2] <= 128 else DTYPES[:2])],
    ids=str,
)
def test_accuracy(T, B, H, lengths, reverse, dtype):
    lengths = None if lengths is None else torch.tensor(lengths)
    check_lstm(tensors(dtype, T, B, H), dtype, lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("H", [5, 129])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_with_cell_states(H, reverse):
    batch_sizes = torch.tensor([3, 2, 1, 1])
    leaves = tensors(torch.float32, 4, 3, H, rows=7)
    check_lstm(leaves, torch.float32, baseline="reference", batch_sizes=batch_sizes, reverse=reverse, cells=True)


@pytest.mark.parametrize("H", [5, 129])
def test_cell_states_with_lengths_and_no_bias(H):
    leaves = tensors(torch.float32, 3, 3, H, bias=False)
    check_lstm(leaves, torch.float32, baseline="reference", lengths=torch.tensor([3, 0, 1]), cells=True)


@pytest.mark.parametrize("H", [4, 129])
def test_saturated_gates(H):
    leaves = tensors(torch.float32, 2, 3, H)
    leaves["bias_ih"] = 100 * leaves["bias_ih"].sign()
    check_lstm(leaves, torch.float32)


@pytest.mark.parametrize("H", [4, 129])
@pytest.mark.parametrize("wanted", [("output",), ("h_n",), ("c_n",)], ids=str)
def test_one_result_in_the_loss(H, wanted):
    def only(backend):
        def operation(**given):
            leaves = lstm(**given, backend=backend, lengths=torch.tensor([2, 0, 1]))
            return {name: leaves[name] for name in wanted}

        return operation

    check(only("triton"), only("reference"), tensors(torch.float32, 2, 3, H), torch.float32)


@pytest.mark.parametrize("H", [4, 129])
def test_strided_inputs_and_gradients(H):
    def strided(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        apart = (t.t().contiguous().t() for t in (h0, c0, weight_ih, weight_hh))
        input = input.repeat(1, 1, 2)[..., : input.size(-1)]
        return {"output": lstm(input, *apart, bias_ih, bias_hh, backend="triton")["output"].transpose(0, 1)}

    def oracle(**given):
        return {"output": lstm(**given, backend="reference")["output"].transpose(0, 1)}

    check(strided, oracle, tensors(torch.float32, 2, 3, H), torch.float32)


@pytest.mark.parametrize("H", [4, 129])
def test_an_empty_batch(H):
    results = lstm(**tensors(torch.float32, 2, 0, H), backend="triton")
    assert [t.shape for t in results.values()] == [(2, 0, H), (0, H), (0, H)]


@pytest.mark.parametrize("H", [4, 129])
def test_results_do_not_alias_saved_tensors(H):
    """Results changed in place change no gradient."""
    leaves = {n: t.requires_grad_() for n, t in tensors(torch.float32, 3, 2, H).items()}
    grads = []
    for spoil in (False, True):
        results = lstm(**leaves, backend="triton", cells=True)
        loss = sum(t.sum() for t in results.values())
        if spoil:
            for t in results.values():
                t.detach().fill_(9.0)
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("H", "dtype"), [(20, torch.float32), (20, torch.bfloat16), (512, torch.float32), (1024, torch.bfloat16)], ids=str
)
def test_every_configuration_computes_the_same(name, H, dtype, monkeypatch):
    """Runs a small problem in the blocks of other chips and of hidden sizes too large for the interpreter."""
    monkeypatch.setattr(backend, "configure", lambda *_, backward: configure(H, dtype, CHIPS[name], backward))
    check_lstm(tensors(torch.float32, 2, 3, 20), torch.float32, lengths=torch.tensor([2, 0, 1]))


def test_accuracy_in_the_blocks_of_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "configure", configure)
    check_lstm(tensors(torch.float32, 2, 4, 257), torch.float32, lengths=torch.tensor([2, 0, 1, 2]))


@pytest.mark.parametrize("H", [4, 129])
def test_the_cell_state_is_float32_between_steps(H):
    """Eight increments of 2^-9 to a cell of 1, which bfloat16 would round away one by one."""
    zeros = torch.zeros(4 * H, 1), torch.zeros(4 * H, H)
    i, f, g, o = torch.zeros(H), torch.full((H,), 20.0), torch.full((H,), 2.0**-8), torch.zeros(H)
    bias = torch.cat((i, f, g, o))
    given = (torch.zeros(8, 1, 1), torch.zeros(1, H), torch.ones(1, H), *zeros, bias, torch.zeros(4 * H))
    c_n = lstm(*(t.bfloat16() for t in given), backend="triton")["c_n"]
    torch.testing.assert_close(c_n, torch.full((1, H), 1 + 8 * 2.0**-9).bfloat16(), rtol=0, atol=0)


# T, B, H, P, lengths, reverse.
PROJECTIONS = [
    (1, 1, 2, 1, None, True),
    (4, 5, 63, 16, [4, 0, 2, 1, 4], False),
    (4, 5, 63, 16, [4, 0, 2, 1, 4], True),
    (3, 3, 129, 40, None, False),
]


@pytest.mark.parametrize(("T", "B", "H", "P", "lengths", "reverse"), PROJECTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(T, B, H, P, lengths, reverse, dtype):
    leaves = tensors(dtype, T, B, H)
    projected = draw(dtype, h0=(B, P), weight_hh=(4 * H, P), weight_hr=(P, H))
    leaves |= projected | {name: (projected[name].float() / H**0.5).to(dtype) for name in ("weight_hh", "weight_hr")}
    lengths = None if lengths is None else torch.tensor(lengths)
    check_lstm(leaves, dtype, lengths=lengths, reverse=reverse)


def test_a_projection_in_both_directions_without_hx():
    module, input = LSTM(3, 5, proj_size=2, bidirectional=True, backend="triton"), torch.randn(4, 3, 3)
    results = []
    for name in ("triton", "reference"):
        module.backend = name
        output, (h_n, c_n) = module(input, lengths=torch.tensor([4, 0, 2]))
        loss = output.square().sum() + h_n.square().sum() + c_n.square().sum()
        results.append((output, h_n, c_n, *torch.autograd.grad(loss, list(module.parameters()))))
    torch.testing.assert_close(*results)
