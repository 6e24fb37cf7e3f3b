"""Steps of a decoder as one operator: T steps with gradients, or one without. Served by ``fastseq.Seq2Seq``."""

from torch import Tensor

from fastseq.ops.decoder.function import apply
from fastseq.ops.decoder.rules import explain_steps, fast_greedy, fast_step, one_operator, one_sequence
from fastseq.ops.decoder.spec import Greedy, Packed, Search, Sequence, Source, State, Step, Weights

__all__ = [
    "Greedy",
    "Packed",
    "Search",
    "Sequence",
    "Source",
    "State",
    "Step",
    "Weights",
    "decoder",
    "explain_steps",
    "greedy",
    "one_operator",
    "one_sequence",
    "step",
]


def decoder(sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T steps with input feeding (Luong et al. 2015, section 3.3) in one operator, differentiable twice.

    Args:
        sequence: see ``fastseq.ops.decoder.spec``; float32 or float64 on the CPU.

    Returns:
        vectors (T, N, H), attention weights (T, N, P), h_n and c_n (L, N, H).

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    return apply(sequence)


def step(
    tokens: Tensor, state: State, weights: Weights, source: Source, packed: Packed | None, need_weights: bool
) -> tuple[Step, Packed | None]:
    """One step of N rows, K of them for each of B sentences.

    Args:
        tokens: (N,) integers.
        state, weights, source: see ``fastseq.ops.decoder.spec``; float32 or float64 on the CPU.
        packed: from the step before, or None.
        need_weights: return the attention weights, too.

    Returns:
        The results, and the packed weights for the next step; None for a skinny batch, which reads them in place.

    Raises:
        RuntimeError: shapes or dtypes that do not fit; token ids outside the vocabulary.
    """
    return fast_step(tokens, state, weights, source, packed, need_weights)


def greedy(
    tokens: Tensor, state: State, weights: Weights, source: Source, packed: Packed | None, search: Search
) -> tuple[Greedy, Packed | None]:
    """Greedy decoding, one row a sentence: each step continues with the most likely token.

    Args:
        tokens: (N,) integers.
        state, weights, source, search: see ``fastseq.ops.decoder.spec``; ``weights`` with an output projection.
        packed: from the steps before, or None.

    Returns:
        The tokens of R steps, 1 <= R <= ``search.steps``, their log-probabilities, which rows are done, and the state;
        the packed weights for later steps, None for a skinny batch.

    Raises:
        RuntimeError: shapes or dtypes that do not fit; token ids outside the vocabulary.
    """
    return fast_greedy(tokens, state, weights, source, packed, search)
