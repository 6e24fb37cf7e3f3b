"""``fastseq tune``: it measures, writes a file that ``auto`` reads in a new process, and names it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastseq
from fastseq import _native, dispatch
from fastseq.bench import timing
from fastseq.errors import UserError
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.tune import main as tune
from fastseq.tune import record
from fastseq.tune.record import Entry

CALL = LSTMCall("cpu", torch.float32, 8, 8, batch=2, steps=3)
pytestmark = pytest.mark.skipif(not _native.available(), reason="tuning compares torch with the compiled operators")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, tuning on, and no time for measurements; the file of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTSEQ_TUNING", raising=False)
    monkeypatch.setattr(timing, "SAMPLE_MS", 1e-3)
    record.entries.cache_clear()
    dispatch.forget()
    yield record.path()
    record.entries.cache_clear()
    dispatch.forget()


def put(file, *entries):
    record.write(file, entries)
    record.entries.cache_clear()
    dispatch.forget()


def entry(backend, *sizes, training=False, ratio=2.0):
    return Entry("float32", training, *sizes, backend, ratio)


def model():
    """The function that --model names: two layers of one size, and one of another on a PackedSequence."""
    lstm = nn.LSTM(4, 8, num_layers=2)
    return nn.Sequential(lstm), (torch.randn(3, 2, 4),)


def test_auto_takes_what_was_measured_faster_and_says_so(cache):
    for backend in ("torch", "native"):
        put(cache, entry(backend, 3, 2, 8, 8))
        assert dispatch.select("lstm", "auto", CALL) == backend
        with torch.no_grad():
            text = fastseq.explain(fastseq.LSTM(8, 8), torch.randn(3, 2, 8))
        assert f"{backend}: tuned on this machine: native is 2.00 times as fast at (3, 2, 8, 8)" in text
        assert "tuning                1 calls measured on this machine" in fastseq.info()


def test_another_number_of_threads_has_its_own_entries(cache):
    """A process that changes its number of threads reads the file of the new number, and the old one again."""
    before = torch.get_num_threads()
    put(cache, entry("torch", 3, 2, 8, 8))
    assert record.advice(CALL)[0] == "torch"
    try:
        torch.set_num_threads(before + 1)
        assert record.advice(CALL) is None
        record.write(record.path(), (entry("native", 3, 2, 8, 8),))
        record.entries.cache_clear()
        assert (record.advice(CALL)[0], dispatch.select("lstm", "auto", CALL)) == ("native", "native")
    finally:
        torch.set_num_threads(before)
    assert record.advice(CALL)[0] == "torch"
    assert dispatch.select("lstm", "auto", CALL) == "torch"


def test_the_nearest_entry_within_a_factor_of_two_decides(cache):
    put(cache, entry("torch", 3, 2, 8, 8), entry("native", 3, 4, 8, 8), entry("native", 3, 2, 8, 8, training=True))
    for batch, backend in ((2, "torch"), (1, "torch"), (4, "native"), (7, "native")):
        assert record.advice(CALL._replace(batch=batch))[0] == backend
    assert record.advice(CALL._replace(batch=9)) is None
    assert record.advice(CALL._replace(requires_grad=True))[0] == "native"
    others = dict(dtype=torch.float64), dict(packed=True), dict(lengths=True), dict(autocast=True), dict(vmapped=True)
    for other in (*others, dict(proj_size=2), dict(device="cuda"), dict(steps=7), dict(hidden_size=17)):
        assert record.advice(CALL._replace(**other)) is None, other


def test_a_tuned_backend_that_cannot_serve_is_passed_over(cache, monkeypatch):
    put(cache, entry("native", 3, 2, 8, 8))
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "why_not", lambda: "it was not built.")
    monkeypatch.setattr(record, "machine", lambda: {})
    assert dispatch.select("lstm", "auto", CALL) != "native"


def test_no_file_and_an_ignored_file_change_nothing(cache, monkeypatch):
    assert (record.entries(torch.get_num_threads()), record.advice(CALL)) == ((), None)
    assert "none; `fastseq tune` measures this machine" in fastseq.info()
    put(cache, entry("torch", 3, 2, 8, 8))
    monkeypatch.setenv("FASTSEQ_TUNING", "0")
    assert record.advice(CALL) is None
    assert "ignored: FASTSEQ_TUNING=0" in fastseq.info()


DAMAGE = {
    "not JSON": lambda content: "{",
    "a list": lambda content: "[]",
    "an unknown field": lambda content: json.dumps(content | {"entries": [{"shape": 3}]}),
    "an unknown backend": lambda content: json.dumps(content).replace('"backend": "torch"', '"backend": "cudnn"'),
    "a negative size": lambda content: json.dumps(content).replace('"steps": 3', '"steps": -3'),
    "no machine": lambda content: json.dumps({"entries": []}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_a_sentence(damage, cache):
    put(cache, entry("torch", 3, 2, 8, 8))
    cache.write_text(DAMAGE[damage](json.loads(cache.read_text()) | {"version": 1}))
    with pytest.warns(UserWarning, match=r"the tuning .* is damaged and ignored; run `fastseq tune` again"):
        assert record.advice(CALL) is None
    assert "refused: the tuning" in fastseq.info()


def test_a_file_of_another_machine_is_refused_with_a_sentence(cache):
    put(cache, entry("torch", 3, 2, 8, 8))
    cache.write_text(cache.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with pytest.warns(UserWarning, match=r"is of another machine \(torch 1\.0, here .*\) and ignored"):
        assert record.advice(CALL) is None


def test_the_command_measures_and_another_process_uses_it(cache, capsys):
    tune.main(["--shape", "3,2,8,8", "--seconds", "0"])
    out = capsys.readouterr().out
    assert f"Written to {cache}" in out
    entries = record.read(cache)
    assert [(e.training, e[2:6]) for e in entries] == [(False, (3, 2, 8, 8)), (True, (3, 2, 8, 8))]
    assert all(e.backend == ("native" if e.ratio >= tune.WORTH else "torch") for e in entries)
    tune.main(["--shape", "3,2,8,8", "--shape", "1,1,1,1", "--seconds", "0"])
    assert len(record.read(cache)) == 4, "measured again: replaced; new ones: added"
    put(cache, entry("torch", 3, 2, 8, 8))
    code = (
        "import fastseq, torch; torch.set_grad_enabled(False)\n"
        "print(fastseq.explain(fastseq.LSTM(8, 8), torch.randn(3, 2, 8)))"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | threads)
    assert "torch: tuned on this machine" in result.stdout, result.stderr
    tune.main(["--forget"])
    assert not cache.exists()


def test_a_damaged_file_is_replaced_by_the_command(cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    tune.main(["--shape", "1,1,1,1", "--seconds", "0"])
    assert "is damaged and ignored" in capsys.readouterr().err
    assert len(record.read(cache)) == 2


def test_the_calls_of_a_model_are_recorded(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "mymodels", sys.modules[__name__])
    assert tune.model_shapes("mymodels:model") == [("float32", (3, 2, 4, 8))]
    monkeypatch.setattr(sys.modules[__name__], "model", lambda: nn.Linear(2, 2))
    with pytest.raises(UserError, match="must return the model and a tuple of its inputs, got Linear"):
        tune.model_shapes("mymodels:model")
    monkeypatch.setattr(sys.modules[__name__], "model", lambda: (nn.Linear(2, 2), (torch.randn(1, 2),)))
    with pytest.raises(UserError, match="makes no padded LSTM call"):
        tune.model_shapes("mymodels:model")
    for name in ("mymodels:none", "nomodule:model", "mymodels"):
        with pytest.raises(UserError, match=f"--model {name}: .*give module:function"):
            tune.model_shapes(name)


def test_bad_options_get_a_sentence(capsys):
    for arguments, sentence in ((["--threads", "0"], "at least 1"), (["--shape", "1"], "expected T,B,I,H")):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert sentence in capsys.readouterr().err
