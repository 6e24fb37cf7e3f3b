"""Swaps of source tokens, chosen by the gradient (HotFlip, Ebrahimi et al. 2018) or at random."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.batching import Batch, cut_by_tokens, make_batch
from fastseq.training.data import Sequences
from fastseq.training.tokenizer import EOS, UNK, TextTokenizer

CANDIDATES = 32  # swaps of a source whose exact loss is computed


def flipped(
    model: Seq2Seq,
    sources: Sequences,
    targets: Sequences,
    tokenizer: TextTokenizer,
    *,
    flips: int,
    generator: torch.Generator | None = None,
    candidates: int = CANDIDATES,
    max_tokens: int = 4096,
) -> Iterator[Sequences]:
    """The sources with 1, 2, ... ``flips`` tokens replaced, each position at most once, the end never.

    Each step chooses ``candidates`` swaps, as many of each position, that promise the largest loss of the target by its
    first order: token a at position s becomes b with a large (e_b - e_a) . g_s, for embeddings e and the gradient g_s
    of the loss. It takes the one of them whose exact loss is the largest: the distance of two embeddings is too long
    for the first order alone. Reserved tokens and white space are not put in. A source without a position left stays
    as it is.

    Args:
        generator: draws position and token at random instead, as a control.
        candidates: 1 for the first order alone.
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
            count = 1 if generator else min(candidates, gains[0].numel())
            best, places = _spread(gains, count).flatten(1).topk(count)  # (B, C)
            positions, tokens = places // len(allowed), places % len(allowed)
            take = torch.zeros(len(chosen), 1, dtype=torch.long)
            if places.size(1) > 1:
                losses = exact_losses(model, batch, positions, tokens)
                take = losses.masked_fill(best == -torch.inf, -torch.inf).argmax(1, keepdim=True)
            found = (x.gather(1, take)[:, 0].tolist() for x in (best, positions, tokens))
            for row, gain, position, token in zip(chosen.tolist(), *found, strict=True):
                if gain > -torch.inf:
                    rows[row][position] = token
                    done[row].add(position)
        yield Sequences(rows)


def first_order_gains(model: Seq2Seq, batch: Batch) -> Tensor:
    """(e_b - e_a) . g_s (B, S, V): by the first order, the gain in loss of each token b at each position s."""
    device = next(model.parameters()).device
    source, lengths, target_in, labels = (None if x is None else x.to(device) for x in batch[:4])
    vectors = model.source_vectors(source).detach().requires_grad_()
    loss = model.loss(source, lengths, target_in, labels, reduction="sum", source_vectors=vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    weight = model.encoder.embedding.weight.detach()
    return gradient @ weight.t() - (gradient * vectors.detach()).sum(-1, keepdim=True)


def _spread(gains: Tensor, count: int) -> Tensor:
    """gains (B, S, V) with -inf but for the best count / S tokens of each position: the first order prefers few."""
    if count == 1:
        return gains
    kept = gains.topk(max(1, min(count // gains.size(1), gains.size(2))), dim=2)
    return torch.full_like(gains, -torch.inf).scatter(2, kept.indices, kept.values)


def exact_losses(model: Seq2Seq, batch: Batch, positions: Tensor, tokens: Tensor) -> Tensor:
    """The loss of each target (B, C) once the source has ``tokens`` (B, C) at ``positions`` (B, C), one at a time."""
    device = next(model.parameters()).device
    lengths, target_in, labels = (None if x is None else x.to(device) for x in batch[1:4])
    columns = []
    for position, token in zip(positions.unbind(1), tokens.unbind(1), strict=True):
        source = batch.source.scatter(1, position[:, None], token[:, None]).to(device)
        with torch.no_grad():
            columns.append(model.loss(source, lengths, target_in, labels, reduction="none").sum(1).cpu())
    return torch.stack(columns, 1)
