"""The ``triton`` backend of ``lstm``, for any GPU that Triton serves.

torch multiplies by W_ih and makes the weight gradients, each in one product over all steps. The recurrence between is
one launch where one program can keep W_hh, else one launch a step. With padded input nothing waits for the device, so
that a call can be captured in a CUDA graph, which takes the launches of many steps off the CPU.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.common import layout
from fastseq.ops.common.triton.runtime import Chip, chip_of, dot_precision, power_of_two, ready, why_not


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCall``) and the way out, or None."""
    if call.proj_size:
        return (
            f"lstm: the triton backend has no projection (proj_size={call.proj_size}); "
            "use backend='torch' or 'reference', or proj_size=0."
        )
    return why_not("lstm", call)


class Config(NamedTuple):
    """How a kernel is cut into programs. Never depends on T or B: a new length compiles nothing."""

    block_b: int  # sequences of a program
    block_h: int  # hidden units of a program
    block_k: int  # of the recurrent product at a time; 0: W_hh is kept, all steps are one launch
    warps: int
    stages: int  # loads in flight


def configure(hidden_size: int, dtype: torch.dtype, chip: Chip, backward: bool) -> Config:
    """The configuration for a hidden size, a dtype and a chip.

    Chosen by what the compiler makes of it (tests/triton_table.json): no spills, 16-byte loads, the widest tensor-core
    instruction of the chip. Not tuned on a GPU yet.
    """
    resident = _resident(max(16, power_of_two(hidden_size)), dtype, chip)
    if resident is not None:
        return resident
    # From here 64 rows, what one wgmma takes, leave enough programs to fill a GPU.
    wide = hidden_size >= 768 and _wide_products_work(chip)
    float32 = dtype == torch.float32
    if backward:
        return Config(64 if wide else 32, 32, 32 if float32 else 128, warps=8 if wide else 4, stages=3)
    return Config(64 if wide else 32, 16, 32 if float32 else 64, warps=8 if wide and float32 else 4, stages=3)


@functools.cache
def _wide_products_work(chip: Chip) -> bool:
    """Whether products of 64 rows can be trusted where they become wgmma or tcgen05; fewer rows become neither.

    On Hopper from Triton 3.7.1 on, which orders copies before wgmma reads what they copied (triton-lang/triton#10537).
    Not yet on Blackwell, where a product of 64 x 16 stops at a misaligned address (triton-lang/triton#10309, open).
    """
    if chip.name.startswith(("sm_10", "sm_11")):
        return False
    if not chip.name.startswith("sm_9"):
        return True
    from fastseq.ops.common.triton.math import triton_version

    return triton_version() >= (3, 7, 1)


def _resident(padded: int, dtype: torch.dtype, chip: Chip) -> Config | None:
    """One program for all steps of 16 sequences, if the chip can keep W_hh, padded to (4 padded, padded), that long."""
    if not chip.is_nvidia:  # in registers, a warp for 16 units
        return Config(16, padded, 0, warps=padded // 16, stages=1) if padded <= 128 else None
    weights = 4 * padded * padded * (8 if dtype == torch.float32 else 2)  # bytes; tf32x3 keeps two parts of a float32
    if weights + 32 * 1024 > chip.shared_memory:
        return None
    stages = 2 if weights + 80 * 1024 <= chip.shared_memory else 1  # 2: the next step's tiles are fetched meanwhile
    return Config(16, padded, 0, warps=min(8, padded // 8), stages=stages)


def forward(
    input: Tensor,  # (T, B, I), or (N, I) with batch_sizes
    h0: Tensor,  # (B, H)
    c0: Tensor,  # (B, H)
    weight_ih: Tensor,  # (4H, I)
    weight_hh: Tensor,  # (4H, H)
    bias_ih: Tensor | None,  # (4H,)
    bias_hh: Tensor | None,  # (4H,)
    weight_hr: None,
    lengths: Tensor | None,  # (B,) int64
    batch_sizes: Tensor | None,  # (T,) int64, CPU
    reverse: bool,
    need_backward: bool,
    need_cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """-> output (T, B, H) or (N, H), h_n and c_n (B, H), cell states like output or None, saved for ``backward``."""
    if batch_sizes is not None:
        input, lengths = layout.pad(input, batch_sizes)
    gates = F.linear(input.contiguous(), weight_ih, None if bias_ih is None else bias_ih + bias_hh)
    T, B, H = *gates.shape[:2], c0.size(1)
    output = gates.new_empty(T, B, H)
    activations = gates.new_empty(gates.shape, dtype=torch.float32) if need_backward else None
    cell_states = output.new_empty(T, B, H, dtype=torch.float32) if need_backward or need_cell_states else None
    config = configure(H, gates.dtype, chip_of(gates), backward=False)
    run = _forward_steps if config.block_k else _forward_sequence
    with torch.cuda.device_of(gates):
        h_n, c_n = run(
            config, reverse, ready(gates), ready(h0), ready(c0), ready(weight_hh), ready(lengths),
            output, activations, cell_states,
        )  # fmt: skip
    saved = (activations, cell_states) if need_backward else ()
    wanted_states = (
        cell_states.to(output.dtype, copy=True) if need_cell_states else None
    )  # saved ones stay the op's own
    if batch_sizes is not None:
        output = layout.pack(output, batch_sizes)
        wanted_states = layout.pack(wanted_states, batch_sizes) if need_cell_states else None
    return output, h_n, c_n, wanted_states, saved


def _forward_sequence(config, reverse, gates, h0, c0, weight_hh, lengths, output, activations, cell_states):
    from fastseq.ops.lstm.triton_kernels import lstm_sequence_forward_kernel

    T, B, H = output.shape
    h_n, c_n = h0.new_empty(B, H), c0.new_empty(B, H)
    lstm_sequence_forward_kernel[(-(-B // config.block_b),)](
        gates, h0, c0, weight_hh, lengths, output, h_n, c_n, activations, cell_states, T, B,
        H=H, REVERSE=reverse, **_options(config, gates),
    )  # fmt: skip
    return h_n, c_n


def _forward_steps(config, reverse, gates, h0, c0, weight_hh, lengths, output, activations, cell_states):
    from fastseq.ops.lstm.triton_kernels import lstm_step_forward_kernel

    T, B, H = output.shape
    h, c = h0.new_empty(2, B, H), c0.to(torch.float32, copy=True)
    h[0] = h0
    grid = (-(-B // config.block_b), -(-H // config.block_h))
    options = _options(config, gates)
    for step in range(T):
        t = T - 1 - step if reverse else step
        lstm_step_forward_kernel[grid](
            gates, weight_hh, lengths, h, c, output, activations, cell_states, t, step % 2, T, B, H=H, **options
        )
    return h[T % 2].clone(), c.to(c0.dtype, copy=True)


def backward(
    grad_output: Tensor | None,  # like output
    grad_h_n: Tensor | None,  # (B, H)
    grad_c_n: Tensor | None,  # (B, H)
    grad_cell_states: Tensor | None,  # like output
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: None,
    saved: tuple[Tensor, ...],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; None where not needed."""
    need_input, need_h0, need_c0, need_weight_ih, need_weight_hh, need_bias_ih, need_bias_hh, _ = needs
    activations, cell_states = saved
    if batch_sizes is not None:
        input, lengths = layout.pad(input, batch_sizes)
        grad_output, grad_cell_states = (
            g if g is None else layout.pad(g, batch_sizes)[0] for g in (grad_output, grad_cell_states)
        )
    config = configure(c0.size(1), weight_hh.dtype, chip_of(weight_hh), backward=True)
    run = _backward_steps if config.block_k else _backward_sequence
    grads = (grad_output, grad_h_n, grad_c_n, grad_cell_states)
    with torch.cuda.device_of(weight_hh):
        grad_gates, grad_h0, grad_c0 = run(
            config, reverse, *map(ready, grads), activations, cell_states, ready(c0), ready(weight_hh), ready(lengths)
        )
    rows = grad_gates.flatten(0, 1)  # (T * B, 4H)
    grad_input = grad_gates @ weight_ih if need_input else None
    if need_input and batch_sizes is not None:
        grad_input = layout.pack(grad_input, batch_sizes)
    grad_bias = rows.sum(0) if need_bias_ih or need_bias_hh else None
    before = layout.hidden_before(activations, cell_states, h0, lengths, reverse) if need_weight_hh else None
    return (
        grad_input,
        grad_h0 if need_h0 else None,
        grad_c0 if need_c0 else None,
        rows.T @ input.flatten(0, 1) if need_weight_ih else None,
        rows.T @ before.flatten(0, 1) if need_weight_hh else None,
        grad_bias if need_bias_ih else None,
        grad_bias if need_bias_hh else None,
        None,
    )


def _backward_sequence(
    config, reverse, grad_output, grad_h_n, grad_c_n, grad_cell_states, activations, cell_states, c0, weight_hh, lengths
):
    from fastseq.ops.lstm.triton_kernels import lstm_sequence_backward_kernel

    T, B, H = cell_states.shape
    grad_gates = c0.new_empty(T, B, 4 * H)
    grad_h0, grad_c0 = c0.new_empty(B, H), c0.new_empty(B, H)
    grad_h_n, grad_c_n = (c0.new_zeros(B, H) if grad is None else grad for grad in (grad_h_n, grad_c_n))
    lstm_sequence_backward_kernel[(-(-B // config.block_b),)](
        grad_output, grad_h_n, grad_c_n, grad_cell_states, activations, cell_states, c0, weight_hh, lengths,
        grad_gates, grad_h0, grad_c0, T, B, H=H, REVERSE=reverse, **_options(config, weight_hh),
    )  # fmt: skip
    return grad_gates, grad_h0, grad_c0


def _backward_steps(
    config, reverse, grad_output, grad_h_n, grad_c_n, grad_cell_states, activations, cell_states, c0, weight_hh, lengths
):
    from fastseq.ops.lstm.triton_kernels import lstm_step_backward_kernel

    T, B, H = cell_states.shape
    grad_gates = c0.new_empty(T, B, 4 * H)
    dh, dc = (_copy_or_zeros(grad, cell_states[0]) for grad in (grad_h_n, grad_c_n))
    grid = (-(-B // config.block_b), -(-H // config.block_h))
    options = _options(config, weight_hh)
    previous = -1
    for t in range(T) if reverse else reversed(range(T)):
        lstm_step_backward_kernel[grid](
            grad_output, grad_cell_states, activations, cell_states, c0, weight_hh, lengths, dh, dc, grad_gates,
            t, previous, T, B, H=H, REVERSE=reverse, **options,
        )  # fmt: skip
        previous = t
    grad_h0 = grad_gates[previous] @ weight_hh
    if lengths is not None:
        grad_h0 = torch.where((previous < lengths).unsqueeze(1), grad_h0, dh)
    return grad_gates, grad_h0.to(c0.dtype), dc.to(c0.dtype)


def _copy_or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """A float32 tensor of its own."""
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype, copy=True)


def _options(config: Config, t: Tensor) -> dict:
    """Keyword arguments that all kernels share."""
    options = {
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "PRECISION": dot_precision(t.dtype, chip_of(t)),
        "num_warps": config.warps,
    }
    if config.block_k:
        return options | {"BLOCK_K": config.block_k, "num_stages": config.stages}
    return options | {"STAGES": config.stages}
