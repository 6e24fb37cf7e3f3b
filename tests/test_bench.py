"""``fastseq bench``: what it measures, and that it measures nothing that is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from fastseq import bench

TINY = bench.Case("tiny", 3, 2, 4, 5)


@pytest.mark.parametrize("kind", ["padded", "packed", "lengths", "cell"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_rows_name_who_served_and_the_ratio(kind, train):
    peer, ours = bench.measure(replace(TINY, kind=kind), ("reference",), train, 0.0)
    assert (peer["backend"], peer["ratio"], ours["served_by"]) == ("nn", 1.0, "reference")
    assert ours["ratio"] == pytest.approx(peer["median_ms"] / ours["median_ms"])
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_no_figure_for_a_wrong_result(train, monkeypatch):
    class Wrong(bench.LSTM):
        def forward(self, *args, **kwargs):
            output, states = super().forward(*args, **kwargs)
            return output + (1e-3 * output.square() if train else 1e-3), states

    monkeypatch.setattr(bench, "LSTM", Wrong)
    with pytest.raises(AssertionError, match="exceeds"):
        bench.measure(TINY, ("reference",), train, 0.0)


def test_command_writes_both_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CASES", (TINY, replace(TINY, name="half", dtype=torch.bfloat16)))
    bench.main(["--seconds", "0", "--backends", "reference", "--output", str(tmp_path / "v1.2")])
    assert "| tiny | training | reference | reference |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "v1.2.json").read_text())["rows"]) == 8
    assert (tmp_path / "v1.2.md").read_text().count("\n| half ") == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--backends", "cudnn"], "cudnn"), (["--filter", "zzz"], "fits none")]
)
def test_bad_options_get_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
