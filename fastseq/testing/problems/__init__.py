"""One description of each computation, in fastseq and in plain torch, for tests, ``fastseq bench`` and ``parity``.

A function per op (ops.py) and per module (modules.py) draws a :class:`Problem`. Plain torch runs in any dtype: in
float64 it is the oracle, in the dtype under test it is the baseline.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Leaves = dict[str, Tensor]
Draw = Callable[..., Tensor]  # sizes -> standard normal values


class Problem(NamedTuple):
    """One computation, on drawn tensors.

    Attributes:
        inputs: the differentiable arguments by name, in the dtype of the draw.
        make: (backend, or None for plain torch; dtype) -> the function or module to call.
        arguments: leaves -> keyword arguments of the call; lengths, masks and tokens follow the leaves' device.
        named: the call's return value -> its tensors by name.
    """

    inputs: Leaves
    make: Callable[[str | None, torch.dtype], Callable[..., object]]
    arguments: Callable[[Leaves], dict[str, object]]
    named: Callable[[object], Leaves]

    def draw_leaves(self, draw: Draw) -> Leaves:
        """The inputs, and values for a module's parameters, scaled so that sums over a row are of order 1."""
        parameters = parameters_of(self.make(None, torch.float64))
        return self.inputs | {
            name: draw(*p.shape) / (p.shape[-1] if p.dim() else 1) ** 0.5 for name, p in parameters.items()
        }

    def run(self, leaves: Leaves, backend: str | None) -> Leaves:
        """Call fastseq on ``backend``, or plain torch for None -> results by name. The leaves' dtype is the call's."""
        call = self.make(backend, next(iter(leaves.values())).dtype)
        parameters = {name: leaves[name] for name in parameters_of(call)}
        arguments = self.arguments(leaves)
        return self.named(functional_call(call, parameters, (), arguments) if parameters else call(**arguments))


def parameters_of(call: Callable[..., object]) -> dict[str, nn.Parameter]:
    """A module's parameters by name; a function has none."""
    return dict(call.named_parameters()) if isinstance(call, nn.Module) else {}


def uneven_lengths(steps: int, batch: int, with_zero: bool) -> Tensor:
    """Lengths (B,): T, T - 1, ..., sorted for packing; ``with_zero``: the first one becomes 0 if B > 1."""
    lengths = torch.tensor([max(1, steps - b) for b in range(batch)])
    if with_zero and batch > 1:
        lengths = lengths.roll(1)
        lengths[0] = 0
    return lengths
