"""A saved model: a folder to share, without any pickle. Written by `TrainedModel.save_pretrained`."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import fastseq
from fastseq.errors import UserError
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training import generation_config
from fastseq.training.checkpoint import weighted_model
from fastseq.training.closed_json import check_values, read_object
from fastseq.training.features import Source, load_source, save_source, sizes
from fastseq.training.files import refuse_links, write_bytes, write_text
from fastseq.training.folder import RunFolder, on_device, pick_device
from fastseq.training.generation_config import read_search
from fastseq.training.model_card import Card, model_card
from fastseq.training.reading import as_list
from fastseq.training.tokenizer import BOS, EOS, PAD, UNK, TextTokenizer

MODEL_TYPE = "fastseq"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Keys of config.json beside the options of Seq2SeqConfig; what other libraries write there has no effect.
OTHER_KEYS = {"model_type": str, "fastseq_version": str, "transformers_version": str, "dtype": str, "torch_dtype": str}
RESERVED_IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK}


class SavedFolder:
    """Paths below a saved model's folder.

    model.safetensors, config.json, source_tokenizer.json (and source_tags.json, or source_features.json alone),
    target_tokenizer.json, generation_config.json, README.md.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.weights = self.path / "model.safetensors"
        self.config = self.path / "config.json"
        self.source_tokenizer = self.path / "source_tokenizer.json"
        self.source_tags = self.path / "source_tags.json"
        self.source_features = self.path / "source_features.json"
        self.target_tokenizer = self.path / "target_tokenizer.json"
        self.generation_config = self.path / generation_config.NAME
        self.card = self.path / "README.md"

    def load_tokenizers(self) -> tuple[Source, TextTokenizer]:
        """Source and target tokenizer; the reader of features for a model with source_features."""
        return load_source(self), TextTokenizer.load(self.target_tokenizer)

    def load_config(self) -> tuple[Seq2SeqConfig, Card]:
        """The model's options and the facts of its card; raises UserError for a wrong key, type or value."""
        stored = read_object(self.config)
        if stored.get("model_type") != MODEL_TYPE:
            given = str(stored.get("model_type"))[:100]
            raise UserError(f"{self.config} describes a model of type {given!r}; expected {MODEL_TYPE!r}")
        card = Card.from_dict(stored.pop("card", {}), f"{self.config}: card")
        stored.pop("architectures", None)
        options = typing.get_type_hints(Seq2SeqConfig)
        check_values(stored, options | OTHER_KEYS, str(self.config))
        try:
            config = Seq2SeqConfig(**{name: value for name, value in stored.items() if name in options})
        except (TypeError, ValueError) as error:  # TypeError: without tgt_vocab_size
            raise UserError(f"{self.config}: the model options do not work: {error}") from error
        ids = {name: getattr(config, name) for name in RESERVED_IDS}
        if ids != RESERVED_IDS:
            raise UserError(f"{self.config}: the reserved ids must be {RESERVED_IDS}, got {ids}")
        return config, card

    def load_model(self, device: str = "cpu") -> Seq2Seq:
        """The model on `device`, in eval mode; raises UserError for files that are damaged or do not fit each other."""
        return self.load(device)[0]

    def load(self, device: str) -> tuple[Seq2Seq, tuple[Source, TextTokenizer], Card]:
        """As `load_model`, with the tokenizers and the facts of the card."""
        place = pick_device(device)
        config, card = self.load_config()
        tokenizers = self.load_tokenizers()
        expected = config.src_vocab_size or config.source_features, config.tgt_vocab_size, config.tag_vocab_size
        found = sizes(tokenizers)
        if expected != found:
            raise UserError(
                f"{self.config} has vocabularies of {expected[0]} and {expected[1]} tokens and {expected[2] or 'no'} "
                f"tags, the files beside it have {found[0]}, {found[1]} and {found[2] or 'no'}; take all files from "
                "one save_pretrained"
            )
        weights = read_weights(self.weights, config)
        return on_device(weighted_model(config, weights, self.weights), place).eval(), tokenizers, card

    def save(
        self,
        model: Seq2Seq,
        tokenizers: tuple[Source, TextTokenizer],
        search: dict[str, Any],
        card: Card,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write all files, config.json last. Raises UserError for a run folder, a folder with links, another dtype."""
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if (self.path / "config.yaml").exists():
            raise UserError(f"{self.path} holds a run of `fastseq train`; choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links([self.path])
        self.config.unlink(missing_ok=True)
        weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
        write_weights(self.weights, weights, model.config)
        save_source(tokenizers[0], self)
        tokenizers[1].save(self.target_tokenizer)
        write_text(self.generation_config, json.dumps(search, indent=2) + "\n")
        write_text(self.card, model_card(card, model.config))
        described = {"model_type": MODEL_TYPE, "fastseq_version": fastseq.__version__} | model.config.to_dict()
        write_text(self.config, json.dumps(described | {"card": card.to_dict()}, indent=2) + "\n")


def read_weights(path: Path, config: Seq2SeqConfig) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, a tied matrix under each of its names; UserError for a damaged file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder written by save_pretrained, or a run folder")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file or is damaged: {str(error)[:200]}") from error
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{path}: {name[:100]} has dtype {tensor.dtype}; expected floating point")
    for name, origin in tied_names(config).items():
        if origin in weights:
            weights.setdefault(name, weights[origin])
    return weights


def write_weights(path: Path, weights: dict[str, torch.Tensor], config: Seq2SeqConfig) -> None:
    """Write the state_dict of a model, a tied matrix once; the file is complete at every moment."""
    tied = tied_names(config)
    tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items() if name not in tied}
    write_bytes(path, save(tensors, metadata={"format": "pt"}))


def kept_weights(checkpoints: Path) -> list[Path]:
    """The files weights-UPDATE.safetensors that --trainer.keep leaves, the oldest first."""
    return sorted(checkpoints.glob("weights-*.safetensors"))


def tied_names(config: Seq2SeqConfig) -> dict[str, str]:
    """Name of each parameter that is another one of the model: its name, and the name under which it is saved."""
    names = {"decoder.output.weight": "decoder.embedding.weight"} if config.tied else {}
    if config.share_all_embeddings:
        names["encoder.embedding.weight"] = "decoder.embedding.weight"
    return names


def is_saved(path: str | Path) -> bool:
    """True for the folder of a saved model, also where a run lies in it."""
    folder = SavedFolder(path)
    return folder.config.exists() or folder.weights.exists()


class Loaded(typing.NamedTuple):
    """The content of a run folder or of a saved model's folder."""

    model: Seq2Seq
    tokenizers: tuple[Source, TextTokenizer]
    search: dict[str, Any]  # options of Seq2Seq.generate
    card: Card
    evaluation: Path | None  # where `fastseq evaluate` leaves its metrics, for the card


def load_folder(path: str | Path, checkpoint: str | None, device: str) -> Loaded:
    """Read a saved model's folder or a run folder; raises UserError for another folder, and for damaged files.

    Where model.safetensors or config.json lies in the folder, no checkpoint is read. `checkpoint`: "best" or "last" of
    a run folder, None for best.
    """
    saved, run = SavedFolder(path), RunFolder(path)
    if is_saved(path):
        if checkpoint is not None:
            raise UserError(f"{path} is a saved model, which has no checkpoint {checkpoint}; leave --checkpoint out")
        model, tokenizers, card = saved.load(device)
        return Loaded(model, tokenizers, read_search(saved.path), card, None)
    if not run.config.exists():
        raise UserError(
            f"{path} is neither a run folder (it has no config.yaml) nor a saved model (no config.json); "
            "make one with `fastseq train`"
        )
    model, tokenizers, config = run.load(checkpoint or "best", device)
    search = {} if config.data.max_length_ratio is None else {"max_length_ratio": float(config.data.max_length_ratio)}
    card = Card(data=", ".join(Path(path).name for path in as_list(config.train)) or None)
    return Loaded(model, tokenizers, search | read_search(run.path), card, run.path / "evaluation.json")
