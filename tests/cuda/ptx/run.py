"""Execution of a kernel: blocks, clusters and warps in one Python thread.

A warp has one position per lane. It runs the lanes with the lowest position together until they branch, wait or spin.
Warps take turns in an order that the seed shuffles. If no thread can move, or all of them spin, the launch fails with a
deadlock error that lists the position of every thread.
"""

import random
from collections import Counter, defaultdict

import numpy as np

from . import collectives, transfers  # noqa: F401  registers the opcodes
from .memory import Barrier, Space
from .parse import Address, Entry, PtxError, Symbol, Vector
from .program import LANES, Program

SPIN_LIMIT = 300  # rounds in which threads only spin, before a deadlock is reported
LIMIT = 20_000_000  # limit of warp instructions in a launch


class Memory(Space):
    """Global memory; persists between launches."""

    def __init__(self):
        super().__init__("global")
        self.variables: dict[str, int] = {}  # addresses of .global and .const arrays


class Warp:
    def __init__(self, block: "Block", index: int):
        self.block, self.index = block, index
        threads = np.arange(index * LANES, (index + 1) * LANES)
        x, y, _ = block.launch.block
        self.tid = [t.astype(np.uint32) for t in (threads % x, threads // x % y, threads // (x * y))]
        self.alive = threads < block.threads
        self.registers = dict(block.launch.program.registers)
        self.local = Space("local", LANES * block.launch.local)
        self.pc = np.zeros(LANES, np.int64)
        self.current = 0  # position of the running instruction
        self.active = self.alive  # lanes that run it
        self.resting = np.zeros(LANES, bool)  # lanes that wait or yield until the next turn
        self.ticket = np.full(LANES, -1)  # phase of the barrier at which a lane waits
        self.cluster_ticket = np.full(LANES, -1)
        self.open_copies: list[list] = [[] for _ in range(LANES)]  # cp.async of the open group
        self.copies: list[list] = [[] for _ in range(LANES)]  # committed groups, oldest first

    def turn(self) -> None:
        """Execute until every lane waits, spins or has returned."""
        self.resting[:] = False
        try:
            while (ready := self.alive & ~self.resting).any():
                self._advance(ready)
        except PtxError as error:
            thread = self.index * LANES + int(np.flatnonzero(self.active)[0])
            where = f"block {self.block.index}, thread {thread} and its warp"
            raise PtxError(f"{error}\n  {where}, {self.instruction(self.current)}") from None

    def _advance(self, ready: np.ndarray) -> None:
        """Run the lanes with the lowest position up to the next branch, wait, or position of other lanes."""
        program = self.block.launch.program
        pc = start = int(self.pc[ready].min())
        self.active = active = self.alive & (self.pc == pc)
        self.resting[active] = False
        ahead = self.pc[self.alive & (self.pc > pc)]
        stop = int(ahead.min()) if len(ahead) else len(program.steps)
        mask = None if active.all() else active
        while pc < stop:
            self.current = pc
            pc += 1
            if program.control[pc - 1]:
                self.pc[active] = pc
                program.steps[pc - 1](self, mask)
                break
            program.steps[pc - 1](self, mask)
        else:
            if pc >= len(program.steps):
                raise PtxError("the kernel ends without ret")
            self.pc[active] = pc
        self.block.launch.count(pc - start)

    def instruction(self, index: int) -> str:
        instruction = self.block.launch.program.entry.instructions[index]
        return f"PTX line {instruction.line}: {instruction.text}"

    # Called by steps.

    def jump(self, mask: np.ndarray | None, target: int) -> None:
        lanes = slice(None) if mask is None else mask
        self.pc[lanes] = np.where(self.alive[lanes], target, self.pc[lanes])

    def hold(self, lanes: np.ndarray) -> None:
        """Keep lanes at their position until the next turn."""
        self.pc[lanes] = self.current
        self.resting[lanes] = True

    def pause(self, mask: np.ndarray | None) -> None:
        """Let lanes continue in the next turn."""
        self.resting[slice(None) if mask is None else mask] = True

    def leave(self, mask: np.ndarray | None) -> None:
        self.alive[slice(None) if mask is None else mask] = False
        self.block.launch.moved += 1
        self.block.cluster.left(self.block)

    def wait_at(self, barrier: Barrier, lanes: np.ndarray, threads: int, votes: int) -> np.ndarray:
        """Let new lanes arrive at a barrier; return the lanes that pass it and hold the others."""
        new = lanes & (self.ticket < 0)
        if new.any():
            self.ticket[new] = barrier.phase
            barrier.arrive(int(new.sum()), threads, votes)
            self.block.launch.moved += 1
        passing = lanes & (self.ticket < barrier.phase)
        self.ticket[passing] = -1
        self.hold(lanes & ~passing)
        return passing

    def commit_copies(self, mask: np.ndarray | None) -> None:
        for lane in range(LANES) if mask is None else np.flatnonzero(mask):
            self.copies[lane].append(self.open_copies[lane])
            self.open_copies[lane] = []

    def finish_copies(self, mask: np.ndarray | None, keep: int, everything: bool) -> None:
        """Finish all but the last ``keep`` groups (cp.async.wait_group). everything: finish the open group too."""
        due = []
        for lane in range(LANES) if mask is None else np.flatnonzero(mask):
            while len(self.copies[lane]) > keep:
                due += self.copies[lane].pop(0)
            if everything:
                due += self.open_copies[lane]
                self.open_copies[lane] = []
        if due:
            transfers.copy_now(self, due)


class Block:
    def __init__(self, launch: "Launch", cluster: "Cluster", number: int, rank: int):
        x, y, _ = launch.grid
        self.launch, self.cluster, self.number, self.rank = launch, cluster, number, rank
        self.index = (number % x, number // x % y, number // (x * y))
        self.threads = int(np.prod(launch.block))
        self.shared = Space("shared", launch.static_shared + launch.dynamic_shared)
        self.shared.owner = self
        self.barriers: defaultdict[int, Barrier] = defaultdict(Barrier)
        self.incoming: list[tuple] = []  # st.async in flight: mbarrier, address, size, values
        self.warps = [Warp(self, i) for i in range(-(-self.threads // LANES))]

    def alive(self) -> int:
        return sum(int(warp.alive.sum()) for warp in self.warps)


class Cluster:
    def __init__(self, launch: "Launch", numbers: list[int]):
        self.barrier = Barrier()
        self.blocks = [Block(launch, self, number, rank) for rank, number in enumerate(numbers)]

    def alive(self) -> int:
        return sum(block.alive() for block in self.blocks)

    def shared_of(self, rank: int, asking: Block) -> Space:
        if rank >= len(self.blocks):
            raise PtxError(f"shared memory of rank {rank} in a cluster of {len(self.blocks)} blocks")
        block = self.blocks[rank]
        if block is not asking and not block.alive():
            raise PtxError(f"shared memory of block {block.index}, which has returned")
        return block.shared

    def left(self, block: Block) -> None:
        """Account for a returned thread: the cluster's barrier no longer waits for it."""
        self.barrier.complete(self.alive())
        if not block.alive() and block.incoming:
            raise PtxError(f"block {block.index} returns while {len(block.incoming)} st.async to it are in flight")


class Launch:
    """One launch of a kernel; see :func:`launch`."""

    def __init__(self, entry: Entry, memory: Memory, grid, block, args, dynamic_shared: int, cluster):
        self.entry, self.memory, self.dynamic_shared = entry, memory, dynamic_shared
        self.grid, self.block, self.cluster = ((*sizes, 1, 1)[:3] for sizes in (grid, block, cluster))
        self.executed = self.moved = 0
        if int(np.prod(self.block)) > entry.max_threads:
            raise PtxError(f"{entry.name} was compiled for at most {entry.max_threads} threads, not {self.block}")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise PtxError(f"a grid of {self.grid} is not divisible into clusters of {self.cluster}")
        self.symbols: dict[str, int] = {}
        self.params = self._parameters(args)
        self.printed: list[str] = []
        self.static_shared, self.local = self._place_variables()
        self.program = Program(entry, self.symbols, self.local)

    def _parameters(self, args) -> Space:
        """Store one argument per parameter: a number, or the bytes of a structure."""
        if len(args) != len(self.entry.params):
            raise PtxError(f"{self.entry.name} has {len(self.entry.params)} parameters, got {len(args)} arguments")
        data = b""
        for param, value in zip(self.entry.params, args, strict=True):
            data = data.ljust(-(-len(data) // param.align) * param.align, b"\0")
            self.symbols[param.name] = len(data)
            raw = _bytes_of(value, param.size)
            if len(raw) != param.size:
                raise PtxError(f"{param.name} has {param.size} bytes, got {len(raw)}")
            data += raw
        space = Space("param", len(data))
        space.buffers[0].data[: len(data)] = np.frombuffer(data, np.uint8)
        return space

    def _place_variables(self) -> tuple[int, int]:
        """Assign addresses to the variables; return the bytes of static shared and of thread-local memory."""
        offsets, used = {"shared": 0, "local": 0}, _symbols(i.operands for i in self.entry.instructions)
        variables = [v for name, v in self.entry.variables.items() if name in used]
        for variable in sorted(variables, key=lambda v: v.size == 0):  # variables that the launch sizes come last
            if variable.space in offsets:
                offset = -(-offsets[variable.space] // variable.align) * variable.align
                self.symbols[variable.name] = offset
                offsets[variable.space] = offset + variable.size
            else:
                if variable.name not in self.memory.variables:
                    data = np.frombuffer(variable.data, np.uint8)
                    self.memory.variables[variable.name] = self.memory.put(data)
                self.symbols[variable.name] = self.memory.variables[variable.name]
        return offsets["shared"], -(-offsets["local"] // 16) * 16

    def count(self, instructions: int) -> None:
        self.executed += instructions
        if self.executed > LIMIT:
            raise PtxError(f"{self.entry.name} does not end within {LIMIT} warp instructions")

    def clusters(self) -> list[list[int]]:
        """Return the block numbers of each cluster, ordered by rank."""
        (gx, gy, _), (cx, cy, cz) = self.grid, self.cluster
        groups = defaultdict(list)
        for number in range(int(np.prod(self.grid))):
            x, y, z = number % gx, number // gx % gy, number // (gx * gy)
            rank = x % cx + cx * (y % cy + cy * (z % cz))
            groups[x // cx, y // cy, z // cz].append((rank, number))
        return [[number for _, number in sorted(group)] for group in groups.values()]

    def run(self, cooperative: bool, seed: int) -> None:
        order, groups = random.Random(seed), self.clusters()
        self.memory.forget_accesses()
        for together in [groups] if cooperative else [[group] for group in groups]:
            blocks = [block for numbers in together for block in Cluster(self, numbers).blocks]
            with np.errstate(all="ignore"):
                self._run(blocks, order)

    def _run(self, blocks: list[Block], order: random.Random) -> None:
        idle = 0
        while warps := [warp for block in blocks for warp in block.warps if warp.alive.any()]:
            executed, progress = self.executed, self._progress(blocks)
            order.shuffle(warps)
            for warp in warps:
                warp.turn()
            idle = 0 if self._progress(blocks) != progress else idle + 1
            if idle > SPIN_LIMIT:
                raise PtxError(f"deadlock in {self.entry.name} after {executed} instructions:\n{_positions(warps)}")

    def _progress(self, blocks: list[Block]) -> int:
        return self.moved + self.memory.changes + sum(block.shared.changes for block in blocks)


def launch(
    entry: Entry,
    memory: Memory,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: list,
    *,
    shared: int = 0,
    cooperative: bool = False,
    cluster: tuple[int, ...] | None = None,
    seed: int = 0,
) -> int:
    """Run a kernel to its end.

    Args:
        entry: from :func:`ptx.parse`.
        memory: global memory; ``memory.put(array)`` returns an address, ``memory.get(address)`` the array.
        grid, block, cluster: sizes in blocks, threads, blocks. cluster: default as compiled, else one block.
        args: one for each parameter: an int, a float, or bytes.
        shared: bytes of dynamic shared memory.
        cooperative: run all blocks at once; else one cluster after another.
        seed: shuffles the order in which warps take turns.

    Returns:
        Number of executed warp instructions.

    Raises:
        PtxError: an unsupported instruction, a bad access, a trap or a deadlock; with the position.
    """
    run = Launch(entry, memory, grid, block, args, shared, cluster or entry.cluster or (1,))
    run.run(cooperative, seed)
    return run.executed


def _bytes_of(value, size: int) -> bytes:
    if isinstance(value, int | np.integer):
        return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
    if isinstance(value, float):
        return np.array(value, f"f{size}").tobytes()
    return bytes(value)


def _symbols(operands) -> set[str]:
    found = set()
    for operand in operands:
        if isinstance(operand, Symbol):
            found.add(operand.name)
        elif isinstance(operand, Address):
            found |= _symbols([operand.base])
        elif isinstance(operand, Vector):
            found |= _symbols(operand.elements)
        elif isinstance(operand, list):
            found |= _symbols(operand)
    return found


def _positions(warps: list[Warp]) -> str:
    """List the positions of threads, one line per instruction."""
    places: Counter = Counter()
    for warp in warps:
        for pc in np.unique(warp.pc[warp.alive]):
            lanes = np.flatnonzero(warp.alive & (warp.pc == pc))
            places[int(pc)] += len(lanes)
            example = f"block {warp.block.index} thread {warp.index * LANES + int(lanes[0])}"
            places.setdefault((int(pc), "example"), example)
    some = warps[0]
    lines = [
        f"  {n} threads (such as {places[pc, 'example']}) at {some.instruction(pc)}"
        for pc, n in places.items()
        if isinstance(pc, int)
    ]
    return "\n".join(lines)
