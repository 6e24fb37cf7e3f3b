"""The triton backends: suites in Triton's interpreter, refusals, selection by ``auto``, warm-up.

Triton reads TRITON_INTERPRET when a kernel is defined, so each suite (triton_*.py) runs in a separate process. To run
one directly: TRITON_INTERPRET=1 python -m pytest tests/triton/triton_lstm.py
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastseq import _native, dispatch, ops
from fastseq.dispatch import objection, select
from fastseq.ops.attention.spec import AttentionCall
from fastseq.ops.common.triton import runtime
from fastseq.ops.linear_cross_entropy.spec import LinearCrossEntropyCall
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.ops.lstm_cell.spec import LSTMCellCall
from fastseq.ops.lstm_variant.spec import LSTMVariantCall

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")
CALLS = {
    "lstm_cell": LSTMCellCall("cuda", torch.float32, 16),
    "lstm": LSTMCall("cuda", torch.float32, 4, 16, batch=2, steps=3),
    "lstm_variant": LSTMVariantCall("cuda", torch.float32, 16, batch=2, steps=3),
    "attention": AttentionCall("additive", "cuda", torch.float32),
    "linear_cross_entropy": LinearCrossEntropyCall("cuda", torch.float32, 16, 1 << 14, rows=1 << 14),
}

SUITES = [f"triton_{name}.py" for name in ("lstm_cell", "lstm", "lstm_variant", "attention", "loss")]


def run(*command, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "FASTSEQ_", "PYTEST"))}
    return subprocess.run([sys.executable, *command], env=env | environment, cwd=TESTS, text=True, capture_output=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_in_the_interpreter(suite):
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    process = run("-m", "pytest", *options, str(TESTS / suite), TRITON_INTERPRET="1")
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture
def a_gpu(monkeypatch):
    """Simulate a machine with triton and a GPU of compute capability 9.0."""
    runtime._unfit.cache_clear()
    monkeypatch.setattr(runtime, "_installed", lambda: True)
    monkeypatch.setattr(runtime, "_can_launch", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield monkeypatch
    runtime._unfit.cache_clear()


@pytest.mark.parametrize("op", CALLS)
def test_what_triton_refuses(op, a_gpu):
    call = CALLS[op]
    assert objection(op, "triton", call) is None
    for changes, sentence in (
        ({"dtype": torch.float64}, "computes in float32, bfloat16, float16 .got torch.float64.; use backend="),
        ({"device": "cpu"}, "runs on CUDA and ROCm tensors .got cpu.; use backend='auto'"),
        ({"compiling": True}, "not registered with torch.compile and torch.export; use backend='auto'"),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: the triton backend .*{sentence}"):
            select(op, "triton", call._replace(**changes))
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 0 else (7, 5))
    assert objection(op, "triton", call._replace(device_index=0)) is None
    with pytest.raises(
        RuntimeError, match=r"needs compute capability 8.0 or newer, GPU 1 has 7.5; use backend='torch'"
    ):
        select(op, "triton", call._replace(device_index=1))
    a_gpu.setattr(runtime, "_can_launch", lambda: False)
    with pytest.raises(RuntimeError, match=f"{op}: triton compiles a small C module .* needs gcc or clang"):
        select(op, "triton", call)
    a_gpu.setattr(runtime, "_installed", lambda: False)
    with pytest.raises(RuntimeError, match=f"{op}: triton is not installed; pip install triton"):
        select(op, "triton", call)


def test_auto_on_cuda_without_compiled_kernels(a_gpu, monkeypatch):
    """Triton ranks below cuDNN and above the reference, until measured."""
    monkeypatch.setattr(_native, "why_not_cuda", lambda index=None: "they were not built.")
    lstm, attention = CALLS["lstm"], CALLS["attention"]
    assert select("lstm", "auto", lstm) == "torch"
    for changes in ({}, {"proj_size": 2}):
        assert select("lstm", "auto", lstm._replace(return_cell_states=True, **changes)) == "triton"
    assert select("lstm", "auto", lstm._replace(return_cell_states=True, dtype=torch.float64)) == "reference"
    assert select("lstm_cell", "auto", CALLS["lstm_cell"]) == "triton"
    assert select("lstm_cell", "auto", CALLS["lstm_cell"]._replace(dtype=torch.float64)) == "torch"
    assert select("lstm_variant", "auto", CALLS["lstm_variant"]) == "triton"
    assert select("lstm_variant", "auto", CALLS["lstm_variant"]._replace(compiling=True)) == "reference"
    assert select("attention", "auto", attention) == "triton"
    assert select("attention", "auto", attention._replace(score="dot")) == "torch"
    assert select("attention", "auto", attention._replace(compiling=True)) == "reference"
    assert select("attention", "auto", attention._replace(device="cpu")) != "triton"
    loss = CALLS["linear_cross_entropy"]
    assert select("linear_cross_entropy", "auto", loss) == "triton"
    assert select("linear_cross_entropy", "auto", loss._replace(rows=1 << 13)) == "torch"
    for op, call in CALLS.items():
        assert dispatch.objection(op, "triton", call) is None  # `fastseq info` shows "yes"


@needs_triton
def test_tensors_on_the_cpu_are_refused_by_name():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 before Python starts"):
        ops.lstm_cell(torch.randn(2, 8), torch.randn(2, 2), backend="triton")


@needs_triton
def test_info_and_explain_import_neither_triton_nor_its_driver():
    code = (
        "import sys, torch, fastseq; fastseq.info(); fastseq.explain(fastseq.LSTM(2, 3), torch.randn(2, 2, 2))\n"
        "assert 'triton' not in sys.modules\n"
        "from fastseq.ops.lstm import triton_kernels\n"
        "import triton; assert triton.runtime.driver._active is None and triton.runtime.driver._default is None"
    )
    process = run("-c", code)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_an_amd_gpu_other_than_cdna_is_refused(index, a_gpu):
    names = ["gfx942:sramecc+:xnack-", "gfx1100"]
    a_gpu.setattr(torch.version, "hip", "6.4")
    a_gpu.setattr(runtime, "_chip", lambda index: runtime.Chip(names[index].split(":")[0], 65536))
    sentence = objection("lstm", "triton", CALLS["lstm"]._replace(device_index=index))
    assert sentence is None if index == 0 else "needs a CDNA GPU (gfx90a, gfx942), GPU 1 is gfx1100" in sentence


def test_a_machine_without_a_compiler_or_headers_cannot_launch(monkeypatch, tmp_path):
    can_launch = runtime._can_launch.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not can_launch()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert not can_launch()
    (tmp_path / "Python.h").touch()
    assert can_launch()


def test_a_chip_is_read_from_the_device(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin = 9, 0, 232448
        gcnArchName, shared_memory_per_block = "gfx942:sramecc+:xnack-", 65536

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    read = runtime._chip.__wrapped__
    assert read(0) == runtime.CHIPS["sm_90"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert read(0) == runtime.CHIPS["gfx942"]


def test_float32_products_follow_torchs_switch(monkeypatch):
    precision, chips = runtime.dot_precision, runtime.CHIPS
    assert precision(torch.float32, chips["sm_90"]) == "tf32x3"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert precision(torch.float32, chips["sm_90"]) == "tf32"
    assert precision(torch.float32, chips["gfx942"]) == precision(torch.bfloat16, chips["sm_90"]) == "ieee"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--hidden-size", "8"], "no GPU; name one to compile for: --chip"), (["--hidden-size", "0"], "at least 1")],
    ids=["no GPU", "no size"],
)
def test_warmup_refuses_with_a_sentence(arguments, sentence):
    process = run("-m", "fastseq", "warmup", *arguments)
    assert (process.returncode, process.stdout) == (2, "")
    assert sentence in process.stderr


def test_warmup_without_triton():
    code = "import sys; sys.modules['triton'] = None; from fastseq.cli import main; main(sys.argv[1:])"
    process = run("-c", code, "warmup", "--hidden-size", "8", "--chip", "sm_80")
    assert process.returncode == 2
    assert "triton is not installed; pip install triton" in process.stderr
