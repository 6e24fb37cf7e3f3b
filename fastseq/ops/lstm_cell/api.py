"""The public LSTM cell op."""

import torch
from torch import Tensor

from fastseq.dispatch import LSTMCellCall, select
from fastseq.ops.lstm_cell.function import apply


def lstm_cell(gates: Tensor, c: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """One LSTM cell update from the gates' pre-activations (Gers et al. 2000; the notation of ``torch.nn.LSTMCell``).

    ``c_n = sigmoid(f) * c + sigmoid(i) * tanh(g)``, ``h = sigmoid(o) * tanh(c_n)``, computed in float32 at least.

    Args:
        gates: (..., 4H), ``x W_ih^T + b_ih + h W_hh^T + b_hh``, in the order i, f, g, o.
        c: (..., H), the cell state before the step. If its dtype differs from that of ``gates`` (autocast), the wider
            one is used.
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        h (..., H) and c_n (..., H), in the dtype of the inputs.

    Raises:
        RuntimeError: shapes or devices do not fit; or the backend asked for cannot serve this call.
        ValueError: unknown backend name.
    """
    if gates.shape[:-1] != c.shape[:-1] or gates.dim() == 0 or gates.size(-1) != 4 * c.size(-1):
        raise RuntimeError(
            f"lstm_cell: gates must have shape (..., 4H) for a cell state of shape (..., H), "
            f"got gates {tuple(gates.shape)} and c {tuple(c.shape)}"
        )
    if not (gates.is_floating_point() and c.is_floating_point()):
        raise RuntimeError(f"lstm_cell: gates and c must be floating point, got {gates.dtype} and {c.dtype}")
    if gates.device != c.device:
        raise RuntimeError(f"lstm_cell: gates are on {gates.device}, c is on {c.device}; move them to one device")
    dtype = torch.promote_types(gates.dtype, c.dtype)
    gates, c = gates.to(dtype), c.to(dtype)
    call = LSTMCellCall(
        device=gates.device.type,
        dtype=dtype,
        hidden_size=c.size(-1),
        requires_grad=torch.is_grad_enabled() and (gates.requires_grad or c.requires_grad),
        compiling=torch.compiler.is_compiling(),
        device_index=gates.device.index,
    )
    chosen = select("lstm_cell", backend, call)
    h, c_n = apply(chosen, gates.reshape(-1, gates.size(-1)), c.reshape(-1, c.size(-1)))
    return h.view(c.shape), c_n.view(c.shape)
