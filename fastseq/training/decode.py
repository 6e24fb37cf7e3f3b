"""Predictions for many sources at once: sorted by length, decoded in batches, returned in the given order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from fastseq.errors import UserError
from fastseq.seq2seq.generation import GenerateOutput
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.batching import cut_by_tokens
from fastseq.training.copying import Words
from fastseq.training.data import CopySequences, Sequences
from fastseq.training.tokenizer import EOS, TextTokenizer

LEAST_LENGTH_RATIO = 2.0  # target tokens for each source token that are always allowed


class Hypothesis(NamedTuple):
    """One prediction for one source."""

    text: str
    ids: list[int]  # eos included if it was reached
    score: float  # log-probability, divided by the length penalty
    attention: Tensor | None  # (len(ids), positions of the encoder's output), when asked for
    token_scores: list[float] | None = None  # log-probability of each of ids, when asked for
    copied: Words = ()  # with copying: words of the source, the names of ids from the vocabulary's size on

    @property
    def cut_off(self) -> bool:
        """True if the limit on tokens ended it."""
        return EOS not in self.ids

    @property
    def alignment(self) -> list[int] | None:
        """The source position with the most attention for each of ids; None without attention."""
        return None if self.attention is None else self.attention.argmax(-1).tolist()


def decode(
    model: Seq2Seq,
    sources: Sequences,
    tokenizer: TextTokenizer,
    *,
    num_beams: int = 1,
    prefix_tokens: Sequence[Sequence[int]] | None = None,
    n_best: int = 1,
    attention: bool = False,
    max_tokens: int = 4096,
    progress: bool = False,
    **search: Any,
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of every source, best first.

    `search` holds further options of `Seq2Seq.generate`, such as `max_length_ratio`. A batch has at most `max_tokens`
    source tokens, padding included, times beams. `prefix_tokens` are the first tokens of each source's hypotheses.
    Raises UserError for search options that `generate` refuses.
    """
    device = next(model.parameters()).device
    ascending = sources.lengths.sort(stable=True)
    slices = cut_by_tokens(ascending.values.tolist(), max(1, max_tokens // max(num_beams, n_best)))
    results: list[list[Hypothesis]] = [[] for _ in range(len(sources))]
    for start, stop in tqdm(slices, desc="decoding", leave=False, disable=not progress):
        rows = ascending.indices[start:stop]
        tokens, lengths = sources.padded(rows)
        options = {"num_beams": num_beams, "num_return_sequences": n_best, "output_attentions": attention} | search
        if prefix_tokens is not None:
            options["prefix_tokens"] = [prefix_tokens[row] for row in rows.tolist()]
        try:
            output = model.generate(tokens.to(device), lengths.to(device), **options)
        except ValueError as error:
            if not str(error).startswith("generate: "):
                raise
            raise UserError(str(error)) from error
        positions = -(-lengths // model.config.time_reduction)
        hypotheses = _hypotheses(output, positions.repeat_interleave(n_best), tokenizer)
        if isinstance(sources, CopySequences):
            words = [sources.words[row] for row in rows.tolist() for _ in range(n_best)]
            hypotheses = [_named(*one, tokenizer) for one in zip(hypotheses, words, strict=True)]
        for i, row in enumerate(rows.tolist()):
            results[row] = hypotheses[i * n_best : (i + 1) * n_best]
    return results


def _hypotheses(output: GenerateOutput, positions: Tensor, tokenizer: TextTokenizer) -> list[Hypothesis]:
    """The sequences of `output` as hypotheses; positions (B * n_best,) of the encoder's output."""
    rows = [ids[:n] for ids, n in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)]
    scores = output.sequences_scores.tolist()
    attentions: list[Tensor | None] = [None] * len(rows)
    if output.cross_attentions is not None:
        weights = output.cross_attentions.float().cpu()  # (B * n_best, longest, S)
        sizes = zip(map(len, rows), positions.tolist(), strict=True)
        attentions = [w[:n, :s] for w, (n, s) in zip(weights, sizes, strict=True)]
    token_scores: list[list[float] | None] = [None] * len(rows)
    if output.token_scores is not None:
        token_scores = [s[:n] for s, n in zip(output.token_scores.tolist(), map(len, rows), strict=True)]
    fields = zip(tokenizer.decode(rows), rows, scores, attentions, token_scores, strict=True)
    return [Hypothesis(*values) for values in fields]


def _named(hypothesis: Hypothesis, words: Words, tokenizer: TextTokenizer) -> Hypothesis:
    """The hypothesis, whose text spells the copied ``words`` of its source."""
    return hypothesis._replace(text=tokenizer.text(hypothesis.ids, words), copied=words)
