"""Triton kernels of ``lstm_cell``: a program computes ROWS sequences by COLUMNS units. Tensors are contiguous."""

import triton
import triton.language as tl

from fastseq.ops.common.triton.math import cell_backward, cell_forward


@triton.jit
def _tile(N, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return, per element: offset of gate i in (N, 4H), offset in (N, H), and True if it exists."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return rows * (4 * H) + columns, rows * H + columns, (rows < N) & (columns < H)


@triton.jit
def _load_gates(gates, at, inside, H: tl.constexpr):
    i = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(gates + at + H, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates + at + 2 * H, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(gates + at + 3 * H, mask=inside, other=0.0).to(tl.float32)
    return i, f, g, o


@triton.jit(do_not_specialize=["N"])
def lstm_cell_forward_kernel(
    gates,  # (N, 4H) pre-activations, order i f g o
    c,  # (N, H)
    h_n,  # (N, H) out
    c_n,  # (N, H) out
    N,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at_gates, at, inside = _tile(N, H, ROWS, COLUMNS)
    i, f, g, o = _load_gates(gates, at_gates, inside, H)
    c_prev = tl.load(c + at, mask=inside, other=0.0).to(tl.float32)
    i, f, g, o, c_t, h = cell_forward(i, f, g, o, c_prev)
    tl.store(h_n + at, h.to(h_n.dtype.element_ty), mask=inside)
    tl.store(c_n + at, c_t.to(c_n.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def lstm_cell_backward_kernel(
    gates,  # (N, 4H) pre-activations
    c,  # (N, H)
    grad_h,  # (N, H) or None
    grad_c_n,  # (N, H) or None
    grad_gates,  # (N, 4H) out
    grad_c,  # (N, H) out
    N,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at_gates, at, inside = _tile(N, H, ROWS, COLUMNS)
    i, f, g, o = _load_gates(gates, at_gates, inside, H)
    c_prev = tl.load(c + at, mask=inside, other=0.0).to(tl.float32)
    i, f, g, o, c_t, _ = cell_forward(i, f, g, o, c_prev)
    dh = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grad_h is not None:
        dh += tl.load(grad_h + at, mask=inside, other=0.0).to(tl.float32)
    dc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grad_c_n is not None:
        dc += tl.load(grad_c_n + at, mask=inside, other=0.0).to(tl.float32)
    di, df, dg, do, dc_prev = cell_backward(i, f, g, o, c_prev, c_t, dh, dc)
    dtype = grad_gates.dtype.element_ty
    tl.store(grad_gates + at_gates, di.to(dtype), mask=inside)
    tl.store(grad_gates + at_gates + H, df.to(dtype), mask=inside)
    tl.store(grad_gates + at_gates + 2 * H, dg.to(dtype), mask=inside)
    tl.store(grad_gates + at_gates + 3 * H, do.to(dtype), mask=inside)
    tl.store(grad_c + at, dc_prev.to(grad_c.dtype.element_ty), mask=inside)
