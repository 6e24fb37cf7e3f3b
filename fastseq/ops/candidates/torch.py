"""The ``torch`` backend of ``candidates``: log_softmax, then argmax or topk, which orders equals in no stated way."""

import torch
import torch.nn.functional as F

from fastseq.ops.candidates.spec import Candidates, Rows
from fastseq.ops.common.dtypes import accumulate_dtype


def unsupported(call) -> str | None:
    """None: torch serves every call."""
    return None


def run(rows: Rows) -> Candidates:
    """The best continuations; one candidate of one beam by argmax, which takes the first of equals."""
    log_probs = rows.logits.log_softmax(-1, dtype=accumulate_dtype(rows.logits.dtype))  # (N, V)
    mask = rows.mask()
    if mask is not None:
        log_probs.masked_fill_(mask, float("-inf"))
    if rows.count == 1 and (rows.scores is None or rows.scores.size(1) == 1):
        tokens = log_probs.argmax(1, keepdim=True)
        totals = log_probs.gather(1, tokens)
        return Candidates(totals if rows.scores is None else totals + rows.scores, torch.zeros_like(tokens), tokens)
    if rows.scores is not None:
        log_probs = (rows.scores.unsqueeze(2) + log_probs.view(*rows.scores.shape, -1)).flatten(1)  # (B, K * V)
    best, flat = log_probs.topk(min(rows.count, log_probs.size(1)))
    if best.size(1) < rows.count:
        free = (0, rows.count - best.size(1))
        best, flat = F.pad(best, free, value=float("-inf")), F.pad(flat, free)
    return Candidates(best, flat // rows.logits.size(1), flat % rows.logits.size(1))
