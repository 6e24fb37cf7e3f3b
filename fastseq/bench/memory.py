"""``fastseq bench --memory``: bytes that autograd keeps from a forward for its backward."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastseq.bench.timing import Setup, candidates


@dataclass(frozen=True)
class Saved:
    """Bytes that one candidate keeps, without inputs and parameters; ``ratio``: bytes of baseline / candidate."""

    candidate: str
    served_by: str
    bytes: int
    ratio: float


def saved_bytes(call: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that ``call`` saves for the backward and that belong to no tensor of ``given``.

    Saved outputs are counted, too: they stay alive with the graph.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # references, so that no address is reused

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    excluded = {t.untyped_storage().data_ptr() for t in given}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # alive until the storages are counted
    assert result is not None, "the call returned nothing"
    return sum(storage.nbytes() for address, storage in storages.items() if address not in excluded)


def measure_memory(setup: Setup, backends: tuple[str, ...]) -> tuple[list[Saved], list[str]]:
    """The main baseline first, then each backend that serves the case; and the refusals of the others."""
    entrants, remarks = candidates(setup, backends, train=True)
    counts = [saved_bytes(partial(c.call, **setup.arguments), setup.leaves(c.call).values()) for c in entrants]
    return [Saved(c.name, c.served_by, n, counts[0] / n) for c, n in zip(entrants, counts, strict=True)], remarks
