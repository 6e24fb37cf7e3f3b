"""The measurements of ``fastseq tune`` in the user's cache: written by it, read by ``auto`` before the rules.

A file belongs to one processor, instruction set, number of threads, torch and fastseq. ``FASTSEQ_TUNING=0`` ignores it.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from fastseq import _native

NEAR = 2.0  # an entry serves calls whose T, B, I and H are each within this factor
BACKENDS = ("torch", "native")


class Entry(NamedTuple):
    """One measured call: ``ratio`` is torch's time over native's, ``backend`` the faster of the two."""

    dtype: str
    training: bool
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    backend: str
    ratio: float


def machine() -> dict[str, object]:
    """The facts on which the entries depend."""
    return {
        "cpu": processor_name(),
        "native": _native.build_info().get("cpu", "missing"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastseq": _version(),
    }


def _version() -> str:
    """The installed version, or the one of a source tree."""
    try:
        return importlib.metadata.version("fastseq")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def processor_name() -> str:
    """The model name of the processor."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def path() -> Path:
    """The file of this machine, below $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / "fastseq" / f"tuning-{key}.json"


def read(file: Path) -> tuple[Entry, ...]:
    """The entries of a file.

    Raises:
        ValueError: a sentence, if the file is damaged or of another machine.
    """
    again = "run `fastseq tune` again, or set FASTSEQ_TUNING=0"
    try:
        content = json.loads(file.read_text())
        entries = tuple(Entry(**entry) for entry in content["entries"])
        whole = all(map(_is_valid, entries)) and isinstance(content["machine"], dict)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"the tuning {file} is damaged and ignored; {again}")
    for key, value in machine().items():
        if content["machine"].get(key) != value:
            was = content["machine"].get(key, "none")
            raise ValueError(
                f"the tuning {file} is of another machine ({key} {was}, here {value}) and ignored; {again}"
            )
    return entries


def _is_valid(entry: Entry) -> bool:
    sizes = all(type(size) is int and size > 0 for size in entry[2:6])
    ratio = type(entry.ratio) is float and 0 < entry.ratio < math.inf
    kinds = isinstance(entry.dtype, str) and type(entry.training) is bool
    return sizes and ratio and kinds and entry.backend in BACKENDS


def write(file: Path, entries: tuple[Entry, ...]) -> None:
    """Write all entries at once: a reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "entries": [entry._asdict() for entry in entries]}
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


@functools.cache
def entries(threads: int) -> tuple[Entry, ...]:
    """The entries of this machine, read once; empty if there are none. A refused file is a warning.

    threads: torch's number, on which the file depends (``machine``).
    """
    if os.environ.get("FASTSEQ_TUNING") == "0" or not path().exists():
        return ()
    try:
        return read(path())
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return ()


def describe() -> str:
    """One line for ``fastseq info``."""
    if os.environ.get("FASTSEQ_TUNING") == "0":
        return "ignored: FASTSEQ_TUNING=0"
    if not path().exists():
        return "none; `fastseq tune` measures this machine"
    try:
        return f"{len(read(path()))} calls measured on this machine, {path()}"
    except ValueError as error:
        return f"refused: {error}"


def advice(call) -> tuple[str, str] | None:
    """Backend and reason of the nearest entry for a call (an ``LSTMCall``); None without one.

    Entries serve padded CPU calls of one dtype, neither traced, transformed nor under autocast.
    """
    plain = type(call)(call.device, *call[1:4], batch=call.batch, steps=call.steps, requires_grad=call.requires_grad)
    if call != plain or call.device != "cpu" or not (call.batch and call.steps and call.input_size):
        return None
    key = (str(call.dtype).removeprefix("torch."), call.requires_grad)
    sizes = (call.steps, call.batch, call.input_size, call.hidden_size)
    measured = (entry for entry in entries(torch.get_num_threads()) if entry[:2] == key)
    near = [(_distance(entry[2:6], sizes), entry) for entry in measured]
    distance, entry = min(near, default=(math.inf, None))
    if distance == math.inf:
        return None
    return entry.backend, f"tuned on this machine: native is {entry.ratio:.2f} times as fast at {entry[2:6]}"


def _distance(measured: tuple[int, ...], asked: tuple[int, ...]) -> float:
    """Sum of the logarithms of the four factors; infinite if one is above NEAR."""
    factors = [abs(math.log(a / b)) for a, b in zip(measured, asked, strict=True)]
    return sum(factors) if max(factors) <= math.log(NEAR) else math.inf
