"""fastseq: fast LSTM sequence-to-sequence models with the weights and results of ``nn.LSTM``."""

from fastseq import ops
from fastseq._native import empty_cache
from fastseq.dispatch import explain, use_backend
from fastseq.info import info
from fastseq.nn import LSTM, Attention, LSTMCell, accelerate, restore
from fastseq.seq2seq import Seq2Seq, Seq2SeqConfig, build_seq2seq_model

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "Attention",
    "LSTMCell",
    "Seq2Seq",
    "Seq2SeqConfig",
    "accelerate",
    "build_seq2seq_model",
    "empty_cache",
    "explain",
    "info",
    "ops",
    "restore",
    "use_backend",
]
