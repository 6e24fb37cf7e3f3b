"""Attention: scores, softmax over the keys, weighted sum of the values."""

from fastseq.dispatch import register
from fastseq.ops.attention.api import PreparedKeys, attention, prepare_keys
from fastseq.ops.attention.rules import RULES

register("attention", RULES)

__all__ = ["PreparedKeys", "attention", "prepare_keys"]
