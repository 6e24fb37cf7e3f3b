"""The compiled LSTM variants: other threads and rows change no bit, and the operators refuse what does not fit."""

import operator_calls as calls
import pytest
import torch
from native_cases import dtype_id, threads

from fastseq import _native, ops

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
operators = torch.ops.fastseq


def arguments(T, B, H, dtype) -> tuple[dict, list[torch.Tensor]]:
    """The arguments of ``ops.lstm_variant`` with all options, and its leaves."""
    torch.manual_seed(0)
    gates, h0, c0 = torch.randn(T, B, 4 * H), torch.randn(B, H), torch.randn(B, H)
    leaves = [gates, h0, c0, torch.randn(4 * H, H) / H**0.5, torch.randn(4 * H), torch.randn(H), torch.randn(H)]
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    masks = {"hidden_mask": (torch.rand(B, H) < 0.5) * 2.0, "zoneout_hidden": torch.rand(T, B, H) < 0.3}
    masks["zoneout_cell"] = torch.rand(T, B, H) < 0.3
    gates, h0, c0, weight_hh, *norms = leaves
    sizes = {"lengths": torch.randint(0, T + 1, (B,)), "norms": tuple(norms)}
    return {"gates": gates, "hx": (h0, c0), "weight_hh": weight_hh} | masks | sizes, leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(40, 70, 70), (30, 5, 130), (9, 2, 40)], ids=str)
def test_threads_change_no_output_and_no_gradient(shape, dtype):
    given, leaves = arguments(*shape, dtype)
    results = []
    for count in (1, 3):
        with threads(count):
            output, states = ops.lstm_variant(**given, backend="native")
            grads = torch.autograd.grad(output.float().square().sum() + states[1].float().sum(), leaves)
        results.append((output, *states, *grads))
    for a, b in zip(*(r[:6] for r in results), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(r[6:] for r in results), strict=True):  # sums over the batch, in an order that threads decide
        assert (a - b).abs().max() <= 64 * torch.finfo(dtype).eps * b.abs().max()


BAD = {  # index of the argument of lstm_variant_forward -> value, message
    "one norm": (5, None, "give norm_hh, norm_c and norm_c_bias, or none; got 2"),
    "two directions": (2, torch.zeros(2, 3, 7), r"c0 must have the shape \(1, B, H\), got \(2, 3, 7\)"),
    "a narrow mask": (7, torch.zeros(3, 6), r"hidden_mask must have the shape \(3, 7\)"),
    "a mask of numbers": (8, torch.zeros(4, 3, 7), "keep_h must have the dtype Bool"),
    "gates of another size": (0, torch.zeros(4, 3, 27), r"gates must have the shape \(4, 3, 28\)"),
    "a long sequence": (12, torch.tensor([4, 5, 1]), r"lengths must lie in 0 \.\. 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_a_sentence(name):
    index, value, message = BAD[name]
    given = list(calls.lstm_variant_forward())
    given[index] = value
    with pytest.raises(RuntimeError, match=f"lstm_variant_forward: {message}"):
        operators.lstm_variant_forward(*given)


def test_backward_needs_what_the_norms_saved():
    given = list(calls.lstm_variant_backward())
    given[-1] = None
    with pytest.raises(RuntimeError, match="lstm_variant_backward: give normal and statistics with the norms"):
        operators.lstm_variant_backward(*given)
