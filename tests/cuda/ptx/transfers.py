"""Memory instructions: loads, stores, atomics, asynchronous copies, mbarriers, addresses of other blocks.

Asynchronous operations take effect as late as allowed, so that a kernel without the wait reads the old value: cp.async
at the wait for its group, st.async when a thread tests the mbarrier. Memory is sequentially consistent; the order of
weak accesses is not modelled.
"""

import numpy as np

from .arithmetic import kind_of, pure
from .formats import BITS, SIZES, decode, encode
from .memory import LOCAL, RANK_SHIFT, SHARED, MBarrier
from .parse import Address, PtxError, Symbol, Vector
from .program import LANES, Control, opcode

_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "const", "local", "param", "param::entry")
_ORDER = "weak relaxed acquire release acq_rel volatile cta cluster gpu sys"
_CACHE = "nc ca cg cs cv lu wb wt L1::* L2::*"
ALLOW = f"{' '.join(_SPACES)} {_ORDER} {_CACHE} v2 v4 v8"
_SPIN = {"acquire", "relaxed", "volatile"}  # loads of polling loops


def space_of(program, instruction, operand=None) -> str:
    """Return the instruction's address space; parameters of a call are local."""
    if isinstance(operand, Address) and program.is_local(operand.base):
        return "local"
    return next((m for m in instruction.modifiers if m in _SPACES), "generic")


def address(program, operand, kind: str = "u64"):
    """Return a function of the warp: addresses (lanes,) uint64 of ``[base + offset]`` or of a plain register."""
    base, offset = (operand.base, operand.offset) if isinstance(operand, Address) else (operand, 0)
    if base is None:
        return lambda warp: np.full(LANES, offset, np.uint64)
    size = 8
    if not isinstance(base, Symbol):
        size = program.registers[base.name].dtype.itemsize if base.name in program.registers else 8
    read, shift = program.source(base, f"u{8 * size}"), np.uint64(offset % (1 << 64))
    return lambda warp: read(warp).astype(np.uint64) + shift


def locate(warp, space: str, addresses: np.ndarray):
    """Sort addresses by memory: a list of (memory, positions in ``addresses`` or None for all, local addresses)."""
    launch, block = warp.block.launch, warp.block
    if space in ("global", "const"):
        return [(launch.memory, None, addresses)]
    if space.startswith("param"):
        return [(launch.params, None, addresses)]
    if space == "local":
        return [(warp.local, None, addresses)]
    if space == "generic":
        shared = addresses >= SHARED
        if not shared.any():
            return [(launch.memory, None, addresses)]
        if not shared.all():
            raise PtxError("one instruction accesses global and shared memory: not supported by tests/cuda/ptx")
        addresses = addresses - np.uint64(SHARED)
        space = "shared::cluster"
    ranks = (addresses >> np.uint64(RANK_SHIFT)).astype(np.int64) - 1  # -1: the block itself
    local = addresses & np.uint64((1 << RANK_SHIFT) - 1)
    if space != "shared::cluster" and not np.isin(ranks, (-1, block.rank)).all():
        raise PtxError(f"{space} access to another block's shared memory")
    if (ranks == -1).all():
        return [(block.shared, None, local)]
    found = []
    for rank in np.unique(ranks):
        at = np.flatnonzero(ranks == rank)
        found.append((block.cluster.shared_of(rank, block), at, local[at]))
    return found


def load(warp, space: str, addresses: np.ndarray, size: int, count: int = 1, read_only: bool = False):
    """Load ``count`` consecutive elements of ``size`` bytes per address; returns ``count`` arrays."""
    places = locate(warp, space, addresses)
    if places[0][1] is None:
        return places[0][0].load(places[0][2], size, count, read_only)
    values = [np.empty(len(addresses), BITS[size]) for _ in range(count)]
    for memory, at, local in places:
        for value, found in zip(values, memory.load(local, size, count, read_only), strict=True):
            value[at] = found
    return values


def store(warp, space: str, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
    for memory, at, local in locate(warp, space, addresses):
        memory.store(local, size, values if at is None else [value[at] for value in values])


def _chosen(value: np.ndarray, mask) -> np.ndarray:
    return value if mask is None else value[mask]


def _spread(bits: np.ndarray, mask) -> np.ndarray:
    if mask is None:
        return bits
    full = np.zeros(LANES, bits.dtype)
    full[mask] = bits
    return full


@opcode("ld", allow=ALLOW)
def ld(program, i):
    destination, source = i.operands
    kind, space, size = kind_of(i), space_of(program, i, source), SIZES[kind_of(i)]
    at, read_only = address(program, source), "nc" in i.modifiers
    outputs = destination.elements if isinstance(destination, Vector) else (destination,)
    writes = [program.sink(o, kind) for o in outputs]

    def step(warp, mask):
        found = load(warp, space, _chosen(at(warp), mask), size, len(writes), read_only)
        for write, bits in zip(writes, found, strict=True):
            write(warp, decode(_spread(bits, mask), kind), mask)

    def spin(warp, mask):
        step(warp, mask)
        warp.pause(mask)

    return Control(spin) if _SPIN & set(i.modifiers) else step


@opcode("st", allow=f"{ALLOW} async mbarrier::complete_tx::bytes")
def st(program, i):
    if i.modifiers[0] == "async":
        return _st_async(program, i)
    target, source = i.operands
    kind, space, size = kind_of(i), space_of(program, i, target), SIZES[kind_of(i)]
    at, read = address(program, target), _elements(program, source, kind)

    def step(warp, mask):
        values = [_chosen(encode(r(warp), kind), mask) for r in read]
        store(warp, space, _chosen(at(warp), mask), size, values)

    return step


def _elements(program, source, kind: str) -> list:
    """Return a reader per element of the source, scalar or vector; narrow types read the low bytes of a register."""
    return [program.source(s, kind) for s in (source.elements if isinstance(source, Vector) else (source,))]


_ATOMIC = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": lambda old, b: np.where(old >= b, 0, old + 1).astype(old.dtype),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype),
    "cas": lambda old, b, c: np.where(old == b, c, old),
}


@opcode("atom", "red", allow=f"{ALLOW} noftz {' '.join(_ATOMIC)}")
def atomic(program, i):
    """atom, red: lanes act one after another."""
    kind, space, size = kind_of(i), space_of(program, i), SIZES[kind_of(i)]
    change = _ATOMIC[next(m for m in i.modifiers if m in _ATOMIC)]
    operands = i.operands if i.name == "atom" else [None, *i.operands]
    destination, target, *sources = operands
    at, reads = address(program, target), [program.source(s, kind) for s in sources]
    write = program.sink(destination, kind) if i.name == "atom" else None

    def step(warp, mask):
        addresses, values = at(warp), [r(warp) for r in reads]
        before = np.zeros(LANES, BITS[size])
        for lane in range(LANES) if mask is None else np.flatnonzero(mask):
            (bits,) = load(warp, space, addresses[lane : lane + 1], size)
            before[lane] = bits[0]
            after = change(decode(bits, kind), *[v[lane : lane + 1] for v in values])
            store(warp, space, addresses[lane : lane + 1], size, [encode(after, kind)])
        if write:
            write(warp, decode(before, kind), mask)
            warp.pause(mask)

    return Control(step) if write else step


@opcode("cp", allow="async cg ca shared shared::cta global commit_group wait_group wait_all L2::*")
def cp_async(program, i):
    if "wait_all" in i.modifiers or "wait_group" in i.modifiers:
        keep = int(i.operands[0].text, 0) if i.operands else 0
        everything = "wait_all" in i.modifiers
        return lambda warp, mask: warp.finish_copies(mask, keep, everything)
    if "commit_group" in i.modifiers:
        return lambda warp, mask: warp.commit_copies(mask)
    target, source, size, *rest = i.operands
    to, origin, size = address(program, target), address(program, source), int(size.text, 0)
    if size not in (4, 8, 16) or ("cg" in i.modifiers and size != 16):
        raise PtxError(f"cp.async of {size} bytes")
    # Fills the rest of the destination with zeros.
    valid = program.source(rest[0], "u32") if rest else lambda warp: np.full(LANES, size, np.uint32)

    def step(warp, mask):
        lanes = np.arange(LANES) if mask is None else np.flatnonzero(mask)
        where = np.stack((to(warp), origin(warp), valid(warp).astype(np.uint64)), -1)
        if (where[lanes, :2] % size).any():
            raise PtxError(f"misaligned: cp.async of {size} bytes")
        for lane in lanes:
            warp.open_copies[lane].append((*where[lane].tolist(), size))

    return step


def copy_now(warp, copies: list[tuple[int, int, int, int]]) -> None:
    """Execute copies (shared address, global address, valid bytes, bytes) of a warp, in order."""
    for size in {copy[3] for copy in copies}:
        to, origin, valid = np.array([c[:3] for c in copies if c[3] == size], np.uint64).T
        words = np.zeros((len(to), size), np.uint8)
        for count in np.unique(valid):
            some = valid == count
            for byte in range(int(count)):
                words[some, byte] = load(warp, "global", origin[some] + np.uint64(byte), 1)[0]
        store(warp, "shared", to, 4, list(np.ascontiguousarray(words.view(np.uint32).T)))


@opcode("cvta", allow="to global shared shared::cta shared::cluster const local param")
def cvta(program, i):
    """cvta: generic addresses of global memory are unchanged; shared memory begins at SHARED."""
    space = space_of(program, i)
    if space.startswith("param"):
        raise PtxError("the address of a parameter")
    window = {"local": LOCAL, "global": 0, "const": 0}.get(space, SHARED)
    step = np.uint64((-window if "to" in i.modifiers else window) % (1 << 64))
    return pure(program, i, lambda a: a + step, "u64")


@opcode("mapa", allow="shared::cluster")
def mapa(program, i):
    """mapa: the address of the same variable in the block of another rank."""
    kind = kind_of(i)
    generic = "shared::cluster" not in i.modifiers
    base = SHARED if generic else 0

    def compute(a, rank):
        offset = (a.astype(np.uint64) - np.uint64(base)) & np.uint64((1 << RANK_SHIFT) - 1)
        return (np.uint64(base) + ((rank.astype(np.uint64) + np.uint64(1)) << np.uint64(RANK_SHIFT))) + offset

    return pure(program, i, compute, kind, [kind, "u32"])


@opcode("getctarank", allow="shared::cluster")
def getctarank(program, i):
    kind, base = kind_of(i), 0 if "shared::cluster" in i.modifiers else SHARED
    read, write = program.source(i.operands[1], kind), program.sink(i.operands[0], "u32")

    def step(warp, mask):
        rank = (read(warp).astype(np.uint64) - np.uint64(base)) >> np.uint64(RANK_SHIFT)
        write(warp, np.where(rank == 0, warp.block.rank, rank - np.uint64(1)).astype(np.uint32), mask)

    return step


def _st_async(program, i):
    kind, size = kind_of(i), SIZES[kind_of(i)]
    target, source, barrier = i.operands
    at, read, bar = address(program, target), _elements(program, source, kind), address(program, barrier)

    def step(warp, mask):
        values = [encode(r(warp), kind) for r in read]
        places = locate(warp, "shared::cluster", _chosen(at(warp), mask))
        barriers = locate(warp, "shared::cluster", _chosen(bar(warp), mask))
        lanes = np.arange(LANES) if mask is None else np.flatnonzero(mask)
        for (memory, lanes_at, local), (same, _, mbarriers) in zip(places, barriers, strict=True):
            if memory is not same:
                raise PtxError("st.async: mbarrier and data are in different blocks")
            for where in np.unique(mbarriers):
                MBarrier(memory, int(where)).check()
            for n, lane in enumerate(lanes if lanes_at is None else lanes[lanes_at]):
                memory.owner.incoming.append((int(mbarriers[n]), int(local[n]), size, [v[lane] for v in values]))
        warp.block.launch.moved += 1

    return step


def deliver(block, mbarrier: int) -> None:
    """Deliver the st.async in flight to an mbarrier."""
    due = [store for store in block.incoming if store[0] == mbarrier]
    block.incoming = [store for store in block.incoming if store[0] != mbarrier]
    for _, local, size, values in due:
        block.shared.store(np.array([local], np.uint64), size, [np.array([v]) for v in values])
        MBarrier(block.shared, mbarrier).check().transact(-size * len(values))


@opcode(
    "mbarrier",
    allow=f"init inval arrive expect_tx complete_tx test_wait try_wait parity {_ORDER} {' '.join(_SPACES)}",
)
def mbarrier(program, i):
    """mbarrier.*: the object is in shared memory (memory.MBarrier); lanes act one after another."""
    action = i.modifiers[0]
    if action in ("test_wait", "try_wait"):
        return _mbarrier_wait(program, i)
    result, target, *sources = i.operands if action == "arrive" else [None, *i.operands]
    at, write = address(program, target), program.sink(result, "b64") if result is not None else None
    values = [program.source(s, "u32") for s in sources]
    space = "generic" if space_of(program, i) == "generic" else "shared::cluster"

    def act(memory, where: int, value: int | None) -> int:
        if action == "init":
            MBarrier.init(memory, where, value)
            return 0
        barrier = MBarrier(memory, where).check()
        phase = barrier.phase
        if action == "inval":
            memory.store(np.array([where], np.uint64), 8, [np.array([2**64 - 1], np.uint64)])
        if "expect_tx" in i.modifiers or action == "complete_tx":
            barrier.transact(-value if action == "complete_tx" else value)
        if action == "arrive":
            barrier.arrive(1 if value is None or "expect_tx" in i.modifiers else value)
        return phase

    def step(warp, mask):
        addresses, numbers = at(warp), [v(warp) for v in values]
        phases = np.zeros(LANES, np.uint64)
        for lane in range(LANES) if mask is None else np.flatnonzero(mask):
            ((memory, _, local),) = locate(warp, space, addresses[lane : lane + 1])
            phases[lane] = act(memory, int(local[0]), int(numbers[0][lane]) if numbers else None)
        if write:
            write(warp, phases, mask)

    return step


def _mbarrier_wait(program, i):
    """mbarrier.test_wait, try_wait: true if the phase of a parity or token is complete. A polling lane yields."""
    done, target, token = i.operands[:3]
    at, write = address(program, target), program.sink(done, "pred")
    read = program.source(token, "u32" if "parity" in i.modifiers else "u64")
    space = "generic" if space_of(program, i) == "generic" else "shared"

    def step(warp, mask):
        addresses, tokens, complete = at(warp), read(warp), np.zeros(LANES, bool)
        for one in np.unique(_chosen(addresses, mask)):
            ((memory, _, local),) = locate(warp, space, np.array([one]))
            MBarrier(memory, int(local[0])).check()
            deliver(memory.owner, int(local[0]))
            phase = MBarrier(memory, int(local[0])).phase
            complete = np.where(addresses == one, phase != tokens & tokens.dtype.type(1), complete)
        write(warp, complete, mask)
        warp.pause(mask)

    return Control(step)


@opcode("fence", "membar", allow=f"{_ORDER} sc gl mbarrier_init proxy async async::* alias global shared shared::cta")
def fence(program, i):
    """fence, membar: no effect, because memory is sequentially consistent."""
    return lambda warp, mask: None


@opcode("prefetch", "prefetchu", allow="global L1 L2")
def prefetch(program, i):
    return lambda warp, mask: None
