"""Quality of predictions: exact match, error rates of sequences, tokens, words and characters, BLEU and chrF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastseq.training.tokenizer import TextTokenizer

LABELS = {
    "sequence_error_rate": "sequence error rate %",
    "token_error_rate": "token error rate %",
    "exact_match": "exact match %",
    "word_error_rate": "word error rate %",
    "character_error_rate": "character error rate %",
    "bleu": "BLEU",
    "chrf": "chrF",
    "loss": "loss per token",
}
HIGHER_IS_BETTER = ("exact_match", "bleu", "chrf")


class Edits(NamedTuple):
    """Edit operations between a prediction and its closest reference, and that reference's length in tokens."""

    errors: int
    length: int


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Smallest number of insertions, deletions and substitutions that turn `a` into `b` (Levenshtein 1966)."""
    above = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


def closest(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> Edits:
    """Edits to the reference with the fewest; of equally close ones the first listed counts."""
    return min((Edits(edit_distance(prediction, ref), len(ref)) for ref in references), key=lambda edits: edits.errors)


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: TextTokenizer,
    *,
    text: bool = False,
    rates: bool = False,
) -> dict[str, float]:
    """Compare each prediction with its references (one or more).

    sequence_error_rate: percentage of predictions that equal none of their references, token for token. Where a
        sequence is the pronunciation of one word, as in grapheme-to-phoneme conversion, this is the word error rate
        (WER).
    token_error_rate: 100 * sum of edits / sum of lengths, both over all predictions, against the closest reference and
        that reference's length. Where tokens are phonemes this is the phoneme error rate (PER). Can exceed 100.
    exact_match: 100 - sequence_error_rate.
    word_error_rate, character_error_rate: with `rates`, as token_error_rate, over the words between white space, and
        over the characters, with one space between words: WER and CER of speech recognition.
    bleu, chrf: with `text`, corpus BLEU and chrF as computed by sacrebleu with its default settings.

    Tokens are what `tokenizer.units` makes of a text: characters, or words between white space.
    """
    edits = _edits(predictions, references, tokenizer.units)
    wrong = 100.0 * sum(e.errors > 0 for e in edits) / len(edits)
    values = {"sequence_error_rate": wrong, "token_error_rate": _rate(edits), "exact_match": 100.0 - wrong}
    if rates:
        values["word_error_rate"] = _rate(_edits(predictions, references, str.split))
        values["character_error_rate"] = _rate(_edits(predictions, references, lambda line: " ".join(line.split())))
    return values | _text_scores(predictions, references) if text else values


def _edits(
    predictions: Sequence[str], references: Sequence[Sequence[str]], units: Callable[[str], Sequence[str]]
) -> list[Edits]:
    pairs = zip(predictions, references, strict=True)
    return [closest(units(prediction), [units(ref) for ref in refs]) for prediction, refs in pairs]


def _rate(edits: Sequence[Edits]) -> float:
    return 100.0 * sum(e.errors for e in edits) / sum(e.length for e in edits)


def _text_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    import sacrebleu

    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    bleu, chrf = (metric(list(predictions), streams).score for metric in (sacrebleu.corpus_bleu, sacrebleu.corpus_chrf))
    return {"bleu": bleu, "chrf": chrf}


def monitors(*, text: bool, rates: bool) -> list[str]:
    """Names of the values measured after each epoch; BLEU and chrF with `text`, WER and CER with `rates`."""
    absent = () if text else ("bleu", "chrf")
    absent += () if rates else ("word_error_rate", "character_error_rate")
    return [f"valid_{name}" for name in LABELS if name not in absent]


def higher_is_better(name: str) -> bool:
    """True for a metric that grows as the model improves, such as `valid_bleu`."""
    return name.removeprefix("valid_") in HIGHER_IS_BETTER


def table(values: dict[str, float]) -> str:
    """The values as aligned lines, one metric a line."""
    width = max(len(LABELS.get(name, name)) for name in values)
    return "\n".join(f"{LABELS.get(name, name):<{width}}  {value:8.2f}" for name, value in values.items())
