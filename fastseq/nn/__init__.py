"""The modules: parameters live here, and nothing else does."""

from fastseq.nn.accelerate import accelerate, restore
from fastseq.nn.attention import Attention
from fastseq.nn.rnn import LSTM, LSTMCell
from fastseq.nn.seq2seq import Seq2Seq, Seq2SeqConfig, build_seq2seq_model

__all__ = ["LSTM", "Attention", "LSTMCell", "Seq2Seq", "Seq2SeqConfig", "accelerate", "build_seq2seq_model", "restore"]
