"""Attention: scores, softmax over the keys, weighted sum of the values."""

from fastseq.ops.attention.api import attention

__all__ = ["attention"]
