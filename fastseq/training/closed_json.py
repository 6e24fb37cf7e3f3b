"""JSON files of a model folder, which may come from a stranger: limited in size, closed in their keys and types."""

from __future__ import annotations

import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from fastseq.errors import UserError, did_you_mean
from fastseq.training.files import read_text

MAX_JSON = 1 << 20  # bytes
LARGEST = 1_000_000_000  # of a number's magnitude
LONGEST = 1000  # characters of a text


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; raises UserError for a missing, damaged or too large file."""
    try:
        value = json.loads(read_text(path, MAX_JSON), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give a folder written by save_pretrained") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:200]}; write it again with save_pretrained") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object {{...}}; write it again with save_pretrained")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def check_values(values: dict[str, Any], kinds: dict[str, Any], where: str) -> dict[str, Any]:
    """`values`, each of which must have a name of `kinds` and a value of that type; raises UserError naming the first.

    A type is int, float, bool, str, None, or a union of these. Numbers are finite and at most a billion.
    """
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{where}: unknown key {name[:100]!r}{did_you_mean(name, kinds)}")
        if not matches(value, kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else str(kinds[name]).replace("None", "null")
            raise UserError(f"{where}: {name} must be {kind}, got {str(value)[:100]!r}")
    return values


def matches(value: object, kind: Any) -> bool:
    """True if a value read from JSON has the type `kind`; an integer is a float too, a bool is no integer."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(matches(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if kind is float:
        return type(value) in (int, float) and abs(value) <= LARGEST and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST
    return type(value) is kind
