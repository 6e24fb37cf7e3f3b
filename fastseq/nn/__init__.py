"""Modules: they hold parameters and options; state and caches live elsewhere."""

from fastseq.nn.accelerate import accelerate, restore
from fastseq.nn.attention import Attention
from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell

__all__ = ["LSTM", "Attention", "LSTMCell", "accelerate", "restore"]
