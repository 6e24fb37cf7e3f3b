"""JoeyNMT: checkpoints of recurrent models, with the config.yaml and the vocabularies of their model folder.

The decoder's h and c both start from the top layer's h of the encoder, and every layer starts alike.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml

from fastseq.convert.checkpoint import expect, load, tensors
from fastseq.convert.parts import Affine, Parts, Weights, attention_score
from fastseq.convert.port import Given, Port
from fastseq.convert.tables import TABLES
from fastseq.convert.vocabulary import Vocabulary, read_lines
from fastseq.errors import UserError
from fastseq.training.files import MAX_YAML, load_yaml, read_text

RESERVED = ("<pad>", "<s>", "</s>", "<unk>")
EXPECTED = {"type": ("recurrent",), "rnn_type": ("lstm",)}
ENCODER = {"embeddings", "hidden_size", "bidirectional", "num_layers", "dropout", "emb_dropout", "freeze", *EXPECTED}
DECODER = ENCODER - {"bidirectional"} | {"hidden_dropout", "input_feeding", "init_hidden", "attention"}
SPACE = "\u2581"  # the space of a vocabulary of characters


def read(path: Path, given: Given) -> Port:
    """The port of a checkpoint; config.yaml, src_vocab.txt and trg_vocab.txt lie beside it unless given."""
    config = _config(given.config or path.parent / "config.yaml")
    model = config["model"]
    for side, known in (("encoder", ENCODER), ("decoder", DECODER)):
        unknown = sorted(set(model[side]) - known)
        if unknown:
            raise UserError(f"joeynmt: the {side} has options that fastseq does not know: {', '.join(unknown)}")
        expect("joeynmt", {"type": "recurrent", "rnn_type": "gru"} | model[side], EXPECTED)
    characters = config.get("data", {}).get("src", {}).get("level") == "char"
    kind = given.tokenizer or ("char" if characters else "whitespace")
    source = _vocabulary(given.source or path.parent / "src_vocab.txt", "source", kind == "char")
    target = _vocabulary(given.target or path.parent / "trg_vocab.txt", "target", kind == "char")
    named = tensors("joeynmt", load("joeynmt", path), "model_state")
    return Port(_parts(model, Weights("joeynmt", named, TABLES["joeynmt"])), source, target, kind)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"joeynmt: {path} is missing; give the model's config.yaml as --config")
    try:
        config = load_yaml(read_text(path, MAX_YAML))
        if all(isinstance(config["model"][side], dict) for side in ("encoder", "decoder")):
            return config
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"joeynmt: {path} is no configuration of a model: {str(error)[:200]}") from error
    raise UserError(f"joeynmt: {path} is no configuration of a model")


def _vocabulary(path: Path, side: str, characters: bool) -> Vocabulary:
    if not path.is_file():
        raise UserError(f"joeynmt: {path} is missing; give the {side} vocabulary as --{side}-vocab")
    tokens = [" " if characters and token == SPACE else token for token in read_lines(path)]
    return Vocabulary(tokens, *(token if token in tokens else None for token in RESERVED))


def _parts(model: dict[str, Any], weights: Weights) -> Parts:
    below, above = model["encoder"], model["decoder"]
    expect("joeynmt", below, {"bidirectional": (True,)})
    source = weights.take("encoder.embedding.weight", None, None)
    target = source if model.get("tied_embeddings") else weights.take("decoder.embedding.weight", None, None)
    if model.get("tied_embeddings"):
        weights.drop("decoder.embedding.weight")
    layers = above.get("num_layers", 1)
    encoder = weights.stack("encoder.lstm", below.get("num_layers", 1), 2, source.size(1))
    width, units = 2 * encoder[0][0].weight_hh.size(1), above["hidden_size"]
    feed = units if above.get("input_feeding", True) else 0
    decoder = [row[0] for row in weights.stack("decoder.lstm", layers, 1, target.size(1) + feed, units)]
    joined = weights.take("decoder.combine.weight", units, units + width)  # reads [query, context]
    attention = attention_score("joeynmt", above.get("attention", "bahdanau"))
    additive = attention == "additive"
    key = weights.take("decoder.attention.key_proj.weight", units, width)
    query = Affine(weights.take("decoder.attention.query_proj.weight", units, units)) if additive else None
    score = weights.take("decoder.attention.v", 1, units)[0] if additive else None
    output = weights.take("decoder.output.weight", len(target), units)
    bridge, options = _start(weights, above.get("init_hidden", "bridge"), len(encoder), layers, width, units)
    bias = weights.take("decoder.combine.bias", units)
    weights.finish()
    scales = [bool(side.get("embeddings", {}).get("scale")) for side in (below, above)]
    notes = _notes(model, any(scales))
    tied = bool(model.get("tied_softmax")) and not any(scales)
    return Parts(
        source * math.sqrt(source.size(1)) if scales[0] else source,
        target * math.sqrt(target.size(1)) if scales[1] else target,
        encoder,
        decoder,
        Affine(output),
        attention=attention,
        query=query,
        key=key,
        score=score,
        combine=Affine(torch.cat((joined[:, units:], joined[:, :units]), 1), bias),
        bridge=bridge,
        options={
            **options,
            "combine_bias": True,
            "dropout": float(above.get("dropout", 0.0)),
            "share_decoder_input_output_embed": tied,
            "share_all_embeddings": tied and bool(model.get("tied_embeddings")),
        },
        notes=notes,
    )


def _start(
    weights: Weights, kind: str, below: int, above: int, width: int, units: int
) -> tuple[tuple[Affine, ...] | None, dict[str, Any]]:
    """The map from the encoder's final h, (below * width), to the first h and c of every layer, (above * units)."""
    expect("joeynmt", {"init_hidden": kind}, {"init_hidden": ("bridge", "last", "zero")})
    if kind == "zero":
        return None, {"bridge": "zeros"}
    if kind == "bridge":
        weight, bias = weights.take("bridge.h_proj.weight", units, width), weights.take("bridge.h_proj.bias", units)
    else:
        weight, bias = torch.eye(units, width), torch.zeros(units)  # the forward direction alone, if both are wider
        if width not in (units, 2 * units):
            raise UserError(
                f"joeynmt: init_hidden='last' needs an encoder of {units} or {2 * units} units, got {width}"
            )
    columns = torch.cat((weight.new_zeros(units, (below - 1) * width), weight), 1)
    return (Affine(columns.repeat(above, 1), bias.repeat(above)),), {
        "bridge": "linear_h",
        "bridge_activation": "tanh" if kind == "bridge" else "none",
    }


def _notes(model: dict[str, Any], scaled: bool) -> list[str]:
    notes = []
    if scaled:
        notes.append("the factor sqrt(embedding_dim) is multiplied into the embeddings, which share no matrix any more")
    if model.get("tied_embeddings") and not model.get("tied_softmax"):
        notes.append("source and target embeddings were one matrix and are trained as two from now on")
    if model["decoder"].get("hidden_dropout"):
        notes.append("hidden_dropout acts before the attentional vector, where fastseq has no dropout")
    if model["decoder"].get("num_layers", 1) > 1 and model["decoder"].get("init_hidden", "bridge") == "bridge":
        notes.append("the bridge has a map for each decoder layer from now on; they are equal at first")
    return notes
