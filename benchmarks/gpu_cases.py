"""The cases of gpu_check.py, most informative first: a run that is cut short still decides the most."""

import itertools
import os
from dataclasses import replace

import torch

from fastseq.bench.cases import CUDA_CASES, PRECISIONS, BenchCase
from fastseq.parity.cases import GRIDS, ParityCase

SIMULATED = os.environ.get("FASTSEQ_SIM") == "1"
KERNELS = ("cluster", "grid")  # values of FASTSEQ_LSTM_KERNEL: the recurrences of csrc/cuda/lstm
STEPS = "steps"  # another value: one product and one kernel a step, where neither fits; checked, not timed
STEPS_HIDDEN = (16, 264)
CLUSTER_HIDDEN = 512  # the largest hidden size of the cluster kernels
SMOKE_SIZES = ((256, 1), (512, 16), (512, 64), (512, 128), (1024, 1), (1024, 16), (1024, 64), (1024, 128))  # (H, B)
SMOKE_PRECISIONS = ("bf16", "tf32", "default")
SMOKE_STEPS = 128
SMOKE_PROJECTED = ((512, 16, "bf16"), (1024, 16, "bf16"), (1024, 16, "tf32"), (1024, 64, "default"))  # proj_size H / 2
STACKS = (
    (256, 16, "bf16", 2),
    (512, 16, "bf16", 2),
    (512, 16, "bf16", 4),
    (256, 1, "tf32", 4),
)  # H, B, precision, layers
STACK_STEPS = 1024
LOAD_SIZES = (
    (512, 16, "bf16"),
    (1024, 16, "bf16"),
    (1024, 64, "tf32"),
    (512, 1, "tf32"),
    (1024, 3, "float32"),
    (256, 64, "f16"),
)  # fmt: skip  (H, B, precision)


def kernel_fits(kernel: str, hidden_size: int, precision: str) -> bool:
    """False where the recurrence has no such kernel: clusters hold 512 units, and no full float32 products.

    Steps have one kernel for all sizes, so two sizes suffice.
    """
    if kernel == STEPS:
        return hidden_size in STEPS_HIDDEN
    return kernel == "grid" or (hidden_size <= CLUSTER_HIDDEN and precision not in ("float32", "float64"))


def bench_case_list(suite: str) -> list[BenchCase]:
    """The cases to time.

    Args:
        suite: "smoke": one LSTM layer in each size and precision that decides the rules; "bench": all GPU cases;
            "load": the cases repeated beside other work; "stacks": several layers. In a simulation a few of them, tiny.
    """
    if suite == "bench":
        return list(CUDA_CASES) if not SIMULATED else _one_of_each_kind()
    if suite == "stacks":
        cases = [
            BenchCase(
                suite, "lstm", STACK_STEPS, batch, hidden, hidden, layers=layers, device="cuda", **PRECISIONS[name]
            )
            for hidden, batch, name, layers in STACKS
        ]
        return [replace(_tiny(cases[0]), steps=20)] if SIMULATED else cases
    if suite == "smoke":
        sizes = [(*size, precision) for precision, size in itertools.product(SMOKE_PRECISIONS, SMOKE_SIZES)]
    else:
        sizes = list(LOAD_SIZES)
    cases = [
        BenchCase(suite, "lstm", SMOKE_STEPS, batch, hidden, hidden, device="cuda", **PRECISIONS[precision])
        for hidden, batch, precision in sizes
    ]
    if suite == "smoke":
        cases += [
            BenchCase(
                suite,
                "lstm",
                SMOKE_STEPS,
                batch,
                hidden,
                hidden,
                proj_size=hidden // 2,
                device="cuda",
                **PRECISIONS[name],
            )
            for hidden, batch, name in SMOKE_PROJECTED
        ]
    return [_tiny(case) for case in (cases[0], cases[-1])] if SIMULATED else cases


def _one_of_each_kind() -> list[BenchCase]:
    kinds: dict[tuple, BenchCase] = {}
    for case in CUDA_CASES:
        kinds.setdefault((case.kind, case.layers, case.proj_size > 0), case)
    return [_tiny(case) for case in kinds.values()]


def _tiny(case: BenchCase) -> BenchCase:
    small = {"device": "cpu", "tf32": False, "batch": 2, "input_size": 8, "hidden_size": 8}  # a CPU has no TF32
    small["proj_size"] = 4 if case.proj_size else 0
    return replace(case, steps=min(case.steps, 3), keys=min(case.keys, 5), **small)


WITHOUT_NATIVE = ("lstm_variant",)  # ops whose kernel on a GPU is that of Triton alone


def parity_case_list(grid: str) -> list[ParityCase]:
    """The cases to compare with float64.

    Args:
        grid: "kernels": shapes that reach every instantiation of the recurrences; "quick": the quick grid of ``fastseq
            parity``; "full": the rest of its full grid. In a simulation a cheap one of each op.
    """
    if grid == "kernels":
        return _kernel_cases((16, 40), (2,)) if SIMULATED else _kernel_cases()
    quick = GRIDS["quick"]()
    cases = quick if grid == "quick" else GRIDS["full"]()[len(quick) :]
    if not SIMULATED:
        return cases
    served = (c for c in cases if not (c.slices or "spread" in c.options or c.options.get("proj_size")))
    served = (c for c in served if c.op not in WITHOUT_NATIVE)
    cheap = (c for c in served if 4 <= max(c.options.get("shape", (99,))) <= 7)
    return list({case.op: case for case in cheap}.values())[: 3 if grid == "quick" else 1]


def _kernel_cases(
    hidden_sizes: tuple[int, ...] = (64, 256, 264, 512, 768, 1040, 2048), batches: tuple[int, ...] = (1, 16, 40)
) -> list[ParityCase]:
    """Every hidden size and batch once; lengths in every other case, reverse in half, both directions in a few.

    The last have a projection, which is folded into the recurrence.
    """
    cases = []
    for number, (hidden, batch) in enumerate(itertools.product(hidden_sizes, batches)):
        options = {"shape": (3 + 4 * (number % 2), batch, 64, hidden), "form": ("full", "lengths")[number % 2]}
        cases.append(ParityCase("lstm", options | {"reverse": number % 4 > 1}))
    both = {"bidirectional": True, "form": "lengths"}
    wide = [ParityCase("LSTM", {"shape": (5, batch, 32, hidden)} | both) for hidden, batch in ((256, 16), (768, 3))]
    shapes = ((3, 2, 8, 16),) if SIMULATED else ((7, 16, 64, 512), (3, 40, 64, 1040))
    projected = [ParityCase("lstm", {"shape": s, "form": "lengths", "proj_size": s[-1] // 2}) for s in shapes]
    return [*cases, *([] if SIMULATED else wide), *projected]


def dtype_of(precision: str) -> tuple[torch.dtype, bool | None]:
    """A key of ``PRECISIONS`` -> dtype, and whether float32 products may be TF32."""
    options = PRECISIONS[precision]
    return options["dtype"], options.get("tf32", False)
