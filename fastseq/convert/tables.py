"""The names, shapes and orders of each library: read by the ports, and printed by the documentation."""

from typing import NamedTuple

SOURCES = ("keras", "opennmt", "fairseq", "joeynmt")


class Row(NamedTuple):
    """One tensor: its name in ``Seq2Seq.state_dict()``, its name in the checkpoint, and the change between them.

    ``{k}`` is the layer, ``{d}`` the suffix of the direction: "" or "_reverse".
    """

    ours: str
    theirs: str
    change: str = ""


class Conventions(NamedTuple):
    """The conventions of one library that a port has to follow."""

    gates: str
    biases: str
    first_input: str
    attentional: str
    first_state: str
    source: str


TRANSPOSED = "transposed"
ROWS = "rows in the order of fastseq's vocabulary"

CONVENTIONS = {
    "fastseq": Conventions(
        "i, f, g, o; `(4H, I)`",
        "two",
        "`[embedding, feed]`",
        "tanh(W `[context, query]`)",
        "`bridge`",
        "tokens, eos",
    ),
    "keras": Conventions(
        "i, f, c, o; `(I, 4H)`",
        "one: `bias_hh` is 0 and frozen",
        "`embedding`, or one-hot vectors (an identity as embedding)",
        "none",
        "final h and c, layer by layer",
        "tokens; the padding too, unless it is masked",
    ),
    "opennmt": Conventions(
        "i, f, g, o; `(4H, I)`",
        "two",
        "`[embedding, feed]`, or `embedding` with `input_feed 0`",
        "tanh(W `[context, query]`); with `mlp` W `[context, query]` + b",
        "final h and c, layer by layer; with `bridge` relu of a linear map for each half",
        "tokens",
    ),
    "fairseq": Conventions(
        "i, f, g, o; `(4H, I)`",
        "two",
        "`[embedding, feed]`",
        "tanh(W `[context, query]`)",
        "final h and c, layer by layer; a linear map where the widths differ",
        "tokens, `</s>`; the target begins with `</s>`",
    ),
    "joeynmt": Conventions(
        "i, f, g, o; `(4H, I)`",
        "two",
        "`[embedding, feed]`",
        "tanh(W `[query, context]` + b)",
        "h and c of every layer from the top layer's h: tanh of a linear map, itself, or zeros",
        "tokens, `</s>`",
    ),
}

# Their name of the attention -> the score of fastseq.Attention; all others are refused.
ATTENTIONS: dict[str, dict[str, str]] = {
    "keras": {"no attention layer": "none"},
    "opennmt": {"dot": "dot", "general": "general", "mlp": "additive"},
    "fairseq": {"decoder_attention=True": "general"},
    "joeynmt": {"luong": "general", "bahdanau": "additive"},
}


def _lstm(ours: str, weights: str) -> tuple[Row, ...]:
    """The four tensors of a layer; ``weights`` has {n} for "weight_ih", ..., and {k} and {d}."""
    end = "_l{k}{d}" if ours == "encoder.lstm" else "_l{k}"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(Row(f"{ours}.{name}{end}", weights.replace("{n}", name)) for name in names)


TABLES = {
    "keras": (
        Row("encoder.embedding.weight", "Embedding: embeddings", ROWS),
        Row("encoder.lstm.weight_ih_l{k}{d}", "LSTM: kernel", TRANSPOSED),
        Row("encoder.lstm.weight_hh_l{k}{d}", "LSTM: recurrent_kernel", TRANSPOSED),
        Row("encoder.lstm.bias_ih_l{k}{d}", "LSTM: bias"),
        Row("decoder.embedding.weight", "Embedding: embeddings", ROWS),
        Row("decoder.lstm.weight_ih_l{k}", "LSTM: kernel", TRANSPOSED),
        Row("decoder.lstm.weight_hh_l{k}", "LSTM: recurrent_kernel", TRANSPOSED),
        Row("decoder.lstm.bias_ih_l{k}", "LSTM: bias"),
        Row("decoder.output.weight", "Dense: kernel", f"{TRANSPOSED}, {ROWS}"),
        Row("decoder.output.bias", "Dense: bias", ROWS),
    ),
    "opennmt": (
        Row("encoder.embedding.weight", "encoder.embeddings.make_embedding.emb_luts.0.weight", ROWS),
        *_lstm("encoder.lstm", "encoder.rnn.{n}_l{k}{d}"),
        Row("bridge.h_proj.weight", "encoder.bridge.0.weight", "block-diagonal, a block for each direction"),
        Row("bridge.h_proj.bias", "encoder.bridge.0.bias", "repeated for each direction"),
        Row("bridge.c_proj.weight", "encoder.bridge.1.weight", "block-diagonal, a block for each direction"),
        Row("bridge.c_proj.bias", "encoder.bridge.1.bias", "repeated for each direction"),
        Row("decoder.embedding.weight", "decoder.embeddings.make_embedding.emb_luts.0.weight", ROWS),
        *_lstm("decoder.lstm", "decoder.rnn.layers.{k}.{n} or decoder.rnn.{n}_l{k}"),
        Row(
            "decoder.attention.key_proj.weight",
            "decoder.attn.linear_in.weight or decoder.attn.linear_context.weight",
            "`linear_in` transposed",
        ),
        Row("decoder.attention.query_proj.weight", "decoder.attn.linear_query.weight"),
        Row("decoder.attention.query_proj.bias", "decoder.attn.linear_query.bias"),
        Row("decoder.attention.v", "decoder.attn.v.weight", "its only row"),
        Row("decoder.combine.weight", "decoder.attn.linear_out.weight"),
        Row("decoder.combine.bias", "decoder.attn.linear_out.bias"),
        Row("decoder.output.weight", "generator.weight or generator.0.weight", ROWS),
        Row("decoder.output.bias", "generator.bias or generator.0.bias", ROWS),
    ),
    "fairseq": (
        Row("encoder.embedding.weight", "encoder.embed_tokens.weight", ROWS),
        *_lstm("encoder.lstm", "encoder.lstm.{n}_l{k}{d}"),
        Row("bridge.h_proj.weight", "decoder.encoder_hidden_proj.weight", "block-diagonal, a block for each layer"),
        Row("bridge.h_proj.bias", "decoder.encoder_hidden_proj.bias", "repeated for each layer"),
        Row("bridge.c_proj.weight", "decoder.encoder_cell_proj.weight", "block-diagonal, a block for each layer"),
        Row("bridge.c_proj.bias", "decoder.encoder_cell_proj.bias", "repeated for each layer"),
        Row("decoder.embedding.weight", "decoder.embed_tokens.weight", f"{ROWS}; bos is `</s>`"),
        *_lstm("decoder.lstm", "decoder.layers.{k}.{n}"),
        Row("decoder.attention.key_proj.weight", "decoder.attention.input_proj.weight", TRANSPOSED),
        Row("decoder.combine.weight", "decoder.attention.output_proj.weight"),
        Row("decoder.output.weight", "decoder.fc_out.weight", f"times `decoder.additional_fc.weight`; {ROWS}"),
        Row(
            "decoder.output.bias", "decoder.fc_out.bias", f"plus its product with `decoder.additional_fc.bias`; {ROWS}"
        ),
    ),
    "joeynmt": (
        Row("encoder.embedding.weight", "src_embed.lut.weight", f"times sqrt(size) with `scale`; {ROWS}"),
        *_lstm("encoder.lstm", "encoder.rnn.{n}_l{k}{d}"),
        Row(
            "bridge.h_proj.weight", "decoder.bridge_layer.weight", "repeated for each layer; 0 for lower encoder layers"
        ),
        Row("bridge.h_proj.bias", "decoder.bridge_layer.bias", "repeated for each layer"),
        Row("decoder.embedding.weight", "trg_embed.lut.weight", f"times sqrt(size) with `scale`; {ROWS}"),
        *_lstm("decoder.lstm", "decoder.rnn.{n}_l{k}"),
        Row("decoder.attention.key_proj.weight", "decoder.attention.key_layer.weight"),
        Row("decoder.attention.query_proj.weight", "decoder.attention.query_layer.weight"),
        Row("decoder.attention.v", "decoder.attention.energy_layer.weight", "its only row"),
        Row("decoder.combine.weight", "decoder.att_vector_layer.weight", "`[query, context]` to `[context, query]`"),
        Row("decoder.combine.bias", "decoder.att_vector_layer.bias"),
        Row("decoder.output.weight", "decoder.output_layer.weight", ROWS),
    ),
}


def markdown() -> str:
    """The tables as the documentation prints them."""
    parts = [_table(("", *Conventions._fields), [(name, *row) for name, row in CONVENTIONS.items()])]
    for source in SOURCES:
        attentions = [(f"`{name}`", f'`"{score}"`') for name, score in ATTENTIONS[source].items()]
        parts += [f"### {source}", _table(("attention", "fastseq"), attentions)]
        rows = [(f"`{row.ours}`", f"`{row.theirs}`", row.change) for row in TABLES[source]]
        parts.append(_table(("fastseq", source, "change"), rows))
    return "\n\n".join(parts) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    header = tuple(cell.replace("_", " ") for cell in header)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
