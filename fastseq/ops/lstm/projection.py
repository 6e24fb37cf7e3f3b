"""Lift a backend whose kernels have no projection: fold W_hr into W_hh.

m_t = o_t tanh(c_t) and h_t = W_hr m_t give W_hh h_{t-1} = (W_hh W_hr) m_{t-1}: the recurrence of a plain LSTM over m,
whose weight is W = W_hh W_hr (4H, H). One product over all steps makes every h_t. The initial h_0 has no m_0: m_0 is 0,
and W_hh h_0 comes by the input, which has P further columns for each direction: h_0 at its first step, else 0.

A backend asks for it by ``fold_product(layer)``: the product to fold with, or None if its kernels project.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.ops.common import layout
from fastseq.ops.lstm import directions
from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Result, Want, Weights


def folds(implementation: ModuleType, layer: Layer) -> bool:
    """True if the layer has a projection that the backend's kernels lack."""
    return layer.weights[0].hr is not None and _product(implementation, layer) is not None


def _product(implementation: ModuleType, layer: Layer) -> Callable[..., Tensor] | None:
    return implementation.fold_product(layer) if hasattr(implementation, "fold_product") else None


class Folded(NamedTuple):
    """A layer over m, padded, and what leads back to the layer over h."""

    layer: Layer  # input (T, B, I + D * P), or (T, B, I) if h_0 is zero; W_hh of each direction (4H, H)
    starts: tuple[Tensor, ...]  # bool (T, B or 1, 1) of each direction, True at its first step; () if h_0 is zero


def forward(implementation: ModuleType, layer: Layer, want: Want) -> Result:
    """Saved: the tensors of the backend, m (T, B, D * H), m_n (D, B, H) and W (4H, H) of each direction."""
    product, weights = _product(implementation, layer), layer.weights
    folded = _fold(layer, tuple(product(w.hh, w.hr) for w in weights))
    result = directions.forward(implementation, folded.layer, want)
    of_directions = zip(result.output.chunk(len(weights), -1), weights, strict=True)
    output = torch.cat([_rows(product, m, w.hr, transpose_b=True) for m, w in of_directions], -1)
    h_n = torch.stack([product(m_n, w.hr, transpose_b=True) for m_n, w in zip(result.h_n, weights, strict=True)])
    if folded.starts and layer.lengths is not None:
        h_n = torch.where((layer.lengths == 0).unsqueeze(-1), layer.h0, h_n)
    cell_states = result.cell_states
    if layer.batch_sizes is not None:
        output = layout.pack(output, layer.batch_sizes)
        cell_states = layout.pack(cell_states, layer.batch_sizes) if want.cell_states else None
    weights_hh = (w.hh for w in folded.layer.weights)
    saved = (*result.saved, result.output, result.h_n, *weights_hh) if want.backward else ()
    return Result(output, h_n, result.c_n, cell_states, saved)


def backward(
    implementation: ModuleType, layer: Layer, saved: tuple[Tensor, ...], grads: Grads, needs: LayerGrads
) -> LayerGrads:
    """The backward over m, between the products of the projection."""
    product, weights, count = _product(implementation, layer), layer.weights, len(layer.weights)
    saved, (m, m_n, *weights_hh) = saved[: -2 - count], saved[-2 - count :]
    folded = _fold(layer, tuple(weights_hh))
    grad_output, grad_cell_states = (_padded(g, layer) for g in (grads.output, grads.cell_states))
    # None of a result without gradient; of the others one for each direction, (T, B, P) and (B, P).
    of_output = [None] * count if grad_output is None else grad_output.chunk(count, -1)
    of_h_n = [None] * count if grads.h_n is None else list(grads.h_n)
    to_m = None if grad_output is None else [_rows(product, g, w.hr) for g, w in zip(of_output, weights, strict=True)]
    to_m_n = None if grads.h_n is None else [product(g, w.hr) for g, w in zip(of_h_n, weights, strict=True)]
    over_m = directions.backward(
        implementation,
        folded.layer,
        saved,
        Grads(
            None if to_m is None else torch.cat(to_m, -1),
            None if to_m_n is None else torch.stack(to_m_n),
            grads.c_n,
            grad_cell_states,
        ),
        _needs_over_m(needs, bool(folded.starts)),
    )
    grad_weights = []
    for d, (m_d, w, wanted, grad) in enumerate(
        zip(m.chunk(count, -1), weights, needs.weights, over_m.weights, strict=True)
    ):
        grad_ih, grad_hh, grad_hr = grad.ih, None, None
        if folded.starts and grad_ih is not None:
            grad_ih, *of_columns = grad_ih.split([layer.input.size(-1)] + [w.hh.size(1)] * count, -1)
        if wanted.hh:
            grad_hh = product(grad.hh, w.hr, transpose_b=True)
            grad_hh = grad_hh + of_columns[d] if folded.starts else grad_hh
        if wanted.hr:
            grad_hr = product(w.hh, grad.hh, transpose_a=True)
            if of_output[d] is not None:
                grad_hr = grad_hr + product(of_output[d].flatten(0, 1), m_d.flatten(0, 1), transpose_a=True)
            if of_h_n[d] is not None:  # rows of length 0: m_n is 0
                grad_hr = grad_hr + product(of_h_n[d], m_n[d], transpose_a=True)
        grad_weights.append(Weights(grad_ih if wanted.ih else None, grad_hh, grad.bias_ih, grad.bias_hh, grad_hr))
    grad_input, grad_h0 = over_m.input, None
    if folded.starts and grad_input is not None:
        grad_input, *of_columns = grad_input.split([layer.input.size(-1)] + [layer.h0.size(-1)] * count, -1)
        grad_h0 = _grad_h0(of_columns, folded.starts, grads.h_n, layer.lengths) if needs.h0 else None
    if needs.input and layer.batch_sizes is not None:
        grad_input = layout.pack(grad_input, layer.batch_sizes)
    return LayerGrads(grad_input if needs.input else None, grad_h0, over_m.c0, tuple(grad_weights))


def _grad_h0(of_columns: list[Tensor], starts: tuple[Tensor, ...], grad_h_n: Tensor | None, lengths: Tensor | None):
    """(D, B, P) from the gradients of the columns (T, B, P) of each direction."""
    grad_h0 = torch.stack([torch.where(s, g, 0).sum(0) for s, g in zip(starts, of_columns, strict=True)])
    if grad_h_n is None or lengths is None:
        return grad_h0
    return torch.where((lengths == 0).unsqueeze(-1), grad_h_n, grad_h0)  # without a step h_n is h_0


def _fold(layer: Layer, weights_hh: tuple[Tensor, ...]) -> Folded:
    """The layer over m. weights_hh: W (4H, H) of each direction."""
    input, lengths = layer.input, layer.lengths
    if layer.batch_sizes is not None:
        input, lengths = layout.pad(input, layer.batch_sizes)
    starts, of_input = (), [w.ih for w in layer.weights]
    if not layer.zero_h0:
        count, steps = len(layer.weights), input.size(0)
        starts = tuple(_first_step(lengths, steps, layer.reverse or d == 1, input.device) for d in range(count))
        columns = (torch.where(start, h0, 0) for start, h0 in zip(starts, layer.h0, strict=True))
        input = torch.cat((input, *columns), -1)
        zeros = torch.zeros_like(layer.weights[0].hh)
        of_input = [
            torch.cat((w.ih, *(w.hh if k == d else zeros for k in range(count))), -1)
            for d, w in enumerate(layer.weights)
        ]
    weights = tuple(
        w._replace(ih=ih, hh=hh, hr=None) for w, ih, hh in zip(layer.weights, of_input, weights_hh, strict=True)
    )
    m_0 = torch.zeros_like(layer.c0)
    plain = layer._replace(input=input, h0=m_0, weights=weights, lengths=lengths, batch_sizes=None)
    return Folded(plain, starts)


def _first_step(lengths: Tensor | None, steps: int, reverse: bool, device: torch.device) -> Tensor:
    """bool (T, B, 1), or (T, 1, 1) where all sequences start together: True at the first step of a direction."""
    first = 0 if not reverse else steps - 1 if lengths is None else lengths - 1
    step = torch.arange(steps, device=device).unsqueeze(1)
    return (step == first).unsqueeze(-1)


def _needs_over_m(needs: LayerGrads, has_columns: bool) -> LayerGrads:
    """The gradients that the layer over m must give. has_columns: W_hh and h_0 are parts of W_ih and the input."""
    weights = tuple(
        Weights(w.ih or (has_columns and w.hh), w.hh or w.hr, w.bias_ih, w.bias_hh, False) for w in needs.weights
    )
    return LayerGrads(needs.input or (has_columns and needs.h0), False, needs.c0, weights)


def _padded(grad: Tensor | None, layer: Layer) -> Tensor | None:
    """The gradient of a result per step as (T, B, X), 0 past the lengths: padding may hold NaN."""
    if grad is None:
        return None
    if layer.batch_sizes is not None:
        return layout.pad(grad, layer.batch_sizes)[0]
    return grad if layer.lengths is None else layout.zero_padding(grad, layer.lengths)


def _rows(product: Callable[..., Tensor], a: Tensor, b: Tensor, **options: bool) -> Tensor:
    """The product of a (T, B, K) and a matrix, as one product of all rows."""
    return product(a.flatten(0, 1), b, **options).unflatten(0, a.shape[:2])
