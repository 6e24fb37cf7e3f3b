"""Log-probabilities of given targets: one pass of the decoder over the true tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.batching import cut_by_tokens, make_batch
from fastseq.training.data import Sequences


class PairScore(NamedTuple):
    """How probable a model finds a target, given its source."""

    token_scores: list[float]  # natural log-probability of each target token, eos included

    @property
    def log_prob(self) -> float:
        """Natural log-probability of the whole target."""
        return math.fsum(self.token_scores)

    @property
    def perplexity(self) -> float:
        """exp(-log_prob / tokens); infinity for a target that the model finds impossible."""
        mean = -self.log_prob / len(self.token_scores)
        return math.exp(mean) if mean < 700 else math.inf


def log_probabilities(model: Seq2Seq, sources: Sequences, targets: Sequences, max_tokens: int) -> list[list[float]]:
    """Log-probability of each token of each target; `targets` are closed by eos, or cut off. The model is in eval mode.

    A batch has at most `max_tokens` tokens, padding included, counted on the longer side.
    """
    device = next(model.parameters()).device
    key = sources.lengths * (int(targets.lengths.max()) + 1 if len(targets) else 1) + targets.lengths
    order = key.argsort(stable=True)
    order = order[targets.lengths[order] > 0]
    longer = torch.maximum(sources.lengths, targets.lengths)[order]
    scores: list[list[float]] = [[] for _ in range(len(targets))]
    for start, stop in cut_by_tokens(longer.tolist(), max_tokens):
        rows = order[start:stop]
        batch = make_batch(sources, targets, rows, 0)
        lengths = None if batch.source_lengths is None else batch.source_lengths.to(device)
        tensors = batch.source.to(device), lengths, batch.target_in.to(device), batch.labels.to(device)
        with torch.no_grad():
            losses = model.loss(*tensors, reduction="none")  # (B, T)
        for row, values, length in zip(rows.tolist(), losses.tolist(), targets.lengths[rows].tolist(), strict=True):
            scores[row] = [-value for value in values[:length]]
    return scores
