"""The options of a Seq2Seq model, as one immutable value that can be saved."""

import dataclasses
from typing import Any

from fastseq.dispatch import check_name
from fastseq.ops.attention.api import SCORES

ATTENTIONS = ("none", *SCORES)
BRIDGES = ("concat", "linear", "linear_h", "zeros")
BRIDGE_ACTIVATIONS = ("tanh", "relu", "none")
COMBINE_ACTIVATIONS = ("tanh", "none")
MAX_LAYERS = 1000  # a module is built for each, in seconds
MAX_REDUCTION = 1024  # source positions joined to one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """The options of :class:`Seq2Seq`. Raises for an option that the others make ineffective.

    Args:
        src_vocab_size: number of source tokens; leave out with ``source_features``.
        tgt_vocab_size: number of target tokens.
        source_features: F, size of continuous source features (B, S, F) that enter the encoder LSTM directly, instead
            of tokens.
        tag_vocab_size: number of tags of side information, such as V and PST for inflection. The source is then
            (B, S, 1 + K) integers: the token, and K tags of this position, filled up with pad. Their embeddings are
            summed.
        embedding_dim: size of the source and target embeddings.
        hidden_size: width of the encoder's output, of the decoder's states and of the attentional vector. A
            bidirectional encoder gets half of it per direction (as in OpenNMT), so it must be even then.
        encoder_layers, decoder_layers: stacked LSTM layers.
        bidirectional: encode in both directions.
        frame_stack: n successive source positions enter the encoder as one, side by side: an n-th of the steps, and of
            the positions that the attention sees. For speech and other sources with many positions for each token.
        pyramid: each encoder layer above the first reads pairs of positions of the layer below as one (Chan et al.
            2016), so that L layers leave S / 2**(L - 1) positions.
        attention: "none", "dot", "general", "additive" or "normed_additive"; see :class:`fastseq.Attention`.
        attention_size: inner size of the additive scores, default ``hidden_size``.
        attention_scale: constant factor of the scores, default 1.0.
        input_feeding: feed the last attentional vector to the next step (Luong et al. 2015, section 3.3). Without it
            the whole target goes through the decoder LSTM, and through the attention, at once: faster to train.
        bridge: how the encoder's final states start the decoder. "concat": layer by layer, the directions
            concatenated (needs equal numbers of layers); "linear": all layers' final states through one linear map
            for h and one for c; "linear_h": the final h through one map, whose result starts both h and c (JoeyNMT);
            "zeros": the decoder starts from zeros.
        bridge_activation: "tanh", "relu" or "none", after the linear bridge.
        combine_bias, combine_activation: a bias in the attentional vector, and "tanh" or "none" around it; by default
            tanh(W [context, h]). Ports of OpenNMT-py and JoeyNMT need them. Another choice than the default runs step
            by step in Python instead of in one operator.
        copy: copy source tokens into the target, unknown ones included: the pointer-generator of See et al. 2017. The
            source then names two tokens at each position, and ids go up to ``tgt_vocab_size`` + S: see
            :meth:`Seq2Seq.encode`. Needs attention, tokens, and all source positions.
        coverage: let the additive scores read the attention that each position has got so far (See et al. 2017),
            against output that repeats itself. The decoder then runs step by step.
        coverage_loss: weight of the coverage loss, the attention that falls on positions again: the sum over s of
            min(attention[s], coverage[s]) (their equation 12). Part of the loss with the reductions mean and sum.
        dropout: between the LSTM layers, and the default of the next two.
        embed_dropout: on the embeddings.
        output_dropout: on the input of the output projection.
        recurrent_dropout, zoneout_hidden, zoneout_cell, layer_norm: of the LSTMs in encoder and decoder; see
            :class:`fastseq.LSTM`. With input feeding the decoder then trains step by step in Python; zoneout and
            layer_norm decode so, too.
        share_all_embeddings: one matrix for source embedding, target embedding and output projection (Press & Wolf
            2017).
        share_decoder_input_output_embed: one matrix for target embedding and output projection.
        freeze_bias_hh: keep ``bias_hh`` of the LSTMs as it is: see :meth:`fastseq.LSTM.freeze_bias_hh`. Ports of models
            with a single bias have it.
        pad_id, bos_id, eos_id, unk_id: reserved token ids, the same in both vocabularies. The model itself uses
            pad alone: its embedding starts at zero and gets no gradient, unless the matrix is shared with the output.
            ``generate`` uses pad, bos and eos, and forbids unk with ``generate_unk=False``. The data pipeline maps
            unknown tokens to unk.
        backend: "auto", "reference", "torch", "native" or "triton", for the LSTMs and the attention.

    Raises:
        ValueError: an option out of range, or one that contradicts another.
    """

    src_vocab_size: int | None = None
    tgt_vocab_size: int
    source_features: int | None = None
    tag_vocab_size: int | None = None
    embedding_dim: int = 256
    hidden_size: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 1
    bidirectional: bool = True
    frame_stack: int = 1
    pyramid: bool = False
    attention: str = "additive"
    attention_size: int | None = None
    attention_scale: float | None = None
    input_feeding: bool = True
    bridge: str = "linear"
    bridge_activation: str = "tanh"
    combine_bias: bool = False
    combine_activation: str = "tanh"
    copy: bool = False
    coverage: bool = False
    coverage_loss: float = 1.0
    dropout: float = 0.1
    embed_dropout: float | None = None
    output_dropout: float | None = None
    recurrent_dropout: float = 0.0
    zoneout_hidden: float = 0.0
    zoneout_cell: float = 0.0
    layer_norm: bool = False
    share_all_embeddings: bool = False
    share_decoder_input_output_embed: bool = False
    freeze_bias_hh: bool = False
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_names(self)
        _check_sharing(self)
        _check_copying(self)
        check_name(self.backend)

    @property
    def tied(self) -> bool:
        """True if the output projection is the target embedding."""
        return self.share_all_embeddings or self.share_decoder_input_output_embed

    @property
    def variant(self) -> dict[str, float | bool]:
        """The options of the LSTMs that nn.LSTM lacks."""
        names = ("recurrent_dropout", "zoneout_hidden", "zoneout_cell", "layer_norm")
        return {name: getattr(self, name) for name in names}

    @property
    def time_reduction(self) -> int:
        """Source positions for each position of the encoder's output."""
        return self.frame_stack * (2 ** (self.encoder_layers - 1) if self.pyramid else 1)

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the model, computed without allocating it."""
        size, attended = self.hidden_size, 0 if self.attention == "none" else 1
        directions = 2 if self.bidirectional else 1
        source = (self.source_features or self.embedding_dim) * self.frame_stack
        above = 2 * size if self.pyramid else size
        encoder = directions * _lstm(source, above, size // directions, self.encoder_layers)
        target = self.embedding_dim + (size if self.input_feeding else 0)
        decoder = _lstm(target, size, size, self.decoder_layers) + attended * size * (2 * size + self.combine_bias)
        if self.attention == "general":
            decoder += size * size
        elif self.attention in ("additive", "normed_additive"):
            decoder += (self.attention_size or size) * (2 * size + 2 + self.coverage)
            decoder += self.attention == "normed_additive"
        if self.copy:
            decoder += 2 * size + self.embedding_dim + 1
        inner, outer = self.encoder_layers * size, self.decoder_layers * size
        bridge = {"linear": 2, "linear_h": 1}.get(self.bridge, 0) * (inner + 1) * outer
        vocabularies = self.tgt_vocab_size + (0 if self.share_all_embeddings else self.src_vocab_size or 0)
        output = self.tgt_vocab_size * (1 if self.tied else size + 1)
        norms = 10 * size * (self.encoder_layers + self.decoder_layers) if self.layer_norm else 0
        embedded = (vocabularies + (self.tag_vocab_size or 0)) * self.embedding_dim
        return encoder + decoder + norms + bridge + embedded + output

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values, for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "Seq2SeqConfig":
        """The inverse of :meth:`to_dict`; ValueError for an unknown option."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"Seq2SeqConfig: unknown options {unknown}; known are {sorted(known)}")
        return cls(**options)


def _lstm(first: int, above: int, hidden: int, layers: int) -> int:
    """Parameters of one direction of a stacked LSTM: input size `first` in layer 0, `above` in the others."""
    inputs = first + (layers - 1) * above
    return 4 * hidden * (inputs + layers * (hidden + 2))


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(f"Seq2SeqConfig: {sentence}")


def _check_sizes(c: Seq2SeqConfig) -> None:
    _require(
        (c.src_vocab_size is None) != (c.source_features is None),
        "give either src_vocab_size (tokens) or source_features (continuous features), "
        f"got {c.src_vocab_size} and {c.source_features}",
    )
    sizes = ("src_vocab_size", "tgt_vocab_size", "source_features", "tag_vocab_size", "embedding_dim", "hidden_size")
    for name in (*sizes, "attention_size", "encoder_layers", "decoder_layers", "frame_stack"):
        value = getattr(c, name)
        _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
    _require(
        c.tag_vocab_size is None or (c.src_vocab_size is not None and c.pad_id < c.tag_vocab_size),
        f"tag_vocab_size is for a source of tokens and must exceed pad_id, got {c.tag_vocab_size} with src_vocab_size "
        f"{c.src_vocab_size} and pad_id {c.pad_id}",
    )
    for name in ("encoder_layers", "decoder_layers"):
        value = getattr(c, name)
        _require(value <= MAX_LAYERS, f"{name} must be at most {MAX_LAYERS}, got {value}")
    _require(
        c.encoder_layers > 1 or not c.pyramid,
        "pyramid joins pairs between encoder layers, and encoder_layers is 1; raise it, or use frame_stack",
    )
    _require(
        c.time_reduction <= MAX_REDUCTION,
        f"frame_stack and pyramid join more than {MAX_REDUCTION} positions to one; lower frame_stack or encoder_layers",
    )
    rates = ("recurrent_dropout", "zoneout_hidden", "zoneout_cell")
    for name in ("dropout", "embed_dropout", "output_dropout", *rates):
        value = getattr(c, name)
        _require(value is None or 0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
    _require(
        not c.bidirectional or c.hidden_size % 2 == 0,
        f"hidden_size must be even for a bidirectional encoder (half per direction), got {c.hidden_size}; "
        "choose an even number or bidirectional=False",
    )
    ids = {name: getattr(c, name) for name in ("pad_id", "bos_id", "eos_id", "unk_id")}
    smallest = min(c.tgt_vocab_size, c.src_vocab_size or c.tgt_vocab_size)
    _require(len(set(ids.values())) == 4, f"the reserved ids must differ, got {ids}")
    _require(
        all(0 <= i < smallest for i in ids.values()),
        f"the reserved ids must lie below the vocabulary size {smallest}, got {ids}",
    )


def _check_names(c: Seq2SeqConfig) -> None:
    choices = {
        "attention": ATTENTIONS,
        "bridge": BRIDGES,
        "bridge_activation": BRIDGE_ACTIVATIONS,
        "combine_activation": COMBINE_ACTIVATIONS,
    }
    for name, valid in choices.items():
        value = getattr(c, name)
        _require(value in valid, f"unknown {name} {value!r}; choose one of {', '.join(map(repr, valid))}")
    if c.attention == "none":
        _require(
            not c.input_feeding,
            "input_feeding feeds the attentional vector; set input_feeding=False with attention='none'",
        )
        _require(c.attention_scale is None, "attention_scale has no use with attention='none'")
        _require(
            not c.combine_bias and c.combine_activation == "tanh",
            "combine_bias and combine_activation have no use with attention='none'",
        )
        _require(
            c.bridge != "zeros",
            "with attention='none' and bridge='zeros' the decoder would not see the source; change one",
        )
    _require(
        c.attention_size is None or c.attention in ("additive", "normed_additive"),
        f"attention_size has no use with attention={c.attention!r}; leave it out or choose 'additive'",
    )
    _require(
        c.bridge != "concat" or c.encoder_layers == c.decoder_layers,
        "bridge='concat' hands each encoder layer's state to the same decoder layer, so encoder_layers must equal "
        f"decoder_layers, got {c.encoder_layers} and {c.decoder_layers}; choose bridge='linear' or 'zeros'",
    )
    _require(
        c.bridge in ("linear", "linear_h") or c.bridge_activation == "tanh",
        f"bridge_activation has no use with bridge={c.bridge!r}; leave it out or choose bridge='linear'",
    )


def _check_sharing(c: Seq2SeqConfig) -> None:
    _require(
        not c.tied or c.embedding_dim == c.hidden_size,
        "a shared output matrix needs embedding_dim == hidden_size (it embeds tokens, and reads attentional vectors), "
        f"got {c.embedding_dim} and {c.hidden_size}; make them equal or do not share",
    )
    _require(
        not c.share_all_embeddings or c.src_vocab_size == c.tgt_vocab_size,
        "share_all_embeddings needs one vocabulary for source and target, "
        f"got sizes {c.src_vocab_size} and {c.tgt_vocab_size}; "
        "use share_decoder_input_output_embed to share on the target side only",
    )


def _check_copying(c: Seq2SeqConfig) -> None:
    _require(
        not c.coverage or c.attention in ("additive", "normed_additive"),
        f"coverage is a term of the additive scores, and attention is {c.attention!r}; choose 'additive'",
    )
    _require(0 <= c.coverage_loss < float("inf"), f"coverage_loss must be finite and >= 0, got {c.coverage_loss}")
    _require(c.coverage or c.coverage_loss == 1, "coverage_loss has no use without coverage; set coverage=True")
    if not c.copy:
        return
    _require(c.source_features is None, "copy copies source tokens, and source_features has none; set copy=False")
    _require(c.tag_vocab_size is None, "copy and tags cannot be combined yet: both stand beside the source tokens")
    _require(c.attention != "none", "copy follows the attention, and attention is 'none'; choose a score")
    _require(
        c.time_reduction == 1,
        "copy needs the attention to see each source position, and frame_stack or pyramid joins several; "
        "set copy=False",
    )
