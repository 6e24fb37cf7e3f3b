"""`fastseq score`: the log-probability of each pair and of all."""

import math
from pathlib import Path

import pytest
from toy_runs import TOY, refused

from fastseq.cli import main
from fastseq.training.data import read_pairs
from fastseq.training.scoring import PairScore
from fastseq.training.trained import TrainedModel


def scored(capsys, *arguments) -> tuple[list[list[str]], str]:
    """The columns of the output lines, and standard error."""
    capsys.readouterr()
    main(["score", *map(str, arguments)])
    output = capsys.readouterr()
    return [line.split("\t") for line in output.out.splitlines()], output.err


def test_lines_and_total(barely_trained, capsys):
    rows, note = scored(capsys, barely_trained, "--data", TOY / "test.tsv")
    pairs = list(zip(*read_pairs(TOY / "test.tsv"), strict=True))
    assert [tuple(row[2:]) for row in rows] == pairs
    scores = TrainedModel.from_pretrained(barely_trained).score(pairs)
    assert [float(row[0]) for row in rows] == pytest.approx([score.log_prob for score in scores], abs=1e-4)
    assert [float(row[1]) for row in rows] == pytest.approx([score.perplexity for score in scores], abs=1e-4)
    tokens, total = sum(len(score.token_scores) for score in scores), sum(score.log_prob for score in scores)
    assert tokens == sum(len(target.split()) + 1 for _, target in pairs)
    assert note.startswith(f"20 pairs, {tokens} target tokens: log-probability {total:.4f}")
    assert f"perplexity {math.exp(-total / tokens):.4f}" in note


def test_batches_checkpoint_and_output(barely_trained, capsys, tmp_path):
    data = ("--data", TOY / "test.tsv")
    rows, _ = scored(capsys, barely_trained, *data)
    small, _ = scored(capsys, barely_trained, *data, "--max-tokens", 1)
    assert [float(row[0]) for row in small] == pytest.approx([float(row[0]) for row in rows], abs=2e-4)
    assert scored(capsys, barely_trained, *data, "--output", tmp_path / "out")[0] == []
    assert [line.split("\t") for line in (tmp_path / "out").read_text().splitlines()] == rows


def test_other_weights_give_other_scores(barely_trained, capsys, tmp_path):
    """--checkpoint is connected: last.ckpt of this copy holds zeros."""
    import shutil

    import torch

    copy = Path(shutil.copytree(barely_trained, tmp_path / "copy"))
    path = copy / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {name: torch.zeros_like(t) for name, t in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    rows, _ = scored(capsys, copy, "--data", TOY / "test.tsv", "--checkpoint", "last")
    assert {row[1] for row in rows} == {"9.0000"}  # nine equally likely tokens
    assert scored(capsys, copy, "--data", TOY / "test.tsv")[0] != rows


def test_unknown_tokens_are_counted(barely_trained, capsys, tmp_path):
    (tmp_path / "pairs.tsv").write_text("xyz\ta b\n")
    assert "3 of 3 tokens are not in the vocabulary" in scored(
        capsys, barely_trained, "--data", tmp_path / "pairs.tsv"
    )[1].replace("sources: ", "")


def test_an_impossible_target_has_infinite_perplexity():
    assert PairScore([-math.inf, -1.0]).perplexity == math.inf
    assert PairScore([-1e4]).perplexity == math.inf


def test_bad_input(barely_trained, capsys, tmp_path):
    (tmp_path / "bad.tsv").write_text("one column\n")
    assert "expected source<TAB>target" in refused(capsys, "score", barely_trained, "--data", tmp_path / "bad.tsv")
    assert "cannot be read" in refused(capsys, "score", barely_trained, "--data", tmp_path / "none.tsv")
    assert "no config.yaml or config.json" in refused(capsys, "score", tmp_path, "--data", TOY / "test.tsv")
