"""``fastseq bench``: its measurements, and that a wrong result gets no figure."""

import json
import re
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import hopper_model
import pytest
import torch
from torch import nn

from fastseq import ops
from fastseq.bench import cases as bench_cases
from fastseq.bench import grid, plot, roofline, runs, timing
from fastseq.bench import main as bench
from fastseq.bench.baselines import BASELINES, make_baselines
from fastseq.bench.cases import CASES, SUITES, BenchCase
from fastseq.bench.memory import saved_bytes
from fastseq.bench.timing import Setup, check_accuracy, measure, time_interleaved
from fastseq.errors import UserError
from fastseq.nn import accelerate as accelerate_function
from fastseq.testing.problems import modules

accelerate_module = sys.modules[accelerate_function.__module__]
SUITES_OF = bench.suites_of(quick=False)
ROOT = Path(__file__).resolve().parents[2]
TINY = BenchCase("tiny", "lstm", 3, 2, 4, 5)
TINY_ATTENTION = BenchCase("tiny", "additive", 3, 2, 4, 4, keys=6)
TINY_LOSS = BenchCase("tiny", "loss", 1, 3, 4, 4, classes=50)
KINDS = ["lstm", "packed", "lengths", "cell", "additive", "dot", "loss"]


def tiny(kind):
    return replace({"additive": TINY_ATTENTION, "dot": TINY_ATTENTION, "loss": TINY_LOSS}.get(kind, TINY), kind=kind)


@pytest.fixture
def small(monkeypatch):
    """A suite of two cases, and no time."""
    monkeypatch.setattr(timing, "SAMPLE_MS", 1e-3)
    monkeypatch.setitem(SUITES, "quick", ((TINY, replace(TINY_ATTENTION, dtype=torch.bfloat16)), "for tests"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_rows_name_who_served_and_the_ratio(kind, train, small):
    (baseline, ours), remarks = measure(Setup(tiny(kind)), ("reference",), train, 0.0)
    assert (baseline.candidate, baseline.ratio, remarks) == (bench_cases.KINDS[kind][0], 1.0, [])
    assert (ours.candidate, ours.served_by, ours.rounds) == ("reference", "reference", timing.ROUNDS)
    assert ours.ratio > 0
    assert ours.p20_ms <= ours.median_ms <= ours.p80_ms


def test_served_by_belongs_to_the_timed_mode(small):
    setup = Setup(BenchCase("", "lstm", 50, 1, 8, 8, dtype=torch.bfloat16))
    for train in (False, True):
        with timing.record() as choices, torch.set_grad_enabled(train):
            setup.make("auto")(**setup.arguments)
        assert measure(setup, ("auto",), train, 0.0)[0][1].served_by == choices[0].backend


def plant(kind, train, monkeypatch):
    """Replace fastseq's module of this kind by one 0.1 % off: in its first output or, in training, its gradient."""
    of_kind = {"cell": "LSTMCell", "additive": "attention", "dot": "attention", "loss": "linear_cross_entropy"}
    name = of_kind.get(kind, "LSTM")
    place = ops if name.islower() else modules
    right = getattr(place, name)

    def bent(result):
        """The same nested result, its first tensor off by 0.1 %; in training, only the gradient of it."""
        if isinstance(result, torch.Tensor):
            return bent((result,))[0]
        first, *rest = result
        if hasattr(first, "batch_sizes"):
            return first._replace(data=bent((first.data,))[0]), *rest
        return (first + 1e-3 * (first - first.detach()) if train else first * 1.001), *rest

    if name.islower():
        monkeypatch.setattr(place, name, lambda *args, **kwargs: bent(right(*args, **kwargs)))
    else:

        class Wrong(right):
            def forward(self, *args, **kwargs):
                return bent(super().forward(*args, **kwargs))

        monkeypatch.setattr(place, name, Wrong)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_figure_for_a_wrong_result(kind, train, small, monkeypatch):
    plant(kind, train, monkeypatch)
    with pytest.raises(AssertionError, match="exceeds"):
        measure(Setup(tiny(kind)), ("reference",), train, 0.0)


def test_a_refusal_is_a_remark(small):
    timings, remarks = measure(Setup(TINY), ("triton",), True, 0.0)
    assert len(timings) == 1
    assert len(remarks) == 1
    assert remarks[0].startswith(f"{TINY.name}: lstm: the triton backend")


def test_ratio_is_the_median_over_rounds():
    """Load that slows whole rounds cancels, and a candidate that takes twice the time reads 0.5."""
    assert timing._timing("own", "own", [1, 10, 1, 10, 10], [2, 20, 2, 20, 20]).ratio == 2.0
    times = time_interleaved({"baseline": lambda: 4.0, "own": lambda: 8.0}, 0.0, clock=lambda run, count: count * run())
    assert timing._timing("own", "own", times["own"], times["baseline"]).ratio == 0.5


def test_candidates_take_turns(monkeypatch):
    """Two calls to warm up, then each candidate once a round, in random order."""
    calls = []

    def clock(run, count):
        run()
        return timing.SAMPLE_MS * count

    monkeypatch.setattr(timing, "ROUNDS", 33)
    time_interleaved({name: partial(calls.append, name) for name in "abc"}, 0.0, clock)
    assert "".join(calls[:6]) == "aabbcc"
    rounds = ["".join(calls[k : k + 3]) for k in range(6, len(calls), 3)]
    assert len(rounds) == 33
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_roofline_counts_every_product_once(monkeypatch):
    monkeypatch.setattr(roofline, "peak", lambda dtype: 1e9)
    monkeypatch.setattr(roofline, "bandwidth", lambda size: 1e12)
    flops = 2 * 3 * 2 * (4 * 5) * (4 + 5)  # 2 T B 4H (I + H)
    assert roofline.roofline_ms(TINY, train=False) == pytest.approx(flops / 1e6)
    assert roofline.roofline_ms(TINY, train=True) == pytest.approx(3 * flops / 1e6)
    stacked = replace(TINY, layers=2, bidirectional=True)
    assert roofline.roofline_ms(stacked, False) == pytest.approx(2 * 2 * 3 * 2 * 20 * (4 + 5 + 10 + 5) / 1e6)
    rows = int(bench_cases.case_lengths(replace(TINY, kind="packed")).sum())
    assert roofline.roofline_ms(replace(TINY, kind="packed"), False) == pytest.approx(2 * rows * 20 * 9 / 1e6)
    projected = 2 * 3 * 2 * (20 * (4 + 3) + 3 * 5)
    assert roofline.roofline_ms(replace(TINY, proj_size=3), False) == pytest.approx(projected / 1e6)


def test_roofline_of_a_skinny_batch_is_the_reading_of_the_weights(monkeypatch):
    monkeypatch.setattr(roofline, "peak", lambda dtype: 1e15)
    monkeypatch.setattr(roofline, "bandwidth", lambda size: 1e9)
    w_ih, w_hh = 4 * 20 * 4, 4 * 20 * 5  # bytes
    assert roofline.roofline_ms(TINY, train=False) == pytest.approx((w_ih + 3 * w_hh) / 1e6)
    assert roofline.roofline_ms(TINY, train=True) == pytest.approx((3 * w_ih + 6 * w_hh + w_hh) / 1e6)


def test_no_roofline_for_a_gpu_and_attention():
    assert roofline.has_roofline(TINY) == hasattr(torch.ops.fastseq, "cpu_fma_chain")
    assert not roofline.has_roofline(replace(TINY, device="cuda"))
    assert not roofline.has_roofline(TINY_ATTENTION)


def test_bandwidth_is_a_rate():
    assert 1e8 < roofline.bandwidth(2**20) < 1e13


def test_suites():
    """Names are unique, and the CPU suite holds every row with a goal of the project."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    cpu = {case.name: case.goals for case in SUITES["cpu"][0]}
    assert cpu["lstm (50, 1, 256, 256)"] == (1.6, 1.8)
    assert cpu["lstm (100, 16, 1024, 1024) 2-layer bidirectional"] == (1.1, 1.1)
    assert cpu["packed (25, 128, 512, 512)"] == (1.35, 1.4)
    assert cpu["additive (8, 100, 100, 512)"][1] == 25
    assert cpu["cell (1, 512, 512)"][0] == 1.8
    assert {case.name for case in SUITES["quick"][0]} <= cpu.keys()
    assert sum(case.group == "bfloat16" for case in SUITES["cpu"][0]) == 6


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_table_of_the_readme_holds_measured_ratios(page):
    """Its rows are the suite "headline"; the columns are two files of benchmarks/results, one thread each."""
    rows = re.findall(r"^\| (\w+ \([^|]*) \| ([^|]*) \|((?: [\d.]+ \|){4})$", (ROOT / page).read_text(), re.MULTILINE)
    assert [case for case, *_ in rows] == [case.name for case in SUITES["headline"][0]]
    results = [
        json.loads((ROOT / f"benchmarks/results/headline-xeon-{name}1thread.json").read_text())
        for name in ("", "avx2-")
    ]
    for case, baseline, figures in rows:
        measured = [r for result in results for r in result["rows"] if (r["case"], r["candidate"]) == (case, "auto")]
        assert [r["mode"] for r in measured] == ["inference", "training"] * 2
        assert re.findall(r"[\d.]+", figures) == [f"{r['ratio']:.2f}" for r in measured]
        assert baseline.removesuffix(" attention") == measured[0]["baseline"]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_whole_models_of_the_readme_hold_measured_means(page):
    """Geometric means of the four models of G2P size, by instruction set."""
    rows = re.findall(r"^\| (AVX\S+) \|((?: [\d.]+ \|){4})$", (ROOT / page).read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["AVX-512", "AVX2"]
    for (_, figures), name in zip(rows, ("", "-avx2"), strict=True):
        result = json.loads((ROOT / f"benchmarks/results/seq2seq-g2p-xeon{name}-1thread.json").read_text())
        ratios = {}
        for row in result["rows"]:
            if row["candidate"] == "fastseq":
                ratios.setdefault(row["mode"], []).append(row["ratio"])
        assert [len(several) for several in ratios.values()] == [4] * 4
        assert re.findall(r"[\d.]+", figures) == [f"{statistics.geometric_mean(r):.2f}" for r in ratios.values()]


def test_gpu_cases_start_with_the_most_informative():
    """A run that is cut short has every kind in bfloat16 at middle sizes; no combination is missing."""
    cases = SUITES["cuda-full"][0]
    assert SUITES["cuda"][0] == cases[:40]
    assert cases[0].name == "lstm (256, 16, 512, 512) bf16 cuda"
    assert {case.kind for case in cases[:20]} == {"lstm", "packed", "cell", "additive", "dot"}
    assert cases[-1].name == "lstm (256, 128, 192, 192) 2-layer bidirectional cuda"
    lstm = {(c.kind, c.layers, c.hidden_size, c.batch, c.dtype, c.tf32) for c in cases if c.kind in ("lstm", "packed")}
    assert len(lstm) == 3 * 8 * 4 * 4


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_case_differs_in_device_alone(kind, train, small, monkeypatch):
    """On a GPU the engine moves modules and inputs, and uses the GPU's events; here a CPU clock replaces them."""
    setup, calls = Setup(replace(tiny(kind), device="meta")), []
    assert {t.device.type for t in setup.leaves(setup.baseline).values()} == {"meta"}
    assert all(t.is_leaf and t.requires_grad for t in setup.inputs.values())

    def clock(run, count):
        calls.append(count)
        run()
        return 5.0

    monkeypatch.setitem(timing.CLOCKS, "cpu", clock)
    timings, _ = measure(Setup(tiny(kind)), ("reference",), train, 0.0)
    assert [t.median_ms for t in timings] == [5.0, 5.0]
    assert calls


def test_float32_products_are_set_and_restored(small, monkeypatch):
    seen, flags = [], (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    monkeypatch.setattr(timing, "check_accuracy", lambda *_: seen.append([flag.allow_tf32 for flag in flags]))
    for tf32 in (False, True):
        measure(Setup(replace(TINY, tf32=tf32)), ("reference",), False, 0.0)
    assert seen == [[False, False], [True, True]]
    assert [flag.allow_tf32 for flag in flags] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--suite", "cuda"])
    assert stopped.value.code == 2
    assert "--suite cuda needs a GPU and a torch built for it; torch finds none" in capsys.readouterr().err


LIMITS = {  # microseconds per step of the best design, as first derived on paper
    ("bf16", 128): {1: 0.31, 256: 0.35},
    ("bf16", 256): {1: 0.31, 16: 0.31, 64: 0.31, 128: 0.40},
    ("bf16", 512): {1: 0.40, 16: 0.40, 64: 0.61},
    ("bf16", 1024): {1: 0.56, 16: 0.68, 256: 4.15},
    ("bf16", 2048): {1: 0.96, 64: 4.15},
    ("tf32", 512): {1: 0.56, 16: 0.68, 256: 2.51},
    ("tf32", 1024): {1: 0.65},
}


@pytest.mark.parametrize(("precision", "hidden"), LIMITS)
def test_limit_of_a_gpu_step(precision, hidden):
    for batch, expected in LIMITS[precision, hidden].items():
        assert hopper_model.step_us(hidden, batch, precision, saved=6) == pytest.approx(expected, abs=0.006)


def test_limit_of_a_gpu_grows_with_the_work():
    limit = hopper_model.limit_us
    base = BenchCase("", "lstm", 256, 16, 512, 512, dtype=torch.bfloat16, device="cuda")
    assert limit(base, False) < limit(base, True)
    for more in ({"steps": 512}, {"batch": 64}, {"hidden_size": 768}, {"layers": 2}, {"dtype": torch.float32}):
        assert limit(base, True) < limit(replace(base, **more), True), more
    assert limit(replace(base, kind="packed"), True) < limit(base, True)
    assert limit(replace(base, dtype=torch.float32, tf32=True), True) < limit(replace(base, dtype=torch.float32), True)
    assert hopper_model.step_us(2048, 16, "tf32") > 64 * 2**20 / 4.3e6, (
        "larger than any chip's registers: read from memory each step"
    )
    for case in SUITES["cuda-full"][0]:
        assert 0 < limit(case, False) < limit(case, True)


def test_command_writes_both_files(tmp_path, capsys, small):
    bench.main(["--seconds", "0", "--backends", "reference", "--output", str(tmp_path / "v1.2")])
    out, err = capsys.readouterr()
    assert out.count("| reference | reference ") == 4
    assert "fastseq bench --seconds 0 --backends reference" in out
    assert err == ""
    content = json.loads((tmp_path / "v1.2.json").read_text())
    assert len(content["rows"]) == 8
    assert {row["group"] for row in content["summary"]} == {"tiny"}
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "v1.2.md").read_text() == out.removesuffix("\n")
    assert "goal" not in out


def test_goals_are_shown_on_request(capsys, small):
    bench.main(["--seconds", "0", "--backends", "reference", "--mode", "inference", "--goals"])
    lines = capsys.readouterr().out.splitlines()
    assert [" goal " in line for line in lines if line.startswith("| case") or line.startswith("| group")] == [True] * 2
    assert any(f"| {TINY.goals[0]:.2f}" in line for line in lines)


def test_a_wrong_case_costs_its_figure_and_the_exit_code(capsys, small, monkeypatch):
    plant("lstm", False, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--seconds", "0", "--backends", "reference", "--mode", "inference"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert f"- WRONG, no figure: {TINY.name}: output: error" in out
    assert "| reference | reference" in out, "the other case is right, and measured"


def test_memory_is_counted_in_storages(tmp_path, capsys, small):
    weight, x, y = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    given = [weight, x, y]
    assert saved_bytes(lambda: x @ weight, given) == 0
    assert saved_bytes(lambda: (x * 2) @ weight, given) == 4 * 64
    assert saved_bytes(lambda: (x.exp(), y.exp()), given) == 2 * 4 * 64
    assert saved_bytes(lambda: (lambda h: h[:4] @ h[:, :4])(x.exp()), given) == 4 * 64, "one storage"
    bench.main(["--memory", "--backends", "reference", "--output", str(tmp_path / "memory")])
    assert "baseline / own" in capsys.readouterr().out
    rows = json.loads((tmp_path / "memory.json").read_text())["memory"]
    saved = {row["case"]: row["bytes"] for row in rows}
    assert saved[TINY.name] == 4 * 2 * (3 * 5 * 5 + 5), "4 activations and c of every step, zeros for h0 and c0"


@pytest.mark.parametrize(
    "name", [name for name in BASELINES if "compiled" not in name]
)  # compiling takes half a minute
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_baselines_compute_the_same(name, train):
    for kind in KINDS:
        if BASELINES[name].serves(tiny(kind), train):
            setup = Setup(tiny(kind))
            baselines, remarks = make_baselines(setup, train, (name,))
            if remarks:
                pytest.skip(remarks[0])
            check_accuracy(setup, baselines[name], train)


def test_a_missing_package_is_a_remark(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert make_baselines(Setup(TINY), False, ("onnxruntime",)) == (
        {},
        ["baseline onnxruntime skipped: the package onnxruntime is not installed; pip install onnxruntime"],
    )


def test_summary_is_the_geometric_mean():
    rows = [
        {"group": "g", "mode": "training", "candidate": name, "baseline": "nn", "ratio": ratio}
        for name, ratio in (("auto", 0.5), ("auto", 2.0), ("auto", 8.0), ("nn", 1.0))
    ]
    (summary,) = bench.summarise(rows)
    assert (summary["geometric_mean"], summary["smallest"], summary["cases"]) == (pytest.approx(2.0), 0.5, 3)


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
