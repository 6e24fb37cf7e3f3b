"""One LSTM layer and direction over a whole sequence."""

from fastseq.dispatch import register
from fastseq.ops.lstm.api import lstm
from fastseq.ops.lstm.rules import RULES

register("lstm", RULES)

__all__ = ["lstm"]
