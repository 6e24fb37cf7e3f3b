"""Number formats of PTX: conversion between register bits and numpy arrays.

A register is an unsigned array of 32 lanes. float16, bfloat16 and packed pairs are computed in float32 and rounded
once; pairs have shape (lanes, 2), the low half first.
"""

import numpy as np

from .parse import SIZES, PtxError

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NUMPY = {f"{kind}{8 * size}": np.dtype(f"{code}{size}") for size in BITS for kind, code in (("u", "u"), ("s", "i"))}
_NUMPY |= {f"b{8 * size}": np.dtype(f"u{size}") for size in BITS}
_NUMPY |= {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32"}


def numpy_type(kind: str) -> np.dtype:
    return _NUMPY[kind]


def is_signed(kind: str) -> bool:
    return kind.startswith("s")


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Convert float32 to the bits of bfloat16, to nearest even (rn) or towards zero (rz)."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = bits if mode == "rz" else bits + (0x7FFF + ((bits >> 16) & 1))
    return np.where(np.isnan(x), 0x7FFF, rounded >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray, mode: str) -> np.ndarray:
    """Convert float32 to the bits of TF32 (10 bits of mantissa): nearest, ties away from zero (rna) or to even (rn)."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = bits + (0x1000 if mode == "rna" else 0xFFF + ((bits >> 13) & 1))
    return np.where(np.isfinite(x), rounded & 0xFFFFE000, bits).astype(np.uint32)


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 numbers by zeros (.ftz)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return the numbers in the low bytes of registers."""
    if kind == "pred":
        return bits
    size = SIZES[kind]
    if bits.dtype.itemsize < size:
        raise PtxError(f"a register of {bits.dtype.itemsize} bytes cannot be read as .{kind}")
    if bits.dtype.itemsize > size:
        bits = bits.astype(BITS[size])
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return from_bf16(bits)
    if kind == "f16x2":
        return bits.view(np.float16).reshape(*bits.shape, 2).astype(np.float32)
    if kind == "bf16x2":
        return from_bf16(bits.view(np.uint16).reshape(*bits.shape, 2))
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)  # tensor cores ignore the other bits
    return bits.view(_NUMPY[kind])


def encode(value: np.ndarray, kind: str) -> np.ndarray:
    """Return the bits of a result, unsigned, in the size of ``kind``."""
    if kind == "pred":
        return value
    if kind in ("f16", "f16x2"):
        bits = value.astype(np.float16).view(np.uint16)
    elif kind in ("bf16", "bf16x2"):
        bits = to_bf16(value)
    else:
        value = value.astype(_NUMPY[kind], copy=False)
        return value.view(BITS[SIZES[kind]])
    if kind.endswith("x2"):
        return np.ascontiguousarray(bits).view(np.uint32)[..., 0]
    return bits


def widen(bits: np.ndarray, kind: str, size: int) -> np.ndarray:
    """Extend bits of ``kind`` to a register of ``size`` bytes: sign-extend signed integers, zero-extend the rest."""
    if bits.dtype.itemsize == size:
        return bits
    if bits.dtype.itemsize > size:
        raise PtxError(f".{kind} does not fit in a register of {size} bytes")
    if is_signed(kind):
        return bits.view(_NUMPY[kind]).astype(f"i{size}").view(BITS[size])
    return bits.astype(BITS[size])
