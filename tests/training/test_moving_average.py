"""`--optim.ema`: the average of the weights is evaluated and saved, and a resumed run goes on exactly."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import TOY, refused, rows, train

from fastseq.cli import main
from fastseq.training.data import read_pairs
from fastseq.training.folder import RunFolder
from fastseq.training.moving_average import RAW, MovingAverage, decay_at
from fastseq.training.saved import kept_weights
from fastseq.training.task import Seq2SeqTask
from fastseq.training.trained import TrainedModel

EMA = ("--trainer.max_epochs", "3", "--optim.ema", "0.9", "--trainer.keep", "1")


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return RunFolder(run).load_model(name).state_dict()


def stopped_at(batch: int, monkeypatch, run: Path, *options: str) -> None:
    """Train until a signal arrives in this batch."""
    step = Seq2SeqTask.training_step

    def disturbed(self, given, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == batch:
            signal.raise_signal(signal.SIGINT)
        return step(self, given, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Seq2SeqTask, "training_step", disturbed)
        with pytest.raises(SystemExit):
            train(run, *options)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with the average, and its weights before the first and after each update."""
    run, history = tmp_path_factory.mktemp("ema") / "run", []
    start, update = MovingAverage.on_train_start, MovingAverage.on_train_batch_end

    def record(method):
        def wrapped(self, trainer, task, *arguments):
            history.append({name: p.detach().double().clone() for name, p in task.model.named_parameters()})
            return method(self, trainer, task, *arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MovingAverage, "on_train_start", record(start))
        patch.setattr(MovingAverage, "on_train_batch_end", record(update))
        train(run, *EMA)
    return run, history


def test_the_saved_weights_are_the_average(recorded):
    run, history = recorded
    assert len(history) == 13
    average = history[0]
    for number, values in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * values[name] for name in average}
    found = weights(run)
    for name, expected in average.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(found[name].double(), history[-1][name]) for name in found)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(tensor.double(), history[-1][name]) for name, tensor in checkpoint[RAW].items())
    (kept,) = kept_weights(run / "checkpoints")
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(kept).items())


def test_the_average_is_evaluated(recorded):
    run, _ = recorded
    trained = TrainedModel.from_pretrained(run, checkpoint="last")
    scores = trained.score(list(zip(*read_pairs(TOY / "valid.tsv"), strict=True)))
    tokens = [value for score in scores for value in score.token_scores]
    logged = [row["valid_loss"] for row in rows(run) if row["valid_loss"]][-1]
    assert float(logged) == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5)


def test_training_itself_is_unchanged(recorded, tmp_path):
    """The average has no influence on the updates: the training losses are the ones of a run without it."""
    train(tmp_path / "plain", "--trainer.max_epochs", "3")
    losses = [
        [row["train_loss"] for row in rows(run) if row["train_loss"]] for run in (recorded[0], tmp_path / "plain")
    ]
    assert losses[0] == losses[1]
    assert rows(recorded[0]) != rows(tmp_path / "plain")
    checkpoint = torch.load(recorded[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(tensor, checkpoint[RAW][name]) for name, tensor in weights(tmp_path / "plain").items())


@pytest.mark.parametrize("batch", [1, 5, 7])
@pytest.mark.usefixtures("interrupts")
def test_resume_is_exact(recorded, tmp_path, monkeypatch, batch):
    stopped_at(batch, monkeypatch, tmp_path / "run", *EMA)
    main(["train", "--resume", str(tmp_path / "run")])
    assert rows(tmp_path / "run") == rows(recorded[0])
    for name in ("best", "last"):
        found = weights(tmp_path / "run", name)
        assert all(torch.equal(tensor, found[key]) for key, tensor in weights(recorded[0], name).items())


def test_accumulated_batches_move_it_once(tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda average, values, weight: moves.append(weight))
    options = (
        "--trainer.max_epochs",
        "1",
        "--optim.ema",
        "0.5",
        "--trainer.accumulate",
        "2",
        "--data.max_tokens",
        "150",
    )
    train(tmp_path / "run", *options)
    assert moves == [1 - decay_at(0.5, number) for number in range(1, len(moves) + 1)]
    assert len(moves) == 4


def test_tied_matrices(tmp_path):
    options = (
        "--data.shared_vocabulary",
        "true",
        "--data.target_tokenizer",
        "char",
        "--model.share_all_embeddings",
        "true",
    )
    options += ("--model.embedding_dim", "32", *EMA)
    train(tmp_path / "run", *options)
    found = weights(tmp_path / "run")
    assert torch.equal(found["encoder.embedding.weight"], found["decoder.output.weight"])
    main(["train", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "4"])


def test_damaged_weights_beside_the_average(recorded, tmp_path, capsys):
    import shutil

    copy = Path(shutil.copytree(recorded[0], tmp_path / "copy"))
    path = copy / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    name = "decoder.output.bias"
    for wrong in ({}, None, checkpoint[RAW] | {name: torch.zeros(3)}, checkpoint[RAW] | {name: "x"}):
        torch.save(checkpoint | {RAW: wrong}, path)
        sentence = refused(capsys, "train", "--resume", copy, "--trainer.max_epochs", 4)
        assert f"cannot be resumed: {RAW}" in sentence
    assert "cannot change to 0.5" in refused(capsys, "train", "--resume", copy, "--optim.ema", "0.5")
