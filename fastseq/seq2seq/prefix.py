"""Tokens with which a sequence must begin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.candidates.api import Candidates
from fastseq.seq2seq.options import MINUS_INFINITY
from fastseq.seq2seq.sampling import log_probs_of


class Prefix(NamedTuple):
    """The forced first tokens of b sentences."""

    tokens: Tensor  # (b, P) int64, pad after the end of each
    lengths: Tensor  # (b,) int64

    def index_select(self, places: Tensor) -> "Prefix":
        """The sentences at ``places`` (n,)."""
        return Prefix(self.tokens.index_select(0, places), self.lengths.index_select(0, places))

    def at(self, step: int, rows: int = 1) -> tuple[Tensor, Tensor]:
        """Of each of ``rows`` rows of a sentence: True if its token of this step is forced, and that token.

        Both (b * rows, 1); the token is pad where none is forced.
        """
        forced = torch.stack([(self.lengths > step).long(), self.tokens[:, step]], 1).repeat_interleave(rows, 0)
        return forced[:, :1].bool(), forced[:, 1:]


def read_prefix(given: Tensor | Sequence[Sequence[int]] | None, src: Tensor, config: Any) -> Prefix | None:
    """The prefixes as ``generate`` gets them; None if there are none. Raises ValueError for bad ones."""
    if given is None:
        return None
    sentences, device = src.shape[0], src.device
    if not isinstance(given, Tensor):
        rows = [list(row) for row in given]
        longest = max(map(len, rows), default=0)
        given = torch.tensor([row + [config.pad_id] * (longest - len(row)) for row in rows], dtype=torch.int64)
        given = given.view(len(rows), longest)
    if given.dim() != 2 or len(given) != sentences or given.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"generate: prefix_tokens must hold integer tokens of {sentences} sentences, ({sentences}, P) filled up "
            f"with pad, or a list of {sentences} lists; got {tuple(given.shape)} {given.dtype}."
        )
    tokens = given.to(device, torch.int64)
    lengths = (tokens != config.pad_id).sum(1)
    longest = int(lengths.max())
    if longest == 0:
        return None
    _check_ids(tokens, lengths, config, src.shape[1] if getattr(config, "copy", False) else 0)
    return Prefix(tokens[:, :longest], lengths)


def _check_ids(tokens: Tensor, lengths: Tensor, config: Any, copied: int) -> None:
    """Raise ValueError for pad within a prefix, for eos, and for ids outside the vocabulary, where that is known.

    copied: the tokens that a source adds to the vocabulary.
    """
    inside = torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]
    size = getattr(config, "tgt_vocab_size", torch.iinfo(torch.int32).max) + copied
    problems = {
        f"pad (id {config.pad_id}) before other tokens; pad only fills up the end": (tokens == config.pad_id) & inside,
        f"eos (id {config.eos_id}), which ends a sequence; leave it out": (tokens == config.eos_id) & inside,
        f"an id outside the target vocabulary of {size} tokens": (tokens < 0) | (tokens >= size),
    }
    for problem, where in problems.items():
        if where.any():
            raise ValueError(f"generate: prefix_tokens[{int(where.any(1).nonzero()[0, 0])}] holds {problem}.")


def force_candidates(best: Candidates, logits: Tensor, scores: Tensor | None, prefix: Prefix, step: int) -> Candidates:
    """``best`` (b, C), where a sentence whose token is forced has that one candidate, of its first beam.

    logits (N, V) and scores (b, K) or None are the arguments of ``candidates``. The other C - 1 candidates of such a
    sentence have the total -inf, so that its other beams stay free.
    """
    forced, tokens = prefix.at(step)  # (b, 1)
    first = log_probs_of(logits.unflatten(0, (len(tokens), -1))[:, 0], tokens)  # (b, 1)
    if scores is not None:
        first = first + scores[:, :1]
    totals = torch.cat([first, torch.full_like(best.totals[:, 1:], MINUS_INFINITY)], 1)
    return Candidates(
        totals.where(forced, best.totals), best.beams.masked_fill(forced, 0), tokens.where(forced, best.tokens)
    )
