"""An encoder-decoder in torch's layout, whatever its sizes, and its assembly into the weights of a Seq2Seq.

fastseq has one embedding size for source and target and one width for encoder and decoder. A smaller matrix is filled
up with zeros. The added units stay 0 in every forward and their weights get zero gradients, so results and training
are the ones of the smaller model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.convert.tables import ATTENTIONS, Row
from fastseq.convert.vocabulary import MISSING, Vocabulary
from fastseq.errors import UserError, did_you_mean
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig
from fastseq.training.tokenizer import BOS, EOS, PAD, UNK

MARGIN = 30.0  # logarithm: a token that the checkpoint lacks is e**-30 times as likely as any other, at most


class Layer(NamedTuple):
    """One direction of one LSTM layer, gates i, f, g, o; hidden size N."""

    weight_ih: Tensor  # (4N, I)
    weight_hh: Tensor  # (4N, N)
    bias_ih: Tensor  # (4N,)
    bias_hh: Tensor | None  # (4N,); None for a library with a single bias


class Affine(NamedTuple):
    """weight @ x + bias."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)


@dataclass
class Parts:
    """A model of another library: C is the width of its encoder outputs, N the width of its decoder."""

    source_embedding: Tensor  # (V, E), rows in the order of the checkpoint
    target_embedding: Tensor  # (W, F)
    encoder: list[list[Layer]]  # by layer and direction
    decoder: list[Layer]  # the first reads [embedding] or [embedding, feed]
    output: Affine  # (W, N)
    attention: str = "none"
    query: Affine | None = None  # (A, N), additive
    key: Tensor | None = None  # general: (N, C) in query @ key @ memory; additive: (A, C)
    score: Tensor | None = None  # (A,), additive
    combine: Affine | None = None  # (N, C + N), reads [context, query]
    bridge: tuple[Affine, ...] | None = None  # (L * N, M * C) for h and c, or for both; None: layer by layer
    options: dict[str, Any] = field(default_factory=dict)  # further options of Seq2SeqConfig
    start: str | None = None  # the token that the decoder reads first, if not bos
    closed: bool = True  # sources end with eos
    notes: list[str] = field(default_factory=list)  # sentences about parts that matter in training alone


class Weights:
    """The named tensors of a checkpoint: each is taken once, by its row of the table, with the expected shape."""

    def __init__(self, source: str, tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> None:
        self.source = source
        self._left = dict(tensors)
        self._names = {row.ours: row.theirs for row in rows}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise UserError(f"{source}: {name} is no tensor of floating-point numbers")

    def __contains__(self, ours: str) -> bool:
        return self._name(ours) in self._left

    def _name(self, ours: str, **place: Any) -> str:
        """The name of the row ``ours`` in the checkpoint: the first alternative that it has."""
        names = [name.format(**place) for name in self._names[ours].split(" or ")]
        return next((name for name in names if name in self._left), names[0])

    def drop(self, ours: str) -> None:
        """Leave out a tensor that equals another one, which the model shares."""
        self._left.pop(self._name(ours), None)

    def take(self, ours: str, *shape: int | None, keep: bool = False, **place: Any) -> Tensor:
        """The tensor of the row ``ours``, float32.

        Args:
            ours: the name in fastseq, a row of the table.
            shape: the expected sizes; None is any.
            keep: it will be taken again.
            place: fills in the name: layer k, direction d.
        """
        name = self._name(ours, **place)
        if name not in self._left:
            raise UserError(
                f"{self.source}: the checkpoint has no tensor {name}{did_you_mean(name, self._left)}; expected it for "
                f"{ours.format(**place)}"
            )
        tensor = self._left[name] if keep else self._left.pop(name)
        fits = len(shape) == tensor.dim() and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(f"{self.source}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
        return tensor.detach().float()

    def stack(
        self, ours: str, layers: int, directions: int, inputs: int, units: int | None = None
    ) -> list[list[Layer]]:
        """The layers of the LSTM ``ours``, by layer and direction; ``units`` None is any size."""
        found = []
        for k in range(layers):
            row = []
            for d in ("", "_reverse")[:directions]:
                place = {"k": k, "d": d} if ours == "encoder.lstm" else {"k": k}
                suffix = "_l{k}{d}" if ours == "encoder.lstm" else "_l{k}"
                weight_hh = self.take(f"{ours}.weight_hh{suffix}", None, units, **place)
                units = weight_hh.size(1)
                weight_ih = self.take(f"{ours}.weight_ih{suffix}", 4 * units, inputs, **place)
                biases = [self.take(f"{ours}.bias_{n}{suffix}", 4 * units, **place) for n in ("ih", "hh")]
                row.append(Layer(weight_ih, weight_hh, *biases))
            found.append(row)
            inputs = directions * units
        return found

    def finish(self) -> None:
        """Raise UserError for tensors that no row named: the model has a part that fastseq lacks."""
        if self._left:
            listed = ", ".join(sorted(self._left)[:5])
            more = f" and {len(self._left) - 5} more" if len(self._left) > 5 else ""
            raise UserError(
                f"{self.source}: the checkpoint has tensors with no place in a fastseq model: {listed}{more}; "
                "it has a part that fastseq lacks, and nothing was written"
            )


def attention_score(source: str, name: str) -> str:
    """The score of fastseq.Attention for the library's name of an attention."""
    known = ATTENTIONS[source]
    if name not in known:
        raise UserError(f"{source}: attention {name!r} has no equal in fastseq; supported are {', '.join(known)}")
    return known[name]


def assemble(parts: Parts, source: Vocabulary, target: Vocabulary) -> Seq2Seq:
    """The Seq2Seq that computes what ``parts`` describe, on the ids of fastseq."""
    for side, vocabulary, matrix in (
        ("source", source, parts.source_embedding),
        ("target", target, parts.target_embedding),
    ):
        if len(vocabulary.tokens) != len(matrix):
            raise UserError(
                f"the {side} vocabulary has {len(vocabulary.tokens)} tokens, but the model embeds {len(matrix)}; "
                "give the vocabulary that it was trained with"
            )
    sizes = _Sizes(parts)
    if parts.bridge is None and parts.options.get("bridge") != "zeros" and len(sizes.memory) != sizes.units:
        raise UserError(
            f"the encoder hands on states of {len(sizes.memory)} units, but the decoder has {sizes.units}; expected "
            "equal widths where no bridge lies between them"
        )
    source_rows, target_rows = source.rows(), target.rows()
    model = Seq2Seq(_config(parts, sizes, len(source_rows), len(target_rows)))
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    _place_encoder(state, parts, sizes, source_rows)
    _place_decoder(state, parts, sizes, target_rows, target)
    if model.config.tied:
        state["decoder.output.weight"] = state["decoder.embedding.weight"]
    if model.config.share_all_embeddings:
        state["encoder.embedding.weight"] = state["decoder.embedding.weight"]
    model.load_state_dict(state)
    return model.eval()


class _Sizes:
    """The widths of the Seq2Seq, and the places in them that the parts fill."""

    def __init__(self, parts: Parts) -> None:
        self.directions = len(parts.encoder[0])
        self.narrow = parts.encoder[0][0].weight_hh.size(1)  # of a direction
        self.units = parts.decoder[0].weight_hh.size(1)
        per_direction = max(self.narrow, -(-self.units // self.directions))
        self.hidden = per_direction * self.directions
        self.per_direction = per_direction
        self.embedding = max(parts.source_embedding.size(1), parts.target_embedding.size(1))
        self.tied = self._tied(parts)
        if self.tied:
            self.embedding = self.hidden
        self.fed = parts.combine is not None and parts.decoder[0].weight_ih.size(1) > parts.target_embedding.size(1)

    def _tied(self, parts: Parts) -> bool:
        """True if the output is the target embedding, and both have the same columns in fastseq."""
        everything = parts.options.get("share_all_embeddings")
        if not everything and not parts.options.get("share_decoder_input_output_embed"):
            return False
        shared = [parts.target_embedding, *([parts.source_embedding] if everything else [])]
        if not all(torch.equal(matrix, parts.output.weight) for matrix in shared):
            raise UserError("the options say that embeddings and output share a matrix, but their tensors differ")
        return self.embedding <= self.hidden

    @property
    def memory(self) -> Tensor:
        """Places of the encoder's outputs in a vector of the width ``hidden``."""
        return torch.cat([d * self.per_direction + torch.arange(self.narrow) for d in range(self.directions)])

    @property
    def state(self) -> Tensor:
        """Places of the decoder's units."""
        return torch.arange(self.units)


def _config(parts: Parts, sizes: _Sizes, source_size: int, target_size: int) -> Seq2SeqConfig:
    options = {"attention": parts.attention, "bridge": "linear" if parts.bridge else "concat", **parts.options}
    if not sizes.tied:
        options["share_all_embeddings"] = options["share_decoder_input_output_embed"] = False
    if parts.score is not None:
        options["attention_size"] = len(parts.score)
    if parts.decoder[0].bias_hh is None:
        options["freeze_bias_hh"] = True
    return Seq2SeqConfig(
        src_vocab_size=source_size,
        tgt_vocab_size=target_size,
        embedding_dim=sizes.embedding,
        hidden_size=sizes.hidden,
        encoder_layers=len(parts.encoder),
        decoder_layers=len(parts.decoder),
        bidirectional=sizes.directions == 2,
        input_feeding=sizes.fed,
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=UNK,
        **options,
    )


def _place_encoder(state: dict[str, Tensor], parts: Parts, sizes: _Sizes, rows: Tensor) -> None:
    _put(state["encoder.embedding.weight"], _in_order(parts.source_embedding, rows))
    for k, layer in enumerate(parts.encoder):
        columns = torch.arange(layer[0].weight_ih.size(1)) if k == 0 else sizes.memory
        for direction, suffix in zip(layer, ("", "_reverse")[: len(layer)], strict=True):
            _put_layer(state, f"encoder.lstm.{{}}_l{k}{suffix}", direction, sizes.per_direction, columns)
    if parts.bridge is not None:
        inner = torch.cat([k * sizes.hidden + sizes.memory for k in range(len(parts.encoder))])
        outer = torch.cat([k * sizes.hidden + sizes.state for k in range(len(parts.decoder))])
        for name, map_ in zip(("h_proj", "c_proj")[: len(parts.bridge)], parts.bridge, strict=True):
            _put(state[f"bridge.{name}.weight"], map_.weight, outer, inner)
            _put(state[f"bridge.{name}.bias"], map_.bias, outer)


def _place_decoder(state: dict[str, Tensor], parts: Parts, sizes: _Sizes, rows: Tensor, vocabulary: Vocabulary) -> None:
    width = parts.target_embedding.size(1)
    columns = torch.arange(width)
    if sizes.fed:
        columns = torch.cat((columns, sizes.embedding + sizes.state))
    for k, layer in enumerate(parts.decoder):
        _put_layer(state, f"decoder.lstm.{{}}_l{k}", layer, sizes.hidden, columns if k == 0 else sizes.state)
    if parts.combine is not None:
        _place_attention(state, parts, sizes)
    _place_output(state, parts, sizes, rows)
    _put(state["decoder.embedding.weight"], _in_order(parts.target_embedding, rows))
    if parts.start is not None:
        first = parts.target_embedding[list(vocabulary.tokens).index(parts.start)]
        state["decoder.embedding.weight"][BOS, :width] = first


def _place_attention(state: dict[str, Tensor], parts: Parts, sizes: _Sizes) -> None:
    _put(
        state["decoder.combine.weight"],
        parts.combine.weight,
        sizes.state,
        torch.cat((sizes.memory, sizes.hidden + sizes.state)),
    )
    if parts.combine.bias is not None:
        _put(state["decoder.combine.bias"], parts.combine.bias, sizes.state)
    if parts.key is not None:
        rows = torch.arange(len(parts.key)) if parts.score is not None else sizes.state
        _put(state["decoder.attention.key_proj.weight"], parts.key, rows, sizes.memory)
    if parts.score is not None:
        state["decoder.attention.v"].copy_(parts.score)
        size = torch.arange(len(parts.score))
        _put(state["decoder.attention.query_proj.weight"], parts.query.weight, size, sizes.state)
        if parts.query.bias is not None:
            state["decoder.attention.query_proj.bias"].copy_(parts.query.bias)


def _place_output(state: dict[str, Tensor], parts: Parts, sizes: _Sizes, rows: Tensor) -> None:
    """Weights and biases of the logits; tokens that the checkpoint lacks, and bos if tied, get a lowest bias."""
    bias = parts.output.weight.new_zeros(len(parts.output.weight)) if parts.output.bias is None else parts.output.bias
    if not sizes.tied:
        _put(state["decoder.output.weight"], _in_order(parts.output.weight, rows), None, sizes.state)
    state["decoder.output.bias"].copy_(_in_order(bias, rows))
    absent = rows == MISSING
    if sizes.tied and parts.start is not None:
        absent[BOS] = True
    state["decoder.output.bias"][absent] = _lowest(parts, bias)


def _lowest(parts: Parts, bias: Tensor) -> Tensor:
    """A bias that keeps a token MARGIN below every logit: |logit| <= reach, its weight's part included."""
    largest = 1.0  # of the units that the output reads: tanh, or h of an LSTM
    if parts.options.get("combine_activation") == "none":
        largest = parts.combine.weight.abs().sum(1).add(parts.combine.bias.abs()).max()
    reach = (parts.output.weight.abs().sum(1) * largest + bias.abs()).max()
    return -(2 * reach + MARGIN)


def _in_order(matrix: Tensor, rows: Tensor) -> Tensor:
    """The rows ``rows`` of the matrix, 0 where MISSING."""
    ordered = matrix[rows.clamp(min=0)]
    ordered[rows == MISSING] = 0
    return ordered


def _put_layer(state: dict[str, Tensor], name: str, layer: Layer, hidden: int, columns: Tensor) -> None:
    units = torch.arange(layer.weight_hh.size(1))
    rows = torch.cat([gate * hidden + units for gate in range(4)])
    _put(state[name.format("weight_ih")], layer.weight_ih, rows, columns)
    _put(state[name.format("weight_hh")], layer.weight_hh, rows, units)
    _put(state[name.format("bias_ih")], layer.bias_ih, rows)
    if layer.bias_hh is not None:
        _put(state[name.format("bias_hh")], layer.bias_hh, rows)


def _put(into: Tensor, values: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Write ``values`` to the rows and columns of ``into``, by default the first ones."""
    rows = torch.arange(len(values)) if rows is None else rows
    if values.dim() == 1:
        into[rows] = values
        return
    columns = torch.arange(values.size(1)) if columns is None else columns
    into[rows[:, None], columns] = values
