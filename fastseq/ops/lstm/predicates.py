"""The properties of an ``lstm`` call, and of the machine, by which the rules of ``auto`` choose: named predicates."""

import platform
from collections.abc import Callable
from typing import TypeAlias

import torch

from fastseq import _native
from fastseq.ops.lstm import native, native_cuda
from fastseq.ops.lstm.spec import LSTMCall

Predicate: TypeAlias = Callable[[LSTMCall], bool]


def exactly(field: str, value: object) -> Predicate:
    """Holds for calls whose ``field`` is ``value``."""
    return lambda call: getattr(call, field) == value


def at_most(field: str, limit: int) -> Predicate:
    """Holds for calls whose ``field`` is ``limit`` or less."""
    return lambda call: getattr(call, field) <= limit


def over(field: str, limit: int) -> Predicate:
    """Holds for calls whose ``field`` is more than ``limit``."""
    return lambda call: getattr(call, field) > limit


on_cpu = exactly("device", "cpu")
on_cuda = exactly("device", "cuda")
autocast = exactly("autocast", True)
fused_under_autocast = exactly("fused", True)  # and torch would run the call by oneDNN or cuDNN
training = exactly("requires_grad", True)
inference = exactly("requires_grad", False)
under_vmap = exactly("vmapped", True)
at_most_2_steps = at_most("steps", 2)
several_steps = over("steps", 1)
at_least_20_steps = over("steps", 19)
at_least_50_steps = over("steps", 49)
at_least_200_steps = over("steps", 199)
one_step = exactly("steps", 1)
several_sequences = over("batch", 1)
over_4_sequences = over("batch", 4)
at_most_4_sequences = at_most("batch", 4)
at_most_8_sequences = at_most("batch", 8)
at_most_16_sequences = at_most("batch", 16)
at_most_32_sequences = at_most("batch", 32)
at_most_64_sequences = at_most("batch", 64)
over_32_sequences = over("batch", 32)
one_sequence = exactly("batch", 1)
four_sequences = exactly("batch", 4)
hidden_size_to_128 = at_most("hidden_size", 128)
hidden_size_to_256 = at_most("hidden_size", 256)
hidden_size_to_512 = at_most("hidden_size", 512)
hidden_size_over_192 = over("hidden_size", 192)
hidden_size_over_256 = over("hidden_size", 256)
hidden_size_over_512 = over("hidden_size", 512)
one_input_column = exactly("input_size", 1)
one_layer = exactly("layers", 1)
float16 = exactly("dtype", torch.float16)
bfloat16 = exactly("dtype", torch.bfloat16)
float32 = exactly("dtype", torch.float32)
float64 = exactly("dtype", torch.float64)


def traced(call) -> bool:
    return call.compiling


def eager(call) -> bool:
    """Not traced by torch.compile or torch.export."""
    return not call.compiling


def over_20_rows(call) -> bool:
    return call.steps * call.batch > 20


def at_most_40_rows(call) -> bool:
    return call.steps * call.batch <= 40


def at_most_160_rows(call) -> bool:
    return call.steps * call.batch <= 160


def partial_vectors(call) -> bool:
    """65 to 256 hidden units, no multiple of the 16 floats of a vector."""
    return 64 < call.hidden_size <= 256 and call.hidden_size % 16 > 0


def two_to_4_sequences(call) -> bool:
    return 2 <= call.batch <= 4


def subclass(call) -> bool:
    return call.subclass


def forward_mode(call) -> bool:
    return call.forward_mode


def returns_cell_states(call) -> bool:
    return call.return_cell_states


def variable_lengths(call) -> bool:
    """Several sequences of different lengths: torch runs these op by op, native skips the padding."""
    return (call.packed or call.lengths) and call.batch > 1


def padded(call) -> bool:
    """All sequences have the same length."""
    return not (call.packed or call.lengths)


def float32_or_bfloat16(call) -> bool:
    return call.dtype in (torch.float32, torch.bfloat16)


def small_weights(call) -> bool:
    """W_ih and W_hh of a direction have fewer than 2^19 elements."""
    return 4 * call.hidden_size * (call.input_size + call.hidden_size) < 2**19


def hidden_values_to_1024(call) -> bool:
    """B * H up to 1024."""
    return call.batch * call.hidden_size <= 1024


def hidden_values_to_2048(call) -> bool:
    """B * H up to 2048."""
    return call.batch * call.hidden_size <= 2048


def projected(call) -> bool:
    """With ``proj_size``, for which torch runs op by op on CPUs, its products by oneDNN and MKL."""
    return call.proj_size > 0


def float32_or_float16(call) -> bool:
    return call.dtype in (torch.float32, torch.float16)


def float32_or_float64(call) -> bool:
    return call.dtype in (torch.float32, torch.float64)


def hidden_size_193_to_1024(call) -> bool:
    return 192 < call.hidden_size <= 1024


def modelled_as_faster_on_gpu(call) -> bool:
    """A step is modelled to take at most 75 % of cuDNN's, in training forward and backward each (H200, +-40 %).

    The model bounds the batch: the more rows, the more a step is a product, which one GEMM computes as fast.
    """
    return native.unsupported(call) is None and native_cuda.modelled_gain(call) >= 4 / 3


def _instruction_set() -> str:
    return _native.instruction_set()


def avx512(call) -> bool:
    """The compiled kernels use AVX-512 on this machine; these rows were not measured with narrower vectors."""
    return _instruction_set().startswith("avx512")


def without_avx512(call) -> bool:
    """The kernels use AVX2 or SSE: torch runs bfloat16 op by op, and oneDNN's float32 kernels are as narrow."""
    return _instruction_set() in ("avx2", "baseline") and platform.machine().lower() in ("x86_64", "amd64")


def x86(call) -> bool:
    """An x86 processor of 64 bits; on others the rows were not measured."""
    return avx512(call) or without_avx512(call)


def avx512_bf16(call) -> bool:
    """oneDNN and the compiled kernels both multiply bfloat16 by AVX-512's dot product."""
    return _instruction_set() == "avx512_bf16"


def _amx() -> bool:
    return _native.matrix_unit()


def matrix_unit(call) -> bool:
    """oneDNN multiplies bfloat16 by AMX."""
    return _amx()


def _threads() -> int:
    return torch.get_num_threads()


def one_thread(call) -> bool:
    """torch uses one thread."""
    return _threads() == 1


def several_threads(call) -> bool:
    """torch uses several threads. With AMX it gains less from them than native does."""
    return _threads() > 1


def no_matrix_unit(call) -> bool:
    """The CPU has no AMX, with which oneDNN multiplies bfloat16 several times as fast as with vector instructions."""
    return not _amx()
