"""The records of the decoder op.

N rows, K of them for each of B sentences: row n belongs to sentence n // K. L layers, H hidden units, E embedding
columns, A query columns, P positions, D columns of the memory, V outputs; gate order i, f, g, o.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DecoderCall(NamedTuple):
    """The properties of steps of a decoder, for ``fastseq.explain``."""

    device: str
    dtype: torch.dtype
    steps: int
    rows: int
    hidden_size: int


class State(NamedTuple):
    """The state between two steps."""

    h: Tensor  # (L, N, H)
    c: Tensor  # (L, N, H)
    feed: Tensor | None  # (N, H) last attentional vector; None without input feeding


class Weights(NamedTuple):
    """The parameters of a decoder. The last seven are absent without attention, the last four for dot scores."""

    embedding: Tensor  # (V, E)
    output: Tensor | None  # (V, H); None: no logits
    output_bias: Tensor | None  # (V,)
    matrices: list[Tensor]  # per layer W_ih and W_hh: (4H, E) or (4H, E + H) with feeding, above (4H, H)
    biases: list[Tensor]  # per layer b_ih and b_hh (4H,)
    combine: Tensor | None = None  # (H, D + H) of [context, h]
    query: Tensor | None = None  # (A, H)
    query_bias: Tensor | None = None  # (A,)
    score: Tensor | None = None  # (A,)
    gain: Tensor | None = None  # (): the scores' weight is gain * score / ||score||


class Source(NamedTuple):
    """The attention's view of the sentences, read by every step."""

    keys: Tensor | None  # (B, P, A), projected
    memory: Tensor | None  # (B, P, D)
    lengths: Tensor | None  # (B,) int64
    prepared: Tensor | None  # of the keys, see ``fastseq.ops.attention.prepare_keys``
    scale: float


class Packed(NamedTuple):
    """Weights in the layout of the kernels, made once for many steps of many rows."""

    weights: Weights  # matrices, combine and query packed
    table: Tensor | None  # (V, 4H) embedding times its columns of W_ih, for small vocabularies
    output: Tensor | None  # packed; None until greedy decoding needs it
    made_from: tuple[Tensor, ...]
    versions: tuple[int, ...]


class Step(NamedTuple):
    """The results of one step."""

    vector: Tensor  # (N, H)
    logits: Tensor | None  # (N, V), if computed
    h: Tensor  # (L, N, H)
    c: Tensor  # (L, N, H)
    attention: Tensor | None  # (N, P), if wanted


class Search(NamedTuple):
    """The greedy choice of the next tokens, and when it ends."""

    limits: Tensor  # (N,) int64 steps after which a row is done
    done: Tensor  # (N,) bool: before the first step
    forbidden: Tensor  # (F,) int64 tokens that are not chosen; the last one is end_token
    early_steps: int  # in which end_token is forbidden
    end_token: int  # ends a row; allowed where all tokens are forbidden
    enough_done: int  # the steps end when this many rows are done
    steps: int  # at most


class Greedy(NamedTuple):
    """The results of R steps of greedy decoding."""

    tokens: Tensor  # (N, R)
    log_probs: Tensor  # (N, R)
    done: Tensor  # (N,) bool
    state: State


class Sequence(NamedTuple):
    """The inputs of T steps with input feeding."""

    gates: Tensor  # (T, N, 4H) the embeddings' part of the first layer's gates, bias included
    h0: Tensor  # (L, N, H)
    c0: Tensor  # (L, N, H)
    feed: Tensor  # (N, H) of the first step
    combine: Tensor  # (H, D + H) of [context, h]
    query: Tensor | None  # (A, H) of the additive score
    query_bias: Tensor | None  # (A,)
    score: Tensor | None  # (A,)
    keys: Tensor  # (B, P, A)
    memory: Tensor  # (B, P, D)
    masks: Tensor | None  # (L - 1, T, N, H) factors of the states between layers: dropout
    lengths: Tensor | None  # (B,) int64
    prepared: Tensor | None  # of the keys
    matrices: tuple[Tensor, ...]  # per layer W_ih and W_hh (4H, H); the first W_ih is that of the feed
    biases: tuple[Tensor, ...]  # per layer above the first b_ih and b_hh (4H,)
    scale: float

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in one tuple; :func:`sequence_of` is the inverse."""
        return (*self[:13], *self.matrices, *self.biases)

    def layers(self) -> int:
        """L."""
        return self.h0.shape[0]

    def rows_each(self) -> int:
        """K, 1 for an empty batch."""
        return self.h0.shape[1] // self.memory.shape[0] if len(self.memory) else 1


def sequence_of(tensors: tuple, layers: int, scale: float) -> Sequence:
    """The record of ``Sequence.tensors()``."""
    matrices, biases = tuple(tensors[13 : 13 + 2 * layers]), tuple(tensors[13 + 2 * layers :])
    return Sequence(*tensors[:13], matrices, biases, scale)


class Result(NamedTuple):
    """The results of T steps, and the tensors for ``backward``."""

    vectors: Tensor  # (T, N, H)
    attention: Tensor  # (T, N, P)
    h_n: Tensor  # (L, N, H)
    c_n: Tensor  # (L, N, H)
    saved: tuple[Tensor, ...]


class Grads(NamedTuple):
    """The gradients of the results; None where the loss does not depend on one."""

    vectors: Tensor | None
    attention: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
