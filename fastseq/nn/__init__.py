"""The modules: parameters live here, and nothing else does."""

from fastseq.nn.accelerate import accelerate, restore
from fastseq.nn.attention import Attention
from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell

__all__ = ["LSTM", "Attention", "LSTMCell", "accelerate", "restore"]
