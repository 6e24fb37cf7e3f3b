"""Several models as one: ``generate`` and scoring by the mean of their log-probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.seq2seq import generation
from fastseq.seq2seq.decoder import DecoderState
from fastseq.seq2seq.encoder import EncoderOutput
from fastseq.seq2seq.model import Seq2Seq

ALIKE = (
    "src_vocab_size",
    "source_features",
    "tag_vocab_size",
    "time_reduction",
    "copy",
    "tgt_vocab_size",
    "pad_id",
    "bos_id",
    "eos_id",
    "unk_id",
)


class EnsembleOutput(NamedTuple):
    """The encoder output of each model."""

    members: tuple[EncoderOutput, ...]

    @property
    def lengths(self) -> Tensor:
        """(B,) positions of each sentence, the same for all models."""
        return self.members[0].lengths

    def index_select(self, rows: Tensor) -> "EnsembleOutput":
        """The sentences ``rows`` (N,), in that order, repeats allowed."""
        return EnsembleOutput(tuple(member.index_select(rows) for member in self.members))

    def repeat_interleave(self, k: int) -> "EnsembleOutput":
        """Each sentence k times in a row."""
        return EnsembleOutput(tuple(member.repeat_interleave(k) for member in self.members))


class EnsembleState(NamedTuple):
    """The decoder state of each model."""

    members: tuple[DecoderState, ...]

    def index_select(self, rows: Tensor) -> "EnsembleState":
        """The rows ``rows`` (M,), in that order, repeats allowed."""
        return EnsembleState(tuple(member.index_select(rows) for member in self.members))


class Ensemble(nn.Module):
    """Models that choose each token together: p is proportional to exp(mean of their log-probabilities).

    The attention is the mean over the models that have one. ``config`` is the one of the first of these, or of the
    first model; the options of the architecture may differ.

    Args:
        models: one or more, with the same vocabularies, or source features, and time reduction.

    Raises:
        ValueError: no model, or vocabularies that differ.
    """

    rows_share_sources = True

    def __init__(self, models: Sequence[Seq2Seq]) -> None:
        super().__init__()
        if not models:
            raise ValueError("Ensemble: expected at least one model, got none")
        for name in ALIKE:
            values = [getattr(model.config, name) for model in models]
            if len(set(values)) > 1:
                raise ValueError(f"Ensemble: {name} must be the same for all models, got {values}")
        self.members = nn.ModuleList(models)
        attending = [model.config for model in models if model.config.attention != "none"]
        self.config = attending[0] if attending else models[0].config

    def encode(self, src: Tensor, src_lengths: Tensor | Sequence[int] | None = None) -> EnsembleOutput:
        """As :meth:`Seq2Seq.encode`, by each model."""
        return EnsembleOutput(tuple(member.encode(src, src_lengths) for member in self.members))

    def start(self, enc: EnsembleOutput) -> EnsembleState:
        """The states before the first step."""
        return EnsembleState(tuple(m.start(e) for m, e in zip(self.members, enc.members, strict=True)))

    def decode_step(
        self, tokens: Tensor, state: EnsembleState, enc: EnsembleOutput, *, need_weights: bool = True
    ) -> tuple[Tensor, EnsembleState, Tensor | None]:
        """As :meth:`Seq2Seq.decode_step`: log-probabilities (N, V), the next state, attention (N, S) or None."""
        steps = [
            member.decode_step(tokens, s, e, need_weights=need_weights)
            for member, s, e in zip(self.members, state.members, enc.members, strict=True)
        ]
        logits, states, attentions = zip(*steps, strict=True)
        found = [attention for attention in attentions if attention is not None]
        attention = torch.stack(found).mean(0) if found else None
        return _mean(logits), EnsembleState(states), attention

    def loss(
        self, src: Tensor, src_lengths: Tensor | None, tgt_in: Tensor, labels: Tensor, *, reduction: str
    ) -> Tensor:
        """The negative log-probability of each label, (B, T), 0 at pad; ``reduction`` is "none". Arguments: Seq2Seq."""
        if reduction != "none":
            raise ValueError(f"Ensemble: reduction must be 'none', got {reduction!r}; an ensemble is not trained")
        log_probs = _mean([member(src, src_lengths, tgt_in).logits for member in self.members])
        losses = -log_probs.gather(-1, labels[..., None]).squeeze(-1)
        return losses.masked_fill(labels == self.config.pad_id, 0.0)

    generate = generation.generate  # the function's first parameter is the model


def _mean(logits: Sequence[Tensor]) -> Tensor:
    """logits (..., V) of each model -> the log-probabilities (..., V) of their normalised geometric mean."""
    total = sum(x.log_softmax(-1, dtype=accumulate_dtype(x.dtype)) for x in logits)
    return (total / len(logits)).log_softmax(-1)
