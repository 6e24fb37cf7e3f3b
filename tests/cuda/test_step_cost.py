"""The cost model of the recurrences: csrc/cuda/lstm/cost.h, and the kernels that the launchers choose by it."""

import json
import re
import sys
from itertools import product
from pathlib import Path

import emulator
import pytest
import torch
from cuda_cases import forward, place_of, recurrence

from fastseq import dispatch
from fastseq.dispatch import first_rule
from fastseq.ops.lstm.spec import LSTMCall

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/kernels/cuda-cost.md"
COST = ROOT / "csrc/cuda/lstm/cost.h"
CLOCK = json.loads(Path(__file__).with_name("step_clock.json").read_text())
CLUSTER, GRID, STEPS, CUDNN = range(4)
needs_emulator = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")


def tables() -> dict[str, list]:
    """Name -> numbers of the arrays of cost.h."""
    text = re.sub(r"//.*", "", COST.read_text())
    found = re.findall(r"int (k\w+)\[[^=]*= (\{[^;]*\});", text)
    return {name: json.loads(body.replace("{", "[").replace("}", "]")) for name, body in found}


def rows_of_the_clock() -> dict[str, list]:
    """The same arrays, from step_clock.json."""

    def step(family, arguments):
        return CLOCK.get(f"{family.split('_')[0]}::lstm_{family}_kernel<{arguments}>", {}).get("step", 0)

    def grid(family, arithmetic, count):
        return CLOCK.get(f"grid_{family}::lstm_grid_{family}_kernel<grid_{family}::{arithmetic}, {count}>", {}).get(
            "step", 0
        )

    expected = {}
    for kind, type in (("Half", "__nv_bfloat16"), ("Float", "float")):
        sizes = ("256, 4", "256, 8", "256, 16", "512, 8")
        expected[f"kClusterForward{kind}"] = [
            [step("cluster_forward", f"{type}, {size}, {n}") for n in (1, 2, 4)] for size in sizes
        ]
        expected[f"kClusterBackward{kind}"] = [
            [step("cluster_backward", f"{type}, {m}, {n}") for n in (1, 2)] for m in (1, 2, 4)
        ]
    for family in ("forward", "backward"):
        arithmetics = ("MmaHalf<__nv_bfloat16>", "MmaTf32", "FmaFloat")
        expected[f"kGrid{family.title()}"] = [[grid(family, a, count) for count in (1, 2)] for a in arithmetics]
    return expected


def test_the_cycles_are_those_of_the_step_clock():
    assert tables() == rows_of_the_clock(), "copy the steps of tests/cuda/step_clock.json into csrc/cuda/lstm/cost.h"


def cost(kernel, H, B, kind="bf16", D=1):
    return emulator.load().lstm_recurrence_cost(kernel, B, D, H, 2 if kind == "bf16" else 4, kind == "tf32")


@needs_emulator
@pytest.mark.parametrize("kind", ["bf16", "tf32", "float32"])
@pytest.mark.parametrize("kernel", [CLUSTER, GRID, STEPS, CUDNN])
def test_more_rows_and_more_units_cost_more(kernel, kind):
    """Up to 5 %: a plan for more rows may use the device better."""
    for (H, B), direction in product(product((64, 256, 512, 1024), (1, 8, 64, 512)), (0, 1)):
        here, wider, larger = (cost(kernel, *shape, kind)[direction] for shape in ((H, B), (2 * H, B), (H, 2 * B)))
        assert 0 < here <= 1.05 * wider and here <= 1.05 * larger, (H, B)


@needs_emulator
def test_two_directions_cost_no_less_than_one():
    for kernel, H in ((CLUSTER, 256), (GRID, 512), (STEPS, 512)):
        assert all(one <= two for one, two in zip(cost(kernel, H, 64), cost(kernel, H, 64, D=2), strict=True))


@needs_emulator
def test_a_kernel_that_does_not_fit_costs_infinitely_much():
    assert cost(CLUSTER, 1024, 1)[0] == cost(GRID, 4096, 1)[0] == float("inf")
    with pytest.raises(RuntimeError, match="kernel must be 0 to 3, got 4"):
        cost(4, 64, 1)


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_emulator
@pytest.mark.parametrize(("H", "B", "multiprocessors"), [(64, 2, 132), (64, 72, 4), (64, 2, 1)])
def test_the_launcher_takes_the_cheapest_kernel(H, B, multiprocessors, monkeypatch):
    """A cluster; where few clusters run at once, a grid; where one multiprocessor has no room for two blocks, steps."""
    host, case = place_of("host"), recurrence(2, B, H, dtype=torch.bfloat16)
    with emulator.device(multiprocessors=multiprocessors):
        costs = [cost(kernel, H, B)[0] for kernel in (CLUSTER, GRID, STEPS)]
        names = ("cluster", "grid", "steps")
        chosen, cheapest = forward(host, case), min(zip(costs, names, strict=True))
        monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", cheapest[1])
        assert _same(chosen, forward(host, case)), costs
        for name, us in zip(names, costs, strict=True):
            if name != cheapest[1] and us < float("inf"):
                monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", name)
                assert not _same(chosen, forward(host, case)), "the kernels differ in no bit: choose other shapes"


def grid_gain() -> float:
    return float(re.search(r"kGridGain = ([\d.]+)", COST.read_text())[1])


def line_of(line: str) -> str:
    """A row of the page's table, computed anew: H, B, products, first estimate, then the model and auto's choice."""
    H, B, kind, first = [cell.strip() for cell in line.strip("| \n").split("|")][:4]
    cluster, grid, _, cudnn = (cost(kernel, int(H), int(B), kind) for kernel in range(4))
    pairs = list(zip(cluster, grid, strict=True))
    names = " / ".join("grid" if ours[1] < grid_gain() * ours[0] else "cluster" for ours in pairs)
    call = LSTMCall("cuda", torch.bfloat16 if kind == "bf16" else torch.float32, 512, int(H), batch=int(B), steps=100)
    taken = []
    for name, training in (("inference", False), ("training", True)):
        if first_rule("lstm", call._replace(tf32=kind == "tf32", requires_grad=training))[0] == "native":
            taken.append(name)
    times = [" / ".join(f"{us:.2g}" if us < 10 else f"{us:.0f}" for us in both) for both in (map(min, pairs), cudnn)]
    return f"| {H} | {B} | {kind} | {first} | {times[0]} | {names} | {times[1]} | {', '.join(taken) or '–'} |"


def page() -> str:
    """The page with every row of its last table computed anew."""
    head, rule, rows = PAGE.read_text().rpartition("|---|\n")
    with emulator.as_native(), emulator.device():
        dispatch.forget()
        lines = [line_of(line) for line in rows.splitlines()]
        dispatch.forget()
    return head + rule + "\n".join(lines) + "\n"


@needs_emulator
def test_the_page_shows_the_model():
    rows = [line for line in PAGE.read_text().splitlines() if "| **" in line]
    assert len(rows) == 12 and all(line.endswith("| – |") for line in rows), "auto takes a row beyond break-even"
    assert page() == PAGE.read_text(), "renew the page: python tests/cuda/test_step_cost.py --write"


def test_auto_takes_no_row_that_the_first_estimate_leaves_to_cudnn():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().rpartition("|---|\n")[2].splitlines()]
    for *_, first, _, _, cudnn, taken in rows:
        estimates = [float(us) for us in first.strip("*").split(" / ")]
        limits = [float(us) for us in cudnn.split(" / ")]
        for choice, pairs in (("inference", 1), ("training", 2)):
            faster = all(ours < theirs for ours, theirs in list(zip(estimates, limits, strict=True))[:pairs])
            assert choice not in taken or (faster and "*" not in first), (first, cudnn, taken)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: python {sys.argv[0]} --write")
    PAGE.write_text(page())
