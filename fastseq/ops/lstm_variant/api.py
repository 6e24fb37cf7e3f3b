"""The public op of the LSTM variants: recurrent dropout, zoneout and layer normalisation."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import implementation, select
from fastseq.ops.common.autocast import cast_inputs, cast_weights, casts, without_autocast
from fastseq.ops.common.autograd import forward_mode, is_compiling
from fastseq.ops.common.checks import check_lengths
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import zero_padding
from fastseq.ops.lstm_variant.function import apply
from fastseq.ops.lstm_variant.spec import EPSILON, LSTMVariantCall, Recurrence, Variant

__all__ = ["EPSILON", "lstm_variant"]


def lstm_variant(
    gates: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_hh: Tensor,
    *,
    hidden_mask: Tensor | None = None,
    zoneout_hidden: Tensor | float = 0.0,
    zoneout_cell: Tensor | float = 0.0,
    norms: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    backend: str | None = None,
):
    """The recurrence of one LSTM layer and direction with recurrent dropout, zoneout or layer normalisation.

    Per step, with ``LN(x)`` of zero mean and unit variance over its row and ``*`` element by element::

        i, f, g, o = gates_t + W_hh (h_{t-1} * hidden_mask)                        or with norms
        i, f, g, o = gates_t + LN(W_hh (h_{t-1} * hidden_mask)) * norm_hh
        c' = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(c')          or with norms          sigmoid(o) tanh(LN(c') * norm_c + norm_c_bias)
        c_t = zoneout_cell * c_{t-1} + (1 - zoneout_cell) * c'                     h_t likewise

    Recurrent dropout: Gal & Ghahramani 2016. Zoneout: Krueger et al. 2017. Layer normalisation: Ba et al. 2016.
    Differentiable twice in every floating-point tensor but the masks.

    Args:
        gates: (T, B, 4H), the input's part of the pre-activations, biases included; order i, f, g, o.
        hx: h0 and c0, (B, H).
        weight_hh: (4H, H).
        hidden_mask: (B, H), the same for all steps: 0, or 1 / (1 - p).
        zoneout_hidden, zoneout_cell: bool (T, B, H), True where a state keeps its value; or the rate in 0..1, whose
            expectation is used, as at evaluation.
        norms: norm_hh (4H,), norm_c (H,) and norm_c_bias (H,).
        lengths: (B,) integers in 0..T on any device, as in :func:`fastseq.ops.lstm`.
        reverse: run from the last step to the first.
        return_cell_states: also return the cell state after every step.
        backend: "auto" (None), "reference", "native" (CPU) or "triton" (GPU).

    Returns:
        output (T, B, H), (h_n (B, H), c_n (B, H)), and with ``return_cell_states`` cell states (T, B, H); output and
        cell states are 0 past the length. In the dtype of the gates; under autocast, in autocast's.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; or the requested backend cannot serve this call.
        ValueError: unknown backend name; lengths or a rate out of range.
    """
    given = Recurrence(gates, *hx, weight_hh, *(norms or ()))
    keep_h, rate_h = _zoneout("zoneout_hidden", zoneout_hidden)
    keep_c, rate_c = _zoneout("zoneout_cell", zoneout_cell)
    _check(given, {"hidden_mask": hidden_mask}, {"zoneout_hidden": keep_h, "zoneout_cell": keep_c})
    if lengths is not None:
        lengths = check_lengths(lengths, gates.size(0), gates.size(1), gates.device)
    hidden_mask = None if hidden_mask is None else hidden_mask.to(accumulate_dtype(gates.dtype))
    given = _cast(given)
    variant = Variant(hidden_mask, keep_h, keep_c, rate_h, rate_c, lengths, reverse)
    chosen = select("lstm_variant", backend, _describe(given, variant, return_cell_states))
    if lengths is not None and not getattr(implementation("lstm_variant", chosen), "SKIPS_PADDING", False):
        given = given._replace(gates=zero_padding(given.gates, lengths))  # NaN in the padding must reach no gradient
    with without_autocast(gates.device.type):
        output, h_n, c_n, cells = apply(chosen, given, variant, return_cell_states)
    return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))


def _zoneout(name: str, zoneout: Tensor | float) -> tuple[Tensor | None, float]:
    """-> mask or None, rate."""
    if isinstance(zoneout, Tensor):
        return zoneout, 0.0
    if not 0 <= zoneout <= 1:
        raise ValueError(f"lstm_variant: {name} must be a rate in 0..1 or a mask, got {zoneout}")
    return None, float(zoneout)


def _cast(given: Recurrence) -> Recurrence:
    """Under autocast: all inputs in autocast's dtype."""
    if not casts(given.weight_hh) and not casts(given.gates):
        return given
    gates, h0, c0, weight_hh, *norms = given
    gates, h0, c0, *norms = cast_inputs(gates, h0, c0, *norms)
    return Recurrence(gates, h0, c0, *cast_weights(gates.dtype, weight_hh), *norms)


def _describe(given: Recurrence, variant: Variant, cell_states: bool) -> LSTMVariantCall:
    """The record by which rules and backends judge the call."""
    compiling, gates = is_compiling(), given.gates
    return LSTMVariantCall(
        device=_native.device_of(gates),
        dtype=gates.dtype,
        hidden_size=given.c0.size(1),
        recurrent_dropout=variant.hidden_mask is not None,
        zoneout=variant.keep_h is not None or variant.keep_c is not None or variant.rate_h + variant.rate_c > 0,
        layer_norm=given.norm_hh is not None,
        lengths=variant.lengths is not None,
        reverse=variant.reverse,
        return_cell_states=cell_states,
        requires_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given),
        batch=None if compiling else gates.size(1),
        steps=None if compiling else gates.size(0),
        compiling=compiling,
        forward_mode=forward_mode(),
        device_index=gates.device.index,
    )


def _check(given: Recurrence, factors: dict[str, Tensor | None], masks: dict[str, Tensor | None]) -> None:
    gates = given.gates
    if gates.dim() != 3 or gates.size(2) % 4 or not gates.is_floating_point():
        raise RuntimeError(
            f"lstm_variant: gates must be floating point of shape (T, B, 4H), got {gates.dtype} {tuple(gates.shape)}"
        )
    steps, batch, hidden = gates.size(0), gates.size(1), gates.size(2) // 4
    if steps == 0:
        raise RuntimeError("lstm_variant: expected at least one time step, got none")
    state, vector = (batch, hidden), (hidden,)
    shapes = (state, state, (4 * hidden, hidden), (4 * hidden,), vector, vector)
    named = dict(zip(Recurrence._fields[1:], zip(given[1:], shapes, strict=True), strict=True))
    per_step = {name: (t, (steps, *state)) for name, t in masks.items()}
    for name, (tensor, shape) in (named | {name: (t, state) for name, t in factors.items()} | per_step).items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"lstm_variant: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != gates.device:
            raise RuntimeError(
                f"lstm_variant: {name} is on {tensor.device}, gates are on {gates.device}; move them to one device"
            )
        if name in named and tensor.dtype != gates.dtype and not casts(tensor) and not casts(gates):
            raise RuntimeError(
                f"lstm_variant: {name} is {tensor.dtype}, gates are {gates.dtype}; convert one of them with .to()"
            )
        if name in masks and tensor.dtype != torch.bool:
            raise RuntimeError(f"lstm_variant: {name} must be a bool mask or a rate, got {tensor.dtype}")
