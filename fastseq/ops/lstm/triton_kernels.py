"""Triton kernels of ``lstm``: the recurrence, without x W_ih^T and the weight gradients.

``lstm_sequence_*`` run all steps in one launch and hold W_hh (small H). ``lstm_step_*`` run one step: recurrent product
and cell. A program computes BLOCK_B sequences; in ``lstm_step_*`` also BLOCK_H hidden units, all four gates of each.
Tensors are contiguous. Results past a sequence's length are 0.
"""

import triton
import triton.language as tl

from fastseq.ops.common.triton.math import cell_backward, cell_forward


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_or_zero(pointer, at, mask):
    """Load a tile of an optional tensor; zeros if it is None."""
    if pointer is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return _load(pointer, at, mask)


@triton.jit
def _load_gates(pointer, at, mask, H: tl.constexpr):
    return (
        _load(pointer, at, mask),
        _load(pointer, at + H, mask),
        _load(pointer, at + 2 * H, mask),
        _load(pointer, at + 3 * H, mask),
    )


@triton.jit
def _store(pointer, at, value, mask):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _store_gates(pointer, at, i, f, g, o, mask, H: tl.constexpr):
    _store(pointer, at, i, mask)
    _store(pointer, at + H, f, mask)
    _store(pointer, at + 2 * H, g, mask)
    _store(pointer, at + 3 * H, o, mask)


@triton.jit
def _length(lengths, rows, T, B):
    """Return the length of each row: ``lengths``, or T if it is None."""
    if lengths is None:
        return tl.zeros(rows.shape, tl.int64) + T
    else:
        return tl.load(lengths + rows, mask=rows < B, other=0)


@triton.jit
def _row(n, H: tl.constexpr):
    """Widen row indices of W_hh if needed: 4 H^2 exceeds 2^31 from H = 23171 on. 32-bit indices save registers."""
    if H > 23170:
        return n.to(tl.int64)
    else:
        return n


@triton.jit
def _gate_weights(weight_hh, gate: tl.constexpr, outputs, inputs, H: tl.constexpr):
    """Load a tile of W_hh of one gate: rows ``outputs`` (units of the gate), columns ``inputs`` (units of h)."""
    at = (gate * H + _row(outputs, H)[:, None]) * H + inputs[None, :]
    return tl.load(weight_hh + at, mask=(outputs[:, None] < H) & (inputs[None, :] < H), other=0.0)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_sequence_forward_kernel(
    gates,  # (T, B, 4H) x W_ih^T + b_ih + b_hh
    h0,  # (B, H)
    c0,  # (B, H)
    weight_hh,  # (4H, H)
    lengths,  # (B,) int64, or None
    output,  # (T, B, H) out
    h_n,  # (B, H) out
    c_n,  # (B, H) out
    activations,  # (T, B, 4H) float32 out, or None
    cell_states,  # (T, B, H) float32 out, or None
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    B = B.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows, unit = row[:, None], tl.arange(0, BLOCK_H)
    units = unit[None, :]
    inside = (rows < B) & (units < H)
    length = _length(lengths, row, T, B)[:, None]
    weight_i = _gate_weights(weight_hh, 0, unit, unit, H).T
    weight_f = _gate_weights(weight_hh, 1, unit, unit, H).T
    weight_g = _gate_weights(weight_hh, 2, unit, unit, H).T
    weight_o = _gate_weights(weight_hh, 3, unit, unit, H).T
    h = tl.load(h0 + rows * H + units, mask=inside, other=0.0)
    c = _load(c0, rows * H + units, inside)
    for step in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - step if REVERSE else step
        at = t * B + rows
        valid = t < length
        x_i, x_f, x_g, x_o = _load_gates(gates, at * (4 * H) + units, inside & valid, H)
        i = tl.dot(h, weight_i, input_precision=PRECISION) + x_i
        f = tl.dot(h, weight_f, input_precision=PRECISION) + x_f
        g = tl.dot(h, weight_g, input_precision=PRECISION) + x_g
        o = tl.dot(h, weight_o, input_precision=PRECISION) + x_o
        i, f, g, o, c_t, h_t = cell_forward(i, f, g, o, c)
        c = tl.where(valid, c_t, c)
        h = tl.where(valid, h_t.to(h.dtype), h)
        _store(output, at * H + units, tl.where(valid, h_t, 0.0), inside)
        if cell_states is not None:
            _store(cell_states, at * H + units, tl.where(valid, c_t, 0.0), inside)
        if activations is not None:
            _store_gates(activations, at * (4 * H) + units, i, f, g, o, inside & valid, H)
    _store(h_n, rows * H + units, h, inside)
    _store(c_n, rows * H + units, c, inside)


@triton.jit(do_not_specialize=["T", "B"])
def lstm_sequence_backward_kernel(
    grad_output,  # (T, B, H), or None
    grad_h_n,  # (B, H)
    grad_c_n,  # (B, H)
    grad_cell_states,  # (T, B, H), or None
    activations,  # (T, B, 4H) float32
    cell_states,  # (T, B, H) float32
    c0,  # (B, H)
    weight_hh,  # (4H, H)
    lengths,  # (B,) int64, or None
    grad_gates,  # (T, B, 4H) out
    grad_h0,  # (B, H) out
    grad_c0,  # (B, H) out
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    B = B.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows, unit = row[:, None], tl.arange(0, BLOCK_H)
    units = unit[None, :]
    inside = (rows < B) & (units < H)
    length = _length(lengths, row, T, B)[:, None]
    weight_i = _gate_weights(weight_hh, 0, unit, unit, H)
    weight_f = _gate_weights(weight_hh, 1, unit, unit, H)
    weight_g = _gate_weights(weight_hh, 2, unit, unit, H)
    weight_o = _gate_weights(weight_hh, 3, unit, unit, H)
    dtype = weight_hh.dtype.element_ty
    dh = _load(grad_h_n, rows * H + units, inside)
    dc = _load(grad_c_n, rows * H + units, inside)
    for step in tl.range(0, T, num_stages=STAGES):
        t = step if REVERSE else T - 1 - step
        valid = t < length
        di, df, dg, do, dc_prev = _cell_of_step(
            grad_output, grad_cell_states, activations, cell_states, c0, dh, dc,
            t, length, rows, units, inside & valid, B, H, REVERSE,
        )  # fmt: skip
        _store_gates(grad_gates, (t * B + rows) * (4 * H) + units, di, df, dg, do, inside, H)
        dh_prev = tl.dot(di.to(dtype), weight_i, input_precision=PRECISION)
        dh_prev = tl.dot(df.to(dtype), weight_f, dh_prev, input_precision=PRECISION)
        dh_prev = tl.dot(dg.to(dtype), weight_g, dh_prev, input_precision=PRECISION)
        dh_prev = tl.dot(do.to(dtype), weight_o, dh_prev, input_precision=PRECISION)
        dh = tl.where(valid, dh_prev, dh)
        dc = tl.where(valid, dc_prev, dc)
    _store(grad_h0, rows * H + units, dh, inside)
    _store(grad_c0, rows * H + units, dc, inside)


@triton.jit
def _cell_of_step(
    grad_output, grad_cell_states, activations, cell_states, c0, dh, dc,
    t, length, rows, units, mask, B, H: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Cell backward of a tile at step t: dh, dc after the step -> di, df, dg, do and dc before it.

    Where ``mask`` is false, activations load as 0, so di, df, dg, do are 0.
    """
    at = (t * B + rows) * H + units
    i, f, g, o = _load_gates(activations, (t * B + rows) * (4 * H) + units, mask, H)
    c_t = _load(cell_states, at, mask)
    if REVERSE:
        first = t + 1 >= length
        before = at + B * H
    else:
        first = (rows * 0 + t) == 0
        before = at - B * H
    c_prev = _load(c0, rows * H + units, mask & first) + _load(cell_states, before, mask & (first == 0))
    dh += _load_or_zero(grad_output, at, mask)
    dc += _load_or_zero(grad_cell_states, at, mask)
    return cell_backward(i, f, g, o, c_prev, c_t, dh, dc)


@triton.jit(do_not_specialize=["t", "source", "T", "B"])
def lstm_step_forward_kernel(
    gates,  # (T, B, 4H) x W_ih^T + b_ih + b_hh
    weight_hh,  # (4H, H)
    lengths,  # (B,) int64, or None
    h,  # (2, B, H): programs read one half and write the other
    c,  # (B, H) float32, updated in place; each program accesses only its tile
    output,  # (T, B, H) out
    activations,  # (T, B, 4H) float32 out, or None
    cell_states,  # (T, B, H) float32 out, or None
    t,
    source,  # the half of h to read, 0 or 1
    T,
    B,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B = B.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = row[:, None], unit[None, :]
    inside = (rows < B) & (units < H)
    h_from, h_to = h + source * B * H, h + (1 - source) * B * H
    i = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    f = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    g = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    o = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = tl.load(h_from + rows * H + k[None, :], mask=(rows < B) & (k[None, :] < H), other=0.0)
        i = tl.dot(tile, _gate_weights(weight_hh, 0, unit, k, H).T, i, input_precision=PRECISION)
        f = tl.dot(tile, _gate_weights(weight_hh, 1, unit, k, H).T, f, input_precision=PRECISION)
        g = tl.dot(tile, _gate_weights(weight_hh, 2, unit, k, H).T, g, input_precision=PRECISION)
        o = tl.dot(tile, _gate_weights(weight_hh, 3, unit, k, H).T, o, input_precision=PRECISION)
    at = t * B + rows
    valid = t < _length(lengths, row, T, B)[:, None]
    x_i, x_f, x_g, x_o = _load_gates(gates, at * (4 * H) + units, inside & valid, H)
    c_prev = _load(c, rows * H + units, inside)
    i, f, g, o, c_t, h_t = cell_forward(i + x_i, f + x_f, g + x_g, o + x_o, c_prev)
    _store(output, at * H + units, tl.where(valid, h_t, 0.0), inside)
    if cell_states is not None:
        _store(cell_states, at * H + units, tl.where(valid, c_t, 0.0), inside)
    if activations is not None:
        _store_gates(activations, at * (4 * H) + units, i, f, g, o, inside & valid, H)
    _store(c, rows * H + units, c_t, inside & valid)
    h_prev = tl.load(h_from + rows * H + units, mask=inside, other=0.0)
    tl.store(h_to + rows * H + units, tl.where(valid, h_t.to(h_prev.dtype), h_prev), mask=inside)


@triton.jit(do_not_specialize=["t", "previous", "T", "B"])
def lstm_step_backward_kernel(
    grad_output,  # (T, B, H), or None
    grad_cell_states,  # (T, B, H), or None
    activations,  # (T, B, 4H) float32
    cell_states,  # (T, B, H) float32
    c0,  # (B, H)
    weight_hh,  # (4H, H)
    lengths,  # (B,) int64, or None
    dh,  # (B, H) float32, updated in place; each program accesses only its tile
    dc,  # (B, H) float32, updated in place
    grad_gates,  # (T, B, 4H) out; step `previous` is read
    t,
    previous,  # time step of the previous launch, -1 for none
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B = B.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = row[:, None], unit[None, :]
    inside = (rows < B) & (units < H)
    length = _length(lengths, row, T, B)[:, None]
    product = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for start in range(0, tl.where(previous < 0, 0, 4 * H), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        d_at = (previous * B + rows) * (4 * H) + k[None, :]
        d = tl.load(grad_gates + d_at, mask=(rows < B) & (k[None, :] < 4 * H), other=0.0)
        weight = tl.load(
            weight_hh + _row(k, H)[:, None] * H + units, mask=(k[:, None] < 4 * H) & (units < H), other=0.0
        )
        product = tl.dot(d, weight, product, input_precision=PRECISION)
    state = rows * H + units
    dh_t = tl.where((previous >= 0) & (previous < length), product, _load(dh, state, inside))
    dc_t = _load(dc, state, inside)
    valid = t < length
    di, df, dg, do, dc_prev = _cell_of_step(
        grad_output, grad_cell_states, activations, cell_states, c0, dh_t, dc_t,
        t, length, rows, units, inside & valid, B, H, REVERSE,
    )  # fmt: skip
    _store_gates(grad_gates, (t * B + rows) * (4 * H) + units, di, df, dg, do, inside, H)
    _store(dh, state, dh_t, inside)
    _store(dc, state, dc_prev, inside & valid)
