"""Metrics against values computed on paper."""

import sys

import pytest

from fastseq.errors import UserError
from fastseq.training import metrics
from fastseq.training.tokenizer import TextTokenizer

TEXT = ("bleu", "chrf")


@pytest.fixture(scope="module")
def words():
    return TextTokenizer.train("whitespace", ["a"], 10)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("abc", "bca", 2), ("flaw", "lawn", 2)],
    ids=["empty", "insert", "delete", "kitten", "rotate", "flaw"],
)
def test_edit_distance(a, b, distance):
    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == distance


def test_closest_reference_by_edits_then_order():
    assert metrics.closest("ab", ["xyz", "abc", "a"]) == (1, 3)
    assert metrics.closest("ab", ["a", "abc"]) == (1, 1)


def test_error_rates_of_worked_examples(words):
    predictions = ["a b c", "a  x", "q", "d"]
    references = [["a b", "a b c"], ["a b c d", "a b"], ["r s"], ["d"]]
    values = metrics.score(predictions, references, words)
    # edits 0, 1, 2, 0 against references of 3, 2, 2, 1 tokens
    assert values == {
        "sequence_error_rate": 50.0,
        "token_error_rate": pytest.approx(100 * 3 / 8),
        "exact_match": 50.0,
    }


def test_empty_prediction_counts_its_missing_tokens(words):
    values = metrics.score([""], [["a b"]], words)
    assert (values["sequence_error_rate"], values["token_error_rate"]) == (100.0, 100.0)


def test_characters_are_the_units_of_a_character_tokenizer():
    characters = TextTokenizer.train("char", ["ab c"], 10)
    assert metrics.score(["ab c"], [["ab d"]], characters)["token_error_rate"] == 25.0


def test_bleu_and_chrf_with_different_numbers_of_references(words):
    same = metrics.score(["the cat sat on it"], [["a dog", "the cat sat on it"]], words, TEXT)
    assert same["bleu"] == pytest.approx(100.0)
    assert same["chrf"] == pytest.approx(100.0)
    # 4-gram precisions 4/5, 3/4, 2/3, 1/2 and no brevity penalty: their geometric mean
    other = metrics.score(["the cat sat on mats"], [["the cat sat on it"]], words, TEXT)
    assert other["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    mixed = metrics.score(["x y z w", "the cat sat on it"], [["x y z w"], ["a", "the cat sat on it"]], words, TEXT)
    assert mixed["bleu"] == pytest.approx(100.0)


def test_rouge_of_the_closest_reference(words):
    pytest.importorskip("rouge_score")
    predictions, references = ["the cat sat", "no"], [["a dog", "The cat, sat on"], ["yes"]]
    values = metrics.score(predictions, references, words, ["rouge"])
    # precision 3/3 and recall 3/4 of words, 2/2 and 2/3 of pairs; the second prediction has nothing
    expected = {"rouge1": 100 * 6 / 7 / 2, "rouge2": 100 * 0.8 / 2, "rougeL": 100 * 6 / 7 / 2}
    assert values == {name: pytest.approx(value) for name, value in expected.items()}
    with pytest.raises(UserError, match="no reference has one; measure chrf"):
        metrics.score(["你好"], [["你好"]], words, ["rouge"])


def test_named_metrics(words, monkeypatch):
    values = metrics.score(["a b", "c"], [["a b"], ["cd"]], words, ["cer", "per", "wer"])
    assert values == {"token_error_rate": pytest.approx(100 / 3)} | {
        "word_error_rate": pytest.approx(100 / 3),
        "character_error_rate": pytest.approx(100 / 5),
    }
    assert metrics.chosen("per, bleu,per", "--metrics", text=False, rates=True) == ("per", "bleu")
    assert metrics.chosen(None, "--metrics", text=True, rates=False) == ("ser", "per", "exact", "bleu", "chrf")
    assert metrics.chosen(None, "--metrics", text=False, rates=True) == ("ser", "per", "exact", "wer", "cer")
    listed = "ser, per, exact, wer, cer, bleu, chrf, rouge, joined by commas"
    with pytest.raises(UserError, match=f"--metrics has no metric 'meteor'; choose among {listed}"):
        metrics.chosen("bleu,meteor", "--metrics", text=False, rates=False)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match="rouge needs the package rouge-score; install it with: pip install"):
        metrics.chosen("rouge", "--metrics", text=False, rates=False)


def test_direction_and_table():
    assert metrics.higher_is_better("valid_bleu")
    assert not metrics.higher_is_better("valid_token_error_rate")
    assert metrics.table({"bleu": 12.345, "loss": 1.0}) == "BLEU               12.35\nloss per token      1.00"
