"""Reads checkpoints that torch.save wrote, without running any of their code."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.checkpoint import check_archive, check_tensor


def load(source: str, path: Path) -> dict[str, Any]:
    """The dictionary of a checkpoint: tensors on the CPU, numbers, texts, lists and ``argparse.Namespace``."""
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = [line for line in str(error).splitlines() if "GLOBAL" in line] or [str(error)]
        raise UserError(
            f"{source}: {path} holds an object whose loading would run code; not read ({found[0].strip()[:200]}); "
            "expected tensors, plain values and argparse.Namespace"
        ) from error
    except Exception as error:  # torch.load raises a different type for every kind of damage
        raise UserError(f"{source}: {path} is no checkpoint or is damaged: {str(error)[:200]}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{source}: {path} holds a {type(checkpoint).__name__}, expected a dictionary")
    return checkpoint


def tensors(source: str, checkpoint: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """The named tensors under ``key``; raises UserError for anything else there."""
    state = checkpoint.get(key)
    if not isinstance(state, Mapping) or not state:
        raise UserError(
            f"{source}: the checkpoint has no {key!r} with tensors; found {', '.join(map(str, checkpoint))}"
        )
    for name, tensor in state.items():
        try:
            check_tensor(name, tensor)
        except ValueError as error:
            raise UserError(f"{source}: {key}: {error}") from error
    return dict(state)


def options(source: str, stored: Any, where: str) -> dict[str, Any]:
    """The options of a Namespace or a dictionary."""
    found = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(found, dict):
        raise UserError(f"{source}: {where} holds no options")
    return found


def expect(source: str, found: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise UserError for an option with another value than the ones listed; an absent option is the first one."""
    for name, values in expected.items():
        value = found.get(name, values[0])
        if value not in values:
            listed = " or ".join(map(repr, values))
            raise UserError(f"{source}: the model has {name}={value!r}, which fastseq lacks; supported is {listed}")
