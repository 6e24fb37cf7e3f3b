"""The candidates op in plain torch, by a stable sort: the definition of the op."""

import torch
import torch.nn.functional as F

from fastseq.ops.candidates.spec import Candidates, Rows
from fastseq.ops.common.dtypes import accumulate_dtype


def unsupported(call) -> str | None:
    """None: the reference serves every call."""
    return None


def run(rows: Rows) -> Candidates:
    """Sort all continuations of each sentence."""
    log_probs = rows.logits.log_softmax(-1, dtype=accumulate_dtype(rows.logits.dtype))  # (N, V)
    mask = rows.mask()
    if mask is not None:
        log_probs = log_probs.masked_fill(mask, float("-inf"))
    scores = log_probs.new_zeros(log_probs.size(0), 1) if rows.scores is None else rows.scores
    totals = (scores.unsqueeze(2) + log_probs.view(*scores.shape, -1)).flatten(1)  # (B, K * V)
    best, flat = (t[:, : rows.count] for t in torch.sort(totals, dim=1, descending=True, stable=True))
    free = (0, rows.count - best.size(1))
    best, flat = F.pad(best, free, value=float("-inf")), F.pad(flat, free)
    return Candidates(best, flat // log_probs.size(1), flat % log_probs.size(1))
