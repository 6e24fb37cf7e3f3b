"""Interrupted training, a full disk, and one update shared out over batches and processes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_runs import SMALL, TOY, refused, rows, train

from fastseq.cli import main
from fastseq.training.task import Seq2SeqTask


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, str]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, *TestResume.EPOCHS)
    return rows(run)


class TestResume:
    """An interrupted training continues to the metrics.csv of an undisturbed one, dropout and sampling included."""

    EPOCHS = ("--trainer.max_epochs", "3", "--optim.teacher_forcing_ratio", "0.8")

    @staticmethod
    def at_batch(monkeypatch, number: int, action) -> None:
        step = Seq2SeqTask.training_step

        def disturbed(self, batch, batch_idx):
            if self.trainer.fit_loop.total_batch_idx == number:
                action()
            return step(self, batch, batch_idx)

        monkeypatch.setattr(Seq2SeqTask, "training_step", disturbed)

    @pytest.mark.parametrize("batch", [1, 5, 7], ids=["first epoch", "mid-epoch", "last batch of an epoch"])
    def test_after_a_signal(self, undisturbed, tmp_path, monkeypatch, capsys, batch):
        with monkeypatch.context() as patch:
            self.at_batch(patch, batch, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(SystemExit) as stop:
                train(tmp_path / "run", *self.EPOCHS)
        assert stop.value.code == 130
        assert f"stopped at update {batch + 1}; continue with: fastseq train --resume" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        main(["train", "--resume", str(tmp_path / "run")])
        assert rows(tmp_path / "run") == undisturbed

    def test_after_a_crash_and_a_move(self, undisturbed, tmp_path, monkeypatch):
        def crash():
            raise RuntimeError("power cut")

        with monkeypatch.context() as patch:
            self.at_batch(patch, 6, crash)
            with pytest.raises(RuntimeError, match="power cut"):
                train(tmp_path / "run", *self.EPOCHS)
        (tmp_path / "run").rename(tmp_path / "moved")
        main(["train", "--resume", str(tmp_path / "moved")])
        assert rows(tmp_path / "moved") == undisturbed

    def test_with_accumulated_batches(self, tmp_path, monkeypatch):
        options = (*self.EPOCHS, "--trainer.accumulate", "2", "--data.max_tokens", "150")
        train(tmp_path / "whole", *options)
        with monkeypatch.context() as patch:
            self.at_batch(patch, 10, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit):
                train(tmp_path / "parts", *options)
        main(["train", "--resume", str(tmp_path / "parts")])
        assert rows(tmp_path / "parts") == rows(tmp_path / "whole")

    def test_more_epochs_without_progress_keep_the_best(self, tmp_path):
        run = tmp_path / "run"
        train(run, "--trainer.max_epochs", "1", "--optim.lr", "0")
        best, last = ((run / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
        before = best.read_bytes(), last.read_bytes()
        main(["train", "--resume", str(run), "--trainer.max_epochs", "2"])
        assert [row["epoch"] for row in rows(run) if row["valid_loss"]] == ["0", "1"]
        assert best.read_bytes() == before[0]
        assert last.read_bytes() != before[1]

    @pytest.mark.parametrize(
        "option",
        [("--optim.lr", "0.5"), ("--model.dropout", "0.5"), ("--seed", "7"), ("--trainer.accumulate", "2")],
        ids=lambda option: option[0],
    )
    def test_options_that_cannot_change_are_refused(self, tmp_path, capsys, option):
        train(tmp_path / "run", "--trainer.max_epochs", "1")
        assert "in the run that is resumed" in refused(capsys, "train", "--resume", tmp_path / "run", *option)

    def test_other_training_data_in_the_middle_of_an_epoch(self, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            self.at_batch(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(SystemExit):
                train(tmp_path / "run", *self.EPOCHS)
        other = refused(capsys, "train", "--resume", tmp_path / "run", "--train", TOY / "test.tsv")
        assert "resume with the same training file and the same number of processes" in other


class FullDisk:
    """A file that takes half of what is written."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def write(self, content) -> None:
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(run, "--trainer.max_epochs", "1")
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    open_path = Path.open

    def full_disk(self, mode="r", *args, **kwargs):
        file = open_path(self, mode, *args, **kwargs)
        return FullDisk(file) if "w" in mode and self.parent.name == "checkpoints" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        sentence = refused(capsys, "train", "--resume", run, "--trainer.max_epochs", "2")
    assert "No space left on device" in sentence
    assert "the previous one is intact" in sentence
    assert f"fastseq train --resume {run}" in sentence
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    main(["train", "--resume", str(run), "--trainer.max_epochs", "2"])
    assert [row["epoch"] for row in rows(run) if row["valid_loss"]] == ["0", "1"]


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([float(row[name]) for row in rows(run) for name in ("train_loss", "valid_loss") if row[name]])


@pytest.fixture(scope="module")
def double_batch(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("double") / "run"
    train(run, "--trainer.max_epochs", "2", "--model.dropout", "0")
    return run


HALF = ("--trainer.max_epochs", "2", "--model.dropout", "0", "--data.max_tokens", "150")


def test_accumulated_batches_equal_the_double_batch(double_batch, tmp_path):
    train(tmp_path / "run", *HALF, "--trainer.accumulate", "2")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(double_batch), rtol=0, atol=1e-5)


def test_two_processes_equal_one_with_the_double_batch(double_batch, tmp_path):
    """Loss curve and metrics, over `torchrun` and gloo."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "fastseq", "train", *SMALL, *HALF, "--run_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(losses(double_batch)) == 2 * 4 + 2
    torch.testing.assert_close(losses(tmp_path / "run"), losses(double_batch), rtol=0, atol=1e-5)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(double_batch), strict=True):
        assert ours["valid_token_error_rate"] == theirs["valid_token_error_rate"]
    assert result.stdout.count("epoch 2/2") == 1
