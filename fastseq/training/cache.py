"""Encoded pairs on disk: written once as an Arrow stream, memory-mapped by every run, however large the file.

A cache is two files named by a fingerprint: `FINGERPRINT.arrow` with the columns source, tags (if any) and target,
lists of token ids, and `FINGERPRINT.json` with their numbers. The second is written last; without it, or if the sizes
differ, the first is not read. `datasets.Dataset.from_file` opens the Arrow file as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.data import Sequences, encode_flat
from fastseq.training.files import read_text, rename, write_text
from fastseq.training.lock import NO_LOCKS
from fastseq.training.reading import PairFile, arrow_files, missing_package
from fastseq.training.tagged import Tagged, TaggedSequences, tags_of, texts_of
from fastseq.training.tokenizer import PAD, UNK, TextTokenizer

Tokenizers = tuple[TextTokenizer | Tagged, TextTokenizer]
FORMAT = 1  # of the files; part of the fingerprint
ROWS = 1 << 16  # pairs of a record batch


class Counts(NamedTuple):
    """The numbers of a complete cache."""

    rows: int
    bytes: int  # of the Arrow file
    tokens: tuple[int, ...]  # of source, tags (if any) and target, without eos
    unknown: tuple[int, ...]


class Mapped(Sequences):
    """One column of a cache: sequences of token ids in a memory-mapped file. Only the pages in use are in memory."""

    def __init__(self, buffer: Any, columns: Sequence[Any], rows: int) -> None:
        """`buffer`: pyarrow's buffer of the whole file; `columns`: this column in each record batch, `rows` in all."""
        self._buffer, self._rows = buffer, rows
        width = columns[0].type.value_type.bit_width // 8
        self._flat16 = np.frombuffer(buffer, np.uint16 if width == 2 else np.int32)
        self._offsets = np.frombuffer(buffer, np.int32)
        places = [
            [part.address - buffer.address for part in column.buffers() if part is not None] for column in columns
        ]
        self._offset_starts = np.array([place[0] // 4 for place in places])
        self._value_starts = np.array([place[1] // width for place in places])

    def __len__(self) -> int:
        return self._rows

    def _spans(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Start of each sequence in the flat ids, and its length, both (M,)."""
        chunk, row = np.divmod(rows.numpy(), ROWS)
        place = self._offset_starts[chunk] + row
        first = self._offsets[place]
        return self._value_starts[chunk] + first, (self._offsets[place + 1] - first).astype(np.int64)

    @property
    def lengths(self) -> Tensor:
        """The lengths (N,) of all sequences."""
        return self.lengths_of(torch.arange(self._rows))

    def lengths_of(self, rows: Tensor) -> Tensor:
        """The lengths (M,) of the sequences `rows` (M,)."""
        return torch.from_numpy(self._spans(rows)[1])

    def select(self, rows: Tensor) -> Sequences:
        """The sequences `rows` (M,), copied into memory."""
        starts, lengths = self._spans(torch.as_tensor(rows))
        spans = zip(starts.tolist(), lengths.tolist(), strict=True)
        return Sequences([self._flat16[start : start + length].tolist() for start, length in spans])

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences `rows` (B,) as tokens (B, longest) int64 filled up with pad, and their lengths (B,)."""
        starts, lengths = self._spans(rows)
        position = np.arange(lengths.max())  # (longest,)
        index = np.minimum(starts[:, None] + position, len(self._flat16) - 1)
        tokens = self._flat16[index].astype(np.int64)
        tokens[position >= lengths[:, None]] = PAD
        return torch.from_numpy(tokens), torch.from_numpy(lengths)


def columns_of(tokenizers: Tokenizers) -> dict[str, TextTokenizer]:
    """The columns of a cache, with the tokenizer of each."""
    source, target = tokenizers
    sides = {"source": source.text, "tags": source.tags} if isinstance(source, Tagged) else {"source": source}
    return sides | {"target": target}


def fingerprint(file: PairFile, tokenizers: Tokenizers) -> str:
    """Name of the cache of a file: changes with its path, size or time, and with any token of the tokenizers."""
    described: list[Any] = [FORMAT, file.source_column, file.target_column]
    described += [] if file.tag_column is None else [file.tag_column]
    for name in filter(None, (file.path, file.targets)):
        path = Path(name)
        for part in arrow_files(path) if path.is_dir() else [path]:
            stat = part.stat()
            described.append([str(part.resolve()), stat.st_size, stat.st_mtime_ns])
    described += [tokenizer.to_json() for tokenizer in columns_of(tokenizers).values()]
    return hashlib.sha256(json.dumps(described).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def cached(file: PairFile, tokenizers: Tokenizers, folder: Path) -> tuple[tuple[Sequences, Sequences], Counts, float]:
    """Both sides of a file, from its cache in `folder`; encoded now where there is none.

    Processes that need one cache at the same time wait for the first of them.

    Returns the sides, their numbers, and the seconds that encoding took (0.0 if the cache was there).
    Raises UserError as `pairs_of` does, when the disk is full, and for a cache that is damaged.
    """
    try:
        name = fingerprint(file, tokenizers)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read ({error.strerror or error})") from error
    seconds = 0.0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder / f"{name}.lock"):
            counts = read_counts(folder, name)
            if counts is None:
                start = time.perf_counter()
                counts = _encode(file, tokenizers, folder, name)
                seconds = time.perf_counter() - start
    except OSError as error:
        raise UserError(
            f"the encoded data of {file.path} cannot be written to {folder} ({error.strerror or error}); nothing of it "
            "is kept; make room, or choose another folder with --data.cache"
        ) from error
    return open_cache(folder / f"{name}.arrow", counts, list(columns_of(tokenizers))), counts, seconds


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel drops however the process ends; without it on a file system that has none."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def read_counts(folder: Path, name: str) -> Counts | None:
    """The numbers of a complete cache; None where there is none, or its Arrow file has another size."""
    try:
        stored = json.loads(read_text(folder / f"{name}.json", 1 << 20))
        counts = Counts(stored["rows"], stored["bytes"], tuple(stored["tokens"]), tuple(stored["unknown"]))
        return counts if (folder / f"{name}.arrow").stat().st_size == counts.bytes else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _encode(file: PairFile, tokenizers: Tokenizers, folder: Path, name: str) -> Counts:
    """Write both files of the cache; neither is there under its name before it is complete."""
    pa, by_name = _pyarrow(file), columns_of(tokenizers)
    kinds = [pa.uint16() if len(tokenizer) <= 1 << 16 else pa.int32() for tokenizer in by_name.values()]
    schema = pa.schema([(side, pa.list_(kind)) for side, kind in zip(by_name, kinds, strict=True)])
    for left_over in folder.glob(f"{name}.*.partial"):
        left_over.unlink(missing_ok=True)
    partial = folder / f"{name}.{os.getpid()}.partial"
    rows, tokens, unknown = 0, [0] * len(by_name), [0] * len(by_name)
    try:
        with partial.open("wb") as out:
            with pa.ipc.new_stream(pa.PythonFile(out, "w"), schema) as writer:
                for lines in _batched(file, ROWS):
                    columns = []
                    texts = _texts(lines, tagged="tags" in by_name)
                    for side, tokenizer in enumerate(by_name.values()):
                        flat, lengths = encode_flat(tokenizer, texts[side])
                        tokens[side] += len(flat) - len(lines) * tokenizer.closed
                        unknown[side] += int((flat == UNK).sum())
                        if len(flat) > np.iinfo(np.int32).max:
                            raise UserError(
                                f"{file.path} has more than 32,000 tokens a line; cut it into shorter lines"
                            )
                        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
                        values = pa.array(flat.astype(kinds[side].to_pandas_dtype()), kinds[side])
                        columns.append(pa.ListArray.from_arrays(pa.array(offsets), values))
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    rows += len(lines)
            out.flush()
            os.fsync(out.fileno())
        counts = Counts(rows, partial.stat().st_size, tuple(tokens), tuple(unknown))
        rename(partial, folder / f"{name}.arrow")
        write_text(folder / f"{name}.json", json.dumps(counts._asdict()) + "\n")
    except BaseException:
        for path in (partial, folder / f"{name}.arrow", folder / f"{name}.json.partial"):
            path.unlink(missing_ok=True)
        raise
    return counts


def _texts(pairs: list[tuple[str, str]], *, tagged: bool) -> list[list[str]]:
    """The texts of each column."""
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    return [list(texts_of(sources)), list(tags_of(sources)), targets] if tagged else [sources, targets]


def _batched(pairs: PairFile, size: int) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(pairs)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def open_cache(path: Path, counts: Counts, names: Sequence[str]) -> tuple[Sequences, Sequences]:
    """The columns of a complete cache; raises UserError for a file of another form."""
    pa = _pyarrow(path)
    try:
        buffer = pa.memory_map(str(path)).read_buffer()
        batches = list(pa.ipc.open_stream(pa.BufferReader(buffer)))
        if sum(map(len, batches)) != counts.rows or any(len(batch) != ROWS for batch in batches[:-1]):
            raise ValueError("its batches have other sizes")
        columns = [Mapped(buffer, [batch.column(name) for batch in batches], counts.rows) for name in names]
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is no cache of encoded data ({str(error)[:100]}); remove it: it is made again"
        ) from error
    *source, target = columns
    return TaggedSequences(*source) if len(source) == 2 else source[0], target


def _pyarrow(needed_for: PairFile | Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        path = needed_for.path if isinstance(needed_for, PairFile) else needed_for
        raise missing_package("pyarrow", f"the encoded data of {path}") from error
    return pyarrow
