"""The commands train, evaluate and generate on the toy corpus, end to end."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import SMALL, TOY, refused, rows, train

from fastseq.cli import main
from fastseq.training import decoding, fit
from fastseq.training.batching import TokenBatches
from fastseq.training.decode import decode
from fastseq.training.fit import cores
from fastseq.training.plots import curves_figure
from fastseq.training.task import learning_rate_factor


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run trained until it reverses words."""
    run = tmp_path_factory.mktemp("runs") / "reversal"
    train(run, "--trainer.max_epochs", "40", "--model.embedding_dim", "32", "--model.hidden_size", "64")
    return run


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of that run, for a test to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_training_learns_to_reverse(trained):
    last = rows(trained)[-1]
    assert float(last["valid_token_error_rate"]) < 5
    assert float(last["valid_loss"]) < 0.2
    assert [row["step"] for row in rows(trained) if row["train_loss"]] == [str(i) for i in range(40 * 4)]
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.yaml", "source_tokenizer.json", "target_tokenizer.json", "metrics.csv", "tensorboard"}
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((trained / "tensorboard").glob("events*"))


def test_best_checkpoint_is_that_of_the_best_epoch(trained):
    best = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    losses = [float(row["valid_loss"]) for row in rows(trained) if row["valid_loss"]]
    assert best["epoch"] == losses.index(min(losses))


@pytest.mark.parametrize("beams", [1, 3])
def test_evaluate_writes_its_files(trained, tmp_path, capsys, beams):
    published = [{"name": "someone else", "sequence_error_rate": 12.5, "note": "other data"}]
    config = yaml.safe_load((trained / "config.yaml").read_text()) | {"reference_results": published}
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    test = tmp_path / "test.tsv"
    test.write_text((TOY / "test.tsv").read_text() + "ab\tx y\nab\tb a\n")
    main(["evaluate", str(run), "--data", str(test), "--num-beams", str(beams), "--output", str(tmp_path / "out")])

    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values["sources"] == 21
    assert values["token_error_rate"] < 5
    lines = [line.split("\t") for line in (tmp_path / "out" / "predictions.tsv").read_text().splitlines()]
    assert lines[0] == ["source", "prediction", "references", "correct"]
    assert lines[-1][0] == "ab"
    assert lines[-1][2] == "x y | b a"
    assert len(lines) == 22
    right = sum(prediction in references.split(" | ") for _, prediction, references, _ in lines[1:])
    assert sum(int(line[3]) for line in lines[1:]) == right
    assert values["exact_match"] == pytest.approx(100 * right / 21)
    pictures = sorted((tmp_path / "out" / "attention").iterdir())
    assert [path.name for path in pictures] == ["0001.png", "0002.png", "0003.png", "0004.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    printed = capsys.readouterr().out
    assert f"{values['sequence_error_rate']:8.2f}" in printed
    assert "someone else" in printed
    assert "12.50" in printed


@pytest.mark.parametrize(("command", "files"), [("evaluate", ("--data", str(TOY / "test.tsv"))), ("generate", ())])
def test_beams_reach_the_decoder(trained, tmp_path, monkeypatch, command, files):
    beams = []

    def spy(*args, num_beams, **options):
        beams.append(num_beams)
        return decode(*args, num_beams=num_beams, **options)

    monkeypatch.setattr(decoding, "decode", spy)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    main([command, str(shutil.copytree(trained, tmp_path / "run")), *files, "--num-beams", "4"])
    assert set(beams) == {4}


def test_generate_reads_and_writes_lines(trained, tmp_path, monkeypatch, capsys):
    words = [line.split("\t")[0] for line in (TOY / "test.tsv").read_text().splitlines()]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join([*words[:3], "", *words[3:]]).encode())))
    main(["generate", str(trained), "--batch-lines", "5"])
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 22
    assert lines[3] == lines[21] == ""
    right = sum(line == " ".join(reversed(word)) for line, word in zip(lines[:3] + lines[4:21], words, strict=True))
    assert right >= 18


def test_generate_n_best_with_scores_and_pictures(trained, tmp_path):
    (tmp_path / "in.txt").write_text("abc\nde\n\n")
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    main(["generate", str(trained), *files, "--num-beams=4", "--n-best=3", "--plot-attention", str(tmp_path / "a")])
    lines = [line.split("\t") for line in (tmp_path / "out.txt").read_text().splitlines()]
    assert [len(line) for line in lines] == [2] * 6 + [1] * 3
    scores = [float(line[1]) for line in lines[:6]]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert scores[3:] == sorted(scores[3:], reverse=True)
    assert len({line[0] for line in lines[:3]}) == 3
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0001.png", "0002.png"]


def test_unknown_tokens_are_reported(trained, tmp_path, capsys):
    (tmp_path / "t.tsv").write_text("abz\tb a\n")
    main(["evaluate", str(trained), "--data", str(tmp_path / "t.tsv"), "--output", str(tmp_path)])
    assert "1 of 3 tokens are not in the vocabulary and are read as <unk>" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.precision", "bf16-mixed"),
        ("--trainer.patience", "0", "--optim.lr", "1e-9"),
        ("--trainer.monitor", "valid_bleu", "--data.text_metrics", "true"),
        ("--data.target_tokenizer", "bpe", "--data.vocab_size", "20"),
        ("--data.source_tokenizer", "whitespace", "--data.shared_vocabulary", "true"),
        ("--model.attention", "none", "--model.input_feeding", "false"),
    ],
    ids=["bf16", "early stopping", "BLEU", "BPE", "shared vocabulary", "no attention"],
)
def test_options_train(tmp_path, capsys, options):
    train(tmp_path / "run", *options, "--trainer.max_epochs", "2")
    main(["evaluate", str(tmp_path / "run"), "--data", str(TOY / "test.tsv"), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "evaluation.json").exists()


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> list[dict[str, str]]:
    run = tmp_path_factory.mktemp("two") / "run"
    train(run, "--trainer.max_epochs", "2")
    return rows(run)


@pytest.mark.parametrize(
    "option",
    [
        *("--optim.lr=0.02", "--optim.beta2=0.5", "--optim.weight_decay=0.9", "--optim.schedule=constant"),
        *("--optim.warmup=0.5", "--optim.label_smoothing=0", "--optim.teacher_forcing_ratio=0.2"),
        *("--optim.gradient_clip=0.01", "--seed=2", "--data.max_tokens=200", "--data.vocab_size=8"),
        *("--trainer.accumulate=2", "--trainer.log_every=2", "--data.valid_sentences=3", "--data.text_metrics=true"),
    ],
)
def test_every_option_has_an_effect(two_epochs, tmp_path, option):
    train(tmp_path / "run", "--trainer.max_epochs", "2", option)
    assert rows(tmp_path / "run") != two_epochs


def test_every_epoch_has_its_own_order(tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(TokenBatches, "set_epoch", lambda self, epoch: epochs.append(epoch))
    train(tmp_path / "run", "--trainer.max_epochs", "3")
    assert epochs == [0, 1, 2]


def test_threads_are_set(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(fit, "cores", lambda: 3)
    for given in ("3", "64"):
        train(tmp_path / given, "--trainer.max_epochs", "1", "--trainer.threads", given)
    assert threads == [3, 3]
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_a_seed_repeats(two_epochs, tmp_path):
    train(tmp_path / "run", "--trainer.max_epochs", "2")
    assert rows(tmp_path / "run") == two_epochs


def test_early_stopping_stops(tmp_path):
    train(tmp_path / "run", "--trainer.patience", "1", "--optim.lr", "0", "--trainer.max_epochs", "9")
    assert [row["epoch"] for row in rows(tmp_path / "run") if row["valid_loss"]] == ["0", "1"]


def test_one_update_an_epoch_is_reported_and_logged(tmp_path, capsys):
    defaults = ("--data.max_tokens", "4096", "--trainer.log_every", "20")
    train(tmp_path / "run", *defaults, "--trainer.max_epochs", "3")
    assert "warning: one update an epoch; lower --data.max_tokens (4096) for more" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run") if row["train_loss"]] == ["0", "1", "2"]


def test_each_epoch_logs_the_training_loss(tmp_path, capsys):
    """Epochs of 4 updates, every 6th logged: updates 6 and 12, and the last of epoch 1."""
    train(tmp_path / "run", "--trainer.log_every", "6", "--trainer.max_epochs", "3")
    assert "warning" not in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run") if row["train_loss"]] == ["3", "5", "11"]


def test_curves_of_one_update_are_visible():
    metrics = [{"step": "0", "train_loss": "2.5", "valid_loss": ""}, {"step": "0", "train_loss": "", "valid_loss": "2"}]
    left, right = curves_figure(metrics).axes
    assert [line.get_marker() for line in left.lines] == [".", "."]
    assert not right.lines
    assert right.get_legend() is None
    assert all(float(tick).is_integer() for tick in left.get_xticks())


def test_overwrite(trained, tmp_path, capsys):
    train(tmp_path / "run", "--trainer.max_epochs", "1")
    sentence = refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "run")
    assert "holds a run already" in sentence
    train(tmp_path / "run", "--trainer.max_epochs", "1", "--overwrite")
    assert [row["epoch"] for row in rows(tmp_path / "run") if row["valid_loss"]] == ["0"]


def test_bad_training_input_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "bad.tsv").write_text("a\tb\nc\n")
    run = ("--run_dir", tmp_path / "run")
    assert "bad.tsv, line 2" in refused(capsys, "train", *SMALL, *run, "--train", tmp_path / "bad.tsv")
    assert "--train is missing" in refused(capsys, "train", *run)
    assert "not a run folder" in refused(capsys, "train", "--resume", tmp_path)
    assert "unknown attention 'magic'" in refused(capsys, "train", *SMALL, *run, "--model.attention", "magic")
    monitor = ("--trainer.monitor", "valid_nothing", "--trainer.patience", "1")
    assert "choose one of" in refused(capsys, "train", *SMALL, *run, *monitor)
    assert not (tmp_path / "run").exists()
    shared = ("--data.shared_vocabulary", "true")
    assert "one kind of tokenizer" in refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "other", *shared)


def test_bad_run_folders_get_a_sentence(copied, tmp_path, capsys):
    test = ("--data", TOY / "test.tsv")
    assert "is not a run folder" in refused(capsys, "evaluate", tmp_path / "nowhere", *test)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["model"]["hidden_size"] = 32
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (["evaluate", copied, *test], ["generate", copied], ["train", "--resume", copied]):
        sentence = refused(capsys, *command)
        assert "does not fit the configuration" in sentence
        assert "expected (" in sentence
    (copied / "checkpoints" / "best.ckpt").write_bytes(b"nonsense")
    assert "is damaged" in refused(capsys, "evaluate", copied, *test)
    (copied / "checkpoints" / "best.ckpt").unlink()
    assert "has no checkpoint best.ckpt" in refused(capsys, "evaluate", copied, *test)
    (copied / "source_tokenizer.json").unlink()
    assert "source_tokenizer.json is missing" in refused(capsys, "generate", copied)


def test_bad_generate_options_get_a_sentence(trained, tmp_path, capsys):
    assert "give --num-beams 3" in refused(capsys, "generate", trained, "--n-best", "3", "--num-beams", "2")
    assert "cannot be read" in refused(capsys, "generate", trained, "--input", tmp_path / "missing.txt")
    (tmp_path / "bytes.txt").write_bytes(b"ab\n\xff\n")
    assert "bytes.txt, line 2" in refused(capsys, "generate", trained, "--input", tmp_path / "bytes.txt")


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", {0: 1 / 11, 5: 6 / 11, 10: 1.0, 99: 1.0}),
        ("cosine", {0: 1 / 11, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("one_cycle", {0: 1 / 25, 5: (1 + 1 / 25) / 2, 10: 1.0, 100: 1 / 250_000}),
    ],
)
def test_learning_rate_schedules(schedule, factors):
    found = {step: learning_rate_factor(schedule, step, 100, 0.1) for step in factors}
    assert found == pytest.approx(factors)
