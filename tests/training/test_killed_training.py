"""A training killed by SIGKILL at any stage, and resumed, ends with the weights and metrics of an undisturbed one."""

from pathlib import Path

import pytest
import torch
from killing import STAGES, killed
from toy_runs import SMALL

from fastseq.cli import main
from fastseq.training.plots import read_metrics

OPTIONS = (
    *("--trainer.max_epochs", "2", "--trainer.keep", "1", "--trainer.threads", "1"),
    *("--model.dropout", "0.2", "--optim.ema", "0.9", "--optim.teacher_forcing_ratio", "0.8"),
)


def state(run: Path) -> dict[str, object]:
    """All that a run leaves: the tensors of each checkpoint, metrics.csv, the names of the files."""
    names = sorted(str(file.relative_to(run)) for file in run.rglob("*") if "tensorboard" not in file.parts)
    left: dict[str, object] = {"names": names, "metrics": (run / "metrics.csv").read_bytes()}
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        moments = checkpoint["optimizer_states"][0]["state"]
        left[path.name] = [
            *checkpoint["state_dict"].values(),
            *checkpoint["raw_weights"].values(),
            *(tensor for parameter in moments.values() for tensor in parameter.values()),
            checkpoint["random_states"][0]["cpu"],
        ]
    return left | {path.name: path.read_bytes() for path in run.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    main(["train", *SMALL, *OPTIONS, "--run_dir", str(run)])
    return state(run)


def assert_equal(run: Path, undisturbed: dict[str, object]) -> None:
    after = state(run)
    assert after.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        if name.endswith(".ckpt"):
            assert all(map(torch.equal, after[name], value)), name
        else:
            assert after[name] == value, name


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_after_a_kill(stage, undisturbed, tmp_path, capsys):
    run, command = tmp_path / "run", [*SMALL, *OPTIONS, "--run_dir", str(tmp_path / "run")]
    killed(stage, *command)
    begun = any((run / "checkpoints").glob("*.ckpt"))
    resumes = (run / "config.yaml").exists()
    main(["train", *(["--resume", str(run)] if resumes else command)])
    assert ("training starts from the beginning" in capsys.readouterr().out) == (resumes and not begun)
    assert_equal(run, undisturbed)


def test_killed_again_while_resuming(undisturbed, tmp_path):
    run = tmp_path / "run"
    killed("middle of an epoch", *SMALL, *OPTIONS, "--run_dir", str(run))
    for stage in ("config.yaml", "rows of metrics.csv"):
        killed(stage, "--resume", str(run))
    main(["train", "--resume", str(run)])
    assert_equal(run, undisturbed)


def test_half_a_row_is_no_row(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\r\n0,10,0.5\r\n0,1")
    assert read_metrics(tmp_path / "metrics.csv") == [{"epoch": "0", "step": "10", "train_loss": "0.5"}]
