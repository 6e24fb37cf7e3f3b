"""The rules by which ``auto`` chooses the backend of ``attention``, and the fast path that skips them.

A ratio is the time of the best other backend over the time of the row's backend, measured by ``fastseq bench`` on a
Xeon (Emerald Rapids, AVX-512) with 1 thread. It covers the float32 cases of the evidence file, and similar ones in
other dtypes.
"""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import Rule
from fastseq.ops.attention import native
from fastseq.ops.attention import torch as torch_backend
from fastseq.ops.common.autograd import untracked

DOT = "benchmarks/results/dot-xeon-avx2-1thread.json, benchmarks/results/dot-xeon-avx512-1thread.json"
CPU_RESULTS = "benchmarks/results/cpu-xeon-1thread.json"


def on_cpu(call) -> bool:
    return call.device == "cpu"


def on_cuda(call) -> bool:
    return call.device == "cuda"


def not_on_cpu(call) -> bool:
    return call.device != "cpu"


def eager(call) -> bool:
    """Not traced by torch.compile or torch.export."""
    return not call.compiling


def dot(call) -> bool:
    return call.score == "dot"


def additive(call) -> bool:
    return call.score == "additive"


def inference(call) -> bool:
    return not call.requires_grad


def without_weights(call) -> bool:
    return not call.need_weights


def unpadded(call) -> bool:
    return not call.padded


def one_step(call) -> bool:
    return call.steps == 1


def bfloat16(call) -> bool:
    return call.dtype == torch.bfloat16


def float32(call) -> bool:
    return call.dtype == torch.float32


def many_scores(call) -> bool:
    """More than 1024 scores a sentence, with AVX2, or with AVX-512 if the keys have at most 64 elements."""
    return _many_scores(call.steps, call.positions, call.size)


def _many_scores(steps: int, positions: int, size: int) -> bool:
    vectors = _native.instruction_set()
    return steps * positions > 1024 and (vectors == "avx2" or (vectors.startswith("avx512") and size <= 64))


def not_float64(call) -> bool:
    return call.dtype != torch.float64


def not_float64_or_many_steps(call) -> bool:
    return call.dtype != torch.float64 or (call.steps or 1) > 1


RULES = (
    Rule(
        "torch",
        (not_on_cpu, dot, inference, without_weights),
        "torch's fused kernel (SDPA); not measured by this project yet",
    ),
    Rule(
        "native",
        (on_cuda, additive),
        "not measured yet: one pass over the keys, no (B, T, S, A) intermediate",
    ),
    Rule(
        "triton",
        (on_cuda,),
        "one pass over the keys instead of one kernel per operator; not measured by this project yet",
    ),
    Rule(
        "native",
        (on_cpu, additive, not_float64_or_many_steps),
        "no (B, T, S, A) intermediate: 1.15 to 3.9 times as fast as the next best for one step, 1.3 to 58 times for "
        "many (Xeon, AVX-512, 1 thread)",
        CPU_RESULTS,
    ),
    Rule(
        "torch",
        (on_cpu, eager, dot, bfloat16, one_step, inference, without_weights, unpadded),
        "one step without padding in bfloat16: SDPA is up to twice as fast as native",
        CPU_RESULTS,
    ),
    Rule(
        "torch",
        (on_cpu, eager, dot, float32, inference, without_weights, unpadded, many_scores),
        "SDPA multiplies blocks of scores: native is 0.75 to 0.95 times as fast (Xeon, 1 thread)",
        DOT,
    ),
    Rule(
        "native",
        (on_cpu, eager, dot, not_float64),
        "one pass, which skips the padding: 1.08 to 1.8 times as fast as reference in float32, with lengths 1.4 to 2.3 "
        "times; one step without gradients as fast as SDPA to 1.6 times (Xeon, AVX-512, 1 thread)",
        CPU_RESULTS,
    ),
    Rule("reference", (), "nothing was measured faster here"),
)


def fast_path(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor | None:
    """The context of a plain dot call by ``native`` or SDPA, without checks and RULES; None for every other call.

    Plain: float32 on the CPU; no gradient, autocast, trace or transform; shapes that fit. A step of 32 sentences takes
    130 us; checks, call record and rules would add 20 us. ``test_attention.py`` holds this to RULES.
    """
    if not untracked():
        return None
    query_shape, key_shape, value_shape = query.shape, keys.shape, values.shape
    plain = (
        len(query_shape) == len(key_shape) == len(value_shape) == 3
        and query_shape[0] == key_shape[0] == value_shape[0]
        and query_shape[2] == key_shape[2]
        and key_shape[1] == value_shape[1]
        and query.dtype == keys.dtype == values.dtype == torch.float32
        and query.is_cpu
        and keys.is_cpu
        and values.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and _native.available()
    )
    if not plain:
        return None
    backend = torch_backend if _many_scores(query_shape[1], key_shape[1], query_shape[2]) else native
    return backend.context(query, keys, values, scale)
