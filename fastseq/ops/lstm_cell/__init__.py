"""One LSTM cell update: from the gates (``lstm_cell``), or with both products (``lstm_step``)."""

from fastseq.dispatch import register
from fastseq.ops.lstm_cell.api import lstm_cell, lstm_step
from fastseq.ops.lstm_cell.rules import RULES

register("lstm_cell", RULES)

__all__ = ["lstm_cell", "lstm_step"]
