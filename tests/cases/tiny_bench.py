"""Cases of ``fastseq bench`` that take no time, and a wrong result to plant in one."""

from dataclasses import replace

import torch

from fastseq import ops
from fastseq.bench.cases import BenchCase
from fastseq.testing.problems import modules

TINY = BenchCase("tiny", "lstm", 3, 2, 4, 5)
TINY_ATTENTION = BenchCase("tiny", "additive", 3, 2, 4, 4, keys=6)
TINY_LOSS = BenchCase("tiny", "loss", 1, 3, 4, 4, classes=50)


def tiny(kind):
    return replace({"additive": TINY_ATTENTION, "dot": TINY_ATTENTION, "loss": TINY_LOSS}.get(kind, TINY), kind=kind)


def plant(kind, train, monkeypatch):
    """Replace fastseq's module of this kind by one 0.1 % off: in its first output or, in training, its gradient."""
    of_kind = {"cell": "LSTMCell", "additive": "attention", "dot": "attention", "loss": "linear_cross_entropy"}
    name = of_kind.get(kind, "LSTM")
    place = ops if name.islower() else modules
    right = getattr(place, name)

    def bent(result):
        """The same nested result, its first tensor off by 0.1 %; in training, only the gradient of it."""
        if isinstance(result, torch.Tensor):
            return bent((result,))[0]
        first, *rest = result
        if hasattr(first, "batch_sizes"):
            return first._replace(data=bent((first.data,))[0]), *rest
        return (first + 1e-3 * (first - first.detach()) if train else first * 1.001), *rest

    if name.islower():
        monkeypatch.setattr(place, name, lambda *args, **kwargs: bent(right(*args, **kwargs)))
    else:

        class Wrong(right):
            def forward(self, *args, **kwargs):
                return bent(super().forward(*args, **kwargs))

        monkeypatch.setattr(place, name, Wrong)
