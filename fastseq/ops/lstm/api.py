"""The public LSTM op, and the path it shares with ``fastseq.LSTM``: describe, select, cast, apply."""

import functools
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import implementation, remembered, select, unrecorded
from fastseq.ops.common.autocast import autocast_enabled, cast, cast_weights, without_autocast
from fastseq.ops.common.autograd import forward_mode, is_compiling, peek_transform, vmapped
from fastseq.ops.common.checks import check_lengths
from fastseq.ops.common.dtypes import tf32_allowed
from fastseq.ops.common.layout import zero_padding
from fastseq.ops.common.narrow import Narrow
from fastseq.ops.lstm import wavefront
from fastseq.ops.lstm.function import apply
from fastseq.ops.lstm.spec import Layer, LSTMCall, Stack

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_requires_grad = operator.attrgetter("requires_grad")


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    weight_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    backend: str | None = None,
):
    """One layer and direction of ``torch.nn.LSTM`` over a sequence (Hochreiter & Schmidhuber 1997, Gers et al. 2000).

    Per step: ``i, f, g, o = x W_ih^T + b_ih + h W_hh^T + b_hh``, ``c = sigmoid(f) c + sigmoid(i) tanh(g)``,
    ``h = sigmoid(o) tanh(c)``, and with ``weight_hr`` ``h = h W_hr^T`` (Sak et al. 2014). Differentiable twice in every
    tensor. Under autocast the results have the dtypes of ``nn.LSTM``'s.

    Args:
        input: (T, B, I), or packed (N, I) if ``batch_sizes`` is given.
        hx: h0 (B, P) and c0 (B, H); P = H without ``weight_hr``.
        weight_ih: (4H, I). weight_hh: (4H, P). bias_ih, bias_hh: (4H,), both or neither. weight_hr: (P, H).
        lengths: (B,) integers in 0..T on any device. Outputs past the length are 0; final states come from the last
            valid step, where ``reverse`` starts; a row of length 0 returns its initial state. On CUDA, and in a traced
            graph, the values are clamped to 0..T, not checked: a check would synchronise with the device.
        batch_sizes: (T,) int64 on the CPU, as in ``PackedSequence``; B = batch_sizes[0].
        reverse: run from the last step to the first.
        return_cell_states: also return the cell state after every step.
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        output (T, B, P) or (N, P), (h_n (B, P), c_n (B, H)), and with ``return_cell_states`` cell states (T, B, H) or
        (N, H); output and cell states are 0 past the length.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; or the requested backend cannot serve this call.
        ValueError: unknown backend name; lengths and batch_sizes both given; lengths out of range.
    """
    if len(hx) != 2:
        raise RuntimeError(f"lstm: hx must be two tensors, h0 and c0, got {len(hx)}")
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input.size(0))
    _check_shapes(input, hx, weights, batch_sizes)
    if lengths is not None:
        if batch_sizes is not None:
            raise ValueError("lstm: give lengths (padded input) or batch_sizes (packed input), not both")
        lengths = check_lengths(lengths, input.size(0), input.size(1), input.device)
    stack = Stack(
        input,
        hx[0].unsqueeze(0),
        hx[1].unsqueeze(0),
        tuple(w for w in weights if w is not None),
        lengths,
        batch_sizes,
        bias=bias_ih is not None,
        proj_size=0 if weight_hr is None else weight_hr.size(0),
        reverse=reverse,
    )
    output, h_n, c_n, cell_states = run(stack, return_cell_states, backend)
    h_n, c_n = h_n.squeeze(0), c_n.squeeze(0)
    return (output, (h_n, c_n), cell_states) if return_cell_states else (output, (h_n, c_n))


def run(stack: Stack, cell_states: bool, backend: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run all layers on the backend that serves the call; the caller has checked the shapes.

    Returns:
        output in the layout of the input, h_n (L*D, B, P), c_n (L*D, B, H), and the last layer's cell states in the
        layout of the input, or None.
    """
    call = describe(stack, cell_states)
    chosen = select("lstm", backend, call)
    module = implementation("lstm", chosen)
    results = (*module.run(stack), None) if hasattr(module, "run") else _run(chosen, call, stack, cell_states)
    if not call.autocast:
        return results
    dtypes = implementation("lstm", "torch").autocast_result_dtypes(call, stack.c0.dtype)
    dtypes = (*dtypes, dtypes[-1])
    return tuple(t if t is None else t.to(dtype) for t, dtype in zip(results, dtypes, strict=True))


def run_plain(
    input: Tensor, hx: tuple[Tensor, Tensor] | None, weights, options: tuple, sizes: tuple, backend: str | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As :func:`run` for the commonest calls, in a third of the time around the kernel.

    These are padded CPU tensors of torch's own types, of one dtype and fitting shapes, without autocast, trace,
    transform or record(). ``test_a_plain_call_takes_the_backend_of_the_rules`` holds the choice to ``run``'s.

    Args:
        input: (T, B, I), or (B, T, I) with batch_first.
        hx: h0 (L * D, B, P) and c0 (L * D, B, H), or None for zeros.
        weights: as nn.LSTM._flat_weights.
        options: bias, num_layers, dropout, training, bidirectional, batch_first; as of torch._VF.lstm.
        sizes: I, H and proj_size.

    Returns:
        output, h_n and c_n; None for any other call, among them those that must be refused.
    """
    requested = unrecorded(backend)
    if (
        requested is None
        or type(input) is not Tensor
        or not (hx is None or type(hx) is tuple)
        or not _native.on_cpu(input)
        or is_compiling()
        or autocast_enabled("cpu")
        or forward_mode()
        or peek_transform() is not None
        or not PLAIN_TYPES.issuperset(map(type, weights))
    ):
        return None
    dtype = input.dtype
    needs_grad = torch.is_grad_enabled() and any(map(_requires_grad, (input, *(hx or ()), *weights)))
    plan = _plain_plan(torch.get_num_threads(), requested, dtype, input.shape, options, sizes, needs_grad)
    if plan is None or dtype is not weights[0].dtype or not weights[0].is_cpu:
        return None
    shapes, kernel = plan
    if hx is None:
        c0 = input.new_zeros(shapes[1])
        hx = (input.new_zeros(shapes[0]) if sizes[2] else c0, c0)
    elif len(hx) != 2 or not (_fits(hx[0], shapes[0], dtype) and _fits(hx[1], shapes[1], dtype)):
        return None
    return kernel(input, hx, weights, *options)


def _fits(state: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return type(state) in PLAIN_TYPES and state.shape == shape and state.dtype is dtype and state.is_cpu


@remembered
def _plain_plan(threads, requested, dtype, shape, options, sizes, needs_grad) -> tuple[tuple, Callable] | None:
    """The shapes of h0 and c0, and the function, with the arguments of torch._VF.lstm, that serves these calls.

    None if the input does not fit. ``threads``, of torch, is a key only: rules read it.
    """
    _, num_layers, _, _, bidirectional, batch_first = options
    input_size, hidden_size, proj_size = sizes
    if len(shape) != 3 or shape[2] != input_size or 0 in shape[:2]:
        return None
    batch, steps = shape[:2] if batch_first else shape[1::-1]
    form = {"batch": batch, "steps": steps, "layers": num_layers, "requires_grad": needs_grad}
    call = LSTMCall("cpu", dtype, *sizes, **form)
    chosen = select("lstm", requested, call)
    rows = num_layers * (2 if bidirectional else 1)
    shapes = (rows, batch, proj_size or hidden_size), (rows, batch, hidden_size)
    return shapes, _plain_kernel(chosen, call) or functools.partial(_layered, chosen, call)


def _plain_kernel(backend: str, call: LSTMCall) -> Callable | None:
    """The ``plain`` of a backend, if it has one that serves the call."""
    module = implementation("lstm", backend)
    form = {"batch": call.batch, "steps": call.steps, "layers": call.layers, "requires_grad": call.requires_grad}
    if call != LSTMCall("cpu", *call[1:5], **form) or (
        call.requires_grad and not getattr(module, "PLAIN_HAS_BACKWARD", False)
    ):
        return None
    return getattr(module, "plain", None)


def _layered(backend: str, call: LSTMCall, input: Tensor, hx, weights, *options) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_run` with the arguments of torch._VF.lstm."""
    bias, num_layers, dropout, training, bidirectional, batch_first = options
    sizes = {"num_layers": num_layers, "proj_size": call.proj_size}
    flags = {"bias": bias, "bidirectional": bidirectional, "batch_first": batch_first, "training": training}
    return _run(backend, call, Stack(input, *hx, weights, dropout=dropout, **sizes, **flags), False)[:3]


def run_narrow(
    stack: Stack, narrow: tuple[Narrow, ...], cell_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``run`` without gradients, for float32 on the CPU, with rounded weights.

    narrow: W_ih and W_hh of each layer and direction; the biases come from ``stack``.
    """
    native = implementation("lstm", select("lstm", "native", describe(stack, cell_states)))
    directions = 2 if stack.bidirectional else 1

    def layer_forward(k: int, layer: Layer, cell_states: bool):
        of_layer = narrow[2 * directions * k : 2 * directions * (k + 1)]
        return native.forward_narrow(layer, of_layer, cell_states)

    transposed = stack.batch_first and stack.batch_sizes is None
    input = stack.input.transpose(0, 1) if transposed else stack.input
    output, h_n, c_n, states = _layers(stack, input, cell_states, layer_forward)
    if transposed:
        output, states = output.transpose(0, 1), None if states is None else states.transpose(0, 1)
    return output, h_n, c_n, states


def _run(backend: str, call: LSTMCall, stack: Stack, cell_states: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All layers by a backend that computes layer by layer, in ``call.dtype``."""
    kernel = None if peek_transform() is not None else _plain_kernel(backend, call)
    if kernel is not None:
        options = (stack.bias, stack.num_layers, stack.dropout, stack.training, stack.bidirectional, stack.batch_first)
        return *kernel(stack.input, (stack.h0, stack.c0), stack.weights, *options), None
    if call.autocast:
        input, h0, c0 = cast(call.dtype, stack.input, stack.h0, stack.c0)
        stack = stack._replace(input=input, h0=h0, c0=c0, weights=cast_weights(call.dtype, *stack.weights))
    transposed = stack.batch_first and stack.batch_sizes is None
    input = stack.input.transpose(0, 1) if transposed else stack.input
    if stack.lengths is not None and not getattr(implementation("lstm", backend), "SKIPS_PADDING", False):
        input = zero_padding(input, stack.lengths)  # NaN in the padding must reach no gradient
    waves = wavefront.plan(call, stack) if getattr(implementation("lstm", backend), "WAVEFRONT", False) else None
    with without_autocast(input.device.type):
        if waves is not None:
            output, h_n, c_n, states = wavefront.run(stack, input, cell_states, waves)
        else:
            output, h_n, c_n, states = _layers(
                stack, input, cell_states, lambda _, layer, wanted: apply(backend, layer, wanted)
            )
    if transposed:
        output = output.transpose(0, 1)
        states = None if states is None else states.transpose(0, 1)
    return output, h_n, c_n, states


def _layers(
    stack: Stack, input: Tensor, cell_states: bool, layer_forward: Callable
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Layer by layer, with dropout between; ``input`` is time-major or packed.

    layer_forward: (index of the layer, Layer, whether cell states are wanted) -> output, h_n, c_n, cell states or None.
    """
    directions = 2 if stack.bidirectional else 1
    of_layer = [tuple(map(stack.weights_of, range(k, k + directions))) for k in range(0, len(stack.h0), directions)]
    rest = (stack.lengths, stack.batch_sizes, stack.reverse, stack.zero_h0)
    if stack.num_layers == 1:
        return layer_forward(0, Layer(input, stack.h0, stack.c0, *of_layer, *rest), cell_states)
    h_n, c_n, states = [], [], None
    h0, c0 = stack.h0.split(directions), stack.c0.split(directions)
    for k, weights in enumerate(of_layer):
        last = k == stack.num_layers - 1
        input, h, c, states = layer_forward(k, Layer(input, h0[k], c0[k], weights, *rest), cell_states and last)
        h_n.append(h)
        c_n.append(c)
        if stack.dropout and not last:
            input = F.dropout(input, stack.dropout, stack.training)
    return input, torch.cat(h_n), torch.cat(c_n), states


def describe(stack: Stack, cell_states: bool) -> LSTMCall:
    """The record by which rules and backends judge the call."""
    compiling, packed = is_compiling(), stack.batch_sizes is not None
    input, device = stack.input, stack.input.device
    autocast, fused, dtype = autocast_enabled(device.type) and input.dtype != torch.float64, False, input.dtype
    if autocast:
        torch_backend = implementation("lstm", "torch")
        dtype = torch_backend.autocast_compute_dtype(device.type, dtype)
        fused = torch_backend.fused_under_autocast(stack, dtype)
    steps = stack.batch_sizes.size(0) if packed else input.size(1 if stack.batch_first else 0)
    tensors = (input, stack.h0, stack.c0, *stack.weights)
    needs_grad = torch.is_grad_enabled() and (autocast or any(t.requires_grad for t in tensors))
    return LSTMCall(
        device=_native.device_of(input),
        dtype=dtype,
        input_size=input.size(-1),
        hidden_size=stack.c0.size(-1),
        proj_size=stack.proj_size,
        packed=packed,
        lengths=stack.lengths is not None,
        reverse=stack.reverse,
        return_cell_states=cell_states,
        requires_grad=needs_grad,
        autocast=autocast,
        fused=fused,
        batch=None if compiling else stack.c0.size(-2),
        steps=None if compiling else steps,
        compiling=compiling,
        vmapped=vmapped(),
        forward_mode=forward_mode(),
        layers=stack.num_layers,
        subclass=not compiling and not PLAIN_TYPES.issuperset(map(type, tensors)),
        tf32=_native.device_of(input) == "cuda" and tf32_allowed(),
        device_index=device.index,
    )


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """RuntimeError unless these are batch sizes of a PackedSequence of ``rows`` rows; a trace checks no values."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "lstm: batch_sizes must be one int64 per time step on the CPU, as in PackedSequence, "
            f"got {tuple(batch_sizes.shape)} {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.numel() == 0:
        raise RuntimeError("lstm: expected at least one time step, got empty batch_sizes")
    if is_compiling():
        return
    if int(batch_sizes.sum()) != rows or int(batch_sizes[-1]) < 1 or bool((batch_sizes.diff() > 0).any()):
        raise RuntimeError(
            f"lstm: batch_sizes must be positive, not increase, and sum to the {rows} rows of the packed input, "
            f"got {batch_sizes.tolist()}"
        )


def _check_shapes(input, hx, weights, batch_sizes) -> None:
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(
            f"lstm: input must have {rank} dimensions, {'(T, B, I)' if rank == 3 else '(N, I) when packed'}, "
            f"got {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"lstm: input must be floating point, got {input.dtype}")
    if input.size(0) == 0:
        raise RuntimeError("lstm: expected at least one time step, got none")
    h0, c0 = hx
    if c0.dim() != 2:
        raise RuntimeError(f"lstm: c0 must have shape (B, H), got {tuple(c0.shape)}")
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
    hidden = c0.size(-1)
    projected = hidden if weight_hr is None else weight_hr.size(0)
    expected = {
        "h0": (h0, (batch, projected)),
        "c0": (c0, (batch, hidden)),
        "weight_ih": (weight_ih, (4 * hidden, input.size(-1))),
        "weight_hh": (weight_hh, (4 * hidden, projected)),
        "bias_ih": (bias_ih, (4 * hidden,)),
        "bias_hh": (bias_hh, (4 * hidden,)),
        "weight_hr": (weight_hr, (projected, hidden)),
    }
    autocast = autocast_enabled(input.device.type)
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"lstm: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise RuntimeError(
                f"lstm: {name} is on {tensor.device}, the input on {input.device}; move them to one device"
            )
        if tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(
                f"lstm: {name} is {tensor.dtype}, the input {input.dtype}; convert one of them with .to()"
            )
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError("lstm: give both bias_ih and bias_hh, or neither")
