"""Patches for Triton's interpreter (TRITON_INTERPRET=1), which stores bfloat16 as uint16 and computes on the integers.

Casts and products give correct values; any other arithmetic on bfloat16 raises, because kernels cast to float32 first.
Import before a kernel runs. For Triton 3.6 and 3.7.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _is_bfloat16(value) -> bool:
    return isinstance(value, _Handle) and value.dtype.scalar == tl.bfloat16


def _to_float32(handle):
    if not _is_bfloat16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, as GPUs do; the interpreter truncates."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _rounding(cast):
    def repaired(self, source, dtype, *rest):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return _Handle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, dtype, *rest)

    return repaired


def _refusing(name, operation):
    def repaired(self, *args, **kwargs):
        assert not any(_is_bfloat16(arg) for arg in args), f"{name} on bfloat16: cast to float32 first"
        return operation(self, *args, **kwargs)

    return repaired


def _dot(self, a, b, d, *rest):
    return _plain_dot(self, _to_float32(a), _to_float32(b), d, *rest)


def _reducing(reduction):
    def repaired(self, input, *rest, **kwargs):
        assert (input[0] if isinstance(input, tuple) else input).dtype.scalar != tl.bfloat16, "reduction of bfloat16"
        return reduction(self, input, *rest, **kwargs)

    return repaired


_plain_dot = _Builder.create_dot
_Builder.create_dot = _dot
_Builder.cast_impl = _rounding(_Builder.cast_impl)
_Builder.create_fp_to_fp = _rounding(_Builder.create_fp_to_fp)
_ARITHMETIC = ("create_f", "create_min", "create_max", "create_clamp", "create_exp", "create_log", "create_sqrt")
for _name in dir(_Builder):
    if _name.startswith(_ARITHMETIC) and not _name.startswith("create_fp_"):
        setattr(_Builder, _name, _refusing(_name, getattr(_Builder, _name)))
for _name in ("sum", "min_max", "generic_reduce"):
    setattr(interpreter.ReduceOps, _name, _reducing(getattr(interpreter.ReduceOps, _name)))
