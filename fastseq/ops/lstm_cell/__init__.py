"""One LSTM cell update."""

from fastseq.ops.lstm_cell.api import lstm_cell
from fastseq.ops.lstm_cell.step import lstm_step

__all__ = ["lstm_cell", "lstm_step"]
