"""A run folder: the files that training writes and the other commands read."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from jsonargparse import Namespace

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig
from fastseq.training.checkpoint import load_checkpoint, trained_model
from fastseq.training.features import Source, load_source, save_source, sizes
from fastseq.training.files import write_text
from fastseq.training.options import EMBEDDINGS, read_config, train_parser
from fastseq.training.tokenizer import BOS, EOS, PAD, UNK, TextTokenizer


class RunFolder:
    """Paths below a run folder.

    config.yaml, source_tokenizer.json (and source_tags.json, or source_features.json alone), target_tokenizer.json,
    checkpoints/best.ckpt and last.ckpt, metrics.csv, curves.png, tensorboard/; while a process trains, train.lock;
    after `fastseq evaluate`, evaluation.json, predictions.tsv and attention/*.png.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.source_tokenizer = self.path / "source_tokenizer.json"
        self.source_tags = self.path / "source_tags.json"
        self.source_features = self.path / "source_features.json"
        self.target_tokenizer = self.path / "target_tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.csv"
        self.curves = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"

    def check_free(self, *, overwrite: bool) -> None:
        """Raise UserError if the folder holds a run and `overwrite` does not allow to replace it."""
        if self.config.exists() and not overwrite:
            raise UserError(
                f"{self.path} holds a run already; choose another --run_dir, continue it with --resume {self.path}, "
                "or replace it with --overwrite"
            )

    def create(self, *, overwrite: bool) -> None:
        """Make the folder. An earlier run in it is removed with `overwrite`, and raises UserError without."""
        self.check_free(overwrite=overwrite)
        self.config.unlink(missing_ok=True)  # first: what is left without it is no run
        for folder in (self.checkpoints, self.tensorboard, self.path / "attention", self.path / "averaged"):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
        evaluation = self.path / "evaluation.json", self.path / "predictions.tsv"
        tokenizers = self.source_tokenizer, self.source_tags, self.source_features, self.target_tokenizer
        for file in (self.metrics, self.curves, *tokenizers, *evaluation):
            file.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True)

    def save_config(self, config: Namespace) -> None:
        """Write the options that a later command needs; config.yaml is complete at every moment."""
        kept = config.clone()
        for name in ("config", "resume", "overwrite", "profile"):
            kept.pop(name, None)
        write_text(self.config, train_parser().dump(kept))

    def load_config(self) -> Namespace:
        """The options of the run; raises UserError when the folder holds none."""
        return read_config(self.config)

    def save_tokenizers(self, source: Source, target: TextTokenizer) -> None:
        """Write what turns both sides into numbers."""
        save_source(source, self)
        target.save(self.target_tokenizer)

    def load_tokenizers(self) -> tuple[Source, TextTokenizer]:
        """Source and target tokenizer; the reader of features for a run with --model.source_features."""
        return load_source(self), TextTokenizer.load(self.target_tokenizer)

    def load_model(self, name: str = "best", device: str = "cpu") -> Seq2Seq:
        """The model with the weights of checkpoint `name` ("best" or "last") on `device`, in eval mode."""
        return self.load(name, device)[0]

    def load(self, name: str, device: str) -> tuple[Seq2Seq, tuple[Source, TextTokenizer], Namespace]:
        """As `load_model`, with the tokenizers and the options of the run."""
        place = pick_device(device)
        tokenizers, config = self.load_tokenizers(), self.load_config()
        path = self.checkpoints / f"{name}.ckpt"
        options = model_options(config, *sizes(tokenizers))
        model = on_device(trained_model(options, load_checkpoint(path), path), place).eval()
        return model, tokenizers, config


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one. Raises UserError when it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "meta":
            raise RuntimeError("its tensors hold no numbers")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without CUDA asserts
        reason = str(error).partition("\n")[0].partition(". ")[0][:200]
        raise UserError(f"--device {name} cannot be used here ({reason}); give cpu, cuda or auto") from error


def on_device(model: Seq2Seq, device: torch.device) -> Seq2Seq:
    """The model on `device`, after one step there; raises UserError when its backend cannot run on it."""
    token = torch.full((1, 1), EOS, device=device)
    features, source = model.config.source_features, token
    if model.config.copy:
        source = token[..., None].expand(-1, -1, 2)
    elif model.config.tag_vocab_size is not None:
        source = token[..., None]
    elif features:
        source = torch.zeros(1, 1, features, device=device)
    try:
        model.to(device)(source, None, token)
    except RuntimeError as error:
        raise UserError(f"--model.backend {model.config.backend} cannot run on {device}: {error}") from error
    return model


def model_options(config: Namespace, source_size: int, target_size: int, tags: int | None = None) -> Seq2SeqConfig:
    """The options of a model for vocabularies of these sizes; raises UserError when they contradict each other.

    `source_size` is the number of features with --model.source_features, `tags` the number of tags with --data.tags.
    """
    if config.data.tags != (tags is not None):
        raise UserError(
            f"data.tags is {str(config.data.tags).lower()}, the source of this run has {'no' if tags is None else ''} "
            "tags (source_tags.json)"
        )
    features = config.model.source_features
    if features is not None and features != source_size:
        raise UserError(f"model.source_features is {features}, the source of this run has {source_size}")
    try:
        return Seq2SeqConfig(
            **{name: value for name, value in vars(config.model).items() if name not in EMBEDDINGS},
            src_vocab_size=source_size if features is None else None,
            tgt_vocab_size=target_size,
            tag_vocab_size=tags,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
        )
    except ValueError as error:
        raise UserError(f"the model options do not work: {error}") from error
