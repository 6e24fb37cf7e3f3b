"""The ``native`` backend of ``candidates``: no (N, V) result is written. CPU only.

csrc checks the arguments.
"""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.candidates.spec import Candidates, Rows
from fastseq.ops.common.checks import CPU_DTYPES, native_objection
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import contiguous


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (a ``CandidatesCall``) and the way out, or None."""
    if call.device != "cpu":
        return f"candidates: the native backend runs on the CPU (got {call.device}); use backend='torch'."
    return native_objection("candidates", call, CPU_DTYPES)


def run(rows: Rows) -> Candidates:
    """One pass over the logits; the rows of a sentence share one list of the best."""
    return call(rows.logits, rows.scores, rows.forbidden, rows.last_resort, rows.count)


def call(logits: Tensor, scores: Tensor | None, forbidden: Tensor | None, last_resort: int, count: int) -> Candidates:
    """``run`` for the arguments as they are: the fields of ``Rows``."""
    logits, scores, forbidden = logits.contiguous(), contiguous(scores), contiguous(forbidden)
    return Candidates(*_native.operators.candidates.default(logits, scores, forbidden, last_resort, count))


def _fake_candidates(logits, scores, forbidden, last_resort, count):
    B = logits.size(0) if scores is None else scores.size(0)
    totals = logits.new_empty(B, count, dtype=accumulate_dtype(logits.dtype))
    return totals, *(logits.new_empty(B, count, dtype=torch.int64) for _ in range(2))


if _native.available():
    torch.library.register_fake("fastseq::candidates", _fake_candidates)
