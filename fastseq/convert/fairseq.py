"""fairseq: checkpoints of the architecture ``lstm`` and its presets.

Input feeding is always on, attention is general without a bias, each side has its own widths, and an additional layer
lies before the output where the sizes differ: it is multiplied into the output.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

from fastseq.convert.checkpoint import expect, load, options, tensors
from fastseq.convert.parts import Affine, Parts, Weights, attention_score
from fastseq.convert.port import Given, Port
from fastseq.convert.tables import TABLES, Row
from fastseq.convert.vocabulary import Vocabulary, read_lines
from fastseq.errors import UserError

RESERVED = ("<s>", "<pad>", "</s>", "<unk>")  # the first ids of each dictionary
OVERWRITE = " #fairseq:overwrite"
ADDITIONAL = (  # multiplied into the output
    Row("additional weight", "decoder.additional_fc.weight"),
    Row("additional bias", "decoder.additional_fc.bias"),
)
DROPOUTS = ("encoder_dropout_in", "encoder_dropout_out", "decoder_dropout_in", "decoder_dropout_out")
KNOWN = {  # options of the model; all others of its two sides are refused
    *DROPOUTS,
    *(f"{side}_{what}" for side in ("encoder", "decoder") for what in ("embed_dim", "embed_path", "freeze_embed")),
    *(f"{side}_{what}" for side in ("encoder", "decoder") for what in ("hidden_size", "layers")),
    *("encoder_bidirectional", "decoder_attention", "decoder_out_embed_dim"),
}


def read(path: Path, given: Given) -> Port:
    """The port of a fairseq checkpoint and its dictionaries, dict.LANGUAGE.txt beside it unless given."""
    checkpoint = load("fairseq", path)
    config = checkpoint.get("cfg") or {}
    found = options("fairseq", checkpoint.get("args") or config.get("model"), "args or cfg.model")
    arch = str(found.get("arch") or found.get("_name"))
    if arch.split("_")[0] != "lstm" or arch == "lstm_lm":
        raise UserError(f"fairseq: the architecture is {arch!r}; expected 'lstm' or a preset of it")
    unknown = [
        name for name in found if name.startswith(("encoder_", "decoder_")) and name not in KNOWN and found[name]
    ]
    if unknown:
        raise UserError(f"fairseq: the model has options that fastseq does not know: {', '.join(sorted(unknown))}")
    task = options("fairseq", config["task"], "cfg.task") if "task" in config else found
    source = _dictionary(path, given.source, task.get("source_lang"), "source")
    target = _dictionary(path, given.target, task.get("target_lang"), "target")
    return Port(_parts(found, checkpoint), source, target, given.tokenizer or "whitespace")


def _parts(found: dict[str, Any], checkpoint: dict[str, Any]) -> Parts:
    attends = bool(ast.literal_eval(str(found.get("decoder_attention", "1"))))
    if not attends:
        raise UserError(
            "fairseq: decoder_attention=False feeds h to the next step, which fastseq has with attention alone"
        )
    weights = Weights("fairseq", tensors("fairseq", checkpoint, "model"), TABLES["fairseq"] + ADDITIONAL)
    layers, directions = found.get("encoder_layers", 1), 2 if found.get("encoder_bidirectional") else 1
    expect("fairseq", found, {"decoder_layers": (layers,)})
    source = weights.take("encoder.embedding.weight", None, None)
    target = weights.take("decoder.embedding.weight", None, None)
    encoder = weights.stack("encoder.lstm", layers, directions, source.size(1))
    width = directions * encoder[0][0].weight_hh.size(1)
    units = weights.take("decoder.lstm.weight_hh_l{k}", None, None, k=0, keep=True).size(1)
    decoder = [row[0] for row in weights.stack("decoder.lstm", layers, 1, target.size(1) + units, units)]
    key = weights.take("decoder.attention.key_proj.weight", width, units).t()
    combine = Affine(weights.take("decoder.combine.weight", units, width + units))
    bridge = None
    if width != units:
        bridge = tuple(
            Affine(
                torch.block_diag(*[weights.take(f"bridge.{name}.weight", units, width)] * layers),
                weights.take(f"bridge.{name}.bias", units).repeat(layers),
            )
            for name in ("h_proj", "c_proj")
        )
    shared = {name: bool(found.get(name)) for name in ("share_all_embeddings", "share_decoder_input_output_embed")}
    output, notes = _output(weights, shared, target, units)
    weights.finish()
    dropouts = {name: float(found.get(name, found.get("dropout", 0.1))) for name in DROPOUTS}
    return Parts(
        source,
        target,
        encoder,
        decoder,
        output,
        attention=attention_score("fairseq", "decoder_attention=True"),
        key=key,
        combine=combine,
        bridge=bridge,
        options={
            **({"bridge_activation": "none"} if bridge else {}),
            **shared,
            "dropout": max(dropouts["encoder_dropout_out"], dropouts["decoder_dropout_out"]),
            "embed_dropout": max(dropouts["encoder_dropout_in"], dropouts["decoder_dropout_in"]),
        },
        start="</s>",
        notes=notes,
    )


def _output(weights: Weights, shared: dict[str, bool], target: torch.Tensor, units: int) -> tuple[Affine, list[str]]:
    """The map from attentional vectors to logits; ``shared`` loses a tie that an additional layer breaks."""
    additional = None
    if ADDITIONAL[0].ours in weights:
        additional = Affine(weights.take(ADDITIONAL[0].ours, None, units), weights.take(ADDITIONAL[1].ours, None))
    if any(shared.values()):
        output = Affine(target)
    else:
        width = units if additional is None else len(additional.weight)
        output = Affine(
            weights.take("decoder.output.weight", None, width), weights.take("decoder.output.bias", len(target))
        )
    if additional is None:
        return output, []
    bias = output.weight @ additional.bias
    folded = Affine(output.weight @ additional.weight, bias if output.bias is None else bias + output.bias)
    notes = ["additional_fc is multiplied into the output, which is trained as one matrix from now on"]
    if any(shared.values()):
        notes.append("so the output no longer shares the matrix of the embeddings")
    shared.update(dict.fromkeys(shared, False))
    return folded, notes


def _dictionary(path: Path, given: Path | None, language: str | None, side: str) -> Vocabulary:
    file = given or path.parent / f"dict.{language}.txt"
    if not file.is_file():
        raise UserError(f"fairseq: the dictionary {file} is missing; give the {side} dictionary as --{side}-vocab")
    words = []
    for number, line in enumerate(read_lines(file), 1):
        word, space, count = line.removesuffix(OVERWRITE).rpartition(" ")
        if not space or not count.isdigit():
            raise UserError(f"fairseq: {file}: line {number} must be a token and its count, got {line[:80]!r}")
        words.append(word)
    start, pad, end, unknown = RESERVED
    return Vocabulary([*RESERVED, *words], pad, start, end, unknown)
