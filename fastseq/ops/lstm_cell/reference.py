"""The LSTM cell in plain torch: the definition of right, and its backward by hand.

Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; gate order i, f, g, o as in ``torch.nn.LSTM``.
"""

import torch
from torch import Tensor


def unsupported(call) -> str | None:
    return None


def forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """gates (N, 4H), c (N, H) -> h (N, H), c_n (N, H), saved. Differentiable; computed in float32 at least."""
    acc = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = gates.to(acc).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_n = f * c.to(acc) + i * g
    h = o * c_n.tanh()
    return h.to(c.dtype), c_n.to(c.dtype), (torch.cat((i, f, g, o), dim=-1), c_n)


def backward(
    grad_h: Tensor | None, grad_c_n: Tensor | None, gates: Tensor, c: Tensor, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward``: grad_gates (N, 4H), grad_c (N, H)."""
    activations, c_n = saved
    i, f, g, o = activations.chunk(4, dim=-1)
    tanh_c = c_n.tanh()
    dh = torch.zeros_like(c_n) if grad_h is None else grad_h.to(c_n.dtype)
    dc = dh * o * (1 - tanh_c * tanh_c)
    if grad_c_n is not None:
        dc = dc + grad_c_n
    di = dc * g * i * (1 - i)
    df = dc * c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return torch.cat((di, df, dg, do), dim=-1).to(gates.dtype), (dc * f).to(c.dtype)
