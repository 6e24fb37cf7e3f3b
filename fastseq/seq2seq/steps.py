"""The state of a decoder between two steps, and the results of all steps of a target."""

from typing import NamedTuple

from torch import Tensor

from fastseq.ops.decoder.api import Packed


class DecoderState(NamedTuple):
    """The complete state of a decoder between two steps, immutable. N rows: one or several of each sentence."""

    h: Tensor  # (L, N, H)
    c: Tensor  # (L, N, H)
    feed: Tensor | None  # (N, H) last attentional vector; None without input feeding
    packed: Packed | None = None  # weights for later steps of many rows, opaque; renewed where a weight has changed
    coverage: Tensor | None = None  # (N, S) sum of the attention so far, float32 at least; None without coverage

    def index_select(self, rows: Tensor) -> "DecoderState":
        """The rows ``rows`` (M,), in that order, repeats allowed. Beam search reorders its hypotheses by it."""
        feed, coverage = (None if x is None else x.index_select(0, rows) for x in (self.feed, self.coverage))
        return DecoderState(self.h.index_select(1, rows), self.c.index_select(1, rows), feed, self.packed, coverage)


class Steps(NamedTuple):
    """The results of all steps of a target, dropout applied."""

    vectors: Tensor  # (B, T, H) inputs of the output projection
    attention: Tensor | None  # (B, T, S)
    state: DecoderState  # after the last step
    gate: Tensor | None = None  # (B, T): a step generates with probability sigmoid(gate); None without copying
    repeats: Tensor | None = None  # (B, T) sum over s of min(attention, coverage); None without coverage
