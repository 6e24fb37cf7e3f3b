"""One LSTM layer and direction over a whole sequence."""

from fastseq.ops.lstm.api import lstm

__all__ = ["lstm"]
