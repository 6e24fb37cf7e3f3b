"""The names, shapes and orders of each library: read by the ports, and printed by the documentation."""

from typing import NamedTuple

SOURCES = ("keras",)


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
}

# Their name of the attention -> the score of fastseq.Attention; all others are refused.
ATTENTIONS: dict[str, dict[str, str]] = {"keras": {"no attention layer": "none"}}

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
