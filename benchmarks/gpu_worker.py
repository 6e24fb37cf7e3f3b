"""Process of gpu_check.py that uses the GPU: if it hangs or dies, gpu_check.py continues.

Reads tasks from standard input, one JSON object per line, and answers each with lines of JSON: {"doing": step} before
every step that may hang, {"row": finding} any number of times, {"done": true} at the end.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; gives the same bits in every run

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's fastseq, installed or not

from hopper_model import limit_us, on_hopper

from fastseq import _native
from fastseq.bench.cases import CUDA_CASES, BenchCase
from fastseq.bench.timing import Candidate, Setup, candidates, time_candidates
from fastseq.console import environment, gpu_facts, quiet_torch
from fastseq.info import info
from fastseq.parity import main as parity
from fastseq.parity.cases import GRIDS, ParityCase
from fastseq.testing.numerics import float32_products

ROOT = Path(__file__).resolve().parents[1]
SIMULATED = os.environ.get("FASTSEQ_SIM") == "1"
DEVICE = "cpu" if SIMULATED else "cuda"
Send = Callable[[dict], None]


def stand_in() -> contextlib.AbstractContextManager:
    """Replace the GPU in a simulation by the host-side device and Triton's interpreter; nothing else does."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("cuda", "triton")]
    import emulator
    import triton_interpreter  # noqa: F401  repairs bfloat16

    return emulator.as_native()


def bench_case_list() -> list[BenchCase]:
    """The GPU cases, most informative first; in a simulation the first of each kind, tiny."""
    if not SIMULATED:
        return list(CUDA_CASES)
    kinds: dict[tuple, BenchCase] = {}
    for case in CUDA_CASES:
        kinds.setdefault((case.kind, case.layers), case)
    small = {"device": "cpu", "batch": 2, "input_size": 8, "hidden_size": 8}
    return [replace(case, steps=min(case.steps, 3), keys=min(case.keys, 5), **small) for case in kinds.values()]


def parity_case_list(grid: str) -> list[ParityCase]:
    """The cases of a grid ("full": without the "quick" ones); in a simulation a cheap one of each op."""
    quick = GRIDS["quick"]()
    cases = quick if grid == "quick" else GRIDS["full"]()[len(quick) :]
    if not SIMULATED:
        return cases
    served = (c for c in cases if not (c.slices or "spread" in c.options or c.options.get("proj_size")))
    cheap = (c for c in served if 4 <= max(c.options.get("shape", (99,))) <= 7)
    return list({case.op: case for case in cheap}.values())[: 3 if grid == "quick" else 1]


def report_environment(task: dict, send: Send) -> None:
    """Send one row: the facts on which the figures depend."""
    facts = environment(["gpu_check.py"]) | gpu_facts()
    if SIMULATED:
        facts["simulation"] = "no GPU; native is csrc/cuda on the host-side device, triton its interpreter"
    else:
        major, minor = torch.cuda.get_device_capability()
        facts["chip"] = f"sm_{major}{minor}"
    send({"row": {"facts": facts, "info": info(), "cuda_kernels": not _native.why_not_cuda()}})


def check_parity(task: dict, send: Send) -> None:
    """Check one case of ``fastseq parity`` in one dtype on each backend of the task."""
    case = parity_case_list(task["grid"])[task["index"]]
    for backend in task["backends"]:
        send({"doing": backend})
        options = {key: task[key] for key in ("draws", "fill") if key in task}
        (row,) = parity.check(case, getattr(torch, task["dtype"]), (backend,), DEVICE, **options)
        worst = row.worst
        verdict = "refused" if row.refusal else "failed" if row.failure else "ok" if row.ok else "WRONG"
        detail = row.refusal or row.failure or "; ".join(str(c) for c in row.comparisons if not c.ok)
        finding = {"op": row.op, "case": row.case, "dtype": row.dtype, "backend": backend, "verdict": verdict}
        if worst is not None:
            finding |= {"result": worst.name, "error": worst.error, "torch_error": worst.torch_error}
            finding["of_bound"] = parity.of_bound(worst)
        send({"row": finding | {"detail": detail}})
        if row.failure:
            check_device()


def bench(task: dict, send: Send) -> None:
    """Time one case in one mode: check each backend alone, then interleave the accurate ones."""
    case, mode = bench_case_list()[task["index"]], task["mode"]
    train, setup, entrants = mode == "training", Setup(case), []
    with float32_products(case.tf32):
        for backend in task["backends"]:
            send({"doing": backend})
            key = {"case": case.name, "group": case.group, "mode": mode, "candidate": backend}
            try:
                (baseline, *accurate), remarks = candidates(setup, (backend,), train)
                entrants += accurate
                if remarks:
                    send({"row": key | {"verdict": "refused", "detail": remarks[0]}})
            except AssertionError as error:
                send({"row": key | {"verdict": "WRONG", "detail": str(error)}})
            except Exception as error:  # any type, as Triton raises; the other backends keep their rows
                send({"row": key | {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"}})
                check_device()
        send({"doing": "timing"})
        time_entrants(task, send, setup, [baseline, *entrants] if entrants else [])


def time_entrants(task: dict, send: Send, setup: Setup, entrants: list[Candidate]) -> None:
    """Send a row for each candidate; the first is the baseline."""
    case, mode = setup.case, task["mode"]
    key = {"case": case.name, "group": case.group, "mode": mode}
    runs = {c.name: setup.step(c.call, mode == "training") for c in entrants}
    for name in list(runs) if mode == "CUDA graph" else ():
        try:
            runs[name] = captured(runs[name])
        except Exception as error:
            del runs[name]
            send({"row": key | {"candidate": name, "verdict": "refused", "detail": f"cannot be captured: {error}"}})
            check_device()
    entrants = [c for c in entrants if c.name in runs]
    limit = limit_us(case, mode == "training") if entrants and (SIMULATED or on_hopper()) else None
    for timing in time_candidates(case, entrants, runs, task["seconds"]) if entrants else ():
        us = 1e3 * timing.median_ms
        row = key | {"baseline": entrants[0].name, "verdict": "ok", **asdict(timing), "us_per_step": us / case.steps}
        if limit is not None:
            row |= {"limit_us_per_step": limit / case.steps, "over_limit": us / limit}
        send({"row": row})


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Capture the same work as a CUDA graph -> its replay, a single launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check_device() -> None:
    """Raise if a failure left the CUDA context unusable: this process ends, and the next task starts a new one."""
    if not SIMULATED:
        torch.cuda.synchronize()


TASKS = {"environment": report_environment, "parity": check_parity, "bench": bench}
BACKEND_KEY = {"parity": "backend", "bench": "candidate"}  # task -> the key of its rows that names the backend


def serve(task: dict, send: Send) -> None:
    """Run one task. An exception becomes a row; the process ends only if the GPU's context is unusable."""
    doing = "starting"

    def note(message: dict) -> None:
        nonlocal doing
        doing = message.get("doing", doing)
        send(message)

    try:
        TASKS[task["task"]](task, note)
    except Exception as error:
        if task["task"] not in BACKEND_KEY:
            raise
        traceback.print_exc()
        row = {key: task[key] for key in ("op", "case", "dtype", "mode") if key in task}
        row[BACKEND_KEY[task["task"]]] = doing
        send({"row": row | {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"}})
        check_device()
    send({"done": True})


def main() -> None:
    """Serve tasks until standard input ends. Prints of libraries go to standard error."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: dict) -> None:
        print(json.dumps(message), file=channel, flush=True)

    with stand_in() if SIMULATED else contextlib.nullcontext(), quiet_torch():
        for line in sys.stdin:
            serve(json.loads(line), send)


if __name__ == "__main__":
    main()
