"""Everything that is to know about fastseq's kernels on this machine's GPU, in one command and a fixed time.

Builds or loads the library, checks every kernel against float64, runs NVIDIA's sanitizers, measures the latencies that
decide the design, then times fastseq against cuDNN, SDPA and eager torch, the most telling cases first.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_process import Lost, Worker, end_group
from gpu_report import Report
from gpu_worker import SIMULATED, WHO, bench_case_list, parity_case_list

from fastseq.bench.cases import HIDDEN_SIZES
from fastseq.console import Bar
from fastseq.ops.common.triton.runtime import CHIPS

ROOT = Path(__file__).resolve().parents[1]
WORKER = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py")]
START_SECONDS = 300.0  # until a worker's first answer: imports, a CUDA context, the host-side device compiled
BACKENDS = ["native", "triton"]
TOO_OFTEN = 2  # after so many hangs or crashes a backend gets no more tasks
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
FINDING = 9  # the exit code that they are to end with when they find something
SMALLEST = (
    "lstm_cell (2, 3, 7)",
    "lstm (5, 3, 4, 7), form=lengths, reverse=True",
    "attention (3, 4, 5, 6), score=additive, padding=lengths",
)
# What runs on an A100 and on a Hopper, and the text from which newer GPUs' drivers compile it.
NVCC_FLAGS = ["-O3", "-std=c++17", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")),
              "-gencode=arch=compute_90,code=compute_90"]  # fmt: skip
EPILOG = """\
stages, each with its share of the time; what one leaves goes to the next:
  environment   versions, the GPU, what is installed; builds the CUDA kernels where nvcc is and they are missing
  compile       starts compiling the Triton kernels ahead of time, in the background
  parity        the quick grid of `fastseq parity`: native and triton, float32, bfloat16, float16
  parity-full   the rest of the full grid
  sanitizer     compute-sanitizer memcheck, racecheck, synccheck, initcheck on the smallest cases
  latencies     grid and cluster barriers, flags, distributed shared memory, how many clusters fit (latencies.cu)
  bench         LSTMs, decoding steps, attention: inference, training, CUDA graphs

what it leaves: report.json and report.md in --out, written anew after everything that happens, so that a run that is
cut keeps what it has; log.txt with what the tools said. Whatever touches the GPU runs in a child process: a kernel
that hangs is killed and reported, and costs its own figures only.

examples:
  python benchmarks/gpu_check.py                            # everything, 9 minutes
  python benchmarks/gpu_check.py --only bench --minutes 30  # one stage, longer
  FASTSEQ_SIM=1 python benchmarks/gpu_check.py              # no GPU: walk the command itself, with tiny shapes

Exit code: 0; 1 where something was wrong: parity, a kernel that hung or crashed, a finding of a sanitizer; 2 where
there is nothing to run on.
"""


class Check:
    """One run: its report, its clock, and the worker that the tasks go to."""

    def __init__(self, args: argparse.Namespace, command: str):
        self.args, self.report, self.log = args, Report(args.out, command), args.out / "log.txt"
        self.end = self.stage_end = time.monotonic() + 60 * args.minutes
        self.lost: Counter[str] = Counter()
        self.compilers: list[subprocess.Popen] = []
        self.told = tempfile.TemporaryDirectory(prefix="gpu_check-")  # what the tools say; at the end part of log.txt
        self._worker: Worker | None = None

    def seconds_left(self) -> float:
        """Of this stage."""
        return self.stage_end - time.monotonic()

    def ask(self, task: dict) -> Iterator[dict]:
        """The rows that the worker answers with; it is started where there is none. Raises Lost."""
        left = max(1.0, self.end - time.monotonic()) + 5.0
        start = 0.0
        if self._worker is None:
            self._worker = Worker(WORKER, self.log, **({"TRITON_INTERPRET": "1"} if SIMULATED else {}))
            start = START_SECONDS
        try:
            for message in self._worker.ask(task, min(self.args.silence, left), min(start, left)):
                if "row" in message:
                    yield message["row"]
        except Lost:
            self.drop_worker()
            raise

    def drop_worker(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def work_off(self, tasks: list[dict], section: str) -> str:
        """One task after the other until the time of the stage is up -> what happened.

        A task that is lost goes on without the backend that lost it, and a backend that loses too many gets no more.
        """
        waiting, bar = deque(tasks), Bar(max(1, len(tasks)))
        while waiting and self.seconds_left() > 0 and self.lost["starting"] < TOO_OFTEN:
            task = waiting.popleft()
            task["backends"] = [name for name in task["backends"] if self.lost[name] < TOO_OFTEN]
            bar.show(f"{task['task']} {task['case']}")
            try:
                for row in self.ask(task) if task["backends"] else ():
                    self.report.add(section, row)
            except Lost as lost:
                self._keep_loss(lost, task, section)
                if lost.doing in task["backends"]:
                    task["backends"].remove(lost.doing)
                    waiting.appendleft(task)
                    continue
            bar.step()
        bar.close()
        given_up = [name for name, count in self.lost.items() if count >= TOO_OFTEN]
        told = f"; given up: {', '.join(given_up)}" if given_up else ""
        told = "; no worker starts, see log.txt" if "starting" in given_up else told
        return f"{bar.done} of {len(tasks)} tasks{told}"

    def _keep_loss(self, lost: Lost, task: dict, section: str) -> None:
        self.lost[lost.doing] += 1
        about = {key: task[key] for key in ("op", "case", "dtype", "mode") if key in task}
        self.report.add(section, about | {WHO[section]: lost.doing, "verdict": "lost", "detail": lost.reason})

    def close(self) -> None:
        """End what still runs, and keep what the tools said."""
        self.drop_worker()
        for process in self.compilers:
            end_group(process)
        keep_compiled(self)
        with self.log.open("ab") as log:
            for path in sorted(Path(self.told.name).iterdir()):
                log.write(f"\n{path.name}:\n".encode() + path.read_bytes())
        self.told.cleanup()


def find_toolkit() -> None:
    """What a CUDA toolkit has is found where setup.py would find it, too."""
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if folder and Path(folder, "bin").is_dir():
            os.environ["PATH"] += f"{os.pathsep}{folder}/bin"


def check_environment(check: Check) -> str:
    """Facts for the report; a build of the CUDA kernels where they are missing and can be built."""
    found = _facts(check)
    if SIMULATED:
        return found["facts"]["simulation"]
    if found["cuda_kernels"]:
        return f"the library has CUDA kernels for {found['facts']['native cuda']}"
    if shutil.which("nvcc") is None:
        return f"no native CUDA kernels, and no nvcc to build them: {found['facts']['native cuda']}"
    check.drop_worker()  # it has loaded the library that is built anew
    note = build_library(check, found["facts"]["chip"])
    _facts(check)
    return note


def _facts(check: Check) -> dict:
    (row,) = check.ask({"task": "environment"})
    check.report.data["environment"] = row
    return row


def build_library(check: Check, chip: str) -> str:
    """Build fastseq._C in place, with CUDA kernels for this GPU alone."""
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
    """Fill Triton's cache with what calls would compile, in the background: then no first call need wait for it."""
    chip = "sm_90" if SIMULATED else check.report.data["environment"].get("facts", {}).get("chip", "an unknown chip")
    if chip not in CHIPS or importlib.util.find_spec("triton") is None:
        return f"not done: for {chip}, with triton {'missing' if chip in CHIPS else 'installed or not'}"
    sizes = [(16, "bf16")] if SIMULATED else list(itertools.product(HIDDEN_SIZES, ("bf16", "fp32", "fp16")))
    processes = min(len(sizes), max(1, (os.cpu_count() or 2) // 2 - 1))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for k in range(processes):
        commands = (
            shlex.join([sys.executable, "-m", "fastseq", "warmup", "--hidden-size", str(H), "--dtype", dtype,
                        "--chip", chip]) for H, dtype in sizes[k::processes]
        )  # fmt: skip
        with Path(check.told.name, f"compile-{k}.txt").open("wb") as log:
            command = ["nice", "-n", "10", "sh", "-c", "; ".join(commands)]
            options = {"stdout": log, "stderr": log, "env": environment, "cwd": ROOT, "start_new_session": True}
            check.compilers.append(subprocess.Popen(command, **options))
    return f"{len(sizes)} sizes for {chip}, {processes} at a time, in the background"


def keep_compiled(check: Check) -> None:
    """The seconds that `fastseq warmup` told so far."""
    for path in sorted(Path(check.told.name).glob("compile-*.txt")):
        for H, dtype, seconds in re.findall(r"compiled for \S+ H=(\d+), (\w+): ([\d.]+) s", path.read_text()):
            check.report.add("compile", {"H": int(H), "dtype": dtype, "s": float(seconds)})


def parity_stage(grid: str) -> Callable[[Check], str]:
    """A stage that checks the cases of a grid in mixed order, so that a stage that is cut has seen something of all."""

    def stage(check: Check) -> str:
        cases = list(enumerate(parity_case_list(grid)))
        random.Random(0).shuffle(cases)
        tasks = [
            {"task": "parity", "grid": grid, "index": index, "op": case.op, "case": case.name, "dtype": dtype}
            | {"backends": list(BACKENDS)}
            for index, case in cases
            for dtype in (("float32",) if SIMULATED else ("float32", "bfloat16", "float16"))
        ]
        return check.work_off(tasks, "parity")

    return stage


def run_sanitizers(check: Check) -> str:
    """Each tool over the smallest cases; a tool that is missing, refuses or is too slow is told and no failure.

    Each gets half of the time that is left, the last one all.
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
    """The option, spelled as by this version, that leaves torch's and the vendor's kernels alone."""
    told = subprocess.run([tool, "--help"], capture_output=True, text=True, timeout=30).stdout
    name = next((option for option in ("--kernel-regex", "--filter") if option in told), None)
    return [name, "kns=fastseq"] if name else []


def sanitize(check: Check, tool: list[str], name: str, seconds: float) -> dict:
    """One tool over the compiled kernels -> its verdict: clean, FOUND, or why there is none."""
    told = Path(check.told.name, f"sanitizer-{name}.txt")
    wrapper = [*tool, "--tool", name, "--error-exitcode", str(FINDING), "--log-file", str(told)]
    if name == "memcheck":  # torch asks the driver for what it may not have; that is no error of a kernel
        wrapper += ["--report-api-errors", "no"]
    worker = Worker([*wrapper, *WORKER], check.log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    end, refused = time.monotonic() + seconds, 0
    # NaN in new memory would hide from initcheck what nobody wrote
    common = {"task": "parity", "grid": "quick", "dtype": "float32", "backends": ["native"], "draws": 1}
    common["fill"] = name != "initcheck"
    try:
        for index, case in enumerate(parity_case_list("quick")):
            if f"{case.op} {case.name}" in SMALLEST:
                task = common | {"index": index, "op": case.op, "case": case.name}
                rows = [m["row"] for m in worker.ask(task, max(1.0, end - time.monotonic())) if "row" in m]
                refused += sum(row["verdict"] == "refused" for row in rows)
    except Lost as lost:
        worker.kill()
        return {"verdict": "not finished", "detail": lost.reason}
    code = worker.close(max(10.0, end - time.monotonic()))
    last = (told.read_text().strip().splitlines() or ["nothing said"])[-1] if told.exists() else "no log"
    verdict = {0: "clean", FINDING: "FOUND"}.get(code, f"refused (exit code {code})")
    return {"verdict": verdict, "detail": f"{last}; {refused} of {len(SMALLEST)} calls refused"}


def measure_latencies(check: Check) -> str:
    """Compile benchmarks/latencies.cu where it is not compiled yet, and run it: a row for each figure."""
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


def run_benchmarks(check: Check) -> str:
    """Every case in every mode, until the time is up."""
    tasks = []
    for index, case in enumerate(bench_case_list()):
        modes = ["inference", "training"]
        if not SIMULATED and case.layers == 1 and case.kind != "packed":
            modes.append("CUDA graph")
        tasks += [
            {"task": "bench", "index": index, "case": case.name, "mode": mode, "seconds": 0.0 if SIMULATED else 0.3}
            | {"backends": [*BACKENDS, "auto"]}
            for mode in modes
        ]
    return check.work_off(tasks, "bench")


STAGES: dict[str, tuple[Callable[[Check], str], float]] = {  # and the largest share of the time
    "environment": (check_environment, 0.4),
    "compile": (start_compiling, 0.1),
    "parity": (parity_stage("quick"), 0.2),
    "parity-full": (parity_stage("full"), 0.1),
    "sanitizer": (run_sanitizers, 0.15),
    "latencies": (measure_latencies, 0.05),
    "bench": (run_benchmarks, 1.0),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--only", choices=STAGES, metavar="STAGE", help="this stage alone (after the environment)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder (default: %(default)s)")
    parser.add_argument(
        "--silence", type=float, default=90.0, help="seconds without a sign of life that are a hang (default: 90)"
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.silence <= 0:
        parser.error("--minutes and --silence must be above 0")
    return args


def run_stage(check: Check, name: str) -> None:
    """One stage in its share of the time. What breaks it is told; the next one goes on."""
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


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit code."""
    args = parse(argv)
    if not SIMULATED and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here; FASTSEQ_SIM=1 walks the command without one.", file=sys.stderr)
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
    print(f"{args.out / 'report.md'}: {len(wrong)} findings are wrong" + (", no worker started" if broken else ""))
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())
