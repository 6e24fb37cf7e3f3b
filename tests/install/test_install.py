"""Installs without a compiler, and imports where a part is missing: in fresh folders and fresh processes."""

import contextlib
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from fastseq import _native
from fastseq.dispatch import objection, select
from fastseq.ops.attention.spec import AttentionCall
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.ops.lstm_cell.spec import LSTMCellCall

ROOT = Path(__file__).parents[2]
HIDE_LIBRARY = """
import sys
class Hide:
    def find_spec(self, name, *_):
        if name == "fastseq._C":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""
BREAK_LIBRARY = HIDE_LIBRARY.replace("ModuleNotFoundError(name, name=name)", "ImportError('undefined symbol: gone')")
TRAIN_ONE_STEP = """
import torch
import fastseq
torch.manual_seed(0)
x = torch.randn(4, 2, 3)
for backend in ("auto", "reference", "torch"):
    y, _ = fastseq.LSTM(3, 5, backend=backend)(x)
    y.sum().backward()
"""


def run(code, site=None, **environment):
    """Run code in a fresh process outside the source tree; returns its standard output.

    site: the directory of another installation to import fastseq from, instead of the one under test.
    """
    command = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTSEQ_")} | environment
    if site is not None:
        command.insert(1, "-S")  # no .pth files: an editable install would provide its compiled library
        env["PYTHONPATH"] = os.pathsep.join((str(site), str(Path(torch.__file__).parent.parent)))
    process = subprocess.run(command, env=env, text=True, capture_output=True, cwd="/")
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def source_tree(target):
    """Copy the files of a clone, without anything built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "_build.json")
    for name in ("fastseq", "csrc", "build_support"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def pip_install(tmp_path, **environment):
    """Install a copy of the sources into a new folder -> (folder, the finished process)."""
    source, target = source_tree(tmp_path / "source"), tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--no-build-isolation"]
    process = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(target), str(source)],
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return target, process


@pytest.fixture
def no_compiler(tmp_path):
    """An environment with no program on the PATH."""
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty), "CXX": ""}


def test_install_without_the_compiled_operators(tmp_path):
    target, process = pip_install(tmp_path, FASTSEQ_NATIVE="0")
    assert process.returncode == 0, process.stdout
    assert "fastseq: installing without the compiled operators: FASTSEQ_NATIVE=0." in process.stdout
    assert not list(target.glob("fastseq/_C*"))
    assert (target / "fastseq/py.typed").exists()
    code = (
        "import fastseq; from fastseq import _native; print(fastseq.__file__, _native.available(), _native.why_not())"
    )
    where, available, why = run(code + TRAIN_ONE_STEP, site=target).split(maxsplit=2)
    assert Path(where).is_relative_to(target)
    assert available == "False"
    assert "fastseq._C is not part of this installation (FASTSEQ_NATIVE=0)." in why


def test_install_with_no_compiler_on_the_path(tmp_path, no_compiler):
    target, process = pip_install(tmp_path, FASTSEQ_NATIVE="", **no_compiler)
    assert process.returncode == 0, process.stdout
    assert "without the compiled operators: no C++ compiler was found (install g++ or clang++" in process.stdout
    assert not list(target.glob("fastseq/_C*"))
    report = run("from fastseq.info import info; print(info())" + TRAIN_ONE_STEP, site=target)
    assert "compiled operators (no C++ compiler was found (install g++ or clang++, or set CXX))" in report


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"FASTSEQ_NATIVE": "yes"}, "FASTSEQ_NATIVE must be 0, 1 or unset, got 'yes'"),
        (
            {"FASTSEQ_CUDA": "1", "FASTSEQ_NATIVE": "0"},
            "FASTSEQ_CUDA=1, but FASTSEQ_NATIVE=0",
        ),
        ({"FASTSEQ_CUDA": "2"}, "FASTSEQ_CUDA must be 0, 1 or unset, got '2'"),
        ({"FASTSEQ_NATIVE": "1", "CXX": "no-such-compiler"}, "FASTSEQ_NATIVE=1, but no C++ compiler was found"),
    ],
    ids=["unknown value", "CUDA without native", "unknown CUDA value", "forced without compiler"],
)
def test_setup_refuses_with_a_sentence(tmp_path, environment, sentence):
    process = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=source_tree(tmp_path / "source"),
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )
    assert process.returncode != 0
    assert sentence in process.stderr


def load_setup(monkeypatch):
    """Return the functions of setup.py by name."""
    for name in ("TORCH_CUDA_ARCH_LIST", "FASTSEQ_CPU_KERNELS", "FASTSEQ_NATIVE", "FASTSEQ_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_an_old_setuptools_is_refused_with_a_sentence(monkeypatch):
    """Python 3.11 brings setuptools 65 to every new environment; pip uses it with --no-build-isolation."""
    main = load_setup(monkeypatch)["main"]
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools 77 or later \(this environment has 65\.5\.0\)"):
        main()


@pytest.mark.parametrize(
    ("environment", "part", "reason"),
    [
        ({"FASTSEQ_CUDA": "0"}, "CUDA kernels", "FASTSEQ_CUDA=0"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0"}, "CUDA kernels", r"they need compute capability 8\.0"),
        ({"FASTSEQ_CPU_KERNELS": "avx2,avx512"}, "CPU kernels for baseline, avx512_bf16", "FASTSEQ_CPU_KERNELS=avx2,"),
        ({"FASTSEQ_NATIVE": "0"}, "compiled operators", "FASTSEQ_NATIVE=0"),
        ({"CXX": "{old}"}, "compiled operators", r"old-g\+\+ is g\+\+ 11; g\+\+ 12 or later is needed \(set CXX\)"),
    ],
    ids=["switch", "architecture", "instruction set", "no operators", "old compiler"],
)
def test_the_build_records_what_it_leaves_out(environment, part, reason, tmp_path, monkeypatch):
    """In _build.json, which _native reads, and which `fastseq info` shows."""
    (tmp_path / "old-g++").write_text("#!/bin/sh\necho 'g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0'\n")
    (tmp_path / "old-g++").chmod(0o755)
    setup = load_setup(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(old=tmp_path / "old-g++"))
    setup["record"](tmp_path)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.setattr(_native, "build_record", _native.build_record.__wrapped__)
    assert re.search(reason, _native.left_out()[part])
    assert re.search(rf"left out at install +.*{part} \(.*{reason}", importlib.import_module("fastseq.info").info())


def test_instruction_sets(monkeypatch):
    instruction_sets = load_setup(monkeypatch)["instruction_sets"]
    assert instruction_sets() == ["baseline", "avx2", "avx512", "avx512_bf16"]
    for value, names in (("avx2", ["avx2"]), ("avx512_bf16, baseline", ["baseline", "avx512", "avx512_bf16"])):
        monkeypatch.setenv("FASTSEQ_CPU_KERNELS", value)
        assert instruction_sets() == names
    monkeypatch.setenv("FASTSEQ_CPU_KERNELS", "avx2 sse9")
    with pytest.raises(SystemExit, match="FASTSEQ_CPU_KERNELS names 'sse9'; expected a list of baseline, avx2"):
        instruction_sets()


@pytest.mark.skipif(_native.why_not_cuda() != "", reason=_native.why_not_cuda())
def test_cuda_operators_are_registered_without_a_gpu():
    """A library with CUDA kernels loads beside any build of torch, a CPU build included."""
    names = ("lstm_cell_forward", "lstm_cell_backward", "lstm_recurrence_forward", "lstm_recurrence_backward")
    for name in (*names, "attention_forward", "attention_backward", "lstm_step"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseq::{name}", "CUDA"), name


def test_a_library_without_cuda_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "_module", SimpleNamespace(cuda_architectures=""))
    monkeypatch.setattr(_native, "left_out", lambda: {"CUDA kernels": "FASTSEQ_CUDA=0"})
    sentence = "the compiled library was built without CUDA kernels: FASTSEQ_CUDA=0. To build them, install the CUDA"
    assert sentence in _native.why_not_cuda()
    call = LSTMCall("cuda", torch.float32, 8, 8, batch=2, steps=3)
    assert sentence in objection("lstm", "native", call)


def test_a_gpu_that_cannot_run_the_cuda_kernels_is_served_by_others(monkeypatch):
    problem = "no kernel image is available for execution on the device"
    monkeypatch.setattr(
        _native, "_module", SimpleNamespace(cuda_architectures="8.0 9.0+PTX", cuda_problem=lambda: problem)
    )
    monkeypatch.setattr(_native, "_why_not_gpu_number", _native._why_not_gpu_number.__wrapped__)
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "device": contextlib.nullcontext(),
        "get_device_capability": (7, 5),
        "get_device_name": "Tesla T4",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    calls = [
        LSTMCall("cuda", torch.float32, 8, 8, batch=2, steps=3, compiling=compiling) for compiling in (False, True)
    ]
    calls += [AttentionCall("additive", "cuda", torch.float32), LSTMCellCall("cuda", torch.float32, 8)]
    for op, call in zip(("lstm", "lstm", "attention", "lstm_cell"), calls, strict=True):
        sentence = objection(op, "native", call)
        assert "Tesla T4 (compute capability 7.5)" in sentence
        assert "8.0, 9.0+PTX" in sentence
        assert problem in sentence
        assert select(op, "auto", call) != "native"


def test_a_traced_call_takes_the_check_of_the_gpu_as_a_constant(monkeypatch):
    monkeypatch.setattr(_native, "_why_not_gpu_number", lambda index: "x" * len(os.listdir("/")))  # cannot be traced

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + 1 if _native._why_not_gpu(0) else x

    assert traced(torch.zeros(1)) == 1


@pytest.mark.skipif(_native.why_not_cuda() != "" or torch.cuda.is_available(), reason="needs CUDA kernels and no GPU")
def test_the_library_reports_that_there_is_no_gpu():
    assert "driver" in _native._module.cuda_problem()


def test_a_failing_compiler_is_an_error(tmp_path):
    compiler = tmp_path / "bad-compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-dumpversion*|*-dumpfullversion*|*--version*) echo 12.2.0;; *) exit 1;; esac\n'
    )
    compiler.chmod(0o755)
    _, process = pip_install(tmp_path, CXX=str(compiler), FASTSEQ_NATIVE="", FASTSEQ_CUDA="0", MAX_JOBS="1")
    assert process.returncode != 0
    assert "Set FASTSEQ_NATIVE=0 to install without the compiled operators." in process.stdout
    assert "csrc/cpu/isa/avx2.cpp does not compile" in process.stdout  # and names the file


def test_import_without_the_library():
    report = "from fastseq import _native; print(_native.why_not()); print(_native.build_info())"
    why, build_info = run(HIDE_LIBRARY + report + TRAIN_ONE_STEP).splitlines()
    assert "FASTSEQ_NATIVE=1 pip install" in why
    assert build_info == "{}"


def test_a_library_that_does_not_load_keeps_its_error():
    report = "from fastseq import _native; print(_native.why_not())"
    why = run(BREAK_LIBRARY + report + TRAIN_ONE_STEP)
    assert "fastseq._C failed to load (undefined symbol: gone). To build it" in why


def test_import_with_triton_blocked():
    run("import sys; sys.modules['triton'] = None\n" + TRAIN_ONE_STEP)


def test_import_brings_torch_only():
    code = "import sys, torch; before = set(sys.modules); import fastseq; print(*(set(sys.modules) - before))"
    brought = {name.split(".")[0] for name in run(code).split()}
    extras = {
        "lightning",
        "pytorch_lightning",
        "matplotlib",
        "tokenizers",
        "sacrebleu",
        "jsonargparse",
        "triton",
        "numpy",
    }
    assert not brought & extras


@pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")
def test_build_info():
    info = _native.build_info()
    assert info["compiler"].startswith(("GCC", "Clang"))
    assert info["cpu"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    assert "-O3" in info["flags"]
    assert all(float(name.removesuffix("+PTX").rstrip("af")) >= 8 for name in info["cuda_architectures"])


@pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")
def test_an_unknown_instruction_set_is_refused():
    why = run("from fastseq import _native; print(_native.why_not())", FASTSEQ_CPU_ISA="sse9")
    assert "FASTSEQ_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or unset" in why
