"""The ``native`` backend of ``lstm_cell``: one compiled pass over the gates. Checks and arithmetic: csrc/cpu."""

import torch
from torch import Tensor

from fastseq import _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """gates (N, 4H) pre-activations, order i f g o; c (N, H) -> h (N, H), c_n (N, H), saved for ``backward``."""
    h, c_n, activations = _native.operators.lstm_cell_forward.default(gates.contiguous(), c.contiguous())
    return h, c_n, (activations, c_n)


def backward(
    grad_h: Tensor | None, grad_c_n: Tensor | None, gates: Tensor, c: Tensor, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of the results (N, H), each may be None -> grad_gates (N, 4H), grad_c (N, H)."""
    activations, c_n = saved
    return _native.operators.lstm_cell_backward.default(
        activations, c.contiguous(), c_n, _contiguous(grad_h), _contiguous(grad_c_n)
    )


def step(
    input: Tensor,  # (B, I)
    h: Tensor,  # (B, H)
    c: Tensor,  # (B, H)
    weight_ih: Tensor,  # (4H, I), also bfloat16 beside float32
    weight_hh: Tensor,  # (4H, H), likewise
    bias_ih: Tensor | None,  # (4H,) or (B, 4H)
    bias_hh: Tensor | None,  # (4H,)
) -> tuple[Tensor, Tensor]:
    """Both products and the cell in one pass over the weights, which are read as they are; no gradients -> h, c."""
    return _native.operators.lstm_step.default(
        input.contiguous(),
        h.contiguous(),
        c.contiguous(),
        weight_ih.contiguous(),
        weight_hh.contiguous(),
        bias_ih,
        bias_hh,
    )


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCellCall``) and the way out, or None."""
    if not _native.available():
        return f"lstm_cell: the native backend is missing: {_native.why_not()}"
    missing = _native.why_not_cuda(call.device_index) if call.device == "cuda" else ""
    if missing:
        return f"lstm_cell: the native backend has no CUDA kernels here: {missing}"
    if call.device not in ("cpu", "cuda"):
        return f"lstm_cell: the native backend runs on CPU and CUDA (got {call.device}); use backend='reference'."
    if call.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"lstm_cell: the native backend computes in {names} (got {call.dtype}); use backend='reference'."
    return None


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations and cell states are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(gates, c):
    torch._check(c.dim() == 2, lambda: f"lstm_cell_forward: c must have the shape (B, H), got {tuple(c.shape)}")
    B, H = c.shape
    torch._check(
        gates.dim() == 2 and gates.shape[0] == B and gates.shape[1] == 4 * H,
        lambda: f"lstm_cell_forward: gates must have the shape {(B, 4 * H)}, got {tuple(gates.shape)}",
    )
    torch._check(gates.dtype == c.dtype, lambda: f"lstm_cell_forward: gates must have the dtype {c.dtype}")
    return c.new_empty(B, H), c.new_empty(B, H), c.new_empty(B, 4 * H, dtype=accumulate_dtype(c.dtype))


def _fake_backward(activations, c, c_n, grad_h, grad_c_n):
    torch._check(c.dim() == 2, lambda: f"lstm_cell_backward: c must have the shape (B, H), got {tuple(c.shape)}")
    B, H = c.shape
    return c.new_empty(B, 4 * H), c.new_empty(B, H)


def _fake_step(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    torch._check(c.dim() == 2, lambda: f"lstm_step: c must have the shape (B, H), got {tuple(c.shape)}")
    torch._check(h.shape == c.shape, lambda: f"lstm_step: h must have the shape {tuple(c.shape)}, got {tuple(h.shape)}")
    return torch.empty_like(c), torch.empty_like(c)


if _native.available():
    torch.library.register_fake("fastseq::lstm_step", _fake_step)
    torch.library.register_fake("fastseq::lstm_cell_forward", _fake_forward)
    torch.library.register_fake("fastseq::lstm_cell_backward", _fake_backward)
