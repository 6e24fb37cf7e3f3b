"""``fastseq parity``: every op and module over the quick grid, and planted errors that it must report."""

import json
import subprocess
import sys

import pytest
import torch

from fastseq import dispatch
from fastseq.dispatch import BACKENDS
from fastseq.ops.attention import reference as attention_reference
from fastseq.ops.lstm import reference as lstm_reference
from fastseq.ops.lstm_cell import reference as cell_reference
from fastseq.parity import main as parity
from fastseq.parity.cases import GRIDS, PROBLEMS, ParityCase
from fastseq.testing.numerics import is_refusal

QUICK = GRIDS["quick"]()
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op} {case.name}")
def test_quick_grid(case, dtype):
    rows = parity.check(case, dtype, BACKENDS)
    assert [row.backend for row in rows] == list(BACKENDS)
    for row in rows:
        assert row.ok, row.failure or "; ".join(str(c) for c in row.comparisons if not c.ok)
        assert bool(row.comparisons) != bool(row.refusal)


def test_every_backend_is_compared():
    """Each backend of each op runs somewhere in the grid, unless it is missing here."""
    first = {case.op: case for case in reversed(QUICK)}
    ops = set(dispatch.ops()) - {"candidates"}  # without gradients and with integers: tests/ops/test_candidates.py
    served = {
        (row.op, row.backend)
        for op in ops
        for row in parity.check(first[op], torch.float32, ("reference", "torch"))
        if row.comparisons
    }
    torch_has_no = {("lstm_variant", "torch")}
    assert served == {(op, name) for op in ops for name in ("reference", "torch")} - torch_has_no


def test_edge_cases_are_there():
    names = {f"{case.op} {case.name}" for case in QUICK}
    assert len(names) == len(QUICK)
    assert {case.op for case in QUICK} == set(PROBLEMS)
    for part in (
        "spread=100.0",
        "slices",
        "reverse=True",
        "form=packed",
        "proj_size=3",
        "bias=False",
        "257",
        "lengths",
    ):
        assert any(part in name for name in names), part


def test_full_grid_can_be_drawn():
    full = GRIDS["full"]()
    assert full[: len(QUICK)] == QUICK
    assert len(full) > 4 * len(QUICK)
    for case in full[len(QUICK) :: 7]:
        assert parity._draws(case)


def rebuilt(record, values):
    """A tuple of new values, of the same class where ``record`` is a named one."""
    return type(record)(*values) if hasattr(record, "_fields") else tuple(values)


def wrong_gate_order(original):
    def forward(cell, need_backward):
        i, f, g, o = cell.gates.chunk(4, dim=1)
        return original(cell._replace(gates=torch.cat((f, i, g, o), dim=1)), need_backward)

    return forward


def off_by_a_thousandth(original):
    def scaled(grads):
        if isinstance(grads, tuple):
            return rebuilt(grads, map(scaled, grads))
        return None if grads is None else grads * 1.001

    return lambda *args: scaled(original(*args))


def no_mask(original):
    def forward(inputs, want):
        return original(inputs._replace(lengths=None, mask=None), want)

    return forward


def forgets_a_row(original):
    def forward(*args):
        result = original(*args)
        fresh = torch.empty_like(result[0])
        fresh[1:] = result[0][1:]
        return rebuilt(result, (fresh, *result[1:]))

    return forward


def reads_past_the_length(original):
    def forward(layer, want):
        return original(layer._replace(lengths=None), want)

    return forward


def one_gradient_missing(original):
    def backward(*args):
        grads = original(*args)
        return rebuilt(grads, (None, *grads[1:]))

    return backward


def crashes(original):
    def forward(*args):
        raise IndexError("off the end")

    return forward


BUGS = [
    ("lstm_cell", cell_reference, "forward", wrong_gate_order),
    ("lstm_cell", cell_reference, "backward", off_by_a_thousandth),
    ("lstm_cell", cell_reference, "forward", forgets_a_row),
    ("lstm", lstm_reference, "forward", reads_past_the_length),
    ("lstm", lstm_reference, "forward", forgets_a_row),
    ("lstm", lstm_reference, "backward", off_by_a_thousandth),
    ("lstm", lstm_reference, "backward", one_gradient_missing),
    ("LSTM", lstm_reference, "forward", reads_past_the_length),
    ("attention", attention_reference, "forward", no_mask),
    ("attention", attention_reference, "backward", off_by_a_thousandth),
    ("attention", attention_reference, "backward", one_gradient_missing),
    ("Attention", attention_reference, "forward", no_mask),
    ("Seq2Seq", attention_reference, "forward", no_mask),
    ("lstm", lstm_reference, "forward", crashes),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("op", "module", "function", "bug"), BUGS, ids=lambda v: getattr(v, "__name__", v))
def test_planted_bugs_end_in_exit_code_1(op, module, function, bug, monkeypatch, capsys):
    monkeypatch.setattr(module, function, bug(getattr(module, function)))
    several = [
        case for case in QUICK if case.op not in ("lstm", "attention") or "lengths" in case.name
    ]  # these suffice
    monkeypatch.setitem(parity.GRIDS, "quick", lambda: several)
    with pytest.raises(SystemExit) as stopped:
        parity.main(["--backend", "reference,torch", "--dtype", "float32", "--op", op])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert f"WRONG {op} " in out
    assert "float32, torch: " not in out, "the other backend is right"


def test_command(tmp_path, capsys):
    """Refusals are listed and are no failure; JSON has every comparison."""
    path = tmp_path / "new" / "parity.json"
    parity.main(["--backend", "reference,triton", "--dtype", "float32", "--op", "lstm_cell", "--json", str(path)])
    out = capsys.readouterr().out
    assert "- triton: lstm_cell: the triton backend" in out
    assert "5 calls" in out
    assert "5 refused, 0 wrong" in out
    content = json.loads(path.read_text())
    assert content["environment"]["command"].startswith("fastseq parity --backend reference,triton")
    names = {c["name"] for row in content["rows"] for c in row["comparisons"]}
    assert names == {"h", "c_n", "h (inference)", "c_n (inference)", "grad gates", "grad c"}
    parity.main(["--backend", "reference", "--dtype", "float32", "--op", "lstm_cell", "--verbose"])
    assert capsys.readouterr().out.count("| reference |") == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backend", "cudnn"], "--backend: unknown name 'cudnn'"),
        (["--backend", ""], "--backend: name at least one of auto"),
        (["--dtype", "int8"], "--dtype: unknown name 'int8'"),
        (["--op", "gru"], "--op: unknown name 'gru'"),
        (["--cases", "all"], "invalid choice"),
        (["--threads", "0"], "at least 1"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_bad_options_get_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parity.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_measuring_needs_no_pytest():
    """bench, parity and the problems behind them import in a process without pytest."""
    code = "import sys; sys.modules['pytest'] = None; import fastseq.bench.main, fastseq.parity.main"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failing_kernel_is_no_refusal(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of registers")

    case = ParityCase("lstm_cell", {"shape": (2, 3)})
    monkeypatch.setattr(cell_reference, "forward", broken)
    (row,) = parity.check(case, torch.float32, ("reference",))
    assert (row.ok, row.refusal, row.failure) == (False, "", "RuntimeError: out of registers")
    (row,) = parity.check(case, torch.float32, ("triton",))
    assert row.ok
    assert "the triton backend" in row.refusal
    with pytest.raises(RuntimeError) as caught:
        broken()
    assert not is_refusal(caught.value)


def test_a_failure_of_torch_is_reported_and_the_next_case_runs(monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch._VF, "lstm", broken)
    case = next(case for case in QUICK if case.op == "lstm")
    rows = parity.check(case, torch.float32, ("reference", "native"))
    failure = "torch's own computation: RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"
    assert [(row.backend, row.ok, row.failure) for row in rows] == [
        (b, False, failure) for b in ("reference", "native")
    ]


@pytest.mark.parametrize("case", [c for c in QUICK if c.op == "lstm" and c.slices][:2], ids=lambda case: case.name)
def test_torchs_own_lstm_is_called_as_cudnn_wants_it(case, monkeypatch):
    """Contiguous states, and training=True wherever gradients follow; a CPU requires neither."""
    right, calls = torch._VF.lstm, []

    def kernel(input, hx, weights, bias, layers, dropout, training, *rest):
        calls.append((all(h.is_contiguous() for h in hx), training == torch.is_grad_enabled()))
        return right(input, hx, weights, bias, layers, dropout, training, *rest)

    monkeypatch.setattr(torch._VF, "lstm", kernel)
    parity.check(case, torch.float32, ("reference",))
    assert set(calls) == {(True, True)}
