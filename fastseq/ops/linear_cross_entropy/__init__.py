"""Output layer, softmax and cross-entropy in one op, without the logits of all rows at once."""

from fastseq.dispatch import register
from fastseq.ops.linear_cross_entropy.api import linear_cross_entropy
from fastseq.ops.linear_cross_entropy.rules import RULES

register("linear_cross_entropy", RULES)

__all__ = ["linear_cross_entropy"]
