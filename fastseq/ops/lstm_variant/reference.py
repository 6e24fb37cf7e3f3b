"""The LSTM variants in plain torch: the definition of the op, with an explicit backward.

Recurrent dropout: one mask for all steps (Gal & Ghahramani 2016, as ``recurrent_dropout`` of Keras). Zoneout: Krueger
et al. 2017. Layer normalisation: Ba et al. 2016, as in haste. All arithmetic is in float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.common import layout
from fastseq.ops.lstm_variant.spec import EPSILON, Grads, Recurrence, Result, Variant, Want

PLAIN_TORCH = True  # a compiler differentiates it by itself


def unsupported(call) -> str | None:
    """None: the reference serves every call."""
    return None


def forward(given: Recurrence, variant: Variant, want: Want) -> Result:
    """Step by step; differentiable. Saved: activations (T, B, 4H), cell and hidden states (T, B, H), in float32."""
    dtype = given.gates.dtype
    gates, h, c, *weights = _wide(given)
    rows = []
    for t in _order(gates, variant):
        h_t, c_t, activations = step(gates[t], h, c, weights, variant, t)
        row = (h_t, c_t, activations)
        if variant.lengths is not None:
            valid = (t < variant.lengths).unsqueeze(1)
            h_t, c_t = torch.where(valid, h_t, h), torch.where(valid, c_t, c)
            row = tuple(torch.where(valid, x, 0) for x in row)
        h, c = h_t, c_t
        rows.append(row)
    rows = rows[::-1] if variant.reverse else rows
    output, cell_states, activations = (torch.stack(x) for x in zip(*rows, strict=True))
    wanted = cell_states.to(dtype, copy=True) if want.cell_states else None
    saved = (activations, cell_states, output.clone()) if want.backward else ()
    return Result(output.to(dtype), h.to(dtype), c.to(dtype), wanted, saved)


def step(gates: Tensor, h: Tensor, c: Tensor, weights, variant: Variant, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step: gates (B, 4H), h and c (B, H) before it -> h, c (B, H) after it, and the activations (B, 4H).

    weights: weight_hh, norm_hh, norm_c, norm_c_bias.
    """
    weight_hh, norm_hh, norm_c, norm_c_bias = weights
    recurrent = F.linear(h if variant.hidden_mask is None else h * variant.hidden_mask, weight_hh)
    if norm_hh is not None:
        recurrent = F.layer_norm(recurrent, norm_hh.shape, norm_hh, eps=EPSILON)
    i, f, g, o = (gates + recurrent).chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_new = f * c + i * g
    inner = c_new if norm_c is None else F.layer_norm(c_new, norm_c.shape, norm_c, norm_c_bias, EPSILON)
    h_new = o * inner.tanh()
    h_t = _mix(h_new, h, variant.keep_h, variant.rate_h, t)
    c_t = _mix(c_new, c, variant.keep_c, variant.rate_c, t)
    return h_t, c_t, torch.cat((i, f, g, o), dim=1)


def backward(
    given: Recurrence, variant: Variant, saved: tuple[Tensor, ...], grads: Grads, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Backpropagation through time with explicit derivatives -> the gradients of ``Recurrence``, None if not needed."""
    activations, cell_states, hidden_states = saved
    gates, h0, c0, *weights = _wide(given)
    c_prev, h_prev = (
        layout.previous_states(states, start, variant.lengths, None, variant.reverse)
        for states, start in ((cell_states, c0), (hidden_states, h0))
    )
    operands = h_prev if variant.hidden_mask is None else h_prev * variant.hidden_mask  # (T, B, H), of weight_hh
    dh, dc = (torch.zeros_like(h0) if g is None else g.to(h0.dtype) for g in (grads.h_n, grads.c_n))
    sums = [torch.zeros_like(w) if w is not None else None for w in weights]
    grad_gates = torch.zeros_like(activations)
    for t in reversed(_order(gates, variant)):
        valid = torch.ones_like(dh[:, :1], dtype=torch.bool)
        if variant.lengths is not None:
            valid = (t < variant.lengths).unsqueeze(1)
        dh_t = dh if grads.output is None else dh + grads.output[t]
        dc_t = dc if grads.cell_states is None else dc + grads.cell_states[t]
        # After a sequence's end the new states have no gradient.
        dh_new, dh_kept = (torch.where(valid, x, 0) for x in _split(dh_t, variant.keep_h, variant.rate_h, t))
        dc_new, dc_kept = (torch.where(valid, x, 0) for x in _split(dc_t, variant.keep_c, variant.rate_c, t))
        states = (activations[t], c_prev[t], operands[t])
        da, d_operand, dc_before = _step_backward(states, dh_new, dc_new, weights, sums)
        dh_before = d_operand if variant.hidden_mask is None else d_operand * variant.hidden_mask
        grad_gates[t] = da
        dh, dc = torch.where(valid, dh_before + dh_kept, dh), torch.where(valid, dc_before + dc_kept, dc)
    every = (grad_gates, dh, dc, *sums)
    return tuple(g.to(given.gates.dtype) if need else None for g, need in zip(every, needs, strict=True))


def _step_backward(states, dh: Tensor, dc: Tensor, weights, sums) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of gates (B, 4H), operands of weight_hh (B, H), and c before the step; sums the weights'.

    states: activations (B, 4H), c and the operands of weight_hh (B, H) before the step. dh, dc: of the new h and c.
    """
    (activations, c, operand), (weight_hh, norm_hh, norm_c, norm_c_bias) = states, weights
    i, f, g, o = activations.chunk(4, dim=1)
    normal, scale = (f * c + i * g, None) if norm_c is None else _normalise(f * c + i * g)
    tanh_c = (normal if norm_c is None else normal * norm_c + norm_c_bias).tanh()
    d_inner = dh * o * (1 - tanh_c) * (1 + tanh_c)
    if norm_c is not None:
        sums[2] += (d_inner * normal).sum(0)
        sums[3] += d_inner.sum(0)
        d_inner = _normalise_backward(d_inner * norm_c, normal, scale)
    dc = dc + d_inner
    di, df, dg = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g) * (1 + g)
    d_gates = d_product = torch.cat((di, df, dg, dh * tanh_c * o * (1 - o)), dim=1)
    if norm_hh is not None:
        normal, scale = _normalise(F.linear(operand, weight_hh))
        sums[1] += (d_gates * normal).sum(0)
        d_product = _normalise_backward(d_gates * norm_hh, normal, scale)
    sums[0] += d_product.t() @ operand
    return d_gates, d_product @ weight_hh, dc * f


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, X) -> zero mean and unit variance over X, and 1 / deviation (B, 1)."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return centred * scale, scale


def _normalise_backward(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    """The gradient (B, X) of the input of :func:`_normalise`, from that of its result."""
    along = (grad * normal).mean(-1, keepdim=True)
    return scale * (grad - grad.mean(-1, keepdim=True) - normal * along)


def _mix(new: Tensor, old: Tensor, keep: Tensor | None, rate: float, t: int) -> Tensor:
    """Zoneout of a state (B, H)."""
    if keep is not None:
        return torch.where(keep[t], old, new)
    return rate * old + (1 - rate) * new if rate else new


def _split(grad: Tensor, keep: Tensor | None, rate: float, t: int) -> tuple[Tensor, Tensor]:
    """The parts of a state's gradient (B, H) that reach its new and its old value."""
    if keep is not None:
        return torch.where(keep[t], 0, grad), torch.where(keep[t], grad, 0)
    return (1 - rate) * grad, rate * grad


def _order(gates: Tensor, variant: Variant) -> range:
    steps = range(gates.size(0))
    return steps[::-1] if variant.reverse else steps


def _wide(given: Recurrence) -> list:
    """The inputs in float32 at least."""
    wide = torch.promote_types(given.gates.dtype, torch.float32)
    return [t if t is None else t.to(wide) for t in given]
