"""The training task as a LightningModule: loss, optimiser, schedule, validation, and the state for an exact resume."""

from __future__ import annotations

import functools
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.adversarial import adversarial_loss
from fastseq.training.batching import Batch
from fastseq.training.corpus import Decoding
from fastseq.training.options import OptimOptions
from fastseq.training.tokenizer import PAD


def learning_rate_factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """Factor on the peak learning rate for update `step` (from 0) of `total`; `warmup` is a share of `total`.

    constant: linear warm-up, then 1. cosine: linear warm-up, then half a cosine down to 0. one_cycle: half a cosine up
    from 1/25, half a cosine down to 1/250000 (Smith and Topin 2018, annealed as in torch's OneCycleLR).
    """
    rising = warmup * total
    if schedule == "one_cycle":
        if step < rising:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rising)) / 2
        low = 1 / 250_000
        return low + (1 - low) * _half_cosine(step - rising, total - rising)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 1.0 if schedule == "constant" else _half_cosine(step - rising, total - rising)


def _half_cosine(step: float, total: float) -> float:
    return (1 + math.cos(math.pi * min(step / max(total, 1), 1.0))) / 2


class Seq2SeqTask(L.LightningModule):
    """Trains `model` with teacher forcing on batches of `TokenBatches`.

    The loss of an update is the mean over its target tokens, on any number of processes and accumulated batches: each
    share is a sum divided by the tokens of the whole update, times the divisor of Lightning and DDP.
    """

    def __init__(
        self, model: Seq2Seq, options: OptimOptions, updates_per_epoch: int, epochs: int, decoding: Decoding
    ) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.updates_per_epoch = updates_per_epoch
        self.total_updates = updates_per_epoch * epochs
        self.decoding = decoding
        self._update_loss = torch.zeros(())
        self._valid_sums = torch.zeros(2)
        self._random_states: list[dict[str, Tensor]] | None = None

    @property
    def distributed(self) -> bool:
        """True if several processes train."""
        return self.trainer.world_size > 1

    def _loss_sum(self, batch: Batch, **options: Any) -> Tensor:
        return self.model.loss(
            batch.source,
            batch.source_lengths,
            batch.target_in,
            batch.labels,
            reduction="sum",
            **options,
        )

    def _training_loss_sum(self, batch: Batch) -> Tensor:
        options = self.options
        loss_sum = functools.partial(
            self._loss_sum,
            batch,
            label_smoothing=options.label_smoothing,
            teacher_forcing_ratio=options.teacher_forcing_ratio,
        )
        if not options.adversarial:
            return loss_sum()
        return adversarial_loss(self.model, batch.source, loss_sum, options.adversarial, options.adversarial_form)

    def on_train_epoch_start(self) -> None:
        """Choose the order of this epoch. An epoch resumed in its middle gets it from the checkpoint instead."""
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This process's part of the update's mean loss per target token (label smoothing, adversarial included)."""
        accumulate = self.trainer.accumulate_grad_batches
        loss = self._training_loss_sum(batch) / batch.update_tokens * self.trainer.world_size * accumulate
        self._update_loss = self._update_loss.to(loss.device) + loss.detach() / accumulate
        if (batch_idx + 1) % accumulate == 0:
            self.log("train_loss", self._update_loss, prog_bar=True, logger=False, sync_dist=self.distributed)
            self._update_loss = torch.zeros((), device=loss.device)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start new sums of loss and tokens."""
        self._valid_sums = torch.zeros(2, device=self.device, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss (without label smoothing) and the target tokens."""
        tokens = (batch.labels != PAD).sum()
        self._valid_sums += torch.stack([self._loss_sum(batch), tokens]).double()

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss per target token and the metrics of greedy decoding."""
        loss, tokens = self.trainer.strategy.reduce(self._valid_sums, reduce_op="sum")
        values = {"loss": (loss / tokens).item()} | self.decoding(self.model, self.global_rank, self.trainer.world_size)
        for name, value in values.items():
            self.log(f"valid_{name}", value, prog_bar=name in ("loss", "token_error_rate"), sync_dist=self.distributed)

    def configure_optimizers(self) -> dict:
        """AdamW (Loshchilov and Hutter 2019) with the learning rate set after each update."""
        options = self.options
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=options.lr,
            betas=(0.9, options.beta2),
            weight_decay=options.weight_decay,
            fused=self.trainer.precision != "16-mixed",  # Lightning does not clip gradients that fused would unscale
        )
        if self.trainer.precision == "bf16-mixed":  # no GradScaler, which alone reads the flag; Lightning then clips
            optimizer._step_supports_amp_scaling = False
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(options.schedule, step, self.total_updates, options.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the number of updates in an epoch, and the state of the random generators of all processes."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        states = [state]
        if self.distributed:
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_states"] = states
        checkpoint["updates_per_epoch"] = self.updates_per_epoch

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Hold the generators' states until training starts."""
        self._random_states = checkpoint["random_states"]

    def on_train_start(self) -> None:
        """Continue the random numbers where the checkpoint left off, at the learning rate of the present schedule."""
        scheduler = self.lr_schedulers()
        for group, lr, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = lr * factor(scheduler.last_epoch)
        states, self._random_states = self._random_states, None
        if states is None:
            return
        torch.set_rng_state(states[self.global_rank]["cpu"])
        if self.device.type == "cuda" and "cuda" in states[self.global_rank]:
            torch.cuda.set_rng_state(states[self.global_rank]["cuda"], self.device)
