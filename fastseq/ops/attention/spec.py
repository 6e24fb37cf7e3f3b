"""The records of attention: the call that rules and backends read, and the tensors that pass between them.

B sentences, T query steps, S positions, A the size of queries and keys, D the size of values.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionCall(NamedTuple):
    """The properties of one ``attention`` call that decide its backend.

    ``score`` is "dot" or "additive"; "general" and "normed_additive" reduce to these. ``batch``, ``steps`` and
    ``positions`` are B, T and S, None while a graph is traced (dynamic); ``size`` is A. ``prepared``: the keys carry
    prepared data. ``device_index``: the GPU's index, None for the current one.
    """

    score: str
    device: str
    dtype: torch.dtype
    need_weights: bool = False
    requires_grad: bool = False
    padded: bool = False
    prepared: bool = False
    batch: int | None = None
    steps: int | None = None
    positions: int | None = None
    compiling: bool = False
    device_index: int | None = None
    size: int | None = None
    coverage: bool = False  # the additive score has the term of coverage


class Inputs(NamedTuple):
    """The inputs of a backend: the dot score without ``weight``, the additive score with it."""

    query: Tensor  # (B, T, A)
    keys: Tensor  # (B, S, A)
    values: Tensor  # (B, S, D)
    weight: Tensor | None  # (A,) v of the additive score
    bias: Tensor | None  # (A,) added inside its tanh
    lengths: Tensor | None  # (B,) integers
    mask: Tensor | None  # (B, 1 or T, S) bool, True = attend; None if there are lengths
    prepared: Tensor | None  # ``Prepared.data``, read by the backend that made it and ignored by the others
    scale: float  # factor of the scores
    coverage: Tensor | None = None  # (B, T, S) of the additive score: adds coverage * coverage_weight inside its tanh
    coverage_weight: Tensor | None = None  # (A,)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields but ``scale``; :func:`inputs_of` is the inverse."""
        return *self.differentiable(), *self[5:8]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The fields that may require gradients, in the order of ``InputGrads``."""
        return *self[:5], self.coverage, self.coverage_weight


def inputs_of(tensors: tuple, scale: float) -> Inputs:
    """The record of ``Inputs.tensors()``."""
    return Inputs(*tensors[:5], *tensors[7:10], scale, *tensors[5:7])


class Want(NamedTuple):
    """The results to compute besides the context."""

    weights: bool
    backward: bool  # save the tensors that ``backward`` reads


CONTEXT = Want(weights=False, backward=False)  # built once, since one step is short
CONTEXT_AND_WEIGHTS = Want(weights=True, backward=False)


class Result(NamedTuple):
    """The results of a forward."""

    context: Tensor  # (B, T, D)
    weights: Tensor | None  # (B, T, S), if wanted
    saved: tuple[Tensor, ...]  # empty unless ``Want.backward``


class Grads(NamedTuple):
    """Gradients of the results."""

    context: Tensor  # (B, T, D)
    weights: Tensor | None  # (B, T, S)


class InputGrads(NamedTuple):
    """Gradients of the inputs, None where not needed; as the argument ``needs``: one bool each."""

    query: Tensor | None  # (B, T, A)
    keys: Tensor | None  # (B, S, A)
    values: Tensor | None  # (B, S, D)
    weight: Tensor | None  # (A,)
    bias: Tensor | None  # (A,)
    coverage: Tensor | None = None  # (B, T, S)
    coverage_weight: Tensor | None = None  # (A,)


class Prepared(NamedTuple):
    """The terms of the additive score that depend on the keys alone, computed once for many steps."""

    data: Tensor  # (B, S, ...) in the layout of the backend that made it
    version: int  # version counter of the keys at that time; -1 for inference tensors


class Keys(NamedTuple):
    """Projected keys for many calls of attention; made by :meth:`fastseq.Attention.project_keys`.

    Immutable. Keys that were changed in place after they were prepared are refused, unless torch does not count the
    change (writes through ``.data``, changes of inference tensors).
    """

    projected: Tensor  # (B, S, A)
    prepared: Prepared | None = None

    def prepared_data(self) -> Tensor | None:
        """``prepared.data``, or None; ValueError if the keys were changed in place after it was computed."""
        if self.prepared is None:
            return None
        if self.prepared.version != version(self.projected):
            raise ValueError("attention: the keys were changed in place after they were prepared; project them again")
        return self.prepared.data

    def index_select(self, rows: Tensor) -> "Keys":
        """The sentences ``rows`` (N,), in that order, repeats allowed."""
        return self._of(self.projected.index_select(0, rows), lambda data: data.index_select(0, rows))

    def repeat_interleave(self, k: int) -> "Keys":
        """Each sentence k times in succession: 0 0 1 1 2 2 for k = 2."""
        return self._of(self.projected.repeat_interleave(k, 0), lambda data: data.repeat_interleave(k, 0))

    def _of(self, projected: Tensor, select) -> "Keys":
        data = self.prepared_data()
        return Keys(projected, None if data is None else Prepared(select(data), version(projected)))


def version(x: Tensor) -> int:
    """The counter of changes in place; -1 for inference tensors, which have none."""
    return -1 if x.is_inference() else x._version
