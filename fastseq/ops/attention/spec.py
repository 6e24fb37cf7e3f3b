"""The record of the attention op that rules and backends read."""

from typing import NamedTuple

import torch


class AttentionCall(NamedTuple):
    """The facts of one ``attention`` call that decide its backend; ``score`` is "dot" or "additive".

    ``batch``, ``steps`` and ``positions`` are B, T and S, None while a graph is traced: dynamic. ``prepared``: the keys
    were prepared.
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
