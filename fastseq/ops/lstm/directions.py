"""Lift a backend of single directions to a layer: concatenate results, add the gradients of shared inputs.

A backend with ``SINGLE_DIRECTION`` receives a ``Layer`` of one direction at a time (D = 1).
"""

from types import ModuleType

import torch
from torch import Tensor

from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Result, Want


def forward(implementation: ModuleType, layer: Layer, want: Want) -> Result:
    """``implementation.forward`` of all directions. Saved: the tensors of the first direction, then of the second."""
    directions = len(layer.weights)
    if directions == 1 or not getattr(implementation, "SINGLE_DIRECTION", False):
        return implementation.forward(layer, want)
    results = [implementation.forward(direction(layer, d), want) for d in range(directions)]
    output, h_n, c_n, cell_states, saved = zip(*results, strict=True)
    cell_states = torch.cat(cell_states, -1) if want.cell_states else None
    return Result(torch.cat(output, -1), torch.cat(h_n), torch.cat(c_n), cell_states, sum(saved, ()))


def backward(
    implementation: ModuleType, layer: Layer, saved: tuple[Tensor, ...], grads: Grads, needs: LayerGrads
) -> LayerGrads:
    """``implementation.backward`` of all directions."""
    directions = len(layer.weights)
    if directions == 1 or not getattr(implementation, "SINGLE_DIRECTION", False):
        return implementation.backward(layer, saved, grads, needs)
    count = len(saved) // directions
    of_directions = [
        implementation.backward(
            direction(layer, d),
            saved[d * count : (d + 1) * count],
            grads_of(grads, d, directions),
            needs._replace(weights=needs.weights[d : d + 1]),
        )
        for d in range(directions)
    ]
    inputs, h0, c0, weights = zip(*of_directions, strict=True)
    return LayerGrads(
        sum(inputs[1:], inputs[0]) if needs.input else None,
        torch.cat(h0) if needs.h0 else None,
        torch.cat(c0) if needs.c0 else None,
        sum(weights, ()),
    )


def direction(layer: Layer, d: int) -> Layer:
    """Direction ``d`` of a bidirectional layer, as a layer with D = 1."""
    states = {name: getattr(layer, name)[d : d + 1] for name in ("h0", "c0", "weights")}
    return layer._replace(**states, reverse=d == 1)


def grads_of(grads: Grads, d: int, directions: int) -> Grads:
    """The gradients of the results of direction ``d``."""
    output, h_n, c_n, cell_states = grads
    return Grads(
        None if output is None else output.chunk(directions, -1)[d],
        None if h_n is None else h_n[d : d + 1],
        None if c_n is None else c_n[d : d + 1],
        None if cell_states is None else cell_states.chunk(directions, -1)[d],
    )
