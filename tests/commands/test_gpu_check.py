"""``benchmarks/gpu_check.py`` without a GPU: the whole command, and its behaviour on failures."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import emulator
import gpu_cases
import gpu_check
import gpu_tasks
import gpu_worker
import pytest
import torch

from fastseq.parity.cases import GRIDS

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
needs_emulator = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]


def start(*options, python=sys.executable, **environment) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSEQ_", "TRITON_INTERPRET", "PYTHONPATH"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([python, *COMMAND[1:], *map(str, options)], env=env | environment, cwd="/", **pipes)


@pytest.fixture
def stranger(tmp_path) -> Path:
    """The Python of an environment with torch and Triton in which fastseq is not installed, editably or otherwise.

    A folder on the path brings its packages; Python reads the .pth files, among them of editable installs, of its own
    site-packages only.
    """
    venv.create(tmp_path / "venv", symlinks=True)
    (own,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "packages.pth").write_text("\n".join(packages))
    python = tmp_path / "venv/bin/python"
    found = "import importlib.util; print(importlib.util.find_spec('fastseq'))"
    done = subprocess.run([python, "-c", found], cwd=tmp_path, env={}, capture_output=True, text=True)
    if done.stdout.strip() != "None":
        pytest.skip(f"fastseq lies in a folder of packages: {done.stdout or done.stderr}")
    return python


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@needs_triton
def test_the_simulated_command_walks_everything_where_fastseq_is_not_installed(tmp_path, stranger):
    process = start("--out", tmp_path, "--minutes", 60, python=stranger, FASTSEQ_SIM="1", OMP_NUM_THREADS="1")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors + (tmp_path / "log.txt").read_text()
    data, text = read(tmp_path), (tmp_path / "report.md").read_text()
    assert data["finished"]
    assert [stage["stage"] for stage in data["stages"]] == list(gpu_check.STAGES)
    assert "no GPU; native is" in data["environment"]["facts"]["simulation"]
    checked = {(row["op"], row["backend"]) for row in data["parity"] if row["verdict"] == "ok"}
    assert checked >= {(op, name) for op in ("lstm_cell", "lstm", "attention") for name in ("native", "triton")}
    timed = {(row["case"].split(" ")[0], row["mode"], row["candidate"]) for row in data["bench"]}
    for kind in ("lstm", "packed", "cell", "additive", "dot"):
        for mode in ("inference", "training"):
            assert {(kind, mode, name) for name in ("native", "triton", "auto")} <= timed
    row = next(row for row in data["bench"] if row["case"].startswith("lstm (3,") and row["candidate"] == "native")
    assert row["us_per_step"] == pytest.approx(1e3 * row["median_ms"] / 3)
    assert row["over_limit"] == pytest.approx(row["us_per_step"] / row["limit_us_per_step"])
    assert "its times mean nothing" in text.splitlines()[0]
    kernels = {(row["kernel"], row["dtype"]) for row in data["kernels"] if row["verdict"] == "ok"}
    assert kernels == {("cluster", "bf16"), *((k, dtype) for k in ("grid", "steps") for dtype in ("bf16", "float32"))}
    timed = {(row["case"], row["mode"], row["candidate"]) for row in data["smoke"] if "us_per_step" in row}
    for mode in ("inference", "training"):
        for name in ("nn.LSTM", "native cluster", "native grid"):
            assert ("lstm (3, 2, 8, 8) bf16", mode, name) in timed
        assert ("lstm (3, 2, 8, 8) proj 4", mode, "native grid") in timed
        assert ("lstm (3, 2, 8, 8) proj 4", mode, "native cluster") not in timed, (
            "clusters have no full float32 products"
        )
    assert [row["verdict"] for row in data["load"]] == ["ok"] * 4, "two repeats, two streams, layers"
    for title in ("## Stages", "## Smoke", "## Kernels against float64", "## Parity", "## Speed"):
        assert title in text
    assert "## Wrong" not in text
    for title in ("## Smoke", "## Kernels against float64", "## Beside other work"):
        assert printed.count(title) == 2, "at once and at the end"


def test_a_cut_run_leaves_whole_files(tmp_path):
    """Killed in the middle of the parity stage: the findings until then are kept."""
    process = start("--out", tmp_path, "--minutes", 5, "--only", "parity", FASTSEQ_SIM="1", OMP_NUM_THREADS="1")
    while process.poll() is None and not ((tmp_path / "report.json").exists() and read(tmp_path)["parity"]):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    data = read(tmp_path)
    assert data["parity"][0]["verdict"] == "ok"
    assert not data["finished"]
    assert "not finished" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    process = start("--out", tmp_path)
    out, errors = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert errors == "gpu_check: torch finds no GPU here; FASTSEQ_SIM=1 runs the command without one.\n"


@pytest.mark.parametrize("name", ["gpu_check", "gpu_worker"])
def test_a_bare_checkout_is_enough(name, tmp_path):
    """The command and its worker import fastseq from their own checkout; -S skips .pth files, so editable installs."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTSEQ_")}
    environment["PYTHONPATH"] = os.pathsep.join(packages)
    folder = ROOT / "benchmarks"
    location = f"import sys; sys.path.insert(0, {str(folder)!r}); import {name}, fastseq; print(fastseq.__file__)"
    script = [str(folder / f"{name}.py"), *(["--help"] if name == "gpu_check" else [])]
    for arguments in (["-c", location], script):
        command = [sys.executable, "-S", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, input="", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert arguments is script or Path(done.stdout.strip()) == ROOT / "fastseq" / "__init__.py"


def test_help_teaches():
    process = start("--help")
    out, _ = process.communicate()
    assert process.returncode == 0
    for name in (*gpu_check.STAGES, "Exit code", "FASTSEQ_SIM=1", "report.json"):
        assert name in out


STUB = """
import json, os, sys, time
def send(message):
    print(json.dumps(message), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task["task"] == "environment":
        send({"row": {"facts": {"simulation": "a stub"}, "cuda_kernels": True}})
    else:
        key = {k: task[k] for k in ("op", "case", "dtype", "mode") if k in task}
        for backend in task["backends"]:
            send({"doing": backend})
            if backend == "native":
                FATE
            name = {"backend": backend, "candidate": backend}
            send({"row": key | name | {"verdict": "ok", "of_bound": 0.5, "detail": ""}})
    print("not JSON: output of a tool that wraps the worker")
    send({"done": True})
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Replace the worker by a script whose native backend ends in ``fate``."""

    def replace(fate: str, *arguments: str) -> None:
        script = tmp_path / "stub.py"
        script.write_text(STUB.replace("FATE", fate))
        monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, str(script), *arguments])
        monkeypatch.setattr(gpu_check, "START_SECONDS", 20.0)
        for module in (gpu_cases, gpu_check, gpu_tasks, gpu_worker):
            monkeypatch.setattr(module, "SIMULATED", True)

    return replace


FATES = {"time.sleep(99)": "hung: nothing for 3 s while doing native; killed",
         "os._exit(7)": "died with exit code 7 while doing native"}  # fmt: skip


@pytest.mark.parametrize(("stage", "fate"), list(zip(("parity-full", "bench"), FATES, strict=True)))
def test_a_lost_worker_costs_its_own_family_only(stage, fate, stub, tmp_path, monkeypatch):
    """A family in the full grid is one op here; in bench it is one kind of case, with two modes."""
    stub(fate)
    silence = "3" if "sleep" in fate else "60"  # longer than a slow but working stub
    monkeypatch.setattr(gpu_check, "TOO_OFTEN", 1)
    code = gpu_check.main(["--out", str(tmp_path), "--only", stage, "--silence", silence, "--minutes", "60"])
    assert code == 1
    section, other = ("parity", "triton") if stage == "parity-full" else ("bench", "auto")
    rows = read(tmp_path)[section]
    lost = [row for row in rows if row["verdict"] == "lost"]
    tasks = gpu_tasks.parity("full", "native", "triton") if section == "parity" else gpu_tasks.bench("native", "auto")
    families = dict.fromkeys(" ".join(p for p in gpu_check.family(task, "native") if p) for task in tasks)
    assert [row["detail"] for row in lost] == [FATES[fate]] * len(families), "one loss each, then no more tasks"
    note = f"{len(tasks)} of {len(tasks)} tasks; given up: {', '.join(families)}"
    assert read(tmp_path)["stages"][-1]["note"] == note
    key = "backend" if section == "parity" else "candidate"
    assert sum(row[key] == other and row["verdict"] == "ok" for row in rows) == len(tasks)
    text = (tmp_path / "report.md").read_text()
    assert "## Wrong" in text and FATES[fate] in text


def test_losses_of_one_kernel_leave_the_other(stub, tmp_path, monkeypatch):
    """The first witness: two hangs of the cluster kernel in one dtype took all native work from the run."""
    stub('if task.get("kernel") == "cluster" and task["dtype"] == "bf16": os._exit(7)')
    monkeypatch.setattr(gpu_check, "TOO_OFTEN", 1)
    assert gpu_check.main(["--out", str(tmp_path), "--only", "kernels", "--minutes", "60"]) == 1
    rows = read(tmp_path)["kernels"]
    verdicts = {(row.get("kernel"), row["dtype"], row["verdict"]) for row in rows}
    assert ("cluster", "bf16", "lost") in verdicts and ("cluster", "bf16", "ok") not in verdicts
    served = [row for row in rows if row["verdict"] == "ok"]
    assert len(served) == sum(task["kernel"] != "cluster" for task in gpu_tasks.kernels())


def test_native_hangs_are_noticed_sooner_than_a_compiling_backend(stub, tmp_path):
    check = gpu_check.Check(gpu_check.parse(["--out", str(tmp_path)]), "")
    assert check.native_silence() == 90, "the driver may be compiling PTX"
    check.report.data["environment"] = {"compiled_for_this_gpu": True}
    assert check.native_silence() == gpu_check.NATIVE_SILENCE
    stub("time.sleep(99)")
    worker = gpu_check.Worker(gpu_check.WORKER, tmp_path / "log.txt")
    with pytest.raises(gpu_check.Lost, match="nothing for 1 s while doing native"):
        list(worker.request({"task": "parity", "backends": ["native"]}, 20.0, 20.0, {"native": 1.0}))


def test_the_order_decides_the_most_first():
    """The native kernels are judged before anything of Triton runs, and Triton compiles last."""
    stages = list(gpu_check.STAGES)
    assert stages[:5] == ["environment", "latencies", "kernels", "smoke", "load"]
    assert stages.index("bench") < stages.index("compile") < stages.index("parity-triton")


def test_on_a_gpu_the_smoke_reaches_every_kernel(monkeypatch):
    for module in (gpu_cases, gpu_tasks):
        monkeypatch.setattr(module, "SIMULATED", False)
    kernels = {(task["kernel"], task["dtype"]) for task in gpu_tasks.kernels()}
    assert kernels == {
        *((kernel, dtype) for kernel in ("grid", "steps") for dtype in ("bf16", "f16", "tf32", "float32")),
        *(("cluster", dtype) for dtype in ("bf16", "f16", "tf32")),
    }
    sizes = {case.options["shape"][-1] for case in gpu_cases.parity_case_list("kernels")}
    assert sum("proj_size" in case.options for case in gpu_cases.parity_case_list("kernels")) == 2
    projected = {(task["dtype"], *task["backends"]) for task in gpu_tasks.smoke() if " proj " in task["case"]}
    assert projected >= {("bf16", "native cluster", "native grid"), ("tf32", "native grid")}
    variants = [
        task["backends"] for task in gpu_tasks.parity("quick", "native", "triton") if task["op"] == "lstm_variant"
    ]
    assert variants and all(backends == ["triton"] for backends in variants)
    assert not any(task["op"] == "lstm_variant" for task in gpu_tasks.parity("quick", "native"))
    assert min(sizes) == 64 and max(sizes) == 2048
    timed = {(task["dtype"], name) for task in gpu_tasks.smoke() for name in task["backends"]}
    assert {("default", "native grid"), ("default", "native cluster"), ("bf16", "native cluster")} <= timed


def test_an_exception_in_a_task_is_a_row_and_the_worker_goes_on(monkeypatch):
    def broken(task, send):
        send({"doing": "timing"})
        raise RuntimeError("CUDA out of memory")

    sent = []
    monkeypatch.setitem(gpu_worker.TASKS, "bench", broken)
    monkeypatch.setattr(gpu_worker, "SIMULATED", True)
    gpu_worker.serve({"task": "bench", "case": "lstm", "mode": "training"}, sent.append)
    row = {"case": "lstm", "mode": "training", "candidate": "timing", "verdict": "failed"}
    row |= {"detail": "RuntimeError: CUDA out of memory"}
    assert sent == [{"doing": "timing"}, {"row": row}, {"done": True}]


def test_a_first_answer_may_take_longer_than_the_next(stub, tmp_path):
    stub("time.sleep(99)")
    worker = gpu_check.Worker(gpu_check.WORKER, tmp_path / "log.txt")
    with pytest.raises(gpu_check.Lost, match="nothing for 1 s while doing native"):
        list(worker.request({"task": "parity", "backends": ["native"]}, silence=1.0, start=20.0))


def test_a_worker_that_never_starts(stub, tmp_path, monkeypatch):
    stub("pass")
    monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, "-c", "raise SystemExit(3)"])
    assert gpu_check.main(["--out", str(tmp_path), "--only", "parity", "--minutes", "5"]) == 1
    notes = [stage["note"] for stage in read(tmp_path)["stages"]]
    assert notes[0] == "broken off: died with exit code 3 while doing starting"
    assert notes[1].startswith(f"{gpu_check.TOO_OFTEN} of 3 tasks") and notes[1].endswith(
        "no worker starts, see log.txt"
    )
    assert gpu_check.main(["--out", str(tmp_path), "--only", "latencies"]) == 1


def test_time_that_is_up_leaves_tasks(stub, tmp_path):
    stub("time.sleep(0.2)")
    assert gpu_check.main(["--out", str(tmp_path), "--only", "bench", "--minutes", "0.02"]) == 0
    done, total = map(int, read(tmp_path)["stages"][-1]["note"].split(" ")[:3:2])
    assert done < total


WRONG_LSTM = """
import os, sys
sys.path.insert(0, {folder!r})
import gpu_worker
from fastseq.ops.lstm import native
right = native.forward
def bent(layer, want):
    result = right(layer, want)
    return result._replace(output=result.output * 1.05)
native.forward = bent
gpu_worker.main()
"""


def test_a_wrong_kernel_is_exit_code_1(tmp_path, monkeypatch, stub):
    stub("pass")
    script = tmp_path / "wrong.py"
    script.write_text(WRONG_LSTM.format(folder=str(ROOT / "benchmarks")))
    monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, str(script)])
    monkeypatch.setenv("FASTSEQ_SIM", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("compile", "parity-triton", "parity-full", "bench-triton"):
        monkeypatch.delitem(gpu_check.STAGES, name)
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "60", "--silence", "600"]) == 1
    data = read(tmp_path)
    verdicts = {row["op"]: row["verdict"] for row in data["parity"] if row["op"] in ("lstm", "attention")}
    assert verdicts == {"lstm": "WRONG", "attention": "ok"}
    assert all("exceeds" in row["detail"] for row in data["parity"] if row["op"] == "lstm")
    wrong = {(row["case"].split(" ")[0], row["candidate"]) for row in data["bench"] if row["verdict"] == "WRONG"}
    assert wrong >= {("lstm", "native"), ("packed", "native")}
    timed = {(row["case"], row["candidate"]) for row in data["bench"] if "us_per_step" in row}
    assert not {(case, name) for case, name in timed if case.startswith("lstm (") and name == "native"}, "no figure"
    assert any(case.startswith("cell") and name == "native" for case, name in timed)


TOOLS = {
    "clean": ('exec "$@"', "clean", 0),
    "finds": ('"$@"; exit 9', "FOUND", 1),
    "refuses": ("echo no such device >&2; exit 3", "not finished", 0),
    "breaks": ('"$@"; exit 4', "refused (exit code 4)", 0),
}


@pytest.mark.parametrize("name", TOOLS)
def test_sanitizers(name, stub, tmp_path, monkeypatch):
    """A finding counts; a tool that refuses is reported."""
    stub("pass")
    script, verdict, wrong = TOOLS[name]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    skip = 'while [ "${1#--}" != "$1" ]; do shift 2; done\n'  # the tool's own options
    tool.write_text(f"#!/bin/sh\n{skip}{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    for module in (gpu_cases, gpu_check, gpu_tasks, gpu_worker):
        monkeypatch.setattr(module, "SIMULATED", False)
    check = gpu_check.Check(gpu_check.parse(["--out", str(tmp_path / "out")]), "")
    assert gpu_check.run_sanitizers(check) == "done"
    rows = check.report.data["sanitizer"]
    assert [(row["tool"], row["verdict"]) for row in rows] == [(tool, verdict) for tool in gpu_check.SANITIZERS]
    assert len(check.report.wrong()) == wrong * len(rows)


def test_the_smallest_cases_are_in_the_grid():
    names = {f"{case.op} {case.name}" for case in GRIDS["quick"]()}
    assert set(gpu_check.SMALLEST) <= names


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_latencies_compile_for_every_architecture(tmp_path):
    source = ROOT / "benchmarks" / "latencies.cu"
    command = ["nvcc", *gpu_check.NVCC_FLAGS, "-Xptxas", "-warn-spills,-Werror", source, "-o", tmp_path / "latencies"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = subprocess.run([tmp_path / "latencies"], capture_output=True, text=True)
    if not torch.cuda.is_available():
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith("GPU: ")


def test_latencies_become_rows(tmp_path, monkeypatch, stub):
    stub("pass")
    monkeypatch.setattr(gpu_check, "SIMULATED", False)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "build").mkdir()
    (tmp_path / "benchmarks" / "latencies.cu").write_text("")
    program = tmp_path / "build" / "latencies"
    row = {"quantity": "grid barrier", "where": "132 blocks", "number": 0.9, "value": "0.9 µs"}
    program.write_text(f"#!/bin/sh\necho '{json.dumps(row)}'\necho 'st.async: trapped' >&2\nexit 1\n")
    program.chmod(0o755)
    check = gpu_check.Check(gpu_check.parse(["--out", str(tmp_path / "out")]), "")
    assert gpu_check.measure_latencies(check) == "exit code 1: st.async: trapped"
    assert check.report.data["latencies"] == [row], "rows before the failure are kept"
