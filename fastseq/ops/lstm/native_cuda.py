"""The ``native`` backend of ``lstm`` on CUDA: one kernel runs the recurrence of a layer, all steps and directions.

torch multiplies by W_ih before it and computes the weight gradients after it, each in one product over all steps. Where
the GPU has no room for the kernel, the operator computes one direction after the other, or step by step.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.ops.common import layout
from fastseq.ops.common.dtypes import tf32_allowed
from fastseq.ops.common.layout import contiguous
from fastseq.ops.lstm.spec import Grads, Layer, LayerGrads, Result, Want, Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COSTS = ("cluster", "grid", "steps", "cudnn")  # the kernels of lstm_recurrence_cost, by their numbers


def forward(layer: Layer, want: Want) -> Result:
    """Saved: activations (T, B, D * 4H) in the dtype of the input, cell states (T, B, D * H) in float32."""
    input, lengths = _padded(layer)
    weight_ih = _cat([w.ih for w in layer.weights])  # (D * 4H, I)
    gates = product_of_steps(input, weight_ih, bias_of(layer.weights), transpose_b=True)  # (T, B, D * 4H)
    output, h_n, c_n, activations, cell_states = _native.operators.lstm_recurrence_forward.default(
        gates,
        layer.h0.contiguous(),
        layer.c0.contiguous(),
        _recurrent(layer.weights),
        _lengths(lengths, input),
        layer.reverse,
        tf32_allowed(),
        want.backward,
        want.backward or want.cell_states,
    )
    saved = (activations, cell_states) if want.backward else ()
    wanted = cell_states.to(input.dtype, copy=True) if want.cell_states else None  # backward reads the saved ones
    if wanted is not None and lengths is not None:
        wanted = layout.zero_padding(wanted, lengths)  # the kernel writes none past the lengths
    if layer.batch_sizes is not None:
        output = layout.pack(output, layer.batch_sizes)
        wanted = layout.pack(wanted, layer.batch_sizes) if want.cell_states else None
    return Result(output, h_n, c_n, wanted, saved)


def backward(layer: Layer, saved: tuple[Tensor, ...], grads: Grads, needs: LayerGrads) -> LayerGrads:
    """The gradient of all gates by one kernel, then a product over all steps for each other gradient."""
    activations, cell_states = saved
    input, lengths = _padded(layer)
    grad_output, grad_cell_states = grads.output, grads.cell_states
    if layer.batch_sizes is not None:
        grad_output, grad_cell_states = (
            g if g is None else layout.pad(g, layer.batch_sizes)[0] for g in (grad_output, grad_cell_states)
        )
    elif lengths is not None:
        input = layout.zero_padding(input, lengths)
    grad_gates, grad_h0, grad_c0 = _native.operators.lstm_recurrence_backward.default(
        *map(contiguous, (grad_output, grads.h_n, grads.c_n, grad_cell_states)),
        activations,
        cell_states,
        layer.c0.contiguous(),
        _recurrent(layer.weights),
        _lengths(lengths, input),
        layer.reverse,
        tf32_allowed(),
    )
    grad_input = None
    if needs.input:
        grad_input = product_of_steps(grad_gates, _cat([w.ih for w in layer.weights]))
        if layer.batch_sizes is not None:
            grad_input = layout.pack(grad_input, layer.batch_sizes)
    weights, directions = [], len(layer.weights)
    for d, (rows, wanted) in enumerate(zip(grad_gates.chunk(directions, -1), needs.weights, strict=True)):
        before = None
        if wanted.hh:
            of_direction = (t.chunk(directions, -1)[d] for t in saved)
            before = layout.hidden_before(*of_direction, layer.h0[d], lengths, layer.reverse or d == 1)
        weights.append(weight_gradients(rows, input, before, wanted))
    return LayerGrads(grad_input, grad_h0 if needs.h0 else None, grad_c0 if needs.c0 else None, tuple(weights))


def weight_gradients(grad_gates: Tensor, input: Tensor, before: Tensor | None, needs: Weights) -> Weights:
    """Weight gradients of a direction from grad_gates (T, B, 4H), input (T, B, I), h before each step (T, B, H)."""
    rows = grad_gates.flatten(0, 1)  # (T * B, 4H)
    bias = rows.sum(0) if needs.bias_ih or needs.bias_hh else None
    return Weights(
        product(rows, input.flatten(0, 1), transpose_a=True) if needs.ih else None,
        product(rows, before.flatten(0, 1), transpose_a=True) if needs.hh else None,
        bias if needs.bias_ih else None,
        bias if needs.bias_hh else None,
        None,
    )


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, transpose_a: bool = False, transpose_b: bool = False
) -> Tensor:
    """op(a) op(b) + bias at the precision of cuDNN's RNNs, as the products of nn.LSTM.

    By default torch lets cuDNN round float32 operands to TF32 and forbids it to matmul. The operator asks for TF32 in
    the call; torch's flag, which other threads read, stays as it is.

    Args:
        a: (M, K), or (K, M) with ``transpose_a``. b: (K, N), or (N, K) with ``transpose_b``. bias: (N,).
    """
    if a.dtype == torch.float32 and tf32_allowed() and _own_tf32_products():
        options = (transpose_a, transpose_b)
        return _native.operators.tf32_product.default(a.contiguous(), b.contiguous(), contiguous(bias), *options)
    b = b if transpose_b else b.t()
    return F.linear(a.t() if transpose_a else a, b, bias)


def product_of_steps(a: Tensor, b: Tensor, bias: Tensor | None = None, *, transpose_b: bool = False) -> Tensor:
    """:func:`product` of a (T, B, K): one product of all rows -> (T, B, N)."""
    return product(a.flatten(0, 1), b, bias, transpose_b=transpose_b).unflatten(0, a.shape[:2])


def _own_tf32_products() -> bool:
    """True if torch's matmul would be full float32 and the operator can run: torch exports its cuBLAS handle."""
    full = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return full and _native.operators.tf32_products_available()


# A constant in traced graphs, as torch.compiler.assume_constant_result makes it; Dynamo guards on the flags itself.
_own_tf32_products._dynamo_marked_constant = True


def unsupported(call) -> str | None:
    """Why no CUDA kernel fits an ``LSTMCall`` that passed ``native.unsupported``, and the way out; or None.

    While a graph is traced the device is not queried: what does not fit runs step by step.
    """
    if call.compiling or fits(call.batch or 1, call.hidden_size, call.dtype, call.device_index):
        return None
    return (
        f"lstm: no CUDA kernel keeps the weights of hidden_size={call.hidden_size} in {call.dtype} on the device "
        f"for a batch of {call.batch}; use backend='torch' or 'triton'."
    )


def fits(batch: int, hidden_size: int, dtype: torch.dtype, index: int | None = None) -> bool:
    """True if the GPU of this index, or the current one, can run all steps of a direction in one kernel, both ways."""
    with contextlib.nullcontext() if index is None else torch.cuda.device(index):
        return _native.operators.lstm_recurrence_fits(batch, 1, hidden_size, dtype.itemsize, tf32_allowed())


def modelled_us(
    kernel: str, batch: int, hidden_size: int, dtype: torch.dtype, tf32: bool, index: int | None = None
) -> tuple[float, float]:
    """Modelled microseconds of a step on the GPU of this index, forward and backward; infinite where it does not fit.

    One layer and direction, without the products over all steps. Not measured: csrc/cuda/lstm/cost.h has every
    constant.

    Args:
        kernel: one of ``COSTS``.
    """
    with contextlib.nullcontext() if index is None else torch.cuda.device(index):
        return _native.operators.lstm_recurrence_cost(COSTS.index(kernel), batch, 1, hidden_size, dtype.itemsize, tf32)


def best_us(*shape) -> tuple[float, float]:
    """The smaller ``modelled_us`` of cluster and grid, forward and backward. shape: what follows the kernel there."""
    cluster, grid = (modelled_us(kernel, *shape) for kernel in ("cluster", "grid"))
    return min(cluster[0], grid[0]), min(cluster[1], grid[1])


def shares(
    batch: int, hidden_size: int, dtype: torch.dtype, tf32: bool, index: int | None = None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """For forward and backward: the modelled microseconds of a step, and the part of the GPU that the kernel holds.

    Of the kernels that the operators take for one direction beside others (``beside``); zeros where none fits.
    """
    with contextlib.nullcontext() if index is None else torch.cuda.device(index):
        numbers = _native.operators.lstm_recurrence_share(batch, 1, hidden_size, dtype.itemsize, tf32)
    return numbers[:2], numbers[2:]


def modelled_gain(call) -> float:
    """The modelled time of a step by cuDNN over that by the best kernel of an ``LSTMCall``; in training the smaller
    of forward and backward.

    cuDNN with a projection is modelled as a plain LSTM with as many weights in its recurrence, 5 H P of 4 H H, although
    it launches a kernel more.
    """
    batch, hidden, form = call.batch or 1, call.hidden_size, (call.dtype, call.tf32, call.device_index)
    cudnn = modelled_us("cudnn", batch, round((1.25 * hidden * call.proj_size) ** 0.5) or hidden, *form)
    ours = best_us(batch, hidden, *form)
    folds = _modelled_fold(call) if call.proj_size else (0.0, 0.0)
    gains = [theirs / (us + fold) for theirs, fold, us in zip(cudnn, folds, ours, strict=True)]
    return min(gains) if call.requires_grad else gains[0]


def _modelled_fold(call) -> tuple[float, float]:
    """Microseconds a step of the products of ``projection.py``, forward and backward.

    W = W_hh W_hr, once, is as large as a step of P sequences. All rows: P / 4H of a step's product to project, P / H
    for the columns of a given h_0. The backward has twice as many.
    """
    steps, rows, form = call.steps or 1, (call.batch or 1) * (call.steps or 1), (call.dtype, call.tf32)
    weight, every_step = (
        modelled_us("cudnn", batch, call.hidden_size, *form, call.device_index)[0] for batch in (call.proj_size, rows)
    )
    forward = (weight + 1.25 * every_step * call.proj_size / call.hidden_size) / steps
    return forward, 2 * forward


def _padded(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """The input as (T, B, I), and lengths (B,) or None; packed layers are padded."""
    if layer.batch_sizes is None:
        return layer.input, layer.lengths
    return layout.pad(layer.input, layer.batch_sizes)


def _cat(matrices: list[Tensor]) -> Tensor:
    """Concatenate the directions along dim 0."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _recurrent(weights: tuple[Weights, ...]) -> Tensor:
    """W_hh of all directions, (D, 4H, H); of one direction without a copy, which is 16 MB at H = 1024 in float32."""
    if len(weights) == 1:
        return weights[0].hh.contiguous().unsqueeze(0)
    return torch.stack([w.hh for w in weights])


def bias_of(weights: tuple[Weights, ...]) -> Tensor | None:
    """b_ih + b_hh of all directions, (D * 4H,), or None."""
    return None if weights[0].bias_ih is None else _cat([w.bias_ih + w.bias_hh for w in weights])


def _lengths(lengths: Tensor | None, like: Tensor) -> Tensor | None:
    return None if lengths is None else lengths.to(like.device, torch.int64).contiguous()


def _fake_forward(*arguments):
    """As the schema: gates, h0, c0, weight_hh, lengths, reverse, tf32, need_activations, need_cell_states, ..."""
    gates, _, c0 = arguments[:3]
    need_activations, need_cell_states = arguments[7:9]
    (D, B, H), T = c0.shape, gates.shape[0]
    return (
        gates.new_empty(T, B, D * H),
        gates.new_empty(D, B, H),
        c0.new_empty(D, B, H),
        gates.new_empty((T, B, D * 4 * H) if need_activations else (0,)),
        gates.new_empty((T, B, D * H) if need_cell_states else (0,), dtype=torch.float32),
    )


def _fake_backward(*arguments):
    """As the schema: 4 gradients, activations, cell states, c0, weight_hh, lengths, reverse, tf32."""
    activations, c0 = arguments[4], arguments[6]
    return torch.empty_like(activations), torch.empty_like(c0), torch.empty_like(c0)


def _fake_product(a, b, bias, transpose_a, transpose_b):
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def register_fakes(library: str) -> None:
    """Register the shapes of the operators' results, which torch.compile needs."""
    torch.library.register_fake(f"{library}::lstm_recurrence_forward", _fake_forward)
    torch.library.register_fake(f"{library}::lstm_recurrence_backward", _fake_backward)
    torch.library.register_fake(f"{library}::tf32_product", _fake_product)


if _native.available():
    register_fakes("fastseq")
