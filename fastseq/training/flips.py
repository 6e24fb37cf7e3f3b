"""Swaps of source tokens, chosen by the gradient (HotFlip, Ebrahimi et al. 2018) or at random."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.batching import cut_by_tokens, make_batch
from fastseq.training.data import Sequences
from fastseq.training.tokenizer import EOS, UNK, TextTokenizer


def flipped(
    model: Seq2Seq,
    sources: Sequences,
    targets: Sequences,
    tokenizer: TextTokenizer,
    *,
    flips: int,
    generator: torch.Generator | None = None,
    max_tokens: int = 4096,
) -> Iterator[Sequences]:
    """The sources with 1, 2, ... ``flips`` tokens replaced, each position at most once, the end never.

    Each step takes the swap that raises the loss of the target most by its first order: token a at position s becomes
    b with the largest (e_b - e_a) . g_s, for embeddings e and the gradient g_s of the loss (greedy search). Reserved
    tokens and white space are not put in. A source without a position left stays as it is.

    Args:
        generator: draws position and token at random instead, as a control.
    """
    allowed = torch.tensor(
        [i > UNK and not name.isspace() for i, name in enumerate(tokenizer.tokens(range(len(tokenizer))))]
    )
    rows = [row[:n] for row, n in zip(*(x.tolist() for x in sources.padded(torch.arange(len(sources)))), strict=True)]
    done: list[set[int]] = [set() for _ in rows]
    order = sources.lengths.argsort(stable=True)
    longer = torch.maximum(sources.lengths, targets.lengths)[order]
    for _ in range(flips):
        current = Sequences(rows)
        rows = [list(row) for row in rows]
        for start, stop in cut_by_tokens(longer.tolist(), max_tokens):
            chosen = order[start:stop]
            batch = make_batch(current, targets, chosen, 0)
            free = torch.arange(batch.source.size(1)) < sources.lengths[chosen][:, None]  # (B, S)
            free &= batch.source != EOS
            for i, row in enumerate(chosen.tolist()):
                free[i, list(done[row])] = False
            if generator is None:
                gains = first_order_gains(model, batch).cpu()  # (B, S, V)
            else:
                gains = torch.rand(*batch.source.shape, len(allowed), generator=generator)
            gains.masked_fill_(~(free[..., None] & allowed), -torch.inf).scatter_(
                2, batch.source[..., None], -torch.inf
            )
            best, places = gains.flatten(1).max(1)
            for row, gain, place in zip(chosen.tolist(), best.tolist(), places.tolist(), strict=True):
                if gain > -torch.inf:
                    position, token = divmod(place, len(allowed))
                    rows[row][position] = token
                    done[row].add(position)
        yield Sequences(rows)


def first_order_gains(model: Seq2Seq, batch) -> Tensor:
    """(e_b - e_a) . g_s (B, S, V): by the first order, the gain in loss of each token b at each position s."""
    device = next(model.parameters()).device
    source, lengths, target_in, labels = (None if x is None else x.to(device) for x in batch[:4])
    vectors = model.source_vectors(source).detach().requires_grad_()
    loss = model.loss(source, lengths, target_in, labels, reduction="sum", source_vectors=vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    weight = model.encoder.embedding.weight.detach()
    return gradient @ weight.t() - (gradient * vectors.detach()).sum(-1, keepdim=True)
