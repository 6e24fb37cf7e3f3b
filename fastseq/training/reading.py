"""Pairs of text from files, line by line: TSV, two parallel files, JSONL, CSV, Parquet and Arrow, also compressed."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fastseq.errors import UserError

SUFFIXES = (".gz", ".zst")
EXPECTED = "expected source<TAB>target lines"
NAMING = "name columns with --data.source_column and --data.target_column"


@dataclasses.dataclass(frozen=True)
class PairFile:
    """A file of pairs: where it is, and which columns hold the two sides."""

    path: str
    targets: str | None = None  # a second file: line i is the target of line i of `path`
    source_column: str = "source"  # of JSONL, CSV, Parquet and Arrow
    target_column: str = "target"
    tag_column: str | None = None  # where each source has tags: it is then text<TAB>tags

    def size(self) -> int:
        """Bytes on disk."""
        paths = [Path(name) for name in (self.path, self.targets) if name is not None]
        inner = [part for path in paths for part in (arrow_files(path) if path.is_dir() else [path])]
        return sum(part.stat().st_size for part in inner if part.exists())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The pairs in order; see :func:`pairs_of`."""
        return pairs_of(self)


def as_list(paths: str | list[str] | None) -> list[str]:
    """One path or several, as a list."""
    return [paths] if isinstance(paths, str) else list(paths or [])


def pairs_of(file: PairFile) -> Iterator[tuple[str, str]]:
    """The (source, target) pairs of a file, in order, in constant memory.

    Raises UserError naming the line, for a file that cannot be read, bad UTF-8, a line of another form, a missing
    column, an empty side, or parallel files of unequal length.
    """
    empty = True
    for number, (source, target) in enumerate(_pairs(file), start=1):
        empty = False
        text = source if file.tag_column is None else source.partition("\t")[0]
        if not text or text.isspace() or not target or target.isspace():
            side = "source" if not text.strip() else "target"
            form = "source<TAB>target" if file.tag_column is None else "source<TAB>tags<TAB>target"
            raise UserError(
                f"{file.path}, line {number}: the {side} is empty; expected {form}, fill or remove the line"
            )
        yield source, target
    if empty:
        raise UserError(f"{file.path} is empty; expected at least one source<TAB>target line")


def _pairs(file: PairFile) -> Iterator[tuple[str, str]]:
    path = Path(file.path)
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() in SUFFIXES else path.suffix.lower()
    if file.targets is not None:
        return _parallel(file)
    if path.is_dir() or suffix in (".parquet", ".arrow"):
        return _from_arrow(file, path)
    if suffix in (".jsonl", ".ndjson"):
        return _from_jsonl(file)
    return _from_csv(file) if suffix == ".csv" else _from_tsv(file)


def lines_of(path: str) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and text of a UTF-8 file, plain or with the ending .gz or .zst; raises UserError."""
    try:
        with opened(path) as file:
            yield from decoded_lines(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no complete gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {EXPECTED}") from error


def opened(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        return _zstandard(path)
    return Path(path).open("rb", buffering=1 << 20)


def _zstandard(path: str) -> IO[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise missing_package("zstandard", path) from error
    raw = Path(path).open("rb")  # noqa: SIM115 - closed with the stream
    return io.BufferedReader(
        _Decompressed(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), path)
    )


class _Decompressed(io.RawIOBase):
    """A zstandard stream whose damage is a UserError; it must end with its file."""

    def __init__(self, reader: Any, path: str) -> None:
        self.reader, self.path = reader, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return self.reader.readinto(buffer)
        except zstandard.ZstdError as error:
            raise UserError(f"{self.path} is no complete zstandard file ({error})") from error


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


def _from_tsv(file: PairFile) -> Iterator[tuple[str, str]]:
    expected = 1 if file.tag_column is None else 2
    for number, line in lines_of(file.path):
        source, _, target = line.rpartition("\t")
        tabs = line.count("\t")
        if tabs != expected:
            form = "source<TAB>target with one tab" if expected == 1 else "source<TAB>tags<TAB>target with two tabs"
            raise UserError(f"{file.path}, line {number}: expected {form}, found {tabs} tabs")
        yield source, target


def _parallel(file: PairFile) -> Iterator[tuple[str, str]]:
    path, targets = file.path, file.targets
    sides = lines_of(path), lines_of(targets)
    for (number, source), (_, target) in itertools.zip_longest(*sides, fillvalue=(0, None)):
        if source is None or target is None:
            shorter, longer = (path, targets) if source is None else (targets, path)
            raise UserError(f"{shorter} has fewer lines than {longer}; line i of one belongs to line i of the other")
        if file.tag_column is not None and source.count("\t") != 1:
            raise UserError(f"{path}, line {number}: expected source<TAB>tags with one tab")
        yield source, target


def _from_jsonl(file: PairFile) -> Iterator[tuple[str, str]]:
    for number, line in lines_of(file.path):
        where = f"{file.path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({str(error)[:100]})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} holds no object {{...}} with {file.source_column} and {file.target_column}")
        yield _joined([_field(record, column, where) for column in _columns(file)], where)


def _columns(file: PairFile) -> list[str]:
    """Names of the columns of a line: source, tags where there are any, target."""
    return [file.source_column, *([] if file.tag_column is None else [file.tag_column]), file.target_column]


def _joined(values: list[str], where: str) -> tuple[str, str]:
    """The pair of these columns: with tags the source is text<TAB>tags."""
    *source, target = values
    if len(source) == 2 and any("\t" in value for value in source):
        raise UserError(f"{where}: a tab in the source or in its tags; with --data.tags it separates both, replace it")
    return "\t".join(source), target


def _field(record: dict, column: str, where: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is no text but {type(value).__name__}"
        raise UserError(f"{where}: {column} {found}; {NAMING}")
    return value


def _from_csv(file: PairFile) -> Iterator[tuple[str, str]]:
    rows = csv.reader((line + "\n" for _, line in lines_of(file.path)), strict=True)
    try:
        header = next(rows, [])
        missing = [name for name in _columns(file) if name not in header]
        if missing and header:
            raise UserError(
                f"{file.path} has no column {missing[0]}, its first line names {', '.join(header)[:200]}; {NAMING}"
            )
        columns = [header.index(name) for name in _columns(file)] if header else []
        for row in rows:
            if len(row) != len(header):
                raise UserError(f"{file.path}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
            yield _joined([row[column] for column in columns], f"{file.path}, line {rows.line_num}")
    except csv.Error as error:
        raise UserError(f"{file.path}, line {rows.line_num} is not CSV ({error})") from error


def arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder written by `datasets.Dataset.save_to_disk`, in order."""
    return sorted(folder.glob("data-*.arrow"))


def _from_arrow(file: PairFile, path: Path) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise missing_package("pyarrow", file.path) from error
    files = arrow_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no data-*.arrow, as datasets.Dataset.save_to_disk writes; {EXPECTED}")
    names = _columns(file)
    number = 0
    for part in files:
        try:
            if part.suffix.lower() == ".parquet":
                opened_file = pq.ParquetFile(part)
                schema, batches = opened_file.schema_arrow, opened_file.iter_batches(4096, columns=names)
            else:
                batches = pa.ipc.open_stream(pa.memory_map(str(part)))
                schema = batches.schema
            for name in names:
                if name not in schema.names or not _is_text(pa, schema.field(name).type):
                    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)[:200]
                    raise UserError(f"{part} has no column of text {name}, it has {listed}; {NAMING}")
            for batch in batches:
                for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    number += 1
                    if None in values:
                        raise UserError(f"{part}, row {number}: {names[values.index(None)]} is null")
                    yield _joined(list(values), f"{part}, row {number}")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{part} cannot be read ({str(error)[:200]})") from error


def _is_text(pa: Any, kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def missing_package(name: str, path: str | Path) -> UserError:
    """The sentence for a package that reads files of this kind."""
    return UserError(f'{path} needs the package {name}; bring it with: pip install "fastseq[data]"')
