"""Checkpoints that survive a full disk, a stop at any moment, and a move of the run folder."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fastseq.training.errors import UserError
from fastseq.training.metrics import higher_is_better

WEIGHTS = "model."  # what the task puts before the names of the model's parameters


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, then renames: the file under the final name is complete at every moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save `checkpoint`; raises UserError, with an older file of that name untouched, when it cannot be written."""
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            kept = "the previous one is intact" if path.exists() else "there is no earlier one"
            raise UserError(
                f"the checkpoint {path} could not be written ({error}); {kept}; make room or choose another disk, "
                f"then continue with: fastseq train --resume {path.parent.parent}"
            ) from error


class BestAndLast(Checkpoint):
    """Saves last.ckpt after every epoch, and best.ckpt when `monitor` is better than ever before."""

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder, self.monitor = folder, monitor
        self.best: float | None = None
        self.best_epoch: int | None = None

    def state_dict(self) -> dict[str, float | int | None]:
        """The best value so far, as part of a checkpoint."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the best value so far."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Save after validation. Raises UserError when nothing of the name `monitor` was measured."""
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"--trainer.monitor {self.monitor} is not measured; choose one of {names}")
        value = float(trainer.callback_metrics[self.monitor])
        sign = -1.0 if higher_is_better(self.monitor) else 1.0
        if self.best is None or sign * value < sign * self.best:
            self.best, self.best_epoch = value, trainer.current_epoch
            trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")


class Stopped(Exception):
    """Training was asked to stop by a signal, and its last.ckpt is written."""


class StopCleanly(Checkpoint):
    """On SIGINT or SIGTERM: finish the update (the last of an epoch with validation), save last.ckpt, raise Stopped.

    A second signal has its usual meaning. So has the first one when several processes train: they would stop at
    different updates, and saving needs all of them; the checkpoint of the last epoch is then the one to resume from.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requested = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start to listen."""
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop in the middle of an epoch, if asked to and an update is complete."""
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.requested and complete and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            raise Stopped

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Stop between two epochs, if asked to; `BestAndLast` has saved."""
        if self.requested:
            raise Stopped

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Stop to listen."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, task: L.LightningModule, exception: BaseException) -> None:
        """Stop to listen."""
        self._restore()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises UserError when it is missing or damaged."""
    if not path.is_file():
        run = path.parent.parent
        raise UserError(
            f"{run} has no checkpoint {path.name}; train it first with: fastseq train --overwrite --run_dir {run}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different type for every kind of damage
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a checkpoint of `fastseq train` or is damaged: {reason}") from error


def load_weights(model: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Copy the weights of a checkpoint into `model`; raises UserError naming the tensors that do not fit."""
    weights = {
        name.removeprefix(WEIGHTS): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS)
    }
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    if wrong:
        listed = "; ".join(f"{n} is {found.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path} does not fit the configuration and vocabulary of this run: {listed}{more}; "
            "use the model options and tokenizers that it was trained with"
        )
    model.load_state_dict(weights)
