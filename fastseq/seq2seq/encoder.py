"""The source side of Seq2Seq: the encoder, and the bridge from its final states to the decoder's first ones."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.nn.lstm import LSTM
from fastseq.ops.attention.api import Keys
from fastseq.seq2seq.config import Seq2SeqConfig


class EncoderOutput(NamedTuple):
    """All results that depend on the sources alone: immutable, computed once per batch."""

    memory: Tensor  # (B, S, D) encoder outputs, 0 past the length
    keys: Keys | None  # (B, S, A) projected for the attention, opaque; None without attention
    lengths: Tensor  # (B,) int64
    h: Tensor  # (L, B, H) first hidden state of each decoder layer
    c: Tensor  # (L, B, H) first cell state of each decoder layer

    def index_select(self, rows: Tensor) -> "EncoderOutput":
        """The sentences ``rows`` (N,), in that order, repeats allowed."""
        return EncoderOutput(
            self.memory.index_select(0, rows),
            None if self.keys is None else self.keys.index_select(rows),
            self.lengths.index_select(0, rows),
            self.h.index_select(1, rows),
            self.c.index_select(1, rows),
        )

    def repeat_interleave(self, k: int) -> "EncoderOutput":
        """Each sentence k times in a row: 0 0 1 1 2 2 for k = 2."""
        return EncoderOutput(
            self.memory.repeat_interleave(k, 0),
            None if self.keys is None else self.keys.repeat_interleave(k),
            self.lengths.repeat_interleave(k, 0),
            self.h.repeat_interleave(k, 1),
            self.c.repeat_interleave(k, 1),
        )


class Encoder(nn.Module):
    """Embedding (unless the source is features) and a stacked LSTM."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        directions = 2 if config.bidirectional else 1
        self.embedding = None if config.src_vocab_size is None else embedding(config.src_vocab_size, config)
        self.embed_dropout = nn.Dropout(config.dropout if config.embed_dropout is None else config.embed_dropout)
        self.lstm = LSTM(
            config.source_features if self.embedding is None else config.embedding_dim,
            config.hidden_size // directions,
            num_layers=config.encoder_layers,
            batch_first=True,
            dropout=config.dropout if config.encoder_layers > 1 else 0.0,
            bidirectional=config.bidirectional,
            backend=config.backend,
        )

    def forward(self, src: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """src (B, S) tokens or (B, S, F) features -> memory (B, S, D), final h and c of each layer (layers, B, D)."""
        x = src if self.embedding is None else self.embed_dropout(self.embedding(src))
        memory, (h, c) = self.lstm(x, lengths=lengths)
        if self.lstm.bidirectional:  # (layers * 2, B, D / 2): forward and backward of a layer side by side
            h, c = torch.cat((h[0::2], h[1::2]), -1), torch.cat((c[0::2], c[1::2]), -1)
        return memory, h, c


class Bridge(nn.Module):
    """From the encoder's final states (encoder_layers, B, H) to the decoder's first ones (decoder_layers, B, H)."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.kind = config.bridge
        self.layers = config.decoder_layers
        if self.kind == "linear":
            inner, outer = config.encoder_layers * config.hidden_size, config.decoder_layers * config.hidden_size
            self.h_proj, self.c_proj = nn.Linear(inner, outer), nn.Linear(inner, outer)
            self.activation = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "none": nn.Identity()}[config.bridge_activation]

    def extra_repr(self) -> str:
        return repr(self.kind)

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "concat":
            return h, c
        if self.kind == "zeros":
            zeros = h.new_zeros(self.layers, h.size(1), h.size(2))
            return zeros, zeros
        return self._map(self.h_proj, h), self._map(self.c_proj, c)

    def _map(self, proj: nn.Linear, state: Tensor) -> Tensor:
        """(encoder_layers, B, H) -> (B, encoder_layers * H) -> (B, decoder_layers * H) -> (decoder_layers, B, H)."""
        flat = state.transpose(0, 1).flatten(1)
        return self.activation(proj(flat)).unflatten(1, (self.layers, -1)).transpose(0, 1)


def embedding(vocab_size: int, config: Seq2SeqConfig) -> nn.Embedding:
    """Token embeddings, N(0, 1) as ``nn.Embedding``; N(0, 1/dim) where the matrix is the output projection as well."""
    module = nn.Embedding(vocab_size, config.embedding_dim, padding_idx=config.pad_id)
    if config.tied:
        nn.init.normal_(module.weight, std=config.embedding_dim**-0.5)
        nn.init.zeros_(module.weight.data[config.pad_id])
    return module
