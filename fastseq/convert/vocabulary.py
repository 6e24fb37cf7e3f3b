"""Vocabularies of other libraries, in the order of fastseq: pad, bos, eos, unk, and then the tokens of the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.files import read_text
from fastseq.training.tokenizer import RESERVED, Kind, TextTokenizer

MAX_BYTES = 256 << 20
MISSING = -1


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint in the order of its ids, and the names of its reserved ones; None: it has none."""

    tokens: Sequence[str]
    pad: str | None = None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None

    def __post_init__(self) -> None:
        ids = {token: i for i, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if ids[token] != i)
            raise UserError(f"the vocabulary holds {twice!r} twice; expected each token once, in the order of its ids")
        named = [token for token in self.reserved if token is not None]
        for token in named:
            if token not in ids:
                raise UserError(f"the vocabulary has no token {token!r}, which is named as a reserved one")
        if len(set(named)) != len(named):
            raise UserError(f"the reserved tokens must differ, got pad, bos, eos, unk = {self.reserved}")
        for token in set(RESERVED) & (set(self.tokens) - set(named)):
            raise UserError(
                f"the vocabulary has a token {token!r}, which is reserved in fastseq; name it with --{token[1:-1]}"
            )

    @property
    def reserved(self) -> tuple[str | None, ...]:
        """The names of pad, bos, eos and unk."""
        return self.pad, self.bos, self.eos, self.unk

    @property
    def words(self) -> list[str]:
        """The tokens of the text, in fastseq's order."""
        named = {token for token in self.reserved if token is not None}
        return [token for token in self.tokens if token not in named]

    def rows(self) -> Tensor:
        """(V,) int64: for each of fastseq's ids the checkpoint's id, MISSING for a reserved token that it lacks."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        return torch.tensor([MISSING if token is None else ids[token] for token in (*self.reserved, *self.words)])

    def tokenizer(self, kind: Kind, *, closed: bool = True, padding: tuple[int, str] | None = None) -> TextTokenizer:
        """The tokenizer of these tokens: see :meth:`TextTokenizer.of_words`. UserError for one never produced."""
        for token in self.words:
            if kind == "char" and len(token) != 1:
                raise UserError(
                    f"the vocabulary has a token {token!r} of {len(token)} characters, expected one character each; "
                    "name a reserved one (--pad, --bos, --eos, --unk), or give --tokenizer whitespace"
                )
        if padding is not None:
            length, token = padding
            if token not in self.tokens:
                raise UserError(f"the source vocabulary has no token {token!r} to pad with; name one with --pad-with")
            padding = length, RESERVED[0] if token == self.pad else token
        return TextTokenizer.of_words(kind, self.words, closed=closed, padding=padding)


def read_lines(path: Path) -> list[str]:
    """The lines of a file, cut at line feeds alone."""
    return read_text(path, MAX_BYTES).removesuffix("\n").split("\n")


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file in the order of their ids.

    A JSON list; a JSON object from token to id, where a missing id 0 is the padding, as in Keras; or text with a token
    in each line.
    """
    if path.suffix != ".json":
        return read_lines(path)
    try:
        stored = json.loads(read_text(path, MAX_BYTES))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if isinstance(stored, dict) and all(type(i) is int for i in stored.values()):
        ids = {i: token for token, i in stored.items()}
        if 0 not in ids:
            ids[0] = RESERVED[0]
        stored = [ids.get(i) for i in range(len(ids))]
    if not isinstance(stored, list) or not all(isinstance(token, str) for token in stored):
        raise UserError(f"{path} must hold a list of tokens, or an object from token to id with the ids 0, 1, 2, ...")
    return stored
