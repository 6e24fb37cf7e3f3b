"""Explanations of predictions: the source positions that each target token rests on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.seq2seq.attribution import attribute
from fastseq.seq2seq.ensemble import Ensemble
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.batching import cut_by_tokens, make_batch
from fastseq.training.data import CopySequences, Sequences
from fastseq.training.features import Features, Source
from fastseq.training.files import refuse_links, write_text
from fastseq.training.tagged import text_side
from fastseq.training.tokenizer import TextTokenizer

GRADIENTS = ("gradient_x_input", "integrated_gradients")
STEPS = 32


class Explanation(NamedTuple):
    """The source positions s that each target token t rests on, by several methods.

    Attributions are natural logarithms: a positive one raises the probability of the token, a negative one lowers it.
    """

    source: list[str]  # names of the S source tokens, the end of the source included; positions of features
    target: list[str]  # names of the T target tokens, the end included
    log_probs: list[float]  # of each target token
    attributions: dict[str, Tensor]  # gradient_x_input, integrated_gradients (T, S); attention (T, S'), if there is one
    residual: list[float]  # error of the integral for each target token: see Attributions.residual
    closed: bool  # True if the last source position is the end of the source

    def alignment(self, method: str = "integrated_gradients") -> list[tuple[int, int]]:
        """(source, target) token numbers from 0: for each target token the source token with the largest attribution.

        Without the ends of source and target. For features and models that join positions, attention counts positions
        of the encoder's output.

        Raises:
            UserError: unknown method.
        """
        if method not in self.attributions:
            raise UserError(f"there is no {method!r} in this explanation; choose one of {', '.join(self.attributions)}")
        weights = self.attributions[method]
        if self.closed and weights.size(1) == len(self.source):
            weights = weights[:, :-1]
        if weights.size(1) == 0:
            return []
        places = weights.argmax(1).tolist()
        return [(s, t) for t, (s, name) in enumerate(zip(places, self.target, strict=True)) if name != "<eos>"]

    def pharaoh(self, method: str = "integrated_gradients") -> str:
        """The alignment in Pharaoh format, as alignment tools write it: ``0-0 1-1 2-1``, source-target."""
        return " ".join(f"{s}-{t}" for s, t in self.alignment(method))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values, for JSON."""
        maps = {name: weights.tolist() for name, weights in self.attributions.items()}
        named = {"source": self.source, "target": self.target, "log_probs": self.log_probs}
        return named | maps | {"residual": self.residual}

    def plot(self, png: str | Path) -> None:
        """Draw a heat map for each method. Needs matplotlib."""
        from fastseq.training.plots import plot_explanation

        plot_explanation(self.attributions, self.source, self.target, Path(png))


def explain(
    model: Seq2Seq | Ensemble,
    sources: Sequences,
    targets: Sequences,
    tokenizers: tuple[Source, TextTokenizer],
    *,
    steps: int = STEPS,
    max_tokens: int = 4096,
) -> list[Explanation]:
    """Explain each of ``targets`` (token ids), given its source.

    A batch has at most ``max_tokens`` tokens, padding included, counted on the longer side, times ``steps``.
    """
    if isinstance(model, Ensemble):
        raise UserError("an ensemble is several models, each with embeddings of its own; explain one of them")
    if not 1 <= steps <= 10_000:
        raise UserError(f"steps are points of an integral, expected 1 to 10000, got {steps}; 32 are usual")
    order = sources.lengths.argsort(stable=True)
    longer = torch.maximum(sources.lengths, targets.lengths)[order]
    found: list[Any] = [None] * len(sources)
    for start, stop in cut_by_tokens(longer.tolist(), max(1, max_tokens // steps)):
        rows = order[start:stop]
        for row, explanation in zip(
            rows.tolist(), _batch(model, sources, targets, rows, tokenizers, steps), strict=True
        ):
            found[row] = explanation
    return found


def _batch(
    model: Seq2Seq, sources: Sequences, targets: Sequences, rows: Tensor, tokenizers: Any, steps: int
) -> list[Explanation]:
    device = next(model.parameters()).device
    batch = make_batch(sources, targets, rows, 0)
    tensors = (None if x is None else x.to(device) for x in batch[:4])
    src, lengths, tgt_in, labels = tensors
    values = attribute(model, src, lengths, tgt_in, labels, steps)
    maps = {name: getattr(values, name).float().cpu() for name in GRADIENTS}
    if model.config.attention != "none":
        with torch.no_grad():
            maps = {"attention": model(src, lengths, tgt_in, need_weights=True).attention.float().cpu()} | maps
    text, copies = not isinstance(tokenizers[0], Features), isinstance(sources, CopySequences)
    explanations = []
    sizes = zip(sources.lengths[rows].tolist(), targets.lengths[rows].tolist(), strict=True)
    for i, (s, t) in enumerate(sizes):
        reduced = {"attention": -(-s // model.config.time_reduction)}
        copied = sources.words[int(rows[i])] if copies else ()
        if copies:
            names = tokenizers[1].tokens(src[i, :s, 1].tolist(), copied)
        else:
            names = tokenizers[0].tokens(src[i, :s].tolist()) if text else [str(k) for k in range(s)]
        explanations.append(
            Explanation(
                names,
                tokenizers[1].tokens(labels[i, :t].tolist(), copied),
                values.log_probs[i, :t].tolist(),
                {name: weights[i, :t, : reduced.get(name, s)] for name, weights in maps.items()},
                values.residual[i, :t].tolist(),
                text and text_side(tokenizers[0]).closed,
            )
        )
    return explanations


class ExplanationFolder:
    """The files of `fastseq generate --explain`: explanations.jsonl, METHOD.align, NUMBER.png."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links([self.path])
        self._lines: dict[str, list[str]] = {}

    def add(self, explanations: Sequence[tuple[int, Explanation | None]]) -> None:
        """Add numbered lines; None for an empty one, which has an empty line in each file, and no picture."""
        for number, explanation in explanations:
            facts = {} if explanation is None else explanation.to_dict()
            self._write("explanations.jsonl", json.dumps({"line": number} | facts, ensure_ascii=False))
            for name in ("attention", *GRADIENTS):
                known = explanation is not None and name in explanation.attributions
                self._write(f"{name}.align", explanation.pharaoh(name) if known else "")
            if explanation is not None:
                explanation.plot(self.path / f"{number:04d}.png")

    def _write(self, name: str, line: str) -> None:
        path = self.path / name
        if name not in self._lines:
            self._lines[name] = []
            write_text(path, "")
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
