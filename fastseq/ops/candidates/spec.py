"""The records of the candidates op: B sentences, K beams, N = B * K rows, V columns, F forbidden, C candidates."""

from typing import NamedTuple

import torch
from torch import Tensor


class CandidatesCall(NamedTuple):
    """The properties of one ``candidates`` call that decide its backend."""

    device: str
    dtype: torch.dtype
    count: int  # C
    compiling: bool = False
    device_index: int | None = None


class Rows(NamedTuple):
    """The input of a backend's ``run``."""

    logits: Tensor  # (N, V)
    scores: Tensor | None  # (B, K) float32 at least; None: zeros (N, 1)
    forbidden: Tensor | None  # (F,) or (N, F) int64; values outside 0..V-1 forbid nothing
    last_resort: int  # column that is allowed in a row where every column is forbidden; -1: none
    count: int  # C

    def mask(self) -> Tensor | None:
        """``forbidden_mask`` of the rows; None without forbidden columns."""
        if self.forbidden is None:
            return None
        return forbidden_mask(self.logits.size(1), self.forbidden, self.last_resort)


class Candidates(NamedTuple):
    """The C best continuations of each sentence, best first; of equals the one with the lowest (beam, token) first.

    NaN ranks above all numbers, as in torch's sorts. Places past the K * V continuations hold -inf, beam 0, token 0.
    """

    totals: Tensor  # (B, C) score + log-probability; float32 at least
    beams: Tensor  # (B, C) int64, the beam (0..K-1) that is continued
    tokens: Tensor  # (B, C) int64


def forbidden_mask(vocab_size: int, forbidden: Tensor, last_resort: int = -1) -> Tensor:
    """(N or 1, V) bool: the columns that may not be taken, from forbidden (N, F) or (F,) int64.

    Values outside 0..V-1 forbid nothing; ``last_resort`` is allowed in a row where every column is forbidden.
    """
    columns = torch.atleast_2d(forbidden)
    columns = columns.where((columns >= 0) & (columns < vocab_size), vocab_size)  # column V takes the others
    mask = columns.new_zeros(columns.size(0), vocab_size + 1, dtype=torch.bool)
    mask = mask.scatter_(1, columns, True)[:, :vocab_size]
    if 0 <= last_resort < vocab_size:
        mask[:, last_resort] &= ~mask.all(1)
    return mask
