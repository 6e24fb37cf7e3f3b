"""Interrupted training, a full disk, and updates divided among batches and processes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from toy_runs import SMALL, TOY, refused, rows, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training.callbacks import BestAndLast
from fastseq.training.fit import prepare
from fastseq.training.folder import RunFolder
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
    @pytest.mark.usefixtures("interrupts")
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

    def test_options_of_an_earlier_resume_are_kept(self, tmp_path, monkeypatch, capsys):
        """After Ctrl-C in a run resumed with more epochs, the printed command works."""
        run = tmp_path / "run"
        train(run, "--trainer.max_epochs", "1")
        with monkeypatch.context() as patch:
            self.at_batch(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit) as stop:
                main(["train", "--resume", str(run), "--trainer.max_epochs", "3"])
        assert stop.value.code == 143
        command = capsys.readouterr().out.partition("continue with: fastseq ")[2].split()
        main(command)
        assert [row["epoch"] for row in rows(run) if row["valid_loss"]] == ["0", "1", "2"]
        assert not list(run.glob("*.partial"))

    def test_more_epochs_stretch_the_schedule(self, tmp_path):
        """The first resumed update has the learning rate of the longer run, not the 0 at the end of the shorter one."""
        train(tmp_path / "short", "--trainer.max_epochs", "2")
        train(tmp_path / "long", "--trainer.max_epochs", "3")
        main(["train", "--resume", str(tmp_path / "short"), "--trainer.max_epochs", "3"])
        short, long = (
            [row["learning_rate"] for row in rows(tmp_path / name) if row["learning_rate"]]
            for name in ("short", "long")
        )
        assert short[8:] == long[8:]
        assert float(short[8]) > 1e-4

    def test_resuming_a_finished_run_is_reported(self, tmp_path, capsys):
        run = tmp_path / "run"
        train(run, "--trainer.max_epochs", "9", "--trainer.patience", "1", "--optim.lr", "0")
        before = (run / "checkpoints" / "last.ckpt").read_bytes()
        main(["train", "--resume", str(run)])
        assert "is finished: it was stopped early by --trainer.patience 1" in capsys.readouterr().out
        main(["train", "--resume", str(run), "--trainer.max_epochs", "2"])
        assert "is finished: all 2 epochs are trained" in capsys.readouterr().out
        assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
        main(["train", "--resume", str(run), "--trainer.patience", "3"])
        assert [row["epoch"] for row in rows(run) if row["valid_loss"]] == ["0", "1", "2", "3"]

    def test_another_monitor_starts_a_new_best(self, tmp_path, capsys):
        train(tmp_path / "run", "--trainer.max_epochs", "1")
        monitor = ("--trainer.monitor", "valid_token_error_rate", "--trainer.max_epochs", "2")
        main(["train", "--resume", str(tmp_path / "run"), *monitor])
        assert torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 1
        assert "best epoch 2 of 2: validation token error rate %" in capsys.readouterr().out

    def test_the_printed_training_loss_is_the_mean_of_the_epoch(self, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            self.at_batch(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(SystemExit):
                train(tmp_path / "run", *self.EPOCHS)
        main(["train", "--resume", str(tmp_path / "run")])
        losses = [float(row["train_loss"]) for row in rows(tmp_path / "run") if row["train_loss"]]
        printed = capsys.readouterr().out
        for epoch in range(3):
            mean = sum(losses[4 * epoch : 4 * epoch + 4]) / 4
            assert f"epoch {epoch + 1}/3: train loss {mean:.3f}," in printed

    @pytest.mark.parametrize("change", ["data", "processes"])
    def test_other_updates_between_epochs_are_refused(self, tmp_path, capsys, change):
        run = tmp_path / "run"
        train(run, "--trainer.max_epochs", "1")
        options = ("--train", TOY / "test.tsv")
        if change == "processes":
            last = run / "checkpoints" / "last.ckpt"
            checkpoint = torch.load(last, weights_only=True)
            torch.save(checkpoint | {"random_states": checkpoint["random_states"] * 2}, last)
            options = ()
        sentence = refused(capsys, "train", "--resume", run, "--trainer.max_epochs", "2", *options)
        assert "resume with the same training file and the same number of processes" in sentence

    def test_other_training_data_in_the_middle_of_an_epoch(self, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            self.at_batch(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(SystemExit):
                train(tmp_path / "run", *self.EPOCHS)
        other = refused(capsys, "train", "--resume", tmp_path / "run", "--train", TOY / "test.tsv")
        assert "resume with the same training file and the same number of processes" in other


class FullDisk:
    """A file that accepts half of the bytes written to it."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def write(self, content) -> None:
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


open_path = Path.open


def full_disk(path: Path, mode: str = "r", *args, **kwargs):
    """`Path.open` with no room for checkpoints."""
    file = open_path(path, mode, *args, **kwargs)
    return FullDisk(file) if "w" in mode and path.parent.name == "checkpoints" else file


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(run, "--trainer.max_epochs", "1")
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        sentence = refused(capsys, "train", "--resume", run, "--trainer.max_epochs", "2")
    assert "No space left on device" in sentence
    assert "the previous one is intact" in sentence
    assert f"fastseq train --resume {run}" in sentence
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    main(["train", "--resume", str(run), "--trainer.max_epochs", "2"])
    assert [row["epoch"] for row in rows(run) if row["valid_loss"]] == ["0", "1"]


def test_full_disk_in_the_first_epoch_does_not_advise_to_resume(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        sentence = refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "run", "--trainer.max_epochs", "1")
    assert "there is no earlier one" in sentence
    assert "--resume" not in sentence
    main(sentence.partition("start again with: fastseq ")[2].split())
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys, value):
    monkeypatch.setattr(Seq2SeqTask, "on_validation_epoch_end", lambda self: self.log("valid_loss", value))
    sentence = refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "run", "--trainer.patience", "1")
    assert "the loss is not finite after epoch 1; lower --optim.lr" in sentence
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_value_that_is_not_finite_is_never_the_best(tmp_path):
    callback = BestAndLast(tmp_path, "valid_token_error_rate")
    saved = []
    for epoch, value in enumerate([float("nan"), 50.0, float("nan"), 40.0]):
        metrics = {"valid_loss": torch.tensor(1.0), "valid_token_error_rate": torch.tensor(value)}
        trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=epoch, save_checkpoint=saved.append)
        callback.on_train_epoch_end(trainer, None)
    assert [path.name for path in saved].count("best.ckpt") == 2
    assert (callback.best, callback.best_epoch) == (40.0, 3)


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


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch(double_batch, tmp_path):
    """Compares loss curve and metrics, over `torchrun` and gloo."""
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


def test_a_process_that_comes_late_may_find_the_run_of_the_first(double_batch, monkeypatch):
    folder = RunFolder(double_batch)
    config = folder.load_config()
    with pytest.raises(UserError, match="holds a run already"):
        prepare(config, folder, resume=False)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert prepare(config, folder, resume=False).corpus
