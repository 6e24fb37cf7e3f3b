"""The rules of ``lstm``: single ones, and all against every committed row of the grid and of projections."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastseq import _native, dispatch
from fastseq.bench.cases import SHORT, BenchCase
from fastseq.bench.grid import CASES
from fastseq.dispatch import select
from fastseq.ops.lstm import predicates
from fastseq.ops.lstm.spec import LSTMCall

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
FILES = sorted([*RESULTS.glob("grid-*.json"), *RESULTS.glob("projection-*.json")])
WITHIN = 0.97
CASE = {case.name: case for case in CASES}
CALL = LSTMCall("cpu", torch.float32, 4, 5, batch=2, steps=3)
needs_native = pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")


def case_of(name: str) -> BenchCase:
    """The case of the grid, or of "lstm (T, B, I, H) dtype proj P"."""
    if " proj " not in name:
        return CASE[name]
    *sizes, projection = map(int, re.findall(r"\d+(?=[,)]|$)", name))
    dtype = next(dtype for dtype, short in SHORT.items() if f"){short} proj" in name)
    return BenchCase("shape", "lstm", *sizes, dtype=dtype, proj_size=projection)


def choice(row: dict) -> str:
    """The backend of ``auto`` for the call of a row."""
    case = case_of(row["case"])
    assert case.name == row["case"]
    sizes = {"input_size": case.input_size, "hidden_size": case.hidden_size, "proj_size": case.proj_size}
    form = {"batch": case.batch, "steps": case.steps, "layers": case.layers, "requires_grad": row["mode"] == "training"}
    return dispatch.first_rule("lstm", LSTMCall("cpu", case.dtype, **sizes, **form))[0]


def noise(rows: list[dict]) -> float:
    """Half the distance of p20 and p80, relative to the median: the larger one of baseline and native."""
    return max((row["p80_ms"] - row["p20_ms"]) / 2 / row["median_ms"] for row in rows)


@needs_native
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_auto_is_within_3_percent_of_the_better_backend(file, monkeypatch):
    """Beyond the noise of the row: native is ``ratio`` times as fast as nn.LSTM, torch 1.0 times."""
    content = json.loads(file.read_text())
    monkeypatch.setattr(predicates, "_instruction_set", lambda: content["environment"]["native"])
    monkeypatch.setattr(predicates, "_amx", lambda: content["environment"]["amx"] == "yes")
    monkeypatch.setattr(predicates, "_threads", lambda: content["environment"]["threads"])
    by_call: dict[tuple[str, str], list[dict]] = {}
    for row in content["rows"]:
        by_call.setdefault((row["case"], row["mode"]), []).append(row)
    worse = []
    for rows in by_call.values():
        native = rows[1]["ratio"]
        chosen = choice(rows[1])
        ratio = native if chosen == "native" else 1.0
        if ratio * (1 + noise(rows)) < WITHIN * max(native, 1.0):
            worse.append(f"{rows[1]['case']} {rows[1]['mode']}: {chosen}, native is {native:.2f} times as fast")
    assert not worse, "\n".join(worse)
    assert len(by_call) > 20


def test_the_grid_was_measured_on_several_instruction_sets():
    found = {json.loads(file.read_text())["environment"]["native"] for file in FILES}
    assert found >= {"baseline", "avx2", "avx512"}


@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
@needs_native
def test_auto_gives_single_steps_in_training_of_few_dtypes_to_torch(instructions, monkeypatch):
    monkeypatch.setattr(predicates, "_instruction_set", lambda: instructions)
    monkeypatch.setattr(predicates, "_amx", lambda: False)
    monkeypatch.setattr(predicates, "_threads", lambda: 1)
    dispatch.forget()
    step = CALL._replace(steps=1, batch=1, requires_grad=True)
    expected = {torch.float32: "native", torch.float64: "torch", torch.float16: "native", torch.bfloat16: "native"}
    if instructions == "avx2":
        expected[torch.bfloat16] = "torch"
    for dtype, backend in expected.items():
        assert select("lstm", "auto", step._replace(dtype=dtype)) == backend
        for longer in (dict(steps=2), dict(requires_grad=False), dict(packed=True)):
            assert select("lstm", "auto", step._replace(dtype=dtype, **longer)) == "native"
    wide = dict(dtype=torch.bfloat16, input_size=512, hidden_size=512)
    assert select("lstm", "auto", step._replace(**wide)) == "native"
    assert select("lstm", "auto", step._replace(dtype=torch.bfloat16, batch=2)) == "native"
    assert select("lstm", "auto", step._replace(dtype=torch.float64, batch=4)) == "torch"


@needs_native
def test_auto_asks_for_the_number_of_threads(monkeypatch):
    """AMX gains little from a second thread in small steps; a remembered choice belongs to one number of threads."""
    monkeypatch.setattr(predicates, "_instruction_set", lambda: "avx512")
    monkeypatch.setattr(predicates, "_amx", lambda: True)
    dispatch.forget()
    call = LSTMCall("cpu", torch.bfloat16, 256, 256, batch=4, steps=10)
    before = torch.get_num_threads()
    try:
        for threads, expected in ((1, "torch"), (2, "native"), (1, "torch")):
            torch.set_num_threads(threads)
            assert select("lstm", "auto", call) == expected
    finally:
        torch.set_num_threads(before)


@needs_native
def test_auto_gives_bfloat16_inference_of_several_sequences_to_amx(monkeypatch):
    monkeypatch.setattr(predicates, "_instruction_set", lambda: "avx512")
    monkeypatch.setattr(predicates, "_amx", lambda: True)
    monkeypatch.setattr(predicates, "_threads", lambda: 1)
    dispatch.forget()
    call = CALL._replace(steps=20, batch=2, dtype=torch.bfloat16)
    assert select("lstm", "auto", call) == "torch"
    others = dict(steps=5), dict(batch=1), dict(requires_grad=True), dict(lengths=True), dict(dtype=torch.float32)
    for other in others:
        assert select("lstm", "auto", call._replace(**other)) == "native", other
    wide = call._replace(hidden_size=257)
    assert select("lstm", "auto", wide) == "native"
    step = CALL._replace(steps=1, batch=16, dtype=torch.float16, requires_grad=True)
    assert select("lstm", "auto", step) == "torch"
    assert select("lstm", "auto", step._replace(steps=3)) == "native"
