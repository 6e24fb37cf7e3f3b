"""The rules by which ``auto`` chooses the backend of ``linear_cross_entropy``."""

from fastseq.dispatch import Rule


def on_cpu(call) -> bool:
    return call.device == "cpu"


def on_cuda(call) -> bool:
    return call.device == "cuda"


def eager(call) -> bool:
    return not call.compiling


def many_classes(call) -> bool:
    return call.classes >= 1024


def many_logits(call) -> bool:
    """At least 2^28 logits, 1 GiB in float32."""
    return call.rows is not None and call.rows * call.classes >= 1 << 28


RULES = (
    Rule(
        "native",
        (on_cpu, many_classes),
        "not measured yet on a quiet machine: no logits in memory; 1.4 to 1.9 times as fast (V 16384 and 32000)",
    ),
    Rule("triton", (on_cuda, eager, many_logits), "not measured yet: no logits in memory"),
    Rule("torch", (), "no kernel of fastseq was measured faster here"),
)
