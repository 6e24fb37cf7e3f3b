"""Quality of predictions: exact match, error rates of sequences, tokens, words and characters, BLEU, chrF and ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

from fastseq.errors import UserError
from fastseq.training.tokenizer import TextTokenizer

LABELS = {
    "sequence_error_rate": "sequence error rate %",
    "token_error_rate": "token error rate %",
    "exact_match": "exact match %",
    "word_error_rate": "word error rate %",
    "character_error_rate": "character error rate %",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1 F1 %",
    "rouge2": "ROUGE-2 F1 %",
    "rougeL": "ROUGE-L F1 %",
    "loss": "loss per token",
}
NAMES = {  # on the command line
    "ser": ("sequence_error_rate",),
    "per": ("token_error_rate",),
    "exact": ("exact_match",),
    "wer": ("word_error_rate",),
    "cer": ("character_error_rate",),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
}
ALWAYS = ("ser", "per", "exact")
HIGHER_IS_BETTER = ("exact_match", "bleu", "chrf", *NAMES["rouge"])


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


def chosen(given: str | None, option: str, *, text: bool, rates: bool) -> tuple[str, ...]:
    """The metrics of ``NAMES`` to measure: the ones ``given``, joined by commas, or the default.

    Args:
        option: that they were given by, for the message.
        text: the default has BLEU and chrF.
        rates: the default has WER and CER.

    Raises:
        UserError: an unknown name; ROUGE without its package.
    """
    if given is None:
        return (*ALWAYS, *(("wer", "cer") if rates else ()), *(("bleu", "chrf") if text else ()))
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"{option} has no metric {unknown[0]!r}; choose among {', '.join(NAMES)}, joined by commas")
    if "rouge" in names:
        _rouge_package()
    return names


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: TextTokenizer,
    names: Sequence[str] = ALWAYS,
) -> dict[str, float]:
    """Compare each prediction with its references (one or more), by the metrics ``names`` of ``NAMES``.

    sequence_error_rate: percentage of predictions that equal none of their references, token for token. Where a
        sequence is the pronunciation of one word, as in grapheme-to-phoneme conversion, this is the word error rate
        (WER).
    token_error_rate: 100 * sum of edits / sum of lengths, both over all predictions, against the closest reference and
        that reference's length. Where tokens are phonemes this is the phoneme error rate (PER). Can exceed 100.
    exact_match: 100 - sequence_error_rate.
    word_error_rate, character_error_rate: as token_error_rate, over the words between white space, and over the
        characters, with one space between words: WER and CER of speech recognition.
    bleu, chrf: corpus BLEU and chrF as computed by sacrebleu with its default settings.
    rouge1, rouge2, rougeL: 100 * mean F1 of common words, word pairs and the longest common subsequence, of the closest
        reference (Lin 2004), as computed by rouge-score without stemming. Its words are runs of a-z and 0-9.

    Tokens are what `tokenizer.units` makes of a text: characters, or words between white space.
    """
    values: dict[str, float] = {}
    if not set(names).isdisjoint(ALWAYS):
        edits = _edits(predictions, references, tokenizer.units)
        wrong = 100.0 * sum(e.errors > 0 for e in edits) / len(edits)
        values = {"sequence_error_rate": wrong, "token_error_rate": _rate(edits), "exact_match": 100.0 - wrong}
    if "wer" in names:
        values["word_error_rate"] = _rate(_edits(predictions, references, str.split))
    if "cer" in names:
        values["character_error_rate"] = _rate(_edits(predictions, references, lambda line: " ".join(line.split())))
    values |= _text_scores(predictions, references, [name for name in ("bleu", "chrf") if name in names])
    if "rouge" in names:
        values |= _rouge(predictions, references)
    return {label: values[label] for label in labels(names)}


def _edits(
    predictions: Sequence[str], references: Sequence[Sequence[str]], units: Callable[[str], Sequence[str]]
) -> list[Edits]:
    pairs = zip(predictions, references, strict=True)
    return [closest(units(prediction), [units(ref) for ref in refs]) for prediction, refs in pairs]


def _rate(edits: Sequence[Edits]) -> float:
    return 100.0 * sum(e.errors for e in edits) / sum(e.length for e in edits)


def _text_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, float]:
    if not names:
        return {}
    import sacrebleu

    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return {name: getattr(sacrebleu, f"corpus_{name}")(list(predictions), streams).score for name in names}


def check_references(names: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise UserError if one of the metrics ``names`` has no meaning for these references."""
    if "rouge" not in names:
        return
    tokenize = _rouge_package().RougeScorer(list(NAMES["rouge"]))._tokenizer.tokenize
    if not any(tokenize(ref) for refs in references for ref in refs):
        raise UserError(
            "rouge counts words of the letters a-z and digits, and no reference has one; measure chrf in its place"
        )


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    check_references(["rouge"], references)
    scorer = _rouge_package().RougeScorer(list(NAMES["rouge"]))
    found = [scorer.score_multi(refs, line) for refs, line in zip(references, predictions, strict=True)]
    return {name: 100.0 * sum(each[name].fmeasure for each in found) / len(found) for name in NAMES["rouge"]}


def _rouge_package() -> ModuleType:
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise UserError(
            "the metric rouge needs the package rouge-score; install it with: pip install rouge-score"
        ) from error
    return rouge_scorer


def labels(names: Sequence[str]) -> list[str]:
    """The values of the metrics ``names``, in the order of ``LABELS``."""
    return [label for label in LABELS if any(label in NAMES[name] for name in names)]


def monitors(names: Sequence[str]) -> list[str]:
    """Names of the values measured after each epoch with the metrics ``names``."""
    return [f"valid_{label}" for label in (*labels(names), "loss")]


def higher_is_better(name: str) -> bool:
    """True for a metric that grows as the model improves, such as `valid_bleu`."""
    return name.removeprefix("valid_") in HIGHER_IS_BETTER


def table(values: dict[str, float]) -> str:
    """The values as aligned lines, one metric a line."""
    width = max(len(LABELS.get(name, name)) for name in values)
    return "\n".join(f"{LABELS.get(name, name):<{width}}  {value:8.2f}" for name, value in values.items())
