"""Triton kernels of ``lstm_variant``: all units of one sequence per program, one launch per step.

A normalisation needs the whole row, so a program holds it: BLOCK_H is H rounded up to a power of two. torch multiplies
by W_hh between two launches. Sums and states are in float32.
"""

import triton
import triton.language as tl

from fastseq.ops.common.triton.math import sigmoid, tanh


@triton.jit
def _load(tensor, at, inside):
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_gates(tensor, at, inside, H: tl.constexpr):
    """The four parts of a row (4H,), in float32; 0 outside."""
    i, f = _load(tensor, at, inside), _load(tensor, at + H, inside)
    return i, f, _load(tensor, at + 2 * H, inside), _load(tensor, at + 3 * H, inside)


@triton.jit
def _store_gates(tensor, at, i, f, g, o, inside, H: tl.constexpr):
    dtype = tensor.dtype.element_ty
    tl.store(tensor + at, i.to(dtype), mask=inside)
    tl.store(tensor + at + H, f.to(dtype), mask=inside)
    tl.store(tensor + at + 2 * H, g.to(dtype), mask=inside)
    tl.store(tensor + at + 3 * H, o.to(dtype), mask=inside)


@triton.jit
def _sum4(i, f, g, o):
    return tl.sum(i, axis=0) + tl.sum(f, axis=0) + tl.sum(g, axis=0) + tl.sum(o, axis=0)


@triton.jit
def _normalise(x, inside, H: tl.constexpr, EPSILON: tl.constexpr):
    """x (H,), 0 outside -> zero mean and unit variance, 0 outside; 1 / deviation."""
    x = tl.where(inside, x - tl.sum(x, axis=0) / H, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / H + EPSILON)
    return x * scale, scale


@triton.jit
def _normalise_gates(i, f, g, o, inside, H: tl.constexpr, EPSILON: tl.constexpr):
    """As :func:`_normalise`, over the row (4H,)."""
    mean = _sum4(i, f, g, o) / (4 * H)
    i, f = tl.where(inside, i - mean, 0.0), tl.where(inside, f - mean, 0.0)
    g, o = tl.where(inside, g - mean, 0.0), tl.where(inside, o - mean, 0.0)
    scale = 1.0 / tl.sqrt(_sum4(i * i, f * f, g * g, o * o) / (4 * H) + EPSILON)
    return i * scale, f * scale, g * scale, o * scale, scale


@triton.jit
def _kept(keep, at, rate, inside):
    """The share of a state that stays over the step: a mask, else a rate."""
    if keep is not None:
        return tl.load(keep + at, mask=inside, other=0).to(tl.float32)
    else:
        return tl.zeros(at.shape, tl.float32) + rate


@triton.jit(do_not_specialize=["rate_h", "rate_c", "t", "product_row", "next_row", "B"])
def lstm_variant_forward_kernel(
    gates,  # (T, B, 4H) x W_ih^T + b
    products,  # (rows, B, 4H) W_hh (mask h), of this step at product_row
    norm_hh,  # (4H,) or None; the next two then, too
    norm_c,  # (H,)
    norm_c_bias,  # (H,)
    hidden_mask,  # (B, H) float32 or None
    keep_h,  # (T, B, H) uint8 or None
    keep_c,  # (T, B, H) uint8 or None
    lengths,  # (B,) int64 or None
    h,  # (B, H) float32 in and out
    c,  # (B, H) float32 in and out
    operands,  # (rows, B, H) out: masked h, operand of the next product, at next_row
    output,  # (T, B, H) out
    activations,  # (T, B, 4H) float32 out, or None
    cell_states,  # (T, B, H) float32 out, or None
    rate_h,
    rate_c,
    t,
    product_row,
    next_row,  # -1 after the last step
    B,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EPSILON: tl.constexpr,
):
    b, unit = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    step, inside = t.to(tl.int64) * B + b, unit < H
    valid = True
    if lengths is not None:
        valid = t < tl.load(lengths + b)
    read, at = inside & valid, step * H + unit
    i, f, g, o = _load_gates(products, (product_row.to(tl.int64) * B + b) * 4 * H + unit, inside, H)
    if norm_hh is not None:
        i, f, g, o, _ = _normalise_gates(i, f, g, o, inside, H, EPSILON)
        gain_i, gain_f, gain_g, gain_o = _load_gates(norm_hh, unit, inside, H)
        i, f, g, o = i * gain_i, f * gain_f, g * gain_g, o * gain_o
    input_i, input_f, input_g, input_o = _load_gates(gates, step * 4 * H + unit, read, H)
    i, f, g, o = sigmoid(i + input_i), sigmoid(f + input_f), tanh(g + input_g), sigmoid(o + input_o)
    old_h, old_c = _load(h, b * H + unit, inside), _load(c, b * H + unit, inside)
    new_c = f * old_c + i * g
    inner = new_c
    if norm_c is not None:
        inner, _ = _normalise(tl.where(inside, new_c, 0.0), inside, H, EPSILON)
        inner = inner * _load(norm_c, unit, inside) + _load(norm_c_bias, unit, inside)
    z_h, z_c = _kept(keep_h, at, rate_h, inside), _kept(keep_c, at, rate_c, inside)
    new_h = tl.where(read, z_h * old_h + (1.0 - z_h) * (o * tanh(inner)), old_h)
    new_c = tl.where(read, z_c * old_c + (1.0 - z_c) * new_c, old_c)
    tl.store(h + b * H + unit, new_h, mask=inside)
    tl.store(c + b * H + unit, new_c, mask=inside)
    tl.store(output + at, tl.where(read, new_h, 0.0).to(output.dtype.element_ty), mask=inside)
    if cell_states is not None:
        tl.store(cell_states + at, tl.where(read, new_c, 0.0), mask=inside)
    if activations is not None:
        _store_gates(activations, step * 4 * H + unit, i, f, g, o, inside, H)
    if hidden_mask is not None:
        new_h *= _load(hidden_mask, b * H + unit, inside)
    row = (next_row.to(tl.int64) * B + b) * H
    tl.store(operands + row + unit, new_h.to(operands.dtype.element_ty), mask=inside & (next_row >= 0))


@triton.jit
def _add(tensor, at, x, inside):
    tl.store(tensor + at, tl.load(tensor + at, mask=inside, other=0.0) + x, mask=inside)


@triton.jit(do_not_specialize=["rate_h", "rate_c", "t", "B"])
def lstm_variant_backward_kernel(
    grad_output,  # (T, B, H) or None
    grad_cell_states,  # (T, B, H) or None
    activations,  # (T, B, 4H) float32
    cells_before,  # (T, B, H) float32, c before each step
    products,  # (T, B, 4H) W_hh (mask h) with norms, else None
    norm_hh,  # (4H,) or None; the next two then, too
    norm_c,  # (H,)
    norm_c_bias,  # (H,)
    hidden_mask,  # (B, H) float32 or None
    keep_h,  # (T, B, H) uint8 or None
    keep_c,  # (T, B, H) uint8 or None
    lengths,  # (B,) int64 or None
    grad_operand,  # (B, H) gradient of the masked h after this step, by the product of the step after
    dh,  # (B, H) float32: on entry dL/dh after this step without that product; then before this step
    dc,  # (B, H) float32: on entry dL/dc after this step; then before it
    grad_gates,  # (T, B, 4H) out
    grad_products,  # (T, B, 4H) out with norms, else None: it is grad_gates
    grad_norms,  # (B, 6H) float32 with norms: sums of norm_hh, norm_c, norm_c_bias, added to
    rate_h,
    rate_c,
    t,
    B,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EPSILON: tl.constexpr,
):
    b, unit = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    step, inside = t.to(tl.int64) * B + b, unit < H
    valid = True
    if lengths is not None:
        valid = t < tl.load(lengths + b)
    read, at, at_gates = inside & valid, step * H + unit, step * 4 * H + unit
    operand = _load(grad_operand, b * H + unit, inside)
    if hidden_mask is not None:
        operand *= _load(hidden_mask, b * H + unit, inside)
    after_h, after_c = _load(dh, b * H + unit, inside) + operand, _load(dc, b * H + unit, inside)
    grad_h, grad_c = after_h, after_c
    if grad_output is not None:
        grad_h += _load(grad_output, at, read)
    if grad_cell_states is not None:
        grad_c += _load(grad_cell_states, at, read)
    z_h, z_c = _kept(keep_h, at, rate_h, inside), _kept(keep_c, at, rate_c, inside)
    tl.store(dh + b * H + unit, tl.where(read, z_h * grad_h, after_h), mask=inside)
    new_h, new_c = tl.where(read, (1.0 - z_h) * grad_h, 0.0), tl.where(read, (1.0 - z_c) * grad_c, 0.0)
    i, f, g, o = _load_gates(activations, at_gates, inside, H)
    c = _load(cells_before, at, inside)
    inner = tl.where(inside, f * c + i * g, 0.0)
    if norm_c is not None:
        normal, scale = _normalise(inner, inside, H, EPSILON)
        gain = _load(norm_c, unit, inside)
        inner = normal * gain + _load(norm_c_bias, unit, inside)
    tanh_c = tanh(inner)
    d_inner = new_h * o * (1.0 - tanh_c) * (1.0 + tanh_c)
    if norm_c is not None:
        _add(grad_norms, (b * 6 + 4) * H + unit, d_inner * normal, inside)
        _add(grad_norms, (b * 6 + 5) * H + unit, d_inner, inside)
        d_inner *= gain
        along, mean = tl.sum(d_inner * normal, axis=0) / H, tl.sum(d_inner, axis=0) / H
        d_inner = scale * (d_inner - mean - normal * along)
    new_c += d_inner
    tl.store(dc + b * H + unit, tl.where(read, new_c * f + z_c * grad_c, after_c), mask=inside)
    di, df = new_c * g * i * (1.0 - i), new_c * c * f * (1.0 - f)
    dg, do = new_c * i * (1.0 - g) * (1.0 + g), new_h * tanh_c * o * (1.0 - o)
    di, df = tl.where(read, di, 0.0), tl.where(read, df, 0.0)
    dg, do = tl.where(read, dg, 0.0), tl.where(read, do, 0.0)
    _store_gates(grad_gates, at_gates, di, df, dg, do, inside, H)
    if norm_hh is not None:
        n_i, n_f, n_g, n_o = _load_gates(products, at_gates, inside, H)
        n_i, n_f, n_g, n_o, scale = _normalise_gates(n_i, n_f, n_g, n_o, inside, H, EPSILON)
        _add(grad_norms, b * 6 * H + unit, di * n_i, inside)
        _add(grad_norms, (b * 6 + 1) * H + unit, df * n_f, inside)
        _add(grad_norms, (b * 6 + 2) * H + unit, dg * n_g, inside)
        _add(grad_norms, (b * 6 + 3) * H + unit, do * n_o, inside)
        gain_i, gain_f, gain_g, gain_o = _load_gates(norm_hh, unit, inside, H)
        di, df, dg, do = di * gain_i, df * gain_f, dg * gain_g, do * gain_o
        mean = _sum4(di, df, dg, do) / (4 * H)
        along = _sum4(di * n_i, df * n_f, dg * n_g, do * n_o) / (4 * H)
        di, df = scale * (di - mean - n_i * along), scale * (df - mean - n_f * along)
        dg, do = scale * (dg - mean - n_g * along), scale * (do - mean - n_o * along)
        _store_gates(grad_products, at_gates, di, df, dg, do, inside, H)
