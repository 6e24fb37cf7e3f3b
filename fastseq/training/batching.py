"""Batches limited by tokens, identical for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.data import Sequences
from fastseq.training.tokenizer import BOS, PAD

WINDOW = 1 << 20  # examples that are ordered by length together
BLOCK = 1 << 14  # successive examples that stay in one window


class Batch(NamedTuple):
    """One process's share of the examples of one update."""

    source: Tensor  # (B, S) int64, closed by eos, padded; or features (B, S, F) float32
    source_lengths: Tensor | None  # (B,) int64; None where all are S, which skips packing
    target_in: Tensor  # (B, T) int64, opened by bos
    labels: Tensor  # (B, T) int64, closed by eos, padded
    update_tokens: int  # labels without padding in the whole update: all processes and accumulated batches together


def cut_by_tokens(lengths: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cut a list of lengths into slices (start, stop) of at most `max_tokens` tokens when padded to the longest.

    A sequence that is longer than `max_tokens` gets a slice of its own.
    """
    slices = []
    start, longest = 0, 0
    for stop, length in enumerate(lengths):
        longest = max(longest, length)
        if stop > start and (stop + 1 - start) * longest > max_tokens:
            slices.append((start, stop))
            start, longest = stop, length
    return [*slices, (start, len(lengths))] if lengths else []


def make_batch(source: Sequences, target: Sequences, rows: Tensor, update_tokens: int) -> Batch:
    """Pad the examples `rows` (B,). Without rows the batch holds one example without labels, which has no loss."""
    if len(rows) == 0:
        token = torch.ones(1, 1, dtype=torch.int64)
        return Batch(source.filler(), None, token * BOS, token * PAD, update_tokens)
    tokens, lengths = source.padded(rows)
    full = int(lengths.min()) == tokens.shape[1]
    labels, _ = target.padded(rows)
    target_in = torch.cat([labels.new_full((len(rows), 1), BOS), labels[:, :-1]], dim=1)
    return Batch(tokens, None if full else lengths, target_in, labels, update_tokens)


class Window(NamedTuple):
    """Examples that are ordered by length together: some blocks of `BLOCK` successive examples."""

    blocks: list[int]
    examples: int  # of all windows

    def rows(self) -> Tensor:
        """The numbers (n,) of its examples."""
        ends = ((block * BLOCK, min((block + 1) * BLOCK, self.examples)) for block in self.blocks)
        return torch.cat([torch.arange(start, stop) for start, stop in ends])


def windows(examples: int, seed: int) -> list[Window]:
    """Split the examples into windows of at most `WINDOW`: their blocks are drawn at random, and kept in order."""
    blocks = torch.arange(-(-examples // BLOCK))
    if examples > WINDOW:
        blocks = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [Window(sorted(part.tolist()), examples) for part in blocks.split(WINDOW // BLOCK)]


class TokenBatches:
    """The batches of one process, epoch by epoch; Lightning takes it as a data loader.

    All processes plan the same updates of at most `max_tokens * world_size * accumulate` tokens (padding included,
    counted on the longer side), and each takes every (world_size * accumulate)-th example of an update. So `accumulate`
    batches on each of `world_size` processes hold together exactly what one process would take with `max_tokens` larger
    by that factor. Every process has the same number of batches; a share exceeds `max_tokens` by at most one example.

    Examples are ordered by source length, then by target length, so that little is padded. With `shuffle` they are in
    random order where both are equal, and updates come in random order; this depends on `seed` and the epoch alone, and
    every epoch has the same number of batches.

    An epoch is a pass over the data, or `every` updates: then the next one goes on where it ended, into further passes.

    More than `WINDOW` examples are ordered in windows, which hold blocks of successive examples from all over the file
    and come one after the other, in random order too: memory does not grow with the file.
    """

    def __init__(
        self,
        source: Sequences,
        target: Sequences,
        *,
        max_tokens: int,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        every: int | None = None,
    ) -> None:
        self.source, self.target = source, target
        self.world_size, self.rank, self.accumulate = world_size, rank, accumulate
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self._update_tokens = max_tokens * world_size * accumulate
        self._windows = windows(len(source), seed)
        self._sizes = [len(self._plan(number)[2]) for number in range(len(self._windows))]  # updates of each window
        self.updates_per_pass = sum(self._sizes)
        self._updates = every or self.updates_per_pass
        self._done = 0  # batches of this epoch that were handed out
        self.make_batch = make_batch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration follow the order of `epoch`, from its first batch."""
        self.epoch, self._done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches handed out; Lightning puts it into checkpoints."""
        return {"epoch": self.epoch, "done": self._done, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration continue where `state` was taken; raises UserError if epochs are cut otherwise now."""
        if state["batches"] != len(self):
            raise UserError(
                f"the checkpoint is from within an epoch of {state['batches']} batches, now an epoch has {len(self)}; "
                "resume with the same training file and the same number of processes"
            )
        self.epoch, self._done = state["epoch"], state["done"]

    def __len__(self) -> int:
        return self._updates * self.accumulate

    def _plan(self, window: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Examples of a window (n,), the key (n,) that orders them by length, and updates as slices of that order."""
        rows = self._windows[window].rows()
        source, target = self.source.lengths_of(rows), self.target.lengths_of(rows)
        key = source * (int(target.max()) + 1) + target
        longer = torch.maximum(source, target)[key.argsort()]
        return rows, key, cut_by_tokens(longer.tolist(), self._update_tokens)

    def updates(self, skip: int = 0) -> Iterator[Tensor]:
        """The examples of the updates from this epoch on, after the first `skip`, for all processes together."""
        number, skip = divmod(self.epoch * self._updates + skip, self.updates_per_pass)
        while True:
            yield from self._pass(number, skip)
            number, skip = number + 1, 0

    def _pass(self, data_pass: int, skip: int) -> Iterator[Tensor]:
        """The examples of the updates of one pass over the data, after the first `skip`."""
        numbers = list(range(len(self._windows)))
        if self.shuffle and len(numbers) > 1:
            random = torch.Generator().manual_seed(self.seed + 1_000_003 * data_pass)
            numbers = torch.randperm(len(numbers), generator=random).tolist()
        for number in numbers:
            if skip >= self._sizes[number]:
                skip -= self._sizes[number]
                continue
            rows, key, slices = self._plan(number)
            if self.shuffle:
                random = torch.Generator().manual_seed(self.seed + 1_000_003 * data_pass + 7_919 * number)
                order = torch.randperm(len(rows), generator=random)
                order = order[key[order].argsort(stable=True)]
                turns = torch.randperm(len(slices), generator=random).tolist()
            else:
                order, turns = key.argsort(stable=True), range(len(slices))
            for turn in turns[skip:]:
                yield rows[order[slice(*slices[turn])]]
            skip = 0

    def __iter__(self) -> Iterator[Batch]:
        shares = self.world_size * self.accumulate
        done = self._done
        updates = self.updates(done // self.accumulate)
        for number in range(done, len(self)):
            if number == done or number % self.accumulate == 0:
                rows = next(updates)
            share = number % self.accumulate * self.world_size + self.rank
            self._done = (number + 1) % len(self)
            update_tokens = int(self.target.lengths_of(rows).sum())
            yield self.make_batch(self.source, self.target, rows[share::shares], update_tokens)
