"""Terminal output of training: one line an epoch, and Lightning's progress bar."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastseq.training.metrics import LABELS


@rank_zero_only
def say(sentence: str) -> None:
    """Print one line, on the first process only."""
    print(sentence, flush=True)


class Bar(TQDMProgressBar):
    """Lightning's bar, with epochs counted from 1 and without the version number, which run folders do not have."""

    def on_train_epoch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Name the epoch."""
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")

    def get_metrics(self, trainer: L.Trainer, task: L.LightningModule) -> dict[str, int | str | float]:
        """The metrics beside the bar."""
        metrics = super().get_metrics(trainer, task)
        metrics.pop("v_num", None)
        return metrics


class UpdateRows(L.Callback):
    """Logs training loss and learning rate of every `every`-th update, before that update's checkpoint is written.

    An epoch without such an update logs its last one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._learning_rate = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the learning rate of the coming update."""
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the update that this batch completed, if any."""
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        step, epoch = trainer.global_step, task.updates_per_epoch
        none_this_epoch = step % epoch == 0 and step // self.every == (step - epoch) // self.every
        if not complete or (step % self.every != 0 and not none_this_epoch):
            return
        values = {
            "epoch": trainer.current_epoch,
            "train_loss": float(trainer.callback_metrics["train_loss"]),
            "learning_rate": self._learning_rate,
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step - 1)


class EpochLines(L.Callback):
    """Prints one line after each epoch: the mean training loss of its updates, validation results, time.

    With `steps` it counts updates, for epochs that are not passes over the data.
    """

    def __init__(self, *, steps: bool = False) -> None:
        self.steps = steps
        self._start = 0.0
        self._loss_sum, self._updates = torch.zeros(()), 0

    def state_dict(self) -> dict[str, float | int]:
        """The sum of losses of this epoch so far, as part of a checkpoint."""
        return {"loss_sum": float(self._loss_sum), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the epoch."""
        self._loss_sum, self._updates = torch.tensor(state["loss_sum"]), state["updates"]

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start the clock of an epoch that is resumed in its middle."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start the clock and the mean."""
        self._start = time.perf_counter()
        self._loss_sum, self._updates = torch.zeros(()), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of the update that this batch completed, if any."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            loss = trainer.callback_metrics["train_loss"]
            self._loss_sum = self._loss_sum.to(loss.device) + loss
            self._updates += 1

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Print the line; validation has run."""
        values = trainer.callback_metrics | {"train_loss": self._loss_sum / self._updates}
        shown = {
            "train loss": ("train_loss", ".3f"),
            "valid loss": ("valid_loss", ".3f"),
            "sequence errors %": ("valid_sequence_error_rate", ".1f"),
            "token errors %": ("valid_token_error_rate", ".1f"),
        }
        known = {"exact_match", *(name.removeprefix("valid_") for name, _ in shown.values())}
        shown |= {label: (f"valid_{name}", ".1f") for name, label in LABELS.items() if name not in known}
        parts = [f"{label} {float(values[name]):{form}}" for label, (name, form) in shown.items() if name in values]
        seconds = time.perf_counter() - self._start
        number, last = trainer.current_epoch + 1, trainer.max_epochs
        cut = trainer.global_step < number * task.updates_per_epoch  # by a limit of time
        if self.steps or cut:
            number, last = number * task.updates_per_epoch, last * task.updates_per_epoch
        number = trainer.global_step if cut else number
        unit = "update" if self.steps or cut else "epoch"
        trainer.print(f"{unit} {number}/{last}: {', '.join(parts)}, {seconds:.0f} s")
