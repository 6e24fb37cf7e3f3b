"""``fastseq bench --suite seq2seq``: equal results first, then figures of whole models."""

import json
from dataclasses import replace

import pytest
import torch

from fastseq.bench import main as bench
from fastseq.bench import models, timing
from fastseq.bench.models import CELLS, FIGURES, OURS, PLAIN, ModelCase, Sentences, Size

TINY = Size("tiny", (12, 40), 16, 2, (3, 9), (2, 8), 6, 5, 1.0, models.EVERY)
TINY_CASES = tuple(ModelCase(TINY, *variant) for variant in models.EVERY)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_MS", 1e-3)
    monkeypatch.setattr(models, "QUICK", TINY_CASES[:1])


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_plain_models_equal_fastseq(case):
    candidates = models.make_models(case)
    models.check_equal(case, candidates, Sentences(TINY, 12), Sentences(TINY, 30))


def test_the_answers_differ_from_sentence_to_sentence():
    """Else the comparison of generated tokens would say little."""
    candidates, batch = models.make_models(TINY_CASES[0]), Sentences(TINY, 30)
    for beams in (1, models.BEAMS):
        texts = models._texts(models.search(candidates[OURS], batch, beams))
        assert len({tuple(text) for text in texts}) > 10
        assert len({len(text) for text in texts}) > 3


def test_rows_of_every_figure_and_candidate(tiny, tmp_path):
    bench.main(["--suite", "seq2seq", "--quick", "--seconds", "0", "--output", str(tmp_path / "models")])
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [(row["mode"], row["candidate"]) for row in rows] == [(f, c) for f in FIGURES for c in (PLAIN, CELLS, OURS)]
    for row in rows:
        assert row["rounds"] == models.QUICK_ROUNDS
        assert row["baseline"] in (PLAIN, CELLS)
        assert (row["ratio"] == 1.0) or row["candidate"] != row["baseline"]
    text = (tmp_path / "models.md").read_text()
    assert "tiny, additive" in text
    assert "beam 5" in text


def test_filter_and_mode_choose_models_and_figures(tiny, capsys):
    bench.main(["--suite", "seq2seq", "--quick", "--seconds", "0", "--mode", "training", "--filter", "tiny"])
    text = capsys.readouterr().out
    assert "training step" in text
    assert "greedy" not in text.split("\n", 1)[1].replace("seq2seq --quick", "")


WRONG_PARAMETERS = {
    "logits of": "decoder.output.bias",
    "gradient of": "decoder.combine.weight",
}


@pytest.mark.parametrize(("what", "parameter"), WRONG_PARAMETERS.items(), ids=WRONG_PARAMETERS)
def test_no_figure_for_a_model_that_differs(tiny, monkeypatch, what, parameter):
    right = models.make_models

    def off_by_a_thousandth(case):
        made = right(case)
        found = made[OURS].get_parameter(parameter)
        if what == "gradient of":
            found.register_hook(lambda grad: 1.001 * grad)
        else:
            found.data += 1e-3
        return made

    monkeypatch.setattr(models, "make_models", off_by_a_thousandth)
    rows, remarks = models.run(models.QUICK, 0.0, 2)
    assert not rows
    assert len(remarks) == 1
    assert remarks[0].startswith(models.WRONG)
    assert what in remarks[0]


def test_no_figure_for_other_tokens(tiny, monkeypatch):
    right = models.search

    def other_tokens(model, batch, beams):
        tokens = right(model, batch, beams)
        return tokens if beams == 1 or model.__class__.__name__ == "PlainSeq2Seq" else tokens.flip(0)

    monkeypatch.setattr(models, "search", other_tokens)
    _, remarks = models.run(models.QUICK, 0.0, 2)
    assert "answers of fastseq with 5 beams differ" in remarks[0]


def test_a_training_step_leaves_the_weights(tiny):
    model = models.make_models(TINY_CASES[0])[OURS]
    before = {name: p.clone() for name, p in model.named_parameters()}
    models.training_step(model, Sentences(TINY, 4))()
    assert not model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_padding_is_cut_where_only_short_sentences_are_left():
    batch = Sentences(replace(TINY, source=(2, 9)), 20)
    shortest = int(batch.lengths.argmin())
    part = batch.part(slice(shortest, shortest + 1))
    assert part.source.shape == (1, int(batch.lengths.min()))
    assert (part.source != 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--suite", "seq2seq", "--memory"], "leave out --memory"),
        (["--quick"], "--quick chooses models of --suite seq2seq"),
        (["--suite", "seq2seq", "--filter", "gru"], "matches no case"),
    ],
    ids=["memory", "quick", "filter"],
)
def test_options_that_do_not_go_together_get_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(options)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
