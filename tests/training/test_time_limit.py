"""`--trainer.max_minutes`: the end by time, and what resumes from it."""

from pathlib import Path

import pytest
import torch
from toy_runs import SMALL, refused, rows, train

from fastseq.cli import main
from fastseq.training import callbacks
from fastseq.training.options import train_parser

EPOCHS = ("--trainer.max_epochs", "3", "--model.dropout", "0.2", "--optim.ema", "0.9")  # 4 updates each


class Clock:
    """A clock that a training reads at its start and after each update; each reading is a minute later."""

    def __init__(self) -> None:
        self.minutes = 0

    def monotonic(self) -> float:
        self.minutes += 1
        return 60.0 * self.minutes


@pytest.fixture
def clock(monkeypatch) -> None:
    monkeypatch.setattr(callbacks, "time", Clock())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, *EPOCHS)
    return run


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("minutes", [2, 6, 8], ids=["first epoch", "middle of an epoch", "end of an epoch"])
def test_the_end_by_time(minutes, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    train(run, *EPOCHS, "--trainer.max_minutes", str(minutes))
    printed = capsys.readouterr().out
    assert f"time is up at update {minutes}; continue with: fastseq train --resume {run}" in printed
    assert ("epoch 2/3: " if minutes == 8 else f"update {minutes}/12: ") in printed
    assert (run / "curves.png").exists()
    assert rows(run)[-1]["valid_loss"] and int(rows(run)[-1]["step"]) == minutes - 1
    main(["evaluate", str(run), "--data", SMALL[3], "--pictures", "0", "--device", "cpu"])
    while "time is up" in printed:  # as many minutes anew
        main(["train", "--resume", str(run)])
        printed = capsys.readouterr().out
    last, expected = weights(run), weights(undisturbed)
    assert all(torch.equal(last[name], expected[name]) for name in expected)
    passes = [row for row in rows(run) if not row["valid_loss"] or int(row["step"]) % 4 == 3]
    assert passes == rows(undisturbed)


@pytest.mark.usefixtures("clock")
def test_the_best_may_lie_within_an_epoch(tmp_path, capsys):
    """Its value stays the one to beat after resuming: a run whose weights no longer move keeps that checkpoint."""
    run = tmp_path / "run"
    train(run, "--trainer.max_epochs", "2", "--optim.lr", "0", "--trainer.max_minutes", "2")
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert "time is up at update 2" in capsys.readouterr().out
    main(["train", "--resume", str(run), "--trainer.max_minutes", "null"])
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == best
    assert "time is up" not in capsys.readouterr().out


@pytest.mark.usefixtures("clock")
def test_a_kill_before_the_best_value_is_in_the_last_checkpoint(tmp_path, monkeypatch):
    """best.ckpt, written before, keeps its place against the equal value of a later epoch."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.BestAndLast, "_renew_last", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train(run, "--trainer.max_epochs", "2", "--optim.lr", "0", "--trainer.max_minutes", "2")
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert last_best(run) is None
    main(["train", "--resume", str(run), "--trainer.max_minutes", "null"])
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == best
    assert last_best(run) > 0


def last_best(run: Path) -> float | None:
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return next(state["best"] for name, state in states.items() if "BestAndLast" in name)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("patience", [None, "1"], ids=["last epoch", "patience"])
def test_the_natural_end_is_none_by_time(patience, tmp_path, capsys):
    """Time is up at the very update that ends the run anyway."""
    if patience is None:
        train(tmp_path / "run", "--trainer.max_epochs", "1", "--trainer.max_minutes", "4")
    else:  # the second epoch is no better than the first
        options = ("--trainer.max_epochs", "3", "--optim.lr", "0", "--trainer.patience", patience)
        train(tmp_path / "run", *options, "--trainer.max_minutes", "8")
    printed = capsys.readouterr().out
    assert "best epoch 1 of" in printed and "time is up" not in printed


def test_bad_limits(tmp_path, capsys):
    for value in ("0", "-1", "nan", "soon"):
        assert "max_minutes" in refused(capsys, "train", *SMALL, "--run_dir", tmp_path, "--trainer.max_minutes", value)
    assert train_parser().parse_args(["--trainer.max_minutes", "0.5"]).trainer.max_minutes == 0.5
