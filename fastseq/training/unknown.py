"""Unknown tokens of predictions, replaced by what the decoder looked at (Luong et al. 2015, Jean et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastseq.errors import UserError
from fastseq.training.decode import Hypothesis
from fastseq.training.tagged import Tagged
from fastseq.training.tokenizer import EOS, UNK, TextTokenizer


def check_replacement(attention: str, source: object) -> None:
    """Raise UserError for a model without attention, or one whose source is not a text."""
    if attention == "none":
        raise UserError("replace_unk follows the attention, and the model has attention none; leave it out")
    if not isinstance(source, TextTokenizer | Tagged):
        raise UserError("replace_unk copies tokens of the source, and the model reads features; leave it out")


def replace_unknown(
    found: Sequence[Sequence[Hypothesis]],
    lines: Sequence[str],
    tokenizers: tuple[TextTokenizer | Tagged, TextTokenizer],
    dictionary: Mapping[str, str],
) -> list[list[Hypothesis]]:
    """The hypotheses of each line with a text in place of each unknown token; ids and scores stay.

    The text is that of the source token with the most attention, the closing eos left out, or its entry in
    `dictionary`. A line without tokens leaves its unknown tokens as they are. Needs hypotheses with attention.
    """
    source, target = tokenizers
    pieces = source.pieces(lines)

    def replaced(hypothesis: Hypothesis, words: list[str]) -> Hypothesis:
        if UNK not in hypothesis.ids or not words:
            return hypothesis
        ids = hypothesis.ids[: hypothesis.ids.index(EOS)] if EOS in hypothesis.ids else hypothesis.ids
        names = target.tokens(ids, hypothesis.copied)
        for place, token in enumerate(ids):
            if token == UNK:
                word = words[int(hypothesis.attention[place, : len(words)].argmax())]
                names[place] = dictionary.get(word, word)
        return hypothesis._replace(text=target.join(names))

    return [[replaced(hypothesis, words) for hypothesis in best] for best, words in zip(found, pieces, strict=True)]
