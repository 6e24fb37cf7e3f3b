"""Options of a training run: one YAML file, every key also a command-line option."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, restricted_number_type

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2SeqConfig
from fastseq.training.files import MAX_YAML, YAML
from fastseq.training.messages import sentence
from fastseq.training.metrics import chosen
from fastseq.training.tokenizer import RESERVED, Kind

EXAMPLE = "fastseq train --train train.tsv --valid valid.tsv --run_dir runs/mine --trainer.max_epochs 10"
FIXED = (
    "seed",
    "trainer.accumulate",
    "trainer.val_every",
    "init_from",
    "grow_vocabulary",
    "freeze",
)  # by the checkpoint of a run
EMBEDDINGS = ("src_embeddings", "tgt_embeddings")  # files beside the options of Seq2SeqConfig in the group model
FROM_DATA = {"src_vocab_size", "tgt_vocab_size", "tag_vocab_size", "pad_id", "bos_id", "eos_id", "unk_id"}

# Every number has an upper limit: past it an allocation fails, an int64 overflows, or a loop never ends.
Count = restricted_number_type(None, int, [(">=", 1), ("<=", 1_000_000_000)])
CountOrZero = restricted_number_type(None, int, [(">=", 0), ("<=", 1_000_000_000)])
Beams = Threads = restricted_number_type(None, int, [(">=", 1), ("<=", 1024)])
NewTokens = restricted_number_type(None, int, [(">=", 1), ("<=", 1_000_000)])
NewTokensOrZero = restricted_number_type(None, int, [(">=", 0), ("<=", 1_000_000)])
Steps = restricted_number_type(None, int, [(">=", 1), ("<=", 10_000)])
Flips = restricted_number_type(None, int, [(">=", 0), ("<=", 1000)])
Rate = restricted_number_type(None, float, [(">", 0), ("<=", 1)])
Seed = restricted_number_type(None, int, [(">=", -(1 << 62)), ("<=", 1 << 62)])
VocabSize = restricted_number_type(None, int, [(">", len(RESERVED)), ("<=", 10_000_000)])
Decay = restricted_number_type(None, float, [(">=", 0), ("<", 1)])
Factor = restricted_number_type(None, float, [(">=", 0), ("<=", 1_000_000)])
Frequency = restricted_number_type(None, float, [(">=", 100), ("<=", 1_000_000)])
Weight = Minutes = restricted_number_type(None, float, [(">", 0), ("<=", 1_000_000)])
LengthRatio = restricted_number_type(None, float, [(">", 0), ("<=", 1_000_000)])


@dataclass
class DataOptions:
    """Reading and batching.

    Args:
        source_tokenizer: characters, white-space separated tokens, or byte-pair encoding trained on the training data;
            without effect on a source of features (--model.source_features).
        target_tokenizer: the same for the target side.
        vocab_size: largest vocabulary of each tokenizer, the 4 reserved ids included.
        shared_vocabulary: one tokenizer for both sides, as share_all_embeddings needs; both kinds must be equal.
        max_tokens: tokens in a batch of one process, padding included, counted on the longer side.
        valid_sentences: sources of the validation file that are decoded after each epoch, spread over the file.
        text_metrics: BLEU and chrF as well.
        metrics: values measured after each epoch, joined by commas, such as per,rouge; null for ser,per,exact and what
            text_metrics adds, and wer,cer with a source of features.
        max_length_ratio: a prediction has at most this many tokens for each source token, and 10 more; null for one and
            a half times what the training data needs, and for text at least 2. Features count after --model.frame_stack
            and --model.pyramid.
        tags: each source has tags, side information such as V;PST: lines source<TAB>tags<TAB>target.
        source_column, target_column, tag_column: of JSONL, CSV, Parquet and Arrow files.
        weights: how often an epoch takes each training file, such as [1, 0.5]; null for once.
        cache: folder for encoded training data, memory-mapped and shared by runs; null for RUN_DIR/cache if the
            training files have 64 MiB or more, and for memory if less.
        highest_frequency: of the log-mel spectrogram of audio files, in Hz; at most half their sampling rate.
    """

    source_tokenizer: Kind = "char"
    target_tokenizer: Kind = "whitespace"
    vocab_size: VocabSize = 8000
    shared_vocabulary: bool = False
    max_tokens: Count = 4096
    valid_sentences: Count = 1000
    text_metrics: bool = False
    metrics: str | None = None
    max_length_ratio: LengthRatio | None = None
    tags: bool = False
    source_column: str = "source"
    target_column: str = "target"
    tag_column: str = "tags"
    weights: list[Weight] | None = None
    cache: str | None = None
    highest_frequency: Frequency = 8000.0


@dataclass
class OptimOptions:
    """Loss, optimiser (AdamW) and learning rate.

    Args:
        lr: peak learning rate.
        beta2: decay of AdamW's second moment.
        weight_decay: decoupled weight decay.
        schedule: course of the learning rate over the whole run. A run that is resumed with more epochs goes on where
            the schedule of the longer run is by then.
        warmup: share of the run in which the learning rate rises.
        label_smoothing: probability spread evenly over the vocabulary.
        teacher_forcing_ratio: probability that a decoder step reads the right token instead of the predicted one.
        gradient_clip: largest norm of the gradient, 0 for no limit.
        ema: decay of the exponential moving average of the weights, such as 0.999. The average is evaluated and saved.
            0: none.
        adversarial: length of a perturbation of each source's embeddings towards a higher loss (Miyato et al. 2017), in
            mean lengths of an embedding; trains on the mean of the losses with and without it. 0: none.
        adversarial_form: "perturbation" adds it to the source, in a second pass (2.5 times the time of an update).
            "penalty" adds length times the norm of the loss's gradient by double backward, its first-order effect
            (Drucker & LeCun 1992; 5 times the time).
    """

    lr: Factor = 2e-3
    beta2: Decay = 0.98
    weight_decay: Factor = 0.01
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup: ClosedUnitInterval = 0.05
    label_smoothing: ClosedUnitInterval = 0.1
    teacher_forcing_ratio: ClosedUnitInterval = 1.0
    gradient_clip: Factor = 1.0
    ema: Decay = 0.0
    adversarial: Factor = 0.0
    adversarial_form: Literal["perturbation", "penalty"] = "perturbation"


@dataclass
class TrainerOptions:
    """Lightning's training loop.

    Args:
        max_epochs: passes over the training data.
        max_steps: updates after which training ends as well, at the next validation; null for no limit.
        max_minutes: minutes of training after which it ends as well, with a validation; each resume has as many anew;
            null for no limit.
        val_every: updates between two validations, each with its checkpoint, in place of one after each pass; the
            options that count epochs then count these, but for max_epochs.
        monitor: value that chooses the best checkpoint and stops early (a valid_ column of metrics.csv).
        patience: epochs without improvement before training stops, null for never.
        keep: weights of the last validations to keep beside best and last, for `fastseq average`.
        accumulate: batches of each process in one update.
        precision: 32-true, bf16-mixed, or another of Lightning's.
        accelerator: auto, cpu, cuda, or another of Lightning's.
        devices: processes on this machine, "auto" for all GPUs, one CPU process, or as torchrun says.
        threads: CPU threads of each process, at most the cores it may use; null for torch's default. Use 1 for small
            models on a shared machine: waiting for each other costs more than the threads gain.
        log_every: updates between two rows of the training loss; each epoch has at least one.
        progress_bar: on a terminal only.
    """

    max_epochs: Count = 20
    max_steps: Count | None = None
    max_minutes: Minutes | None = None
    val_every: Count | None = None
    monitor: str = "valid_loss"
    patience: CountOrZero | None = None
    keep: CountOrZero = 0
    accumulate: Count = 1
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str = "auto"
    threads: Threads | None = None
    log_every: Count = 20
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


def command_parser(name: str, description: str, example: str) -> ArgumentParser:
    """An empty parser of the command `fastseq name`; it raises ArgumentError, and reads YAML by `files.load_yaml`."""
    return ArgumentParser(
        prog=f"fastseq {name}",
        exit_on_error=False,
        parser_mode=YAML,
        description=description,
        epilog=f"Example: {example}",
    )


@functools.cache
def train_parser() -> ArgumentParser:
    """The options of `fastseq train`, and the meaning of a run folder's config.yaml."""
    parser = command_parser(
        "train", "Train a sequence-to-sequence model on a file of source<TAB>target lines.", EXAMPLE
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--train",
        type=list[str] | str | None,
        help="training file of source<TAB>target lines, or several: '[a.tsv, b.tsv]'; also .jsonl, .csv, .parquet, a "
        "folder of datasets' save_to_disk, and .gz or .zst of text files",
    )
    parser.add_argument(
        "--train_targets",
        type=list[str] | str | None,
        help="target file for each file of --train, which then holds sources alone",
    )
    parser.add_argument("--valid", type=str | None, help="validation file; lines with one source are alternatives")
    parser.add_argument("--valid_targets", type=str | None, help="target file of --valid")
    parser.add_argument("--run_dir", type=str | None, help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --run_dir holds")
    parser.add_argument(
        "--resume", type=str | None, help="run folder to continue from its last checkpoint; needs no --run_dir"
    )
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="run or saved model whose weights, tokenizers and model options the new run starts from",
    )
    parser.add_argument(
        "--grow_vocabulary",
        type=bool,
        default=False,
        help="with --init_from: add the tokens of the new training data to its vocabularies, up to data.vocab_size",
    )
    parser.add_argument(
        "--freeze",
        type=str | None,
        help="parts that are not trained, joined by commas: encoder, decoder, attention, bridge, output, embedding "
        "(or src_embedding, tgt_embedding)",
    )
    parser.add_argument("--profile", action="store_true", help="print where the time went, after each epoch")
    parser.add_argument("--seed", type=Seed, default=1, help="of weights, dropout and order")
    parser.add_class_arguments(DataOptions, "data")
    parser.add_class_arguments(Seq2SeqConfig, "model", skip=FROM_DATA)
    for name, side in zip(EMBEDDINGS, ("source", "target"), strict=True):
        parser.add_argument(
            f"--model.{name}",
            type=str | None,
            help=f"vectors that the {side} embedding starts from: lines of a token and its numbers, as word2vec and "
            "GloVe have them in text form, or a .npy matrix with a row for each token id",
        )
    parser.add_class_arguments(OptimOptions, "optim")
    parser.add_class_arguments(TrainerOptions, "trainer")
    parser.add_argument(
        "--reference_results", type=list[ReferenceResult], default=[], help="published results, printed by evaluate"
    )
    return parser


def underscored(argv: list[str]) -> list[str]:
    """Replace the dashes in the names of options: `--n-best=2` becomes `--n_best=2`."""

    def convert(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument

    return [convert(argument) for argument in argv]


def parsed(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """The options in `argv`; raises UserError with one sentence for a bad one."""
    try:
        return _without_nulls(parser.parse_args(underscored(argv)), parser)
    except argparse.ArgumentError as error:
        raise UserError(sentence(error, parser)) from error


def read_config(path: Path) -> Namespace:
    """The options of a run; raises UserError when its config.yaml is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a run folder: it has no {path.name}; make one with `fastseq train`")
    parser = train_parser()
    try:
        if path.stat().st_size > MAX_YAML:
            raise argparse.ArgumentError(None, f"it has more than {MAX_YAML:,} bytes")
        return _without_nulls(parser.parse_path(str(path)), parser)
    except argparse.ArgumentError as error:
        raise UserError(f"{path} is broken: {sentence(error, parser)}; mend it or train again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is broken: byte {error.start + 1} is not UTF-8; mend it or train again") from error


def _without_nulls(config: Namespace, parser: ArgumentParser) -> Namespace:
    """`config`; raises ArgumentError for a null, which jsonargparse accepts for any option, in place of a value."""
    required = parser.get_defaults()
    for name, value in config.items():
        if value is None and required.get(name) is not None:
            raise argparse.ArgumentError(None, f"--{name} must not be null")
    for result in config.get("reference_results") or ():
        if result.name is None or result.note is None:
            raise argparse.ArgumentError(None, "--reference_results: name and note must not be null")
    return config


def measured(config: Namespace) -> tuple[str, ...]:
    """The metrics of a run, by the names of ``fastseq.training.metrics.NAMES``. Raises UserError for an unknown one."""
    features = config.model.source_features is not None
    return chosen(config.data.metrics, "--data.metrics", text=config.data.text_metrics, rates=features)


def built_in_config(name: str) -> str:
    """Path of a configuration that comes with fastseq, such as "cmudict"; any other text is returned as it is."""
    path = resources.files("fastseq.training") / f"{name}.yaml"
    return str(path) if name.isidentifier() and path.is_file() and not Path(name).is_file() else name


def with_built_in_configs(argv: list[str]) -> list[str]:
    """`argv` with the path of each built-in configuration that `--config NAME` or `--config=NAME` names."""
    expanded = list(argv)
    for i, argument in enumerate(argv):
        option, equals, name = argument.partition("=")
        if option == "--config" and equals:
            expanded[i] = f"--config={built_in_config(name)}"
        elif i and argv[i - 1] == "--config":
            expanded[i] = built_in_config(argument)
    return expanded


def parse_train(argv: list[str]) -> Namespace:
    """The options of the command line, over the stored ones of the resumed run, if any.

    Raises UserError when a file or folder that training needs is not named, when the resumed run does not exist, and
    for options that are bad or contradict each other.
    """
    argv = with_built_in_configs(argv)
    config = parsed(train_parser(), argv)
    if config.resume is not None:
        config = _resumed(config, argv)
    if config.grow_vocabulary and config.init_from is None:
        raise UserError("--grow_vocabulary adds to the vocabularies of --init_from, which is missing; leave it out")
    for name in ("train", "valid", "run_dir"):
        if config[name] is None:
            raise UserError(f"--{name} is missing; example: {EXAMPLE}")
    return config


def _resumed(given: Namespace, argv: list[str]) -> Namespace:
    """The stored options of the resumed run, overridden by the command line."""
    if given.overwrite or given.run_dir not in (None, given.resume):
        raise UserError(
            f"--resume {given.resume} continues in that folder; leave out --run_dir and --overwrite, or --resume"
        )
    path = Path(given.resume) / "config.yaml"
    stored = read_config(path)
    config = parsed(train_parser(), ["--config", str(path), *argv])
    config.run_dir = config.resume
    _check_resumed(config, stored)
    return config


def _check_resumed(config: Namespace, stored: Namespace) -> None:
    """Raise UserError for a changed option on which the checkpoint depends; the others take effect."""
    for name, value in config.items():
        fixed = name in FIXED or name.partition(".")[0] in ("data", "model", "optim")
        if fixed and name != "data.cache" and value != stored[name]:
            raise UserError(
                f"--{name} is {stored[name]} in the run that is resumed and cannot change to {value}; "
                "leave it out, or start another run with another --run_dir"
            )


def options_of(config: Namespace, group: str, kind: type) -> object:
    """The group of options as its dataclass."""
    return kind(**{name: _plain(value) for name, value in vars(config[group]).items()})


def _plain(value: object) -> object:
    """Convert jsonargparse's restricted number to a plain one: a checkpoint can hold no other."""
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value
