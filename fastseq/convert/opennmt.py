"""OpenNMT-py 3: checkpoints of RNN encoder-decoders (``encoder_type`` rnn or brnn, ``rnn_type`` LSTM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastseq.convert.checkpoint import expect, load, options, tensors
from fastseq.convert.parts import Affine, Parts, Weights, attention_score
from fastseq.convert.port import Given, Port
from fastseq.convert.tables import TABLES
from fastseq.convert.vocabulary import Vocabulary
from fastseq.errors import UserError

RESERVED = ("<blank>", "<s>", "</s>", "<unk>")
EXPECTED = {  # of the options; an absent one has the first value
    "model_type": ("text",),
    "model_task": ("seq2seq",),
    "encoder_type": ("brnn", "rnn"),
    "decoder_type": ("rnn",),
    "rnn_type": ("LSTM",),
    "global_attention_function": ("softmax",),
    "generator_function": ("softmax",),
    "context_gate": (None,),
    "copy_attn": (False,),
    "coverage_attn": (False,),
    "position_encoding": (False,),
    "n_src_feats": (0,),
    "lora_layers": ([],),
    "quant_layers": ([],),
}


def read(path: Path, given: Given) -> Port:
    """The port of a checkpoint of OpenNMT-py 3, which holds its vocabularies."""
    if given.source or given.target:
        raise UserError("opennmt: the checkpoint holds its vocabularies; leave out --source-vocab and --target-vocab")
    checkpoint = load("opennmt", path)
    found = options("opennmt", checkpoint.get("opt"), "opt")
    expect("opennmt", found, EXPECTED)
    stored = options("opennmt", checkpoint.get("vocab"), "vocab")
    source, target = (_vocabulary(stored, side) for side in ("src", "tgt"))
    parts = _parts(found, checkpoint)
    start = stored.get("decoder_start_token", "<s>")
    if start != "<s>":
        parts.start = start
    return Port(parts, source, target, given.tokenizer or "whitespace")


def _vocabulary(stored: dict[str, Any], side: str) -> Vocabulary:
    tokens = stored.get(side)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"opennmt: vocab[{side!r}] must be a list of tokens, as OpenNMT-py 3 writes it")
    return Vocabulary(tokens, *(token if token in tokens else None for token in RESERVED))


def _parts(found: dict[str, Any], checkpoint: dict[str, Any]) -> Parts:
    named = tensors("opennmt", checkpoint, "model")
    named |= {f"generator.{name}": tensor for name, tensor in tensors("opennmt", checkpoint, "generator").items()}
    weights = Weights("opennmt", named, TABLES["opennmt"])
    source = weights.take("encoder.embedding.weight", None, None)
    target = weights.take("decoder.embedding.weight", None, None)
    directions = 2 if found.get("encoder_type", "brnn") == "brnn" else 1
    encoder = weights.stack("encoder.lstm", found["enc_layers"], directions, source.size(1))
    units = directions * encoder[0][0].weight_hh.size(1)
    feed = units if found.get("input_feed", 1) else 0
    decoder = [row[0] for row in weights.stack("decoder.lstm", found["dec_layers"], 1, target.size(1) + feed, units)]
    bridge = _bridge(weights, found["enc_layers"], directions, units) if found.get("bridge") else None
    attention = attention_score("opennmt", str(found.get("global_attention", "general")))
    options: dict[str, Any] = {
        "share_all_embeddings": bool(found.get("share_embeddings") and found.get("share_decoder_embeddings")),
        "share_decoder_input_output_embed": bool(found.get("share_decoder_embeddings")),
        "dropout": _dropout(found),
    }
    additive = attention == "additive"
    if additive:
        options |= {"combine_bias": True, "combine_activation": "none"}
    if bridge:
        options["bridge_activation"] = "relu"
    key = None if attention == "dot" else weights.take("decoder.attention.key_proj.weight", units, units)
    query = (
        [weights.take(f"decoder.attention.query_proj.{name}", *[units] * n) for name, n in QUERY] if additive else []
    )
    notes = []
    if found.get("share_embeddings") and not found.get("share_decoder_embeddings"):
        notes.append("source and target embeddings were one matrix and are trained as two from now on")
    parts = Parts(
        source,
        target,
        encoder,
        decoder,
        Affine(
            weights.take("decoder.output.weight", len(target), units), weights.take("decoder.output.bias", len(target))
        ),
        attention=attention,
        query=Affine(*query) if additive else None,
        key=key.t() if attention == "general" else key,
        score=weights.take("decoder.attention.v", 1, units)[0] if additive else None,
        combine=Affine(
            weights.take("decoder.combine.weight", units, 2 * units),
            weights.take("decoder.combine.bias", units) if additive else None,
        ),
        bridge=bridge,
        options=options,
        closed=False,
        notes=notes,
    )
    weights.finish()
    return parts


QUERY = (("weight", 2), ("bias", 1))


def _bridge(weights: Weights, layers: int, directions: int, units: int) -> tuple[Affine, Affine]:
    """OpenNMT cuts the states of all layers and directions into one piece a direction, and maps each piece alike."""
    size = units // directions * layers
    maps = []
    for name in ("h_proj", "c_proj"):
        weight, bias = weights.take(f"bridge.{name}.weight", size, size), weights.take(f"bridge.{name}.bias", size)
        maps.append(Affine(torch.block_diag(*[weight] * directions), bias.repeat(directions)))
    return tuple(maps)


def _dropout(found: dict[str, Any]) -> float:
    dropout = found.get("dropout", 0.0)
    return float(dropout[0] if isinstance(dropout, list) else dropout)
