"""`fastseq train`: from two TSV files to a run folder."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastseq.training.batching import TokenBatches
from fastseq.training.checkpoint import (
    AtomicCheckpointIO,
    BestAndLast,
    StopCleanly,
    Stopped,
    load_checkpoint,
    load_weights,
)
from fastseq.training.corpus import Corpus, load_corpus
from fastseq.training.folder import RunFolder, build_model
from fastseq.training.metrics import LABELS, higher_is_better
from fastseq.training.options import (
    OptimOptions,
    TrainerOptions,
    options_of,
    parse_train,
    train_parser,
)
from fastseq.training.plots import plot_curves, read_metrics
from fastseq.training.progress import Bar, EpochLines, UpdateRows, say
from fastseq.training.task import Seq2SeqTask


def processes(options: TrainerOptions) -> dict[str, int | str]:
    """Trainer arguments for devices and strategy: what torchrun started, or what the options say."""
    if "TORCHELASTIC_RUN_ID" in os.environ and options.devices == "auto":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local, "strategy": "ddp"}
    return {"devices": options.devices, "strategy": "auto"}


def loggers(folder: RunFolder, first_step: int) -> list:
    """CSV and TensorBoard loggers that keep the rows before `first_step` and replace the later ones."""
    kept = [row for row in read_metrics(folder.metrics) if int(row["step"]) < first_step]
    csv_logger = CSVLogger(folder.path, name="", version="", flush_logs_every_n_steps=1)
    board = TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=first_step or None)
    if rank_zero_only.rank == 0:
        csv_logger.experiment.metrics.extend(kept)
        csv_logger.save()
    return [csv_logger, board]


def make_trainer(options: TrainerOptions, optim: OptimOptions, folder: RunFolder, first_step: int) -> L.Trainer:
    """A Lightning trainer that logs and saves into the run folder."""
    callbacks: list[L.Callback] = [BestAndLast(folder.checkpoints, options.monitor), StopCleanly(folder.checkpoints)]
    if options.patience is not None:
        mode = "max" if higher_is_better(options.monitor) else "min"
        callbacks.append(EarlyStopping(options.monitor, patience=options.patience, mode=mode))
    callbacks += [UpdateRows(options.log_every), EpochLines()]
    progress_bar = options.progress_bar and sys.stdout.isatty()
    if progress_bar:
        callbacks.append(Bar(refresh_rate=10))
    return L.Trainer(
        **processes(options),
        accelerator=options.accelerator,
        precision=options.precision,
        max_epochs=options.max_epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=optim.gradient_clip or None,
        logger=loggers(folder, first_step),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def fit(config: Namespace, *, resume: bool) -> None:
    """Train as `config` says, from the beginning or from the run folder's last checkpoint."""
    folder = RunFolder(config.run_dir)
    options, optim = options_of(config, "trainer", TrainerOptions), options_of(config, "optim", OptimOptions)
    last = folder.checkpoints / "last.ckpt"
    checkpoint = load_checkpoint(last) if resume else None
    corpus = load_corpus(config, folder.load_tokenizers() if resume else None)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(config.seed)
    model = build_model(config, len(corpus.source_tokenizer), len(corpus.target_tokenizer))
    if checkpoint is None:
        start_folder(config, folder, corpus)
    else:
        load_weights(model, checkpoint, last)
    trainer = make_trainer(options, optim, folder, checkpoint["global_step"] if checkpoint else 0)
    share = {"max_tokens": config.data.max_tokens, "world_size": trainer.world_size, "rank": trainer.global_rank}
    batches = TokenBatches(*corpus.train, **share, accumulate=options.accumulate, seed=config.seed)
    valid = TokenBatches(*corpus.valid, **share, shuffle=False)
    task = Seq2SeqTask(model, optim, len(batches) // options.accumulate * options.max_epochs, corpus.decoding)
    say(
        f"{len(corpus.train[0]):,} training pairs in {len(batches):,} batches, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, run folder {folder.path}"
    )
    torch.manual_seed(config.seed + trainer.global_rank)
    try:
        trainer.fit(task, batches, valid, ckpt_path=last if resume else None)
    except Stopped:
        say(f"stopped at update {trainer.global_step}; continue with: fastseq train --resume {folder.path}")
        raise SystemExit(130) from None
    report(trainer, folder)


@rank_zero_only
def start_folder(config: Namespace, folder: RunFolder, corpus: Corpus) -> None:
    """Make the run folder, with its configuration and tokenizers."""
    folder.create(overwrite=config.overwrite)
    kept = config.clone()
    for name in ("config", "resume", "overwrite"):
        kept.pop(name, None)
    train_parser().save(kept, str(folder.config), overwrite=True)
    corpus.source_tokenizer.save(folder.source_tokenizer)
    corpus.target_tokenizer.save(folder.target_tokenizer)


@rank_zero_only
def report(trainer: L.Trainer, folder: RunFolder) -> None:
    """Draw the curves, print the best result and what to do with it."""
    plot_curves(folder.metrics, folder.curves)
    best = next(callback for callback in trainer.callbacks if isinstance(callback, BestAndLast))
    if best.best is not None:
        label = LABELS.get(best.monitor.removeprefix("valid_"), best.monitor)
        say(f"best epoch {best.best_epoch + 1} of {trainer.current_epoch}: validation {label} {best.best:.4g}")
    say(f"curves: {folder.curves}; next: fastseq evaluate {folder.path} --data test.tsv")


def quiet() -> None:
    """Silence Lightning's notices about hardware, tips and things that are as intended here; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*Experiment logs directory.*", ".*logging interval.*", ".*LeafSpec.*is deprecated.*"):
        warnings.filterwarnings("ignore", message)


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq train`; `argv` without the command's own name."""
    config = parse_train(sys.argv[1:] if argv is None else argv)
    quiet()
    fit(config, resume=config.resume is not None)
