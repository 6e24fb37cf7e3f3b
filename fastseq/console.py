"""Console output of ``bench``, ``parity`` and ``warmup``: progress bars, tables, the description of the machine."""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator

import torch

import fastseq
from fastseq import _native
from fastseq.tune.record import processor_name


class Bar:
    """A progress bar over ``total`` items on standard error; where that is no terminal, a line every ten seconds."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self._last_line = self.start

    def show(self, item: str) -> None:
        """Print the name of the current item."""
        now = time.monotonic()
        if sys.stderr.isatty():
            filled = "#" * (20 * self.done // self.total)
            print(f"\r\x1b[K[{filled:<20}] {self._count(now)} {item}"[:140], end="", file=sys.stderr, flush=True)
        elif now - self._last_line >= 10:
            self._last_line = now
            print(f"{self._count(now)} {item}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """Count one item as done."""
        self.done += 1

    def close(self) -> None:
        """Clear the terminal's line."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _count(self, now: float) -> str:
        passed = now - self.start
        left = f", {passed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        return f"{self.done}/{self.total}{left}"


def chosen_names(
    parser: argparse.ArgumentParser, option: str, text: str, known: tuple[str, ...], required: bool = True
) -> tuple[str, ...]:
    """Split a comma-separated option, "all" for every known name; exit with a sentence at an unknown one or none."""
    names = known if text == "all" else tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in known:
            parser.error(f"{option}: unknown name {name!r}; choose 'all' or some of {', '.join(known)}")
    if required and not names:
        parser.error(f"{option}: name at least one of {', '.join(known)}")
    return names


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]

    def line(cells) -> str:
        return "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Silence torch's warnings about projections, weights in separate memory, and determinism."""
    with warnings.catch_warnings():
        for message in ("LSTM with projections is not", "RNN module weights are not", ".*deterministic"):
            warnings.filterwarnings("ignore", message=message)
        yield


def environment(command: list[str]) -> dict[str, object]:
    """Machine, versions, threads and switches, on which a command's figures depend."""
    prefixes = ("FASTSEQ_", "OMP_", "MKL_", "ONEDNN_", "ATEN_")
    switches = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    return (
        {
            "command": shlex.join(command),
            "date": datetime.date.today().isoformat(),
            "cpu": processor_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load average at the start": load_average(),
            "fastseq": fastseq.__version__,
            "native": _native.build_info().get("cpu", "missing"),
            "amx": "yes" if _native.matrix_unit() else "no",
            "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
            "python": platform.python_version(),
        }
        | gpu_facts()
        | ({"environment": " ".join(f"{name}={value}" for name, value in switches.items())} if switches else {})
    )


def gpu_facts() -> dict[str, object]:
    """The GPU, and the versions of CUDA, cuDNN and triton; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"compute capability {properties.major}.{properties.minor}, {properties.total_memory >> 30} GiB",
        "cuda": f"torch built for {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "native cuda": _native.why_not_cuda() or " ".join(_native.build_info()["cuda_architectures"]),
    }


def load_average() -> str:
    """Mean number of runnable processes over the last minute."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
