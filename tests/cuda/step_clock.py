"""Count the cycles of a step of the LSTM recurrences in their machine code for sm_90, without a GPU.

Every 16-byte instruction of NVIDIA's machine code holds a control word: the cycles until the warp's next instruction
(stall), the scoreboards that it sets when its result is there (write) or its operands are read (read), and those that
it waits for. So the compiler's schedule states all fixed latencies; LATENCY and OCCUPANCY add the variable ones.

The clock follows one path through the step loop and simulates the warps of one of the four schedulers of a
multiprocessor on it, two steps in a row: h becomes visible to the second step when the first has sent it and the
exchange has passed. All blocks are taken as equal. It counts no failed polls and no bank conflicts.
Layout of the control word: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture", arXiv 1804.06826, section 2.1.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

# Cycles until a result is there. Sources: [H] arXiv 2402.13499, table IV (H800: shared memory 29, L2 263 near and 414
# far, global memory 479) and its 180 cycles to another block of the cluster; [A] arXiv 2208.11174 and Arafa et al.,
# HPEC 2019 (A100: special functions 23, shared memory 23); [-] assumed. gpu_check prints what a GPU measures.
LATENCY = (  # (mnemonic, cycles); the first match counts
    (r"LDG\S*STRONG", 414),  # [H]
    (r"LDG", 479),  # [H]
    (r"LDS|LDSM", 29),  # [H]
    (r"SHFL", 23),  # [A] as shared memory
    (r"MUFU|I2F|F2I|I2I|POPC|FLO", 23),  # [A]
    (r"ATOMS|ATOMG|RED", 414),  # [H]
    (r"MEMBAR\S*GPU", 521),  # [H] L2 and back: near for the last store, near for its answer
    (r"SYNCS", 29),  # [H] as shared memory
    (r".*", 26),  # [-] constants, special registers
)
OPERANDS = 12  # cycles until the operands of an instruction are read [-]
# Cycles for which an instruction occupies a unit of its scheduler. Sources: CUDA programming guide, table of arithmetic
# throughput for 9.0 (per cycle and multiprocessor: 128 float, 64 integer, 16 special functions, 32 lanes of memory);
# mma.sync at 63 % of 1024 products of 16 bits [H, table VIII]; 128 bytes a cycle from shared memory, 35 from L2 [H].
OCCUPANCY = (  # (mnemonic, unit, cycles)
    (r"HMMA\S*TF32", "tensor", 6.4),
    (r"HMMA", "tensor", 6.4),
    (r"MUFU|I2F|F2I", "special", 8),
    (r"LDG\S*128", "memory", 58),
    (r"(LDS|STS)\S*128", "memory", 16),
    (r"(LDS|STS)\S*64", "memory", 8),
    (r"LD|ST|SHFL|ATOM|RED|SYNCS", "memory", 4),
    (r"F(ADD|MUL|FMA)|MOV", "float", 1),
    (r"IMAD", "multiply", 2),
    (r"U", "uniform", 1),
    (r"I|LOP|SHF|LEA|SEL|FSEL|PRMT|VI|FSETP|PLOP|F2FP|FMNMX", "integer", 2),
)
BARRIER = 20  # cycles from the last warp's arrival at BAR.SYNC [-]


class Family(NamedTuple):
    """How a kernel waits for h (or gate gradients) and sends it."""

    wait: str  # mnemonics
    send: str
    exchange: int  # cycles from the send to the moment from which a wait succeeds
    one_poll: bool = False  # the path holds the poll of one chunk: the cost model adds the bytes of the others


CLUSTER = Family(r"SYNCS\.PHASECHK", r"STAS", 180)
FAMILIES = {  # kernel name (pattern) -> family
    r"lstm_cluster_(forward|backward)_kernel": CLUSTER,
    r"lstm_grid_forward_kernel": Family(r"LDG\.E\.128\.STRONG", r"STG\.E\.STRONG", 258),
    r"lstm_grid_backward_kernel": Family(r"LDG\.E\.128\.STRONG", r"STG\.E\.(64|128)\.STRONG", 258, True),
}


def family_of(name: str) -> Family | None:
    return next((family for pattern, family in FAMILIES.items() if re.match(pattern, name)), None)


@dataclass(frozen=True)
class Instruction:
    address: int
    op: str  # with modifiers: LDS.128
    text: str  # with guard and operands
    conditional: bool
    target: int | None  # of a branch
    stall: int
    write: int  # scoreboard; 7: none
    read: int
    waits: tuple[int, ...]
    latency: int
    unit: str
    occupied: float


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;?\s+/\* 0x[0-9a-f]{16} \*/\s+/\* (0x[0-9a-f]{16}) \*/")


def parse(listing: str) -> list[Instruction]:
    """Read one function of ``cuobjdump -sass``."""
    instructions = []
    for address, text, high in _LINE.findall(listing):
        guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        op, _, operands = rest.strip().partition(" ")
        control = int(high, 16) >> 41
        target = re.search(r"(0x[0-9a-f]+)$", operands) if op.startswith("BRA") else None
        unit, occupied = next(((u, n) for p, u, n in OCCUPANCY if re.match(p, op)), ("other", 1))
        instructions.append(
            Instruction(
                int(address, 16),
                op,
                text,
                bool(guard) or "," in operands,
                int(target[1], 16) if target else None,
                max(control & 15, 1),
                control >> 5 & 7,
                control >> 8 & 7,
                tuple(k for k in range(6) if control >> 11 + k & 1),
                next(n for p, n in LATENCY if re.match(p, op)),
                unit,
                occupied,
            )
        )
    return instructions


def _matches(code: Iterable[Instruction], pattern: str) -> list[int]:
    return [k for k, instruction in enumerate(code) if re.match(pattern, instruction.op)]


def step_loop(code: list[Instruction], family: Family) -> list[Instruction]:
    """Return the smallest loop that waits, meets in a block barrier and sends."""
    code = code[: _matches(code, "EXIT")[-1]]  # slow paths follow
    at = {instruction.address: k for k, instruction in enumerate(code)}
    needed = [_matches(code, pattern) for pattern in (family.wait, r"BAR\.SYNC", family.send)]
    loops = [(k - at[i.target], at[i.target], k) for k, i in enumerate(code) if i.target in at and at[i.target] <= k]
    for _, first, last in sorted(loops):
        if all(any(first <= k <= last for k in places) for places in needed):
            return code[first : last + 1]
    raise ValueError("no loop waits, meets in a block barrier and sends")


def _skipped(loop: list[Instruction], k: int, target: int, wait: int, barrier: int, send: int) -> bool:
    """True if branch k to ``target`` skips nothing but products with weights from shared memory, or cells whose inputs
    are loaded between barrier and send.
    """
    region = [i.op for i in loop[k + 1 : target]]
    if not loop[k].conditional or k < wait < target or any(re.match(r"BAR\.SYNC|STAS", op) for op in region):
        return False
    products = [n for n, op in enumerate(region) if re.match(r"HMMA|FFMA", op)]
    wide = [n for n, op in enumerate(region) if re.match(r"LDS\.128", op)]
    loads = sum(op.startswith("LDG") and "STRONG" not in op for op in region)
    from_shared = len(products) >= 2 and len(wide) >= 2 and wide[0] < products[0]
    return from_shared or (loads >= 4 and barrier < k and target <= send)


def path(loop: list[Instruction], family: Family) -> list[Instruction]:
    """Return the instructions of one step: the longest way through the loop that waits, meets and sends.

    Inner loops run once. Left out: failed polls, weights in shared memory, the loads of h after the first product,
    cells whose inputs are not loaded ahead, stores to other blocks of a cluster in an inner loop (of a tile that is
    not full). A loop that loads h ahead, after the send, begins there.
    """
    at = {instruction.address: k for k, instruction in enumerate(loop)}
    waits, barriers = _matches(loop, family.wait), _matches(loop, r"BAR\.SYNC")
    following = []
    barrier = next(k for k in barriers if k > waits[0])
    inner = [range(at[i.target], k + 1) for k, i in enumerate(loop[:-1]) if barrier < at.get(i.target, -1) <= k]
    partial = {k for places in inner if any(loop[k].op.startswith("STAS") for k in places) for k in places}
    send = next(k for k in _matches(loop, family.send) if k > barrier and k not in partial)
    ahead = [k for k in waits if k > send]
    wait = ahead[0] if ahead else waits[0]
    for k, i in enumerate(loop):
        forward = at.get(i.target, -1) if i.target is not None else -1
        ends = i.op == "EXIT" or (i.op.startswith("BRA") and not i.op.startswith("BRA.DIV"))
        through = [] if ends and not i.conditional else [k + 1]
        if any(re.search(r"LOP3.*0x3ff,", j.text) for j in loop[max(0, k - 4) : k]) and i.target is not None:
            through, forward = [], -1  # SpinTimeout counts polls in vain
        elif forward > k and _skipped(loop, k, forward, wait, barrier, send):
            through = []
        following.append([n for n in (*through, forward) if k < n < len(loop)])
    product = next(k for k in _matches(loop, "HMMA|FFMA") if k > waits[0])
    late = [k for k in waits if (k not in ahead if ahead else k > product)]
    for k in (*partial, *late):
        following[k] = []
    stages, chosen = sorted((0, wait, barrier, send, len(loop) - 1)), []
    for begin, end in itertools.pairwise(stages):
        chosen += _longest(loop, following, begin, end)[:-1]
    chosen.append(len(loop) - 1)
    start = chosen.index(send) + 1 if ahead else 0
    left_out = set(waits) - {wait} if family.one_poll else set()
    return [loop[k] for k in chosen[start:] + chosen[:start] if k not in left_out]


def _longest(loop: list[Instruction], following: list[list[int]], begin: int, end: int) -> list[int]:
    """Return the way from ``begin`` to ``end`` with the most stall cycles."""
    cycles, before = {begin: 0}, {}
    for k in range(begin, end):
        for n in following[k] if k in cycles else ():
            if cycles[k] + loop[k].stall > cycles.get(n, -1):
                cycles[n], before[n] = cycles[k] + loop[k].stall, k
    if end not in cycles:
        raise ValueError(f"no way from {loop[begin].address:#x} to {loop[end].address:#x}")
    way = [end]
    while way[-1] != begin:
        way.append(before[way[-1]])
    return way[::-1]


@dataclass
class Warp:
    ready: float = 0
    position: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    loaded: list[bool] = field(default_factory=lambda: [False] * 6)  # scoreboard: set by a plain load
    at_barrier: float | None = None


class Clock(NamedTuple):
    """Cycles of one step. first_send, last_send: from the moment at which h is visible to the block."""

    first_send: int
    last_send: int
    step: int
    barrier_to_send: int  # issue slots from the block barrier to the first send
    divisions: int  # of integers by a variable
    load_wait: int  # part of ``step`` in which a warp waits for loads that do not depend on the exchange


def simulate(steps: list[Instruction], family: Family, warps: int) -> Clock:
    """Run ``warps`` warps of one scheduler through three steps and measure the last."""
    length, rounds = len(steps), 3
    wait = _matches(steps, family.wait)[0]
    barrier = next(k for k in _matches(steps, r"BAR\.SYNC") if k > wait)
    sends = [k for k in _matches(steps, family.send) if k > barrier]
    state = [Warp() for _ in range(warps)]
    issue_free, unit_free = 0.0, {}
    visible, issued = [[] for _ in range(rounds)], {}  # issued[round, position]: by warp
    last_send, load_wait = [0.0] * rounds, 0.0
    while any(w.position < rounds * length for w in state):
        ready = {}
        for k, w in enumerate(state):
            if w.position < rounds * length and w.at_barrier is None:
                i = steps[w.position % length]
                ready[k] = max([w.ready, *(w.scoreboards[s] for s in i.waits)])
        k = min(ready, key=lambda k: (ready[k], k))
        w, i = state[k], steps[state[k].position % length]
        number, place = divmod(w.position, length)
        if k == 0 and number == rounds - 1 and any(w.loaded[s] and w.scoreboards[s] == ready[k] for s in i.waits):
            load_wait += ready[k] - w.ready
        now = max(ready[k], issue_free, unit_free.get(i.unit, 0))
        issue_free, unit_free[i.unit] = now + 1, now + i.occupied
        queued = max(0.0, i.occupied - 4) if i.unit == "memory" else 0.0
        done = now + i.latency + queued
        if place == wait and number:  # the poll that succeeds
            done = max(done, last_send[number - 1] + family.exchange + (i.latency if i.op.startswith("LDG") else 0))
        if place == wait:
            visible[number].append(done)
        issued.setdefault((number, place), []).append(now)
        if place in sends:
            last_send[number] = max(last_send[number], now)
        for board, end in ((i.write, done), (i.read, now + OPERANDS + queued)):
            if board < 6 and end >= w.scoreboards[board]:
                w.scoreboards[board] = end
                w.loaded[board] = i.op.startswith("LDG") and "STRONG" not in i.op and board == i.write
        w.ready, w.position = now + i.stall, w.position + 1
        if i.op.startswith("BAR.SYNC"):
            w.at_barrier = now
            if all(other.at_barrier is not None for other in state):
                for other in state:
                    other.ready, other.at_barrier = max(other.ready, now + BARRIER), None
    begin = min(visible[-1])
    return Clock(
        round(min(issued[rounds - 1, sends[0]]) - begin),
        round(last_send[-1] - begin),
        round(begin - min(visible[-2])),
        sends[0] - barrier,
        sum(bool(re.match(r"I2F", i.op)) for i in steps),
        round(load_wait),
    )


def clock(listing: str, family: Family, threads: int) -> Clock:
    """Time the step loop of one kernel. listing: its function in ``cuobjdump -sass``."""
    return simulate(path(step_loop(parse(listing), family), family), family, max(1, threads // 128))
