"""``fastseq train --profile``: where the time of an epoch goes, as a table after each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.batching import TokenBatches

PARTS = ("data", "encoder", "decoder", "loss", "backward", "optimiser", "validation", "other")


class TimeSplit(L.Callback):
    """Measures the parts of each epoch and prints them.

    encoder: embedding, encoder LSTM, bridge, keys. decoder: decoder LSTM and attention. loss: output layer and
    cross-entropy, with their gradients where the backend makes them in the forward. backward: the rest of the
    gradients. optimiser: clipping and update. validation: its losses and its decoding. other: the training loop and its
    logs, without checkpoints. On a GPU each part waits for the device, so an epoch takes longer than without the table.
    """

    def __init__(self, model: Seq2Seq, batches: TokenBatches) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._start = self._mark = 0.0
        self._validating = False
        self._device = torch.device("cpu")
        model.encode = self._timed("encoder", model.encode)
        model.decoder.vectors = self._timed("decoder", model.decoder.vectors)
        model.decoder.loss = self._timed("loss", model.decoder.loss)
        batches.make_batch = self._timed("data", batches.make_batch)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _timed(self, part: str, call: Callable) -> Callable:
        """The same call, whose time counts as ``part`` unless it belongs to the validation."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = call(*args, **kwargs)
            if not self._validating:
                self._seconds[part] += self._now() - start
            return result

        return timed

    def _begin(self) -> None:
        self._mark = self._now()

    def _end(self, part: str) -> None:
        self._seconds[part] += self._now() - self._mark

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start the clock of an epoch that is resumed in its middle."""
        self._device, self._start = task.device, self._now()

    def on_train_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start the clock."""
        self._seconds, self._start = dict.fromkeys(PARTS, 0.0), self._now()

    def on_before_backward(self, trainer: L.Trainer, task: L.LightningModule, loss: torch.Tensor) -> None:
        """The backward begins."""
        self._begin()

    def on_after_backward(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """The backward ends."""
        self._end("backward")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, task: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clipping and the update begin."""
        self._begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The update ends, if this batch completed one."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._end("optimiser")

    def on_validation_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Validation begins."""
        self._validating = True
        self._begin()

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Validation ends."""
        self._validating = False
        self._end("validation")

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Print the table."""
        total = self._now() - self._start
        self._seconds["other"] = total - sum(self._seconds.values())
        for line in table(self._seconds, total):
            trainer.print(line)


def table(seconds: dict[str, float], total: float) -> list[str]:
    """Lines of the table: each part, its seconds and its share of the total."""
    rows = [*seconds.items(), ("epoch", total)]
    return [f"  {'part':<12}{'seconds':>9}{'share':>9}"] + [
        f"  {name:<12}{value:>9.3f}{value / max(total, 1e-9):>9.1%}" for name, value in rows
    ]
