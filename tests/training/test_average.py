"""Weights kept by --trainer.keep, and their mean by `fastseq average`."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import TOY, refused, train

from fastseq.cli import main
from fastseq.training.folder import RunFolder
from fastseq.training.saved import kept_weights
from fastseq.training.trained import TrainedModel


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("kept") / "run"
    train(run, "--trainer.max_epochs", "4", "--trainer.keep", "3")
    return run


def names(run: Path) -> list[str]:
    return [path.name for path in kept_weights(run / "checkpoints")]


def test_the_last_weights_are_kept(run):
    assert names(run) == [f"weights-{update:010d}.safetensors" for update in (8, 12, 16)]
    latest = load_file(kept_weights(run / "checkpoints")[-1])
    expected = RunFolder(run).load_model("last").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in latest.items())


def test_nothing_is_kept_by_default(barely_trained):
    assert names(barely_trained) == []


def test_the_mean(run, capsys):
    for last in (3, 2):
        main(["average", str(run), "--last", str(last)])
        assert f"the mean of {last}, " in capsys.readouterr().out
        found = TrainedModel.from_pretrained(run / "averaged").model.state_dict()
        parts = [load_file(path) for path in kept_weights(run / "checkpoints")[-last:]]
        for name, tensor in found.items():
            mean = torch.stack([part[name].double() for part in parts]).mean(0)
            assert torch.equal(tensor, mean.float())
    main(["evaluate", str(run / "averaged"), "--data", str(TOY / "test.tsv"), "--pictures", "0"])


def test_all_by_default_and_another_folder(run, tmp_path):
    main(["average", str(run), "--output", str(tmp_path / "all")])
    main(["average", str(run), "--last", "3", "--output", str(tmp_path / "three")])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "three")]
    assert files[0] == files[1]
    assert (tmp_path / "all" / "target_tokenizer.json").read_text() == (run / "target_tokenizer.json").read_text()


def test_a_resumed_run_keeps_the_same(run, tmp_path):
    train(tmp_path / "parts", "--trainer.max_epochs", "2", "--trainer.keep", "3", "--optim.schedule", "constant")
    main(["train", "--resume", str(tmp_path / "parts"), "--trainer.max_epochs", "4"])
    assert names(tmp_path / "parts") == names(run)
    main(["train", "--resume", str(tmp_path / "parts"), "--trainer.max_epochs", "5", "--trainer.keep", "1"])
    assert names(tmp_path / "parts") == ["weights-0000000020.safetensors"]


def test_bad_input(run, barely_trained, capsys, tmp_path):
    assert "has kept the weights of 3 validations, not of 4" in refused(capsys, "average", run, "--last", 4)
    sentence = refused(capsys, "average", barely_trained)
    assert "has kept the weights of 0 validations, not of 1; train with --trainer.keep 1" in sentence
    assert "holds a run" in refused(capsys, "average", run, "--output", barely_trained)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    kept_weights(copy / "checkpoints")[1].write_bytes(b"damaged")
    sentence = refused(capsys, "average", copy, "--output", tmp_path / "x")
    assert "weights-0000000012.safetensors is not a safetensors file" in sentence
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_the_run_resumable(tmp_path, monkeypatch, capsys):
    def full(path, content):
        path.with_name(path.name + ".partial").touch()
        raise OSError(28, "No space left on device")

    train(tmp_path / "run", "--trainer.max_epochs", "1")
    monkeypatch.setattr("fastseq.training.saved.write_bytes", full)
    arguments = ("--trainer.max_epochs", 2, "--trainer.keep", 1)
    sentence = refused(capsys, "train", "--resume", tmp_path / "run", *arguments)
    assert "could not be written" in sentence and "--resume" in sentence
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
