"""The half of gpu_check.py that touches the GPU, in a process of its own: it may hang or die, and the rest goes on.

Reads tasks from standard input, one JSON object a line, and answers each with lines of JSON: {"doing": what} before all
that may hang, {"row": finding} any number of times, {"done": true} at the end.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts: the same bits in every run

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where fastseq is not installed

from fastseq import _native
from fastseq.bench import cases as bench_cases
from fastseq.bench.roofline import gpu_limit_us, has_floor
from fastseq.bench.timing import Candidate, Problem, candidates, time_candidates
from fastseq.console import environment, gpu_facts, quiet_torch
from fastseq.info import info
from fastseq.parity import cases as parity_cases
from fastseq.parity import main as parity
from fastseq.testing.numerics import float32_products

SIMULATED = os.environ.get("FASTSEQ_SIM") == "1"
DEVICE = "cpu" if SIMULATED else "cuda"
Tell = Callable[[dict], None]


def stand_in() -> contextlib.AbstractContextManager:
    """THE seam of the simulation, what runs where there is no GPU: the host-side device and Triton's interpreter."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
    import emulator
    import triton_interpreter  # noqa: F401  repairs bfloat16

    return emulator.as_native()


def bench_case_list() -> list[bench_cases.Case]:
    """The cases of a GPU, the most telling first; in a simulation the first of each kind, tiny."""
    if not SIMULATED:
        return list(bench_cases.CUDA_CASES)
    kinds: dict[tuple, bench_cases.Case] = {}
    for case in bench_cases.CUDA_CASES:
        kinds.setdefault((case.kind, case.layers), case)
    small = {"device": "cpu", "batch": 2, "input_size": 8, "hidden_size": 8}
    return [replace(case, steps=min(case.steps, 3), keys=min(case.keys, 5), **small) for case in kinds.values()]


def parity_case_list(grid: str) -> list[parity_cases.Case]:
    """The cases of a grid ("full": those that are not in "quick"); in a simulation a cheap one of each op."""
    quick = parity_cases.GRIDS["quick"]()
    cases = quick if grid == "quick" else parity_cases.GRIDS["full"]()[len(quick) :]
    if not SIMULATED:
        return cases
    served = (c for c in cases if not (c.slices or "spread" in c.options or c.options.get("proj_size")))
    cheap = (c for c in served if 4 <= max(c.options.get("shape", (99,))) <= 7)
    return list({case.op: case for case in cheap}.values())[: 3 if grid == "quick" else 1]


def tell_environment(task: dict, tell: Tell) -> None:
    """One row: all that the figures depend on."""
    facts = environment(["gpu_check.py"]) | gpu_facts()
    if SIMULATED:
        facts["simulation"] = "no GPU; native is csrc/cuda on the host-side device, triton its interpreter"
    else:
        major, minor = torch.cuda.get_device_capability()
        facts["chip"] = f"sm_{major}{minor}"
    tell({"row": {"facts": facts, "info": info(), "cuda_kernels": not _native.why_not_cuda()}})


def check_parity(task: dict, tell: Tell) -> None:
    """One case of ``fastseq parity`` in one dtype on each backend of the task."""
    case = parity_case_list(task["grid"])[task["index"]]
    for backend in task["backends"]:
        tell({"doing": backend})
        options = {key: task[key] for key in ("draws", "fill") if key in task}
        (row,) = parity.check(case, getattr(torch, task["dtype"]), (backend,), DEVICE, **options)
        worst = row.worst
        verdict = "refused" if row.refusal else "failed" if row.failure else "ok" if row.ok else "WRONG"
        detail = row.refusal or row.failure or "; ".join(str(c) for c in row.comparisons if not c.ok)
        found = {"op": row.op, "case": row.case, "dtype": row.dtype, "backend": backend, "verdict": verdict}
        if worst is not None:
            found |= {"result": worst.name, "error": worst.error, "torch_error": worst.torch_error}
            found["of_bound"] = parity.of_bound(worst)
        tell({"row": found | {"detail": detail}})
        if row.failure:
            check_device()


def bench(task: dict, tell: Tell) -> None:
    """One case in one mode: each backend passes the parity gate alone, then all that did take turns."""
    case, mode = bench_case_list()[task["index"]], task["mode"]
    train, problem, found = mode == "training", Problem(case), []
    with float32_products(case.tf32):
        for backend in task["backends"]:
            tell({"doing": backend})
            about = {"case": case.name, "group": case.group, "mode": mode, "candidate": backend}
            try:
                (peer, *own), remarks = candidates(problem, (backend,), train)
                found += own
                if remarks:
                    tell({"row": about | {"verdict": "refused", "detail": remarks[0]}})
            except AssertionError as error:
                tell({"row": about | {"verdict": "WRONG", "detail": str(error)}})
            except Exception as error:  # Triton's are no RuntimeErrors; the other backends' rows shall not be lost
                tell({"row": about | {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"}})
                check_device()
        tell({"doing": "timing"})
        time_them(task, tell, problem, [peer, *found] if found else [])


def time_them(task: dict, tell: Tell, problem: Problem, found: list[Candidate]) -> None:
    """A row for each candidate; the first is the peer."""
    case, mode = problem.case, task["mode"]
    about = {"case": case.name, "group": case.group, "mode": mode}
    runs = {c.name: problem.step(c.module, mode == "training") for c in found}
    for name in list(runs) if mode == "CUDA graph" else ():
        try:
            runs[name] = captured(runs[name])
        except Exception as error:
            del runs[name]
            tell({"row": about | {"candidate": name, "verdict": "refused", "detail": f"cannot be captured: {error}"}})
            check_device()
    found = [c for c in found if c.name in runs]
    limit = gpu_limit_us(case, mode == "training") if found and (SIMULATED or has_floor(case)) else None
    for timing in time_candidates(case, found, runs, task["seconds"]) if found else ():
        us = 1e3 * timing.median_ms
        row = about | {"peer": found[0].name, "verdict": "ok", **asdict(timing), "us_per_step": us / case.steps}
        if limit is not None:
            row |= {"limit_us_per_step": limit / case.steps, "over_limit": us / limit}
        tell({"row": row})


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph: one launch, whatever it was before."""
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
    """Raises where a failure left the GPU's context unusable: then this process ends, and the next task has another."""
    if not SIMULATED:
        torch.cuda.synchronize()


TASKS = {"environment": tell_environment, "parity": check_parity, "bench": bench}
WHO = {"parity": "backend", "bench": "candidate"}  # what a row of a task calls the one that it is about


def serve(task: dict, tell: Tell) -> None:
    """One task. An exception is a finding like a wrong number; the process ends only where the GPU's context does."""
    doing = "starting"

    def note(message: dict) -> None:
        nonlocal doing
        doing = message.get("doing", doing)
        tell(message)

    try:
        TASKS[task["task"]](task, note)
    except Exception as error:
        if task["task"] not in WHO:
            raise
        traceback.print_exc()
        about = {key: task[key] for key in ("op", "case", "dtype", "mode") if key in task} | {WHO[task["task"]]: doing}
        tell({"row": about | {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"}})
        check_device()
    tell({"done": True})


def main() -> None:
    """Serve tasks until standard input ends. What libraries print goes to standard error."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: dict) -> None:
        print(json.dumps(message), file=channel, flush=True)

    with stand_in() if SIMULATED else contextlib.nullcontext(), quiet_torch():
        for line in sys.stdin:
            serve(json.loads(line), tell)


if __name__ == "__main__":
    main()
