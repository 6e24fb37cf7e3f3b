"""One LSTM cell update."""

from fastseq.ops.lstm_cell.api import lstm_cell

__all__ = ["lstm_cell"]
