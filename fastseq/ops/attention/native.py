"""The ``native`` backend of ``attention``: one compiled pass, no (B, T, S, A) intermediate. Checks, maths: csrc/cpu."""

import torch
from torch import Tensor

from fastseq import _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    query: Tensor,  # (B, T, A)
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    weight: Tensor | None,  # (A,) v of the additive score
    bias: Tensor | None,  # (A,) added inside its tanh
    lengths: Tensor | None,  # (B,)
    mask: Tensor | None,  # (B, 1 or T, S) bool, True = attend
    score: str,
    scale: float,
    need_weights: bool,
    need_backward: bool = True,
    prepared: Tensor | None = None,  # prepare(keys, lengths)
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """-> context (B, T, D), weights (B, T, S) or None, saved for ``backward``."""
    context, weights = _native.operators.attention_forward.default(
        query, keys, values, *_small(weight, bias, lengths), mask, prepared, scale, need_weights or need_backward
    )
    saved = () if not need_backward else (weights,) if prepared is None else (weights, prepared)
    return context, weights.to(query.dtype) if need_weights else None, saved


def backward(
    grad_context: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    saved: tuple[Tensor, ...],
    score: str,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, keys, values, weight, bias; None where not needed."""
    weights, prepared = saved if len(saved) == 2 else (*saved, None)
    need_query, need_keys, need_values, need_weight, need_bias = needs
    grads = _native.operators.attention_backward.default(
        grad_context,
        grad_weights,
        query,
        keys,
        values,
        *_small(weight, bias, lengths),
        mask,
        prepared,
        weights,
        scale,
        need_query or need_keys or need_weight or need_bias,
        need_values,
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def prepare(keys: Tensor, lengths: Tensor | None) -> Tensor:
    """What the additive score computes of its keys (B, S, A) up to their lengths (B,), for many calls with them.

    Empty on CUDA: one step is bound by the bytes of the keys there, and these would be as many or twice as many.
    """
    return _native.operators.attention_prepare.default(keys.detach(), _small(None, None, lengths)[2])


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``AttentionCall``) and the way out, or None."""
    if not _native.available():
        return f"attention: the native backend is missing: {_native.why_not()}"
    missing = _native.why_not_cuda(call.device_index) if call.device == "cuda" else ""
    if missing:
        return f"attention: the native backend has no CUDA kernels here: {missing}"
    if call.device not in ("cpu", "cuda"):
        return (
            f"attention: the native backend runs on CPU and CUDA (got {call.device}); "
            "use backend='torch' or 'reference'."
        )
    dtypes = CUDA_DTYPES if call.device == "cuda" else DTYPES
    if call.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"attention: the native backend computes in {names} (got {call.dtype}); use backend='reference'."
    return None


def _small(weight: Tensor | None, bias: Tensor | None, lengths: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the operators read them; query, keys, values and mask they read at any strides."""
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if lengths is None else lengths.to(torch.int64).contiguous(),
    )


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(op, query, keys, values, weight, bias, lengths, mask) -> None:
    three = query.dim() == keys.dim() == values.dim() == 3
    torch._check(three, lambda: f"{op}: query, keys and values must have three dimensions")
    B, _, A = query.shape
    S = keys.shape[1]
    _check_shape(op, "keys", keys, (B, S, A))
    _check_shape(op, "values", values, (B, S, values.shape[2]))
    _check_shape(op, "weight", weight, (A,))
    _check_shape(op, "bias", bias, (A,))
    _check_shape(op, "lengths", lengths, (B,))
    if mask is not None:
        torch._check(mask.dim() == 3, lambda: f"{op}: mask must have the shape (B, 1 or T, S), got {tuple(mask.shape)}")
        _check_shape(op, "mask", mask, (B, mask.shape[1], S))
    same = all(t is None or t.dtype == query.dtype for t in (keys, values, weight, bias))
    torch._check(same, lambda: f"{op}: query, keys, values, weight and bias must have one dtype")


def _check_shape(op, name, t, shape) -> None:
    if t is None:
        return
    fits = t.dim() == len(shape)
    torch._check(fits, lambda: f"{op}: {name} must have the shape {shape}, got {tuple(t.shape)}")
    for actual, expected in zip(t.shape, shape, strict=True):
        torch._check(actual == expected, lambda: f"{op}: {name} must have the shape {shape}, got {tuple(t.shape)}")


def _fake_forward(query, keys, values, weight, bias, lengths, mask, prepared, scale, need_weights):
    _check("attention_forward", query, keys, values, weight, bias, lengths, mask)
    (B, T, _), S = query.shape, keys.shape[1]
    shape = (B, T, S) if need_weights else (0,)
    return query.new_empty(B, T, values.shape[2]), query.new_empty(shape, dtype=_accumulate_dtype(query.dtype))


def _fake_backward(
    grad_context,
    grad_weights,
    query,
    keys,
    values,
    weight,
    bias,
    lengths,
    mask,
    prepared,
    weights,
    scale,
    need_scores,
    need_values,
):
    op = "attention_backward"
    _check(op, query, keys, values, weight, bias, lengths, mask)
    (B, T, A), S, D = query.shape, keys.shape[1], values.shape[2]
    _check_shape(op, "grad_context", grad_context, (B, T, D))
    _check_shape(op, "grad_weights", grad_weights, (B, T, S))
    _check_shape(op, "weights", weights, (B, T, S))
    vector = (A,) if need_scores and weight is not None else (0,)
    shapes = [(B, T, A), (B, S, A)] if need_scores else [(0,), (0,)]
    shapes += [(B, S, D) if need_values else (0,), vector, vector]
    return tuple(query.new_empty(shape) for shape in shapes)


def _fake_prepare(keys, lengths):
    B, S, A = keys.shape
    shape = (0,) if keys.device.type == "cuda" else (B, S, (A + 15) // 16 * 16 + 16)
    return keys.new_empty(shape, dtype=_accumulate_dtype(keys.dtype))


if _native.available():
    torch.library.register_fake("fastseq::attention_forward", _fake_forward)
    torch.library.register_fake("fastseq::attention_backward", _fake_backward)
    torch.library.register_fake("fastseq::attention_prepare", _fake_prepare)
