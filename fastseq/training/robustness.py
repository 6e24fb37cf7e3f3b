"""The error rates of a model under attack: noise on the characters, and swapped source tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastseq.errors import UserError
from fastseq.seq2seq.ensemble import Ensemble
from fastseq.training import metrics
from fastseq.training.data import Pairs, Sequences, encode, encode_targets, group_references
from fastseq.training.decode import decode
from fastseq.training.features import Features
from fastseq.training.flips import flipped
from fastseq.training.noise import KINDS, noisy
from fastseq.training.tagged import Tagged

if TYPE_CHECKING:
    from fastseq.training.trained import TrainedModel

RATES = (0.05, 0.1, 0.2)
FLIPS = 3


class Attack(NamedTuple):
    """The result of one attack."""

    name: str  # "none", a kind of noise, "gradient flips", "random flips"
    strength: float  # rate of the noise, or number of flips
    changed: float  # percentage of sources that it changed
    sequence_error_rate: float
    token_error_rate: float


class Robustness(NamedTuple):
    """Error rates without and under attacks; the first of ``attacks`` is none."""

    sources: int
    attacks: list[Attack]

    def table(self) -> str:
        """The attacks as aligned lines; the last column is the rise of the sequence error rate."""
        clean = self.attacks[0].sequence_error_rate
        lines = [
            f"{'attack':<16}{'strength':>9}{'changed %':>11}{'sequence errors %':>19}{'token errors %':>16}{'rise':>8}"
        ]
        for a in self.attacks:
            rise = a.sequence_error_rate - clean
            lines.append(
                f"{a.name:<16}{a.strength:>9g}{a.changed:>11.1f}{a.sequence_error_rate:>19.2f}"
                f"{a.token_error_rate:>16.2f}{rise:>+8.2f}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {"sources": self.sources, "attacks": [attack._asdict() for attack in self.attacks]}

    def plot(self, png: str | Path) -> None:
        """Draw the sequence error rate over the strength of each attack. Needs matplotlib."""
        from fastseq.training.plots import plot_robustness

        plot_robustness([tuple(attack) for attack in self.attacks], Path(png))


def measure(
    trained: TrainedModel,
    pairs: Sequence[tuple[str, str]],
    *,
    kinds: Sequence[str] = KINDS,
    rates: Sequence[float] = RATES,
    flips: int = FLIPS,
    seed: int = 0,
    max_tokens: int = 4096,
    **search: Any,
) -> Robustness:
    """See :meth:`fastseq.TrainedModel.robustness`."""
    tokenizers = trained.source_tokenizer, trained.target_tokenizer
    _check(trained.model, tokenizers[0], len(pairs), kinds, rates, flips)
    references = group_references(Pairs(*map(list, zip(*pairs, strict=True))))
    lines, answers = list(references), list(references.values())
    options = trained.search(search, n_best=1)

    def errors(sources: Sequences) -> tuple[float, float]:
        found = decode(trained.model, sources, tokenizers[1], max_tokens=max_tokens, **options)
        values = metrics.score([best.text for (best,) in found], answers, tokenizers[1])
        return values["sequence_error_rate"], values["token_error_rate"]

    clean, _ = encode(tokenizers[0], lines, "sources")
    attacks = [Attack("none", 0, 0.0, *errors(clean))]
    for kind, rate, texts in _noise(lines, kinds, rates, seed):
        changed = sum(a != b for a, b in zip(texts, lines, strict=True))
        result = errors(encode(tokenizers[0], texts, "sources")[0])
        attacks.append(Attack(kind, rate, 100 * changed / len(lines), *result))
    if flips:
        targets, _ = encode_targets(tokenizers, clean, [several[0] for several in answers], "targets")
        for name, generator in (("gradient flips", None), ("random flips", torch.Generator().manual_seed(seed))):
            given = {"flips": flips, "generator": generator, "max_tokens": max_tokens}
            for number, sources in enumerate(flipped(trained.model, clean, targets, tokenizers[0], **given), start=1):
                attacks.append(Attack(name, number, _changed(clean, sources), *errors(sources)))
    return Robustness(len(lines), attacks)


def _noise(
    lines: Sequence[str], kinds: Sequence[str], rates: Sequence[float], seed: int
) -> Iterator[tuple[str, float, list[str]]]:
    """Each kind and rate, with the noisy lines; the noise of one does not depend on the others."""
    alphabet = sorted({c for line in lines for c in line if not c.isspace()})
    for kind in kinds:
        for rate in rates:
            numbers = random.Random(f"{seed} {kind} {rate}")
            yield kind, rate, [noisy(line, kind, rate, numbers, alphabet) for line in lines]


def _changed(before: Sequences, after: Sequences) -> float:
    rows = torch.arange(len(before))
    return 100 * float((before.padded(rows)[0] != after.padded(rows)[0]).any(1).double().mean())


def _check(model: Any, source: object, pairs: int, kinds: Sequence[str], rates: Sequence[float], flips: int) -> None:
    if isinstance(source, Features):
        raise UserError("the model reads features, which have no characters to change; attack a model that reads text")
    if isinstance(source, Tagged):
        raise UserError("an attack would change the tags of the sources, too; attack a model that reads text alone")
    if pairs == 0:
        raise UserError("expected at least one (source, target) pair, got none")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"unknown noise {unknown[0]!r}; choose among {', '.join(KINDS)}")
    wrong = [rate for rate in rates if not 0 < rate <= 1]
    if wrong:
        raise UserError(f"the rate of noise is a probability above 0, up to 1, got {wrong[0]:g}")
    if flips < 0:
        raise UserError(f"flips must be at least 0, got {flips}")
    if flips and isinstance(model, Ensemble):
        raise UserError(
            "flips follow the gradient of one model, and an ensemble is several; set flips to 0, or attack one"
        )
    if flips and model.config.copy:
        raise UserError("flips change tokens in place, and a model that copies reads the text; set flips to 0")
