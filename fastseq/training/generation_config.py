"""generation_config.json: the search options that a folder's model decodes with unless a call says otherwise."""

from __future__ import annotations

import functools
import inspect
import typing
from pathlib import Path
from types import NoneType
from typing import Any

from fastseq.errors import UserError
from fastseq.seq2seq.generation import generate
from fastseq.training.closed_json import check_values, read_object

NAME = "generation_config.json"
PLAIN = {int, float, bool, str, NoneType}
LIMITS = {"num_beams": 1024, "num_return_sequences": 1024, "max_new_tokens": 1_000_000, "min_new_tokens": 1_000_000}
LIMITS |= {"max_length_ratio": 1_000_000}  # past it a search takes all memory, or never ends
PER_CALL = ("output_attentions", "output_scores", "generator")


@functools.cache
def search_options() -> dict[str, Any]:
    """Name and type of each keyword of `Seq2Seq.generate` that a JSON file can hold."""
    hints = typing.get_type_hints(generate)
    keywords = [p.name for p in inspect.signature(generate).parameters.values() if p.kind is p.KEYWORD_ONLY]
    plain = {name: hints[name] for name in keywords if name not in PER_CALL}
    return {name: kind for name, kind in plain.items() if set(typing.get_args(kind) or (kind,)) <= PLAIN}


def check_search(options: dict[str, Any], where: str) -> dict[str, Any]:
    """`options`, if `Seq2Seq.generate` has them, with these types and within limits; else raises UserError."""
    check_values(options, search_options(), where)
    for name, most in LIMITS.items():
        if (options.get(name) or 0) > most:
            raise UserError(f"{where}: {name} must be at most {most:,}, got {options[name]:,}")
    return options


def read_search(folder: Path) -> dict[str, Any]:
    """The checked options of generation_config.json, {} where the folder has none."""
    path = folder / NAME
    return check_search(read_object(path), str(path)) if path.exists() or path.is_symlink() else {}
