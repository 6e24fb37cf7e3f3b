"""Process of gpu_check.py that uses the GPU: if it hangs or dies, gpu_check.py continues.

Reads tasks from standard input, one JSON object per line, and answers each with lines of JSON: {"doing": step} before
every step that may hang, {"row": finding} any number of times, {"done": true} at the end.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; gives the same bits in every run

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's fastseq, installed or not

from gpu_cases import SIMULATED, bench_case_list, dtype_of, parity_case_list
from hopper_model import limit_us, on_hopper
from step_prediction import predicted_us, products_us

from fastseq import _native
from fastseq.bench.timing import Candidate, Setup, candidates, time_candidates
from fastseq.console import environment, gpu_facts, quiet_torch
from fastseq.dispatch import BACKENDS
from fastseq.info import info
from fastseq.parity import main as parity
from fastseq.testing.numerics import Results, compare, float32_products

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cpu" if SIMULATED else "cuda"
Send = Callable[[dict], None]


def stand_in() -> contextlib.AbstractContextManager:
    """Replace the GPU in a simulation by the host-side device and Triton's interpreter; nothing else does."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("cuda", "triton")]
    import emulator
    import triton_interpreter  # noqa: F401  repairs bfloat16

    return emulator.as_native()


@contextlib.contextmanager
def only_kernel(name: str | None) -> Iterator[None]:
    """Restrict the native recurrence to one kernel, "cluster", "grid" or "steps"; None: no restriction."""
    if name is not None:
        os.environ["FASTSEQ_LSTM_KERNEL"] = name
    try:
        yield
    finally:
        os.environ.pop("FASTSEQ_LSTM_KERNEL", None)


def report_environment(task: dict, send: Send) -> None:
    """Send one row: the facts on which the figures depend."""
    facts = environment(["gpu_check.py"]) | gpu_facts()
    if SIMULATED:
        facts["simulation"] = "no GPU; native is csrc/cuda on the host-side device, triton its interpreter"
    else:
        major, minor = torch.cuda.get_device_capability()
        facts["chip"] = f"sm_{major}{minor}"
        spin_up()
    row = {"facts": facts, "info": info(), "cuda_kernels": not _native.why_not_cuda()}
    send({"row": row | {"compiled_for_this_gpu": _compiled_for(facts.get("chip", ""))}})


def _compiled_for(chip: str) -> bool:
    """True if the library holds machine code for "sm_90": code for 8.0 also runs on 8.6; other GPUs compile PTX."""
    built = {name.removesuffix("+PTX").split(".")[0] for name in _native.build_info().get("cuda_architectures", ())}
    return chip[3:-1] in built


def spin_up() -> None:
    """Multiply matrices for half a second: an idle GPU runs at a fraction of its clock."""
    square, end = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16), time.monotonic() + 0.5
    while time.monotonic() < end:
        square @ square
        torch.cuda.synchronize()


def check_parity(task: dict, send: Send) -> None:
    """Check one case in one precision on each backend of the task, and on one kernel if the task names it."""
    case = parity_case_list(task["grid"])[task["index"]]
    dtype, tf32 = dtype_of(task["dtype"])
    options = {key: task[key] for key in ("draws", "fill") if key in task}
    send({"doing": "float64 on the CPU"})
    with only_kernel(task.get("kernel")):
        rows = parity.check(
            case,
            dtype,
            tuple(task["backends"]),
            DEVICE,
            tf32=bool(tf32),
            starting=lambda backend: send({"doing": backend}),
            **options,
        )
    for row in rows:
        worst = row.worst
        verdict = "refused" if row.refusal else "failed" if row.failure else "ok" if row.ok else "WRONG"
        detail = row.refusal or row.failure or "; ".join(str(c) for c in row.comparisons if not c.ok)
        finding = {"op": row.op, "case": row.case, "dtype": task["dtype"], "backend": row.backend, "verdict": verdict}
        finding |= {"kernel": task["kernel"]} if "kernel" in task else {}
        if worst is not None:
            finding |= {"result": worst.name, "error": worst.error, "torch_error": worst.torch_error}
            finding["of_bound"] = parity.of_bound(worst)
        send({"row": finding | {"detail": detail}})
    if any(row.failure for row in rows):
        check_device()


def bench(task: dict, send: Send) -> None:
    """Time one case in one mode: check each candidate alone, then interleave the accurate ones.

    A candidate is a backend, or "native cluster" and "native grid": the native backend restricted to that kernel.
    """
    case, mode = bench_case_list(task["suite"])[task["index"]], task["mode"]
    train, setup, entrants = mode == "training", Setup(case), []
    with float32_products(case.tf32):
        send({"doing": "float64 on the CPU"})
        _ = setup.oracle
        send({"doing": "torch"})
        setup.baseline_results(train)
        for name in task["backends"]:
            send({"doing": name})
            key = {"case": case.name, "group": case.group, "mode": mode, "candidate": name}
            try:
                (baseline, *accurate), remarks = _candidates(setup, name, train)
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


def _candidates(setup: Setup, name: str, train: bool) -> tuple[list[Candidate], list[str]]:
    """The baseline and the checked candidate "BACKEND" or "BACKEND KERNEL", and the refusals."""
    backend, _, kernel = name.partition(" ")
    with only_kernel(kernel or None):
        (baseline, *accurate), remarks = candidates(setup, (backend,), train)
    return [baseline, *(c._replace(name=name) for c in accurate)], remarks


def _run_of(setup: Setup, candidate: Candidate, train: bool) -> Callable[[], None]:
    """The timed function, restricted to the candidate's kernel."""
    step, kernel = setup.step(candidate.call, train), candidate.name.partition(" ")[2]
    if candidate.name.split(" ")[0] not in BACKENDS or not kernel:
        return step

    def run() -> None:
        with only_kernel(kernel):
            step()

    return run


def time_entrants(task: dict, send: Send, setup: Setup, entrants: list[Candidate]) -> None:
    """Send a row for each candidate; the first is the baseline."""
    case, mode = setup.case, task["mode"]
    key = {"case": case.name, "group": case.group, "mode": mode}
    runs = {c.name: _run_of(setup, c, mode == "training") for c in entrants}
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
        kernel = "cudnn" if timing.candidate == "nn.LSTM" else timing.candidate.partition(" ")[2]
        predicted = predicted_us(case, kernel, mode == "training")
        if predicted is not None:
            products = products_us(case, mode == "training")
            row |= {"kernel": kernel, "predicted_us_per_step": predicted, "products_us_per_step": products}
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


def repeat_under_load(task: dict, send: Send) -> None:
    """Compare the bits of repeated training steps while a second stream multiplies matrices."""
    case = bench_case_list("load")[task["index"]]
    send({"doing": "native"})
    with float32_products(case.tf32), busy_stream() as keep_busy:
        setup = Setup(case)
        call = setup.make("native")
        first, repeats = setup.run(call, True), 3 if SIMULATED else 100
        for count in range(repeats):
            keep_busy()
            differing = _differing(first, setup.run(call, True))
            if differing:
                detail = f"repeat {count + 1}: other bits in {', '.join(differing)}"
                return send({"row": {"case": case.name, "backend": "native", "verdict": "WRONG", "detail": detail}})
    send({"row": {"case": case.name, "backend": "native", "verdict": "ok", "detail": f"{repeats} repeats, same bits"}})


def _differing(first: Results, again: Results) -> list[str]:
    pairs = [(f"{kind}{name}", t, after[name]) for kind, before, after in
             (("", first.outputs, again.outputs), ("grad ", first.gradients, again.gradients))
             for name, t in before.items()]  # fmt: skip
    return [name for name, before, after in pairs if not torch.equal(before, after)]


@contextlib.contextmanager
def busy_stream() -> Iterator[Callable[[], None]]:
    """A function that gives a second stream about a millisecond of work; without a GPU it does nothing."""
    if SIMULATED:
        yield lambda: None
        return
    stream, square = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def keep_busy() -> None:
        with torch.cuda.stream(stream):
            square @ square

    yield keep_busy
    torch.cuda.synchronize()


def two_streams(task: dict, send: Send) -> None:
    """Run two grid kernels that each fill most of the GPU on two streams at once: they must not block each other.

    Each is a cooperative launch, which the driver is believed to place as a whole; if it does not, this hangs.
    """
    case = bench_case_list("load")[task["index"]]
    with float32_products(case.tf32), only_kernel("grid"), torch.no_grad():
        setup = Setup(case)
        call = setup.make("native")
        expected = setup.run(call, False).outputs
        send({"doing": "native"})
        streams = [None, None] if SIMULATED else [torch.cuda.Stream() for _ in range(2)]
        results = []
        for count in range(2 if SIMULATED else 50):
            with contextlib.nullcontext() if SIMULATED else torch.cuda.stream(streams[count % 2]):
                results.append(setup.run(call, False).outputs)
        check_device()
    same = all(torch.equal(t, result[name]) for result in results for name, t in expected.items())
    key = {"case": f"two streams, {case.name}", "backend": "native"}
    send({"row": key | {"verdict": "ok" if same else "WRONG", "detail": f"{len(results)} runs"}})


def layers_together(task: dict, send: Send) -> None:
    """Compare a stack's layers as a wavefront with layer by layer: results, and times with and without a CUDA graph."""
    case = bench_case_list("stacks")[task["index"]]
    with float32_products(case.tf32):
        setup = Setup(case)
        call = setup.make("native")
        send({"doing": "native"})
        ways = {"layer by layer": "0", "together": "8" if SIMULATED else "128"}
        results, us = {}, {}
        for name, switch in ways.items():
            with _wavefront(switch):
                results[name] = setup.run(call, True)
        for mode, train in (("inference", False), ("training", True), ("CUDA graph", False)):
            for name, switch in ways.items():
                with _wavefront(switch), contextlib.nullcontext() if train else torch.no_grad():
                    step = setup.step(call, train)
                    run = captured(step) if mode == "CUDA graph" and not SIMULATED else step
                    us[f"{mode}, {name}"] = _microseconds(run)
    # The recurrences give the same bits; cuBLAS may sum a product of fewer rows in another order.
    wrong = [str(c) for c in compare(results["together"], setup.oracle, setup.baseline_results(True)) if not c.ok]
    differing = _differing(results["layer by layer"], results["together"])
    detail = [*wrong, f"other bits in {', '.join(differing)}" if differing else "same bits"]
    detail += [f"{name} {time:.0f} us" for name, time in us.items()]
    row = {"case": f"wavefront, {case.name}", "backend": "native", "verdict": "WRONG" if wrong else "ok"}
    send({"row": row | {"detail": "; ".join(detail)}})
    check_device()


@contextlib.contextmanager
def _wavefront(switch: str) -> Iterator[None]:
    os.environ["FASTSEQ_LSTM_WAVEFRONT"] = switch
    try:
        yield
    finally:
        del os.environ["FASTSEQ_LSTM_WAVEFRONT"]


def _microseconds(run: Callable[[], None], repeats: int = 20) -> float:
    """Median of calls, each with the host's part."""
    times = []
    for _ in range(1 if SIMULATED else repeats):
        check_device()
        begin = time.perf_counter()
        run()
        check_device()
        times.append(time.perf_counter() - begin)
    return 1e6 * sorted(times)[len(times) // 2]


def check_device() -> None:
    """Raise if a failure left the CUDA context unusable: this process ends, and the next task starts a new one."""
    if not SIMULATED:
        torch.cuda.synchronize()


TASKS = {
    "environment": report_environment,
    "parity": check_parity,
    "bench": bench,
    "repeats": repeat_under_load,
    "streams": two_streams,
    "layers": layers_together,
}
BACKEND_KEY = {  # task -> the key of its rows that names the backend
    "parity": "backend",
    "bench": "candidate",
    "repeats": "backend",
    "streams": "backend",
    "layers": "backend",
}


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
        row = {key: task[key] for key in ("op", "case", "dtype", "mode", "kernel") if key in task}
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
