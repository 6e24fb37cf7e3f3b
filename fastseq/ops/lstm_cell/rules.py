"""The rules by which ``auto`` chooses the backend of ``lstm_cell``, and the fast path that skips them.

A ratio is the time of the torch backend over the time of the row's backend, measured by ``fastseq bench`` on a Xeon
(Emerald Rapids, AVX-512) and an EPYC (Zen 4) with 1 and 2 threads.
"""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import Rule, takes_auto
from fastseq.ops.common.autograd import peek_transform, untracked
from fastseq.ops.lstm_cell import native

XEON_AND_ZEN4 = "benchmarks/results/cpu-xeon-1thread.json, benchmarks/results/cpu-zen4-1thread.json"


def on_cpu(call) -> bool:
    return call.device == "cpu"


def on_cuda(call) -> bool:
    return call.device == "cuda"


def eager(call) -> bool:
    return not call.compiling


def float32(call) -> bool:
    return call.dtype == torch.float32


def inference(call) -> bool:
    return not call.requires_grad


def from_gates(call) -> bool:
    """The pointwise part alone, from given gates."""
    return not call.with_gemms


def with_gemms(call) -> bool:
    """The whole cell of LSTMCell: both products and the pointwise part."""
    return call.with_gemms


def at_most_32_rows(call) -> bool:
    return call.batch is not None and call.batch <= 32


RULES = (
    Rule(
        "native",
        (from_gates, on_cpu, float32, eager),
        "one pass instead of seven kernels: native is 1.08 to 1.66 times as fast (B 1 to 256, H 256 and 512)",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (with_gemms, inference, on_cpu, float32, at_most_32_rows),
        "both products and the cell in one pass over the weights: native is 1.03 to 4 times as fast (B 1 to 32)",
        XEON_AND_ZEN4,
    ),
    Rule("native", (from_gates, on_cuda, eager), "not measured yet: one kernel, where torch launches nine"),
    Rule("triton", (from_gates, on_cuda, eager), "not measured yet: one kernel, where torch launches nine"),
    Rule("torch", (), "no kernel of fastseq was measured faster here"),
)


def fast_update(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor] | None:
    """h and c_n of a plain update by ``native``, without call record and RULES; None for every other call.

    Plain: float32 gates (N, 4H) and c (N, H) on the CPU; no gradient, trace or transform.
    ``test_the_fast_update_takes_the_backend_of_the_rules`` holds this to RULES.
    """
    if not untracked():
        return None
    plain = (
        gates.dtype == c.dtype == torch.float32
        and gates.is_cpu
        and c.is_cpu
        and c.dim() == 2
        and gates.shape == (c.shape[0], 4 * c.shape[1])
        and _native.available()
    )
    return native.update(gates, c) if plain else None


def trains_on_torch(weight: Tensor, backend: str | None) -> bool:
    """True for a training step of LSTMCell under ``auto``: RULES send every such call to the torch backend.

    The caller then runs ``FAST_STEP``, because the call record and the selection take 3 % of a short step.
    ``test_auto_gives_cells_that_train_to_torch`` holds this to RULES.
    """
    recorded = weight.requires_grad and torch.is_grad_enabled() and takes_auto(backend)
    return recorded and (torch.compiler.is_compiling() or peek_transform() is None)


FAST_STEP = torch._VF.lstm_cell  # (input, (h, c), *weights); it checks its arguments
