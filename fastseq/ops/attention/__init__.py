"""Attention: scores, softmax over the keys, weighted sum of the values."""

from fastseq.ops.attention.api import PreparedKeys, attention, prepare_keys

__all__ = ["PreparedKeys", "attention", "prepare_keys"]
