"""The ``native`` backend of ``lstm``: one compiled operator runs all steps of a layer in all its directions.

CUDA tensors go to ``native_cuda``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.ops.common.checks import native_objection
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import contiguous
from fastseq.ops.common.narrow import Narrow
from fastseq.ops.lstm import native_cuda
from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Result, Want, Weights

SKIPS_PADDING = True  # steps past a sequence's length are not read
PLAIN_HAS_BACKWARD = False
WAVEFRONT = True  # layers on CUDA may run beside each other


def forward(layer: Layer, want: Want) -> Result:
    """Saved: activations (..., D * 4H), with a projection (..., D * (4H + P)) with h, in the dtype of the input; and
    cell states (..., D * H) in float32 at least.
    """
    if _native.device_of(layer.input) == "cuda":
        return native_cuda.forward(layer, want)
    output, h_n, c_n, activations, cell_states = _native.operators.lstm_forward.default(
        *_operands(layer), *_sizes(layer), want.backward, want.backward or want.cell_states
    )
    saved = (activations, cell_states) if want.backward else ()
    wanted = cell_states.to(output.dtype, copy=True) if want.cell_states else None  # backward reads the saved ones
    return Result(output, h_n, c_n, wanted, saved)


def plain(input, hx, weights, *options) -> tuple[Tensor, Tensor, Tensor]:
    """A padded call on CPU tensors without a backward, with arguments and results of ``torch._VF.lstm``.

    It calls the operator without the records of the layers, which take as long as a short call computes.
    """
    _, num_layers, dropout, training, bidirectional, batch_first = options
    output = (input.transpose(0, 1) if batch_first else input).contiguous()
    directions = 2 if bidirectional else 1
    h0, c0 = (state.contiguous().split(directions) for state in hx)
    count, states = len(weights) // num_layers, []
    for k in range(num_layers):
        if k and dropout:
            output = F.dropout(output, dropout, training)
        of_layer = [w.contiguous() for w in weights[k * count : (k + 1) * count]]
        output, *state, _, _ = _native.operators.lstm_forward.default(
            output, h0[k], c0[k], of_layer, None, None, False, False, False
        )
        states.append(state)
    h_n, c_n = state if num_layers == 1 else map(torch.cat, zip(*states, strict=True))
    return output.transpose(0, 1) if batch_first else output, h_n, c_n


def forward_narrow(
    layer: Layer, narrow: tuple[Narrow, ...], cell_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inference in float32 on the CPU with rounded weights, W_ih and W_hh of each direction in ``narrow``.

    -> output, h_n, c_n, cell states or None.
    """
    weights = []
    for d, direction in enumerate(layer.weights):
        biases = (b.contiguous() for b in (direction.bias_ih, direction.bias_hh) if b is not None)
        weights += [narrow[2 * d].values, narrow[2 * d + 1].values, *biases]
    states = layer.input.contiguous(), layer.h0.contiguous(), layer.c0.contiguous()
    scales = [n.scale for n in narrow if n.scale is not None]
    output, h_n, c_n, cells = _native.operators.lstm_forward_narrow.default(
        *states, weights, scales, *_sizes(layer), cell_states
    )
    return output, h_n, c_n, cells if cell_states else None


def backward(layer: Layer, saved: tuple[Tensor, ...], grads: Grads, needs: LayerGrads) -> LayerGrads:
    """Backpropagation through time with all weight gradients in one operator."""
    if _native.device_of(layer.input) == "cuda":
        return native_cuda.backward(layer, saved, grads, needs)
    need_weights = any(need for direction in needs.weights for need in direction)
    input, h0, c0, of_weights = _native.operators.lstm_backward.default(
        *map(contiguous, grads), *_operands(layer), *saved, *_sizes(layer), needs.input, need_weights
    )
    weights, count = [], len(of_weights) // len(layer.weights)
    for d, wanted in enumerate(needs.weights):
        ih, hh, bias, hr = (*of_weights[count * d : count * (d + 1)], *[None] * (4 - count))
        grads_of_one = Weights(ih, hh, bias, bias, hr)
        weights.append(Weights(*(g if need else None for g, need in zip(grads_of_one, wanted, strict=True))))
    inputs = (g if need else None for g, need in zip((input, h0, c0), needs[:3], strict=True))
    return LayerGrads(*inputs, tuple(weights))


def fold_product(layer: Layer) -> Callable[..., Tensor] | None:
    """The product by which projection.py folds W_hr, which the CUDA kernels lack."""
    return native_cuda.product if _native.device_of(layer.input) == "cuda" else None


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCall``) and the way out, or None."""
    sentence = native_objection("lstm", call, native_cuda.DTYPES)
    if sentence is not None:
        return sentence
    return native_cuda.unsupported(call) if call.device == "cuda" else None


def _operands(layer: Layer) -> tuple:
    """input, h0, c0, weights for the operators: contiguous, weights as one list without absent biases."""
    weights = [w.contiguous() for direction in layer.weights for w in direction if w is not None]
    return layer.input.contiguous(), layer.h0.contiguous(), layer.c0.contiguous(), weights


def _sizes(layer: Layer) -> tuple:
    """lengths (B,) and batch_sizes (T,), int64 on the CPU or None, and ``reverse``."""
    on_cpu = (None if s is None else s.to("cpu", torch.int64).contiguous() for s in (layer.lengths, layer.batch_sizes))
    return *on_cpu, layer.reverse


def _projected(weights, directions: int) -> bool:
    """Whether each direction ends with W_hr: a list without it has two or four weights for each."""
    return len(weights) // directions % 2 == 1


def _fake_forward(*arguments):
    """As the schema: input, h0, c0, weights, lengths, batch_sizes, reverse, need_activations, need_cell_states."""
    input, h0, c0, weights = arguments[:4]
    need_activations, need_cell_states = arguments[-2:]
    rows, (D, B, H), P = input.shape[:-1], c0.shape, h0.shape[-1]
    saved = 4 * H + P if _projected(weights, D) else 4 * H
    return (
        input.new_empty(*rows, D * P),
        c0.new_empty(D, B, P),
        c0.new_empty(D, B, H),
        input.new_empty((*rows, D * saved) if need_activations else (0,)),
        input.new_empty((*rows, D * H) if need_cell_states else (0,), dtype=accumulate_dtype(input.dtype)),
    )


def _fake_forward_narrow(*arguments):
    """As the schema: input, h0, c0, weights, scales, lengths, batch_sizes, reverse, need_cell_states."""
    *results, _, cell_states = _fake_forward(*arguments[:4], False, arguments[-1])
    return *results, cell_states


def _fake_backward(*arguments):
    """As the schema: 4 gradients, input, h0, c0, weights, 2 saved tensors, 2 sizes, reverse, 2 needs."""
    input, h0, c0, given = arguments[4:8]
    need_input, need_weights = arguments[-2:]
    (D, B, H), P, I = c0.shape, h0.shape[-1], input.shape[-1]  # noqa: E741
    projection = ((P, H),) if _projected(given, D) else ()
    shapes = ((4 * H, I), (4 * H, P), (4 * H,), *projection) * D if need_weights else ()
    return (
        torch.empty_like(input) if need_input else input.new_empty(0),
        c0.new_empty(D, B, P),
        c0.new_empty(D, B, H),
        [input.new_empty(shape) for shape in shapes],
    )


if _native.available():
    torch.library.register_fake("fastseq::lstm_forward", _fake_forward)
    torch.library.register_fake("fastseq::lstm_forward_narrow", _fake_forward_narrow)
    torch.library.register_fake("fastseq::lstm_backward", _fake_backward)
