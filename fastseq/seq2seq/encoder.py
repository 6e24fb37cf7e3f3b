"""The source side of Seq2Seq: the encoder, and the bridge from its final states to the decoder's first ones."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.nn.lstm import LSTM
from fastseq.ops.attention.api import Keys
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.copying import Copies


class EncoderOutput(NamedTuple):
    """All results that depend on the sources alone: immutable, computed once per batch."""

    memory: Tensor  # (B, S, D) encoder outputs, 0 past the length
    keys: Keys | None  # (B, S, A) projected for the attention, opaque; None without attention
    lengths: Tensor  # (B,) int64
    h: Tensor  # (L, B, H) first hidden state of each decoder layer
    c: Tensor  # (L, B, H) first cell state of each decoder layer
    copies: Copies | None = None  # the tokens that positions can be copied to, with ``copy``

    def index_select(self, rows: Tensor) -> "EncoderOutput":
        """The sentences ``rows`` (N,), in that order, repeats allowed."""
        return EncoderOutput(
            self.memory.index_select(0, rows),
            None if self.keys is None else self.keys.index_select(rows),
            self.lengths.index_select(0, rows),
            self.h.index_select(1, rows),
            self.c.index_select(1, rows),
            None if self.copies is None else self.copies.index_select(rows),
        )

    def repeat_interleave(self, k: int) -> "EncoderOutput":
        """Each sentence k times in a row: 0 0 1 1 2 2 for k = 2."""
        return EncoderOutput(
            self.memory.repeat_interleave(k, 0),
            None if self.keys is None else self.keys.repeat_interleave(k),
            self.lengths.repeat_interleave(k, 0),
            self.h.repeat_interleave(k, 1),
            self.c.repeat_interleave(k, 1),
            None if self.copies is None else self.copies.repeat_interleave(k),
        )


class Encoder(nn.Module):
    """Embedding (unless the source is features) and a stacked LSTM, which may read several positions as one.

    With ``pyramid`` each layer above the first is an LSTM of its own, on pairs of the outputs of the layer below.
    """

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.embedding = None if config.src_vocab_size is None else embedding(config.src_vocab_size, config)
        self.tag_embedding = None if config.tag_vocab_size is None else embedding(config.tag_vocab_size, config)
        self.embed_dropout = nn.Dropout(config.dropout if config.embed_dropout is None else config.embed_dropout)
        self.frame_stack = config.frame_stack
        width = config.source_features if self.embedding is None else config.embedding_dim
        above = config.encoder_layers - 1 if config.pyramid else 0
        self.lstm = _lstm(config, width * config.frame_stack, config.encoder_layers - above)
        self.dropout = nn.Dropout(config.dropout)
        self.upper = nn.ModuleList(_lstm(config, 2 * config.hidden_size, 1) for _ in range(above))

    def vectors(self, src: Tensor) -> Tensor:
        """The embeddings (B, S, E) of src, summed with the ones of its tags, without dropout; or the features."""
        if self.embedding is None:
            return src
        if self.tag_embedding is None:
            return self.embedding(src)
        return self.embedding(src[..., 0]) + self.tag_embedding(src[..., 1:]).sum(-2)

    def forward(
        self, src: Tensor, lengths: Tensor | None, vectors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encode src (B, S) tokens, (B, S, 1 + K) tokens with tags, or (B, S, F) features; or, in their place, the
        ``vectors`` (B, S, E) given.

        Returns memory (B, S', D), final h and c of each layer (layers, B, D), and the lengths (B,) in memory, None for
        all S'. S' is S / ``config.time_reduction``, rounded up.
        """
        x = self.vectors(src) if vectors is None else vectors
        if self.embedding is not None:
            x = self.embed_dropout(x)
        if self.frame_stack > 1:
            x, lengths = stacked(x, lengths, self.frame_stack)
        memory, state = self.lstm(x, lengths=lengths)
        states = [state]
        for layer in self.upper:
            x, lengths = stacked(self.dropout(memory), lengths, 2)
            memory, state = layer(x, lengths=lengths)
            states.append(state)
        h, c = (torch.cat(parts) for parts in zip(*states, strict=True)) if self.upper else state
        if self.lstm.bidirectional:  # (layers * 2, B, D / 2): forward and backward of a layer side by side
            h, c = torch.cat((h[0::2], h[1::2]), -1), torch.cat((c[0::2], c[1::2]), -1)
        return memory, h, c, lengths


def _lstm(config: Seq2SeqConfig, input_size: int, layers: int) -> LSTM:
    lstm = LSTM(
        input_size,
        config.hidden_size // (2 if config.bidirectional else 1),
        num_layers=layers,
        batch_first=True,
        dropout=config.dropout if layers > 1 else 0.0,
        bidirectional=config.bidirectional,
        backend=config.backend,
        **config.variant,
    )
    return lstm.freeze_bias_hh() if config.freeze_bias_hh else lstm


def stacked(x: Tensor, lengths: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """Join n successive positions to one: x (B, S, W) -> (B, S / n rounded up, n * W), and the lengths (B,) of that.

    Positions past a length, and those that fill the last group, are zeros.
    """
    if lengths is not None:
        position = torch.arange(x.size(1), device=x.device)
        x = x.masked_fill((position >= lengths.to(x.device)[:, None])[..., None], 0.0)
        lengths = (lengths + (n - 1)) // n
    x = F.pad(x, (0, 0, 0, -x.size(1) % n))
    return x.unflatten(1, (-1, n)).flatten(2), lengths


class Bridge(nn.Module):
    """From the encoder's final states (encoder_layers, B, H) to the decoder's first ones (decoder_layers, B, H)."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.kind = config.bridge
        self.layers = config.decoder_layers
        if self.kind in ("linear", "linear_h"):
            inner, outer = config.encoder_layers * config.hidden_size, config.decoder_layers * config.hidden_size
            self.h_proj = nn.Linear(inner, outer)
            if self.kind == "linear":
                self.c_proj = nn.Linear(inner, outer)
            self.activation = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "none": nn.Identity()}[config.bridge_activation]

    def extra_repr(self) -> str:
        return repr(self.kind)

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "concat":
            return h, c
        if self.kind == "zeros":
            zeros = h.new_zeros(self.layers, h.size(1), h.size(2))
            return zeros, zeros
        first = self._map(self.h_proj, h)
        return first, first if self.kind == "linear_h" else self._map(self.c_proj, c)

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
