"""A layer out of backends that run one direction at a time: results side by side, gradients of shared inputs added."""

from types import ModuleType

import torch
from torch import Tensor


class OneByOne:
    """``forward``, ``backward`` and ``run`` of a layer, from a module that has them for a single direction."""

    def __init__(self, module: ModuleType):
        self.module = module

    def forward(
        self, input, h0, c0, weights, lengths, batch_sizes, reverse, need_backward, need_cell_states
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Arguments and results as of ``native.forward``; saved: those of the directions, one after the other."""
        results = [
            self.module.forward(
                input, h0[d], c0[d], *own, lengths, batch_sizes, backwards, need_backward, need_cell_states
            )
            for d, (own, backwards) in enumerate(zip(weights, _reversed(weights, reverse), strict=True))
        ]
        outputs, h_n, c_n, cell_states, saved = zip(*results, strict=True)
        cell_states = _side_by_side(cell_states) if need_cell_states else None
        return _side_by_side(outputs), torch.stack(h_n), torch.stack(c_n), cell_states, sum(saved, ())

    def backward(
        self,
        grad_output,
        grad_h_n,
        grad_c_n,
        grad_cell_states,
        input,
        h0,
        c0,
        weights,
        saved,
        lengths,
        batch_sizes,
        reverse,
        needs,
    ) -> tuple[Tensor | None, ...]:
        """Arguments and results as of ``native.backward``."""
        need_shared, need_weights = needs[:3], needs[3:]
        per_direction, found = len(saved) // len(weights), []
        outputs, cells = _split(grad_output, len(weights)), _split(grad_cell_states, len(weights))
        for d, (own, backwards) in enumerate(zip(weights, _reversed(weights, reverse), strict=True)):
            found.append(
                self.module.backward(
                    outputs[d],
                    None if grad_h_n is None else grad_h_n[d],
                    None if grad_c_n is None else grad_c_n[d],
                    cells[d],
                    input,
                    h0[d],
                    c0[d],
                    *own,
                    saved[d * per_direction : (d + 1) * per_direction],
                    lengths,
                    batch_sizes,
                    backwards,
                    (*need_shared, *need_weights[d * len(own) : (d + 1) * len(own)]),
                )
            )
        inputs, h0, c0 = ([grads[k] for grads in found] for k in range(3))
        grad_input = sum(inputs[1:], inputs[0]) if need_shared[0] else None
        grad_h0, grad_c0 = (torch.stack(x) if need else None for x, need in zip((h0, c0), need_shared[1:], strict=True))
        return (grad_input, grad_h0, grad_c0, *(g for grads in found for g in grads[3:]))

    def run(self, input, h0, c0, weights, lengths, batch_sizes, reverse) -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n, c_n of a backend that brings its own autograd."""
        results = [
            self.module.run(input, h0[d], c0[d], *own, lengths, batch_sizes, backwards)
            for d, (own, backwards) in enumerate(zip(weights, _reversed(weights, reverse), strict=True))
        ]
        outputs, h_n, c_n = zip(*results, strict=True)
        return _side_by_side(outputs), torch.stack(h_n), torch.stack(c_n)


def one_by_one(module: ModuleType) -> OneByOne:
    """A layer-wise view of a backend of single directions."""
    return OneByOne(module)


def _reversed(weights: list, reverse: bool) -> tuple[bool, ...]:
    return (False, True) if len(weights) == 2 else (reverse,)


def _side_by_side(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1)


def _split(t: Tensor | None, parts: int) -> tuple[Tensor | None, ...]:
    return (None,) * parts if t is None else t.chunk(parts, dim=-1)
