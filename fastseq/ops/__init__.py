"""The ops below the modules: one folder each, with the public function in its ``api.py``."""

from fastseq.ops.attention import attention
from fastseq.ops.candidates import candidates
from fastseq.ops.linear_cross_entropy import linear_cross_entropy
from fastseq.ops.lstm import lstm
from fastseq.ops.lstm_cell import lstm_cell, lstm_step
from fastseq.ops.lstm_variant import lstm_variant

__all__ = ["attention", "candidates", "linear_cross_entropy", "lstm", "lstm_cell", "lstm_step", "lstm_variant"]
