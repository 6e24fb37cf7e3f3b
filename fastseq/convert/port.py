"""A port: the parts and vocabularies read from a checkpoint, as a TrainedModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastseq.convert.parts import Parts, assemble
from fastseq.convert.vocabulary import Vocabulary
from fastseq.errors import UserError
from fastseq.training.tokenizer import Kind
from fastseq.training.trained import TrainedModel


@dataclass(frozen=True)
class Given:
    """The facts that the caller adds to a checkpoint; None: the port finds them itself, or refuses."""

    source: Path | None = None  # file of the source vocabulary
    target: Path | None = None
    config: Path | None = None  # file of the model's options
    reserved: Mapping[str, str] = field(default_factory=dict)  # names of "pad", "bos", "eos", "unk"
    tokenizer: Kind | None = None
    padding: tuple[int, str] | None = None  # length and token, of a model that reads the padding of the sources


@dataclass(frozen=True)
class Port:
    """The results of reading a checkpoint."""

    parts: Parts
    source: Vocabulary
    target: Vocabulary
    tokenizer: Kind
    padding: tuple[int, str] | None = None

    def trained(self) -> TrainedModel:
        """The model with its tokenizers, on the CPU."""
        try:
            model = assemble(self.parts, self.source, self.target)
        except ValueError as error:  # of Seq2SeqConfig
            raise UserError(f"the model has no equal in fastseq: {error}") from error
        source = self.source.tokenizer(self.tokenizer, closed=self.parts.closed, padding=self.padding)
        return TrainedModel(model, source, self.target.tokenizer(self.tokenizer))
