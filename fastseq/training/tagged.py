"""Sources with tags: side information that belongs to the whole source, such as `V;PST` for inflection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.data import Sequences, encode, encode_flat, unknown_note
from fastseq.training.tokenizer import EOS, RESERVED, UNK, TextTokenizer


class Tagged:
    """A source side of lines `text<TAB>tags`: the tokenizer of the text, and the vocabulary of the tags.

    Tags are separated by semicolons or white space; their order has no meaning. Their tokenizer is not closed.
    """

    def __init__(self, text: TextTokenizer, tags: TextTokenizer) -> None:
        self.text, self.tags = text, tags

    @classmethod
    def train(cls, text: TextTokenizer, tags: Iterable[str], vocab_size: int) -> Self:
        """With the tags of these lines, the frequent ones first, up to `vocab_size` ids with the reserved ones."""
        found = TextTokenizer.train("whitespace", tags, vocab_size)
        words = found.tokens(range(len(RESERVED), len(found)))
        return cls(text, TextTokenizer.of_words("whitespace", words, closed=False))

    @property
    def kind(self) -> str:
        """The kind of the text's tokens."""
        return self.text.kind

    def __len__(self) -> int:
        return len(self.text)

    def __eq__(self, other: object) -> bool:
        """True if both turn every source into the same ids."""
        return isinstance(other, Tagged) and self.text == other.text and self.tags == other.tags

    def __hash__(self) -> int:
        return hash((self.text, self.tags))

    def encode(
        self, lines: Sequence[str], name: str, numbers: Sequence[int] | None = None
    ) -> tuple[TaggedSequences, str | None]:
        """The lines as ids, and a sentence about unknown tokens and tags (None if there are none).

        Raises UserError, with the line's number (default 1, 2, ...), for a line without a text or without one tab.
        """
        for number, line in zip(numbers or range(1, len(lines) + 1), lines, strict=True):
            text, tab, tags = line.partition("\t")
            if not tab or "\t" in tags or not text.strip():
                raise UserError(f"{name}, line {number}: expected source<TAB>tags, such as walk<TAB>V;PST")
        tokens, note = encode(self.text, list(texts_of(lines)), name)
        flat, lengths = encode_flat(self.tags, list(tags_of(lines)))
        unknown = int((flat == UNK).sum())
        notes = [note, unknown_note(f"{name} (tags)", unknown, len(flat)) if unknown else None]
        tags = Sequences.joined(torch.from_numpy(flat), torch.from_numpy(lengths))
        return TaggedSequences(tokens, tags), "\n".join(filter(None, notes)) or None

    def tokens(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Name of the token of each position (token, tag, tag, ...), for the axes of a picture."""
        return self.text.tokens([token for token, *_ in ids])

    def pieces(self, lines: Sequence[str]) -> list[list[str]]:
        """As :meth:`TextTokenizer.pieces`, of the texts."""
        return self.text.pieces(list(texts_of(lines)))


class TaggedSequences(Sequences):
    """Token sequences, each with the tags of the whole sequence."""

    def __init__(self, tokens: Sequences, tags: Sequences) -> None:
        self.sides = tokens, tags

    def __len__(self) -> int:
        return len(self.sides[0])

    @property
    def lengths(self) -> Tensor:
        """The lengths (N,) of the token sequences."""
        return self.sides[0].lengths

    def lengths_of(self, rows: Tensor) -> Tensor:
        """The lengths (M,) of the token sequences `rows` (M,)."""
        return self.sides[0].lengths_of(rows)

    def select(self, rows: Tensor | list[int]) -> TaggedSequences:
        """The sequences `rows` (M,)."""
        return TaggedSequences(*(side.select(rows) for side in self.sides))

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences `rows` (B,) as (B, longest, 1 + most tags), filled up with pad, and their lengths (B,).

        Each position holds its token and the tags of the sequence.
        """
        tokens, lengths = self.sides[0].padded(rows)
        tags, _ = self.sides[1].padded(rows)
        spread = tags[:, None].expand(-1, tokens.size(1), -1)
        return torch.cat([tokens[..., None], spread], -1), lengths

    def filler(self) -> Tensor:
        """One token (1, 1, 1) without tags, for a process that has no example in an update."""
        return torch.full((1, 1, 1), EOS)


def texts_of(lines: Iterable[str]) -> Iterator[str]:
    """The text of each line `text<TAB>tags`."""
    return (line.partition("\t")[0] for line in lines)


def tags_of(lines: Iterable[str]) -> Iterator[str]:
    """The tags of each line `text<TAB>tags`, separated by white space."""
    return (line.partition("\t")[2].replace(";", " ") for line in lines)


def text_side(source: object) -> object:
    """The tokenizer of the source's text; features stay what they are."""
    return source.text if isinstance(source, Tagged) else source
