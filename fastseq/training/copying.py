"""Text for models that copy: each source token with the target token of its copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from fastseq.errors import UserError
from fastseq.training.tokenizer import UNK, TextTokenizer

Words = tuple[str, ...]


class CopyTokenizer(TextTokenizer):
    """The source tokenizer of a model with ``copy``, beside the target tokenizer.

    A word that the target vocabulary lacks has an id of its own within its sentence: V, the size of that vocabulary,
    for the first such word, V + 1 for the second, in ``Seq2Seq.encode``'s extended vocabulary.
    """

    def __init__(self, source: TextTokenizer, target: TextTokenizer) -> None:
        super().__init__(source.kind, source._tokenizer)
        self.target = target

    @classmethod
    def of(cls, source: object, target: TextTokenizer) -> Self:
        """Raises UserError for tokenizers whose tokens are not the same pieces of text on both sides."""
        if not isinstance(source, TextTokenizer):
            raise UserError("--model.copy copies tokens of the source, and the model reads features; leave it out")
        if source.kind != target.kind:
            raise UserError(
                f"--model.copy needs one kind of tokens on both sides, got {source.kind} and {target.kind}; make "
                "data.source_tokenizer and data.target_tokenizer equal"
            )
        if source.kind == "bpe":
            raise UserError(
                "--model.copy copies whole tokens, and bpe has no unknown words to copy; choose whitespace or char for "
                "data.source_tokenizer and data.target_tokenizer, or leave it out"
            )
        return cls(source, target)

    def extended(self, lines: Sequence[str]) -> Iterator[tuple[list[int], list[int], Words]]:
        """Of each line: source tokens, target tokens of their copies, and the words that the target lacks."""
        source, target = self._ids_of_words, self.target._ids_of_words
        for pieces in self.pieces(lines):
            unknown: dict[str, int] = {}
            columns = []
            for word in pieces:
                token = target.get(word, UNK)
                columns.append(token if token > UNK else unknown.setdefault(word, len(target) + len(unknown)))
            yield [max(source.get(word, UNK), UNK) for word in pieces], columns, tuple(unknown)

    def extended_targets(self, lines: Sequence[str], words: Sequence[Words]) -> Iterator[list[int]]:
        """The target tokens of each line, whose source has the unknown ``words``; all others are unk."""
        target = self.target._ids_of_words
        for pieces, unknown in zip(self.target.pieces(lines), words, strict=True):
            own = {word: len(target) + number for number, word in enumerate(unknown)}
            yield [own.get(word, UNK) if target.get(word, UNK) <= UNK else target[word] for word in pieces]
