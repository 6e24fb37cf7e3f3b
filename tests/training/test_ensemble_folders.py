"""Several folders as one model: in Python, and in evaluate, generate and score."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from toy_runs import TOY, refused, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq.ensemble import Ensemble
from fastseq.training.tokenizer import TextTokenizer
from fastseq.training.trained import TrainedModel

WORDS = ["abc", "e", "dcbae"]
PAIRS = [("abc", "c b a"), ("e", "e"), ("dcba", "a b")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two runs with other seeds and architectures, the second one saved."""
    root = tmp_path_factory.mktemp("ensemble")
    train(root / "a", "--trainer.max_epochs", "2")
    options = ("--model.attention", "none", "--model.input_feeding", "false", "--seed", "2")
    train(root / "b", "--trainer.max_epochs", "2", *options)
    TrainedModel.from_pretrained(root / "b").save_pretrained(root / "saved")
    return [root / "a", root / "saved"]


def test_predictions_and_scores(folders):
    together = TrainedModel.from_pretrained(folders)
    assert isinstance(together.model, Ensemble)
    parts = [TrainedModel.from_pretrained(folder) for folder in folders]
    ids = torch.tensor([together.source_tokenizer.encode(["abc"])[0] + [2]])
    labels = together.target_tokenizer.encode(["c b a"])[0] + [2]
    with torch.no_grad():
        logits = [part.model(ids, None, torch.tensor([[1, *labels[:-1]]])).logits[0] for part in parts]
    mean = (sum(x.double().log_softmax(-1) for x in logits) / 2).log_softmax(-1)
    expected = mean[range(4), labels].tolist()
    assert together.score(PAIRS)[0].token_scores == pytest.approx(expected, rel=1e-4)
    several = together.predict(WORDS, num_beams=4, n_best=2, token_scores=True, attention=True)
    for (best, _), word in zip(several, WORDS, strict=True):
        assert best.attention.shape == (len(best.ids), len(word) + 1)
        assert sum(best.token_scores) / len(best.ids) == pytest.approx(best.score, rel=1e-4)
    texts = [[hypothesis.text for hypothesis in row] for row in several]
    assert all(texts != [[h.text for h in row] for row in part.predict(WORDS, num_beams=4, n_best=2)] for part in parts)


def test_commands(folders, tmp_path, capsys):
    names = list(map(str, folders))
    main(["evaluate", *names, "--data", str(TOY / "test.tsv"), "--output", str(tmp_path), "--pictures", "1"])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["sources"] == 20
    capsys.readouterr()
    main(["generate", *names, "--input", str(TOY / "test.tsv"), "--n-best", "2", "--num-beams", "3"])
    lines = capsys.readouterr().out.splitlines()
    main(["generate", names[0], "--input", str(TOY / "test.tsv"), "--n-best", "2", "--num-beams", "3"])
    assert len(lines) == 40 and lines != capsys.readouterr().out.splitlines()
    main(["score", *names, "--data", str(TOY / "test.tsv")])
    scores = capsys.readouterr().out.splitlines()
    expected = TrainedModel.from_pretrained(folders).score([tuple(line.split("\t")[2:]) for line in scores])
    assert [float(line.split("\t")[0]) for line in scores] == pytest.approx([s.log_prob for s in expected], abs=1e-4)


def test_other_vocabularies_are_refused(folders, tmp_path, capsys):
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    path = other / "target_tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"a"', '"A"'))
    assert TextTokenizer.load(path) != TextTokenizer.load(folders[1] / path.name)
    arguments = (folders[0], other)
    sentence = refused(capsys, "generate", *arguments)
    assert f"{other} and {folders[0]} have different target vocabularies" in sentence
    with pytest.raises(UserError, match="different target vocabularies"):
        TrainedModel.from_pretrained(arguments)
    (other / "config.json").unlink()
    assert f"{other / 'config.json'} is missing" in refused(capsys, "generate", *arguments)


def test_an_ensemble_is_not_saved_and_needs_an_output(folders, tmp_path, capsys):
    with pytest.raises(UserError, match="an ensemble is several models"):
        TrainedModel.from_pretrained(folders).save_pretrained(tmp_path / "x")
    assert "--output is missing" in refused(capsys, "evaluate", *folders, "--data", TOY / "test.tsv")
