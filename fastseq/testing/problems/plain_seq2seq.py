"""An encoder-decoder with attention in plain PyTorch, as a good tutorial writes it: the baseline of whole models.

Its parameters have the names and shapes of :class:`fastseq.Seq2Seq`, so ``plain.load_state_dict(ours.state_dict())``
gives equal weights. B sentences, K beams, N rows, S source and T target positions, V target vocabulary, H hidden units.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.seq2seq.config import Seq2SeqConfig

MINUS_INFINITY = float("-inf")


class Source(NamedTuple):
    """The encoded source sentences."""

    memory: Tensor  # (N, S, H)
    keys: Tensor  # (N, S, H) projected for the attention
    mask: Tensor  # (N, S) True inside the sentence

    def repeat(self, k: int) -> "Source":
        return Source(*(t.repeat_interleave(k, 0) for t in self))


class State(NamedTuple):
    """The decoder between two steps."""

    h: Tensor  # (L, N, H)
    c: Tensor  # (L, N, H)
    feed: Tensor  # (N, H) last attentional vector

    def select(self, rows: Tensor) -> "State":
        return State(self.h.index_select(1, rows), self.c.index_select(1, rows), self.feed.index_select(0, rows))


class Encoder(nn.Module):
    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.src_vocab_size, config.embedding_dim, padding_idx=config.pad_id)
        self.embed_dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(
            config.embedding_dim,
            config.hidden_size // (2 if config.bidirectional else 1),
            num_layers=config.encoder_layers,
            batch_first=True,
            dropout=config.dropout if config.encoder_layers > 1 else 0.0,
            bidirectional=config.bidirectional,
        )

    def forward(self, src: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """src (B, S) -> outputs (B, S, H), final h and c (layers, B, H)."""
        embedded = self.embed_dropout(self.embedding(src))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        output, (h, c) = self.lstm(packed)
        memory, _ = pad_packed_sequence(output, batch_first=True, total_length=src.shape[1])
        if self.lstm.bidirectional:
            h, c = torch.cat((h[0::2], h[1::2]), -1), torch.cat((c[0::2], c[1::2]), -1)
        return memory, h, c


class Bridge(nn.Module):
    """From the encoder's final states to the decoder's first ones."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.layers = config.decoder_layers
        inner, outer = config.encoder_layers * config.hidden_size, config.decoder_layers * config.hidden_size
        self.h_proj, self.c_proj = nn.Linear(inner, outer), nn.Linear(inner, outer)

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(self.h_proj, h), self._map(self.c_proj, c)

    def _map(self, proj: nn.Linear, state: Tensor) -> Tensor:
        mapped = torch.tanh(proj(state.transpose(0, 1).flatten(1)))  # (B, layers * H)
        return mapped.view(len(mapped), self.layers, -1).transpose(0, 1).contiguous()


class Attention(nn.Module):
    """Dot or additive attention."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        size, self.additive = config.hidden_size, config.attention == "additive"
        if self.additive:
            self.query_proj, self.key_proj = nn.Linear(size, size), nn.Linear(size, size, bias=False)
            self.v = nn.Parameter(torch.empty(size))

    def project(self, memory: Tensor) -> Tensor:
        return self.key_proj(memory) if self.additive else memory

    def forward(self, query: Tensor, source: Source) -> Tensor:
        """query (N, T, H) -> context (N, T, H)."""
        if self.additive:
            query = self.query_proj(query)
            scores = torch.tanh(query[:, :, None] + source.keys[:, None]) @ self.v  # (N, T, S)
        else:
            scores = torch.bmm(query, source.keys.transpose(1, 2))
        weights = scores.masked_fill(~source.mask[:, None], MINUS_INFINITY).softmax(-1)
        return torch.bmm(weights, source.memory)


class Decoder(nn.Module):
    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        size, self.input_feeding = config.hidden_size, config.input_feeding
        self.embedding = nn.Embedding(config.tgt_vocab_size, config.embedding_dim, padding_idx=config.pad_id)
        self.embed_dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(
            config.embedding_dim + (size if config.input_feeding else 0),
            size,
            num_layers=config.decoder_layers,
            batch_first=True,
            dropout=config.dropout if config.decoder_layers > 1 else 0.0,
        )
        self.attention = Attention(config)
        self.combine = nn.Linear(2 * size, size, bias=False)
        self.output_dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(size, config.tgt_vocab_size)
        self.between_layers = nn.Dropout(config.dropout)
        self.cells: tuple[nn.LSTMCell, ...] = ()  # a tuple is no submodule: the cells share the LSTM's parameters

    def use_cells(self) -> None:
        """Run single steps by ``nn.LSTMCell``, with the parameters of the LSTM, instead of ``nn.LSTM``."""
        lstm, cells = self.lstm, []
        for k in range(lstm.num_layers):
            cell = nn.LSTMCell(lstm.input_size if k == 0 else lstm.hidden_size, lstm.hidden_size, device="meta")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(lstm, f"{name}_l{k}"))
            cells.append(cell)
        self.cells = tuple(cells)

    def vectors(self, output: Tensor, source: Source) -> Tensor:
        """output (N, T, H) of the LSTM -> attentional vectors (N, T, H)."""
        context = self.attention(output, source)
        return torch.tanh(self.combine(torch.cat((context, output), -1)))

    def forward(self, tgt_in: Tensor, state: State, source: Source) -> Tensor:
        """The whole target, tgt_in (B, T) -> logits (B, T, V)."""
        embedded = self.embed_dropout(self.embedding(tgt_in))
        if self.input_feeding:
            vectors = []
            for x in embedded.unbind(1):
                vector, state = self._advance(x, state, source)
                vectors.append(vector)
            vectors = torch.stack(vectors, 1)
        else:
            output, _ = self.lstm(embedded, (state.h, state.c))
            vectors = self.vectors(output, source)
        return self.output(self.output_dropout(vectors))

    def step(self, tokens: Tensor, state: State, source: Source) -> tuple[Tensor, State]:
        """One step, tokens (N,) -> logits (N, V)."""
        vector, state = self._advance(self.embed_dropout(self.embedding(tokens)), state, source)
        return self.output(self.output_dropout(vector)), state

    def _advance(self, x: Tensor, state: State, source: Source) -> tuple[Tensor, State]:
        """x (N, E), an embedded token -> attentional vector (N, H)."""
        if self.input_feeding:
            x = torch.cat((x, state.feed), -1)
        if self.cells:
            h, c = [], []
            for k, cell in enumerate(self.cells):
                x, c_k = cell(self.between_layers(x) if k else x, (state.h[k], state.c[k]))
                h.append(x)
                c.append(c_k)
            output, h, c = x[:, None], torch.stack(h), torch.stack(c)
        else:
            output, (h, c) = self.lstm(x[:, None], (state.h, state.c))
        vector = self.vectors(output, source)[:, 0]
        return vector, State(h, c, vector)


class PlainSeq2Seq(nn.Module):
    """Seq2Seq in plain PyTorch, with dot or additive attention and the linear bridge.

    Args:
        config: of the model with the same parameters.
        cells: run single steps by ``nn.LSTMCell`` instead of ``nn.LSTM``.
    """

    def __init__(self, config: Seq2SeqConfig, cells: bool = False):
        super().__init__()
        self.config = config
        self.encoder, self.bridge, self.decoder = Encoder(config), Bridge(config), Decoder(config)
        if cells:
            self.decoder.use_cells()

    def forward(self, src: Tensor, src_lengths: Tensor, tgt_in: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.decoder(tgt_in, *self.encode(src, src_lengths))

    def encode(self, src: Tensor, src_lengths: Tensor) -> tuple[State, Source]:
        memory, h, c = self.encoder(src, src_lengths)
        h, c = self.bridge(h, c)
        mask = torch.arange(src.shape[1]) < src_lengths[:, None]
        source = Source(memory, self.decoder.attention.project(memory), mask)
        return State(h, c, torch.zeros_like(h[0])), source

    def _log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities (N, V); pad and bos are never generated."""
        log_probs = logits.log_softmax(-1)
        log_probs[:, [self.config.pad_id, self.config.bos_id]] = MINUS_INFINITY
        return log_probs

    @torch.no_grad()
    def greedy(self, src: Tensor, src_lengths: Tensor, limits: Tensor) -> Tensor:
        """The most likely token of each step, until eos or the limit (B,) of every sentence -> tokens (B, T)."""
        state, source = self.encode(src, src_lengths)
        tokens = torch.full((len(src),), self.config.bos_id)
        done = torch.zeros(len(src), dtype=torch.bool)
        generated = []
        for step in range(int(limits.max())):
            logits, state = self.decoder.step(tokens, state, source)
            tokens = self._log_probs(logits).argmax(-1).masked_fill(done, self.config.pad_id)
            generated.append(tokens)
            done |= (tokens == self.config.eos_id) | (limits == step + 1)
            if done.all():
                break
        return torch.stack(generated, 1)

    @torch.no_grad()
    def beam_search(self, src: Tensor, src_lengths: Tensor, limits: Tensor, beams: int) -> Tensor:
        """The best hypothesis of each sentence by mean log-probability -> tokens (B, T).

        A sentence is done when none of its beams beats the worst of K finished hypotheses.
        """
        pad, bos, eos, batch = self.config.pad_id, self.config.bos_id, self.config.eos_id, len(src)
        state, source = self.encode(src, src_lengths)
        state, source = state.select(torch.arange(batch).repeat_interleave(beams)), source.repeat(beams)
        tokens = torch.full((batch * beams,), bos)
        scores = torch.full((batch, beams), MINUS_INFINITY)
        scores[:, 0] = 0.0  # the beams are equal before the first step
        hypotheses = torch.empty(batch, beams, 0, dtype=torch.int64)
        best_scores = torch.full((batch, beams), MINUS_INFINITY)
        best = torch.full((batch, beams, int(limits.max())), pad)
        done = torch.zeros(batch, dtype=torch.bool)
        for step in range(int(limits.max())):
            logits, state = self.decoder.step(tokens, state, source)
            log_probs = self._log_probs(logits)
            total = (scores.view(-1, 1) + log_probs).view(batch, -1)
            total, flat = total.topk(2 * beams)
            parents, new = flat // log_probs.shape[1], flat % log_probs.shape[1]  # (B, 2K)
            grown = torch.cat((hypotheses.gather(1, parents[..., None].expand(-1, -1, step)), new[..., None]), 2)

            at_limit = limits == step + 1
            finished = ((new == eos) | at_limit[:, None]) & ~done[:, None]
            finished_scores = (total / (step + 1)).masked_fill(~finished, MINUS_INFINITY)[:, :beams]
            padded = torch.nn.functional.pad(grown[:, :beams], (0, best.shape[2] - step - 1), value=pad)
            best_scores, order = torch.cat((best_scores, finished_scores), 1).topk(beams)
            best = torch.cat((best, padded), 1).gather(1, order[..., None].expand(-1, -1, best.shape[2]))

            scores, kept = total.masked_fill(new == eos, MINUS_INFINITY).topk(beams)
            done |= at_limit | (scores[:, 0] / (step + 1) <= best_scores[:, -1])
            if done.all():
                break
            hypotheses = grown.gather(1, kept[..., None].expand(-1, -1, step + 1))
            rows = (torch.arange(batch)[:, None] * beams + parents.gather(1, kept)).flatten()
            state, tokens = state.select(rows), new.gather(1, kept).flatten()
        return best[:, 0]
