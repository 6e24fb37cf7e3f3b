"""The best continuations of each sentence in one pass over the logits: log-sum-exp and top-k together."""

from fastseq.dispatch import register
from fastseq.ops.candidates.api import candidates
from fastseq.ops.candidates.rules import RULES

register("candidates", RULES)

__all__ = ["candidates"]
