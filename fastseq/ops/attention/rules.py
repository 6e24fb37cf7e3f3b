"""The rules by which ``auto`` chooses the backend of ``attention``."""

import torch

from fastseq.dispatch import Rule

_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _dot_on_cpu(call) -> bool:
    return call.device == "cpu" and call.score == "dot" and not call.compiling


RULES = (
    Rule(
        "torch",
        (lambda c: c.device != "cpu" and c.score == "dot" and not c.requires_grad and not c.need_weights,),
        "the vendor's fused kernel (SDPA); not measured by this project yet",
    ),
    Rule(
        "native",
        (lambda c: c.device == "cuda" and c.score == "additive",),
        "not measured yet: one pass over the keys, no (B, T, S, A) intermediate",
    ),
    Rule(
        "triton",
        (lambda c: c.device == "cuda",),
        "one pass over the keys instead of a kernel per formula sign; not measured by this project yet",
    ),
    Rule(
        "native",
        (lambda c: c.device == "cpu" and c.score == "additive" and (c.dtype != _F64 or (c.steps or 1) > 1),),
        "no (B, T, S, A) intermediate: 1.15 to 3.9 times as fast as the better of the others for one step, 1.3 to 58 "
        "times for many (Xeon, AVX-512, 1 thread)",
    ),
    Rule(
        "torch",
        (
            lambda c: (
                _dot_on_cpu(c)
                and c.dtype == _BF16
                and c.steps == 1
                and not (c.requires_grad or c.need_weights or c.padded)
            ),
        ),
        "one step without padding in bfloat16: SDPA is up to twice as fast as native",
    ),
    Rule(
        "native",
        (lambda c: _dot_on_cpu(c) and c.dtype != _F64,),
        "one pass, which skips the padding: 1.08 to 1.8 times as fast as reference in float32, with lengths 1.4 to 2.3 "
        "times; one step without gradients as fast as SDPA to 1.6 times (Xeon, AVX-512, 1 thread)",
    ),
    Rule("reference", (), "nothing was measured faster here"),
)
