"""The decoding of the lines of a command, by its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace

from fastseq.errors import UserError
from fastseq.training.data import Sequences, encode_prefixes
from fastseq.training.decode import Hypothesis, decode
from fastseq.training.search_options import check_search_options, given_search, read_dictionary, read_prefixes
from fastseq.training.tokenizer import UNK
from fastseq.training.trained import TrainedModel
from fastseq.training.unknown import check_replacement, replace_unknown


class Decoding:
    """Decodes source lines as the options of `add_search_options` say, over the search options of the model's folder.

    Raises UserError for options that are out of range, exclude each other, or need attention that the model lacks.
    """

    def __init__(self, options: Namespace, trained: TrainedModel, n_best: int) -> None:
        self.model, self.tokenizers = trained.model, (trained.source_tokenizer, trained.target_tokenizer)
        self.search: dict[str, Any] = trained.search(given_search(options), n_best=n_best)
        check_search_options(self.search)
        self.prefix, self.prefixes, self.prefix_file = options.prefix, read_prefixes(options), options.prefix_file
        self.dictionary = read_dictionary(options)
        if self.dictionary is not None:
            check_replacement(self.model.config.attention, self.tokenizers[0])
        if options.seed is not None:
            if not self.search.get("do_sample"):
                raise UserError("--seed acts on sampling only; add --do-sample true, or leave it out")
            torch.manual_seed(options.seed)

    def __call__(
        self, sources: Sequences, lines: Sequence[str], rows: Sequence[int], *, attention: bool = False, **more: Any
    ) -> list[list[Hypothesis]]:
        """The hypotheses of each of `lines`, whose tokens are `sources`; `rows` are their numbers, from 0."""
        found = decode(
            self.model,
            sources,
            self.tokenizers[1],
            attention=attention or self.dictionary is not None,
            prefix_tokens=self._prefix_tokens(sources, rows),
            **self.search,
            **more,
        )
        return found if self.dictionary is None else replace_unknown(found, lines, self.tokenizers, self.dictionary)

    def check_number(self, lines: int) -> None:
        """Raise UserError unless there is a prefix for each of `lines` lines."""
        if self.prefixes is not None and len(self.prefixes) != lines:
            raise UserError(
                f"{self.prefix_file} has {len(self.prefixes):,} lines for {lines:,} sources; give one line for each, "
                "an empty one for no prefix"
            )

    def facts(self) -> dict[str, Any]:
        """The options that decide the predictions, for a report."""
        named = {"prefix": self.prefix, "prefix_file": self.prefix_file, "replace_unk": self.dictionary is not None}
        return self.search | {name: value for name, value in named.items() if value}

    def _prefix_tokens(self, sources: Sequences, rows: Sequence[int]) -> list[list[int]] | None:
        if self.prefixes is None and not self.prefix:
            return None
        if self.prefixes is not None and rows and rows[-1] >= len(self.prefixes):
            self.check_number(rows[-1] + 1)
        texts = [self.prefix if self.prefixes is None else self.prefixes[row] for row in rows]
        tokens = encode_prefixes(self.tokenizers, sources, texts)
        unknown = sum(row.count(UNK) for row in tokens)
        if unknown:
            print(
                f"{unknown:,} tokens of the prefixes are not in the vocabulary and are read as <unk>", file=sys.stderr
            )
        return tokens
