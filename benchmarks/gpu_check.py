"""Check and time fastseq's kernels on this machine's GPU, in one command and a fixed time.

Builds or loads the library, checks every kernel against float64, runs NVIDIA's sanitizers, measures the latencies that
bound a recurrent step, then times fastseq against cuDNN, SDPA and eager torch, most informative cases first.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's fastseq, installed or not

import gpu_tasks
import triton_cache
from gpu_cases import SIMULATED, parity_case_list
from gpu_process import Lost, Worker, end_group
from gpu_report import Report
from gpu_worker import BACKEND_KEY

from fastseq.console import Bar
from fastseq.ops.common.triton.runtime import CHIPS

ROOT = Path(__file__).resolve().parents[1]
TRITON_CACHE = ROOT / "build" / "triton-cache"
WORKER = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py")]
START_SECONDS = 300.0  # until a worker's first answer: imports, a CUDA context, compiling the host-side device
TOO_OFTEN = 2  # hangs or crashes of a backend in one family of tasks after which it gets no further task of it
NATIVE_SILENCE = 10.0  # seconds; a native kernel with code for this GPU takes milliseconds
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
FINDING = 9  # their exit code for a finding
SMALLEST = (
    "lstm_cell (2, 3, 7)",
    "lstm (5, 3, 4, 7), form=lengths, reverse=True",
    "attention (3, 4, 5, 6), score=additive, padding=lengths",
)
# Code for an A100 and a Hopper, and PTX for newer GPUs.
NVCC_FLAGS = ["-O3", "-std=c++17", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")),
              "-gencode=arch=compute_90,code=compute_90"]  # fmt: skip
EPILOG = """\
stages, each with its share of the time; time left over passes to the next stage. The first five, about two minutes,
decide whether the native kernels run, are right and are fast; each prints its table at once.
  environment   versions, GPU, packages; builds the CUDA kernels if they are missing and nvcc is installed
  latencies     grid and cluster barriers, flags, distributed shared memory, how many clusters fit (latencies.cu)
  kernels       every native recurrence once, a few steps, against float64: dtypes, TF32, H 64 to 2048, projections
  smoke         cluster and grid kernel against cuDNN: H 256 to 1024, B 1 to 128, bfloat16, TF32; projections
  load          the same bits beside other work; two cooperative kernels on two streams; layers as a wavefront
  parity        the quick grid of `fastseq parity`, native: float32, bfloat16, float16
  sanitizer     compute-sanitizer memcheck, racecheck, synccheck, initcheck on the smallest cases
  bench         native and auto: LSTMs, decoding steps, attention: inference, training, CUDA graphs
  compile       starts compiling the Triton kernels ahead of time, in the background
  parity-triton the quick grid for triton
  parity-full   the rest of the full grid, native and triton
  bench-triton  the cases of bench for triton

output: report.json and report.md in --out, rewritten after every finding, so an interrupted run keeps its findings;
log.txt with the output of the tools; at the end the tables again on standard output, in at most 12,000 characters. All
work on the GPU runs in a child process. If a kernel hangs, that process is killed and the report says so; only the
figures of that kernel are missing.

examples:
  python benchmarks/gpu_check.py                            # everything, 9 minutes
  python benchmarks/gpu_check.py --only bench --minutes 30  # one stage, longer
  FASTSEQ_SIM=1 python benchmarks/gpu_check.py              # no GPU: run the command itself, with tiny shapes

Exit code: 0; 1 if something is wrong: parity, a kernel that hung or crashed, a finding of a sanitizer; 2 without a
GPU.
"""


class Check:
    """One run: its report, its clock and its worker."""

    def __init__(self, args: argparse.Namespace, command: str):
        self.args, self.report, self.log = args, Report(args.out, command), args.out / "log.txt"
        self.end = self.stage_end = time.monotonic() + 60 * args.minutes
        self.lost: Counter[tuple[str, ...]] = Counter()  # family of tasks -> hangs and crashes
        self.compilers: list[subprocess.Popen] = []
        self.outputs = tempfile.TemporaryDirectory(prefix="gpu_check-")  # of the tools; appended to log.txt at the end
        self._worker: Worker | None = None

    def seconds_left(self) -> float:
        """Seconds left to this stage."""
        return self.stage_end - time.monotonic()

    def request(self, task: dict) -> Iterator[dict]:
        """Yield the worker's rows for a task; start a worker if there is none. Raises Lost."""
        left = max(1.0, self.end - time.monotonic()) + 5.0
        start = 0.0
        if self._worker is None:
            self._worker = Worker(WORKER, self.log, **({"TRITON_INTERPRET": "1"} if SIMULATED else {}))
            start = START_SECONDS
        try:
            silences = {"native": min(self.native_silence(), left)}
            silence = min(self.args.silence, left)
            for message in self._worker.request(task, silence, min(start, left), silences):
                if "row" in message:
                    yield message["row"]
        except Lost:
            self.drop_worker()
            raise

    def native_silence(self) -> float:
        """Seconds after which a silent native kernel counts as hung; more where the driver compiles PTX first."""
        compiled = self.report.data["environment"].get("compiled_for_this_gpu", False)
        return min(NATIVE_SILENCE, self.args.silence) if compiled else self.args.silence

    def drop_worker(self) -> None:
        """Kill the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def run_tasks(self, tasks: list[dict], section: str) -> str:
        """Run the tasks in order until the stage's time is up -> a note for the report.

        A lost task is repeated without the backend that lost it. A backend that loses too many of a family, that is an
        op, a kernel and a dtype, gets no more tasks of that family.
        """
        waiting, bar = deque(tasks), Bar(max(1, len(tasks)))
        while waiting and self.seconds_left() > 0 and self.lost["starting",] < TOO_OFTEN:
            task = waiting.popleft()
            task["backends"] = [name for name in task["backends"] if self.lost[family(task, name)] < TOO_OFTEN]
            bar.show(f"{task['task']} {task['case']}")
            try:
                for row in self.request(task) if task["backends"] else ():
                    self.report.add(section, row)
            except Lost as lost:
                self._keep_loss(lost, task, section)
                if lost.doing in task["backends"]:
                    task["backends"].remove(lost.doing)
                    waiting.appendleft(task)
                    continue
            bar.step()
        bar.close()
        given_up = [" ".join(part for part in key if part) for key, count in self.lost.items() if count >= TOO_OFTEN]
        suffix = f"; given up: {', '.join(given_up)}" if given_up else ""
        suffix = "; no worker starts, see log.txt" if "starting" in given_up else suffix
        return f"{bar.done} of {len(tasks)} tasks{suffix}"

    def _keep_loss(self, lost: Lost, task: dict, section: str) -> None:
        self.lost[family(task, lost.doing) if lost.doing in task["backends"] else (lost.doing,)] += 1
        row = {key: task[key] for key in ("op", "case", "dtype", "mode", "kernel") if key in task}
        row[BACKEND_KEY[task["task"]]] = lost.doing
        self.report.add(section, row | {"verdict": "lost", "detail": lost.reason})

    def close(self) -> None:
        """Kill the running processes, and append the tools' outputs to log.txt."""
        self.drop_worker()
        for process in self.compilers:
            end_group(process)
        keep_compiled(self)
        with self.log.open("ab") as log:
            for path in sorted(Path(self.outputs.name).iterdir()):
                log.write(f"\n{path.name}:\n".encode() + path.read_bytes())
        self.outputs.cleanup()


def family(task: dict, backend: str) -> tuple[str, ...]:
    """The backend, op, kernel and dtype of a task: losses are counted for each family on its own."""
    return backend, task["op"], task.get("kernel", ""), task["dtype"]


def find_toolkit() -> None:
    """Add a CUDA toolkit's programs to PATH, from the places that setup.py searches."""
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if folder and Path(folder, "bin").is_dir():
            os.environ["PATH"] += f"{os.pathsep}{folder}/bin"


def check_environment(check: Check) -> str:
    """Find a brought Triton cache; collect facts; build the CUDA kernels if they are missing and can be built."""
    cache = "" if SIMULATED else triton_cache.bring(TRITON_CACHE)  # before the first worker starts
    row = _facts(check)
    if SIMULATED:
        return row["facts"]["simulation"]
    return f"{_cuda_kernels(check, row)}; {cache}"


def _cuda_kernels(check: Check, row: dict) -> str:
    if row["cuda_kernels"]:
        return f"the library has CUDA kernels for {row['facts']['native cuda']}"
    if shutil.which("nvcc") is None:
        return f"no native CUDA kernels, and no nvcc to build them: {row['facts']['native cuda']}"
    check.drop_worker()  # it has loaded the old library
    note = build_library(check, row["facts"]["chip"])
    _facts(check)
    return note


def _facts(check: Check) -> dict:
    (row,) = check.request({"task": "environment"})
    check.report.data["environment"] = row
    return row


def build_library(check: Check, chip: str) -> str:
    """Build fastseq._C in place, with CUDA kernels for this GPU only."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"FASTSEQ_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{chip[3:-1]}.{chip[-1]}"}
    with check.log.open("ab") as log:
        build = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = build.wait(check.seconds_left())
        except subprocess.TimeoutExpired:
            end_group(build)
            return "building the CUDA kernels took too long: build beforehand, pip install --no-build-isolation -e ."
    return "built the CUDA kernels" if code == 0 else "building the CUDA kernels failed, see log.txt"


def start_compiling(check: Check) -> str:
    """Compile into Triton's cache in the background, which spares the first calls the compilation."""
    chip = "sm_90" if SIMULATED else check.report.data["environment"].get("facts", {}).get("chip", "an unknown chip")
    if chip not in CHIPS or importlib.util.find_spec("triton") is None:
        return f"not done: for {chip}, with triton {'missing' if chip in CHIPS else 'installed or not'}"
    sizes = [(16, "bf16")] if SIMULATED else triton_cache.SIZES
    processes = min(len(sizes), max(1, (os.cpu_count() or 2) // 2 - 1))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for k in range(processes):
        commands = (
            shlex.join([sys.executable, "-m", "fastseq", "warmup", "--hidden-size", str(H), "--dtype", dtype,
                        "--chip", chip]) for H, dtype in sizes[k::processes]
        )  # fmt: skip
        with Path(check.outputs.name, f"compile-{k}.txt").open("wb") as log:
            command = ["nice", "-n", "10", "sh", "-c", "; ".join(commands)]
            options = {"stdout": log, "stderr": log, "env": environment, "cwd": ROOT, "start_new_session": True}
            check.compilers.append(subprocess.Popen(command, **options))
    return f"{len(sizes)} sizes for {chip}, {processes} at a time, in the background"


def keep_compiled(check: Check) -> None:
    """Add the seconds and numbers of kernels that `fastseq warmup` has printed so far to the report."""
    for path in sorted(Path(check.outputs.name).glob("compile-*.txt")):
        pattern = r"compiled for \S+ H=(\d+), (\w+): ([\d.]+) s, (\d+) kernels; (\d+) were in the cache"
        for H, dtype, seconds, compiled, found in re.findall(pattern, path.read_text()):
            row = {"H": int(H), "dtype": dtype, "s": float(seconds), "compiled": int(compiled), "found": int(found)}
            check.report.add("compile", row)


def stage_of(section: str, tasks: Callable[[], list[dict]]) -> Callable[[Check], str]:
    """A stage that runs tasks and puts their rows into a section of the report."""
    return lambda check: check.run_tasks(tasks(), section)


def run_sanitizers(check: Check) -> str:
    """Run each tool over the smallest cases; a missing, refusing or slow tool is reported and is no failure.

    Each tool gets half of the remaining time, the last one all of it.
    """
    tool = shutil.which("compute-sanitizer")
    if SIMULATED or tool is None:
        return f"not run: {'a simulation has no GPU' if SIMULATED else 'compute-sanitizer was not found'}"
    ours = only_ours(tool)
    for name in SANITIZERS:
        seconds = check.seconds_left() / (1 if name == SANITIZERS[-1] else 2)
        check.report.add("sanitizer", {"tool": name} | sanitize(check, [tool, *ours], name, seconds))
    return "done"


def only_ours(tool: str) -> list[str]:
    """The option, in this version's spelling, that limits the tool to fastseq's kernels."""
    text = subprocess.run([tool, "--help"], capture_output=True, text=True, timeout=30).stdout
    name = next((option for option in ("--kernel-regex", "--filter") if option in text), None)
    return [name, "kns=fastseq"] if name else []


def sanitize(check: Check, tool: list[str], name: str, seconds: float) -> dict:
    """Run one tool over the compiled kernels -> its verdict: clean, FOUND, or the reason for none."""
    output = Path(check.outputs.name, f"sanitizer-{name}.txt")
    wrapper = [*tool, "--tool", name, "--error-exitcode", str(FINDING), "--log-file", str(output)]
    if name == "memcheck":  # torch makes driver calls that may fail, which are no errors of a kernel
        wrapper += ["--report-api-errors", "no"]
    worker = Worker([*wrapper, *WORKER], check.log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    end, refused = time.monotonic() + seconds, 0
    # no NaN fill for initcheck: it would hide unwritten elements
    common = {"task": "parity", "grid": "quick", "dtype": "float32", "backends": ["native"], "draws": 1}
    common["fill"] = name != "initcheck"
    try:
        for index, case in enumerate(parity_case_list("quick")):
            if f"{case.op} {case.name}" in SMALLEST:
                task = common | {"index": index, "op": case.op, "case": case.name}
                rows = [m["row"] for m in worker.request(task, max(1.0, end - time.monotonic())) if "row" in m]
                refused += sum(row["verdict"] == "refused" for row in rows)
    except Lost as lost:
        worker.kill()
        return {"verdict": "not finished", "detail": lost.reason}
    code = worker.close(max(10.0, end - time.monotonic()))
    last = (output.read_text().strip().splitlines() or ["empty log"])[-1] if output.exists() else "no log"
    verdict = {0: "clean", FINDING: "FOUND"}.get(code, f"refused (exit code {code})")
    return {"verdict": verdict, "detail": f"{last}; {refused} of {len(SMALLEST)} calls refused"}


def measure_latencies(check: Check) -> str:
    """Compile benchmarks/latencies.cu if needed, and run it: a row for each figure."""
    program, source = ROOT / "build" / "latencies", ROOT / "benchmarks" / "latencies.cu"
    if SIMULATED:
        return "not run: a simulation has no GPU"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        if shutil.which("nvcc") is None:
            return (
                "not run: no nvcc was found; compile them where there is one (make latencies) and bring build/latencies"
            )
        program.parent.mkdir(exist_ok=True)
        subprocess.run(["nvcc", *NVCC_FLAGS, str(source), "-o", str(program)], check=True, timeout=check.seconds_left())
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=max(10.0, check.seconds_left()))
    for line in done.stdout.splitlines():
        check.report.add("latencies", json.loads(line))
    return "done" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"


STAGES: dict[str, tuple[Callable[[Check], str], float]] = {  # name -> function, largest share of the time
    "environment": (check_environment, 0.3),
    "latencies": (measure_latencies, 0.04),
    "kernels": (stage_of("kernels", gpu_tasks.kernels), 0.08),
    "smoke": (stage_of("smoke", gpu_tasks.smoke), 0.12),
    "load": (stage_of("load", gpu_tasks.load), 0.04),
    "parity": (stage_of("parity", partial(gpu_tasks.parity, "quick", "native")), 0.08),
    "sanitizer": (run_sanitizers, 0.1),
    "bench": (stage_of("bench", partial(gpu_tasks.bench, "native", "auto")), 0.35),
    "compile": (start_compiling, 0.05),
    "parity-triton": (stage_of("parity", partial(gpu_tasks.parity, "quick", "triton")), 0.1),
    "parity-full": (stage_of("parity", partial(gpu_tasks.parity, "full", "native", "triton")), 0.08),
    "bench-triton": (stage_of("bench", partial(gpu_tasks.bench, "triton")), 1.0),
}
TABLES = {
    "latencies": "Latencies",
    "kernels": "Kernels against float64",
    "smoke": "Smoke",
    "load": "Beside other work",
}  # fmt: skip  printed after their stage


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="total time (default: %(default)s)")
    parser.add_argument("--only", choices=STAGES, metavar="STAGE", help="run this stage only (after the environment)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder (default: %(default)s)")
    parser.add_argument(
        "--silence",
        type=float,
        default=90.0,
        help="seconds without a message after which a worker counts as hung (default: 90)",
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.silence <= 0:
        parser.error("--minutes and --silence must be above 0")
    return args


def run_stage(check: Check, name: str) -> None:
    """Run one stage in its share of the time. An exception is reported, and the next stage runs."""
    stage, share = STAGES[name]
    start, total = time.monotonic(), 60 * check.args.minutes
    check.stage_end = check.end if check.args.only == name else min(check.end, start + share * total)
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        note = stage(check)
    except (Lost, subprocess.SubprocessError, OSError, ValueError) as error:
        note = f"broken off: {error}"
    check.report.stage(name, time.monotonic() - start, note)
    print(f"{name}: {time.monotonic() - start:.0f} s, {note}", file=sys.stderr, flush=True)
    if name in TABLES:
        print(check.report.tables()[TABLES[name]], flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit code."""
    args = parse(argv)
    if not SIMULATED and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU here; FASTSEQ_SIM=1 runs the command without one.", file=sys.stderr)
        return 2
    find_toolkit()
    check = Check(args, shlex.join(["gpu_check.py", *(sys.argv[1:] if argv is None else argv)]))
    try:
        for name in STAGES:
            if args.only in (None, name) or name == "environment":
                run_stage(check, name)
        check.report.data["finished"] = True
    finally:
        check.close()
        check.report.write()
    wrong, broken = check.report.wrong(), not check.report.data["environment"]
    print(check.report.summary())
    print(f"{args.out / 'report.md'}: {len(wrong)} findings are wrong" + (", no worker started" if broken else ""))
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())
