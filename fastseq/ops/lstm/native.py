"""The ``native`` backend of ``lstm``: one compiled operator runs all steps of a layer in all its directions.

On a GPU ``native_cuda`` serves the calls.
"""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.lstm import native_cuda

CPU = "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def forward(
    input: Tensor,  # (T, B, I), or (N, I) with batch_sizes
    h0: Tensor,  # (D, B, H)
    c0: Tensor,  # (D, B, H)
    weights: list[tuple],  # per direction W_ih (4H, I), W_hh (4H, H), b_ih and b_hh (4H,) or None, None
    lengths: Tensor | None,  # (B,) int64
    batch_sizes: Tensor | None,  # (T,) int64, CPU
    reverse: bool,
    need_backward: bool,
    need_cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """-> output (..., D*H), h_n and c_n (D, B, H), cell states like output or None, saved for ``backward``."""
    if input.device.type != CPU:
        return native_cuda.forward(
            input, h0, c0, weights, lengths, batch_sizes, reverse, need_backward, need_cell_states
        )
    output, h_n, c_n, activations, cell_states = _native.operators.lstm_forward.default(
        input.contiguous(),
        h0.contiguous(),
        c0.contiguous(),
        _flat(weights),
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
    grad_h_n: Tensor | None,  # (D, B, H)
    grad_c_n: Tensor | None,  # (D, B, H)
    grad_cell_states: Tensor | None,  # like output
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[tuple],
    saved: tuple[Tensor, ...],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, h0, c0 and, five per direction, the weights; None where not needed."""
    if input.device.type != CPU:
        return native_cuda.backward(
            grad_output, grad_h_n, grad_c_n, grad_cell_states, input, h0, c0, weights, saved, lengths, batch_sizes,
            reverse, needs,
        )  # fmt: skip
    need_input, need_h0, need_c0, *need_weights = needs
    grad_input, grad_h0, grad_c0, grads = _native.operators.lstm_backward.default(
        _contiguous(grad_output),
        _contiguous(grad_h_n),
        _contiguous(grad_c_n),
        _contiguous(grad_cell_states),
        input.contiguous(),
        h0.contiguous(),
        c0.contiguous(),
        _flat(weights),
        *saved,
        _on_cpu(lengths),
        _on_cpu(batch_sizes),
        reverse,
        need_input,
        any(need_weights),
    )
    result = [grad_input if need_input else None, grad_h0 if need_h0 else None, grad_c0 if need_c0 else None]
    for d in range(len(weights)):
        weight_ih, weight_hh, bias = grads[3 * d : 3 * d + 3] if grads else (None, None, None)
        found = (weight_ih, weight_hh, bias, bias, None)
        result += [g if need else None for g, need in zip(found, need_weights[5 * d :], strict=False)]
    return tuple(result)


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCall``) and the way out, or None."""
    if not _native.available():
        return f"lstm: the native backend is missing: {_native.why_not()}"
    if call.device == "cuda":
        return native_cuda.unsupported(call)
    if call.device != CPU:
        return f"lstm: the native backend runs on CPU and CUDA (got {call.device}); use backend='torch' or 'reference'."
    if call.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"lstm: the native backend computes in {names} (got {call.dtype}); use backend='reference'."
    if call.proj_size:
        return (
            f"lstm: the native backend has no projection (proj_size={call.proj_size}); "
            "use backend='torch' or 'reference', or proj_size=0."
        )
    return None


def _flat(weights: list[tuple]) -> list[Tensor]:
    return [w.contiguous() for own in weights for w in own if w is not None]


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


def _check_layer(op: str, input, h0, c0, weights, lengths, batch_sizes) -> tuple:
    """The checks of the compiled operator on shapes and dtypes -> the leading sizes of per-step tensors, D, B, H, I."""
    torch._check(
        lengths is None or batch_sizes is None,
        lambda: f"{op}: lengths and batch_sizes exclude each other, got both",
    )
    rank = 3 if batch_sizes is None else 2
    torch._check(c0.dim() == 3, lambda: f"{op}: c0 must have the shape (D, B, H), got {tuple(c0.shape)}")
    torch._check(
        input.dim() == rank, lambda: f"{op}: input must have {rank} dimensions, got the shape {tuple(input.shape)}"
    )
    (D, B, H), I = c0.shape, input.shape[-1]  # noqa: E741
    torch._check(
        len(weights) in (2 * D, 4 * D), lambda: f"{op}: weights must be 2 or 4 per direction, got {len(weights)}"
    )
    if batch_sizes is None:
        torch._check(
            input.shape[1] == B,
            lambda: f"{op}: the batch of input {tuple(input.shape)} is not that of c0 {tuple(c0.shape)}",
        )
    _check_shape(op, "h0", h0, (D, B, H))
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for k, weight in enumerate(weights):
        which = k % (len(weights) // D)
        _check_shape(op, names[which], weight, shapes[which])
    for name, t in (("h0", h0), ("c0", c0), *((f"weights[{k}]", w) for k, w in enumerate(weights))):
        torch._check(t.dtype == input.dtype, lambda name=name: f"{op}: {name} must have the dtype {input.dtype}")
    return input.shape[:-1], D, B, H, I


def _fake_forward(input, h0, c0, weights, lengths, batch_sizes, reverse, need_activations, need_cell_states):
    rows, D, B, H, _ = _check_layer("lstm_forward", input, h0, c0, weights, lengths, batch_sizes)
    return (
        input.new_empty(*rows, D * H),
        c0.new_empty(D, B, H),
        c0.new_empty(D, B, H),
        input.new_empty((*rows, D * 4 * H) if need_activations else (0,)),
        input.new_empty((*rows, D * H) if need_cell_states else (0,), dtype=_accumulate_dtype(input.dtype)),
    )


def _fake_backward(
    grad_output,
    grad_h_n,
    grad_c_n,
    grad_cell_states,
    input,
    h0,
    c0,
    weights,
    activations,
    cell_states,
    lengths,
    batch_sizes,
    reverse,
    need_input,
    need_weights,
):
    op = "lstm_backward"
    rows, D, B, H, I = _check_layer(op, input, h0, c0, weights, lengths, batch_sizes)  # noqa: E741
    _check_shape(op, "activations", activations, (*rows, D * 4 * H))
    _check_shape(op, "cell_states", cell_states, (*rows, D * H))
    shapes = ((4 * H, I), (4 * H, H), (4 * H,)) * D if need_weights else ()
    return (
        torch.empty_like(input) if need_input else input.new_empty(0),
        c0.new_empty(D, B, H),
        c0.new_empty(D, B, H),
        [input.new_empty(shape) for shape in shapes],
    )


if _native.available():
    torch.library.register_fake("fastseq::lstm_forward", _fake_forward)
    torch.library.register_fake("fastseq::lstm_backward", _fake_backward)
