"""The ``native`` backend of ``lstm``: torch multiplies by W_ih, one compiled operator runs all time steps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.ops.lstm.layout import previous_states

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    gates = F.linear(input, weight_ih, _sum(bias_ih, bias_hh))
    output, h_n, c_n, activations, cell_states = torch.ops.fastseq.lstm_forward(
        gates.contiguous(),
        h0.contiguous(),
        c0.contiguous(),
        weight_hh.contiguous(),
        _on_cpu(lengths),
        _on_cpu(batch_sizes),
        reverse,
        need_backward,
        need_backward or need_cell_states,
    )
    saved = (activations, cell_states) if need_backward else ()
    wanted_states = cell_states.to(input.dtype, copy=True) if need_cell_states else None  # saved ones stay the op's own
    return output, h_n, c_n, wanted_states, saved


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
    grad_gates, grad_h0, grad_c0 = torch.ops.fastseq.lstm_backward(
        _contiguous(grad_output),
        _contiguous(grad_h_n),
        _contiguous(grad_c_n),
        _contiguous(grad_cell_states),
        activations,
        cell_states,
        c0.contiguous(),
        weight_hh.contiguous(),
        _on_cpu(lengths),
        _on_cpu(batch_sizes),
        reverse,
    )
    rows = grad_gates.flatten(0, -2)  # (N, 4H)
    grad_input = grad_gates @ weight_ih if need_input else None
    grad_weight_ih = rows.T @ input.flatten(0, -2) if need_weight_ih else None
    grad_weight_hh = None
    if need_weight_hh:
        o, tanh_c = activations[..., 3 * c0.size(1) :], cell_states.tanh()
        output = (o * tanh_c).to(weight_hh.dtype)  # again, because users change what they were given in place
        h_prev = previous_states(output, h0, lengths, batch_sizes, reverse)
        grad_weight_hh = rows.T @ h_prev.flatten(0, -2)
    grad_bias = rows.sum(0) if need_bias_ih or need_bias_hh else None
    return (
        grad_input,
        grad_h0 if need_h0 else None,
        grad_c0 if need_c0 else None,
        grad_weight_ih,
        grad_weight_hh,
        grad_bias if need_bias_ih else None,
        grad_bias if need_bias_hh else None,
        None,
    )


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCall``) and the way out, or None."""
    if not _native.available():
        return f"lstm: the native backend is missing: {_native.why_not()}"
    if call.device != "cpu":
        return f"lstm: the native backend runs on CPU tensors (got {call.device}); use backend='torch' or 'reference'."
    if call.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"lstm: the native backend computes in {names} (got {call.dtype}); use backend='reference'."
    if call.proj_size:
        return (
            f"lstm: the native backend has no projection (proj_size={call.proj_size}); "
            "use backend='torch' or 'reference', or proj_size=0."
        )
    return None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _on_cpu(sizes: Tensor | None) -> Tensor | None:
    return None if sizes is None else sizes.to("cpu", torch.int64).contiguous()


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_shape(op: str, name: str, t: Tensor, shape: tuple) -> None:
    torch._check(
        t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)),
        lambda: f"{op}: {name} must have the shape {tuple(shape)}, got {tuple(t.shape)}",
    )


def _check_rows(op: str, per_step: Tensor, c0: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
    torch._check(
        lengths is None or batch_sizes is None,
        lambda: f"{op}: lengths and batch_sizes exclude each other, got both",
    )
    rank = 3 if batch_sizes is None else 2
    torch._check(c0.dim() == 2, lambda: f"{op}: c0 must have the shape (B, H), got {tuple(c0.shape)}")
    torch._check(per_step.dim() == rank, lambda: f"{op}: expected {rank} dimensions, got {tuple(per_step.shape)}")
    if batch_sizes is None:
        torch._check(
            per_step.shape[1] == c0.shape[0],
            lambda: f"{op}: the batch of {tuple(per_step.shape)} is not that of c0 {tuple(c0.shape)}",
        )


def _fake_forward(gates, h0, c0, weight_hh, lengths, batch_sizes, reverse, need_activations, need_cell_states):
    op = "lstm_forward"
    _check_rows(op, gates, c0, lengths, batch_sizes)
    B, H = c0.shape
    _check_shape(op, "gates", gates, (*gates.shape[:-1], 4 * H))
    _check_shape(op, "h0", h0, (B, H))
    _check_shape(op, "weight_hh", weight_hh, (4 * H, H))
    for name, t in (("h0", h0), ("c0", c0), ("weight_hh", weight_hh)):
        torch._check(t.dtype == gates.dtype, lambda name=name: f"{op}: {name} must have the dtype {gates.dtype}")
    rows, acc = gates.shape[:-1], _accumulate_dtype(gates.dtype)
    return (
        gates.new_empty(*rows, H),
        gates.new_empty(B, H),
        gates.new_empty(B, H),
        gates.new_empty((*rows, 4 * H) if need_activations else (0,), dtype=acc),
        gates.new_empty((*rows, H) if need_cell_states else (0,), dtype=acc),
    )


def _fake_backward(
    grad_output,
    grad_h_n,
    grad_c_n,
    grad_cell_states,
    activations,
    cell_states,
    c0,
    weight_hh,
    lengths,
    batch_sizes,
    reverse,
):
    op = "lstm_backward"
    _check_rows(op, activations, c0, lengths, batch_sizes)
    B, H = c0.shape
    rows = activations.shape[:-1]
    _check_shape(op, "activations", activations, (*rows, 4 * H))
    _check_shape(op, "cell_states", cell_states, (*rows, H))
    _check_shape(op, "weight_hh", weight_hh, (4 * H, H))
    return weight_hh.new_empty(*rows, 4 * H), weight_hh.new_empty(B, H), weight_hh.new_empty(B, H)


if _native.available():
    torch.library.register_fake("fastseq::lstm_forward", _fake_forward)
    torch.library.register_fake("fastseq::lstm_backward", _fake_backward)
