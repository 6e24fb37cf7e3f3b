"""The rules by which ``auto`` chooses the backend of ``lstm``.

A ratio is the time of nn.LSTM over the time of the row's backend, measured by ``fastseq bench`` on a Xeon (Emerald
Rapids, AVX-512, no AMX) and an EPYC (Zen 4) with 1 and 2 threads, the rows about AVX2 and AMX on a Xeon (Sapphire
Rapids, lowered to AVX2). Rows without ``one_thread`` or ``several_threads`` hold for any number
of threads. It covers the cases of the evidence files and similar ones.
"""

import platform
from collections.abc import Callable
from typing import TypeAlias

import torch

from fastseq import _native
from fastseq.dispatch import Rule
from fastseq.ops.lstm import native, native_cuda
from fastseq.ops.lstm.spec import LSTMCall

AVX2 = "benchmarks/results/grid-xeon-avx2-1thread.json"
SSE = "benchmarks/results/grid-xeon-baseline-1thread.json"
AVX512 = "benchmarks/results/grid-xeon-avx512-1thread.json"
AMX = "benchmarks/results/grid-xeon-amx-1thread.json"
AMX_2 = "benchmarks/results/grid-xeon-amx-2threads.json"
GRIDS = f"{AVX2}, {AVX512}, {AMX}"
STEPS_AVX2 = f"benchmarks/results/steps-xeon-avx2-1thread.json, {GRIDS}"
STEPS_AMX = f"benchmarks/results/steps-xeon-amx-1thread.json, {AMX}"
XEON_AND_ZEN4 = "benchmarks/results/cpu-xeon-1thread.json, benchmarks/results/cpu-zen4-1thread.json"
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
at_least_50_steps = over("steps", 49)
at_least_200_steps = over("steps", 199)
one_step = exactly("steps", 1)
several_sequences = over("batch", 1)
over_4_sequences = over("batch", 4)
at_most_4_sequences = at_most("batch", 4)
at_most_8_sequences = at_most("batch", 8)
at_most_16_sequences = at_most("batch", 16)
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


def hidden_size_193_to_1024(call) -> bool:
    return 192 < call.hidden_size <= 1024


def modelled_as_faster_on_gpu(call) -> bool:
    """A step is modelled to take at most 80 % of cuDNN's, in training forward and backward each (H200, +-40 %).

    The model bounds the batch: the more rows, the more a step is a product, which one GEMM computes as fast.
    """
    return native.unsupported(call) is None and native_cuda.modelled_gain(call) >= 1.25


def _instruction_set() -> str:
    return _native.instruction_set()


def avx512(call) -> bool:
    """The compiled kernels use AVX-512 on this machine; these rows were not measured with narrower vectors."""
    return _instruction_set().startswith("avx512")


def without_avx512(call) -> bool:
    """The kernels use AVX2 or SSE: torch runs bfloat16 op by op, and oneDNN's float32 kernels are as narrow."""
    return _instruction_set() in ("avx2", "baseline") and platform.machine().lower() in ("x86_64", "amd64")


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


PADDED = (on_cpu, eager, padded)
FLOAT32_AVX512 = (*PADDED, float32, avx512)
BFLOAT16_AMX = (*PADDED, bfloat16, matrix_unit)

RULES = (
    Rule("torch", (subclass,), "a subclass of torch.Tensor, which may redefine torch's operators"),
    Rule("reference", (forward_mode,), "forward-mode derivatives: torch has none for oneDNN and cuDNN"),
    Rule("native", (returns_cell_states,), "oneDNN and cuDNN do not return the cell states of every step"),
    Rule("native", (traced,), "one opaque operator: the graph stays whole, T and B stay dynamic"),
    Rule("native", (under_vmap,), "under torch.func.vmap the samples are folded into the batch"),
    Rule(
        "torch",
        (*PADDED, float16, matrix_unit, training, one_step, at_most_16_sequences),
        "a single step in training, op by op: oneDNN multiplies float16 by AMX, native is 0.65 to 1.2 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "torch",
        (*PADDED, bfloat16, without_avx512, training, one_step, one_sequence, small_weights),
        "a single step of one sequence in training, op by op: native is 0.86 to 0.9 times as fast for small weights",
        STEPS_AVX2,
    ),
    Rule(
        "torch",
        (*PADDED, float64, training, one_step),
        "a single step in training, op by op: native is 0.6 to 1.0 times as fast in float64",
        GRIDS,
    ),
    Rule(
        "torch",
        (*PADDED, float64, without_avx512, inference, one_step, one_sequence, one_input_column),
        "a single step of one sequence of single numbers in float64: native is 0.83 (SSE) to 1.0 times as fast (AVX2)",
        f"{SSE}, {AVX2}",
    ),
    Rule(
        "torch",
        (*FLOAT32_AVX512, one_thread, training, at_least_50_steps, partial_vectors),
        "50 steps or more in training, H = 65 to 256, no multiple of 16: native is 0.83 to 0.99 times as fast",
        f"{AVX512}, {AMX}",
    ),
    Rule(
        "torch",
        (*FLOAT32_AVX512, one_thread, inference, four_sequences, at_least_50_steps, partial_vectors, one_layer),
        "four sequences of 50 steps or more, H = 65 to 256, no multiple of 16: native is 0.89 to 0.96 times as fast",
        f"{AVX512}, {AMX}",
    ),
    Rule(
        "torch",
        (
            *PADDED,
            float32,
            avx512,
            one_thread,
            inference,
            one_input_column,
            two_to_4_sequences,
            at_least_200_steps,
            hidden_size_to_256,
        ),
        "200 steps or more of inputs of one number, H to 256, with AVX-512: native is 0.88 times as fast",
        AVX512,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, inference, one_input_column, one_layer),
        "oneDNN does not use AMX for inputs of one number: native is 1.2 to 1.9 times as fast",
        AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, inference, hidden_values_to_1024),
        "oneDNN's AMX gains little from several threads in small steps: native is 1.04 to 5 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, inference, partial_vectors, hidden_size_to_128),
        "several threads, H = 65 to 128, no multiple of 16: native is 1.2 to 3 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, inference, at_most_8_sequences, one_input_column),
        "several threads, inputs of one number: native is 1.1 to 5 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, training, at_most_8_sequences),
        "few sequences in training on several threads: native is 1.1 to 7 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, training, at_most_64_sequences, hidden_size_to_128),
        "narrow layers in training on several threads: native is 1.1 to 1.5 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, training, at_most_16_sequences, hidden_size_over_512),
        "wide layers in training on several threads: native is 1.2 times as fast",
        AMX_2,
    ),
    Rule(
        "torch",
        (*BFLOAT16_AMX, inference, several_sequences, over_20_rows, hidden_size_to_256),
        "oneDNN multiplies bfloat16 by AMX: native is 0.3 to 0.9 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "torch",
        (*BFLOAT16_AMX, inference, one_sequence, at_least_50_steps, hidden_size_to_512),
        "oneDNN multiplies bfloat16 by AMX: native is 0.75 to 0.96 times as fast over 50 steps or more",
        AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, at_most_8_sequences, at_most_2_steps),
        "one or two steps: packing the weights takes longer than AMX multiplies; native is 1.2 to 3.2 times as fast",
        AMX,
    ),
    Rule(
        "native",
        (on_cpu, eager, float16),
        "torch has no float16 kernel on CPU and runs op by op: native is 1.2 to 29 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "torch",
        (on_cpu, eager, fused_under_autocast, training, bfloat16, at_most_2_steps, over_4_sequences),
        "one or two steps of many sequences in a loop under autocast: native is 0.84 to 0.96 times as fast (Zen 4)",
    ),
    Rule(
        "native",
        (on_cpu, eager, float64, at_most_4_sequences),
        "torch has no float64 kernel on CPU and runs op by op: native is 1.1 to 3.7 times as fast for few sequences",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cpu, eager, float64, at_most_8_sequences, several_steps),
        "up to 8 sequences in float64, op by op in torch: native is 1.0 to 2.3 times as fast",
        GRIDS,
    ),
    Rule(
        "native",
        (on_cpu, eager, variable_lengths, float32_or_bfloat16),
        "variable lengths, where torch runs op by op: native is 1.3 to 3.9 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cpu, eager, at_most_4_sequences, float32_or_bfloat16),
        "few sequences: native reads the weights without packing them, 1.1 to 3.4 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "torch",
        (*FLOAT32_AVX512, several_threads, inference, one_step, over_32_sequences),
        "a single step of many sequences on several threads: packing the weights costs native more, 0.93 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (on_cpu, eager, float32, avx512),
        "products and cell fused in registers: native is 1.0 to 1.5 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cpu, eager, bfloat16, without_avx512),
        "torch has no bfloat16 LSTM without AVX-512 and runs op by op: native is 1.3 to 35 times as fast",
        AVX2,
    ),
    Rule(
        "native",
        (on_cpu, eager, float32, without_avx512),
        "products and cell fused in registers: native is 0.95 to 5 times as fast with AVX2 or SSE, 1.35 in the mean",
        AVX2,
    ),
    Rule(
        "torch",
        (on_cpu, eager, bfloat16, avx512_bf16, inference),
        "inference with AVX-512's bfloat16 dot product: native is 0.97 to 1.04 times as fast (Zen 4)",
        "benchmarks/results/cpu-zen4-1thread.json",
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, at_most_8_sequences, hidden_size_over_256),
        "wide layers, few sequences: reading the weights takes longer than AMX multiplies: native is 1.2 to 1.5 times "
        "as fast",
        STEPS_AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, at_most_8_sequences, hidden_size_over_192, at_most_160_rows),
        "few sequences, up to 160 steps of all in training: native is 1.05 to 1.3 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, at_most_40_rows),
        "up to 40 steps of all sequences in training: native is 1.1 to 1.4 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, one_step, hidden_size_over_512),
        "a single step of a wide layer in training: native is 1.2 times as fast",
        AMX,
    ),
    Rule(
        "native",
        (on_cpu, eager, bfloat16, avx512, no_matrix_unit),
        "without a matrix unit: native is 1.4 to 2.0 times as fast (Xeon), training on Zen 4 0.97 to 2.2 times",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cuda, eager, variable_lengths, modelled_as_faster_on_gpu),
        "not measured yet: variable lengths, for which cuDNN launches kernels step by step",
    ),
    Rule(
        "native",
        (on_cuda, eager, float32_or_bfloat16, hidden_size_193_to_1024, modelled_as_faster_on_gpu),
        "not measured yet: cuDNN launches two kernels a step here, unless float16 or hidden_size <= 192",
    ),
    Rule("torch", (), "oneDNN or cuDNN: no kernel of fastseq was measured faster here"),
    Rule(
        "native",
        (on_cpu, autocast),
        "oneDNN, which nn.LSTM calls under autocast, has no LSTM in this dtype on this processor",
    ),
    Rule("triton", (on_cuda,), "the torch backend refuses this call; not measured yet"),
    Rule("reference", (), "no other backend serves this call"),
)
