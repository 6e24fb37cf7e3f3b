"""``linear_cross_entropy`` on the triton backend against float64, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from triton_cases import DTYPES, check, draw

from fastseq.ops.linear_cross_entropy import linear_cross_entropy, triton


def kernels(target, **options):
    return lambda **tensors: {"loss": linear_cross_entropy(**tensors, target=target, backend="triton", **options)}


def oracle(target, **options):
    def operation(input, weight, bias):
        logits = F.linear(input, weight, bias)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return {"loss": F.cross_entropy(logits.to(wide), target, **options)}

    return operation


def tensors(dtype, N, V, H, bias=True):
    drawn = draw(dtype, input=(N, H), weight=(V, H), bias=(V,) if bias else None)
    drawn["weight"] = (drawn["weight"].float() / H**0.5).to(dtype)
    return drawn


def targets(N, V, ignored=False):
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    return target.index_fill_(0, torch.arange(0, N, 3), -100) if ignored else target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("shape", [(5, 1, 3), (7, 63, 16), (2, 5000, 4)], ids=str)
def test_accuracy(shape, reduction, dtype):
    target = targets(*shape[:2], ignored=True)
    options = {"label_smoothing": 0.1, "reduction": reduction}
    draws = [tensors(dtype, *shape) for _ in range(3)]
    check(kernels(target, **options), oracle(target, **options), draws, dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_several_chunks_without_bias_and_smoothing(reduction, monkeypatch):
    monkeypatch.setattr(triton, "CHUNK_LOGITS", 100)
    target, drawn = targets(11, 40), [tensors(torch.float32, 11, 40, 5, bias=False) for _ in range(3)]
    calls = (f(target, reduction=reduction) for f in (kernels, lambda *a, **o: lambda **t: oracle(*a, **o)(**t)))
    check(*calls, drawn, torch.float32)


def test_logits_of_hundreds():
    drawn = tensors(torch.float32, 4, 33, 5)
    drawn = {name: (30 * t).round() for name, t in drawn.items()}
    target = targets(4, 33)
    check(kernels(target), oracle(target), drawn, torch.float32)


def test_no_rows():
    loss = linear_cross_entropy(
        torch.randn(0, 3), torch.randn(4, 3), torch.zeros(0, dtype=torch.int64), backend="triton"
    )
    assert loss.isnan()
