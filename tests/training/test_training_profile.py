"""``fastseq train --profile``: the table of an epoch's time; the optimiser in each precision; threads."""

import re
from types import SimpleNamespace

import pytest
import torch
from toy_runs import rows, train

from fastseq import Seq2Seq, Seq2SeqConfig
from fastseq.training.options import OptimOptions
from fastseq.training.profile import PARTS, TimeSplit, table
from fastseq.training.task import Seq2SeqTask


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_a_table_for_each_epoch(accumulate, tmp_path, capsys):
    options = ["--trainer.max_epochs", "2", "--trainer.accumulate", accumulate]
    train(tmp_path / "run", *options, "--profile")
    printed = capsys.readouterr().out
    found = re.findall(r"^  (\w+) +(-?[\d.]+) +(-?[\d.]+)%$", printed, re.MULTILINE)
    assert [name for name, _, _ in found] == [*PARTS, "epoch"] * 2
    for epoch in (found[: len(PARTS) + 1], found[len(PARTS) + 1 :]):
        seconds = {name: float(value) for name, value, _ in epoch}
        assert all(value >= 0 for value in seconds.values())
        assert all(seconds[name] > 0 for name in ("encoder", "decoder", "loss", "backward", "optimiser", "validation"))
        assert sum(seconds[name] for name in PARTS) == pytest.approx(seconds["epoch"], abs=0.05)
    train(tmp_path / "plain", *options)
    assert "optimiser" not in capsys.readouterr().out
    losses = [[row["train_loss"] for row in rows(tmp_path / name)] for name in ("run", "plain")]
    assert losses[0] == losses[1], "measuring changes no result"


def test_shares_of_the_table():
    lines = table({"data": 1.0, "other": 3.0}, 4.0)
    assert [line.split() for line in lines[1:]] == [
        ["data", "1.000", "25.0%"],
        ["other", "3.000", "75.0%"],
        ["epoch", "4.000", "100.0%"],
    ]


@pytest.mark.parametrize(("precision", "fused", "clips"), [
    ("32-true", True, True), ("bf16-true", True, True), ("bf16-mixed", True, True), ("16-mixed", False, True),
])  # fmt: skip
def test_the_optimiser_is_fused_where_lightning_clips_its_gradients(precision, fused, clips):
    config = Seq2SeqConfig(src_vocab_size=8, tgt_vocab_size=8, embedding_dim=4, hidden_size=4)
    task = Seq2SeqTask(Seq2Seq(config), OptimOptions(), 1, 1, None)
    task._trainer = SimpleNamespace(precision=precision)
    optimizer = task.configure_optimizers()["optimizer"]
    assert optimizer.defaults["fused"] == fused
    if "mixed" in precision:
        assert getattr(optimizer, "_step_supports_amp_scaling", False) != clips


def test_forwards_of_the_validation_count_as_validation_alone():
    model = Seq2Seq(Seq2SeqConfig(src_vocab_size=8, tgt_vocab_size=8, embedding_dim=4, hidden_size=4))
    split = TimeSplit(model, SimpleNamespace(make_batch=None))
    tokens = torch.ones(1, 2, dtype=torch.int64)
    split.on_validation_start(None, None)
    model.loss(tokens, None, tokens, tokens)
    split.on_validation_end(None, None)
    assert [name for name, seconds in split._seconds.items() if seconds] == ["validation"]
    model.loss(tokens, None, tokens, tokens)
    assert [name for name, seconds in split._seconds.items() if seconds] == ["encoder", "decoder", "loss", "validation"]
