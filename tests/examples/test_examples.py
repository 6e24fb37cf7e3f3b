"""The scripts of examples/, each run as a user runs it, with fewer steps."""

import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from toy_runs import TOY, train

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 60


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example with arguments -> its standard output."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text().splitlines()) < MOST_LINES
    assert f'run("{path.name}"' in Path(__file__).read_text()


def test_swap_in(run):
    out = run("swap_in.py", "--steps", "51")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert "lstm    nn.LSTM  yes      now fastseq.LSTM" in out
    assert losses[-1] < 0.6 * losses[0]
    assert float(re.search(r"largest difference to nn.LSTM: (\S+)", out)[1]) < 1e-4


def test_train_seq2seq(run):
    out = run("train_seq2seq.py", "--steps", "80")
    assert int(re.search(r"(\d+) of 100 numbers reversed", out)[1]) > 50


def test_decode(run, tmp_path, monkeypatch, capsys):
    train(tmp_path / "run", "--trainer.max_epochs", "1")
    capsys.readouterr()
    sources = [line.partition("\t")[0] for line in (TOY / "test.tsv").read_text().splitlines()[:3]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(sources)))
    out = run("decode.py", str(tmp_path / "run"), "--n-best", "2")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == list("112233")
    scores = [float(row[1]) for row in rows]
    assert all(best >= second for best, second in zip(scores[::2], scores[1::2], strict=True))


def test_time_model(run):
    out = run("time_model.py", "--rounds", "1")
    assert re.search(r"inference: [\d.]+ ms -> [\d.]+ ms, [\d.]+ times as fast\ntraining: ", out)
