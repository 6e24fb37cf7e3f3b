"""Translation of instructions to steps, Python functions of a warp and its executing lanes.

A step is ``step(warp, mask)``; mask None means all 32 lanes. ``@opcode`` registers a builder: a function of the program
and an instruction that returns a step. An opcode or modifier without a builder is an error, even if never executed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import formats
from .formats import BITS, SIZES, decode, encode, widen
from .parse import SINK, Entry, Immediate, Instruction, Not, PtxError, Register, Symbol, Vector

LANES = 32


class Control(NamedTuple):
    """A step that may branch or block lanes. After it the warp selects the next lanes to run."""

    step: Callable


_OPCODES: dict[str, tuple[Callable, frozenset]] = {}


def opcode(*names: str, allow: str = ""):
    """Register a builder. allow: supported modifiers, besides types; ``L1::*`` stands for every suffix."""

    def register(build):
        for name in names:
            _OPCODES[name] = build, frozenset(allow.split())
        return build

    return register


SPECIAL: dict[str, Callable] = {
    "laneid": lambda warp: np.arange(LANES, dtype=np.uint32),
    "warpid": lambda warp: _u32(warp.index),
    "smid": lambda warp: _u32(warp.block.number),
    "lanemask_eq": lambda warp: np.uint32(1) << np.arange(LANES, dtype=np.uint32),
    "lanemask_lt": lambda warp: (np.uint32(1) << np.arange(LANES, dtype=np.uint32)) - np.uint32(1),
    "clock": lambda warp: _u32(warp.block.launch.executed),
    "clock64": lambda warp: np.full(LANES, warp.block.launch.executed, np.uint64),
    "globaltimer": lambda warp: np.full(LANES, warp.block.launch.executed, np.uint64),
    "globaltimer_lo": lambda warp: _u32(warp.block.launch.executed),
    "cluster_ctarank": lambda warp: _u32(warp.block.rank),
    "cluster_nctarank": lambda warp: _u32(len(warp.block.cluster.blocks)),
    "dynamic_smem_size": lambda warp: _u32(warp.block.launch.dynamic_shared),
}
for _i, _axis in enumerate("xyz"):
    SPECIAL[f"tid.{_axis}"] = lambda warp, i=_i: warp.tid[i]
    SPECIAL[f"ntid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.launch.block[i])
    SPECIAL[f"ctaid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.index[i])
    SPECIAL[f"nctaid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.launch.grid[i])
    SPECIAL[f"cluster_ctaid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.index[i] % warp.block.launch.cluster[i])
    SPECIAL[f"cluster_nctaid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.launch.cluster[i])
    SPECIAL[f"clusterid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.index[i] // warp.block.launch.cluster[i])
    SPECIAL[f"nclusterid.{_axis}"] = lambda warp, i=_i: _u32(warp.block.launch.grid[i] // warp.block.launch.cluster[i])


def _u32(value: int) -> np.ndarray:
    return np.full(LANES, value % (1 << 32), np.uint32)


class Program:
    """A kernel ready to run.

    Args:
        entry: the parsed kernel.
        symbols: addresses of its variables and parameters.
        local: bytes of thread-local memory.
    """

    def __init__(self, entry: Entry, symbols: dict[str, int], local: int):
        self.entry, self.symbols, self.local = entry, symbols, local
        poison = {size: np.full(LANES, -1, f"i{size}").view(dtype) for size, dtype in BITS.items()}
        self.registers = {
            name: np.zeros(LANES, bool) if kind == "pred" else poison[SIZES[kind]]
            for name, kind in entry.registers.items()
        }
        steps = [self._translate(instruction) for instruction in entry.instructions]
        self.control = [isinstance(step, Control) for step in steps]
        self.steps = [step.step if isinstance(step, Control) else step for step in steps]

    def _translate(self, instruction: Instruction):
        build, allowed = _OPCODES.get(instruction.name, (None, frozenset()))
        where = f"PTX line {instruction.line}: {instruction.text}"
        if build is None:
            raise PtxError(f"{where}: the opcode {instruction.name!r} is not supported by tests/cuda/ptx")
        for modifier in instruction.modifiers:
            prefix = modifier.split("::")[0] + "::*"
            if modifier not in SIZES and modifier not in allowed and prefix not in allowed:
                raise PtxError(f"{where}: .{modifier} of {instruction.name!r} is not supported by tests/cuda/ptx")
        try:
            step = build(self, instruction)
        except (PtxError, IndexError, ValueError, TypeError, KeyError) as error:
            raise PtxError(f"{where}: not supported by tests/cuda/ptx ({type(error).__name__}: {error})") from error
        if instruction.guard is None:
            return step
        guard = self.source(instruction.guard, "pred")
        return Control(_guarded(step.step, guard)) if isinstance(step, Control) else _guarded(step, guard)

    def is_local(self, symbol) -> bool:
        """True if the symbol is a thread-local variable."""
        variable = self.entry.variables.get(symbol.name) if isinstance(symbol, Symbol) else None
        return variable is not None and variable.space == "local"

    def label(self, operand: Symbol) -> int:
        return self.entry.labels[operand.name]

    def source(self, operand, kind: str) -> Callable:
        """Return a function of the warp that reads an operand as ``kind``."""
        if isinstance(operand, Not):
            inner = self.source(operand.predicate, kind)
            return lambda warp: ~inner(warp)
        if isinstance(operand, Immediate):
            number = _immediate(operand.text, kind)
            constant = np.broadcast_to(number, (LANES, *number.shape[1:]))
            return lambda warp: constant
        if isinstance(operand, Symbol):
            address = np.full(LANES, self.symbols[operand.name], BITS[SIZES[kind]])
            if self.is_local(operand):
                address = address + np.arange(LANES, dtype=address.dtype) * address.dtype.type(self.local)
            return lambda warp: address
        if isinstance(operand, Vector):
            return self._packed(operand, kind)
        name = operand.name
        if name in self.registers:
            return lambda warp: decode(warp.registers[name], kind)
        if name.removeprefix("%") not in SPECIAL:
            raise PtxError(f"the register {name} is not supported")
        special = SPECIAL[name.removeprefix("%")]
        return lambda warp: decode(special(warp), kind)

    def _packed(self, vector: Vector, kind: str) -> Callable:
        """Return a reader of ``{a, b}`` as one number; a is the low part."""
        size = SIZES[kind] // len(vector.elements)
        parts = [self.source(element, f"b{8 * size}") for element in vector.elements]
        unsigned = BITS[SIZES[kind]]

        def read(warp):
            bits = np.zeros(LANES, unsigned)
            for i, part in enumerate(parts):
                bits = bits | (part(warp).astype(unsigned) << unsigned(8 * size * i))
            return decode(bits, kind)

        return read

    def sink(self, operand, kind: str) -> Callable:
        """Return a function of warp, value and mask that writes a result of ``kind``."""
        if operand == SINK:
            return lambda warp, value, mask: None
        if isinstance(operand, Vector):
            return self._unpacked(operand, kind)
        if not isinstance(operand, Register) or operand.name not in self.registers:
            raise PtxError(f"{operand} is not a writable register")
        name, size = operand.name, self.registers[operand.name].dtype.itemsize

        def write(warp, value, mask):
            bits = encode(value, kind)
            if kind != "pred":
                bits = widen(bits, kind, size)
            warp.registers[name] = bits if mask is None else np.where(mask, bits, warp.registers[name])

        return write

    def _unpacked(self, vector: Vector, kind: str) -> Callable:
        size = SIZES[kind] // len(vector.elements)
        parts = [self.sink(element, f"b{8 * size}") for element in vector.elements]

        def write(warp, value, mask):
            bits = encode(value, kind)
            for i, part in enumerate(parts):
                part(warp, (bits >> bits.dtype.type(8 * size * i)).astype(BITS[size]), mask)

        return write


def _guarded(step: Callable, guard: Callable) -> Callable:
    def guarded(warp, mask):
        lanes = guard(warp) if mask is None else guard(warp) & mask
        if lanes.all():
            step(warp, None)
        elif lanes.any():
            step(warp, lanes)

    return guarded


def _immediate(text: str, kind: str) -> np.ndarray:
    if kind == "pred":
        return np.array(bool(int(text, 0)))
    if text[:2] in ("0f", "0F"):
        bits = np.array([int(text[2:], 16)], np.uint32)
        return decode(bits, kind) if SIZES[kind] == 4 else bits.view(np.float32).astype(formats.numpy_type(kind))
    if text[:2] in ("0d", "0D"):
        number = np.array([int(text[2:], 16)], np.uint64).view(np.float64)
        return decode(number.view(np.uint64), kind) if SIZES[kind] == 8 else number.astype(formats.numpy_type(kind))
    if "." in text:
        return np.array([float(text)]).astype(formats.numpy_type(kind))
    number = int(text.rstrip("U"), 0) % (1 << 8 * SIZES[kind])
    return decode(np.array([number], BITS[SIZES[kind]]), kind)
