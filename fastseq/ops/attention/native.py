"""The ``native`` backend of ``attention``: one compiled pass, no (B, T, S, A) intermediate (csrc/cpu, csrc/cuda)."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.attention.spec import Grads, InputGrads, Inputs, Result, Want
from fastseq.ops.common.checks import native_objection
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import contiguous

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(call) -> str | None:
    """None, or the sentence with the limit and the way out. call: ``AttentionCall``."""
    return native_objection("attention", call, CUDA_DTYPES)


def forward(inputs: Inputs, want: Want) -> Result:
    """Saved: the weights, (B, T, S), in the accumulation dtype."""
    operators, given = _native.operators, (*_operator_inputs(inputs), inputs.scale, want.weights or want.backward)
    if inputs.coverage is None:
        context, weights = operators.attention_forward.default(*given)
    else:
        context, weights = operators.attention_coverage_forward.default(*given)
    # Not .to() where it would return weights itself: TorchDynamo of torch 2.11 does not see, as the Function must, that
    # both outputs are one tensor, and drops its gradient.
    wanted = weights if weights.dtype == inputs.query.dtype else weights.to(inputs.query.dtype)
    wanted = wanted if want.weights else None
    return Result(context, wanted, (weights,) if want.backward else ())


def context(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The context (B, T, D) of a dot score without padding, for inference: no Python checks, nothing saved."""
    operator = _native.operators.attention_forward.default
    return operator(query, keys, values, None, None, None, None, None, scale, False)[0]


def backward(inputs: Inputs, saved: tuple[Tensor, ...], grads: Grads, needs: InputGrads) -> InputGrads:
    """Reads the saved weights; recomputes the tanh of the additive score."""
    scores_needed = needs.query or needs.keys or needs.weight or needs.bias or needs.coverage or needs.coverage_weight
    given = *grads, *_operator_inputs(inputs), *saved, inputs.scale, scores_needed, needs.values
    if inputs.coverage is None:
        result = *_native.operators.attention_backward.default(*given), None, None
    else:
        result = _native.operators.attention_coverage_backward.default(*given)
    return InputGrads(*(grad if need else None for grad, need in zip(result, needs, strict=True)))


def prepare(keys: Tensor, lengths: Tensor | None) -> Tensor | None:
    """The terms of the additive score of keys (B, S, A), up to lengths (B,), for ``Inputs.prepared``.

    None on CUDA: one step is bound by the bytes of the keys there, and prepared terms take once or twice as many.
    """
    data = _native.operators.attention_prepare.default(keys.detach(), _int64(lengths))
    return data if data.numel() else None


def _operator_inputs(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Vectors contiguous; query, keys, values, mask and coverage are read at any strides."""
    query, keys, values, weight, bias, lengths, mask, prepared = inputs[:8]
    if inputs.coverage is not None:
        vectors = weight.contiguous(), contiguous(bias), _int64(lengths), mask
        return query, keys, values, *vectors, inputs.coverage, inputs.coverage_weight.contiguous()
    if weight is lengths is None:
        return inputs[:8]
    return query, keys, values, contiguous(weight), contiguous(bias), _int64(lengths), mask, prepared


def _int64(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


# The fakes have the parameters of the operators' schemas (csrc/schemas.h).


def _fake_forward(query, keys, values, weight, bias, lengths, mask, prepared, scale, need_weights):  # noqa: PLR0917
    (B, T, _), S, D = query.shape, keys.shape[1], values.shape[2]
    shape = (B, T, S) if need_weights else (0,)
    return query.new_empty(B, T, D), query.new_empty(shape, dtype=accumulate_dtype(query.dtype))


def _fake_backward(  # noqa: PLR0917
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
    (B, T, A), S, D = query.shape, keys.shape[1], values.shape[2]
    vector = (A,) if need_scores and weight is not None else (0,)
    shapes = [(B, T, A), (B, S, A)] if need_scores else [(0,), (0,)]
    shapes += [(B, S, D) if need_values else (0,), vector, vector]
    return tuple(query.new_empty(shape) for shape in shapes)


def _fake_coverage_forward(query, keys, values, weight, bias, lengths, mask, coverage, vector, scale, need_weights):  # noqa: PLR0917
    return _fake_forward(query, keys, values, weight, bias, lengths, mask, None, scale, need_weights)


def _fake_coverage_backward(  # noqa: PLR0917
    grad_context,
    grad_weights,
    query,
    keys,
    values,
    weight,
    bias,
    lengths,
    mask,
    coverage,
    vector,
    weights,
    scale,
    *need,
):
    others = _fake_backward(
        grad_context, grad_weights, query, keys, values, weight, bias, lengths, mask, None, weights, scale, *need
    )
    shapes = ((query.shape[0], query.shape[1], keys.shape[1]), (keys.shape[2],)) if need[0] else ((0,), (0,))
    return *others, *(query.new_empty(shape) for shape in shapes)


def _fake_prepare(keys, lengths):
    B, S, A = keys.shape
    shape = (0,) if keys.device.type == "cuda" else (B, S, (A + 15) // 16 * 16 + 16)
    return keys.new_empty(shape, dtype=accumulate_dtype(keys.dtype))


if _native.available():
    torch.library.register_fake("fastseq::attention_forward", _fake_forward)
    torch.library.register_fake("fastseq::attention_backward", _fake_backward)
    torch.library.register_fake("fastseq::attention_coverage_forward", _fake_coverage_forward)
    torch.library.register_fake("fastseq::attention_coverage_backward", _fake_coverage_backward)
    torch.library.register_fake("fastseq::attention_prepare", _fake_prepare)
