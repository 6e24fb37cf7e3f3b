"""Memory of the pretended device: global, shared and parameter space, every access checked.

An address outside every buffer and an address that is no multiple of the access are errors. Shared memory starts as
NaN. What was read through the read-only cache (ld.global.nc) must not change during a launch: that is an error too,
and one that no run of the C++ source can show, since the compiler chooses that instruction.
"""

import numpy as np

from .formats import BITS
from .parse import PtxError

GLOBAL = 1 << 40  # address of the first buffer
SHARED = 1 << 56  # generic address of shared memory; below it, 8 bits of rank + 1 and 24 bits of offset
RANK_SHIFT = 24
GUARD = 1 << 16  # bytes between buffers


class Space:
    """A range of addresses."""

    def __init__(self, name: str, base: int = 0, size: int = 0):
        self.name, self.base = name, base
        room = -(-size // 16) * 16
        self.bytes = np.full(room, 0xFF, np.uint8)
        self.valid = np.arange(room) < size
        self.read_only = np.zeros(room, bool)  # was read through the read-only cache
        self.written = np.zeros(room, bool)
        self.changes = 0  # number of stores that changed something
        self.owner = None  # the block, of shared memory
        self.arrays: dict[int, tuple[np.dtype, tuple]] = {}

    def put(self, array: np.ndarray, align: int = 256) -> int:
        """Copy an array into a buffer of its own; returns its address."""
        array = np.ascontiguousarray(array)
        start = -(-(len(self.bytes) + GUARD) // align) * align
        size = -(-(start + array.nbytes + GUARD) // 256) * 256
        for name, fill in (("bytes", 0xFF), ("valid", False), ("read_only", False), ("written", False)):
            old = getattr(self, name)
            setattr(self, name, np.concatenate((old, np.full(size - len(old), fill, old.dtype))))
        self.bytes[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.valid[start : start + array.nbytes] = True
        self.arrays[self.base + start] = array.dtype, array.shape
        return self.base + start

    def get(self, address: int) -> np.ndarray:
        """A copy of the array that was put at an address."""
        dtype, shape = self.arrays[address]
        start, count = address - self.base, int(np.prod(shape, dtype=np.int64))
        return self.bytes[start : start + count * dtype.itemsize].view(dtype).reshape(shape).copy()

    def forget_accesses(self) -> None:
        self.read_only[:] = self.written[:] = False

    def load(self, addresses: np.ndarray, size: int, count: int = 1, read_only: bool = False) -> list[np.ndarray]:
        """``count`` consecutive elements of ``size`` bytes at each address."""
        first = self._check(addresses, size * count, "load") // size
        elements, written, marks = (a.view(BITS[size]) for a in (self.bytes, self.written, self.read_only))
        if read_only:
            for i in range(count):
                if written[first + i].any():
                    raise PtxError(f"{self.name} memory is read through the read-only cache after it was written")
                marks[first + i] = BITS[size](0x0101010101010101 & (1 << 8 * size) - 1)
        return [elements[first + i] for i in range(count)]

    def store(self, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
        first = self._check(addresses, size * len(values), "store") // size
        elements, written, marks = (a.view(BITS[size]) for a in (self.bytes, self.written, self.read_only))
        for i, value in enumerate(values):
            if marks[first + i].any():
                raise PtxError(f"{self.name} memory is written after it was read through the read-only cache")
            if (elements[first + i] != value).any():
                self.changes += 1
            written[first + i] = BITS[size](0x0101010101010101 & (1 << 8 * size) - 1)
            elements[first + i] = value

    def _check(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        at = addresses.astype(np.int64) - self.base
        if (at % size).any():
            lane = int(np.flatnonzero(at % size)[0])
            raise PtxError(f"misaligned: {self.name} {what} of {size} bytes at {int(addresses[lane]):#x}")
        inside = (at >= 0) & (at + size <= len(self.bytes))
        if not inside.all() or not (self.valid[at] & self.valid[at + size - 1]).all():
            bad = ~inside
            bad[inside] = ~(self.valid[at[inside]] & self.valid[at[inside] + size - 1])
            raise PtxError(self._outside(int(addresses[np.flatnonzero(bad)[0]]), size, what))
        return at

    def _outside(self, address: int, size: int, what: str) -> str:
        text = f"out of bounds: {self.name} {what} of {size} bytes at {address:#x}"
        if not self.arrays:
            return f"{text}; there are {len(self.bytes)} bytes"
        ends = {
            start: start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for start, (dtype, shape) in self.arrays.items()
        }
        start = min(ends, key=lambda s: min(abs(address - s), abs(address - ends[s])))
        dtype, shape = self.arrays[start]
        return (
            f"{text}, byte {address - start} of the nearest buffer: {dtype}{list(shape)}, {ends[start] - start} bytes"
        )


class Barrier:
    """A barrier of threads with phases: a lane keeps the phase in which it arrived."""

    def __init__(self):
        self.phase = self.arrived = self.votes = self.result = 0

    def arrive(self, lanes: int, expected: int, votes: int = 0) -> None:
        self.arrived += lanes
        self.votes += votes
        if self.arrived > expected:
            raise PtxError(f"{self.arrived} threads arrived at a barrier of {expected}")
        self.complete(expected)

    def complete(self, expected: int) -> None:
        if self.arrived == expected:
            self.phase, self.arrived, self.votes, self.result = self.phase + 1, 0, 0, self.votes


# Of an mbarrier object: name -> (first bit, bits).
_FIELDS = {"pending": (0, 20), "expected": (20, 20), "bytes": (40, 21), "phase": (61, 1), "mark": (62, 2)}


class MBarrier:
    """An mbarrier object, kept in the 64 bits of shared memory where the kernel put it.

    ``pending``: arrivals still to come; ``expected``: arrivals of the next phase; ``bytes``: announced by expect_tx and
    not yet here, signed; ``phase``: its parity; ``mark``: 1, which neither zeros nor the poison of shared memory have.
    """

    def __init__(self, space: Space, address: int):
        self.space, self.address = space, np.array([address])
        word = int(space.load(self.address, 8)[0][0])
        for name, (shift, width) in _FIELDS.items():
            setattr(self, name, word >> shift & (1 << width) - 1)
        self.bytes -= (self.bytes >> 20) << 21

    @classmethod
    def init(cls, space: Space, address: int, count: int) -> None:
        barrier = cls(space, address)
        barrier.pending = barrier.expected = count
        barrier.bytes, barrier.phase, barrier.mark = 0, 0, 1
        barrier.save()

    def check(self) -> "MBarrier":
        if self.mark != 1:
            raise PtxError(f"no mbarrier was initialised at shared address {int(self.address[0]):#x}")
        return self

    def arrive(self, count: int = 1) -> None:
        if count > self.pending:
            raise PtxError(f"{count} arrivals at an mbarrier that waits for {self.pending}")
        self.pending -= count
        self.save()

    def transact(self, size: int) -> None:
        """expect_tx: plus; complete_tx: minus."""
        self.bytes += size
        if abs(self.bytes) >= 1 << 20:
            raise PtxError("an mbarrier counts fewer than 2^20 bytes")
        self.save()

    def save(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.expected
        word = sum((getattr(self, n) & (1 << width) - 1) << shift for n, (shift, width) in _FIELDS.items())
        self.space.store(self.address, 8, [np.array([word], np.uint64)])
