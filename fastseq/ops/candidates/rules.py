"""The rules by which ``auto`` chooses the backend of ``candidates``, and the fast path that skips them."""

from torch import Tensor

from fastseq import _native
from fastseq.dispatch import Rule, takes_auto
from fastseq.ops.candidates import native
from fastseq.ops.candidates.spec import Candidates
from fastseq.ops.common.autograd import untracked
from fastseq.ops.common.checks import CPU_DTYPES

MOST_BY_INSERTION = 64  # candidates; the kernel keeps them sorted by insertion


def on_cpu(call) -> bool:
    return call.device == "cpu"


def eager(call) -> bool:
    return not call.compiling


def few_candidates(call) -> bool:
    return call.count <= MOST_BY_INSERTION


RULES = (
    Rule(
        "native",
        (on_cpu, eager, few_candidates),
        "one pass over the logits instead of log_softmax, mask and topk: 1.4 to 17 times as fast (V 45 to 30,000)",
        "docs/ops/candidates.md",
    ),
    Rule("torch", (), "no kernel of fastseq was measured faster here"),
)


def fast_candidates(
    logits: Tensor, count: int, scores: Tensor | None, forbidden: Tensor | None, last_resort: int
) -> Candidates | None:
    """The result of a plain call by ``native``, without call record and RULES; None for every other call.

    Plain: logits on the CPU, at most MOST_BY_INSERTION candidates, no gradient, trace or transform.
    ``test_the_fast_path_takes_the_backend_of_the_rules`` holds this to RULES.
    """
    plain = (
        count <= MOST_BY_INSERTION
        and logits.is_cpu
        and logits.dtype in CPU_DTYPES
        and takes_auto(None)
        and untracked()
        and _native.available()
    )
    return native.call(logits, scores, forbidden, last_resort, count) if plain else None
