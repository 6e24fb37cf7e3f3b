"""The rules of ``lstm`` against every committed row of ``fastseq bench --suite grid``."""

import json
from pathlib import Path

import pytest

from fastseq import _native, dispatch
from fastseq.bench.grid import CASES
from fastseq.ops.lstm import rules
from fastseq.ops.lstm.spec import LSTMCall

FILES = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("grid-*.json"))
WITHIN = 0.97
CASE = {case.name: case for case in CASES}


def choice(row: dict) -> str:
    """The backend of ``auto`` for the call of a row."""
    case = CASE[row["case"]]
    sizes = {"input_size": case.input_size, "hidden_size": case.hidden_size}
    form = {"batch": case.batch, "steps": case.steps, "layers": case.layers, "requires_grad": row["mode"] == "training"}
    return dispatch.first_rule("lstm", LSTMCall("cpu", case.dtype, **sizes, **form))[0]


def noise(rows: list[dict]) -> float:
    """Half the distance of p20 and p80, relative to the median: the larger one of baseline and native."""
    return max((row["p80_ms"] - row["p20_ms"]) / 2 / row["median_ms"] for row in rows)


@pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_auto_is_within_3_percent_of_the_better_backend(file, monkeypatch):
    """Beyond the noise of the row: native is ``ratio`` times as fast as nn.LSTM, torch 1.0 times."""
    content = json.loads(file.read_text())
    monkeypatch.setattr(rules, "_instruction_set", lambda: content["environment"]["native"])
    monkeypatch.setattr(rules, "_amx", lambda: content["environment"]["amx"] == "yes")
    monkeypatch.setattr(rules, "_threads", lambda: content["environment"]["threads"])
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
