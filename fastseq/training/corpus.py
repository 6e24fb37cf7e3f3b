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
from fastseq.training.features import Features
from fastseq.training.folder import model_options
from fastseq.training.init_from import grown
from fastseq.training.options import DataOptions, options_of
from fastseq.training.progress import say
from fastseq.training.tokenizer import RESERVED, TextTokenizer

LEAST_SIZE = len(RESERVED)  # of a vocabulary


class Decoding:
    """Greedy decoding of validation sources, distributed over the processes, and the metrics of the result."""

    def __init__(
        self,
        sources: Sequences,
        references: Sequence[Sequence[str]],
        tokenizer: TextTokenizer,
        *,
        text: bool,
        rates: bool,
        max_length_ratio: float,
    ) -> None:
        self.sources, self.references, self.tokenizer = sources, references, tokenizer
        self.text, self.rates = text, rates
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
        return metrics.score(predictions, self.references, self.tokenizer, text=self.text, rates=self.rates)


class Corpus(NamedTuple):
    """The encoded training and validation data of a run."""

    source_tokenizer: TextTokenizer | Features
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


def length_ratio(source: Sequences, target: Sequences, reduction: int = 1, least: float = LEAST_LENGTH_RATIO) -> float:
    """Target tokens allowed for each position of the encoder's output: 1.5 times what the training data needs.

    `reduction` source positions make one of the encoder's output. The result is at least `least`.
    """
    positions = -(-source.lengths // reduction)
    return max(least, round(1.5 * float((target.lengths / positions).max()), 2))


def load_corpus(
    config: Namespace, tokenizers: tuple[TextTokenizer | Features, TextTokenizer] | None, *, grow: bool = False
) -> Corpus:
    """Read and encode both files, with these tokenizers or, for a new run, with new ones.

    `grow` adds the tokens of the training file to the tokenizers.
    """
    options = options_of(config, "data", DataOptions)
    features = config.model.source_features
    reduction = model_options(config, features or LEAST_SIZE, LEAST_SIZE).time_reduction  # checks them before the work
    files, pairs = (config.train, config.valid), (read_pairs(config.train), read_pairs(config.valid))
    if tokenizers is not None and grow:
        tokenizers = grown(tokenizers, pairs[0], options.vocab_size)
    if features is None:
        source, target = tokenizers or train_tokenizers(options, pairs[0])
        sources = [_encoded(source, part.sources, f"{file} (source)") for file, part in zip(files, pairs, strict=True)]
        least = LEAST_LENGTH_RATIO
    else:
        source, target = tokenizers or new_features(config, options, pairs[0])
        sources = [source.read(part.sources, file) for file, part in zip(files, pairs, strict=True)]
        if source.mean is None:
            source.fit(sources[0])
            sources = [source.normalise(frames) for frames in sources]
        least = 0.0
    targets = [_encoded(target, part.targets, f"{file} (target)") for file, part in zip(files, pairs, strict=True)]
    sample = spread(list(group_references(pairs[1]).items()), options.valid_sentences)
    first = {text: row for row, text in reversed(list(enumerate(pairs[1].sources)))}
    decoding = Decoding(
        sources[1].select(torch.tensor([first[text] for text, _ in sample])),
        [refs for _, refs in sample],
        target,
        text=options.text_metrics,
        rates=features is not None,
        max_length_ratio=options.max_length_ratio or length_ratio(sources[0], targets[0], reduction, least),
    )
    return Corpus(source, target, (sources[0], targets[0]), (sources[1], targets[1]), decoding)


def new_features(config: Namespace, options: DataOptions, pairs: Pairs) -> tuple[Features, TextTokenizer]:
    """The reader of features, without mean and deviation yet, and the target tokenizer of a new run."""
    if options.shared_vocabulary:
        raise UserError("data.shared_vocabulary needs text on both sides, and --model.source_features reads features")
    target = TextTokenizer.train(options.target_tokenizer, pairs.targets, options.vocab_size)
    return Features(int(config.model.source_features), float(options.highest_frequency)), target


def _encoded(tokenizer: TextTokenizer, lines: Sequence[str], name: str) -> Sequences:
    """The token ids of one side of a file; unknown tokens are reported."""
    sequences, note = encode(tokenizer, lines, name)
    if note:
        say(note)
    return sequences
