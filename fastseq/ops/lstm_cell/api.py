"""The public LSTM cell ops, and the path of one step of ``fastseq.LSTMCell``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import implementation, select, takes_auto
from fastseq.ops.common.autograd import peek_transform, vmapped
from fastseq.ops.common.narrow import Narrow
from fastseq.ops.lstm_cell.function import apply
from fastseq.ops.lstm_cell.rules import fast_update
from fastseq.ops.lstm_cell.spec import Cell, LSTMCellCall


def lstm_cell(gates: Tensor, c: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """One LSTM cell update from the gates' pre-activations (Gers et al. 2000; the notation of ``torch.nn.LSTMCell``).

    ``c_n = sigmoid(f) * c + sigmoid(i) * tanh(g)``, ``h = sigmoid(o) * tanh(c_n)``, computed in float32 at least.

    Args:
        gates: (..., 4H), ``x W_ih^T + b_ih + h W_hh^T + b_hh``, in the order i, f, g, o.
        c: (..., H), the cell state before the step. If its dtype differs from the gates' (autocast), the wider one is
            used.
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        h (..., H) and c_n (..., H), in the dtype of the inputs.

    Raises:
        RuntimeError: shapes or devices do not fit; or the requested backend cannot serve this call.
        ValueError: unknown backend name.
    """
    if takes_auto(backend):
        result = fast_update(gates, c)
        if result is not None:
            return result
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
        device=_native.device_of(gates),
        dtype=dtype,
        hidden_size=c.size(-1),
        requires_grad=torch.is_grad_enabled() and (gates.requires_grad or c.requires_grad),
        compiling=torch.compiler.is_compiling(),
        device_index=gates.device.index,
    )
    chosen = select("lstm_cell", backend, call)
    h, c_n = apply(chosen, Cell(gates.reshape(-1, gates.size(-1)), c.reshape(-1, c.size(-1))))
    return h.view(c.shape), c_n.view(c.shape)


def lstm_step(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of ``torch.nn.LSTMCell`` for inference, by the compiled kernel of the tensors' device.

    A step of one sequence is bound by the bytes of its weights. ``weight_ih`` and ``weight_hh`` in bfloat16 beside
    float32 for everything else halve them. Only the weights are rounded then (relative error up to 2 ** -8 each); sums
    and states stay float32.

    Args:
        input: (B, I).
        hx: h and c, (B, H) each.
        weight_ih: (4H, I). weight_hh: (4H, H). Gate order i, f, g, o.
        bias_ih: (4H,), or (B, 4H) for a part of the gates that differs from row to row. bias_hh: (4H,).

    Returns:
        The next h and c, (B, H).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; a gradient is requested; the compiled library is missing.
    """
    if not _native.available():
        raise RuntimeError(f"lstm_step: {_native.why_not()}")
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *hx, *weights)):
        raise RuntimeError("lstm_step: has no gradient; call it under torch.no_grad(), or use fastseq.LSTMCell")
    return implementation("lstm_cell", "native").step(input, hx, weights)


def run(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, ...],
    *,
    backend: str | None,
    check: Callable[[Tensor, Tensor, Tensor], None],
    narrow: Callable[[], tuple[Narrow, Narrow]] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of LSTMCell: both products and the cell.

    Args:
        input: (B, I). hx: h and c, (B, H) each.
        weights: weight_ih (4H, I), weight_hh (4H, H), bias_ih and bias_hh (4H,) or None.
        check: raises if input, h and c do not fit; not called for torch's cell, which checks them.
        narrow: returns rounded copies of weight_ih and weight_hh, for a kernel that reads them beside float32.

    Returns:
        The next h and c, (B, H).
    """
    (h, c), compiling = hx, torch.compiler.is_compiling()
    requires_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, input, h, c))
    facts = (_native.device_of(input), c.dtype, c.size(-1), True, requires_grad, compiling)
    call = LSTMCellCall(*facts, None if compiling else input.size(0), input.device.index)
    chosen = select("lstm_cell", backend, call)
    module = implementation("lstm_cell", chosen)
    if hasattr(module, "run_step") and not vmapped():  # torch has no batching rule for its cell
        return module.run_step(input, hx, weights)
    check(input, h, c)
    if (
        hasattr(module, "step")
        and not (requires_grad or compiling or peek_transform())
        and input.dtype == h.dtype == c.dtype == weights[0].dtype
    ):
        return (
            module.step(input, hx, weights) if narrow is None else module.step_narrow(input, hx, narrow(), weights[2:])
        )
    gates = F.linear(input, *weights[::2]) + F.linear(h, *weights[1::2])
    dtype = torch.promote_types(gates.dtype, c.dtype)  # under autocast the gates may be narrower than the state
    return apply(chosen, Cell(gates.to(dtype), c.to(dtype)))
