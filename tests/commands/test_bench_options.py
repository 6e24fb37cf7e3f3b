"""Options of ``fastseq bench`` beside a suite: own shapes and models, lists, resumed runs, comparisons, charts."""

import json
import re
import sys

import pytest
import torch
from tiny_bench import TINY, plant
from torch import nn

from fastseq.bench import cases as bench_cases
from fastseq.bench import grid, plot, runs
from fastseq.bench import main as bench
from fastseq.bench.cases import SUITES
from fastseq.bench.timing import measure
from fastseq.errors import UserError
from fastseq.nn import accelerate as accelerate_function
from fastseq.testing.problems import modules

accelerate_module = sys.modules[accelerate_function.__module__]
SUITES_OF = bench.suites_of(quick=False)


def ratios_below(err):
    return [line for line in err.splitlines() if line.startswith("below ")]


def test_own_shapes_are_measured_in_place_of_a_suite(tmp_path, capsys, small):
    options = ["--seconds", "0", "--backends", "reference", "--mode", "inference", "--output", str(tmp_path / "own")]
    form = ["--layers", "2", "--bidirectional", "--dtype", "float64"]
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--shape", "3,2,4,5", "--shape", "1,1,1,1", *form, *options, "--fail-under", "1e9"])
    assert stopped.value.code == 1
    rows = json.loads((tmp_path / "own.json").read_text())["rows"]
    names = [f"lstm {shape} f64 2-layer bidirectional" for shape in ((3, 2, 4, 5), (1, 1, 1, 1))]
    assert [row["case"] for row in rows if row["candidate"] == "reference"] == names
    below = ratios_below(capsys.readouterr().err)
    assert [line.split(": ")[1].split(", inference")[0] for line in below] == names, "the baseline is never below"
    bench.main(["--shape", "3,2,4,5", *options, "--fail-under", "0"])
    assert not ratios_below(capsys.readouterr().err)


class Tagger(nn.Module):
    """A model with dropout, whose outputs are nested."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5, 2, dropout=0.5), nn.Linear(5, 3)

    def forward(self, x, lengths):
        output, hx = self.lstm(x)
        return {"scores": self.out(output), "state": hx, "lengths": lengths}


def tagger():
    return Tagger(), (torch.randn(3, 2, 4), torch.tensor([3, 2]))


def test_a_model_is_measured_before_and_after_accelerate(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "mymodels", sys.modules[__name__])
    run = ["--model", "mymodels:tagger", "--seconds", "0", "--output", str(tmp_path / "own")]
    bench.main(run)
    rows = json.loads((tmp_path / "own.json").read_text())["rows"]
    assert [(r["mode"], r["candidate"]) for r in rows] == [
        (mode, name) for mode in ("inference", "training") for name in ("as it is", "auto")
    ]
    assert "| mymodels:tagger | training " in capsys.readouterr().out
    plant("lstm", True, monkeypatch)
    monkeypatch.setitem(accelerate_module._SWAPS, nn.LSTM, modules.LSTM)
    with pytest.raises(SystemExit) as stopped:
        bench.main(run)
    assert stopped.value.code == 1
    assert "WRONG, no figure: mymodels:tagger: grad lstm" in capsys.readouterr().out
    monkeypatch.setattr(sys.modules[__name__], "tagger", lambda: (nn.Linear(4, 4), torch.randn(2, 4)))
    with pytest.raises(UserError, match="swaps none of its modules"):
        bench.main(run)


def test_a_list_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench, "times", None)
    bench.main(["--list", "--suite", "headline", "--filter", "dot"])
    assert capsys.readouterr().out == "dot attention: dot (16, 50, 50, 256)\n"


def test_an_interrupted_run_is_resumed(tmp_path, capsys, small, monkeypatch):
    measured = []
    monkeypatch.setattr(
        bench, "measure", lambda setup, *args: measured.append(setup.case.name) or measure(setup, *args)
    )
    run = ["--seconds", "0", "--backends", "reference", "--output", str(tmp_path / "grid"), "--resume"]
    bench.main([*run, "--filter", TINY.name, "--mode", "training"])
    bench.main([*run, "--minutes", "0"])
    assert "stopped after --minutes 0: 3 measurements are missing" in capsys.readouterr().out
    bench.main(run)
    out = capsys.readouterr().out
    assert "missing" not in out
    names = [case.name for case in SUITES["quick"][0]]
    assert measured == [TINY.name, TINY.name, names[1], names[1]]
    content = json.loads((tmp_path / "grid.json").read_text())
    assert len({(row["case"], row["mode"], row["candidate"]) for row in content["rows"]}) == len(content["rows"]) == 8
    content["environment"]["cpu"] = "another"
    (tmp_path / "grid.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"grid.json was measured with cpu another, this run has .*another --output"):
        bench.main(run)


def test_compare_lists_the_ratios_that_moved_beyond_noise():
    def row(case, ratio, spread=0.01, candidate="auto"):
        times = {"median_ms": 1.0, "p20_ms": 1 - spread, "p80_ms": 1 + spread}
        return {"case": case, "mode": "training", "candidate": candidate, "baseline": "nn", "ratio": ratio, **times}

    old = {
        "rows": [row("same", 1.0), row("noisy", 1.0, 0.3), row("slow", 2.0), row("fast", 1.0), row("same", 1, 0, "nn")]
    }
    new = {"rows": [row("same", 1.04), row("noisy", 1.2), row("slow", 1.0), row("fast", 1.5), row("new", 1.0)]}
    new["rows"].append(row("same", 9, 0, "nn"))
    text = runs.compare(old, new)
    assert re.findall(r"^\| (\w+) .* (slower|faster) +\|$", text, re.MULTILINE) == [
        ("slow", "slower"),
        ("fast", "faster"),
    ]
    assert text.endswith("2 ratios moved beyond noise, 2 did not, 1 are not in the old run.")


def test_charts_are_drawn_from_a_saved_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = []
    for hidden, batch in ((64, 8), (128, 8), (256, 8), (256, 16), (256, 32)):
        for candidate, median in (("nn.LSTM", 2.0), ("auto", 1.0)):
            times = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median, "rounds": 5}
            facts = {"group": "g", "mode": "inference", "goal": 0.97, "baseline": "nn.LSTM", "served_by": "native"}
            bound = {"roofline_ms": 0.5, "over_roofline": 2 * median}
            case = {"case": f"lstm (50, {batch}, {hidden}, {hidden})", "candidate": candidate, "ratio": 2 / median}
            rows.append(case | facts | times | bound)
    run = {"environment": {"cpu": "a processor"}, "rows": rows, "remarks": ["one remark"]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    bench.main(["--read", str(tmp_path / "run.json"), "--plot", str(tmp_path / "charts")])
    out = capsys.readouterr().out
    assert "a processor" in out
    assert "one remark" in out
    names = {path.name for path in (tmp_path / "charts").iterdir()}
    assert names == {"ratio.png", "time_over_hidden_size.png", "time_over_batch.png", "over_roofline.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "charts").iterdir())
    assert [len(lines["auto"]) for _, lines in plot._sweep_groups(rows, "H")] == [3]
    assert plot.draw([], tmp_path / "none") == []


def test_compare_refuses_other_files(tmp_path):
    for name, content in (("no.json", "{"), ("list.json", "[]"), ("memory.json", '{"memory": []}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} holds no times of fastseq bench"):
            bench.main(["--compare", str(tmp_path / name)])


def test_the_grid_covers_the_range():
    grid_cases = SUITES_OF["grid"][0]
    assert 140 <= len(grid_cases) <= 180
    assert len({case.name for case in grid_cases}) == len(grid_cases)
    for attribute, values in (("steps", grid.STEPS), ("batch", grid.BATCHES), ("hidden_size", grid.HIDDEN)):
        assert {getattr(case, attribute) for case in grid_cases} >= set(values), attribute
    assert {case.dtype for case in grid_cases} == set(bench_cases.SHORT)
    assert {(case.layers, case.bidirectional) for case in grid_cases} >= {(1, False), (1, True), (2, True), (3, False)}
    assert max(map(grid.flops, grid_cases)) < 1e10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "3,2,4"], "expected T,B,I,H, four numbers of at least 1, got '3,2,4'"),
        (["--shape", "3,2,4,x"], "four numbers"),
        (["--shape", "3,2,4,5,5"], "expected T,B,I,H,P with P below H, got '3,2,4,5,5'"),
        (["--layers", "0", "--shape", "1,1,1,1"], "--layers must be at least 1"),
        (["--resume"], "give its --output"),
        (["--backends", "cudnn"], "unknown name 'cudnn'"),
        (["--filter", "zzz"], "matches no case"),
        (["--threads", "0"], "at least 1"),
        (["--baselines", "jax"], "unknown name 'jax'"),
        (["--backends", ""], "at least one"),
        (["--suite", "tpu"], "invalid choice"),
    ],
)
def test_bad_options_get_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
