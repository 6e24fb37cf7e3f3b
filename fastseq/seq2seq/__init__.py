"""The encoder-decoder: LSTM encoder, attention decoder, and the search for the best output."""

from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq, build_seq2seq_model

__all__ = ["Seq2Seq", "Seq2SeqConfig", "build_seq2seq_model"]
