"""Small runs on the toy corpus, shared by the tests of the training commands."""

import csv
from pathlib import Path

import pytest

from fastseq.cli import main

TOY = Path(__file__).parent / "toy"
SMALL = [
    *("--train", str(TOY / "train.tsv"), "--valid", str(TOY / "valid.tsv")),
    *("--model.embedding_dim", "16", "--model.hidden_size", "32", "--data.max_tokens", "300"),
    *("--optim.lr", "0.01", "--trainer.log_every", "1", "--trainer.accelerator", "cpu"),
]


def train(run: Path, *options: str) -> None:
    main(["train", *SMALL, "--run_dir", str(run), *options])


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys, *arguments: str | Path) -> str:
    """Run a command that must fail; return its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"fastseq {arguments[0]}: ")
    assert sentence.count("\n") == 1
    return sentence
