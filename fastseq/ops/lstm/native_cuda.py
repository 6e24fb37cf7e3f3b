"""The ``native`` backend of ``lstm`` on a GPU: the recurrence of a layer, all steps and directions, is one kernel.

torch multiplies by W_ih before it and makes the weight gradients after it, each in one product over all steps.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.ops.common import layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRACED_HIDDEN_SIZE = 512


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
    if batch_sizes is not None:
        input, lengths = layout.pad(input, batch_sizes)
    gates = F.linear(input.contiguous(), _rows([w[0] for w in weights]), _bias(weights))  # (T, B, D * 4H)
    output, h_n, c_n, activations, cell_states = _forward(
        gates,
        h0.contiguous(),
        c0.contiguous(),
        torch.stack([w[1] for w in weights]),
        _lengths(lengths, input),
        reverse,
        tf32_allowed(),
        need_backward,
        need_backward or need_cell_states,
    )
    saved = (activations, cell_states) if need_backward else ()
    wanted_states = cell_states.to(input.dtype, copy=True) if need_cell_states else None  # saved ones stay the op's own
    if wanted_states is not None and lengths is not None:
        wanted_states = layout.zero_padding(wanted_states, lengths)  # the kernel writes none past the lengths
    if batch_sizes is not None:
        output = layout.pack(output, batch_sizes)
        wanted_states = layout.pack(wanted_states, batch_sizes) if need_cell_states else None
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
    need_input, need_h0, need_c0, *need_weights = needs
    activations, cell_states = saved
    if batch_sizes is not None:
        input, lengths = layout.pad(input, batch_sizes)
        grad_output, grad_cell_states = (
            g if g is None else layout.pad(g, batch_sizes)[0] for g in (grad_output, grad_cell_states)
        )
    elif lengths is not None:
        input = layout.zero_padding(input, lengths)
    grads = (_contiguous(g) for g in (grad_output, grad_h_n, grad_c_n, grad_cell_states))
    weight_hh, lengths = torch.stack([w[1] for w in weights]), _lengths(lengths, input)
    grad_gates, grad_h0, grad_c0 = _backward(
        *grads, activations, cell_states, c0.contiguous(), weight_hh, lengths, reverse, tf32_allowed()
    )
    grad_input = grad_gates @ _rows([w[0] for w in weights]) if need_input else None
    if need_input and batch_sizes is not None:
        grad_input = layout.pack(grad_input, batch_sizes)
    result = [grad_input, grad_h0 if need_h0 else None, grad_c0 if need_c0 else None]
    for d, rows in enumerate(grad_gates.chunk(len(weights), -1)):  # (T, B, 4H)
        own = need_weights[5 * d : 5 * d + 5]
        before = None
        if own[1]:
            saved = (t.chunk(len(weights), -1)[d] for t in (activations, cell_states))
            before = layout.hidden_before(*saved, h0[d], lengths, reverse or d == 1)
        result += _weight_gradients(rows, input, before, own)
    return tuple(result)


def _weight_gradients(grad_gates: Tensor, input: Tensor, before: Tensor | None, needs) -> list[Tensor | None]:
    """grad_gates (T, B, 4H), input (T, B, I), h before each step (T, B, H) where it is needed -> five gradients."""
    rows = grad_gates.flatten(0, 1)  # (T * B, 4H)
    bias = rows.sum(0) if needs[2] or needs[3] else None
    return [
        rows.T @ input.flatten(0, 1) if needs[0] else None,
        rows.T @ before.flatten(0, 1) if needs[1] else None,
        bias if needs[2] else None,
        bias if needs[3] else None,
        None,
    ]


def _forward(gates, h0, c0, weight_hh, lengths, reverse, *options):
    """The operator; where the device cannot keep the weights of both directions, one direction after the other."""
    run = _native.operators.lstm_recurrence_forward.default
    if _at_once(c0):
        return run(gates, h0, c0, weight_hh, lengths, reverse, *options)
    found = [
        run(own.contiguous(), h0[d : d + 1], c0[d : d + 1], weight_hh[d : d + 1], lengths, d == 1, *options)
        for d, own in enumerate(gates.chunk(2, -1))
    ]
    output, h_n, c_n, activations, cell_states = zip(*found, strict=True)
    return (
        torch.cat(output, -1), torch.cat(h_n), torch.cat(c_n), torch.cat(activations, -1), torch.cat(cell_states, -1)
    )  # fmt: skip


def _backward(
    grad_output, grad_h_n, grad_c_n, grad_cell_states, activations, cell_states, c0, weight_hh, lengths, reverse, tf32
):
    """The operator, likewise."""
    run = _native.operators.lstm_recurrence_backward.default
    grads = (grad_output, grad_h_n, grad_c_n, grad_cell_states)
    if _at_once(c0):
        return run(*grads, activations, cell_states, c0, weight_hh, lengths, reverse, tf32)
    columns = (grad_output, grad_cell_states, activations, cell_states)
    found = []
    for d in range(2):
        output, cells, acts, states = (_contiguous(t if t is None else t.chunk(2, -1)[d]) for t in columns)
        h, c = (t if t is None else t[d : d + 1] for t in (grad_h_n, grad_c_n))
        found.append(run(output, h, c, cells, acts, states, c0[d : d + 1], weight_hh[d : d + 1], lengths, d == 1, tf32))
    grad_gates, grad_h0, grad_c0 = zip(*found, strict=True)
    return torch.cat(grad_gates, -1), torch.cat(grad_h0), torch.cat(grad_c0)


def _at_once(c0: Tensor) -> bool:
    directions, batch, hidden_size = c0.shape
    if directions == 1 or torch.compiler.is_compiling():
        return True
    return fits(batch, hidden_size, c0.dtype, directions, index=c0.device.index)


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCall`` on CUDA) and the way out, or None."""
    missing = _native.why_not_cuda(call.device_index)
    if missing:
        return f"lstm: the native backend has no CUDA kernels here: {missing}"
    if call.dtype not in DTYPES:
        return (
            f"lstm: the native backend computes in float32, bfloat16 and float16 on CUDA (got {call.dtype}); "
            "use backend='torch'."
        )
    if call.proj_size:
        return f"lstm: the native backend has no projection (proj_size={call.proj_size}); use backend='torch'."
    if call.compiling:  # what fits is not asked while a graph is traced: what an A100 or a Hopper has room for
        if call.hidden_size > TRACED_HIDDEN_SIZE:
            return (
                f"lstm: the native backend is traced up to hidden_size={TRACED_HIDDEN_SIZE} on CUDA "
                f"(got {call.hidden_size}); use backend='torch' or 'triton'."
            )
    elif not fits(call.batch or 1, call.hidden_size, call.dtype, index=call.device_index):
        return (
            f"lstm: no CUDA kernel keeps the weights of hidden_size={call.hidden_size} in {call.dtype} on the device "
            f"for a batch of {call.batch}; use backend='torch' or 'triton'."
        )
    return None


def fits(batch: int, hidden_size: int, dtype: torch.dtype, directions: int = 1, index: int | None = None) -> bool:
    """Whether the GPU of this index, or the current one, can run forward and backward of such a recurrence."""
    with contextlib.nullcontext() if index is None else torch.cuda.device(index):
        return _native.operators.lstm_recurrence_fits(batch, directions, hidden_size, dtype.itemsize, tf32_allowed())


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN's RNNs round float32 products to TF32 (``torch.backends.cudnn.allow_tf32``, true there).

    ``torch.backends.cudnn.rnn.fp32_precision`` says the same in torch's newer interface.
    """
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


def _rows(matrices: list[Tensor]) -> Tensor:
    """Those of all directions below each other."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _bias(weights: list[tuple]) -> Tensor | None:
    """(D * 4H,) or None."""
    return None if weights[0][2] is None else _rows([w[2] + w[3] for w in weights])


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _lengths(lengths: Tensor | None, like: Tensor) -> Tensor | None:
    return None if lengths is None else lengths.to(like.device, torch.int64).contiguous()


def _fake_forward(gates, h0, c0, weight_hh, lengths, reverse, tf32, need_activations, need_cell_states):
    op = "lstm_recurrence_forward"
    torch._check(c0.dim() == 3, lambda: f"{op}: c0 must have the shape (D, B, H), got {tuple(c0.shape)}")
    torch._check(gates.dim() == 3, lambda: f"{op}: gates must have the shape (T, B, D * 4H), got {tuple(gates.shape)}")
    D, B, H = c0.shape
    T = gates.shape[0]
    torch._check(
        gates.shape[1] == B and gates.shape[2] == D * 4 * H,
        lambda: f"{op}: gates must have the shape {(T, B, D * 4 * H)}, got {tuple(gates.shape)}",
    )
    torch._check(
        tuple(weight_hh.shape) == (D, 4 * H, H),
        lambda: f"{op}: weight_hh must have the shape {(D, 4 * H, H)}, got {tuple(weight_hh.shape)}",
    )
    return (
        gates.new_empty(T, B, D * H),
        c0.new_empty(D, B, H),
        c0.new_empty(D, B, H),
        gates.new_empty((T, B, D * 4 * H) if need_activations else (0,)),
        gates.new_empty((T, B, D * H) if need_cell_states else (0,), dtype=torch.float32),
    )


def _fake_backward(
    grad_output, grad_h_n, grad_c_n, grad_cell_states, activations, cell_states, c0, weight_hh, lengths, reverse, tf32
):
    return torch.empty_like(activations), torch.empty_like(c0), torch.empty_like(c0)


def register_fakes(library: str) -> None:
    """What torch.compile needs to know of the operators: the shapes of their results."""
    torch.library.register_fake(f"{library}::lstm_recurrence_forward", _fake_forward)
    torch.library.register_fake(f"{library}::lstm_recurrence_backward", _fake_backward)


if _native.available():
    register_fakes("fastseq")
