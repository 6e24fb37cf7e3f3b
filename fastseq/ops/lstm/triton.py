"""The ``triton`` backend of ``lstm``, for any GPU that Triton supports.

torch computes x W_ih^T and the weight gradients, each as one product over all steps. The recurrence is one launch if a
program can hold W_hh, else one launch per step. With padded input a call never synchronises with the device, so a CUDA
graph can capture it and save the launch overhead. docs/kernels/triton.md
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.common import layout
from fastseq.ops.common.triton.runtime import Chip, chip_of, dot_precision, power_of_two, ready, why_not
from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Result, Want, Weights

SINGLE_DIRECTION = True  # see directions.py


def unsupported(call) -> str | None:
    """Return the refusal of an ``LSTMCall``, a sentence with the way out, or None."""
    return why_not("lstm", call)


def fold_product(layer: Layer) -> Callable[..., Tensor]:
    """The product by which projection.py folds W_hr, which the kernels lack."""
    return product


def product(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) op(b), at torch's precision of a product. a: (M, K) or transposed; b: (K, N) or transposed."""
    return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)


class Config(NamedTuple):
    """Block sizes of a kernel. They do not depend on T and B, so a new length compiles nothing."""

    block_b: int  # sequences per program
    block_h: int  # hidden units per program
    block_k: int  # columns of K per tl.dot; 0: the program holds W_hh and runs all steps in one launch
    warps: int
    stages: int  # pipeline stages of loads


def configure(hidden_size: int, dtype: torch.dtype, chip: Chip, backward: bool) -> Config:
    """Return the configuration for a hidden size, dtype and chip.

    Chosen from the compiled code (tests/triton/triton_table.json): no spills, 16-byte loads, the widest tensor-core
    instruction of the chip. Not tuned on a GPU yet.
    """
    resident = _resident(max(16, power_of_two(hidden_size)), dtype, chip)
    if resident is not None:
        return resident
    # From H = 768 on, blocks of 64 rows (one wgmma) still give enough programs to fill a GPU.
    wide = hidden_size >= 768 and _wide_products_work(chip)
    float32 = dtype == torch.float32
    if backward:
        return Config(64 if wide else 32, 32, 32 if float32 else 128, warps=8 if wide else 4, stages=3)
    return Config(64 if wide else 32, 16, 32 if float32 else 64, warps=8 if wide and float32 else 4, stages=3)


@functools.cache
def _wide_products_work(chip: Chip) -> bool:
    """True if Triton compiles products of 64 rows correctly to wgmma or tcgen05. Fewer rows become neither.

    Hopper: from Triton 3.7.1 on, which orders copies before the wgmma that reads them (triton-lang/triton#10537).
    Blackwell: not yet; a 64 x 16 product fails with a misaligned address (triton-lang/triton#10309, open).
    """
    if chip.name.startswith(("sm_10", "sm_11")):
        return False
    if not chip.name.startswith("sm_9"):
        return True
    from fastseq.ops.common.triton.math import triton_version

    return triton_version() >= (3, 7, 1)


def _resident(padded: int, dtype: torch.dtype, chip: Chip) -> Config | None:
    """Return the configuration of one program for all steps of 16 sequences, or None if W_hh does not fit the chip.

    padded: H rounded up to a power of two; W_hh takes (4 padded, padded).
    """
    if not chip.is_nvidia:  # W_hh in registers, one warp per 16 units
        return Config(16, padded, 0, warps=padded // 16, stages=1) if padded <= 128 else None
    weights = 4 * padded * padded * (8 if dtype == torch.float32 else 2)  # bytes; tf32x3 splits a float32 in two
    if weights + 32 * 1024 > chip.shared_memory:
        return None
    stages = 2 if weights + 80 * 1024 <= chip.shared_memory else 1  # 2: prefetch the next step's tiles
    return Config(16, padded, 0, warps=min(8, padded // 8), stages=stages)


def forward(layer: Layer, want: Want) -> Result:
    """Run the layer. Saved, float32: activations (T, B, 4H), cell states (T, B, H)."""
    input, lengths, weights = layer.input, layer.lengths, layer.weights[0]
    if layer.batch_sizes is not None:
        input, lengths = layout.pad(input, layer.batch_sizes)
    bias = None if weights.bias_ih is None else weights.bias_ih + weights.bias_hh
    gates = F.linear(input.contiguous(), weights.ih, bias)
    T, B, H = *gates.shape[:2], layer.c0.size(-1)
    results = _Results(
        gates.new_empty(T, B, H),
        gates.new_empty(gates.shape, dtype=torch.float32) if want.backward else None,
        gates.new_empty(T, B, H, dtype=torch.float32) if want.backward or want.cell_states else None,
    )
    config = configure(H, gates.dtype, chip_of(gates), backward=False)
    run = _forward_steps if config.block_k else _forward_sequence
    operands = map(ready, (gates, layer.h0[0], layer.c0[0], weights.hh, lengths))
    with torch.cuda.device_of(gates):
        h_n, c_n = run(config, layer.reverse, _Operands(*operands), results)
    output, activations, cell_states = results
    saved = (activations, cell_states) if want.backward else ()
    wanted = cell_states.to(output.dtype, copy=True) if want.cell_states else None  # a copy: backward reads cell_states
    if layer.batch_sizes is not None:
        output = layout.pack(output, layer.batch_sizes)
        wanted = layout.pack(wanted, layer.batch_sizes) if want.cell_states else None
    return Result(output, h_n[None], c_n[None], wanted, saved)


class _Operands(NamedTuple):
    """Inputs of the forward kernels, in the order of their parameters."""

    gates: Tensor  # (T, B, 4H) x W_ih^T + b
    h0: Tensor  # (B, H)
    c0: Tensor  # (B, H)
    weight_hh: Tensor  # (4H, H)
    lengths: Tensor | None  # (B,) int64


class _Results(NamedTuple):
    """Per-step results of the forward kernels, allocated by the caller."""

    output: Tensor  # (T, B, H)
    activations: Tensor | None  # (T, B, 4H) float32
    cell_states: Tensor | None  # (T, B, H) float32


def _forward_sequence(config, reverse: bool, operands: _Operands, results: _Results) -> tuple[Tensor, Tensor]:
    """Run all steps in one launch -> h_n, c_n (B, H)."""
    from fastseq.ops.lstm.triton_kernels import lstm_sequence_forward_kernel

    output, activations, cell_states = results
    T, B, H = output.shape
    h_n, c_n = operands.h0.new_empty(B, H), operands.c0.new_empty(B, H)
    pointers = (*operands, output, h_n, c_n, activations, cell_states)
    options = _options(config, operands.gates)
    lstm_sequence_forward_kernel[(-(-B // config.block_b),)](*pointers, T, B, H=H, REVERSE=reverse, **options)
    return h_n, c_n


def _forward_steps(config, reverse: bool, operands: _Operands, results: _Results) -> tuple[Tensor, Tensor]:
    """Run one launch per step -> h_n, c_n (B, H)."""
    from fastseq.ops.lstm.triton_kernels import lstm_step_forward_kernel

    T, B, H = results.output.shape
    gates, h0, c0, weight_hh, lengths = operands
    h, c = h0.new_empty(2, B, H), c0.to(torch.float32, copy=True)
    h[0] = h0
    grid = (-(-B // config.block_b), -(-H // config.block_h))
    options = _options(config, gates)
    for step in range(T):
        t = T - 1 - step if reverse else step
        pointers = (gates, weight_hh, lengths, h, c, *results)
        lstm_step_forward_kernel[grid](*pointers, t, step % 2, T, B, H=H, **options)
    return h[T % 2].clone(), c.to(c0.dtype, copy=True)


def backward(layer: Layer, saved: tuple[Tensor, ...], grads: Grads, needs: LayerGrads) -> LayerGrads:
    """Compute the gradients of all gates by kernels, then every other gradient as one product over all steps."""
    activations, cell_states = saved
    input, lengths, weights, weight_needs = layer.input, layer.lengths, layer.weights[0], needs.weights[0]
    grad_output, grad_cell_states = grads.output, grads.cell_states
    if layer.batch_sizes is not None:
        input, lengths = layout.pad(input, layer.batch_sizes)
        grad_output, grad_cell_states = (
            g if g is None else layout.pad(g, layer.batch_sizes)[0] for g in (grad_output, grad_cell_states)
        )
    config = configure(layer.c0.size(-1), weights.hh.dtype, chip_of(weights.hh), backward=True)
    run = _backward_steps if config.block_k else _backward_sequence
    grad_h_n, grad_c_n = (g if g is None else g[0] for g in (grads.h_n, grads.c_n))
    incoming = Grads(*map(ready, (grad_output, grad_h_n, grad_c_n, grad_cell_states)))
    of_steps = (activations, cell_states, ready(layer.c0[0]), ready(weights.hh), ready(lengths))
    with torch.cuda.device_of(weights.hh):
        grad_gates, grad_h0, grad_c0 = run(config, layer.reverse, incoming, _Saved(*of_steps))
    rows = grad_gates.flatten(0, 1)  # (T * B, 4H)
    grad_input = grad_gates @ weights.ih if needs.input else None
    if needs.input and layer.batch_sizes is not None:
        grad_input = layout.pack(grad_input, layer.batch_sizes)
    before = None
    if weight_needs.hh:
        before = layout.hidden_before(activations, cell_states, layer.h0[0], lengths, layer.reverse)
    grad_bias = rows.sum(0) if weight_needs.bias_ih or weight_needs.bias_hh else None
    of_weights = Weights(
        rows.T @ input.flatten(0, 1) if weight_needs.ih else None,
        rows.T @ before.flatten(0, 1) if weight_needs.hh else None,
        grad_bias if weight_needs.bias_ih else None,
        grad_bias if weight_needs.bias_hh else None,
        None,
    )
    states = (grad_h0[None] if needs.h0 else None, grad_c0[None] if needs.c0 else None)
    return LayerGrads(grad_input, *states, (of_weights,))


class _Saved(NamedTuple):
    """Inputs of the backward kernels besides the gradients, in the order of their parameters."""

    activations: Tensor  # (T, B, 4H) float32
    cell_states: Tensor  # (T, B, H) float32
    c0: Tensor  # (B, H)
    weight_hh: Tensor  # (4H, H)
    lengths: Tensor | None  # (B,) int64


def _backward_sequence(config, reverse: bool, grads: Grads, saved: _Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Run all steps in one launch -> grad_gates (T, B, 4H), grad_h0, grad_c0 (B, H)."""
    from fastseq.ops.lstm.triton_kernels import lstm_sequence_backward_kernel

    (T, B, H), c0 = saved.cell_states.shape, saved.c0
    grad_gates = c0.new_empty(T, B, 4 * H)
    grad_h0, grad_c0 = c0.new_empty(B, H), c0.new_empty(B, H)
    grad_h_n, grad_c_n = (c0.new_zeros(B, H) if grad is None else grad for grad in (grads.h_n, grads.c_n))
    pointers = (grads.output, grad_h_n, grad_c_n, grads.cell_states, *saved, grad_gates, grad_h0, grad_c0)
    options = _options(config, saved.weight_hh)
    lstm_sequence_backward_kernel[(-(-B // config.block_b),)](*pointers, T, B, H=H, REVERSE=reverse, **options)
    return grad_gates, grad_h0, grad_c0


def _backward_steps(config, reverse: bool, grads: Grads, saved: _Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Run one launch per step -> grad_gates (T, B, 4H), grad_h0, grad_c0 (B, H)."""
    from fastseq.ops.lstm.triton_kernels import lstm_step_backward_kernel

    (T, B, H), c0, lengths = saved.cell_states.shape, saved.c0, saved.lengths
    grad_gates = c0.new_empty(T, B, 4 * H)
    dh, dc = (_copy_or_zeros(grad, saved.cell_states[0]) for grad in (grads.h_n, grads.c_n))
    grid = (-(-B // config.block_b), -(-H // config.block_h))
    options = _options(config, saved.weight_hh)
    previous = -1
    for t in range(T) if reverse else reversed(range(T)):
        pointers = (grads.output, grads.cell_states, *saved, dh, dc, grad_gates)
        lstm_step_backward_kernel[grid](*pointers, t, previous, T, B, H=H, REVERSE=reverse, **options)
        previous = t
    grad_h0 = grad_gates[previous] @ saved.weight_hh
    if lengths is not None:
        grad_h0 = torch.where((previous < lengths).unsqueeze(1), grad_h0, dh)
    return grad_gates, grad_h0.to(c0.dtype), dc.to(c0.dtype)


def _copy_or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return a new float32 tensor: a copy of ``grad``, or zeros."""
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype, copy=True)


def _options(config: Config, t: Tensor) -> dict:
    """Return the keyword arguments that all kernels share."""
    options = {
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "PRECISION": dot_precision(t.dtype, chip_of(t)),
        "num_warps": config.warps,
    }
    if config.block_k:
        return options | {"BLOCK_K": config.block_k, "num_stages": config.stages}
    return options | {"STAGES": config.stages}
