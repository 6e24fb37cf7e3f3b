"""``fastseq bench``: its measurements, and that a wrong result gets no figure."""

import json
import sys
from dataclasses import replace
from functools import partial

import hopper_model
import pytest
import torch
from tiny_bench import TINY, TINY_ATTENTION, plant, tiny

from fastseq.bench import cases as bench_cases
from fastseq.bench import main as bench
from fastseq.bench import roofline, timing
from fastseq.bench.baselines import BASELINES, make_baselines
from fastseq.bench.cases import CASES, SUITES, BenchCase
from fastseq.bench.memory import saved_bytes
from fastseq.bench.timing import Setup, check_accuracy, measure, time_interleaved

KINDS = ["lstm", "packed", "lengths", "cell", "additive", "dot", "loss"]


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


def test_gpu_cases_start_with_the_most_informative():
    """A run that is cut short has every kind in bfloat16 at middle sizes; no combination is missing."""
    cases = SUITES["cuda-full"][0]
    assert SUITES["cuda"][0] == cases[:40]
    assert cases[0].name == "lstm (256, 16, 512, 512) bf16 cuda"
    assert {case.kind for case in cases[:20]} == {"lstm", "packed", "cell", "additive", "dot"}
    assert cases[-1].name == "lstm (256, 128, 192, 192) 2-layer bidirectional cuda"
    lstm = [c for c in cases if c.kind in ("lstm", "packed") and not c.proj_size]
    assert len({(c.kind, c.layers, c.hidden_size, c.batch, c.dtype, c.tf32) for c in lstm}) == 3 * 8 * 4 * 4
    assert sum(c.proj_size == c.hidden_size // 2 for c in cases if c.kind == "lstm") == 3 * 2 * 3
    assert any(c.proj_size for c in cases[:10]) and any(c.proj_size for c in SUITES["cpu"][0])


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
