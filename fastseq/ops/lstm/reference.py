"""One LSTM layer and direction in plain torch: the definition of right, and its backward by hand.

Shapes: input (T, B, I) or packed (N, I); h0 (B, P); c0 (B, H); weight_ih (4H, I); weight_hh (4H, P); biases (4H,);
weight_hr (P, H) or None, and then P = H. Gate order i, f, g, o. Everything is computed in float32 at least.
"""

import torch
import torch.nn.functional as F

from fastseq.ops.common import layout


def unsupported(call) -> str | None:
    return None


def forward(
    input,
    h0,
    c0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    weight_hr,
    lengths,
    batch_sizes,
    reverse,
    need_backward,
    need_cell_states,
):
    """-> output (T, B, P), h_n (B, P), c_n (B, H), cell_states (T, B, H) or None, saved. Differentiable."""
    dtype = input.dtype
    acc = torch.promote_types(dtype, torch.float32)
    input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = (
        t if t is None else t.to(acc) for t in (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    )
    if batch_sizes is not None:
        input, lengths = layout.pad(input, batch_sizes)
    steps = input.size(0)
    gates_x = F.linear(input, weight_ih, bias_ih)  # (T, B, 4H)
    rows = []
    for t in reversed(range(steps)) if reverse else range(steps):
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
    rows = rows[::-1] if reverse else rows
    output, cell_states, activations = (torch.stack(x) for x in zip(*rows, strict=True))
    if batch_sizes is not None:
        output, cell_states, activations = (layout.pack(x, batch_sizes) for x in (output, cell_states, activations))
    wanted_states = cell_states.to(dtype, copy=True) if need_cell_states else None  # saved ones stay the op's own
    return output.to(dtype), h.to(dtype), c.to(dtype), wanted_states, (activations, cell_states)


def backward(
    grad_output, grad_h_n, grad_c_n, grad_cell_states, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
    saved, lengths, batch_sizes, reverse, needs,
):  # fmt: skip
    """Backpropagation through time. Gradients may come in as None; those not in ``needs`` (8 bools) go out as None."""
    activations, cell_states = saved
    inputs = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    acc = cell_states.dtype
    input, h0, c0, weight_ih, weight_hh, weight_hr = (
        t if t is None else t.to(acc) for t in (input, h0, c0, weight_ih, weight_hh, weight_hr)
    )
    hidden = activations[..., -c0.size(1) :] * cell_states.tanh()  # o tanh(c)
    output = hidden if weight_hr is None else F.linear(hidden, weight_hr)
    c_prev = layout.previous_states(cell_states, c0, lengths, batch_sizes, reverse)
    h_prev = layout.previous_states(output, h0, lengths, batch_sizes, reverse)
    steps = (activations, cell_states, c_prev, grad_output, grad_cell_states)
    if batch_sizes is not None:
        lengths = layout.lengths_of(batch_sizes).to(input.device)
        steps = tuple(x if x is None else layout.pad(x, batch_sizes)[0] for x in steps)
    grad_gates, grad_projected, grad_h0, grad_c0 = _through_time(
        *steps, grad_h_n, grad_c_n, weight_hh, weight_hr, lengths, reverse
    )
    if batch_sizes is not None:
        grad_gates, grad_projected = (layout.pack(x, batch_sizes) for x in (grad_gates, grad_projected))
    flat = grad_gates.flatten(0, -2)  # (T * B, 4H)
    grad_bias = flat.sum(0)
    grad_weight_hr = None
    if weight_hr is not None:
        grad_weight_hr = grad_projected.flatten(0, -2).t() @ hidden.flatten(0, -2)
    grads = (
        grad_gates @ weight_ih, grad_h0, grad_c0, flat.t() @ input.flatten(0, -2), flat.t() @ h_prev.flatten(0, -2),
        grad_bias, grad_bias, grad_weight_hr,
    )  # fmt: skip
    return tuple(g.to(x.dtype) if need else None for g, x, need in zip(grads, inputs, needs, strict=True))


def _through_time(
    activations,
    cell_states,
    c_prev,
    grad_output,
    grad_cell_states,
    grad_h_n,
    grad_c_n,
    weight_hh,
    weight_hr,
    lengths,
    reverse,
):
    """-> grad_gates (T, B, 4H), grad_projected (T, B, P): the gradient at h_t, grad_h0 (B, P), grad_c0 (B, H)."""
    steps, batch, hidden = cell_states.shape
    dh = cell_states.new_zeros(batch, weight_hh.size(1)) if grad_h_n is None else grad_h_n.to(cell_states.dtype)
    dc = cell_states.new_zeros(batch, hidden) if grad_c_n is None else grad_c_n.to(cell_states.dtype)
    grad_gates, grad_projected = torch.empty_like(activations), cell_states.new_empty(steps, *dh.shape)
    for t in range(steps) if reverse else reversed(range(steps)):
        valid = torch.ones_like(dh[:, :1], dtype=torch.bool) if lengths is None else (t < lengths).unsqueeze(1)
        dh_t = dh if grad_output is None else dh + grad_output[t]
        dc_t = dc if grad_cell_states is None else dc + grad_cell_states[t]
        grad_projected[t] = dh_t  # past the length it meets a cell state of 0
        dm = dh_t if weight_hr is None else dh_t @ weight_hr  # at o * tanh(c)
        i, f, g, o = activations[t].chunk(4, dim=1)
        tanh_c = cell_states[t].tanh()
        dc_t = dc_t + dm * o * (1 - tanh_c * tanh_c)
        di, df, dg, do = (
            dc_t * g * i * (1 - i),
            dc_t * c_prev[t] * f * (1 - f),
            dc_t * i * (1 - g * g),
            dm * tanh_c * o * (1 - o),
        )
        grad_gates[t] = torch.where(valid, torch.cat((di, df, dg, do), dim=1), 0)
        dh, dc = torch.where(valid, grad_gates[t] @ weight_hh, dh), torch.where(valid, dc_t * f, dc)
    return grad_gates, grad_projected, dh, dc
