"""The calls that run a decoder step as one operator; all others go through ``lstm_cell`` and ``attention``."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastseq import _native
from fastseq.dispatch import Choice, explains, note, takes_auto
from fastseq.ops.common.autocast import autocast_enabled
from fastseq.ops.common.autograd import forward_mode, peek_transform, untracked
from fastseq.ops.decoder import native
from fastseq.ops.decoder.spec import DecoderCall

fast_step = native.step_of_any_rows
fast_greedy = native.greedy
DTYPES = (torch.float32, torch.float64)
EXPLAINED = "outside explain one operator runs these steps, unless a submodule is replaced or has hooks"


def one_operator(h: Tensor, backend: str | None) -> bool:
    """True for a step of ``auto`` on the CPU without gradients, in a dtype of the kernels, outside of autocast.

    One sentence at G2P size (H 256) takes 0.37 to 0.45 of the time of the separate ops (Xeon, AVX-512, 1 thread). False
    while ``fastseq.explain`` records, whose hooks see the separate ops: see :func:`explain_steps`.
    """
    return takes_auto(backend) and untracked() and _fits(h)


def one_sequence(h: Tensor, backend: str | None) -> bool:
    """The same for T steps with input feeding, with or without gradients.

    False in traced graphs, forward mode and transforms of torch.func, which differentiate the separate ops.
    """
    return takes_auto(backend) and not (is_compiling() or forward_mode() or peek_transform()) and _fits(h)


def explain_steps(h: Tensor, backend: str | None, steps: int) -> None:
    """Name the operator in the report of ``fastseq.explain``; h (L, N, H)."""
    if explains(backend) and _fits(h):
        call = DecoderCall("cpu", h.dtype, steps, h.shape[1], h.shape[2])
        note(Choice("decoder", call, "native", EXPLAINED, {}))


def _fits(h: Tensor) -> bool:
    return h.is_cpu and h.dtype in DTYPES and not autocast_enabled("cpu") and _native.available()
