"""Options of a training run: one YAML file, every key also a command-line option."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from fastseq.nn.seq2seq import Seq2SeqConfig
from fastseq.training.errors import UserError
from fastseq.training.tokenizer import Kind

EXAMPLE = "fastseq train --train train.tsv --valid valid.tsv --run_dir runs/mine --trainer.max_epochs 10"
FROM_DATA = {"src_vocab_size", "tgt_vocab_size", "source_features", "pad_id", "bos_id", "eos_id", "unk_id"}


@dataclass
class DataOptions:
    """Reading and batching.

    Args:
        source_tokenizer: characters, white-space separated tokens, or byte-pair encoding trained on the training data.
        target_tokenizer: the same for the target side.
        vocab_size: largest vocabulary of each tokenizer, the 4 reserved ids included.
        shared_vocabulary: one tokenizer for both sides, as share_all_embeddings needs; both kinds must be equal.
        max_tokens: tokens in a batch of one process, padding included, counted on the longer side.
        valid_sentences: sources of the validation file that are decoded after each epoch, spread over the file.
        text_metrics: BLEU and chrF as well.
    """

    source_tokenizer: Kind = "char"
    target_tokenizer: Kind = "whitespace"
    vocab_size: int = 8000
    shared_vocabulary: bool = False
    max_tokens: int = 4096
    valid_sentences: int = 1000
    text_metrics: bool = False


@dataclass
class OptimOptions:
    """Loss, optimiser (AdamW) and learning rate.

    Args:
        lr: peak learning rate.
        beta2: decay of AdamW's second moment.
        weight_decay: decoupled weight decay.
        schedule: course of the learning rate over the whole run.
        warmup: share of the run in which the learning rate rises.
        label_smoothing: probability spread evenly over the vocabulary.
        teacher_forcing_ratio: probability that a decoder step reads the right token instead of the predicted one.
        gradient_clip: largest norm of the gradient, 0 for no limit.
    """

    lr: float = 2e-3
    beta2: float = 0.98
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup: float = 0.05
    label_smoothing: float = 0.1
    teacher_forcing_ratio: float = 1.0
    gradient_clip: float = 1.0


@dataclass
class TrainerOptions:
    """The loop, which is Lightning's.

    Args:
        max_epochs: passes over the training file.
        monitor: value that chooses the best checkpoint and stops early (a column of metrics.csv).
        patience: epochs without improvement before training stops, null for never.
        accumulate: batches of each process in one update.
        precision: 32-true, bf16-mixed, or another precision that Lightning knows.
        accelerator: auto, cpu, cuda, or another accelerator that Lightning knows.
        devices: processes on this machine, "auto" for all GPUs, one CPU process, or as torchrun says.
        threads: CPU threads of each process, null for torch's choice. One is the safe choice for small models: threads
            that wait for each other cost more than they bring when the machine has other work.
        log_every: updates between two rows of the training loss.
        progress_bar: show one, on a terminal.
    """

    max_epochs: int = 20
    monitor: str = "valid_loss"
    patience: int | None = None
    accumulate: int = 1
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str = "auto"
    threads: int | None = None
    log_every: int = 20
    progress_bar: bool = True


@dataclass
class ReferenceResult:
    """A published result that `fastseq evaluate` prints below its own.

    Args:
        name: system and publication.
        sequence_error_rate: in percent.
        token_error_rate: in percent.
        note: what differs, such as the split.
    """

    name: str
    sequence_error_rate: float | None = None
    token_error_rate: float | None = None
    note: str = ""


def train_parser() -> ArgumentParser:
    """The options of `fastseq train`, and the meaning of a run folder's config.yaml."""
    parser = ArgumentParser(
        prog="fastseq train",
        description="Train a sequence-to-sequence model on a file of source<TAB>target lines.",
        epilog=f"Example: {EXAMPLE}",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--train", type=str | None, help="training file, source<TAB>target lines")
    parser.add_argument("--valid", type=str | None, help="validation file; lines with one source are alternatives")
    parser.add_argument("--run_dir", type=str | None, help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --run_dir holds")
    parser.add_argument("--resume", type=str | None, help="run folder to continue from its last checkpoint")
    parser.add_argument("--seed", type=int, default=1, help="of weights, dropout and order")
    parser.add_class_arguments(DataOptions, "data")
    parser.add_class_arguments(Seq2SeqConfig, "model", skip=FROM_DATA)
    parser.add_class_arguments(OptimOptions, "optim")
    parser.add_class_arguments(TrainerOptions, "trainer")
    parser.add_argument(
        "--reference_results", type=list[ReferenceResult], default=[], help="published results, printed by evaluate"
    )
    return parser


def underscored(argv: list[str]) -> list[str]:
    """`--n-best=2` as `--n_best=2`: both spellings of an option are good."""

    def convert(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument

    return [convert(argument) for argument in argv]


def built_in_config(name: str) -> str:
    """Path of a configuration that comes with fastseq, such as "cmudict"; any other text is returned as it is."""
    path = resources.files("fastseq.training") / f"{name}.yaml"
    return str(path) if name.isidentifier() and path.is_file() and not Path(name).exists() else name


def parse_train(argv: list[str]) -> Namespace:
    """The options on the command line, on top of those of the run that is resumed, if any.

    Raises UserError when a file or folder that training needs is not named, or when the resumed run does not exist.
    """
    argv = [built_in_config(argument) for argument in underscored(argv)]
    parser = train_parser()
    config = parser.parse_args(argv)
    if config.resume is not None:
        stored = Path(config.resume) / "config.yaml"
        if not stored.is_file():
            raise UserError(f"{config.resume} is not a run folder: it has no config.yaml; give a training's --run_dir")
        config = parser.parse_args(["--config", str(stored), *argv])
        config.run_dir = config.resume
        _check_resumed(config, parser.parse_path(str(stored)))
    for name in ("train", "valid", "run_dir"):
        if config[name] is None:
            raise UserError(f"--{name} is missing; example: {EXAMPLE}")
    return config


def _check_resumed(config: Namespace, stored: Namespace) -> None:
    """Raise UserError if an option was changed that the checkpoint has fixed; the others take effect."""
    for name, value in config.items():
        fixed = name == "seed" or name == "trainer.accumulate" or name.partition(".")[0] in ("data", "model", "optim")
        if fixed and value != stored[name]:
            raise UserError(
                f"--{name} is {stored[name]} in the run that is resumed and cannot change to {value}; "
                "leave it out, or start another run with another --run_dir"
            )


def options_of(config: Namespace, group: str, kind: type) -> object:
    """The group of options as its dataclass."""
    return kind(**vars(config[group]))
