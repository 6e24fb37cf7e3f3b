"""The public candidates op."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import implementation, select
from fastseq.ops.candidates.rules import fast_candidates
from fastseq.ops.candidates.spec import Candidates, CandidatesCall, Rows, forbidden_mask
from fastseq.ops.common.dtypes import accumulate_dtype

__all__ = ["candidates", "forbidden_mask"]


def candidates(
    logits: Tensor,
    count: int,
    scores: Tensor | None = None,
    *,
    forbidden: Tensor | None = None,
    last_resort: int | None = None,
    backend: str | None = None,
) -> Candidates:
    """The best continuations of each sentence: the ``count`` largest of ``scores + log_softmax(logits)``, best first.

    One step of greedy decoding (``count=1``) or of beam search (``count=2 * K``), without gradient. Totals are rounded
    to their dtype before they are compared; of equal ones the lowest (beam, token) comes first (backend torch: only
    where ``count`` and K are 1). NaN ranks above all numbers.

    Args:
        logits: (B * K, V), the rows of a sentence side by side.
        count: number of candidates, C. Places past the K * V continuations hold -inf, beam 0, token 0.
        scores: (B, K) log-probability of each beam, float32 (float64 for float64 logits). None: each row is a sentence
            of its own with the score 0, K = 1.
        forbidden: columns that count as -inf, int64: (F,) for all rows, or (B * K, F). They stay in the softmax. Values
            outside 0..V-1 forbid nothing.
        last_resort: a column that is allowed in a row where every column is forbidden.
        backend: "auto" (None), "reference", "torch" or "native".

    Returns:
        Candidates: totals (B, C) in float32 at least, beams and tokens (B, C) int64.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; a gradient is requested; or the requested backend cannot
            serve this call.
        ValueError: unknown backend name.
    """
    last = -1 if last_resort is None else last_resort
    if backend is None:
        result = fast_candidates(logits, count, scores, forbidden, last)
        if result is not None:
            return result
    _check(logits, count, scores, forbidden)
    compiling = torch.compiler.is_compiling()
    call = CandidatesCall(_native.device_of(logits), logits.dtype, count, compiling, logits.device.index)
    return implementation("candidates", select("candidates", backend, call)).run(
        Rows(logits, scores, forbidden, last, count)
    )


def _check(logits: Tensor, count: int, scores: Tensor | None, forbidden: Tensor | None) -> None:
    """RuntimeError for arguments that do not fit. csrc checks the arguments of the fast path."""
    if logits.dim() != 2 or not logits.is_floating_point() or logits.size(1) == 0:
        raise RuntimeError(
            f"candidates: logits must be floating point (B * K, V), V >= 1, got {tuple(logits.shape)} {logits.dtype}"
        )
    if count < 1:
        raise RuntimeError(f"candidates: count must be at least 1, got {count}")
    wide = accumulate_dtype(logits.dtype)
    if scores is not None and (scores.dim() != 2 or scores.numel() != logits.size(0) or scores.dtype != wide):
        raise RuntimeError(
            f"candidates: scores must be {wide} (B, K) with B * K = {logits.size(0)}, "
            f"got {tuple(scores.shape)} {scores.dtype}"
        )
    rows = None if forbidden is None else forbidden.shape[:-1]
    if forbidden is not None and (rows not in ((), (logits.size(0),)) or forbidden.dtype != torch.int64):
        raise RuntimeError(
            f"candidates: forbidden must be int64 (F,) or ({logits.size(0)}, F), "
            f"got {tuple(forbidden.shape)} {forbidden.dtype}"
        )
    if any(t is not None and t.device != logits.device for t in (scores, forbidden)):
        raise RuntimeError(f"candidates: logits are on {logits.device}; move scores and forbidden to that device")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (logits, scores)):
        raise RuntimeError("candidates: has no gradient; call it under torch.no_grad()")
