"""The ``native`` backend of ``linear_cross_entropy``: products of chunks of rows by torch, and one compiled pass over
the logits of a chunk while they are in the cache (csrc/cpu/ops/linear_cross_entropy.cpp).

The gradients of a sum of losses are made in the forward, so that the logits are computed once.
"""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.common.autograd import scaled
from fastseq.ops.common.checks import CPU_DTYPES, native_objection
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.linear_cross_entropy.spec import InputGrads, Inputs, Result, Want

NONE = InputGrads(False, False, False)


def unsupported(call) -> str | None:
    """None, or the sentence with the limit and the way out. call: ``LinearCrossEntropyCall``."""
    if call.device == "cuda":
        return "linear_cross_entropy: the native backend runs on the CPU (got cuda); use backend='triton' or 'torch'."
    return native_objection("linear_cross_entropy", call, CPU_DTYPES)


def forward(inputs: Inputs, want: Want) -> Result:
    """Saved: the wanted gradients of the sum, or the softmax statistics (2, N) for losses of rows."""
    now = NONE if want.per_row else want.grads
    losses, statistics, *grads = _native.operators.linear_cross_entropy_forward.default(*_contiguous(inputs), *now)
    if want.per_row:
        return Result(losses, (statistics,) if any(want.grads) else ())
    return Result(losses.sum(), tuple(g for g, wanted in zip(grads, want.grads, strict=True) if wanted))


def backward(inputs: Inputs, saved: tuple[Tensor, ...], grad: Tensor, want: Want, needs: InputGrads) -> InputGrads:
    """grad: (N,), or () for the sum, whose gradients were made in the forward."""
    if want.per_row:
        arguments = grad.contiguous(), *saved, *_contiguous(inputs), *needs
        grads = _native.operators.linear_cross_entropy_backward.default(*arguments)
    else:
        of_sum = iter(saved)
        grads = [scaled(next(of_sum), grad) if wanted else None for wanted in want.grads]
    dtype = inputs.input.dtype
    return InputGrads(*(g.to(dtype) if need else None for g, need in zip(grads, needs, strict=True)))


def _contiguous(inputs: Inputs) -> tuple:
    return *(t if t is None else t.contiguous() for t in inputs[:4]), *inputs[4:]


# The fakes have the parameters of the operators' schemas (csrc/schemas.h).


def _fake_grads(input, weight, needs):
    acc, shapes = accumulate_dtype(input.dtype), (input.shape, weight.shape, weight.shape[:1])
    shapes = (shape if need else (0,) for shape, need in zip(shapes, needs, strict=True))
    return tuple(input.new_empty(shape, dtype=d) for shape, d in zip(shapes, (input.dtype, acc, acc), strict=True))


def _fake_forward(input, weight, bias, target, ignore_index, label_smoothing, *needs):
    acc = accumulate_dtype(input.dtype)
    losses, statistics = (input.new_empty(*shape, dtype=acc) for shape in ((input.size(0),), (2, input.size(0))))
    return losses, statistics, *_fake_grads(input, weight, needs)


def _fake_backward(grad, statistics, input, weight, bias, target, ignore_index, label_smoothing, *needs):  # noqa: PLR0917
    return _fake_grads(input, weight, needs)


if _native.available():
    torch.library.register_fake("fastseq::linear_cross_entropy_forward", _fake_forward)
    torch.library.register_fake("fastseq::linear_cross_entropy_backward", _fake_backward)
