"""The rules by which ``auto`` chooses the backend of ``linear_cross_entropy``."""

from fastseq.dispatch import Rule

CPU_RESULTS = "benchmarks/results/loss-xeon-avx2-1thread.json, benchmarks/results/loss-xeon-avx512-1thread.json"


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
        "no logits in memory: 1.0 to 1.2 times as fast from 1024 classes on, 1.3 to 1.8 from 16384 (Xeon)",
        CPU_RESULTS,
    ),
    Rule("triton", (on_cuda, eager, many_logits), "not measured yet: no logits in memory"),
    Rule("torch", (), "no kernel of fastseq was measured faster here"),
)
