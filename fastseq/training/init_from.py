"""Starts a run from a trained model: its weights, tokenizers and model options; and freezes parts of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastseq.errors import UserError, did_you_mean
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.features import Features, Source, sizes
from fastseq.training.folder import RunFolder, model_options
from fastseq.training.options import EMBEDDINGS, parsed, train_parser, with_built_in_configs
from fastseq.training.saved import SavedFolder, is_saved
from fastseq.training.tagged import Tagged, tags_of, text_side, texts_of
from fastseq.training.tokenizer import TextTokenizer

FREE = ("dropout", "embed_dropout", "output_dropout", "backend", "coverage_loss")  # the weights do not depend on them
ADDED = "model.coverage"  # its one weight may start from its initial value, as in See et al. 2017
PARTS = {
    "encoder": ("encoder.lstm", "encoder.upper"),
    "decoder": ("decoder.lstm", "decoder.combine", "decoder.copy_gate"),
    "attention": ("decoder.attention",),
    "bridge": ("bridge",),
    "output": ("decoder.output",),
    "embedding": ("encoder.embedding", "encoder.tag_embedding", "decoder.embedding"),
    "src_embedding": ("encoder.embedding", "encoder.tag_embedding"),
    "tgt_embedding": ("decoder.embedding",),
}


def inherited(config: Namespace, argv: list[str]) -> Namespace:
    """The options of `argv` over the model options and kinds of tokenizers of --init_from.

    Raises UserError for a folder without a model, and for an option that the weights or tokenizers do not allow.
    """
    options, tokenizers = _description(config.init_from)
    fixed = {f"model.{name}": getattr(options, name) for name in vars(config.model) if name not in EMBEDDINGS}
    source, target = tokenizers
    fixed |= {"data.target_tokenizer": target.kind, "data.shared_vocabulary": text_side(source) == target}
    fixed["data.tags"] = isinstance(source, Tagged)
    if isinstance(source, Features):
        fixed["data.highest_frequency"] = source.highest_frequency
    else:
        fixed["data.source_tokenizer"] = source.kind
    base = [f"--{name}={_text(value)}" for name, value in fixed.items()]
    config = parsed(train_parser(), [*base, *with_built_in_configs(argv)])
    for name, value in fixed.items():
        if name == ADDED and config[name]:
            continue
        if config[name] != value and name.removeprefix("model.") not in FREE:
            raise UserError(
                f"--{name} is {_text(value)} in {config.init_from}, from which the training starts, and cannot change "
                f"to {_text(config[name])}; leave it out"
            )
    return config


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _description(path: str | Path) -> tuple[Seq2SeqConfig, tuple[Source, TextTokenizer]]:
    """The model options and tokenizers of a run or a saved model, without its weights."""
    if is_saved(path):
        saved = SavedFolder(path)
        return saved.load_config()[0], saved.load_tokenizers()
    run = RunFolder(path)
    config, tokenizers = run.load_config(), run.load_tokenizers()
    return model_options(config, *sizes(tokenizers)), tokenizers


def take_over(model: Seq2Seq, start: Seq2Seq) -> Seq2Seq:
    """`model` with the weights of `start`. Rows of tokens that `start` does not have stay as they are."""
    weights = model.state_dict()
    for name, tensor in start.state_dict().items():
        weights[name][tuple(slice(size) for size in tensor.shape)] = tensor
    return model


def freeze(model: Seq2Seq, names: str | None) -> Seq2Seq:
    """`model`, whose parts `names` (joined by commas) get no gradients; raises UserError for an unknown part.

    A matrix that two parts share is frozen with either of them.
    """
    for name in [] if names is None else names.split(","):
        if name not in PARTS:
            raise UserError(f"--freeze: unknown part {name!r}{did_you_mean(name, PARTS)}; known are {', '.join(PARTS)}")
        chosen = [
            parameter
            for full, parameter in model.named_parameters(remove_duplicate=False)
            if full.startswith(tuple(f"{part}." for part in PARTS[name]))
        ]
        if not chosen:
            raise UserError(f"--freeze {name}: this model has no weights there; leave it out")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {names} leaves nothing to train; leave a part out")
    return model


def grown(
    tokenizers: tuple[Source, TextTokenizer],
    sides: tuple[Iterable[str], Iterable[str]],
    vocab_size: int,
) -> tuple[Source, TextTokenizer]:
    """Both tokenizers with the new tokens of their side's lines behind their own, up to `vocab_size` ids each."""
    source, target = tokenizers
    if isinstance(source, Features):
        return source, target.grown(sides[1], vocab_size)
    if isinstance(source, Tagged):
        lines = list(sides[0])
        text, target = grown((source.text, target), (texts_of(lines), sides[1]), vocab_size)
        return Tagged(text, source.tags.grown(tags_of(lines), vocab_size)), target
    if source == target:
        shared = source.grown([*sides[0], *sides[1]], vocab_size)
        return shared, shared
    return source.grown(sides[0], vocab_size), target.grown(sides[1], vocab_size)
