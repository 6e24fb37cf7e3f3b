"""Parallel text: pairs in, padded batches out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.copying import CopyTokenizer, Words
from fastseq.training.reading import PairFile
from fastseq.training.tokenizer import EOS, PAD, UNK, TextTokenizer

ENCODED = 1 << 12  # lines encoded at once: the tokenizers library takes some hundred bytes a token


class Pairs(NamedTuple):
    """The pairs of a file, in order: `targets[i]` belongs to `sources[i]`."""

    sources: list[str]
    targets: list[str]


def read_pairs(file: str | Path | PairFile) -> Pairs:
    """All pairs of a file, in memory: `source<TAB>target` lines, or what else a `PairFile` reads.

    Raises UserError as :func:`fastseq.training.reading.pairs_of` does.
    """
    pairs = Pairs([], [])
    for source, target in file if isinstance(file, PairFile) else PairFile(str(file)):
        pairs.sources.append(source)
        pairs.targets.append(target)
    return pairs


def group_references(pairs: Pairs) -> dict[str, list[str]]:
    """Map each source, in order of appearance, to its distinct targets, the references of its prediction."""
    references: dict[str, dict[str, None]] = {}
    for source, target in zip(*pairs, strict=True):
        references.setdefault(source, {})[target] = None
    return {source: list(targets) for source, targets in references.items()}


class Sequences:
    """Token sequences of different lengths in one flat tensor, so that a padded batch is one gather."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        rows = list(rows)
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)  # (N,)
        self._flat = torch.tensor([token for row in rows for token in row], dtype=torch.int64)  # (sum of lengths,)
        self._starts = self.lengths.cumsum(0) - self.lengths  # (N,)

    @classmethod
    def joined(cls, flat: Tensor, lengths: Tensor) -> Self:
        """The sequences with these lengths (N,), which lie behind each other in `flat` (sum of lengths,)."""
        sequences = cls(())
        sequences.lengths, sequences._flat = lengths.long(), flat.long()
        sequences._starts = sequences.lengths.cumsum(0) - sequences.lengths
        return sequences

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, rows: Tensor) -> Tensor:
        """The lengths (M,) of the sequences `rows` (M,)."""
        return self.lengths[rows]

    def select(self, rows: Tensor | list[int]) -> Sequences:
        """The sequences `rows` (M,), on the same memory."""
        chosen = copy.copy(self)
        chosen.lengths, chosen._starts = self.lengths[rows], self._starts[rows]
        return chosen

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences `rows` (B,) as tokens (B, longest) filled up with pad, and their lengths (B,)."""
        index, outside, lengths = self._gather(rows)
        return self._flat[index].masked_fill_(outside, PAD), lengths

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions in the flat tensor (B, longest), a mask of the padding among them, and the lengths (B,)."""
        lengths = self.lengths[rows]
        position = torch.arange(int(lengths.max()))  # (longest,)
        index = (self._starts[rows, None] + position).clamp_(max=len(self._flat) - 1)
        return index, position >= lengths[:, None], lengths

    def filler(self) -> Tensor:
        """One token (1, 1), for a process that has no example in an update."""
        return torch.full((1, 1), EOS)


class CopySequences(Sequences):
    """Sources of a model that copies: each position has a source token, and the target token of its copy."""

    def __init__(self, rows: Iterable[tuple[Sequence[int], Sequence[int], Words]]) -> None:
        """Each row: source tokens, target tokens, and the words that the target vocabulary lacks, by number."""
        tokens, columns, words = zip(*rows, strict=True) if (rows := list(rows)) else ((), (), ())
        super().__init__(tokens)
        self._flat = torch.stack((self._flat, Sequences(columns)._flat), 1)  # (sum of lengths, 2)
        self.words = list(words)

    def select(self, rows: Tensor | list[int]) -> CopySequences:
        """The sequences `rows` (M,), on the same memory."""
        chosen = super().select(rows)
        chosen.words = [self.words[row] for row in torch.as_tensor(rows).tolist()]
        return chosen

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences `rows` (B,) as tokens (B, longest, 2) filled up with pad, and their lengths (B,)."""
        index, outside, lengths = self._gather(rows)
        return self._flat[index].masked_fill_(outside[..., None], PAD), lengths

    def filler(self) -> Tensor:
        """One position (1, 1, 2), for a process that has no example in an update."""
        return torch.full((1, 1, 2), EOS)


class Joined(Sequences):
    """Several sets of sequences as one, each taken as often as its weight says."""

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[float]) -> None:
        """A part of n sequences gives `weight * n` rows: its sequences in turn, or an even spread for less than n."""
        self._parts = list(parts)
        self._counts = [max(1, round(weight * len(part))) for part, weight in zip(parts, weights, strict=True)]
        self._bounds = torch.tensor([0, *self._counts]).cumsum(0)  # (parts + 1,)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def _split(self, rows: Tensor) -> Iterator[tuple[Tensor, Sequences, Tensor]]:
        """For each part among `rows` (M,): where its rows stand in `rows`, the part, and the rows in it."""
        numbers = torch.bucketize(rows, self._bounds[1:], right=True)
        for number in numbers.unique().tolist():
            places, part, count = (numbers == number).nonzero()[:, 0], self._parts[number], self._counts[number]
            row = rows[places] - self._bounds[number]
            n = len(part)
            yield places, part, row % n if count >= n else row * n // count

    @property
    def lengths(self) -> Tensor:
        """The lengths (N,) of all rows."""
        return self.lengths_of(torch.arange(len(self)))

    def lengths_of(self, rows: Tensor) -> Tensor:
        """The lengths (M,) of the rows (M,)."""
        lengths = torch.empty_like(rows)
        for places, part, inner in self._split(rows):
            lengths[places] = part.lengths_of(inner)
        return lengths

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences `rows` (B,), padded, and their lengths (B,), as each part pads them."""
        lengths = self.lengths_of(rows)
        parts = [(places, *part.padded(inner)) for places, part, inner in self._split(rows)]
        first = parts[0][1]
        joined = first.new_full((len(rows), int(lengths.max()), *first.shape[2:]), PAD)
        for places, tokens, _ in parts:
            joined[places, : tokens.size(1)] = tokens
        return joined, lengths

    def filler(self) -> Tensor:
        """One position, for a process that has no example in an update."""
        return self._parts[0].filler()


def unknown_note(name: str, unknown: int, tokens: int) -> str:
    """The sentence about unknown tokens."""
    return f"{name}: {unknown:,} of {tokens:,} tokens are not in the vocabulary and are read as <unk>"


def encode(tokenizer: TextTokenizer, lines: Sequence[str], name: str) -> tuple[Sequences, str | None]:
    """Token ids of `lines`, each closed by eos, and a sentence about unknown tokens (None if there are none).

    Raises UserError for an empty line where the tokenizer is not closed: the model never read an empty source.
    """
    if isinstance(tokenizer, CopyTokenizer):
        return _encode_copies(tokenizer, lines, name)
    flat, lengths = encode_flat(tokenizer, lines)
    if not tokenizer.closed and not lengths.all():
        number = int((lengths == 0).argmax()) + 1
        raise UserError(f"{name}: line {number} is empty; this model was trained without an end of source")
    unknown = int((flat == UNK).sum())
    note = unknown_note(name, unknown, len(flat) - len(lengths) * tokenizer.closed) if unknown else None
    return Sequences.joined(torch.from_numpy(flat), torch.from_numpy(lengths)), note


def encode_flat(tokenizer: TextTokenizer, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all lines behind each other (sum of lengths,) int32, and the lengths (N,).

    Each is closed by eos, unless the tokenizer is not.
    """
    starts = range(0, max(len(lines), 1), ENCODED)
    parts = [tokenizer.encode_flat(lines[start : start + ENCODED]) for start in starts]
    flat, lengths = (np.concatenate(side) for side in zip(*parts, strict=True))
    if not tokenizer.closed:
        return flat, lengths
    return np.insert(flat, lengths.cumsum(), EOS).astype(np.int32, copy=False), lengths + 1


def _encode_copies(tokenizer: CopyTokenizer, lines: Sequence[str], name: str) -> tuple[CopySequences, str | None]:
    """As `encode`, each position with the target token of its copy."""
    end = [EOS] * tokenizer.closed
    rows = [(ids + end, columns + end, words) for ids, columns, words in tokenizer.extended(lines)]
    sequences = CopySequences(rows)
    unknown, tokens = sum(ids.count(UNK) for ids, _, _ in rows), len(sequences._flat) - len(lines) * tokenizer.closed
    note = f"{name}: {unknown:,} of {tokens:,} tokens are not in the vocabulary; the model can copy them"
    return sequences, note if unknown else None


def encode_targets(
    tokenizers: tuple[TextTokenizer, TextTokenizer], sources: Sequences, lines: Sequence[str], name: str
) -> tuple[Sequences, str | None]:
    """As `encode`, for the targets of `sources`: of a model that copies, words of the source keep their ids."""
    source, target = tokenizers
    if not isinstance(source, CopyTokenizer):
        return encode(target, lines, name)
    rows = [[*ids, EOS] for ids in source.extended_targets(lines, sources.words)]
    unknown, tokens = sum(row.count(UNK) for row in rows), sum(len(row) - 1 for row in rows)
    return Sequences(rows), unknown_note(name, unknown, tokens) if unknown else None


def encode_prefixes(
    tokenizers: tuple[TextTokenizer, TextTokenizer], sources: Sequences, prefixes: Sequence[str]
) -> list[list[int]]:
    """The ids of the prefix of each source, without eos."""
    source, target = tokenizers
    if isinstance(source, CopyTokenizer):
        return list(source.extended_targets(prefixes, sources.words))
    return target.encode(prefixes)
