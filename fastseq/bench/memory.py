"""``fastseq bench --memory``: what a forward keeps for its backward, as autograd sees it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastseq.bench.cases import tensors_of
from fastseq.bench.timing import Problem, candidates


@dataclass(frozen=True)
class Saved:
    """Bytes that one candidate keeps, without inputs and parameters; ``ratio`` = the peer's bytes / its own."""

    candidate: str
    served_by: str
    bytes: int
    ratio: float


def saved_bytes(call: Callable[[], object], given: list[Tensor]) -> int:
    """Bytes of the distinct storages that ``call`` saves for the backward and that belong to no tensor of ``given``.

    What a result needs anyway is counted, too: outputs that are saved stay alive with the graph.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    known = {t.untyped_storage().data_ptr() for t in given}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert tensors_of(result), "the call returned no tensors"
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


def measure_memory(problem: Problem, backends: tuple[str, ...]) -> tuple[list[Saved], list[str]]:
    """The main peer first, then each backend that serves the case; and the refusals of the others."""
    found, remarks = candidates(problem, backends, train=True)
    counts = []
    for candidate in found:
        given = [*tensors_of(tuple(problem.inputs.values())), *candidate.module.parameters()]
        counts.append(saved_bytes(lambda c=candidate: c.module(**problem.inputs), given))
    return [Saved(c.name, c.served_by, n, counts[0] / n) for c, n in zip(found, counts, strict=True)], remarks
