"""The tasks that gpu_check.py gives to its worker, a list for each stage, most informative first."""

import itertools
import random

from gpu_cases import KERNELS, SIMULATED, STEPS, WITHOUT_NATIVE, bench_case_list, kernel_fits, parity_case_list

from fastseq.bench.cases import PRECISIONS, BenchCase


def parity(grid: str, *backends: str) -> list[dict]:
    """A grid's cases in shuffled order: even interrupted, the stage has covered every op."""
    cases = list(enumerate(parity_case_list(grid)))
    random.Random(0).shuffle(cases)
    return [
        {"task": "parity", "grid": grid, "index": index, "op": case.op, "case": case.name, "dtype": dtype}
        | {"backends": served}
        for index, case in cases
        if (served := [name for name in backends if name != "native" or case.op not in WITHOUT_NATIVE])
        for dtype in (("float32",) if SIMULATED else ("float32", "bf16", "f16"))
    ]


def kernels() -> list[dict]:
    """Every native recurrence once against float64, in shuffled order."""
    precisions = ("float32", "bf16") if SIMULATED else ("bf16", "tf32", "float32", "f16")  # no TF32 without a GPU
    tasks = [
        {"task": "parity", "grid": "kernels", "index": index, "op": case.op, "case": case.name, "dtype": precision}
        | {"backends": ["native"], "kernel": kernel, "draws": 1}
        for index, case in enumerate(parity_case_list("kernels"))
        for precision, kernel in itertools.product(precisions, (*KERNELS, STEPS))
        if kernel_fits(kernel, case.options["shape"][-1], precision)
    ]
    random.Random(0).shuffle(tasks)
    return tasks


def smoke() -> list[dict]:
    """Both native recurrences beside cuDNN, in the sizes that decide the rules."""
    return [
        _timed("smoke", index, case, mode)
        | {"backends": [f"native {k}" for k in KERNELS if kernel_fits(k, case.hidden_size, precision_of(case))]}
        for index, case in enumerate(bench_case_list("smoke"))
        for mode in ("inference", "training")
    ]


def load() -> list[dict]:
    """Repeated training steps beside another stream, two large kernels, and the layers of a stack beside each other."""
    cases, stacks = (list(enumerate(bench_case_list(suite))) for suite in ("load", "stacks"))
    common = {"op": "lstm", "backends": ["native"]}
    return [
        common | {"task": task, "index": index, "case": case.name, "dtype": precision_of(case), "kernel": task}
        for task, several in (("repeats", cases), ("streams", cases[1:2]), ("layers", stacks))
        for index, case in several
    ]


def bench(*backends: str) -> list[dict]:
    """Every case in every mode."""
    tasks = []
    for index, case in enumerate(bench_case_list("bench")):
        modes = ["inference", "training"]
        if not SIMULATED and case.layers == 1 and case.kind != "packed":
            modes.append("CUDA graph")
        tasks += [_timed("bench", index, case, mode) | {"backends": list(backends)} for mode in modes]
    return tasks


def precision_of(case: BenchCase) -> str:
    """The key of ``PRECISIONS`` of a case."""
    options = {"dtype": case.dtype} | ({"tf32": case.tf32} if case.tf32 is not False else {})
    return next(name for name, other in PRECISIONS.items() if other == options)


def _timed(suite: str, index: int, case: BenchCase, mode: str) -> dict:
    key = {"suite": suite, "index": index, "op": case.kind, "case": case.name, "mode": mode}
    seconds = 0.0 if SIMULATED else 0.1 if suite == "smoke" else 0.3
    return {"task": "bench", "dtype": precision_of(case), "seconds": seconds} | key
