"""Lightning callbacks: checkpoints that survive a full disk and a stop at any moment, early stopping, signals."""

from __future__ import annotations

import io
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastseq.errors import UserError
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.training.checkpoint import start_again
from fastseq.training.files import rename
from fastseq.training.metrics import higher_is_better
from fastseq.training.moving_average import MovingAverage
from fastseq.training.saved import kept_weights, write_weights


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, then renames: the file under the final name is complete at every moment.

    Lightning resumes from the `checkpoint` that is set here, already read and checked: it would unpickle a file.
    """

    checkpoint: dict[str, Any] | None = None

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """`checkpoint`, whatever the path."""
        return dict(self.checkpoint)

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
            rename(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            run, kept = path.parent.parent, "the previous one is intact" if path.exists() else "there is no earlier one"
            resumable = (path.parent / "last.ckpt").exists()
            advice = f"continue with: fastseq train --resume {run}" if resumable else start_again(run)
            raise UserError(
                f"the checkpoint {path} could not be written ({error}); {kept}; make room or choose another disk, "
                f"then {advice}"
            ) from error


class BestAndLast(Checkpoint):
    """Saves last.ckpt after every epoch, best.ckpt when `monitor` improves, and the weights of the last `keep` epochs.

    The kept weights are files weights-UPDATE.safetensors, with the number of updates.
    """

    def __init__(self, folder: Path, monitor: str, keep: int = 0) -> None:
        self.folder, self.monitor, self.keep = folder, monitor, keep
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.within_epoch = False  # the end of training cuts an epoch short; its last.ckpt is there

    def state_dict(self) -> dict[str, str | float | int | None]:
        """The best value of the run, as part of a checkpoint."""
        return {"monitor": self.monitor, "best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value, if it was measured by the same metric."""
        if state.get("monitor") == self.monitor:
            self.best, self.best_epoch = state["best"], state["best_epoch"]

    def beats(self, state: dict[str, Any], other: dict[str, Any] | None) -> bool:
        """True if the best value of ``state``, by this metric, is better than that of ``other``."""
        value, known = (s["best"] if s is not None and s["monitor"] == self.monitor else None for s in (state, other))
        return value is not None and (known is None or self._sign * value < self._sign * known)

    @property
    def _sign(self) -> float:
        return -1.0 if higher_is_better(self.monitor) else 1.0

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Save after validation. Raises UserError, without saving, once the loss is not finite."""
        if not math.isfinite(trainer.callback_metrics["valid_loss"]):
            raise UserError(
                f"the loss is not finite after epoch {trainer.current_epoch + 1}; lower --optim.lr or "
                f"--optim.gradient_clip, and {start_again(self.folder.parent)}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        if math.isfinite(value) and (self.best is None or self._sign * value < self._sign * self.best):
            self.best, self.best_epoch = value, trainer.current_epoch
            trainer.save_checkpoint(self.folder / "best.ckpt")
        if self.keep and trainer.is_global_zero:
            average = next((callback for callback in trainer.callbacks if isinstance(callback, MovingAverage)), None)
            weights = task.model.state_dict() if average is None else average.averaged(task.model)
            self._keep_weights(trainer.global_step, weights, task.model.config)
        if self.within_epoch:
            self._renew_last(trainer)
        else:
            trainer.save_checkpoint(self.folder / "last.ckpt")

    @rank_zero_only
    def _renew_last(self, trainer: L.Trainer) -> None:
        """Put the best value into last.ckpt, which Lightning would now write as that of a complete epoch."""
        path = self.folder / "last.ckpt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["callbacks"][self.state_key] = self.state_dict()
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)

    def _keep_weights(self, update: int, weights: dict[str, torch.Tensor], config: Seq2SeqConfig) -> None:
        path = self.folder / f"weights-{update:010d}.safetensors"
        try:
            write_weights(path, weights, config)
        except OSError as error:
            path.with_name(path.name + ".partial").unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written ({error}); make room or choose another disk, then continue with: "
                f"fastseq train --resume {self.folder.parent}"
            ) from error
        for old in kept_weights(self.folder)[: -self.keep]:
            old.unlink()


class Patience(EarlyStopping):
    """Early stopping with the patience of the command line, in a resumed run too."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of epochs without improvement."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    @property
    def stopped(self) -> bool:
        """True if this run has used up its patience."""
        return self.wait_count >= max(self.patience, 1)

    def spent(self, checkpoint: dict[str, Any]) -> bool:
        """True if the run of this checkpoint has used up its patience."""
        state = checkpoint["callbacks"].get(self.state_key)
        return state is not None and state["wait_count"] >= max(self.patience, 1)


class TimeLimit(Checkpoint):
    """Ends training after `minutes`: at the end of an update, with validation and checkpoints as at any other end.

    last.ckpt is that of the update, before validation: a resumed run goes on in the middle of the epoch.
    """

    def __init__(self, minutes: float, best_and_last: BestAndLast) -> None:
        self.minutes, self.best_and_last = minutes, best_and_last
        self.over = False
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a complete update. All processes stop at the same one."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        over = time.monotonic() - self._start >= 60 * self.minutes
        self.over = trainer.strategy.reduce_boolean_decision(over, all=False)
        if self.over and not trainer.is_last_batch:
            self.best_and_last.within_epoch = True
            trainer.save_checkpoint(self.best_and_last.folder / "last.ckpt")
        trainer.should_stop = trainer.should_stop or self.over


class Stopped(Exception):
    """A signal ended training, after last.ckpt was written; the argument is the signal's number."""


class StopCleanly(Checkpoint):
    """On SIGINT or SIGTERM: finish the update (the last of an epoch with validation), save last.ckpt, raise Stopped.

    A second signal has its usual meaning. So has the first one when several processes train: saving needs them all,
    and they would stop at different updates. Such a run resumes from its last complete epoch.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requested = 0  # number of the signal, 0 for none
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Install the signal handlers."""
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}

    def _request(self, number: int, frame: Any) -> None:
        self.requested = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a signal: save and stop in mid-epoch, once an update is complete."""
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.requested and complete and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            raise Stopped(self.requested)

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """After a signal: stop between two epochs; `BestAndLast` has saved."""
        if self.requested:
            raise Stopped(self.requested)

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, task: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._restore()
