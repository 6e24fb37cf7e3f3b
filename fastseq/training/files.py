"""Text files of a run folder, which may come from a stranger: limited in size, without includes or YAML aliases."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from fastseq.errors import UserError

MAX_YAML = 1 << 20  # bytes
MAX_DEPTH = 16  # nested lists and mappings
GROUPS = ("data", "model", "optim", "trainer")  # options that jsonargparse would read from a file, given its name
YAML = "closed_yaml"  # parser mode of jsonargparse


def read_text(path: Path, limit: int) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes. Raises FileNotFoundError, or UserError for other files."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")
    size = path.stat().st_size
    if size > limit:
        raise UserError(f"{path} has {size:,} bytes, more than the {limit:,} that such a file may have")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start + 1}") from error


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` for text, as UTF-8."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is complete at every moment under its name, and that replaces a link of that name."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def rename(partial: Path, path: Path) -> None:
    """Give a written file its final name, also on the disk: else a power loss may bring back the old file.

    File systems that cannot write a folder (some network and FUSE mounts) refuse with EINVAL or ENOTSUP: no error.
    """
    partial.replace(path)
    if os.name == "nt":  # which opens no folders
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def refuse_links(paths: Iterable[Path]) -> None:
    """Raise UserError for the first symbolic link of ``paths``: it could lead what is written to another place."""
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link, which could lead elsewhere; put there what it points to")


def load_yaml(text: str) -> Any:
    """Load YAML without aliases, which make a small file endless. Raises yaml.YAMLError.

    A mapping may not name another file, which jsonargparse would read and quote.
    """
    _refuse_aliases(text)
    try:
        value = get_loader("yaml")(text)
    except ValueError as error:  # a number of more than 4,300 digits, a date in the 13th month
        raise yaml.YAMLError(str(error)) from error
    if isinstance(value, dict):
        for name in ("config", *GROUPS):
            if isinstance(value.get(name), str):
                raise yaml.YAMLError(f"{name} names a file; a configuration cannot read another file")
        results = value.get("reference_results")
        if isinstance(results, list) and not all(isinstance(result, dict) for result in results):
            raise yaml.YAMLError("reference_results must hold mappings with a name")
    _refuse_classes(value)
    return value


def _refuse_aliases(text: str) -> None:
    """Raise yaml.YAMLError for anchors, deep nesting and long text, also inside strings: jsonargparse parses these."""
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"{len(text):,} characters are more than the {MAX_YAML:,} that options may have")
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"line {line}: anchors (&) and aliases (*) are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"line {line}: nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and {"&", "*"} <= set(event.value) and event.value != text:
            try:
                _refuse_aliases(event.value)
            except yaml.MarkedYAMLError:
                continue  # plain text


def _refuse_classes(value: Any) -> None:
    """Raise yaml.YAMLError for a key by which jsonargparse imports a module."""
    if isinstance(value, dict) and "class_path" in value:
        raise yaml.YAMLError("class_path is not allowed")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_classes(inner)


set_loader(YAML, load_yaml, (yaml.YAMLError,))
