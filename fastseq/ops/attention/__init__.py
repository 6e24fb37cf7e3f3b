"""Attention: scores, softmax over the keys, weighted sum of the values."""

from fastseq.dispatch import register
from fastseq.ops.attention.api import attention
from fastseq.ops.attention.rules import RULES

register("attention", RULES)

__all__ = ["attention"]
