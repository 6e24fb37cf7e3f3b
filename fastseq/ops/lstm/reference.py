"""One LSTM layer and direction in plain torch: the definition of the op, with an explicit backward.

Shapes as in ``spec.Layer`` with D = 1; states are (B, P) and (B, H) here. Gate order i, f, g, o. All arithmetic is in
float32 at least.
"""

import torch
import torch.nn.functional as F

from fastseq.ops.common import layout
from fastseq.ops.lstm.spec import LayerGrads, Result, Weights

SINGLE_DIRECTION = True  # see directions.py
PLAIN_TORCH = True  # a compiler differentiates it by itself


def unsupported(call) -> str | None:
    """None: the reference serves every call."""
    return None


def forward(layer, want) -> Result:
    """Step by step; differentiable. Saved, in float32 at least: activations (T, B, 4H) or (N, 4H), and cell states."""
    dtype = layer.input.dtype
    input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = _wide(layer)
    lengths = layer.lengths
    if layer.batch_sizes is not None:
        input, lengths = layout.pad(input, layer.batch_sizes)
    steps = input.size(0)
    gates_x = F.linear(input, weight_ih, bias_ih)  # (T, B, 4H)
    rows = []
    for t in reversed(range(steps)) if layer.reverse else range(steps):
        i, f, g, o = (gates_x[t] + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c + i * g
        h_t = o * c_t.tanh()
        if weight_hr is not None:
            h_t = F.linear(h_t, weight_hr)
        row = (h_t, c_t, torch.cat((i, f, g, o), dim=1))
        if lengths is None:
            h, c = h_t, c_t
        else:
            valid = (t < lengths).unsqueeze(1)
            h, c = torch.where(valid, h_t, h), torch.where(valid, c_t, c)
            row = tuple(torch.where(valid, x, 0) for x in row)
        rows.append(row)
    rows = rows[::-1] if layer.reverse else rows
    output, cell_states, activations = (torch.stack(x) for x in zip(*rows, strict=True))
    if layer.batch_sizes is not None:
        output, cell_states, activations = (
            layout.pack(x, layer.batch_sizes) for x in (output, cell_states, activations)
        )
    wanted = cell_states.to(dtype, copy=True) if want.cell_states else None  # backward reads the saved ones
    return Result(output.to(dtype), h.to(dtype)[None], c.to(dtype)[None], wanted, (activations, cell_states))


def backward(layer, saved, grads, needs) -> LayerGrads:
    """Backpropagation through time (Werbos 1990) with explicit derivatives of the cell."""
    activations, cell_states = saved
    input, h0, c0, weight_ih, weight_hh, _, _, weight_hr = _wide(layer)
    lengths, batch_sizes = layer.lengths, layer.batch_sizes
    hidden = activations[..., -c0.size(1) :] * cell_states.tanh()  # o tanh(c)
    output = hidden if weight_hr is None else F.linear(hidden, weight_hr)
    c_prev = layout.previous_states(cell_states, c0, lengths, batch_sizes, layer.reverse)
    h_prev = layout.previous_states(output, h0, lengths, batch_sizes, layer.reverse)
    steps = (activations, cell_states, c_prev, grads.output, grads.cell_states)
    if batch_sizes is not None:
        lengths = layout.lengths_of(batch_sizes).to(input.device)
        steps = tuple(x if x is None else layout.pad(x, batch_sizes)[0] for x in steps)
    dh, dc = (g if g is None else g[0].to(c0.dtype) for g in (grads.h_n, grads.c_n))
    start = (torch.zeros_like(h0) if dh is None else dh, torch.zeros_like(c0) if dc is None else dc)
    grad_gates, grad_projected, grad_h0, grad_c0 = _through_time(
        steps, start, (weight_hh, weight_hr), lengths, layer.reverse
    )
    if batch_sizes is not None:
        grad_gates, grad_projected = (layout.pack(x, batch_sizes) for x in (grad_gates, grad_projected))
    flat = grad_gates.flatten(0, -2)  # (T * B, 4H)
    grad_bias = flat.sum(0)
    grad_weight_hr = None
    if weight_hr is not None:
        grad_weight_hr = grad_projected.flatten(0, -2).t() @ hidden.flatten(0, -2)
    weights = Weights(
        flat.t() @ input.flatten(0, -2), flat.t() @ h_prev.flatten(0, -2), grad_bias, grad_bias, grad_weight_hr
    )
    every = (grad_gates @ weight_ih, grad_h0[None], grad_c0[None], *weights)
    wanted = (needs.input, needs.h0, needs.c0, *needs.weights[0])
    result = [g.to(layer.input.dtype) if need else None for g, need in zip(every, wanted, strict=True)]
    return LayerGrads(*result[:3], (Weights(*result[3:]),))


def _wide(layer) -> list:
    """input, h0 (B, P), c0 (B, H) and the five weights, in float32 at least."""
    wide = torch.promote_types(layer.input.dtype, torch.float32)
    (weights,) = layer.weights
    return [t if t is None else t.to(wide) for t in (layer.input, layer.h0[0], layer.c0[0], *weights)]


def _through_time(steps, start, weights, lengths, reverse: bool):
    """-> grad_gates (T, B, 4H), grad_projected (T, B, P): dL/dh_t, grad_h0 (B, P), grad_c0 (B, H).

    steps: activations, cell states after and before each step, gradients of output and cell states. start: dh, dc after
    the last step.
    """
    activations, cell_states, c_prev, grad_output, grad_cell_states = steps
    (dh, dc), (weight_hh, weight_hr) = start, weights
    grad_gates, grad_projected = torch.empty_like(activations), cell_states.new_empty(len(cell_states), *dh.shape)
    for t in range(len(cell_states)) if reverse else reversed(range(len(cell_states))):
        valid = torch.ones_like(dh[:, :1], dtype=torch.bool) if lengths is None else (t < lengths).unsqueeze(1)
        dh_t = dh if grad_output is None else dh + grad_output[t]
        dc_t = dc if grad_cell_states is None else dc + grad_cell_states[t]
        grad_projected[t] = dh_t  # past the length it meets a cell state of 0
        dm = dh_t if weight_hr is None else dh_t @ weight_hr  # at o * tanh(c)
        i, f, g, o = activations[t].chunk(4, dim=1)
        tanh_c = cell_states[t].tanh()
        dc_t = dc_t + dm * o * (1 - tanh_c * tanh_c)
        di = dc_t * g * i * (1 - i)
        df = dc_t * c_prev[t] * f * (1 - f)
        dg = dc_t * i * (1 - g * g)
        do = dm * tanh_c * o * (1 - o)
        grad_gates[t] = torch.where(valid, torch.cat((di, df, dg, do), dim=1), 0)
        dh, dc = torch.where(valid, grad_gates[t] @ weight_hh, dh), torch.where(valid, dc_t * f, dc)
    return grad_gates, grad_projected, dh, dc
