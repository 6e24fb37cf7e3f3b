"""The target side of Seq2Seq: an LSTM decoder with attention, whole targets at once or step by step."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.nn.attention import Attention
from fastseq.nn.lstm import LSTM
from fastseq.nn.variants import Norms
from fastseq.ops.attention.api import ADDITIVE
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.decoder.api import (
    Search,
    Sequence,
    Source,
    State,
    Weights,
    decoder,
    explain_steps,
    greedy,
    one_operator,
    one_sequence,
)
from fastseq.ops.decoder.api import step as decoder_step
from fastseq.ops.lstm_cell import lstm_cell
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.copying import extended_logits, gate_of
from fastseq.seq2seq.encoder import EncoderOutput, embedding
from fastseq.seq2seq.losses import copy_loss, cross_entropy, is_plain
from fastseq.seq2seq.steps import DecoderState, Steps


class _Layer(NamedTuple):
    """The parameters of one layer in the form that one step reads."""

    embedding: Tensor  # (4H, E) columns of weight_ih for the embedding; E = 0 above the first layer
    input: Tensor  # (4H, H) its other columns: for the feed, or for the layer below
    hidden: Tensor  # (4H, H)
    bias: Tensor  # (4H,); zeros with ``norms``, whose bias is added behind the normalisation
    hidden_mask: Tensor | None = None  # (B, H) of recurrent dropout, one for all steps
    norms: Norms | None = None


class Decoder(nn.Module):
    """Embedding, stacked LSTM, attention, attentional vector, output projection (Luong et al. 2015).

    The attentional vector is tanh(W [context, h]), their equation 5; without attention it is h of the last layer.

    The LSTM's parameters serve both the whole-sequence LSTM and the step loop, so both modes share one state_dict
    layout; with input feeding the first layer reads [embedding, feed] and is wider by H.
    """

    combine_activation, copies, coverage = "tanh", False, False  # for models that were pickled without one

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        size = config.hidden_size
        self.input_feeding = config.input_feeding
        self.dropout = config.dropout
        self.backend = config.backend
        self.embedding = embedding(config.tgt_vocab_size, config)
        self.embed_dropout = nn.Dropout(config.dropout if config.embed_dropout is None else config.embed_dropout)
        self.lstm = LSTM(
            config.embedding_dim + (size if config.input_feeding else 0),
            size,
            num_layers=config.decoder_layers,
            batch_first=True,
            dropout=config.dropout if config.decoder_layers > 1 else 0.0,
            backend=config.backend,
            **config.variant,
        )
        if config.freeze_bias_hh:
            self.lstm.freeze_bias_hh()
        self.attention = None
        if config.attention != "none":
            options = dict(score=config.attention, attention_size=config.attention_size, scale=config.attention_scale)
            self.attention = Attention(size, size, **options, coverage=config.coverage, backend=config.backend)
            self.combine = nn.Linear(2 * size, size, bias=config.combine_bias)
            self.combine_activation = config.combine_activation
        self.unk_id = config.unk_id
        self.copies, self.coverage, self.coverage_loss = config.copy, config.coverage, config.coverage_loss
        if config.copy:  # of [context, h, embedding]: equation 8 of See et al. 2017
            self.copy_gate = nn.Linear(2 * size + config.embedding_dim, 1)
        self.output_dropout = nn.Dropout(config.dropout if config.output_dropout is None else config.output_dropout)
        self.output = nn.Linear(size, config.tgt_vocab_size)
        if config.tied:
            self.output.weight = self.embedding.weight

    def start(self, enc: EncoderOutput) -> DecoderState:
        """The state before the first step. Copies, because torch.export takes one tensor given twice for one input."""
        feed = torch.zeros_like(enc.h[0]) if self.input_feeding else None
        coverage = None
        if self.coverage:
            coverage = enc.memory.new_zeros(enc.memory.shape[:2], dtype=accumulate_dtype(enc.memory.dtype))
        return DecoderState(enc.h.clone(), enc.c.clone(), feed, coverage=coverage)

    def by_steps(self, teacher_forcing_ratio: float) -> bool:
        """True if :meth:`forward` runs the target step by step instead of all at once."""
        return self.input_feeding or self.coverage or teacher_forcing_ratio < 1

    def forward(
        self, tokens: Tensor, enc: EncoderOutput, teacher_forcing_ratio: float, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, DecoderState]:
        """tokens (B, T) -> logits (B, T, V), weights (B, T, S) or None, state after the last step.

        With copying the logits are extended ones, (B, T, V + S).
        """
        steps = self.vectors(tokens, enc, teacher_forcing_ratio, need_weights)
        logits = self._logits(steps.vectors, steps.gate, steps.attention, enc)
        return logits, steps.attention if need_weights else None, steps.state

    def vectors(
        self,
        tokens: Tensor,
        enc: EncoderOutput,
        teacher_forcing_ratio: float,
        need_weights: bool,
        lengths: Tensor | None = None,
    ) -> Steps:
        """Run all steps up to the output projection. With copying the attention weights are always returned.

        lengths: (B,) or None for all T. Steps past them hold arbitrary finite values, and whole targets skip them.
        """
        need_weights = need_weights or self.copies
        if self.by_steps(teacher_forcing_ratio):
            return self._step_by_step(tokens, enc, teacher_forcing_ratio, need_weights)
        embedded = self._embed(tokens)
        output, (h, c) = self.lstm(embedded, (enc.h, enc.c), lengths=lengths)
        vectors, weights, context = self._attend(output, enc, need_weights)
        gate = self._gate(context, output, embedded)
        return Steps(self.output_dropout(vectors), weights, DecoderState(h, c, None), gate)

    def loss(self, steps: Steps, enc: EncoderOutput, labels: Tensor, **options) -> Tensor:
        """The loss of labels (B, T) from :meth:`vectors`; ``options``: of linear_cross_entropy.

        The coverage loss is part of a mean or sum, and not of the losses of single labels.
        """
        if self.copies:
            loss = copy_loss(
                self.output, steps, enc, labels, self.embedding.num_embeddings, unk_id=self.unk_id, **options
            )
        else:
            loss = cross_entropy(self.output, steps.vectors, labels, **options)
        if steps.repeats is None or options["reduction"] == "none":
            return loss
        present = labels != options["ignore_index"]
        repeats = self.coverage_loss * steps.repeats.masked_fill(~present, 0.0).sum()
        return loss + (repeats if options["reduction"] == "sum" else repeats / present.sum())

    def _logits(self, vectors: Tensor, gate: Tensor | None, weights: Tensor | None, enc: EncoderOutput) -> Tensor:
        """vectors (B, R, H) -> (B, R, V), or extended logits (B, R, V + S) with gate (B, R) and weights (B, R, S)."""
        logits = self.output(vectors)
        return logits if gate is None else extended_logits(logits, gate_of(gate, enc.lengths), weights, enc.copies)

    def _gate(self, context: Tensor, query: Tensor, embedded: Tensor) -> Tensor | None:
        """context (..., D), h of the last layer (..., H), embedding (..., E) -> (...,); None without copying."""
        if not self.copies:
            return None
        return self.copy_gate(torch.cat((context, query, embedded), -1)).squeeze(-1)

    def step(
        self, tokens: Tensor, state: DecoderState, enc: EncoderOutput, need_weights: bool
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """tokens (N,) -> logits (N, V), next state, weights (N, S) or None; N = B * K, K rows a sentence.

        With copying the logits are extended ones, (N, V + S).
        """
        weights = self._plain_weights() if one_operator(state.h, self.backend) and not self.coverage else None
        if weights is not None:
            tokens, wanted = self._known(tokens), need_weights or self.copies
            result, packed = decoder_step(tokens, State(*state[:3]), weights, self._source(enc), state[3], wanted)
            state = DecoderState(result.h, result.c, result.vector if self.input_feeding else None, packed)
            logits, attention = result.logits, result.attention
            if self.copies:
                context = (attention.unflatten(0, (len(enc.memory), -1)) @ enc.memory).flatten(0, 1)
                gate = self._gate(context, result.h[-1], self.embedding(tokens))
                logits = _extended_rows(logits, gate, attention, enc)
            return logits, state, attention if need_weights else None
        if not (self.coverage or self.lstm.active_variant()):
            explain_steps(state.h, self.backend, 1)
        layers = self._layers(state.h)
        embedded = self._embed(tokens)
        gates = self._input_gates(embedded, layers)
        h, c = state.h.unbind(0), state.c.unbind(0)
        wanted = need_weights or self.copies
        h, c, vector, weights, context = self._advance(gates, h, c, state, enc, layers, wanted)
        logits = self.output(self.output_dropout(vector))
        if self.copies:
            logits = _extended_rows(logits, self._gate(context, h[-1], embedded), weights, enc)
        return logits, self._state(h, c, vector, _sum(state.coverage, weights)), weights if need_weights else None

    def greedy_steps(
        self, tokens: Tensor, state: DecoderState, enc: EncoderOutput, search: Search
    ) -> tuple[Tensor, Tensor, Tensor, DecoderState] | None:
        """Steps from tokens (N,), N = B, with the choice of the next tokens, in one operator; None where none serves.

        Returns tokens (N, R) and their log-probabilities for R <= ``search.steps`` steps, done (N,), the state.
        """
        served = one_operator(state.h, self.backend) and not (self.copies or self.coverage)
        weights = self._plain_weights() if served else None
        if weights is None:
            return None
        chosen, packed = greedy(tokens, State(*state[:3]), weights, self._source(enc), state[3], search)
        return *chosen[:3], DecoderState(*chosen.state, packed)

    def _steps_as_one(self, tokens: Tensor, enc: EncoderOutput, need_weights: bool):
        """:meth:`_step_by_step` with the true tokens, by the decoder op."""
        layers, attention, count = self._layers(enc.h), self.attention, self.lstm.num_layers
        weights, gates = self.lstm.current_weights(), self._input_gates(self._embed(tokens.t()), layers)  # (T, B, 4H)
        query = bias = score = None
        if attention.score in ADDITIVE:
            query, bias, score = attention.query_proj.weight, attention.query_proj.bias, attention.v
            if attention.score == "normed_additive":
                score = attention.gain * F.normalize(score, dim=0)
        masks = None
        if self.training and self.dropout and count > 1:
            masks = F.dropout(gates.new_ones(count - 1, *gates.shape[:2], enc.h.size(2)), self.dropout)
        vectors, weights, h, c = decoder(
            Sequence(
                gates,
                enc.h,
                enc.c,
                torch.zeros_like(enc.h[0]),
                self.combine.weight,
                query,
                bias,
                score,
                enc.keys.projected,
                enc.memory,
                masks,
                enc.lengths,
                enc.keys.prepared_data(),
                tuple(w for layer in layers for w in (layer.input, layer.hidden)),
                tuple(w for k in range(1, count) for w in weights[4 * k + 2 : 4 * k + 4]),
                1.0 if attention.scale is None else attention.scale,
            )
        )
        weights = weights.transpose(0, 1) if need_weights else None
        return Steps(self.output_dropout(vectors.transpose(0, 1)), weights, DecoderState(h, c, vectors[-1]))

    def _has_plain_attention(self) -> bool:
        attention = self._modules.get("attention")
        combine = self._modules.get("combine")
        if attention is None or not (is_plain(attention, Attention) and is_plain(combine, nn.Linear)):
            return False
        if combine.bias is not None or self.combine_activation != "tanh":
            return False
        return attention.score not in ADDITIVE or is_plain(attention._modules["query_proj"], nn.Linear)

    def _plain_weights(self) -> Weights | None:
        """The parameters, if they alone determine a step: no dropout, no replaced submodule, no hook; else None.

        Reads the dictionaries of the modules: attribute look-ups would take 20 us, a fifth of a short step.
        """
        modules, attends = self._modules, self.attention is not None
        embedding, output = modules["embedding"], modules["output"]
        dropped = self.dropout or modules["embed_dropout"].p or modules["output_dropout"].p
        plain = modules["lstm"].active_variant() is None
        if (
            not plain
            or (self.training and dropped)
            or not (is_plain(embedding, nn.Embedding) and is_plain(output, nn.Linear))
        ):
            return None
        if attends and not self._has_plain_attention():
            return None
        weights, attention = modules["lstm"].current_weights(), modules.get("attention")
        layers = range(0, len(weights), 4)
        given = (
            _parameter(embedding, "weight"),
            _parameter(output, "weight"),
            _parameter(output, "bias"),
            [w for k in layers for w in weights[k : k + 2]],
            [w for k in layers for w in weights[k + 2 : k + 4]],
        )
        if not attends:
            return Weights(*given)
        combine = _parameter(modules["combine"], "weight")
        if attention.score not in ADDITIVE:
            return Weights(*given, combine)
        query = attention._modules["query_proj"]
        gain = _parameter(attention, "gain") if attention.score == "normed_additive" else None
        query = _parameter(query, "weight"), _parameter(query, "bias")
        return Weights(*given, combine, *query, _parameter(attention, "v"), gain)

    def _source(self, enc: EncoderOutput) -> Source:
        attention = self._modules.get("attention")
        if attention is None:
            return Source(None, None, None, None, 1.0)
        scale = 1.0 if attention.scale is None else attention.scale
        return Source(enc.keys.projected, enc.memory, enc.lengths, enc.keys.prepared_data(), scale)

    def _step_by_step(self, tokens: Tensor, enc: EncoderOutput, teacher_forcing_ratio: float, need_weights: bool):
        """As :meth:`vectors`; below a ratio of 1 each step is also projected, for the prediction."""
        if teacher_forcing_ratio == 1 and self._runs_as_one(enc):
            return self._steps_as_one(tokens, enc, need_weights)
        if teacher_forcing_ratio == 1 and not (self.copies or self.coverage or self.lstm.active_variant()):
            explain_steps(enc.h, self.backend, tokens.size(1))
        layers = self._layers(enc.h)
        state = self.start(enc)
        h, c = state.h.unbind(0), state.c.unbind(0)
        embedded = self._embed(tokens.t())  # (T, B, E)
        gates = self._input_gates(embedded, layers)  # (T, B, 4H): the embeddings' part of all steps in one GEMM
        vectors, weights, p_gates, repeats = [], [], [], []
        for t, (step_embedded, step_gates) in enumerate(zip(embedded.unbind(0), gates.unbind(0), strict=True)):
            if t > 0 and teacher_forcing_ratio < 1:
                predicted = self._embed(self._best(vectors[-1], p_gates[-1], weights[-1], enc))
                step_embedded = _choose(step_embedded, predicted, teacher_forcing_ratio)
                step_gates = self._input_gates(step_embedded, layers)
            h, c, vector, step_weights, context = self._advance(step_gates, h, c, state, enc, layers, need_weights)
            repeats.append(_repeated(state.coverage, step_weights))
            coverage = _sum(state.coverage, step_weights)
            state = state._replace(feed=vector if self.input_feeding else None, coverage=coverage)
            vectors.append(self.output_dropout(vector) if teacher_forcing_ratio < 1 else vector)
            weights.append(step_weights)
            p_gates.append(self._gate(context, h[-1], step_embedded))
        stacked = torch.stack(vectors, 1)
        if teacher_forcing_ratio == 1:
            stacked = self.output_dropout(stacked)
        lists = weights, p_gates, repeats
        weights, gate, repeats = (None if steps[0] is None else torch.stack(steps, 1) for steps in lists)
        return Steps(stacked, weights, self._state(h, c, vector, state.coverage), gate, repeats)

    def _runs_as_one(self, enc: EncoderOutput) -> bool:
        """True if the decoder op serves all steps: it has no coverage, and not the h of each step."""
        plain = not (self.copies or self.coverage) and self.lstm.active_variant() is None
        return plain and one_sequence(enc.h, self.backend) and self._has_plain_attention()

    def _best(self, vectors: Tensor, gate: Tensor | None, weights: Tensor | None, enc: EncoderOutput) -> Tensor:
        """The most probable tokens (B,) of a step with vectors (B, H), gate (B,) and weights (B, S)."""
        logits = self.output(vectors)
        return (logits if gate is None else _extended_rows(logits, gate, weights, enc)).argmax(-1)

    def _advance(
        self, gates: Tensor, h, c, state: DecoderState, enc: EncoderOutput, layers: list[_Layer], need_weights
    ):
        """One step, from the embeddings' part of the first layer's gates (B, 4H) and one h and one c (B, H) per layer.

        Of ``state`` it reads feed and coverage.

        Returns the next h and c, the attentional vector (B, H), the weights (B, S) or None, and the context (B, D) or
        None.
        """
        h_next, c_next = [], []
        x, variant = state.feed, self.lstm.active_variant()
        for k, layer in enumerate(layers):
            if k > 0:
                gates, x = layer.bias, F.dropout(h_next[-1], self.dropout, self.training)
            if x is not None:
                gates = torch.addmm(gates, x, layer.input.t())
            if variant is None:
                gates = torch.addmm(gates, h[k], layer.hidden.t())
                h_k, c_k = lstm_cell(gates, c[k], backend=self.backend)
            else:
                h_k, c_k = self.lstm.step(gates, (h[k], c[k]), layer.hidden, layer.norms, layer.hidden_mask)
            h_next.append(h_k)
            c_next.append(c_k)
        return h_next, c_next, *self._attend(h_next[-1], enc, need_weights, state.coverage)

    def _layers(self, state: Tensor) -> list[_Layer]:
        """The layers of one call; state (L, B, H): for the masks of recurrent dropout."""
        weights, layers = self.lstm.current_weights(), []
        device, variant = weights[0].device.type, self.lstm.active_variant()
        for k in range(self.lstm.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * k : 4 * k + 4]
            size = self.embedding.embedding_dim if k == 0 else 0
            tensors = (weight_ih[:, :size], weight_ih[:, size:], weight_hh, bias_ih + bias_hh)
            if device != "meta" and torch.is_autocast_enabled(device):  # cast once here, not at every step
                tensors = (x.to(torch.get_autocast_dtype(device)) for x in tensors)
            layer = _Layer(*tensors)
            if variant is not None:
                norms, mask = self.lstm.norms(k, bias_ih + bias_hh), self.lstm.hidden_mask(state[k])
                bias = layer.bias if norms is None else torch.zeros_like(layer.bias)
                layer = layer._replace(bias=bias, hidden_mask=mask, norms=norms)
            layers.append(layer)
        return layers

    def _input_gates(self, embedded: Tensor, layers: list[_Layer]) -> Tensor:
        """embedded (..., E) -> its part of the first layer's gates, bias included: (..., 4H)."""
        return F.linear(embedded, layers[0].embedding, layers[0].bias)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.embed_dropout(self.embedding(self._known(tokens)))

    def _known(self, tokens: Tensor) -> Tensor:
        """tokens, with unk for copied ones that the vocabulary lacks."""
        if not self.copies:
            return tokens
        return tokens.where(tokens < self.embedding.num_embeddings, self.unk_id)

    def _attend(
        self, query: Tensor, enc: EncoderOutput, need_weights: bool, coverage: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """query (N, H) or (B, T, H) -> attentional vectors of the same shape, weights and context or None.

        coverage: (N, S), with the option ``coverage``.

        The K = N / B rows of a sentence are K query steps, which read its keys and memory once.
        """
        if self.attention is None:
            return query, None, None
        batch = enc.memory.size(0)
        shared = query.dim() == 2 and query.size(0) != batch
        steps = query.unflatten(0, (batch, -1)) if shared else query
        if coverage is not None:
            coverage = coverage.unflatten(0, (batch, -1)) if shared else coverage
        options = {"need_weights": need_weights or self.coverage, "coverage": coverage}
        context, weights = self.attention(steps, enc.keys, enc.memory, lengths=enc.lengths, **options)
        if shared:
            context = context.flatten(0, 1)
            weights = None if weights is None else weights.flatten(0, 1)
        vector = self.combine(torch.cat((context, query), -1))
        return torch.tanh(vector) if self.combine_activation == "tanh" else vector, weights, context

    def _state(self, h, c, vector: Tensor, coverage: Tensor | None) -> DecoderState:
        feed = vector if self.input_feeding else None
        return DecoderState(torch.stack(tuple(h)), torch.stack(tuple(c)), feed, coverage=coverage)


def _sum(coverage: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """The coverage (N, S) after a step with weights (N, S); None without coverage."""
    return None if coverage is None else coverage + weights


def _repeated(coverage: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """The attention (N,) of a step on positions that had some before: the coverage loss of See et al. 2017."""
    return None if coverage is None else torch.minimum(weights.to(coverage.dtype), coverage).sum(-1)


def _extended_rows(logits: Tensor, gate: Tensor, weights: Tensor, enc: EncoderOutput) -> Tensor:
    """Extended logits (N, V + S) of rows: logits (N, V), gate (N,), weights (N, S); N = B * K."""
    logits, gate, weights = (x.unflatten(0, (len(enc.memory), -1)) for x in (logits, gate, weights))
    return extended_logits(logits, gate_of(gate, enc.lengths), weights, enc.copies).flatten(0, 1)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """``module.name``; the look-up of computed and replaced parameters takes ten times as long."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _choose(truth: Tensor, predicted: Tensor, ratio: float) -> Tensor:
    """Per sentence (row): the gates of the true token with probability ``ratio``, else of the predicted one."""
    if ratio == 0:
        return predicted
    use_truth = torch.rand(truth.size(0), 1, device=truth.device) < ratio
    return torch.where(use_truth, truth, predicted)
