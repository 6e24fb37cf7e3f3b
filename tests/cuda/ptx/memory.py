"""Memory of the simulated device; every access is checked.

Errors: an address outside every buffer, a misaligned address, and a store to an element that the launch has read
through the read-only cache (ld.global.nc). The compiler chooses that instruction, so running the C++ source cannot
reveal the last error. Shared memory starts as NaN.
"""

import bisect

import numpy as np

from .formats import BITS
from .parse import PtxError

GLOBAL = 1 << 40  # address of the first buffer
SHARED = 1 << 56  # generic address of shared memory; 24 bits of offset, above them rank + 1 of another block
LOCAL = 1 << 57  # generic address of thread-local memory
RANK_SHIFT = 24
GUARD = 1 << 16  # bytes between buffers
_ONES = 0x0101010101010101


class Buffer:
    """A range of accessible bytes."""

    def __init__(self, start: int, data: np.ndarray, size: int, dtype=np.uint8, shape=None):
        """data: uint8, a multiple of 16 bytes; only the first ``size`` are accessible."""
        self.start, self.end, self.data = start, start + size, data
        self.dtype, self.shape = np.dtype(dtype), (size,) if shape is None else shape
        self.read_only = np.zeros(len(data), bool)  # elements read through the read-only cache
        self.written = np.zeros(len(data), bool)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}, {self.end - self.start} bytes"


class Space:
    """An address space."""

    def __init__(self, name: str, size: int | None = None):
        """size: adds a buffer of NaN of this size at address 0."""
        self.name = name
        self.buffers: list[Buffer] = []  # sorted by address
        self.changes = 0  # number of stores that changed a value
        self.owner = None  # of shared memory: its block
        if size is not None:
            self.add(Buffer(0, np.full(-(-size // 16) * 16, 0xFF, np.uint8), size))

    def add(self, buffer: Buffer) -> None:
        bisect.insort(self.buffers, buffer, key=lambda b: b.start)

    def put(self, array: np.ndarray) -> int:
        """Copy an array into a new buffer; return its address."""
        array = np.ascontiguousarray(array)
        used = [b.end for b in self.buffers if GLOBAL <= b.start < SHARED]
        start = -(-(max(used, default=GLOBAL) + GUARD) // 256) * 256
        data = np.full(-(-array.nbytes // 16) * 16, 0xFF, np.uint8)
        data[: array.nbytes] = array.reshape(-1).view(np.uint8)
        self.add(Buffer(start, data, array.nbytes, array.dtype, array.shape))
        return start

    def get(self, address: int) -> np.ndarray:
        """Return a copy of the array at an address of put()."""
        buffer = next(b for b in self.buffers if b.start == address)
        return buffer.data[: buffer.end - buffer.start].view(buffer.dtype).reshape(buffer.shape).copy()

    def text(self, address: int) -> str:
        """Return the C string at an address."""
        buffer, _, _ = self._places(np.array([address], np.uint64), 1, "load")[0]
        return buffer.data[address - buffer.start : buffer.end - buffer.start].tobytes().split(b"\0")[0].decode()

    def forget_accesses(self) -> None:
        for buffer in self.buffers:
            buffer.read_only[:] = buffer.written[:] = False

    def load(self, addresses: np.ndarray, size: int, count: int = 1, read_only: bool = False) -> list[np.ndarray]:
        """Load ``count`` consecutive elements of ``size`` bytes at each address."""
        places, values = self._places(addresses, size * count, "load"), [[] for _ in range(count)]
        for buffer, _, first in places:
            elements = buffer.data.view(BITS[size])
            for i, value in enumerate(values):
                at = first // size + i
                value.append(elements[at])
                if read_only:
                    self._mark_read_only(buffer, at, size)
        if len(places) == 1:
            return [value[0] for value in values]
        order = np.argsort(np.concatenate([lanes for _, lanes, _ in places]))
        return [np.concatenate(value)[order] for value in values]

    def store(self, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
        for buffer, lanes, first in self._places(addresses, size * len(values), "store"):
            first = first // size
            elements, written, marks = (a.view(BITS[size]) for a in (buffer.data, buffer.written, buffer.read_only))
            for i, value in enumerate(values):
                if marks[first + i].any():
                    raise PtxError(f"{self.name} memory is written after it was read through the read-only cache")
                if (elements[first + i] != value[lanes]).any():
                    self.changes += 1
                written[first + i] = _ONES & (1 << 8 * size) - 1
                elements[first + i] = value[lanes]

    def _mark_read_only(self, buffer: Buffer, elements: np.ndarray, size: int) -> None:
        if buffer.written.view(BITS[size])[elements].any():
            raise PtxError(f"{self.name} memory is read through the read-only cache after it was written")
        buffer.read_only.view(BITS[size])[elements] = _ONES & (1 << 8 * size) - 1

    def _places(self, addresses: np.ndarray, size: int, what: str) -> list[tuple]:
        """Return (buffer, indices of addresses, bytes from its start) for all addresses."""
        if (addresses % np.uint64(size)).any():
            bad = int(addresses[np.flatnonzero(addresses % np.uint64(size))[0]])
            raise PtxError(f"misaligned: {self.name} {what} of {size} bytes at {bad:#x}")
        buffer = self._buffer(int(addresses.min()), size, what)
        if int(addresses.max()) + size <= buffer.end:
            return [(buffer, slice(None), (addresses - np.uint64(buffer.start)).astype(np.int64))]
        places = []
        owners = [self._buffer(int(a), size, what) for a in addresses]
        for buffer in dict.fromkeys(owners):
            lanes = np.array([n for n, owner in enumerate(owners) if owner is buffer])
            places.append((buffer, lanes, (addresses[lanes] - np.uint64(buffer.start)).astype(np.int64)))
        return places

    def _buffer(self, address: int, size: int, what: str) -> Buffer:
        at = bisect.bisect_right(self.buffers, address, key=lambda b: b.start) - 1
        if at >= 0 and address + size <= self.buffers[at].end:
            return self.buffers[at]
        text = f"out of bounds: {self.name} {what} of {size} bytes at {address:#x}"
        if not self.buffers:
            raise PtxError(f"{text}; there is no buffer")
        nearest = min(self.buffers, key=lambda b: min(abs(address - b.start), abs(address - b.end)))
        raise PtxError(f"{text}, byte {address - nearest.start} of the nearest buffer: {nearest}")


class Barrier:
    """A thread barrier with phases; a lane remembers the phase in which it arrived."""

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


# Fields of an mbarrier: name -> (first bit, bits).
_FIELDS = {"pending": (0, 20), "expected": (20, 20), "bytes": (40, 21), "phase": (61, 1), "mark": (62, 2)}


class MBarrier:
    """An mbarrier, stored in its 64 bits of shared memory.

    pending: missing arrivals. expected: arrivals of the next phase. bytes: expected by expect_tx and missing, signed.
    phase: parity. mark: 1, which distinguishes an initialised mbarrier from zeros and from NaN.
    """

    def __init__(self, space: Space, address: int):
        self.space, self.address = space, np.array([address], np.uint64)
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
        """Add to the expected bytes: expect_tx positive, complete_tx negative."""
        self.bytes += size
        if abs(self.bytes) >= 1 << 20:
            raise PtxError("an mbarrier counts fewer than 2^20 bytes")
        self.save()

    def save(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.expected
        word = sum((getattr(self, n) & (1 << width) - 1) << shift for n, (shift, width) in _FIELDS.items())
        self.space.store(self.address, 8, [np.array([word], np.uint64)])
