"""Copying of source tokens: the pointer-generator of See, Liu & Manning 2017, equations 8 and 9.

A step generates with probability p = sigmoid(gate), and copies otherwise:

    P(y) = p * softmax(logits)[y] + (1 - p) * sum of attention[s] over the positions s whose token is y.

The extended vocabulary has V + S tokens: V of the model, and one for each of the S source positions, by which a
sentence numbers the words that the target vocabulary lacks: V is its first such word, V + 1 its second. With
Z = logsumexp(logits) and m(y) the sum of attention above, P is the softmax of

    extended[y] = log(exp(logits[y]) + exp(Z - gate) * m(y)),    logits[y] = -inf for y >= V,

since (1 - p) / p = exp(-gate). So search, sampling and ensembles read extended logits as they read plain ones, and
only the columns that a source can copy differ from the plain ones.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.common.dtypes import accumulate_dtype

MINUS_INFINITY = float("-inf")


class Copies(NamedTuple):
    """The tokens that each source position can be copied to."""

    columns: Tensor  # (B, S) int64 in the extended vocabulary
    first: Tensor  # (B, S) int64, the first position of the sentence with the same column

    def index_select(self, rows: Tensor) -> "Copies":
        """The sentences ``rows`` (N,)."""
        return Copies(self.columns.index_select(0, rows), self.first.index_select(0, rows))

    def repeat_interleave(self, k: int) -> "Copies":
        """Each sentence k times in succession."""
        return Copies(self.columns.repeat_interleave(k, 0), self.first.repeat_interleave(k, 0))


def copies_of(columns: Tensor) -> Copies:
    """``Copies`` of columns (B, S)."""
    columns = columns.to(torch.int64)
    ordered, order = columns.sort(dim=1, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = torch.arange(columns.size(1), device=columns.device).expand_as(columns)
    group = places.where(begins, 0).cummax(1).values  # place of the first of its group
    return Copies(columns, torch.empty_like(columns).scatter_(1, order, order.gather(1, group)))


def gate_of(gate: Tensor, lengths: Tensor) -> Tensor:
    """gate (B, R) with inf, always to generate, for sources of length 0: they have nothing to copy. lengths (B,)."""
    return gate.to(accumulate_dtype(gate.dtype)).masked_fill((lengths == 0)[:, None], float("inf"))


def extended_logits(logits: Tensor, gate: Tensor, attention: Tensor, copies: Copies) -> Tensor:
    """logits (B, R, V), gate (B, R), attention (B, R, S) -> extended logits (B, R, V + S), float32 at least.

    R rows of each sentence. Weights below the smallest normal number of the dtype count as this number.
    """
    wide, (V, S) = accumulate_dtype(logits.dtype), (logits.size(-1), attention.size(-1))
    logits, attention = logits.to(wide), attention.to(wide)
    columns, first = (index[:, None].expand_as(attention) for index in copies)
    mass = torch.zeros_like(attention).scatter_add(-1, first, attention)
    peak = logits.logsumexp(-1, keepdim=True)
    extended = F.pad(logits, (0, S + 1), value=MINUS_INFINITY)  # the last column takes repeated positions
    copied = peak - gate[..., None] + _log(mass)
    copied = torch.logaddexp(extended.gather(-1, columns), copied)
    is_first = first == torch.arange(S, device=first.device)
    return extended.scatter(-1, columns.where(is_first, V + S), copied)[..., :-1]


def negative_log_probability(
    generated: Tensor, gate: Tensor, attention: Tensor, copies: Copies, labels: Tensor, vocab_size: int
) -> Tensor:
    """-log P(label), (B, T), without a tensor of the extended vocabulary.

    Args:
        generated: (B, T) -log softmax(logits)[label]; not read for labels from ``vocab_size`` on.
        gate: (B, T).
        attention: (B, T, S).
        copies: of the sources.
        labels: (B, T) in the extended vocabulary.
        vocab_size: V.
    """
    here = copies.columns[:, None] == labels[..., None]  # (B, T, S)
    mass = attention.to(gate.dtype).masked_fill(~here, 0.0).sum(-1)
    copied = (_log(mass) - gate).masked_fill(~here.any(-1), MINUS_INFINITY)
    generated = (-generated).masked_fill(labels >= vocab_size, MINUS_INFINITY)
    return F.softplus(-gate) - torch.logaddexp(generated, copied)


def _log(mass: Tensor) -> Tensor:
    """log of sums of attention; those that underflow count as the smallest normal number, with gradient 0."""
    return mass.clamp_min(torch.finfo(mass.dtype).tiny).log()
