"""Trains a model with Lightning: from two TSV files to a run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig
from fastseq.training.batching import TokenBatches
from fastseq.training.callbacks import AtomicCheckpointIO, BestAndLast, Patience, StopCleanly, Stopped, TimeLimit
from fastseq.training.checkpoint import load_checkpoint, trained_model
from fastseq.training.corpus import Corpus, load_corpus
from fastseq.training.embeddings import load_embeddings
from fastseq.training.features import sizes
from fastseq.training.files import refuse_links, write_bytes
from fastseq.training.folder import RunFolder, model_options, on_device
from fastseq.training.init_from import freeze, take_over
from fastseq.training.lock import locked
from fastseq.training.metrics import LABELS, higher_is_better, monitors
from fastseq.training.metrics_file import MetricsFile
from fastseq.training.moving_average import MovingAverage
from fastseq.training.options import OptimOptions, TrainerOptions, measured, options_of
from fastseq.training.plots import plot_curves, read_metrics
from fastseq.training.profile import TimeSplit
from fastseq.training.progress import Bar, EpochLines, UpdateRows, say
from fastseq.training.reading import as_list
from fastseq.training.resume import resumable, with_best
from fastseq.training.saved import load_folder
from fastseq.training.task import Seq2SeqTask


def processes(options: TrainerOptions) -> dict[str, int | str]:
    """Trainer arguments for devices and strategy, from torchrun's environment or from the options."""
    if "TORCHELASTIC_RUN_ID" in os.environ and options.devices == "auto":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local, "strategy": "ddp"}
    most = max(os.cpu_count() or 1, torch.cuda.device_count())
    if isinstance(options.devices, int) and options.devices > most:
        raise UserError(f"--trainer.devices {options.devices} starts as many processes; choose at most {most} here")
    return {"devices": options.devices, "strategy": "auto"}


def loggers(folder: RunFolder, first_step: int) -> list:
    """metrics.csv and TensorBoard; both keep the rows before `first_step` and replace the later ones."""
    rows = read_metrics(folder.metrics) if rank_zero_only.rank == 0 else []
    kept = [row for row in rows if int(row["step"]) < first_step]
    board = TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=first_step)
    return [MetricsFile(folder.metrics, kept), board]


def make_trainer(
    options: TrainerOptions, optim: OptimOptions, folder: RunFolder, checkpoint_io: AtomicCheckpointIO
) -> L.Trainer:
    """A Lightning trainer that saves into the run folder, without loggers; raises UserError for a bad option."""
    best_and_last = BestAndLast(folder.checkpoints, options.monitor, options.keep)
    callbacks: list[L.Callback] = [MovingAverage(optim.ema)] if optim.ema else []
    callbacks += [best_and_last, StopCleanly(folder.checkpoints)]
    if options.max_minutes is not None:
        callbacks.append(TimeLimit(options.max_minutes, best_and_last))
    if options.patience is not None:
        mode = "max" if higher_is_better(options.monitor) else "min"
        callbacks.append(Patience(options.monitor, patience=options.patience, mode=mode, check_finite=False))
    callbacks += [UpdateRows(options.log_every), EpochLines(steps=options.val_every is not None)]
    progress_bar = options.progress_bar and sys.stdout.isatty()
    if progress_bar:
        callbacks.append(Bar(refresh_rate=10))
    try:
        return L.Trainer(
            **processes(options),
            accelerator=options.accelerator,
            precision=options.precision,
            max_epochs=options.max_epochs,
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=optim.gradient_clip or None,
            logger=False,
            callbacks=callbacks,
            plugins=[checkpoint_io],
            log_every_n_steps=1,
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(
            f"--trainer.{name} {getattr(options, name)}" for name in ("accelerator", "devices", "precision")
        )
        raise UserError(f"{given} cannot be used here: {' '.join(str(error).split())}") from error


def new_model(options: Seq2SeqConfig, seed: int) -> Seq2Seq:
    """The model before its first update; raises UserError for one that memory cannot hold."""
    gib, memory = 16 * options.parameter_count / 2**30, memory_size() / 2**30
    if gib > memory:
        raise UserError(
            f"the model has {options.parameter_count:,} parameters: training needs {gib:,.0f} GiB for weights, "
            f"gradients and Adam's moments, this machine has {memory:,.0f} GiB; lower --model.hidden_size, "
            "--model.embedding_dim, or the numbers of layers"
        )
    torch.manual_seed(seed)
    return Seq2Seq(options)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def memory_size() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_monitor(config: Namespace) -> None:
    """Raise UserError when --trainer.monitor names no measured value."""
    names = monitors(measured(config))
    if config.trainer.monitor not in names:
        raise UserError(f"--trainer.monitor {config.trainer.monitor} is not measured; choose one of {', '.join(names)}")


def check_adversarial(config: Namespace) -> None:
    """Raise UserError for a form of adversarial training without a length."""
    if config.optim.adversarial_form != "perturbation" and not config.optim.adversarial:
        raise UserError(
            f"--optim.adversarial_form {config.optim.adversarial_form} needs --optim.adversarial, the length of the "
            "perturbation; give it, for example 1, or leave the form out"
        )


def finished(checkpoint: dict[str, Any], task: Seq2SeqTask, trainer: L.Trainer) -> str | None:
    """The reason why the checkpoint's run is complete, or None.

    Raises UserError for other training data or another number of processes.
    """
    then = checkpoint["updates_per_epoch"], len(checkpoint["random_states"])
    now = task.updates_per_epoch, trainer.world_size
    if then != now:
        raise UserError(
            f"the checkpoint has epochs of {then[0]} updates on {then[1]} process(es), now {now[0]} on {now[1]}; "
            "resume with the same training file and the same number of processes"
        )
    if checkpoint["global_step"] >= task.total_updates:
        return (
            f"all {trainer.max_epochs} epochs are trained; train on with a larger --trainer.max_epochs (or max_steps)"
        )
    waiting = [callback for callback in trainer.callbacks if isinstance(callback, Patience)]
    if any(callback.spent(checkpoint) for callback in waiting):
        return f"it was stopped early by --trainer.patience {waiting[0].patience}; train on with a larger one"
    return None


def fit(config: Namespace, *, resume: bool) -> None:
    """Train as `config` says, from the beginning or from the run folder's last checkpoint."""
    quiet()
    check_monitor(config)
    check_adversarial(config)
    folder = RunFolder(config.run_dir)
    with contextlib.ExitStack() as stack:
        if resume:
            stack.enter_context(alone(folder))
        run = prepare(config, folder, resume=resume)
        if run is None:
            return
        if not resume:
            stack.enter_context(alone(folder))
        write_folder(config, folder, run.corpus, resume=resume)
        train(config, folder, run)


def alone(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """The lock of the run folder, which the first process of a job holds for all of them."""
    return locked(folder.path) if rank_zero_only.rank == 0 else contextlib.nullcontext()


class Run(NamedTuple):
    """Everything that training needs, checked; nothing is written yet."""

    corpus: Corpus
    task: Seq2SeqTask
    trainer: L.Trainer
    batches: TokenBatches
    valid: TokenBatches
    begun: Path | None  # checkpoint to resume from
    checkpoint: dict[str, Any] | None  # its content


def prepare(config: Namespace, folder: RunFolder, *, resume: bool) -> Run | None:
    """Read the data and make the model, without writing; None when the run to resume is at its end."""
    options, optim = options_of(config, "trainer", TrainerOptions), options_of(config, "optim", OptimOptions)
    begun = None
    if resume:
        refuse_links(folder.path.rglob("*"))
        begun = resume_point(folder)
    elif rank_zero_only.rank == 0:  # which may have written into it when a slower process comes here
        folder.check_free(overwrite=config.overwrite)
    checkpoint = load_checkpoint(begun) if begun else None
    if options.threads is not None:
        torch.set_num_threads(min(options.threads, cores()))
    fresh = checkpoint is None
    start = load_folder(config.init_from, None, "cpu") if fresh and config.init_from is not None else None
    tokenizers = folder.load_tokenizers() if resume else start and start.tokenizers
    corpus = load_corpus(config, tokenizers, grow=not resume and start is not None and config.grow_vocabulary)
    pairs = len(corpus.train[0])
    if options.accumulate > pairs:
        raise UserError(
            f"--trainer.accumulate {options.accumulate} needs as many pairs, {', '.join(as_list(config.train))} has "
            f"{pairs:,}; "
            f"choose at most {pairs}"
        )
    shape = model_options(config, *sizes((corpus.source_tokenizer, corpus.target_tokenizer)))
    model = new_model(shape, int(config.seed)) if fresh else trained_model(shape, checkpoint, begun)
    if start is not None:
        take_over(model, start.model)
    if fresh:
        load_embeddings(model, config, corpus)
    freeze(model, config.freeze)
    checkpoint_io = AtomicCheckpointIO()
    trainer = make_trainer(options, optim, folder, checkpoint_io)
    on_device(model, trainer.strategy.root_device)
    share = {"max_tokens": config.data.max_tokens, "world_size": trainer.world_size, "rank": trainer.global_rank}
    every = options.val_every
    batches = TokenBatches(*corpus.train, **share, accumulate=options.accumulate, seed=int(config.seed), every=every)
    trainer.fit_loop.max_epochs = epochs(options, batches)
    valid = TokenBatches(*corpus.valid, **share, shuffle=False)
    if config.profile:
        trainer.callbacks.insert(0, TimeSplit(model, batches))
    task = Seq2SeqTask(model, optim, len(batches) // options.accumulate, trainer.max_epochs, corpus.decoding)
    if checkpoint is not None:
        checkpoint_io.checkpoint = checkpoint = resumable(checkpoint, task, trainer, begun)
        with_best(checkpoint, trainer, folder.checkpoints / "best.ckpt")
        if why := finished(checkpoint, task, trainer):
            say(f"{folder.path} is finished: {why}")
            complete(folder)
            return None
    return Run(corpus, task, trainer, batches, valid, begun, checkpoint)


def resume_point(folder: RunFolder) -> Path | None:
    """The checkpoint to resume from: last.ckpt, or the first best.ckpt of a process killed between the two, or None."""
    for name in ("last", "best"):
        if (path := folder.checkpoints / f"{name}.ckpt").exists():
            return path
    say(f"{folder.path} has no checkpoint yet: training starts from the beginning")
    return None


@rank_zero_only
def complete(folder: RunFolder) -> None:
    """Write the files that a process killed at its very end still owed: last.ckpt, then curves.png."""
    last = folder.checkpoints / "last.ckpt"
    if not last.exists():
        write_bytes(last, (folder.checkpoints / "best.ckpt").read_bytes())
    if not folder.curves.exists():
        plot_curves(folder.metrics, folder.curves)


def epochs(options: TrainerOptions, batches: TokenBatches) -> int:
    """Validations until the run ends: after `max_epochs` passes, or before, at or after `max_steps` updates."""
    updates = options.max_epochs * batches.updates_per_pass
    if options.max_steps is not None:
        updates = min(updates, options.max_steps)
    return -(-updates // (len(batches) // options.accumulate))


def train(config: Namespace, folder: RunFolder, run: Run) -> None:
    """Run Lightning's loop, and report; exits with the signal's code after a signal."""
    trainer = run.trainer
    trainer.loggers = loggers(folder, run.checkpoint["global_step"] if run.checkpoint else 0)
    parameters = list(run.task.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    accumulate = run.batches.accumulate
    say(
        f"{len(run.corpus.train[0]):,} training pairs in {run.batches.updates_per_pass * accumulate:,} batches, "
        f"{sum(p.numel() for p in parameters):,} parameters{f', {frozen:,} of them frozen' if frozen else ''}, "
        f"run folder {folder.path}"
    )
    if run.batches.updates_per_pass == 1:
        say(f"warning: one update an epoch; lower --data.max_tokens ({config.data.max_tokens}) for more")
    torch.manual_seed(config.seed + trainer.global_rank)
    try:
        trainer.fit(run.task, run.batches, run.valid, ckpt_path=run.begun)
    except Stopped as stop:
        say(f"stopped at update {trainer.global_step}; continue with: fastseq train --resume {folder.path}")
        raise SystemExit(128 + stop.args[0]) from None
    report(trainer, folder, config.trainer.val_every)


@rank_zero_only
def write_folder(config: Namespace, folder: RunFolder, corpus: Corpus, *, resume: bool) -> None:
    """Write config.yaml, with all defaults; for a new run make the folder and write the tokenizers."""
    if not resume:
        folder.create(overwrite=config.overwrite)
        folder.save_tokenizers(corpus.source_tokenizer, corpus.target_tokenizer)
    config.data.max_length_ratio = corpus.decoding.max_length_ratio
    folder.save_config(config)


@rank_zero_only
def report(trainer: L.Trainer, folder: RunFolder, every: int | None) -> None:
    """Draw the curves, print the best result and the next command. An epoch is `every` updates, None for a pass."""
    plot_curves(folder.metrics, folder.curves)
    if ended_by_time(trainer):
        say(f"time is up at update {trainer.global_step}; continue with: fastseq train --resume {folder.path}")
    best = next(callback for callback in trainer.callbacks if isinstance(callback, BestAndLast))
    if best.best is not None:
        label = LABELS.get(best.monitor.removeprefix("valid_"), best.monitor)
        unit, size = ("epoch", 1) if every is None else ("update", every)
        when = f"{unit} {(best.best_epoch + 1) * size} of {trainer.current_epoch * size}"
        say(f"best {when}: validation {label} {best.best:.4g}")
    say(f"curves: {folder.curves}; next: fastseq evaluate {folder.path} --data test.tsv")


def ended_by_time(trainer: L.Trainer) -> bool:
    """True if --trainer.max_minutes ended a run that has more to train."""
    over = any(isinstance(callback, TimeLimit) and callback.over for callback in trainer.callbacks)
    waited = any(isinstance(callback, Patience) and callback.stopped for callback in trainer.callbacks)
    return over and not waited and trainer.global_step < trainer.lightning_module.total_updates


def quiet() -> None:
    """Silence Lightning's notices about hardware and intended settings; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*Experiment logs directory.*", ".*logging interval.*", ".*LeafSpec.*is deprecated.*"):
        warnings.filterwarnings("ignore", message)
