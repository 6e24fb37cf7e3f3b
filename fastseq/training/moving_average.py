"""The exponential moving average of the weights, which is what a run evaluates and saves."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.checkpoint import WEIGHTS

RAW = "raw_weights"  # field of a checkpoint: the weights that training goes on with


def decay_at(decay: float, update: int) -> float:
    """Weight of the old average at `update` (from 1): lower at first, when the weights move fast."""
    return min(decay, (1 + update) / (10 + update))


class MovingAverage(L.Callback):
    """After each update: average = d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)).

    During validation the model holds the average. A checkpoint's state_dict is the average as well, so that every
    command reads it; the weights themselves lie beside it under `raw_weights`, for an exact resume.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: list[Tensor] = []  # of each parameter
        self._raw: list[Tensor] | None = None  # while the model holds the average
        self._resumed: dict[str, Tensor] | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Hold the weights of the checkpoint until training starts."""
        self._resumed = checkpoint[RAW]

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Start the average at the weights; in a resumed run the model holds the average and gets its weights back."""
        model: Seq2Seq = task.model
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        if self._resumed is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self._resumed[name])
            self._resumed = None

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average, once an update is complete."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            weight = 1 - decay_at(self.decay, trainer.global_step)
            with torch.no_grad():
                torch._foreach_lerp_(self.average, list(task.model.parameters()), weight)

    def on_validation_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Let the model hold the average."""
        self._raw = [parameter.detach().clone() for parameter in task.model.parameters()]
        self._set(task.model, self.average)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Give the model its weights back."""
        self._set(task.model, self._raw)
        self._raw = None

    def _set(self, model: Seq2Seq, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(value)

    def averaged(self, model: Seq2Seq) -> dict[str, Tensor]:
        """The state_dict of `model` with the averages, a tied matrix under each of its names."""
        by_parameter = {id(p): value for p, value in zip(model.parameters(), self.average, strict=True)}
        named = model.named_parameters(remove_duplicate=False)
        return {name: by_parameter[id(parameter)] for name, parameter in named}

    def on_save_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the weights, and these beside it."""
        checkpoint[RAW] = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}
        checkpoint["state_dict"] |= {WEIGHTS + name: tensor for name, tensor in self.averaged(task.model).items()}
