"""The public attention op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.dispatch import implementation, select, takes_auto
from fastseq.ops.attention.function import apply
from fastseq.ops.attention.rules import fast_path
from fastseq.ops.attention.spec import AttentionCall, Inputs, Keys, Prepared, version
from fastseq.ops.common.autocast import cast_inputs, casts
from fastseq.ops.common.checks import as_lengths, readable
from fastseq.ops.common.dtypes import accumulate_dtype

SCORES = {  # name: its parameters
    "dot": (),
    "general": ("weight",),
    "additive": ("weight", "bias"),
    "normed_additive": ("weight", "bias", "gain"),
}
ADDITIVE = ("additive", "normed_additive")


def prepare_keys(keys: Tensor, *, score: str, lengths: Tensor | None = None, backend: str | None = None) -> Keys:
    """``Keys`` with the terms of the additive score that depend on the keys alone, for many calls of one step each.

    Takes as long as three such calls save, and as much memory as the keys in float32. Gradients flow to the keys as
    without it. The terms are omitted where they would save no time: another score, another backend, a GPU, a traced
    graph, or keys that autocast will cast.

    Args:
        keys: (B, S, A).
        score, lengths, backend: as in the later calls. Without lengths (B,), NaN or large numbers in the padding make
            those calls as slow as without prepared terms.
    """
    if score not in ADDITIVE or torch.compiler.is_compiling() or keys.dim() != 3 or casts(keys):
        return Keys(keys)
    call = AttentionCall(
        score="additive",
        device=keys.device.type,
        dtype=keys.dtype,
        padded=lengths is not None,
        prepared=True,
        batch=keys.size(0),
        steps=1,
        positions=keys.size(1),
        device_index=keys.device.index,
    )
    module = implementation("attention", select("attention", backend, call))
    data = module.prepare(keys, lengths) if hasattr(module, "prepare") else None
    return Keys(keys, None if data is None else Prepared(data, version(keys)))


def attention(
    query: Tensor,
    keys: Tensor | Keys,
    values: Tensor | None = None,
    *,
    score: str = "dot",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
    coverage: Tensor | None = None,
    coverage_weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Score each key against the query, softmax over the keys, return the weighted sum of the values.

    =================  =======================================  ===================================================
    score              s(q, k)                                  source
    =================  =======================================  ===================================================
    "dot"              scale * q . k                            Luong et al. 2015
    "general"          scale * (q W) . k                        Luong et al. 2015
    "additive"         scale * v . tanh(q + k + b)              Bahdanau et al. 2015, with q and k projected before
    "normed_additive"  scale * (g v / ||v||) . tanh(q + k + b)  the same, with the norm of Salimans & Kingma 2016
    =================  =======================================  ===================================================

    Both additive scores take a coverage c (B, T, S) and its weight w (A,): they add c[b, t, s] * w inside the tanh,
    where c is the attention that the position got at the steps before (See et al. 2017, equation 11).

    Scores, softmax and sums are computed in float32 at least. Under autocast all inputs are cast to its dtype, as for
    a matmul. A query step without positions (length 0, or a mask row of False) gets weights 0, context 0 and gradient
    0. Positions to which no step of their sentence attends may hold anything, NaN and inf included: they reach no
    output and no gradient. A position that a (B, T, S) mask hides from some steps only must be finite.

    Args:
        query: (B, T, A), or (B, A) for a single step. For "general" (B, T, Q) or (B, Q).
        keys: (B, S, A), or a :class:`Keys` of such keys, which may carry prepared data (see :func:`prepare_keys`).
        values: (B, S, D); default: the keys.
        score: see the table.
        weight: W (Q, A) for "general"; v (A,) for the additive scores; none for "dot".
        bias: b (A,), additive scores only.
        gain: g, a tensor of one element, required by "normed_additive" and by no other score.
        scale: default 1.0 (scaled dot products of Vaswani et al. 2017: ``A ** -0.5``).
        lengths: (B,) integers on any device: sentence b attends to its first ``lengths[b]`` positions. Values on the
            CPU are checked. Values on an accelerator, and in a traced graph, are not read; they act as if clamped to
            [0, S].
        mask: bool, True = attend: (B, S), or (B, T, S) for a query of T steps. Not together with ``lengths``.
        need_weights: also return the weights; without it a backend does not store them.
        coverage: c (B, T, S), or (B, S) for a single step; additive scores only.
        coverage_weight: w (A,), with ``coverage``.
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        context (B, T, D), and weights (B, T, S) or None, both in the dtype of the query; without the T for a query
        (B, A).

    Raises:
        ValueError: unknown score or backend; an input that the score does not take, or lacks; both lengths and mask;
            lengths outside [0, S]; ``Keys`` whose tensor was changed in place after they were prepared.
        RuntimeError: shapes, dtypes or devices that do not fit; a backend requested by name that cannot serve this
            call.
    """
    prepared = None
    if isinstance(keys, Keys):
        prepared, keys = _prepared(keys, score), keys.projected
    values = keys if values is None else values
    scale = 1.0 if scale is None else float(scale)
    others_given = need_weights or not (weight is bias is gain is lengths is mask is coverage is None)
    if score == "dot" and not others_given and takes_auto(backend):
        context = fast_path(query, keys, values, scale)
        if context is not None:
            return context, None
    _check_score(score, weight, bias, gain)
    _check_coverage(score, coverage, coverage_weight)
    dtype = keys.dtype
    query, keys, values, weight, bias, gain, coverage, coverage_weight = cast_inputs(
        query, keys, values, weight, bias, gain, coverage, coverage_weight
    )
    if keys.dtype != dtype:  # prepared outside of autocast
        prepared = None
    one_step = query.dim() == 2
    if one_step:
        query = query.unsqueeze(1)
        coverage = None if coverage is None else coverage.unsqueeze(1)
    inputs = Inputs(query, keys, values, weight, bias, lengths, mask, prepared, scale, coverage, coverage_weight)
    _check_tensors(inputs, gain, score, one_step)
    inputs = _reduced(_check_padding(inputs, one_step), gain, score)
    chosen = select("attention", backend, _call(inputs, need_weights))
    context, weights = apply(chosen, inputs, need_weights)
    if one_step:
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    return context, weights


def _prepared(keys: Keys, score: str) -> Tensor | None:
    return keys.prepared_data() if score in ADDITIVE and not torch.compiler.is_compiling() else None


def _reduced(inputs: Inputs, gain: Tensor | None, score: str) -> Inputs:
    """Reduce "general" to the dot score and "normed_additive" to the additive one."""
    if score == "general":
        return inputs._replace(query=inputs.query @ inputs.weight, weight=None)
    if score == "normed_additive":
        weight, acc = inputs.weight, accumulate_dtype(inputs.weight.dtype)
        return inputs._replace(weight=(gain.to(acc) * F.normalize(weight.to(acc), dim=0)).to(weight.dtype))
    return inputs


def _call(inputs: Inputs, need_weights: bool) -> AttentionCall:
    query, compiling = inputs.query, torch.compiler.is_compiling()
    requires_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.differentiable())
    return AttentionCall(
        score="dot" if inputs.weight is None else "additive",
        device=query.device.type,
        dtype=query.dtype,
        need_weights=need_weights,
        requires_grad=requires_grad,
        padded=inputs.lengths is not None or inputs.mask is not None,
        prepared=inputs.prepared is not None,
        batch=None if compiling else query.shape[0],
        steps=None if compiling else query.shape[1],
        positions=None if compiling else inputs.keys.shape[1],
        compiling=compiling,
        device_index=query.device.index,
        size=query.shape[2],
        coverage=inputs.coverage is not None,
    )


def _check_score(score: str, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None) -> None:
    if score not in SCORES:
        raise ValueError(f"attention: unknown score {score!r}; choose one of {', '.join(map(repr, SCORES))}")
    for name, tensor in (("weight", weight), ("bias", bias), ("gain", gain)):
        if tensor is not None and name not in SCORES[score]:
            raise ValueError(f"attention: score {score!r} has no use for {name}; leave it out or choose another score")
        if tensor is None and name in SCORES[score] and name != "bias":
            raise ValueError(f"attention: score {score!r} needs {name}")


def _check_coverage(score: str, coverage: Tensor | None, weight: Tensor | None) -> None:
    if (coverage is None) != (weight is None):
        raise ValueError("attention: coverage and coverage_weight belong together; pass both or neither")
    if coverage is not None and score not in ADDITIVE:
        raise ValueError(f"attention: score {score!r} has no coverage; leave it out or choose 'additive'")


def _check_tensors(inputs: Inputs, gain: Tensor | None, score: str, one_step: bool) -> None:
    query, keys, values, weight, bias, coverage, coverage_weight = inputs.differentiable()
    dtype, device = query.dtype, query.device
    named = (("keys", keys), ("values", values), ("weight", weight), ("bias", bias), ("gain", gain))
    for name, tensor in (*named, ("coverage", coverage), ("coverage_weight", coverage_weight)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"attention: query is {dtype} but {name} is {tensor.dtype}; convert one, or use autocast"
            )
        if tensor.device != device:
            raise RuntimeError(
                f"attention: query is on {device} but {name} is on {tensor.device}; move them to one device"
            )
    if not query.is_floating_point():
        raise RuntimeError(f"attention: query must be floating point, got {query.dtype}")
    query_shape, key_shape, value_shape = query.shape, keys.shape, values.shape  # size(k) takes three times as long
    if not len(query_shape) == len(key_shape) == len(value_shape) == 3:
        raise RuntimeError(
            "attention: expected query (B, T, A) or (B, A), keys (B, S, A) and values (B, S, D), "
            f"got {_shown(query, one_step)}, {tuple(key_shape)} and {tuple(value_shape)}"
        )
    B, S, A = key_shape
    if not query_shape[0] == B == value_shape[0] or value_shape[1] != S:
        raise RuntimeError(
            "attention: query, keys and values must agree on B, keys and values on S, "
            f"got query {_shown(query, one_step)}, keys {tuple(key_shape)} and values {tuple(value_shape)}"
        )
    if score == "general":
        if weight.shape != (query_shape[2], A):
            raise RuntimeError(
                f"attention: weight must be {(query_shape[2], A)} = (Q, A) for score 'general', "
                f"got {tuple(weight.shape)}"
            )
    elif query_shape[2] != A:
        raise RuntimeError(
            f"attention: query and keys must have one size A for score {score!r}, got {query_shape[2]} and {A}"
        )
    if score in ADDITIVE:
        for name, tensor in (("weight", weight), ("bias", bias), ("coverage_weight", coverage_weight)):
            if tensor is not None and tensor.shape != (A,):
                raise RuntimeError(
                    f"attention: {name} must be {(A,)} = (A,) for score {score!r}, got {tuple(tensor.shape)}"
                )
    if coverage is not None and coverage.shape != (B, query_shape[1], S):
        expected = f"{(B, S)} = (B, S)" if one_step else f"{(B, query_shape[1], S)} = (B, T, S)"
        raise RuntimeError(f"attention: coverage must be {expected}, got {_shown(coverage, one_step)}")
    if gain is not None and gain.numel() != 1:
        raise RuntimeError(f"attention: gain must hold one element, got {tuple(gain.shape)}")


def _shown(query: Tensor, one_step: bool) -> tuple[int, ...]:
    """The shape as the caller gave it: without the T that a single step lacks."""
    return tuple(query.squeeze(1).shape) if one_step else tuple(query.shape)


def _check_padding(inputs: Inputs, one_step: bool) -> Inputs:
    """The inputs with lengths (B,) or mask (B, 1 or T, S) on the device of the keys."""
    lengths, mask, keys = inputs.lengths, inputs.mask, inputs.keys
    if lengths is None and mask is None:
        return inputs
    (batch, steps), size = inputs.query.shape[:2], keys.size(1)
    if lengths is not None and mask is not None:
        raise ValueError("attention: lengths and mask were both given; pass one (a mask can express the lengths too)")
    if lengths is not None:
        lengths = as_lengths(lengths)
        if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise RuntimeError(
                f"attention: lengths must be ({batch},) integers, got {tuple(lengths.shape)} {lengths.dtype}"
            )
        if batch > 0 and readable(lengths):
            low, high = (int(x) for x in torch.aminmax(lengths))
            if low < 0 or high > size:
                raise ValueError(f"attention: lengths must lie in [0, {size}], the number of keys; got {low} to {high}")
        lengths = lengths.to(keys.device)
        return inputs if lengths is inputs.lengths else inputs._replace(lengths=lengths)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"attention: mask must be bool (True = attend), got {mask.dtype}; write e.g. mask != 0")
    if mask.device != keys.device:
        raise RuntimeError(
            f"attention: keys are on {keys.device} but mask is on {mask.device}; move them to one device"
        )
    if mask.shape == (batch, size):
        return inputs._replace(mask=mask.unsqueeze(1))
    if mask.shape != (batch, steps, size) or one_step:
        expected = f"({batch}, {size})" if one_step else f"({batch}, {size}) or ({batch}, {steps}, {size})"
        raise RuntimeError(f"attention: mask must be {expected}, got {tuple(mask.shape)}")
    return inputs
