"""Processes that train and die by SIGKILL at a stage, forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path

from fastseq.cli import main
from fastseq.training.callbacks import AtomicCheckpointIO, StopCleanly
from fastseq.training.folder import RunFolder
from fastseq.training.task import Seq2SeqTask


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file in which a process dies after half of the bytes of its first write."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def write(self, content) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        kill()


def die_in_file(name: str, number: int, how: str = "xb") -> None:
    """Die while the `number`-th file of this name (from 1) is written."""
    original, count = Path.open, 0

    def torn(self, mode="r", *arguments, **options):
        nonlocal count
        file = original(self, mode, *arguments, **options)
        count += self.name == name and how == mode
        return Torn(file) if self.name == name and how == mode and count == number else file

    Path.open = torn


def die_in_method(owner, name: str, number: int, after: bool = False) -> None:
    """Die at the `number`-th call of a method (from 1), before or after it."""
    original, count = getattr(owner, name), 0

    def method(*arguments, **options):
        nonlocal count
        count += 1
        if count == number and not after:
            kill()
        result = original(*arguments, **options)
        if count == number:
            kill()
        return result

    setattr(owner, name, method)


STAGES = {  # 4 updates and 1 batch of validation an epoch; after each epoch best.ckpt, kept weights, last.ckpt
    "run folder": lambda: die_in_method(RunFolder, "save_tokenizers", 1),
    "config.yaml": lambda: die_in_file("config.yaml.partial", 1),
    "first epoch": lambda: die_in_method(Seq2SeqTask, "training_step", 2),
    "after the first best.ckpt": lambda: die_in_method(AtomicCheckpointIO, "save_checkpoint", 1, after=True),
    "middle of an epoch": lambda: die_in_method(Seq2SeqTask, "training_step", 7),
    "validation": lambda: die_in_method(Seq2SeqTask, "validation_step", 2),
    "best.ckpt": lambda: die_in_file("best.partial", 2, "wb"),
    "kept weights": lambda: die_in_file("weights-0000000008.safetensors.partial", 1),
    "last.ckpt": lambda: die_in_file("last.partial", 2, "wb"),
    "row of metrics.csv": lambda: die_in_file("metrics.csv", 6, "a"),
    "columns of metrics.csv": lambda: die_in_file("metrics.csv.partial", 2),
    "rows of metrics.csv": lambda: die_in_file("metrics.csv.partial", 1),
    "between epochs": lambda: die_in_method(StopCleanly, "on_train_epoch_end", 1),
    "curves.png": lambda: die_in_file("curves.png.partial", 1),
}


def _train(stage: str, arguments: list[str]) -> None:
    """Train, quietly, until the stage kills this process."""
    STAGES[stage]()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(arguments)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastseq.training.fit"])


def killed(stage: str, *arguments: str) -> None:
    """Run `fastseq train` with these arguments in a process that dies at `stage`."""
    process = CONTEXT.Process(target=_train, args=(stage, ["train", *arguments]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, stage
