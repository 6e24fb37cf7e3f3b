"""The data of a training run: tokenizers, encoded pairs, and the validation sources that are decoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import Namespace

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training import metrics
from fastseq.training.cache import cached, columns_of
from fastseq.training.copying import CopyTokenizer
from fastseq.training.data import (
    Joined,
    Pairs,
    Sequences,
    encode,
    encode_targets,
    group_references,
    read_pairs,
    unknown_note,
)
from fastseq.training.decode import LEAST_LENGTH_RATIO, decode
from fastseq.training.features import Features, Source
from fastseq.training.folder import model_options
from fastseq.training.init_from import grown
from fastseq.training.options import DataOptions, measured, options_of
from fastseq.training.progress import say
from fastseq.training.reading import PairFile, as_list
from fastseq.training.tagged import Tagged, TaggedSequences, tags_of, texts_of
from fastseq.training.tokenizer import RESERVED, TextTokenizer

CACHED_FROM = 64 << 20  # bytes of training files
VOCABULARY_LINES = 2_000_000  # of a large file
LEAST_SIZE = len(RESERVED)  # of a vocabulary


class Decoding:
    """Greedy decoding of validation sources, distributed over the processes, and the metrics of the result."""

    def __init__(
        self,
        sources: Sequences,
        references: Sequence[Sequence[str]],
        tokenizer: TextTokenizer,
        *,
        names: Sequence[str],
        max_length_ratio: float,
    ) -> None:
        self.sources, self.references, self.tokenizer = sources, references, tokenizer
        self.names = names
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
        return metrics.score(predictions, self.references, self.tokenizer, self.names)


class Corpus(NamedTuple):
    """The encoded training and validation data of a run."""

    source_tokenizer: Source
    target_tokenizer: TextTokenizer
    train: tuple[Sequences, Sequences]
    valid: tuple[Sequences, Sequences]
    decoding: Decoding


class Part(NamedTuple):
    """One training file: its pairs in memory, or the folder of its cache where it is large."""

    file: PairFile
    pairs: Pairs | None
    cache: Path | None

    def lines(self, side: int) -> Iterator[str]:
        """Lines of one side for a vocabulary: all of them, or some `VOCABULARY_LINES` spread over a large file."""
        if self.pairs is not None:
            return iter(self.pairs[side])
        size, first = self.file.size(), list(itertools.islice(self.file, 1000))
        pair = sum(len(text.encode("utf-8", "surrogatepass")) + 1 for pair in first for text in pair) / len(first)
        step = max(1, round(size / pair / VOCABULARY_LINES))
        return (pair[side] for pair in itertools.islice(self.file, 0, None, step))

    def encoded(self, tokenizers: tuple[TextTokenizer | Tagged, TextTokenizer]) -> tuple[Sequences, Sequences]:
        """Both sides as token ids; unknown tokens are reported."""
        names = [f"{self.file.path} ({side})" for side in ("source", "target")]
        if self.pairs is not None:
            tagged = isinstance(tokenizers[0], Tagged)
            lines, path = self.pairs.sources, self.file.path
            source = _told(tokenizers[0].encode(lines, path) if tagged else encode(tokenizers[0], lines, names[0]))
            return source, _told(encode_targets(tokenizers, source, self.pairs.targets, names[1]))
        sides, counts, seconds = cached(self.file, tokenizers, self.cache)
        for name, unknown, tokens in zip(columns_of(tokenizers), counts.unknown, counts.tokens, strict=True):
            if unknown:
                say(unknown_note(f"{self.file.path} ({name})", unknown, tokens))
        made = f"encoded in {seconds:.0f} s" if seconds else "already encoded"
        say(f"{self.file.path}: {counts.rows:,} pairs {made}, {counts.bytes / 2**20:,.0f} MiB in {self.cache}")
        return sides


def training_parts(config: Namespace) -> list[Part]:
    """The training files; large ones, or all with --data.cache, are not read into memory. Raises UserError."""
    files = pair_files(config, "train")
    weights = config.data.weights
    if weights is not None and len(weights) != len(files):
        raise UserError(
            f"--data.weights has {len(weights)} numbers for {len(files)} training file(s); give one for each"
        )
    folder = Path(config.data.cache) if config.data.cache else None
    if folder is None and sum(file.size() for file in files) >= CACHED_FROM:
        folder = Path(config.run_dir) / "cache"
    if config.model.copy and config.data.cache:
        raise UserError("--data.cache holds no copies: with --model.copy all data is in memory; leave the cache out")
    if folder is None or config.model.copy or config.model.source_features is not None:
        return [Part(file, read_pairs(file), None) for file in files]
    return [Part(file, None, folder) for file in files]


def pair_files(config: Namespace, name: str) -> list[PairFile]:
    """The files of --train or --valid, each with the file of its targets, if any."""
    paths, targets = (as_list(config[key]) for key in (name, f"{name}_targets"))
    if targets and len(targets) != len(paths):
        raise UserError(f"--{name}_targets names {len(targets)} file(s), --{name} {len(paths)}; give one for each")
    columns = config.data.source_column, config.data.target_column, config.data.tag_column if config.data.tags else None
    return [PairFile(path, targets[i] if targets else None, *columns) for i, path in enumerate(paths)]


def sides_of(parts: Sequence[Part]) -> tuple[Iterator[str], Iterator[str]]:
    """The lines of both sides of all files, for a vocabulary."""
    source, target = (itertools.chain.from_iterable([part.lines(side) for part in parts]) for side in (0, 1))
    return source, target


def train_tokenizers(options: DataOptions, parts: Sequence[Part]) -> tuple[TextTokenizer | Tagged, TextTokenizer]:
    """Source and target tokenizer from the training data: one for both sides with `shared_vocabulary`."""
    if not options.tags:
        return _train_tokenizers(options, sides_of(parts))
    lines, targets = sides_of(parts)
    source, target = _train_tokenizers(options, (texts_of(lines), targets))
    return Tagged.train(source, tags_of(sides_of(parts)[0]), options.vocab_size), target


def _train_tokenizers(
    options: DataOptions, sides: tuple[Iterator[str], Iterator[str]]
) -> tuple[TextTokenizer, TextTokenizer]:
    kinds = options.source_tokenizer, options.target_tokenizer
    if not options.shared_vocabulary:
        sides = zip(kinds, sides, strict=True)
        source, target = (TextTokenizer.train(kind, lines, options.vocab_size) for kind, lines in sides)
        return source, target
    if kinds[0] != kinds[1]:
        raise UserError(
            f"data.shared_vocabulary needs one kind of tokenizer on both sides, got {kinds[0]} and {kinds[1]}; "
            "make data.source_tokenizer and data.target_tokenizer equal"
        )
    shared = TextTokenizer.train(kinds[0], itertools.chain(*sides), options.vocab_size)
    return shared, shared


def spread(items: Sequence, n: int) -> list:
    """At most `n` of the items, evenly spread over all of them."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def length_ratio(source: Sequences, target: Sequences, reduction: int = 1, least: float = LEAST_LENGTH_RATIO) -> float:
    """Target tokens allowed for each position of the encoder's output: 1.5 times what the training data needs.

    `reduction` source positions make one of the encoder's output. The result is at least `least`.
    """
    largest = 0.0
    for rows in torch.arange(len(source)).split(1 << 20):
        positions = -(-source.lengths_of(rows) // reduction)
        largest = max(largest, float((target.lengths_of(rows) / positions).max()))
    return max(least, round(1.5 * largest, 2))


def load_corpus(config: Namespace, tokenizers: tuple[Source, TextTokenizer] | None, *, grow: bool = False) -> Corpus:
    """Read and encode all files, with these tokenizers or, for a new run, with new ones.

    `grow` adds the tokens of the training files to the tokenizers.
    """
    options = options_of(config, "data", DataOptions)
    features = config.model.source_features
    least_sizes = features or LEAST_SIZE, LEAST_SIZE, LEAST_SIZE if options.tags else None
    reduction = model_options(config, *least_sizes).time_reduction  # checks them before the work
    parts, valid_files = training_parts(config), pair_files(config, "valid")
    if len(valid_files) != 1:
        raise UserError(f"--valid needs one file, got {len(valid_files)}")
    valid = Part(valid_files[0], read_pairs(valid_files[0]), None)
    if tokenizers is not None and grow:
        tokenizers = grown(tokenizers, sides_of(parts), options.vocab_size)
    if features is None:
        tokenizers = tokenizers or train_tokenizers(options, parts)
        readers = (CopyTokenizer.of(*tokenizers), tokenizers[1]) if config.model.copy else tokenizers
        encoded = [part.encoded(readers) for part in (*parts, valid)]
        least = LEAST_LENGTH_RATIO
    else:
        tokenizers = tokenizers or new_features(config, options, parts)
        encoded = _read_features(tokenizers, (*parts, valid))
        least = 0.0
    weights = [float(weight) for weight in options.weights or [1.0] * len(parts)]
    train = tuple(joined(side[:-1], weights) for side in zip(*encoded, strict=True))
    sample = spread(list(group_references(valid.pairs).items()), options.valid_sentences)
    first = {text: row for row, text in reversed(list(enumerate(valid.pairs.sources)))}
    references, names = [refs for _, refs in sample], measured(config)
    metrics.check_references(names, references)  # before the first epoch
    decoding = Decoding(
        encoded[-1][0].select(torch.tensor([first[text] for text, _ in sample])),
        references,
        tokenizers[1],
        names=names,
        max_length_ratio=options.max_length_ratio or length_ratio(*train, reduction, least),
    )
    return Corpus(*tokenizers, train, encoded[-1], decoding)


def joined(parts: Sequence[Sequences], weights: Sequence[float]) -> Sequences:
    """One side of all training files."""
    if isinstance(parts[0], TaggedSequences):
        return TaggedSequences(*(joined(side, weights) for side in zip(*(part.sides for part in parts), strict=True)))
    return parts[0] if len(parts) == 1 and weights[0] == 1 else Joined(parts, weights)


def _read_features(readers: tuple[Features, TextTokenizer], parts: Sequence[Part]) -> list[tuple[Sequences, Sequences]]:
    """The frames and target ids of each file; a new reader takes its statistics from all files but the last."""
    source, target = readers
    frames = [source.read(part.pairs.sources, part.file.path) for part in parts]
    if source.mean is None:
        source.fit(frames[:-1])
        frames = [source.normalise(part) for part in frames]
    targets = [_told(encode(target, part.pairs.targets, f"{part.file.path} (target)")) for part in parts]
    return list(zip(frames, targets, strict=True))


def new_features(config: Namespace, options: DataOptions, parts: Sequence[Part]) -> tuple[Features, TextTokenizer]:
    """The reader of features, without mean and deviation yet, and the target tokenizer of a new run."""
    if options.shared_vocabulary:
        raise UserError("data.shared_vocabulary needs text on both sides, and --model.source_features reads features")
    lines = itertools.chain.from_iterable([part.lines(1) for part in parts])
    target = TextTokenizer.train(options.target_tokenizer, lines, options.vocab_size)
    return Features(int(config.model.source_features), float(options.highest_frequency)), target


def _told(encoded: tuple[Sequences, str | None]) -> Sequences:
    """The token ids of one side of a file; the sentence about unknown tokens is printed."""
    sequences, note = encoded
    if note:
        say(note)
    return sequences
