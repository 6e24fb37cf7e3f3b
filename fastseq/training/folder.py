"""A run folder: what a training leaves behind and every other command reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from jsonargparse import Namespace

from fastseq.nn.seq2seq import Seq2Seq, Seq2SeqConfig
from fastseq.training.checkpoint import load_checkpoint, load_weights
from fastseq.training.errors import UserError
from fastseq.training.options import train_parser
from fastseq.training.tokenizer import BOS, EOS, PAD, UNK, TextTokenizer


class RunFolder:
    """Paths below a run folder.

    config.yaml, source_tokenizer.json, target_tokenizer.json, checkpoints/best.ckpt and last.ckpt, metrics.csv,
    curves.png, tensorboard/; after `fastseq evaluate` also evaluation.json, predictions.tsv and attention/*.png.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.source_tokenizer = self.path / "source_tokenizer.json"
        self.target_tokenizer = self.path / "target_tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.csv"
        self.curves = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"

    def create(self, *, overwrite: bool) -> None:
        """Make the folder; an earlier run in it is removed with `overwrite`, and is a UserError without."""
        if self.config.exists() and not overwrite:
            raise UserError(
                f"{self.path} holds a run already; choose another --run_dir, continue it with --resume {self.path}, "
                "or replace it with --overwrite"
            )
        for folder in (self.checkpoints, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.metrics, self.curves):
            file.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True)

    def load_config(self) -> Namespace:
        """The options of the run; raises UserError when the folder holds none."""
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml; make one with `fastseq train`")
        return train_parser().parse_path(str(self.config))

    def load_tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """Source and target tokenizer."""
        return TextTokenizer.load(self.source_tokenizer), TextTokenizer.load(self.target_tokenizer)

    def load_model(self, name: str = "best") -> Seq2Seq:
        """The model with the weights of checkpoint `name` ("best" or "last"), on the CPU, in eval mode."""
        source, target = self.load_tokenizers()
        model = build_model(self.load_config(), len(source), len(target))
        path = self.checkpoints / f"{name}.ckpt"
        load_weights(model, load_checkpoint(path), path)
        return model.eval()


def build_model(config: Namespace, source_size: int, target_size: int) -> Seq2Seq:
    """A fresh model for vocabularies of these sizes; raises UserError when the options contradict each other."""
    try:
        options = Seq2SeqConfig(
            **vars(config.model),
            src_vocab_size=source_size,
            tgt_vocab_size=target_size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
        )
    except ValueError as error:
        raise UserError(f"the model options do not work: {error}") from error
    return Seq2Seq(options)
