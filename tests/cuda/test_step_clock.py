"""Cycles of a step of every LSTM recurrence by the step clock: none grows by more than 5 % without a renewed table.

step_clock.json holds the clock of each kernel for sm_90. After an intended change:
python tests/cuda/test_step_clock.py --write
"""

import functools
import hashlib
import json
import re
import sys
from pathlib import Path

import cuda_build
import pytest
import step_clock
from step_clock import CLUSTER, Clock

TABLE = Path(__file__).with_name("step_clock.json")
BUDGET = Path(__file__).with_name("cuda_budget.json")  # for the threads of a block
RENEW = "if this is intended, renew the table: python tests/cuda/test_step_clock.py --write"
GROWTH = 1.05
ARCHITECTURE = 90


def clocks_of(path: Path, threads: dict[str, int]) -> dict[str, dict[str, int]]:
    """Time the step loops of one object file; kept beside it, because objects are named by their content."""
    key = hashlib.sha256(Path(step_clock.__file__).read_bytes()).hexdigest()[:16]
    kept = path.with_suffix(f".clock-{key}.json")
    if not kept.exists():
        from nvidia_binaries import tool

        _, *listings = tool("cuobjdump", "-sass", "-arch", f"sm_{ARCHITECTURE}", path).split("Function : ")
        rows = {}
        for listing in listings:
            mangled, _, code = listing.partition("\n")
            name = cuda_build.readable(mangled)
            family = step_clock.family_of(re.sub(r"^\w+::", "", name))
            if family is not None:
                rows[name] = step_clock.clock(code, family, threads[name])._asdict()
        kept.with_suffix(".partial").write_text(json.dumps(rows))
        kept.with_suffix(".partial").rename(kept)
    return json.loads(kept.read_text())


@functools.cache
def measured() -> dict[str, dict[str, int]]:
    threads = {name: row["threads"] for name, row in json.loads(BUDGET.read_text())[f"sm_{ARCHITECTURE}"].items()}
    paths = [path for path in cuda_build.objects() if path.name.startswith("lstm-")]
    return {name: row for path in paths for name, row in clocks_of(path, threads).items()}


def problems(name: str, row: dict[str, int], expected: dict[str, int] | None) -> list[str]:
    """Return the faults of a kernel as sentences. expected: its row of the table."""
    if expected is None:
        return [f"{name} has no row in {TABLE.name}; {RENEW}"]
    longer = [key for key in Clock._fields if row[key] > GROWTH * expected[key]]
    return [f"{name}: {key} grew from {expected[key]} to {row[key]}, more than 5 %; {RENEW}" for key in longer]


def test_no_path_is_longer_than_in_the_table():
    cuda_build.require()
    table, clocks = json.loads(TABLE.read_text()), measured()
    assert clocks
    wrong = [sentence for name, row in clocks.items() for sentence in problems(name, row, table.get(name))]
    wrong += [f"{name} is in {TABLE.name} only; {RENEW}" for name in table.keys() - clocks.keys()]
    assert not wrong, "\n".join(wrong)


def test_growth_is_reported():
    row = Clock(1000, 1100, 1300, 200, 0, 0)._asdict()
    assert problems("k", row, row) == []
    assert problems("k", row | {"step": 1365}, row) == []
    assert "step grew from 1300 to 1366, more than 5 %" in problems("k", row | {"step": 1366}, row)[0]
    assert "divisions grew from 0 to 1" in problems("k", row | {"divisions": 1}, row)[0]
    assert "no row" in problems("k", row, None)[0]


def listing(*lines: str) -> str:
    """Assemble "text | stall, write, read, waits" into the form of cuobjdump."""
    out = []
    for number, line in enumerate(lines):
        text, _, control = line.partition("|")
        stall, write, read, *waits = (int(x) for x in (control or "1 7 7").split())
        word = (stall | 1 << 4 | write << 5 | read << 8 | sum(1 << k for k in waits) << 11) << 41
        out.append(f"/*{16 * number:04x}*/ {text.strip()} ; /* 0x{0:016x} */\n /* 0x{word:016x} */")
    return "\n".join(out)


SMALL = (
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2 | 2 0 7",  # 0x00
    "@!P0 BRA 0x0 | 5 7 7 0",
    "LDS.64 R4, [R3] | 4 1 7",
    "HMMA.16816.F32.BF16 R8, R12, R4, RZ | 15 7 7 1",
    "BAR.SYNC.DEFER_BLOCKING 0x0 | 1 7 7",  # 0x40
    "FADD R8, R8, R9 | 4 7 7",
    "STAS.64 [R6.64], R8 | 1 7 7",
    "@P1 BRA 0x0 | 5 7 7",
    "EXIT | 5 7 7",  # 0x80
)


def test_the_clock_of_a_small_loop():
    """The wait's own latency lies before ``visible``; stalls and the latencies of LDS and BAR follow."""
    clock = step_clock.clock(listing(*SMALL), CLUSTER, 128)
    queue, lds, barrier = 4, 29, 20
    to_send = 5 + lds + queue + 15 + barrier + 4
    assert clock == Clock(to_send, to_send, to_send + CLUSTER.exchange, 2, 0, 0)


@pytest.mark.parametrize(
    ("number", "line", "longer"),
    [
        (5, "FADD R8, R8, R9 | 14 7 7", 10),  # stall
        (5, "MUFU.RCP R8, R8 | 4 7 7", 0),  # its scoreboard is not awaited
        (6, "STAS.64 [R6.64], R8 | 1 7 7 1", 0),  # a scoreboard that is clear
        (2, "LDG.E.128.STRONG.GPU R4, [R3] | 4 1 7", 414 + 54 - 33),  # latency and queue
    ],
    ids=("stall", "unawaited", "clear", "latency"),
)
def test_a_longer_path(number, line, longer):
    lines = [*SMALL[:number], line, *SMALL[number + 1 :]]
    before, after = (step_clock.clock(listing(*code), CLUSTER, 128) for code in (SMALL, lines))
    assert after.first_send - before.first_send == longer


def test_two_warps_share_a_scheduler():
    one, two = (step_clock.clock(listing(*SMALL), CLUSTER, threads) for threads in (128, 256))
    assert one.last_send < two.last_send < 2 * one.last_send


def test_stores_before_the_send_lengthen_it():
    """A store under a condition, its address computed first: the way through it counts."""
    store = ("@P2 BRA 0x90 | 5 7 7", "IMAD R7, R7, R7, RZ | 5 7 7", "STG.E [R7], R8 | 4 7 7")
    lines = [*SMALL[:6], *store, *SMALL[6:]]
    before, after = (step_clock.clock(listing(*code), CLUSTER, 128) for code in (SMALL, lines))
    assert after.first_send - before.first_send == 14
    assert after.barrier_to_send - before.barrier_to_send == 3


def test_a_loop_that_loads_ahead_begins_after_the_send():
    """A poll after the send, repeated at the loop's head where it came too early; the stores behind it are hidden."""
    again = ("@P0 BRA 0x30 | 5 7 7 0", SMALL[0], "@!P0 BRA 0x10 | 5 7 7 0")
    ahead = (*again, *SMALL[2:7], SMALL[0], "STG.E [R7], R8 | 4 7 7", *SMALL[7:])
    assert step_clock.clock(listing(*ahead), CLUSTER, 128) == step_clock.clock(listing(*SMALL), CLUSTER, 128)


def test_a_wait_for_gates_is_counted():
    """A load of the input product, converted before the barrier."""
    gates = ("LDG.E.U16 R9, [R7] | 1 2 7", "IMAD.U32 R9, R9, 0x10000, RZ | 4 7 7 2")
    clock = step_clock.clock(listing(*SMALL[:4], *gates, *SMALL[4:]), CLUSTER, 128)
    assert clock.load_wait == 479 - 1
    late = (*SMALL[:4], gates[0], *SMALL[4:5], gates[1], *SMALL[5:])
    assert step_clock.clock(listing(*late), CLUSTER, 128).load_wait == 479 - 1 - 20


def test_weights_in_shared_memory_are_left_out():
    extra = ("@P2 BRA 0x90 | 5 7 7", "LDS.128 R20, [R3] | 4 1 7", "LDS.128 R24, [R3] | 4 1 7")
    extra += ("HMMA.16816.F32.BF16 R8, R20, R4, R8 | 15 7 7 1", "HMMA.16816.F32.BF16 R8, R24, R4, R8 | 15 7 7 1")
    before = step_clock.clock(listing(*SMALL), CLUSTER, 128)
    after = step_clock.clock(listing(*SMALL[:4], *extra, *SMALL[4:]), CLUSTER, 128)
    assert after.first_send - before.first_send == 5  # the branch


def test_a_division_is_counted():
    lines = [*SMALL[:5], "I2F.RP R9, R5 | 4 0 7", *SMALL[5:]]
    assert step_clock.clock(listing(*lines), CLUSTER, 128).divisions == 1


def test_code_without_a_step_loop_is_refused():
    with pytest.raises(ValueError, match="no loop waits"):
        step_clock.clock(listing(*SMALL[:6], *SMALL[7:]), CLUSTER, 128)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: python {sys.argv[0]} --write")
    sys.path.append(str(cuda_build.ROOT / "tests/triton"))  # nvidia_binaries; pytest has it from pyproject.toml
    rows = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(measured().items()))
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
