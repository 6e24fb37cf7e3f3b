"""Instructions that involve several threads: branches, barriers, shuffles, votes, matrix products."""

import re

import numpy as np

from .arithmetic import kind_of
from .memory import LOCAL
from .parse import Address, Pair, PtxError, Symbol
from .program import LANES, Control, opcode
from .transfers import address, load

ALL = (1 << LANES) - 1


@opcode("bra", allow="uni")
def bra(program, i):
    target = program.label(i.operands[0])
    return Control(lambda warp, mask: warp.jump(mask, target))


@opcode("ret", "exit", allow="uni")
def ret(program, i):
    return Control(lambda warp, mask: warp.leave(mask))


@opcode("trap")
def trap(program, i):
    def step(warp, mask):
        raise PtxError(f"trap: the kernel aborted; last output: {warp.block.launch.printed[-1:]}")

    return step


@opcode("call", allow="uni")
def call(program, i):
    """vprintf, by the first lane that calls it. Kernels call it before every trap."""
    function = re.search(r"\), ?vprintf, ?\( ?(\w+) ?, ?(\w+) ?\)", i.text)
    if not function:
        raise PtxError("a call of a function")
    template, values = (address(program, Address(Symbol(name), 0)) for name in function.groups())

    def step(warp, mask):
        lane = 0 if mask is None else int(np.flatnonzero(mask)[0])
        form, at = (int(warp.local.load(where(warp)[lane : lane + 1], 8)[0][0]) for where in (template, values))
        warp.block.launch.printed.append(_format(warp, warp.block.launch.memory.text(form), at - LOCAL))

    return step


def _format(warp, form: str, at: int) -> str:
    """Format printf's text; its arguments are at ``at`` in local memory, each aligned to its size."""

    def argument(match):
        nonlocal at
        size = 4 if match[0] in ("%d", "%u", "%x", "%i") else 8
        at = -(-at // size) * size + size
        value = int(warp.local.load(np.array([at - size], np.uint64), size)[0][0])
        return warp.block.launch.memory.text(value) if match[0] == "%s" else str(value)

    return re.sub(r"%\w+", argument, form)


@opcode("nanosleep")
def nanosleep(program, i):
    return Control(lambda warp, mask: warp.pause(mask))


@opcode("bar", "barrier", allow="sync arrive red cta aligned cluster wait release acquire relaxed popc and or warp")
def bar(program, i):
    if i.modifiers[0] == "cluster":
        return Control(_cluster_barrier(i.modifiers[1]))
    if i.modifiers[0] == "warp":
        members = program.source(i.operands[0], "u32")
        return Control(lambda warp, mask: meeting(warp, mask, members(warp)))
    action = next(m for m in i.modifiers if m in ("sync", "arrive", "red"))
    operands = list(i.operands)
    result = operands.pop(0) if action == "red" else None
    vote = program.source(operands.pop(), "pred") if action == "red" else None
    number = program.source(operands[0], "u32")
    expected = program.source(operands[1], "u32") if len(operands) > 1 else None
    reduction = next((m for m in i.modifiers if m in ("popc", "and", "or")), None)
    write = program.sink(result, "u32" if reduction == "popc" else "pred") if result else None
    combine = {"popc": lambda total, of: total, "and": lambda total, of: total == of, "or": lambda total, of: total > 0}

    def step(warp, mask):
        lanes = np.ones(LANES, bool) if mask is None else mask
        which = np.unique(number(warp)[lanes])
        if len(which) > 1:
            raise PtxError("lanes of a warp wait at different barriers")
        barrier = warp.block.barriers[int(which[0])]
        threads = int(expected(warp)[lanes][0]) if expected else warp.block.threads
        votes = int((vote(warp) & lanes & (warp.ticket < 0)).sum()) if vote else 0
        if action == "arrive":
            barrier.arrive(int(lanes.sum()), threads)
            return
        passing = warp.wait_at(barrier, lanes, threads, votes)
        if write and passing.any():
            write(warp, np.full(LANES, combine[reduction](barrier.result, threads)), passing)

    return Control(step)


def _cluster_barrier(action: str):
    def step(warp, mask):
        cluster, lanes = warp.block.cluster, np.ones(LANES, bool) if mask is None else mask
        if action == "arrive":
            if (warp.cluster_ticket[lanes] >= 0).any():
                raise PtxError("barrier.cluster.arrive twice without a wait")
            warp.cluster_ticket[lanes] = cluster.barrier.phase
            cluster.barrier.arrive(int(lanes.sum()), cluster.alive())
            warp.block.launch.moved += 1
            return
        if (warp.cluster_ticket[lanes] < 0).any():
            raise PtxError("barrier.cluster.wait without an arrive")
        passing = lanes & (warp.cluster_ticket < cluster.barrier.phase)
        warp.cluster_ticket[passing] = -1
        warp.hold(lanes & ~passing)

    return step


def meeting(warp, mask, members: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the complete groups of lanes as (member mask, lanes); lanes of incomplete groups wait.

    members: the mask of each lane; None if all 32 lanes take part.
    """
    lanes = np.ones(LANES, bool) if mask is None else mask
    groups = []
    for bits in np.unique(members[lanes]) if members is not None else [ALL]:
        same = lanes if members is None else lanes & (members == bits)
        wanted = (int(bits) >> np.arange(LANES) & 1).astype(bool)
        if (wanted & ~warp.alive).any():
            raise PtxError(f"lane {np.flatnonzero(wanted & ~warp.alive)[0]} is in the mask, but has returned")
        if (same & ~wanted).any():
            raise PtxError(f"lane {np.flatnonzero(same & ~wanted)[0]} is not in its mask {int(bits):#x}")
        if (same == wanted).all():
            groups.append((wanted, same))
    held = lanes.copy()
    for _, same in groups:
        held &= ~same
    warp.hold(held)
    return groups


@opcode("shfl", allow="sync up down bfly idx")
def shfl(program, i):
    mode = i.modifiers[1]
    destination, source, *numbers = i.operands
    target, valid = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, None)
    read, (by, clamp, members) = program.source(source, "b32"), [program.source(n, "u32") for n in numbers]
    write, write_valid = program.sink(target, "b32"), program.sink(valid, "pred") if valid else None

    def step(warp, mask):
        lane = np.arange(LANES)
        b, c = (by(warp) & 31).astype(np.int64), clamp(warp).astype(np.int64)
        segment = c >> 8 & 31
        last, first = lane & segment | c & 31 & ~segment, lane & segment
        origin = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
        inside = origin >= last if mode == "up" else origin <= last
        origin = np.where(inside, origin, lane)
        for wanted, same in meeting(warp, mask, members(warp)):
            if not wanted[origin[same]].all():
                raise PtxError("a shuffle reads from a lane outside its mask")
            write(warp, read(warp)[origin], same)
            if write_valid:
                write_valid(warp, inside, same)

    return Control(step)


_VOTES = {"all": lambda votes: votes.all(), "any": lambda votes: votes.any(), "uni": lambda votes: np.ptp(votes) == 0}


@opcode("vote", allow="sync all any uni ballot")
def vote(program, i):
    mode = i.modifiers[1]
    destination, source, mask_operand = i.operands
    read, members = program.source(source, "pred"), program.source(mask_operand, "u32")
    write = program.sink(destination, "b32" if mode == "ballot" else "pred")

    def step(warp, mask):
        for wanted, same in meeting(warp, mask, members(warp)):
            votes = read(warp)
            if mode == "ballot":
                write(warp, np.full(LANES, _as_bits(votes & wanted), np.uint32), same)
            else:
                write(warp, np.full(LANES, bool(_VOTES[mode](votes[wanted].astype(int)))), same)

    return Control(step)


def _as_bits(lanes: np.ndarray) -> int:
    return int((lanes.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum())


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@opcode("redux", allow="sync add min max and or xor")
def redux(program, i):
    kind, reduction = kind_of(i), _REDUCTIONS[i.modifiers[1]]
    destination, source, mask_operand = i.operands
    read, members = program.source(source, kind), program.source(mask_operand, "u32")
    write = program.sink(destination, kind)

    def step(warp, mask):
        for wanted, same in meeting(warp, mask, members(warp)):
            total = reduction.reduce(read(warp)[wanted], dtype=read(warp).dtype)
            write(warp, np.full(LANES, total), same)

    return Control(step)


@opcode("activemask")
def activemask(program, i):
    write = program.sink(i.operands[0], "b32")

    def step(warp, mask):
        lanes = np.ones(LANES, bool) if mask is None else mask
        write(warp, np.full(LANES, _as_bits(lanes), np.uint32), mask)

    return step


@opcode("elect", allow="sync")
def elect(program, i):
    """elect: the first lane of the mask."""
    destination, mask_operand = i.operands
    leader, is_leader = program.sink(destination.first, "b32"), program.sink(destination.second, "pred")
    members = program.source(mask_operand, "u32")

    def step(warp, mask):
        for wanted, same in meeting(warp, mask, members(warp)):
            first = int(np.flatnonzero(wanted)[0])
            leader(warp, np.full(LANES, first, np.uint32), same)
            is_leader(warp, np.arange(LANES) == first, same)

    return Control(step)


def fragment(which: str, kind: str, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns (lanes, elements) of each lane's elements in a matrix of mma.m16n8k<depth>.

    PTX ISA, "Matrix fragments for mma.m16n8k16" and following; group = lane / 4, quad = lane % 4. A is (16, depth),
    B is (depth, 8), C and D are (16, 8).
    """
    group, quad = (x[:, None] for x in divmod(np.arange(LANES), 4))
    if which == "c":
        e = np.arange(4)
        return group + 8 * (e // 2), 2 * quad + e % 2
    if kind == "tf32":
        e = np.arange(depth // 2 if which == "a" else depth // 4)
        along = quad + 4 * (e // 2 if which == "a" else e)
        across = group + 8 * (e % 2 if which == "a" else 0 * e)
    else:
        e = np.arange(depth // 2 if which == "a" else depth // 4)
        along = 2 * quad + e % 2 + 8 * (e // 4 if which == "a" else e // 2)
        across = group + 8 * (e // 2 % 2 if which == "a" else 0 * e)
    return (across, along) if which == "a" else (along, across)


_MMA = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "f16")}
_MMA |= {("m16n8k8", "tf32"), ("m16n8k4", "tf32")}


@opcode("mma", allow="sync aligned m16n8k16 m16n8k8 m16n8k4 row col")
def mma(program, i):
    """mma: D (16, 8) = A (16, k) B (k, 8) + C, summed in float64 and rounded to float32 once."""
    shape, kinds = i.modifiers[2], i.modifiers[-4:]
    kind, depth = kinds[1], int(i.modifiers[2].split("k")[1])
    if (shape, kind) not in _MMA or kinds != ("f32", kind, kind, "f32") or i.modifiers[3:5] != ("row", "col"):
        raise PtxError(f"mma of {kinds}, {shape}")
    element = kind if kind == "tf32" else f"{kind}x2"
    d, a, b, c = (operand.elements for operand in i.operands)
    reads = [[program.source(r, k) for r in registers] for registers, k in ((a, element), (b, element), (c, "f32"))]
    places = [fragment("a", kind, depth), fragment("b", kind, depth), fragment("c", kind, depth)]
    for read, (rows, _) in zip(reads, places, strict=True):
        if len(read) != rows.shape[1] // (2 if read is not reads[2] and kind != "tf32" else 1):
            raise PtxError("wrong number of registers")
    writes = [program.sink(r, "f32") for r in d]

    def step(warp, mask):
        if not meeting(warp, mask):
            return
        matrices = []
        for read, place, size in zip(reads, places, ((16, depth), (depth, 8), (16, 8)), strict=True):
            matrix = np.zeros(size)
            matrix[place] = np.stack([r(warp) for r in read], 1).reshape(LANES, -1)
            matrices.append(matrix)
        result = (matrices[0] @ matrices[1] + matrices[2]).astype(np.float32)[places[2]]
        for n, write in enumerate(writes):
            write(warp, np.ascontiguousarray(result[:, n]), None)

    return Control(step)


@opcode("ldmatrix", allow="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def ldmatrix(program, i):
    """ldmatrix: 8 x 8 matrices of 16-bit elements; lane 8m + r has the address of row r of matrix m."""
    destination, source = i.operands
    writes, at = [program.sink(r, "b32") for r in destination.elements], address(program, source)
    if f"x{len(writes)}" not in i.modifiers:
        raise PtxError("wrong number of registers")
    row, pair = (x[:, None] for x in divmod(np.arange(LANES), 4))
    place = (row + 0 * np.arange(2), 2 * pair + np.arange(2))  # lane -> row lane / 4, columns 2 (lane % 4) and the next
    place = place[::-1] if "trans" in i.modifiers else place

    def step(warp, mask):
        if not meeting(warp, mask):
            return
        words = np.stack(load(warp, "shared", at(warp)[: 8 * len(writes)], 4, 4), 1)
        for n, write in enumerate(writes):
            matrix = np.ascontiguousarray(words[8 * n : 8 * n + 8]).view(np.uint16)  # (8, 8)
            write(warp, np.ascontiguousarray(matrix[place]).view(np.uint32)[:, 0], None)

    return Control(step)
