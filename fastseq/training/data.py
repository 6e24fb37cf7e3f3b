"""Parallel text: `source<TAB>target` files in, padded batches out."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.tokenizer import EOS, PAD, UNK, TextTokenizer


class Pairs(NamedTuple):
    """The lines of a TSV file, in order: `targets[i]` belongs to `sources[i]`."""

    sources: list[str]
    targets: list[str]


def decoded_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and text of UTF-8 `lines` that came from `name`; raises UserError at the first bad byte."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
            ) from error


def read_pairs(path: str | Path) -> Pairs:
    """Read a TSV file of `source<TAB>target` lines in UTF-8.

    Raises UserError for a missing or empty file, a line without exactly one tab, an empty source or target, bad UTF-8.
    """
    try:
        lines = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected source<TAB>target lines") from error
    pairs = Pairs([], [])
    for number, line in decoded_lines(lines, str(path)):
        where = f"{path}, line {number}"
        fields = line.split("\t")
        if len(fields) != 2:
            raise UserError(f"{where}: expected source<TAB>target with one tab, found {len(fields) - 1} tabs")
        for field, value in zip(("source", "target"), fields, strict=True):
            if not value.strip():
                raise UserError(f"{where}: the {field} is empty; expected source<TAB>target, fill or remove the line")
        pairs.sources.append(fields[0])
        pairs.targets.append(fields[1])
    if not pairs.sources:
        raise UserError(f"{path} is empty; expected at least one source<TAB>target line")
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

    def __len__(self) -> int:
        return len(self.lengths)

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


def encode(tokenizer: TextTokenizer, lines: Sequence[str], name: str) -> tuple[Sequences, str | None]:
    """Token ids of `lines`, each closed by eos, and a sentence about unknown tokens (None if there are none).

    Raises UserError for an empty line where the tokenizer is not closed: the model never read an empty source.
    """
    rows = tokenizer.encode(lines)
    if not tokenizer.closed and [] in rows:
        raise UserError(f"{name}: line {rows.index([]) + 1} is empty; this model was trained without an end of source")
    unknown = sum(row.count(UNK) for row in rows)
    note = None
    if unknown:
        tokens = sum(map(len, rows))
        note = f"{name}: {unknown:,} of {tokens:,} tokens are not in the vocabulary and are read as <unk>"
    end = (EOS,) if tokenizer.closed else ()
    return Sequences([*row, *end] for row in rows), note
