"""Register-to-register instructions: arithmetic, comparisons, conversions, bits.

Results are rounded to nearest, with two exceptions. fma computes in a wider format: one result in 2^29 may be off by
one ulp. ``.approx`` functions are exact, although hardware may be off by two ulp. Only tanh.approx is limited to the
11 bits of the PTX ISA, so that a kernel that needs more fails.
"""

import dataclasses
import operator

import numpy as np

from .formats import FLOATS, SIZES, flush, is_signed, numpy_type, to_bf16, to_tf32
from .parse import Pair, PtxError, Vector
from .program import opcode


def kind_of(instruction) -> str:
    """Return the type of an instruction: its last modifier."""
    return instruction.modifiers[-1]


def pure(program, instruction, compute, kind: str | None = None, sources=None, result: str | None = None):
    """Return a step that writes ``compute(*sources)``. sources: their types; default: ``kind``, the last modifier."""
    kind = kind or kind_of(instruction)
    destination, *operands = instruction.operands
    read = [program.source(o, k) for o, k in zip(operands, sources or [kind] * len(operands), strict=True)]
    result = result or kind
    write = program.sink(destination, result)
    if "ftz" in instruction.modifiers and "f32" in (kind, result):
        compute = _flushing(compute)
    if "sat" in instruction.modifiers and result in FLOATS:
        inner = compute
        compute = lambda *args: np.clip(np.nan_to_num(inner(*args), nan=0.0), 0, 1)  # noqa: E731

    def step(warp, mask):
        write(warp, compute(*[r(warp) for r in read]), mask)

    return step


def _flushing(compute):
    def flushed(*values):
        result = compute(*[flush(v) if v.dtype == np.float32 else v for v in values])
        return flush(result) if result.dtype == np.float32 else result

    return flushed


def wide(x: np.ndarray) -> np.ndarray:
    """Widen numbers so that a product is exact. float64 becomes long double, 64 bits of mantissa."""
    if x.dtype.kind == "f":
        return x.astype(np.float64 if x.dtype.itemsize < 8 else np.longdouble)
    return x.astype(object) if x.dtype.itemsize == 8 else x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")


@opcode("add", "sub", allow="rn ftz sat")
def add(program, i):
    return pure(program, i, {"add": operator.add, "sub": operator.sub}[i.name])


@opcode("mul", allow="rn ftz sat lo hi wide")
def mul(program, i):
    kind = kind_of(i)
    if "wide" in i.modifiers:
        return pure(program, i, lambda a, b: wide(a) * wide(b), kind, result=_double(kind))
    if "hi" in i.modifiers:
        return pure(program, i, lambda a, b: (wide(a) * wide(b)) >> 8 * SIZES[kind])
    return pure(program, i, operator.mul)


@opcode("mad", allow="rn ftz sat lo hi wide")
def mad(program, i):
    kind = kind_of(i)
    if kind in FLOATS:
        return fma(program, i)
    if "wide" in i.modifiers:
        double = _double(kind)
        return pure(program, i, lambda a, b, c: wide(a) * wide(b) + c, kind, [kind, kind, double], double)
    if "hi" in i.modifiers:
        return pure(program, i, lambda a, b, c: ((wide(a) * wide(b)) >> 8 * SIZES[kind]) + c)
    return pure(program, i, lambda a, b, c: a * b + c)


def _double(kind: str) -> str:
    return f"{kind[0]}{16 * SIZES[kind]}"


@opcode("fma", allow="rn ftz sat relu")
def fma(program, i):
    def compute(a, b, c):
        result = (wide(a) * wide(b) + wide(c)).astype(a.dtype)
        return np.maximum(result, 0) if "relu" in i.modifiers else result

    return pure(program, i, compute)


@opcode("div", allow="rn ftz full approx")
def div(program, i):
    return pure(program, i, operator.truediv if kind_of(i) in FLOATS else _quotient)


@opcode("rem")
def rem(program, i):
    return pure(program, i, lambda a, b: a - _quotient(a, b) * b)


def _quotient(a, b):
    """Divide, rounding towards zero."""
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0)))


def _in_double(function):
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _tanh_approx(x):
    exact = np.tanh(x.astype(np.float64))
    mantissa, exponent = np.frexp(exact)
    return np.ldexp(np.rint(mantissa * 2**11) / 2**11, exponent).astype(x.dtype)


_UNARY = {
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "sqrt": np.sqrt,
    "rsqrt": _in_double(lambda x: 1 / np.sqrt(x)),
    "rcp": lambda x: np.ones_like(x) / x,
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _tanh_approx,
    "abs": np.abs,
    "neg": operator.neg,
}


@opcode(*_UNARY, allow="approx rn ftz")
def unary(program, i):
    return pure(program, i, _UNARY[i.name])


@opcode("min", "max", allow="ftz NaN")
def extreme(program, i):
    if kind_of(i) in FLOATS and "NaN" not in i.modifiers:
        return pure(program, i, np.fmin if i.name == "min" else np.fmax)
    return pure(program, i, np.minimum if i.name == "min" else np.maximum)


@opcode("copysign")
def copysign(program, i):
    return pure(program, i, lambda sign, magnitude: np.copysign(magnitude, sign))


_BITWISE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert}


@opcode(*_BITWISE)
def bitwise(program, i):
    return pure(program, i, _BITWISE[i.name])


@opcode("lop3")
def lop3(program, i):
    *operands, table = i.operands
    table = int(table.text, 0)

    def compute(a, b, c):
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return pure(program, dataclasses.replace(i, operands=operands), compute)


@opcode("shl", "shr")
def shift(program, i):
    kind = kind_of(i)
    width = 8 * SIZES[kind]

    def compute(a, count):
        limited = np.minimum(count, width - 1).astype(a.dtype)
        if i.name == "shr":
            return np.where((count < width) | is_signed(kind), a >> limited, 0).astype(a.dtype)
        return np.where(count < width, a << limited, 0).astype(a.dtype)

    return pure(program, i, compute, sources=[kind, "u32"])


@opcode("shf", allow="l r wrap clamp")
def funnel(program, i):
    def compute(low, high, count):
        count = (count & 31 if "wrap" in i.modifiers else np.minimum(count, 32)).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return (both >> count if "r" in i.modifiers else (both << count) >> np.uint64(32)) & 0xFFFFFFFF

    return pure(program, i, compute)


@opcode("bfe")
def bfe(program, i):
    kind, width = kind_of(i), 8 * SIZES[kind_of(i)]

    def extract(value, start, length):
        start, length = int(start) & 255, int(length) & 255
        field = (int(value) % (1 << width)) >> start & (1 << length) - 1
        if is_signed(kind) and length:
            sign = int(value) >> min(start + length - 1, width - 1) & 1
            field -= sign << min(length, max(width - start, 0))
        return field % (1 << width)

    def compute(*values):
        fields = [extract(*lane) for lane in zip(*values, strict=True)]
        return np.array(fields, f"u{SIZES[kind]}").view(numpy_type(kind))

    return pure(program, i, compute, sources=[kind, "u32", "u32"])


@opcode("bfi")
def bfi(program, i):
    kind, width = kind_of(i), 8 * SIZES[kind_of(i)]

    def insert(field, base, start, length):
        mask = ((1 << (int(length) & 255)) - 1) << (int(start) & 255)
        return (int(base) & ~mask | int(field) << (int(start) & 255) & mask) % (1 << width)

    def compute(*values):
        return np.array([insert(*lane) for lane in zip(*values, strict=True)], numpy_type(kind))

    return pure(program, i, compute, sources=[kind, kind, "u32", "u32"])


@opcode("popc", "clz", "brev")
def count_bits(program, i):
    kind, width = kind_of(i), 8 * SIZES[kind_of(i)]
    count = {
        "popc": lambda x: x.bit_count(),
        "clz": lambda x: width - x.bit_length(),
        "brev": lambda x: int(f"{x:0{width}b}"[::-1], 2),
    }[i.name]
    result = kind if i.name == "brev" else "u32"
    return pure(program, i, lambda a: np.array([count(int(x)) for x in a], numpy_type(result)), result=result)


@opcode("prmt")
def permute(program, i):
    def compute(a, b, selector):
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros_like(a)
        for byte in range(4):
            choice = (selector >> (4 * byte)) & 15
            value = (both >> (8 * (choice & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
            value = np.where(choice & 8, np.where(value & 0x80, 0xFF, 0), value)  # bit 3: copies of the sign
            result = result | (value.astype(np.uint32) << np.uint32(8 * byte))
        return result

    return pure(program, i, compute)


_COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_COMPARE_FLOATS = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def comparison(name: str, kind: str):
    if kind not in FLOATS:
        return _COMPARE[name]

    def compare(a, b):
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if name in _COMPARE_FLOATS:
            return _COMPARE[name[:-1]](a, b) | unordered
        return _COMPARE[name](a, b) & ~unordered

    return compare


@opcode("setp", allow=" ".join(("ftz", *_COMPARE, *_COMPARE_FLOATS, *_COMBINE)))
def setp(program, i):
    kind = kind_of(i)
    compare = comparison(i.modifiers[0], kind)
    combine = next((_COMBINE[m] for m in i.modifiers[1:] if m in _COMBINE), None)
    destination, a, b, *third = i.operands
    outputs = [destination.first, destination.second] if isinstance(destination, Pair) else [destination]
    writes = [program.sink(o, "pred") for o in outputs]
    reads = [program.source(a, kind), program.source(b, kind)]
    extra = program.source(third[0], "pred") if combine else None

    def step(warp, mask):
        values = [read(warp) for read in reads]
        truth = compare(*map(flush, values)) if "ftz" in i.modifiers else compare(*values)
        for write, value in zip(writes, (truth, ~truth), strict=False):
            write(warp, combine(value, extra(warp)) if combine else value, mask)

    return step


@opcode("selp")
def selp(program, i):
    kind = kind_of(i)
    return pure(program, i, lambda a, b, p: np.where(p, a, b), sources=[kind, kind, "pred"])


@opcode("mov")
def mov(program, i):
    kind = kind_of(i)
    if isinstance(i.operands[0], Vector) and isinstance(i.operands[1], Vector):
        raise PtxError("mov from a vector to a vector")
    return pure(program, i, lambda a: a, kind if kind == "pred" else f"b{8 * SIZES[kind]}")


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt", allow="rn rz rna ftz sat rni rzi rmi rpi")
def cvt(program, i):
    mode = next((m for m in i.modifiers if m[0] == "r"), "rn")
    target, source = i.modifiers[-2:]
    if target not in FLOATS:
        return pure(program, i, _to_integer(target, source, mode, "sat" in i.modifiers), source, result=target)
    if mode in _TO_INTEGER:
        return pure(program, i, _TO_INTEGER[mode], source, result=target)
    if target == "tf32":
        return pure(program, i, lambda a: to_tf32(a, mode), source, result="b32")
    if target.startswith("bf16"):
        convert = lambda x: to_bf16(x, mode)  # noqa: E731
    elif mode == "rn":
        convert = lambda x: x.astype(np.float16 if target[:3] == "f16" else numpy_type(target))  # noqa: E731
    else:
        raise PtxError(f"rounding {mode} to {target}")
    if target.endswith("x2"):  # the first source becomes the high half
        packed = lambda high, low: convert(np.stack((low, high), -1)).view(np.uint32)[..., 0]  # noqa: E731
        return pure(program, i, packed, source, result="b32")
    return pure(program, i, convert, source, result="b16" if target == "bf16" else target)


def _to_integer(target: str, source: str, mode: str, saturate: bool):
    """Convert to an integer: floats saturate, NaN gives 0; integers lose their high bits unless ``.sat``."""
    limits = np.iinfo(numpy_type(target))

    def from_float(x):
        x = _TO_INTEGER[mode](np.nan_to_num(x.astype(np.longdouble), nan=0.0))
        return np.clip(x, limits.min, limits.max).astype(numpy_type(target))

    if source in FLOATS:
        return from_float
    if saturate:
        return lambda x: np.clip(x.astype(object), limits.min, limits.max)
    return lambda x: x.astype(numpy_type(target))
