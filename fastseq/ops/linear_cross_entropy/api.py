"""The public linear_cross_entropy op."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import select
from fastseq.ops.common.autocast import cast_inputs
from fastseq.ops.common.checks import readable
from fastseq.ops.linear_cross_entropy.function import apply
from fastseq.ops.linear_cross_entropy.spec import Inputs, LinearCrossEntropyCall

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(input, weight, bias), target)`` without the logits of all rows in memory.

    Output layer, softmax and cross-entropy run chunk by chunk over the rows that have a target. Rows whose target is
    ``ignore_index`` are skipped, in forward and backward. Softmax and sums are computed in float32 at least. Under
    autocast the product is computed in its dtype, and the loss in float32.

    With "mean" and "sum" a backend may make the gradients in the forward, and the backward multiplies them by the
    incoming gradient; with "none" it computes the logits once more in the backward.

    Args:
        input: (..., H), for example the attentional vectors of a decoder.
        weight: (V, H), as of ``nn.Linear(H, V)``; may be an embedding's (tied weights).
        target: (...,) integer classes in [0, V), or ``ignore_index``. Values on the CPU are checked; values on an
            accelerator, and in a traced graph, are not.
        bias: (V,).
        ignore_index: target of the rows that count for nothing.
        label_smoothing: s in [0, 1]; the target distribution is (1 - s) onehot(target) + s / V (Szegedy et al. 2016).
        reduction: "mean" over the rows that are not ignored (NaN if all are), "sum", or "none".
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        The loss, (), or (...,) for "none" with 0 in ignored rows: float64 for float64 inputs, otherwise float32, as
        ``F.cross_entropy(logits.float(), target)`` gives.

    Raises:
        IndexError: a target outside [0, V) that is not ``ignore_index``.
        RuntimeError: shapes, dtypes or devices that do not fit; a backend requested by name that cannot serve this
            call.
        ValueError: unknown reduction or backend; label_smoothing outside [0, 1].
    """
    if reduction not in REDUCTIONS:
        names = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}; choose one of {names}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must lie in [0, 1], got {label_smoothing}")
    _check_tensors(input, weight, target, bias)
    input, weight, bias = cast_inputs(input, weight, bias)
    _check_dtypes(input, weight, bias)
    _check_target(target, weight.size(0), ignore_index)
    rows = input.reshape(-1, input.size(-1))
    target = target.to(torch.int64)
    inputs = Inputs(rows, weight, bias, target.reshape(-1), int(ignore_index), float(label_smoothing))
    per_row = reduction == "none"
    loss = apply(select("linear_cross_entropy", backend, _call(inputs, per_row)), inputs, per_row)
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum()
    return loss.view(target.shape if per_row else ())


def _call(inputs: Inputs, per_row: bool) -> LinearCrossEntropyCall:
    compiling, (N, H) = torch.compiler.is_compiling(), inputs.input.shape
    tensors = inputs.differentiable()
    return LinearCrossEntropyCall(
        device=_native.device_of(inputs.input),
        dtype=inputs.input.dtype,
        hidden_size=H,
        classes=inputs.weight.size(0),
        per_row=per_row,
        requires_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        compiling=compiling,
        rows=None if compiling else N,
        device_index=inputs.input.device.index,
    )


def _check_tensors(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    fits = weight.dim() == 2 and input.dim() > 0 and input.size(-1) == weight.size(1)
    if not fits or input.shape[:-1] != target.shape or (bias is not None and bias.shape != weight.shape[:1]):
        raise RuntimeError(
            "linear_cross_entropy: expected input (..., H), weight (V, H), target (...,) and bias (V,) or None, got "
            f"{tuple(input.shape)}, {tuple(weight.shape)}, {tuple(target.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    if weight.size(0) == 0:
        raise RuntimeError("linear_cross_entropy: weight must have at least one class (V >= 1), got (0, H)")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(
            f"linear_cross_entropy: target must hold integer classes, got {target.dtype}; class probabilities need "
            "F.cross_entropy(F.linear(input, weight, bias), target)"
        )
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"linear_cross_entropy: input is on {input.device} but {name} is on {tensor.device}; "
                "move them to one device"
            )


def _check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not input.is_floating_point():
        raise RuntimeError(f"linear_cross_entropy: input must be floating point, got {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(
                f"linear_cross_entropy: input is {input.dtype} but {name} is {tensor.dtype}; convert one, or use "
                "autocast"
            )


def _check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for a class outside [0, V), where targets can be read."""
    if target.numel() == 0 or not readable(target):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(
            f"linear_cross_entropy: target must lie in [0, {classes}), the rows of weight, or be ignore_index = "
            f"{ignore_index}; got {int(target[wrong][0])}"
        )
