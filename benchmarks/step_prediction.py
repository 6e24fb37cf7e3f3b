"""Microseconds of a step that the step clock predicts for the recurrences, to print beside measured ones."""

import functools
import json
import math
from pathlib import Path

from hopper_model import H200

from fastseq.bench.cases import SHORT, BenchCase

TABLE = Path(__file__).resolve().parents[1] / "tests/cuda/step_clock.json"
CLUSTERS = {2: 66, 4: 33, 8: 15, 16: 8}  # blocks -> clusters resident at once, at most, on 132 multiprocessors
TYPES = {"bf16": "__nv_bfloat16", "f16": "__half", "tf32": "float"}
ONE_PAIR = 16  # rows: the clock of a grid kernel covers one pair of tiles


@functools.cache
def _clocks() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())


def predicted_us(case: BenchCase, kernel: str, train: bool) -> float | None:
    """Microseconds of a step of one layer and direction; None where the clock has no row for the shape.

    The clock's period of a step, and for clusters the bytes that a block receives and waves of clusters. Training adds
    the backward. Products outside the recurrence, launches and failed polls are not counted.
    """
    precision = "tf32" if case.tf32 is not False else SHORT[case.dtype].strip() or "float32"
    if case.layers > 1 or case.bidirectional or case.kind != "lstm":
        return None
    model = {"cluster": _cluster_cycles, "grid": _grid_cycles}.get(kernel)
    if model is None:
        return None
    cycles = [model(case.hidden_size, case.batch, precision, backward) for backward in (False, True)[: 1 + train]]
    return None if None in cycles else sum(cycles) / H200.cycles


def _cluster_cycles(hidden: int, batch: int, precision: str, backward: bool) -> float | None:
    """The planner of csrc/cuda/lstm/cluster_*.cu, without its 512-thread plans."""
    if hidden > 512 or precision not in TYPES:
        return None
    size = 4 if precision == "tf32" else 2
    blocks = next(n for n in CLUSTERS if hidden <= 32 * n)
    units = math.ceil(math.ceil(hidden / blocks) / 8) * 8
    steps = math.ceil(blocks * units / (2 * 4 * (8 // size)))
    kept = next((n for n in (4, 8) if steps <= n), 16)
    cycles = None
    for tiles in (1, 2) if backward else (1, 2, 4):
        shape = f"{max(1, blocks // 4)}, {tiles}" if backward else f"256, {kept}, {tiles}"
        name = f"cluster::lstm_cluster_{'backward' if backward else 'forward'}_kernel<{TYPES[precision]}, {shape}>"
        row = _clocks().get(name)
        if row is None:  # float has no kernel with 4 tiles at 16 steps, nor a backward for clusters of 16
            break
        waves = math.ceil(math.ceil(batch / (8 * tiles)) / CLUSTERS[blocks])
        received = 8 * tiles * (units * blocks * 4 if backward else hidden * size)  # bytes a step and block
        shared = 0 if backward else max(0, steps - kept) * 8 * 1024 / 128  # weights in shared memory, 128 bytes a cycle
        cycles = waves * (row["step"] + shared + received / H200.remote_bandwidth * H200.cycles)
        if waves == 1:
            return cycles
    return cycles


def _grid_cycles(hidden: int, batch: int, precision: str, backward: bool) -> float | None:
    if batch > ONE_PAIR or hidden > 8 * H200.multiprocessors:
        return None
    kind = {"bf16": "MmaHalf<__nv_bfloat16>", "f16": "MmaHalf<__half>", "tf32": "MmaTf32"}.get(precision, "FmaFloat")
    space = "grid_backward" if backward else "grid_forward"
    row = _clocks().get(f"{space}::lstm_{space}_kernel<{space}::{kind}, 1>")
    return row and float(row["step"])
