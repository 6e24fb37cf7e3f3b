"""The public attention op."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastseq import _native
from fastseq.dispatch import implementation, select, takes_auto
from fastseq.ops.attention.function import apply
from fastseq.ops.attention.reference import wide_dtype
from fastseq.ops.attention.spec import AttentionCall
from fastseq.ops.common.autocast import autocast_enabled, cast_inputs

SCORES = {  # and the parameters that each takes
    "dot": (),
    "general": ("weight",),
    "additive": ("weight", "bias"),
    "normed_additive": ("weight", "bias", "gain"),
}


class PreparedKeys(NamedTuple):
    """What the additive scores compute of the keys alone, for the many steps of a decoder: see :func:`prepare_keys`."""

    keys: Tensor  # (B, S, A) that it was computed of
    version: int  # of these keys then
    dtype: torch.dtype  # they were cast to by autocast
    data: Tensor  # (B, S, ...) for the backend


def prepare_keys(
    keys: Tensor, *, score: str, lengths: Tensor | None = None, backend: str | None = None
) -> PreparedKeys | None:
    """Compute once what many calls of :func:`attention` with the same keys, one query step each, would compute again.

    It takes about as long as three such calls save, and as much memory as the keys in float32. Gradients flow to the
    keys as without it. It holds for the keys as they are now: changed in place afterwards they are refused, except
    for what torch itself does not see (writes through ``.data``, changes of inference tensors).

    Args:
        keys: (B, S, A).
        score: of the calls to come.
        lengths: (B,) of the calls to come; without them padding that holds NaN or large numbers costs the gain.
        backend: of the calls to come.

    Returns:
        What to pass as ``prepared``; None where it would save nothing: another score, another backend, a GPU, a traced
        graph.
    """
    if score not in ("additive", "normed_additive") or torch.compiler.is_compiling() or keys.dim() != 3:
        return None
    (cast,) = cast_inputs(keys)
    call = AttentionCall("additive", cast.device.type, cast.dtype, prepared=True, batch=keys.size(0), steps=1)
    call = call._replace(positions=keys.size(1), padded=lengths is not None, device_index=keys.device.index)
    if select("attention", backend, call) != "native":
        return None
    data = implementation("attention", "native").prepare(cast, lengths)
    return PreparedKeys(keys, _version(keys), cast.dtype, data) if data.numel() else None


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def attention(
    query: Tensor,
    keys: Tensor,
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
    prepared: PreparedKeys | None = None,
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

    Scores, softmax and sums are computed in float32 at least. Under autocast all inputs are cast to its dtype, as for
    a matmul. A query step that may attend to nothing (length 0, or a mask row of False) gets weights 0, context 0 and
    gradient 0. Keys and values at positions that no step of their sentence attends to may hold anything, NaN and inf
    too: it reaches no output and no gradient. Where a (B, T, S) mask hides a position from some steps only, that
    position must be finite.

    Args:
        query: (B, T, A), or (B, A) for a single step. For "general" (B, T, Q) or (B, Q).
        keys: (B, S, A).
        values: (B, S, D); default: the keys.
        score: see the table.
        weight: W (Q, A) for "general"; v (A,) for the additive scores; none for "dot".
        bias: b (A,), additive scores only.
        gain: g, a tensor of one element, required by "normed_additive" and by no other score.
        scale: default 1.0 (scaled dot products of Vaswani et al. 2017: ``A ** -0.5``).
        lengths: (B,) integers on any device: sentence b attends to its first ``lengths[b]`` positions. Values on the
            CPU are checked; on an accelerator, and while a graph is traced, they are not read: there they act as if
            clamped to [0, S].
        mask: bool, True = attend: (B, S), or (B, T, S) for a query of T steps. Not together with ``lengths``.
        need_weights: also return the weights; without it a backend need not hold them.
        prepared: what :func:`prepare_keys` returned for these very keys.
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        context (B, T, D), and weights (B, T, S) or None, both in the dtype of the query; without the T for a query
        (B, A).

    Raises:
        ValueError: unknown score or backend; an input that the score has no use for, or lacks; both lengths and mask;
            lengths outside [0, S]; ``prepared`` of other keys, or of keys that were changed since.
        RuntimeError: shapes, dtypes or devices that do not fit; a backend asked for by name that cannot serve this
            call.
    """
    values = keys if values is None else values
    others_given = need_weights or not (weight is bias is gain is lengths is mask is prepared is None)
    if score == "dot" and not others_given and takes_auto(backend) and _plain(query, keys, values):
        scale = 1.0 if scale is None else float(scale)
        run = implementation("attention", "native").forward
        return run(query, keys, values, None, None, None, None, score, scale, False, False)[0], None
    _check_score(score, weight, bias, gain)
    _check_prepared(prepared, keys)
    query, keys, values, weight, bias, gain = cast_inputs(query, keys, values, weight, bias, gain)
    one_step = query.dim() == 2
    if one_step:
        query = query.unsqueeze(1)
    _check_tensors(query, keys, values, weight, bias, gain, score, one_step)
    lengths, mask = _check_padding(lengths, mask, query, keys, one_step)
    if score == "general":
        query = query @ weight
        score, weight = "dot", None
    elif score == "normed_additive":
        acc = wide_dtype(weight.dtype)
        weight = (gain.to(acc) * F.normalize(weight.to(acc), dim=0)).to(weight.dtype)
        score = "additive"
    inputs, compiling = (query, keys, values, weight, bias), torch.compiler.is_compiling()
    call = AttentionCall(
        score=score,
        device=query.device.type,
        dtype=query.dtype,
        need_weights=need_weights,
        requires_grad=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs),
        padded=lengths is not None or mask is not None,
        prepared=prepared is not None and prepared.dtype == query.dtype,
        batch=None if compiling else query.shape[0],
        steps=None if compiling else query.shape[1],
        positions=None if compiling else keys.shape[1],
        compiling=compiling,
        device_index=query.device.index,
    )
    chosen = select("attention", backend, call)
    scale = 1.0 if scale is None else float(scale)
    ready = (prepared.data,) if chosen == "native" and call.prepared else ()
    context, weights = apply(chosen, score, scale, need_weights, *inputs, lengths, mask, *ready)
    if one_step:
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    return context, weights


def _plain(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether nothing needs to be asked: float32 on the CPU, no gradient, no autocast, no trace, and shapes that fit.

    RULES give such a call to native. A step of 32 sentences takes 130 us; to check, describe and choose takes 20 more.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    query_shape, key_shape, value_shape = query.shape, keys.shape, values.shape
    return (
        len(query_shape) == len(key_shape) == len(value_shape) == 3
        and query_shape[0] == key_shape[0] == value_shape[0]
        and query_shape[2] == key_shape[2]
        and key_shape[1] == value_shape[1]
        and query.dtype == keys.dtype == values.dtype == torch.float32
        and query.is_cpu
        and keys.is_cpu
        and values.is_cpu
        and not autocast_enabled("cpu")
        and _native.available()
    )


def _check_score(score: str, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None) -> None:
    if score not in SCORES:
        raise ValueError(f"attention: unknown score {score!r}; choose one of {', '.join(map(repr, SCORES))}")
    for name, tensor in (("weight", weight), ("bias", bias), ("gain", gain)):
        if tensor is not None and name not in SCORES[score]:
            raise ValueError(f"attention: score {score!r} has no use for {name}; leave it out or choose another score")
        if tensor is None and name in SCORES[score] and name != "bias":
            raise ValueError(f"attention: score {score!r} needs {name}")


def _check_prepared(prepared: PreparedKeys | None, keys: Tensor) -> None:
    if prepared is None:
        return
    if prepared.keys is not keys:
        raise ValueError("attention: prepared was made of another tensor of keys; prepare these, or leave it out")
    if prepared.version != _version(keys):
        raise ValueError("attention: the keys were changed in place after they were prepared; prepare them again")


def _check_tensors(query, keys, values, weight, bias, gain, score: str, one_step: bool) -> None:
    dtype, device = query.dtype, query.device
    for name, tensor in (("keys", keys), ("values", values), ("weight", weight), ("bias", bias), ("gain", gain)):
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
    if score in ("additive", "normed_additive"):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.shape != (A,):
                raise RuntimeError(
                    f"attention: {name} must be {(A,)} = (A,) for score {score!r}, got {tuple(tensor.shape)}"
                )
    if gain is not None and gain.numel() != 1:
        raise RuntimeError(f"attention: gain must hold one element, got {tuple(gain.shape)}")


def _shown(query: Tensor, one_step: bool) -> tuple[int, ...]:
    """The shape that the caller gave it."""
    return tuple(query.squeeze(1).shape) if one_step else tuple(query.shape)


def _check_padding(
    lengths: Tensor | None, mask: Tensor | None, query: Tensor, keys: Tensor, one_step: bool
) -> tuple[Tensor | None, Tensor | None]:
    """-> lengths (B,) or mask (B, 1 or T, S) on the device of the keys."""
    if lengths is None and mask is None:
        return None, None
    batch, steps, size = query.size(0), query.size(1), keys.size(1)
    if lengths is not None and mask is not None:
        raise ValueError("attention: lengths and mask were both given; pass one (a mask can express the lengths too)")
    if lengths is not None:
        if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise RuntimeError(
                f"attention: lengths must be ({batch},) integers, got {tuple(lengths.shape)} {lengths.dtype}"
            )
        if lengths.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
            low, high = (int(x) for x in torch.aminmax(lengths))
            if low < 0 or high > size:
                raise ValueError(f"attention: lengths must lie in [0, {size}], the number of keys; got {low} to {high}")
        return lengths.to(keys.device), None
    if mask.dtype != torch.bool:
        raise RuntimeError(f"attention: mask must be bool (True = attend), got {mask.dtype}; write e.g. mask != 0")
    if mask.device != keys.device:
        raise RuntimeError(
            f"attention: keys are on {keys.device} but mask is on {mask.device}; move them to one device"
        )
    if mask.shape == (batch, size):
        return None, mask.unsqueeze(1)
    if mask.shape != (batch, steps, size) or one_step:
        expected = f"({batch}, {size})" if one_step else f"({batch}, {size}) or ({batch}, {steps}, {size})"
        raise RuntimeError(f"attention: mask must be {expected}, got {tuple(mask.shape)}")
    return None, mask
