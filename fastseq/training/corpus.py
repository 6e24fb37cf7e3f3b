"""The data of a training run: tokenizers, encoded pairs, and the validation sources that are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jsonargparse import Namespace

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training import metrics
from fastseq.training.data import Pairs, Sequences, encode, group_references, read_pairs
from fastseq.training.decode import LEAST_LENGTH_RATIO, decode
from fastseq.training.options import DataOptions, options_of
from fastseq.training.progress import say
from fastseq.training.tokenizer import TextTokenizer


class Decoding:
    """Greedy decoding of validation sources, distributed over the processes, and the metrics of the result."""

    def __init__(
        self,
        sources: Sequences,
        references: Sequence[Sequence[str]],
        tokenizer: TextTokenizer,
        *,
        text: bool,
        max_length_ratio: float,
    ) -> None:
        self.sources, self.references, self.tokenizer, self.text = sources, references, tokenizer, text
        self.max_length_ratio = max_length_ratio

    def __call__(self, model: Seq2Seq, rank: int, world_size: int) -> dict[str, float]:
        """Metrics over all sources; every process must call it and gets the same values."""
        mine = self.sources.select(torch.arange(rank, len(self.sources), world_size))
        found = decode(model, mine, self.tokenizer, max_length_ratio=self.max_length_ratio)
        texts = [best.text for (best,) in found]
        shares = [texts]
        if world_size > 1:
            shares = [None] * world_size
            torch.distributed.all_gather_object(shares, texts)
        predictions = [shares[i % world_size][i // world_size] for i in range(len(self.sources))]
        return metrics.score(predictions, self.references, self.tokenizer, text=self.text)


class Corpus(NamedTuple):
    """The encoded training and validation data of a run."""

    source_tokenizer: TextTokenizer
    target_tokenizer: TextTokenizer
    train: tuple[Sequences, Sequences]
    valid: tuple[Sequences, Sequences]
    decoding: Decoding


def train_tokenizers(options: DataOptions, pairs: Pairs) -> tuple[TextTokenizer, TextTokenizer]:
    """Source and target tokenizer from the training data: one for both sides with `shared_vocabulary`."""
    kinds = options.source_tokenizer, options.target_tokenizer
    if not options.shared_vocabulary:
        sides = zip(kinds, pairs, strict=True)
        source, target = (TextTokenizer.train(kind, lines, options.vocab_size) for kind, lines in sides)
        return source, target
    if kinds[0] != kinds[1]:
        raise UserError(
            f"data.shared_vocabulary needs one kind of tokenizer on both sides, got {kinds[0]} and {kinds[1]}; "
            "make data.source_tokenizer and data.target_tokenizer equal"
        )
    shared = TextTokenizer.train(kinds[0], [*pairs.sources, *pairs.targets], options.vocab_size)
    return shared, shared


def spread(items: Sequence, n: int) -> list:
    """At most `n` of the items, evenly spread over all of them."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def length_ratio(source: Sequences, target: Sequences) -> float:
    """Target tokens allowed for each source token: one and a half times what the training data needs, at least 2."""
    return max(LEAST_LENGTH_RATIO, round(1.5 * float((target.lengths / source.lengths).max()), 2))


def load_corpus(config: Namespace, tokenizers: tuple[TextTokenizer, TextTokenizer] | None) -> Corpus:
    """Read and encode both files, with these tokenizers or, for a new run, with new ones."""
    options = options_of(config, "data", DataOptions)
    train, valid = read_pairs(config.train), read_pairs(config.valid)
    tokenizers = tokenizers or train_tokenizers(options, train)
    encoded = []
    for name, pairs in ((config.train, train), (config.valid, valid)):
        for tokenizer, lines, side in zip(tokenizers, pairs, ("source", "target"), strict=True):
            sequences, note = encode(tokenizer, lines, f"{name} ({side})")
            encoded.append(sequences)
            if note:
                say(note)
    sample = spread(list(group_references(valid).items()), options.valid_sentences)
    sources, _ = encode(tokenizers[0], [source for source, _ in sample], config.valid)
    decoding = Decoding(
        sources,
        [refs for _, refs in sample],
        tokenizers[1],
        text=options.text_metrics,
        max_length_ratio=options.max_length_ratio or length_ratio(*encoded[:2]),
    )
    return Corpus(*tokenizers, (encoded[0], encoded[1]), (encoded[2], encoded[3]), decoding)
