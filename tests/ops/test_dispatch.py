"""The choice of a backend by name, block, environment variable and rules, and its reports: explain and info."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fastseq
from fastseq import LSTM, _native, dispatch
from fastseq.dispatch import implementation, select
from fastseq.ops.lstm import api as lstm_api
from fastseq.ops.lstm import predicates
from fastseq.ops.lstm import torch as torch_backend
from fastseq.ops.lstm.api import describe
from fastseq.ops.lstm.spec import LSTMCall, Stack
from fastseq.ops.lstm.torch import runs_under_autocast
from fastseq.ops.lstm_cell import api as cell_api
from fastseq.ops.lstm_cell.spec import LSTMCellCall

ROOT = Path(__file__).parents[2]
CALL = LSTMCall("cpu", torch.float32, 4, 5, batch=2, steps=3)
X = torch.randn(3, 2, 4)
needs_native = pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")


def run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


def served(**kwargs) -> str:
    with dispatch.record() as choices:
        LSTM(4, 5, **kwargs)(X)
    (choice,) = choices
    return choice.backend


def test_argument_beats_block_beats_default():
    default = served()
    assert default != "reference"
    with fastseq.use_backend("reference"):
        assert served() == "reference"
        assert served(backend="torch") == "torch"
        with fastseq.use_backend("torch"):
            assert served() == "torch"
        assert served() == "reference"
    assert served() == default


def test_records_nest_and_belong_to_a_thread():
    lstm = LSTM(4, 5)
    with dispatch.record() as outer:
        with dispatch.record() as inner:
            pass
        thread = threading.Thread(target=lstm, args=(X,))
        thread.start()
        thread.join()
        lstm(X)
    assert (len(inner), len(outer)) == (0, 1)


def test_an_empty_environment_variable_means_auto():
    assert run("import fastseq", FASTSEQ_BACKEND="").returncode == 0


@needs_native
def test_auto_follows_the_measurements():
    def chosen(op, call):
        return select(op, "auto", call)

    padded = CALL._replace(batch=32, steps=50)
    is_x86 = predicates.avx512(padded) or predicates.without_avx512(padded)
    assert chosen("lstm", padded) == ("native" if is_x86 else "torch")
    assert chosen("lstm", padded._replace(batch=4)) == "native"
    assert chosen("lstm", padded._replace(device="cuda")) == "torch"
    explicit = padded._replace(dtype=torch.bfloat16)
    autocast = explicit._replace(autocast=True, fused=True)
    assert chosen("lstm", autocast) == (chosen("lstm", explicit) if runs_under_autocast(torch.bfloat16) else "native")
    assert chosen("lstm", padded._replace(proj_size=3)) == ("native" if is_x86 else "torch")
    assert chosen("lstm", padded._replace(device="cuda", proj_size=3)) == "torch"
    for changes in (dict(packed=True), dict(lengths=True), dict(dtype=torch.float16)):
        assert chosen("lstm", padded._replace(**changes)) == "native"
    assert chosen("lstm", padded._replace(dtype=torch.float64)) == "torch"
    assert chosen("lstm", padded._replace(dtype=torch.float64, batch=1)) == "native"
    cell, x = fastseq.LSTMCell(4, 5), X[0]
    with dispatch.record() as choices:
        cell(x)
        with torch.no_grad():
            cell(x)
        fastseq.ops.lstm_cell(torch.randn(2, 20), torch.randn(2, 5))
    assert [choice.backend for choice in choices] == ["torch", "native", "native"]
    gates = LSTMCellCall("cuda", torch.float32, 5)
    assert chosen("lstm_cell", gates._replace(with_gemms=True)) == "torch"
    if not _native.why_not_cuda():
        assert chosen("lstm_cell", gates) == "native"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", [dict(batch=1), dict(batch=256), dict(compiling=True)], ids=str)
def test_auto_gives_cells_that_train_to_torch(device, dtype, changes):
    """LSTMCell skips the selection on this promise."""
    call = LSTMCellCall(device, dtype, 4, with_gemms=True, requires_grad=True, **changes)
    assert select("lstm_cell", "auto", call) == "torch"


def test_a_cell_that_trains_takes_the_short_path_only_under_auto(monkeypatch):
    cell, x = fastseq.LSTMCell(4, 5), X[0]
    selected = []
    monkeypatch.setattr(cell_api, "select", lambda *args: selected.append(args[1]) or "reference")
    cell(x)
    assert not selected
    with fastseq.use_backend("reference"):
        cell(x)
    with dispatch.record():
        cell(x)
    cell.backend = "reference"
    cell(x)
    assert selected == ["auto", "auto", "reference"]


@needs_native
@pytest.mark.parametrize("option", ["plain", "strided", "gradient", "named", "use_backend", "double", "1-D"])
def test_the_fast_update_takes_the_backend_of_the_rules(option, monkeypatch):
    gates, c = torch.randn(3, 20), torch.randn(3, 5)
    gates, c = {
        "strided": (torch.randn(20, 3).t(), c),
        "double": (gates.double(), c.double()),
        "1-D": (gates[0], c[0]),
    }.get(option, (gates, c))
    named = {"backend": "reference"} if option == "named" else {}
    with torch.set_grad_enabled(option == "gradient"):
        with dispatch.record() as choices:  # takes no fast path
            expected = fastseq.ops.lstm_cell(gates, c, **named)
        selected = []
        monkeypatch.setattr(cell_api, "select", lambda *args: selected.append(args) or choices[0].backend)
        with fastseq.use_backend("native" if option == "use_backend" else "auto"):
            actual = fastseq.ops.lstm_cell(gates, c, **named)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert bool(selected) == (option not in ("plain", "strided"))
    if not selected:
        assert choices[0].backend == "native"


@pytest.mark.parametrize(
    ("wide", "matrix", "products", "inference", "training"),
    [
        (True, False, False, "native", "native"),
        (True, False, True, "torch", "native"),
        (True, True, True, "torch", "torch"),
        (False, False, False, "native", "native"),
    ],
)
def test_auto_gives_bfloat16_to_the_faster_products(wide, matrix, products, inference, training, monkeypatch):
    instructions = "avx512_bf16" if products else "avx512" if wide else "avx2"
    monkeypatch.setattr(predicates, "_instruction_set", lambda: instructions)
    monkeypatch.setattr(predicates, "_amx", lambda: matrix)
    monkeypatch.setattr(predicates, "_threads", lambda: 1)
    dispatch.forget()
    call = CALL._replace(batch=32, steps=50, dtype=torch.bfloat16)
    assert select("lstm", "auto", call) == inference
    assert select("lstm", "auto", call._replace(requires_grad=True)) == training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(batch_first=True, num_layers=2, bidirectional=True, proj_size=2)], ids=str
)
def test_a_plain_call_takes_the_backend_of_the_rules(options, dtype, monkeypatch):
    """Also without record(), where ``run_plain`` may answer; the results are the same."""
    lstm, backends = LSTM(4, 5, dtype=dtype, **options), []
    monkeypatch.setattr(lstm_api, "implementation", lambda op, name: backends.append(name) or implementation(op, name))
    for steps, batch, grad in itertools.product((1, 7), (1, 8), (False, True)):
        x = torch.randn((batch, steps, 4) if lstm.batch_first else (steps, batch, 4), dtype=dtype)
        with torch.set_grad_enabled(grad):
            with dispatch.record() as choices:
                expected = lstm(x)
            dispatch.forget()
            backends.clear()
            for _ in range(2):
                output, (h_n, c_n) = lstm(x)
        assert set(backends) == {choices[0].backend}
        for actual, wanted in zip((output, h_n, c_n), (expected[0], *expected[1]), strict=True):
            assert torch.equal(actual, wanted)
            assert actual.requires_grad == grad


@pytest.mark.parametrize(
    "option", ["plain", "autocast", "subclass", "float state", "list of states", "vmap", "recorded"]
)
def test_only_plain_calls_skip_the_record(option, monkeypatch):
    lstm, described, x = LSTM(4, 5), [], X
    states = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5, dtype=torch.float64 if option == "float state" else None)
    hx = {"float state": states, "list of states": list(states)}.get(option)
    monkeypatch.setattr(lstm_api, "describe", lambda *args: described.append(args) or describe(*args))
    with contextlib.ExitStack() as stack:
        if option == "autocast":
            stack.enter_context(torch.autocast("cpu"))
        if option == "recorded":
            stack.enter_context(dispatch.record())
        if option == "float state":
            stack.enter_context(pytest.raises(RuntimeError, match="the cell tensor is"))
        if option == "subclass":
            x = X.as_subclass(type("Seen", (torch.Tensor,), {}))
        run = torch.func.vmap(lambda x: lstm(x, hx)[0]) if option == "vmap" else lambda x: lstm(x, hx)
        run(x[None] if option == "vmap" else x)
    assert bool(described) == (option not in ("plain", "float state"))


def test_a_plain_call_sees_new_weights_and_options():
    """The remembered plan depends on nothing that may change between two calls."""
    lstm, plain = LSTM(4, 5), nn.LSTM(4, 5)
    plain.load_state_dict(lstm.state_dict())
    for change in (
        lambda m: None,
        lambda m: setattr(m, "weight_hh_l0", nn.Parameter(torch.ones(20, 5))),
        lambda m: m.requires_grad_(False),
        lambda m: m.double(),
    ):
        change(lstm)
        change(plain)
        x = X.to(lstm.weight_hh_l0.dtype)
        actual, expected = lstm(x)[0], plain(x)[0]
        torch.testing.assert_close(actual, expected)
        assert actual.requires_grad == expected.requires_grad
    with pytest.raises(ValueError, match="RNN input dtype"):
        lstm(X)
    with fastseq.use_backend("triton"), pytest.raises(RuntimeError, match="the triton backend"):
        lstm(X.double())


def test_block_ends_with_an_exception():
    with pytest.raises(KeyError), fastseq.use_backend("reference"):
        raise KeyError
    assert served() != "reference"


def test_environment_variable():
    code = "import fastseq, torch; print(fastseq.explain(fastseq.LSTM(4, 5), torch.randn(3, 2, 4)))"
    assert "reference: requested by name" in run(code, FASTSEQ_BACKEND="reference").stdout
    refused = run(code, FASTSEQ_BACKEND="cudnn")
    assert refused.returncode != 0
    assert "FASTSEQ_BACKEND: unknown backend 'cudnn'; choose one of 'auto'" in refused.stderr


def test_unknown_names_list_the_valid_ones():
    for attempt in (lambda: select("lstm", "cuda", CALL), lambda: fastseq.use_backend("cuda").__enter__()):
        with pytest.raises(ValueError, match="'auto', 'reference', 'torch', 'native', 'triton'"):
            attempt()


def test_a_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="triton backend runs on CUDA and ROCm tensors"):
        LSTM(4, 5, backend="triton")(X)
    with pytest.raises(RuntimeError, match="cannot return the cell states"):
        LSTM(4, 5, backend="torch")(X, return_cell_states=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(return_cell_states=True),
        dict(compiling=True, lengths=True, batch=None, steps=None),
        dict(proj_size=2, return_cell_states=True),
        dict(dtype=torch.float16),
    ],
    ids=str,
)
def test_auto_always_finds_a_backend_that_serves(changes):
    call = CALL._replace(**changes)
    chosen = select("lstm", "auto", call)
    assert dispatch.objection("lstm", chosen, call) is None


def test_auto_never_picks_an_unavailable_kernel(monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "why_not", lambda: "it was not built.")
    dispatch.forget()
    assert select("lstm", "auto", CALL._replace(return_cell_states=True)) == "reference"
    traced = CALL._replace(compiling=True, lengths=True, batch=None, steps=None)  # batch and steps are None: dynamic
    assert select("lstm", "auto", traced) == "reference"
    with pytest.raises(RuntimeError, match="it was not built"):
        select("lstm", "native", CALL)
    assert "it was not built" in fastseq.info()


@pytest.mark.parametrize("op", dispatch.ops())
def test_every_rule_names_a_known_backend_its_reason_and_its_evidence(op):
    for rule in dispatch.rules(op):
        assert rule.backend in dispatch.BACKENDS[1:]
        assert rule.why
        for file in rule.evidence.split(", ") if rule.evidence != dispatch.NOT_MEASURED else ():
            assert (ROOT / file).is_file()


class Steps(nn.Module):
    """An LSTM below another module, a cell called twice, and an op called by the module itself between them."""

    def __init__(self):
        super().__init__()
        self.below, self.cell = nn.Sequential(LSTM(4, 5)), fastseq.LSTMCell(5, 5, backend="reference")

    def forward(self, x):
        output, _ = self.below(x)
        hx = self.cell(output[-1])
        fastseq.ops.lstm_cell(torch.randn(2, 20), hx[1], backend="torch")
        return self.cell(output[-1], hx)


def test_explain_names_the_module_of_each_call_and_says_each_sentence_once():
    module = Steps()
    lines = fastseq.explain(module, X).splitlines()
    served, reason = {}, ""
    for line in lines:
        if line.startswith("  "):
            count, caller, op = line.split("(")[0].split()
            served[caller] = (count, op, reason)
            assert "device=cpu, dtype=float32" in line
        else:
            reason = line
    assert served["below.0:"][:2] == ("1x", "lstm")
    assert served["cell:"] == ("2x", "lstm_cell", "reference: requested by name")
    assert served["Steps:"] == ("1x", "lstm_cell", "torch: requested by name")
    assert len(served) == 3
    (triton,) = (line for line in lines if "triton" in line)
    assert triton.startswith("no triton for lstm, lstm_cell: the triton backend runs on CUDA")
    assert len(lines) == len(set(lines))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert "accelerate" in fastseq.explain(nn.Linear(4, 4), X)


def test_info_has_a_row_for_every_op_and_a_sentence_for_every_no():
    text = fastseq.info()
    table = text[text.index("backends on cpu") :].splitlines()
    for op in dispatch.ops():
        (row,) = (line.split() for line in table if line.split()[:1] == [op])
        assert len(row) == len(dispatch.BACKENDS)
        for name, cell in zip(dispatch.BACKENDS[1:], row[1:], strict=True):
            start = f"  no {name} for "
            of_name = (line.split(":")[0].removeprefix(start) for line in table if line.startswith(start))
            reasons = [names for names in of_name if op in names.split(", ")]
            assert (cell, len(reasons)) in (("yes", 0), ("no", 1))
    sentences = [line.split(":", 1)[1] for line in table if line.startswith("  no ")]
    assert len(sentences) == len(set(sentences)) > 0


def test_import_with_triton_blocked_and_with_the_native_library_missing():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['fastseq._C'] = None\n"
        "import torch, fastseq\n"
        "assert not fastseq._native.available()\n"
        "m = fastseq.LSTM(4, 5, 2, bidirectional=True); y, _ = m(torch.randn(3, 2, 4), lengths=torch.tensor([1, 3]))\n"
        "y.sum().backward(); m(torch.randn(3, 2, 4), return_cell_states=True)\n"
        "fastseq.LSTMCell(4, 5)(torch.randn(2, 4))\n"
        "fastseq.Attention(4, 4)(torch.randn(2, 3, 4), torch.randn(2, 5, 4))\n"
        "print(fastseq.info())"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "native                missing: " in result.stdout


def test_import_brings_torch_only():
    code = (
        "import sys, torch; before = {m.split('.')[0] for m in sys.modules}\n"
        "import fastseq; print(*sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    assert run(code).stdout.split() == ["fastseq"]


def test_cudnn_gets_contiguous_states_and_is_differentiable_in_eval_mode(monkeypatch):
    """Tensors on meta stand for tensors on a GPU; on CPU neither matters."""
    calls = []

    def kernel(input, hx, weights, bias, layers, dropout, training, *rest):
        calls.append((all(h.is_contiguous() for h in hx), dropout, training))
        return input, *hx

    monkeypatch.setattr(torch_backend, "_vf_lstm", kernel)
    x, h = torch.empty(4, 3, 2, device="meta"), torch.empty(3, 2, 5, device="meta").transpose(0, 1)
    stack = Stack(x, h, h, (), num_layers=2, dropout=0.5)
    torch_backend.run(stack)
    torch_backend.run(stack._replace(training=True))
    with torch.no_grad():
        torch_backend.run(stack)
    assert calls == [(True, 0.0, True), (True, 0.5, True), (True, 0.5, False)]


def test_a_subclass_of_tensor_is_served_by_torch():
    """For example the ExpandedWeight of call_for_per_sample_grads, which an opaque operator would ignore."""
    seen = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    with dispatch.record() as choices:
        LSTM(4, 5)(X.as_subclass(Seen))
    assert [choice.backend for choice in choices] == ["torch"]
    assert "lstm" in seen
