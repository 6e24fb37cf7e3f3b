"""The layers of a stack as a wavefront on CUDA: a part of layer l + 1 beside the next part of layer l.

A recurrence of few sequences holds a small part of a GPU. Layer l + 1 needs only the steps of layer l that are done,
so the steps are cut into chunks, and the layers run on streams of their own:

    stream 0   layer 0: chunk 0 | chunk 1 | chunk 2 | ...
    stream 1            layer 1: chunk 0 | chunk 1 | chunk 2 | ...

The backward is the mirror image: the last layer's last chunk comes first. Between chunks the cell state and the
gradients of the states stay float32, so cutting changes no number of a recurrence. Products over all steps (the first
layer's with W_ih, and all weight gradients) stay whole.
"""

import itertools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native
from fastseq.dispatch import remembered
from fastseq.ops.common import layout, streams
from fastseq.ops.common.autocast import without_autocast
from fastseq.ops.common.autograd import differentiable_backward, distinct, needs_function, peek_transform, recompute
from fastseq.ops.common.dtypes import tf32_allowed
from fastseq.ops.common.streams import Task
from fastseq.ops.lstm import directions, native_cuda, reference
from fastseq.ops.lstm.spec import Grads, Layer, LSTMCall, Stack, Want, Weights, by_direction

# Not measured yet, microseconds: the host issues a chunk; the device begins its product and its recurrence.
HOST_US, BEGIN_US = 40.0, 8.0
WORTHWHILE = 1.15  # the modelled gain from which the layers run so
CHUNKS = (16, 32, 64, 128, 256, 512)  # steps; multiples of 8 keep every part of a tensor aligned to 16 bytes


class Plan(NamedTuple):
    """How a stack is cut."""

    chunk: int  # steps
    forward: int  # streams; 1: layer by layer
    backward: int


class Given(NamedTuple):
    """A call, prepared on the caller's stream."""

    input: Tensor  # (T, B, I)
    h0: Tensor  # (L, B, H)
    c0: Tensor  # (L, B, H)
    weights: tuple[Weights, ...]  # L
    masks: tuple[Tensor, ...]  # (T, B, H) bool, L - 1 or none: what dropout keeps between the layers
    scale: float  # of what is kept
    lengths: Tensor | None  # (B,)


def plan(call: LSTMCall, stack: Stack) -> Plan | None:
    """How to run these layers as a wavefront; None: layer by layer, on one stream.

    Kernels whose blocks wait for each other must find room beside each other, else two grids could hold half of the
    device each and wait for ever. So there are no more streams than kernels of this shape fit.
    """
    if (
        call.device != "cuda"
        or call.layers < 2
        or stack.bidirectional
        or call.reverse
        or call.packed
        or call.proj_size
        or call.compiling
        or call.subclass
        or call.forward_mode
        or not call.batch
        or peek_transform() is not None
    ):
        return None
    switch = os.environ.get("FASTSEQ_LSTM_WAVEFRONT", "")
    if switch == "0":
        return None
    shape = (call.batch, call.hidden_size, call.dtype, call.tf32, call.device_index)
    return _plan(shape, call.layers, call.steps, call.requires_grad, switch)


@remembered
def _plan(shape: tuple, layers: int, steps: int, training: bool, switch: str) -> Plan | None:
    """:func:`plan` for a shape of ``native_cuda.shares``. A layer alone may take more of the GPU, and less time."""
    (us, share), (us_back, share_back) = native_cuda.shares(*shape)
    widths = [min(layers, max(1, int(1 / s))) if s else 1 for s in (share, share_back)]
    if switch:
        return Plan(_forced(switch), *widths) if max(widths) > 1 else None
    passes = [(us, widths[0])] + [(us_back, widths[1])] * training
    if min(width for _, width in passes) < 2:
        return None
    times = {chunk: _total(layers, steps, chunk, passes) for chunk in CHUNKS if 2 * chunk <= steps}
    best = min(times, key=times.get, default=None)
    alone = native_cuda.best_us(*shape)[: len(passes)]
    serial = _total(layers, steps, steps, [(us, 1) for us in alone])
    return Plan(best, *widths) if best and serial >= WORTHWHILE * times[best] else None


def _forced(switch: str) -> int:
    if not switch.isdecimal() or not int(switch) or int(switch) % 8:
        raise ValueError(
            f"FASTSEQ_LSTM_WAVEFRONT must be 0 (off) or the steps of a chunk, a multiple of 8, got {switch!r}"
        )
    return int(switch)


def _total(layers: int, steps: int, chunk: int, passes: list[tuple[float, int]]) -> float:
    """Modelled microseconds of all passes (microseconds of a step, streams)."""
    return sum(schedule(layers, -(-steps // chunk), width, chunk * us + BEGIN_US)[1] for us, width in passes)


@remembered  # both passes of every call ask for it
def schedule(layers: int, chunks: int, width: int, us: float) -> tuple[list[tuple[int, int]], float]:
    """The order in which the host issues the chunks (layer, chunk), and the modelled end of the last, microseconds.

    Layer l runs on stream l modulo ``width``. A chunk follows the one before it in its layer, the same steps of the
    layer before, and all work of its stream.
    """
    pairs = list(itertools.product(range(layers), range(chunks)))
    starts = dict.fromkeys(pairs, 0.0)
    for issued in (False, True):  # the device alone, for the order; then with the host, which issues in that order
        order = sorted(pairs, key=lambda pair: (starts[pair], pair))
        issue = {pair: (k + 1) * HOST_US if issued else 0.0 for k, pair in enumerate(order)}
        free = [0.0] * width
        for layer, chunk in pairs:
            before = starts[layer - 1, chunk] + us if layer else 0.0
            starts[layer, chunk] = max(free[layer % width], before, issue[layer, chunk])
            free[layer % width] = starts[layer, chunk] + us
    return order, max(free)


def run(stack: Stack, input: Tensor, cell_states: bool, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All layers of time-major ``input`` -> output, h_n, c_n, the last layer's cell states or None."""
    weights = tuple(stack.weights_of(k) for k in range(stack.num_layers))
    masks, keep = (), 1.0
    if stack.dropout and stack.training:
        keep = 1 - stack.dropout
        like = input.new_empty(*input.shape[:2], stack.c0.size(-1))
        masks = tuple(like.bernoulli_(keep).bool() for _ in weights[1:])
    scale = 1 / keep if keep else 0.0
    tensors = (input, stack.h0, stack.c0, *itertools.chain(*weights))
    if needs_function(native_cuda, *tensors):
        return WavefrontFunction.apply(plan, cell_states, stack.lengths, masks, scale, *tensors)[:4]
    return _forward(Given(*tensors[:3], weights, masks, scale, stack.lengths), plan, Want(False, cell_states))[:4]


class WavefrontFunction(torch.autograd.Function):
    """(plan, whether cell states are wanted, the other fields of a ``Given``) -> as ``run``; five weights a layer."""

    @staticmethod
    def forward(ctx, plan: Plan, cell_states: bool, lengths, masks, scale: float, *tensors):
        given = Given(*tensors[:3], by_direction(tensors[3:]), masks, scale, lengths)
        *results, saved = _forward(given, plan, Want(True, cell_states))
        ctx.plan, ctx.scale, ctx.counts = plan, scale, (len(masks), len(tensors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, *masks, *tensors, *saved)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        lengths, *rest = ctx.saved_tensors
        masks, rest = tuple(rest[: ctx.counts[0]]), rest[ctx.counts[0] :]
        tensors, saved, needs = rest[: ctx.counts[1]], rest[ctx.counts[1] :], ctx.needs_input_grad[5:]

        def given(*tensors: Tensor | None) -> Given:
            return Given(*tensors[:3], by_direction(tensors[3:]), masks, ctx.scale, lengths)

        with without_autocast(tensors[0].device.type):
            if recompute(grads):
                results = differentiable_backward(lambda *t: _reference(given(*t)), tensors, grads, needs)
            else:
                results = distinct(_backward(given(*tensors), ctx.plan, saved, Grads(*grads), needs))
        return None, None, None, None, None, *results


def _reference(given: Given) -> tuple[Tensor, ...]:
    """output, h_n, c_n and cell states of the reference."""
    x, h_n, c_n = given.input, [], []
    for k, weights in enumerate(given.weights):
        x = _dropped(x, given, k - 1, slice(None)) if k else x
        layer = Layer(x, given.h0[k : k + 1], given.c0[k : k + 1], (weights,), given.lengths)
        x, h, c, states, _ = directions.forward(reference, layer, Want(False, True))
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n), states


class _Parts:
    """Both passes read these: the chunks, and the weights and states of each layer."""

    def __init__(self, given: Given, plan: Plan) -> None:
        steps, self.layers = given.input.size(0), len(given.weights)
        self.slices = [slice(t, min(t + plan.chunk, steps)) for t in range(0, steps, plan.chunk)]
        self.lengths = [self._within(given.lengths, part) for part in self.slices]
        self.weight_ih = [w.ih for w in given.weights]
        self.weight_hh = [w.hh.contiguous().unsqueeze(0) for w in given.weights]
        wide = given.c0.dtype if given.c0.dtype.itemsize > 2 else torch.float32
        self.h0 = given.h0.contiguous().split(1)
        self.c0 = given.c0.to(wide).contiguous().split(1)
        self.tf32 = tf32_allowed()

    def _within(self, lengths: Tensor | None, part: slice) -> Tensor | None:
        return None if lengths is None else (lengths - part.start).clamp(0, part.stop - part.start)

    def tasks(self, width: int, chunk, finish, backwards: bool) -> list[Task]:
        """A task for each chunk(layer, part), then one for each finish(layer)."""
        L, K = self.layers, len(self.slices)
        order, _ = schedule(L, K, width, 1000 * HOST_US)
        index = {pair: k for k, pair in enumerate(order)}
        tasks = []
        for layer, part in order:
            above = (index[layer - 1, part],) if layer and width > 1 else ()
            place = (L - 1 - layer, K - 1 - part) if backwards else (layer, part)
            tasks.append(Task(layer % width, lambda place=place: chunk(*place), above))
        for layer in range(L):
            real = L - 1 - layer if backwards else layer
            tasks.append(Task(layer % width, lambda real=real: finish(real)))
        return tasks


def _forward(given: Given, plan: Plan, want: Want) -> tuple:
    """-> output, h_n, c_n, cell states or None, saved: inputs of all layers but the first, activations, cell states."""
    parts, L, dtype = _Parts(given, plan), len(given.weights), given.input.dtype
    need_cells = [want.backward or (want.cell_states and layer == L - 1) for layer in range(L)]
    biases = [native_cuda.bias_of((w,)) for w in given.weights]
    first = native_cuda.product_of_steps(given.input, parts.weight_ih[0], biases[0], transpose_b=True)  # (T, B, 4H)
    h, c = list(parts.h0), list(parts.c0)
    outputs, inputs, activations, cells = ([[] for _ in range(L)] for _ in range(4))
    whole = [{} for _ in range(L)]

    def chunk(layer: int, part: int) -> None:
        if layer:
            x = _dropped(outputs[layer - 1][part], given, layer - 1, parts.slices[part])
            gates = native_cuda.product_of_steps(x, parts.weight_ih[layer], biases[layer], transpose_b=True)
            inputs[layer].append(x)
        else:
            gates = first[parts.slices[part]]
        output, h[layer], c[layer], of_gates, of_cells = _native.operators.lstm_recurrence_forward.default(
            gates,
            h[layer],
            c[layer],
            parts.weight_hh[layer],
            parts.lengths[part],
            False,
            parts.tf32,
            want.backward,
            need_cells[layer],
            True,
        )
        for kept, t in ((outputs, output), (activations, of_gates), (cells, of_cells)):
            kept[layer].append(t)

    def finish(layer: int) -> None:
        last, made = layer == L - 1, whole[layer]
        if last:
            made["output"] = torch.cat(outputs[layer])
        if need_cells[layer]:
            made["cells"] = torch.cat(cells[layer])
        if want.backward:
            made["activations"] = torch.cat(activations[layer])
            made["input"] = torch.cat(inputs[layer]) if layer else None
        made["c_n"] = c[layer].to(dtype)
        if last and want.cell_states:
            states = made["cells"].to(dtype, copy=True)
            made["states"] = states if given.lengths is None else layout.zero_padding(states, given.lengths)

    def tensors() -> list[Tensor]:
        made = itertools.chain(h, c, *outputs, *inputs, *activations, *cells, *(w.values() for w in whole))
        return _present(given, parts, biases, [first], made)

    streams.run(parts.tasks(plan.forward, chunk, finish, False), given.input.device, tensors)
    saved = [w[name] for name in ("input", "activations", "cells") for w in whole if w.get(name) is not None]
    c_n = torch.cat([w["c_n"] for w in whole])
    return whole[-1]["output"], torch.cat(h), c_n, whole[-1].get("states"), saved if want.backward else ()


def _backward(given: Given, plan: Plan, saved: list[Tensor], grads: Grads, needs) -> list[Tensor | None]:
    """The gradient of each tensor of the call, None where unwanted."""
    parts, L = _Parts(given, plan), len(given.weights)
    first = given.input if given.lengths is None else layout.zero_padding(given.input, given.lengths)
    inputs, activations, cells = (first, *saved[: L - 1]), saved[L - 1 : 2 * L - 1], saved[2 * L - 1 :]
    wide = parts.c0[0].dtype
    of_states = tuple(
        [None if g is None else g[layer : layer + 1].to(wide).contiguous() for layer in range(L)]
        for g in (grads.h_n, grads.c_n)
    )
    dh, dc = map(list, of_states)
    of_output, of_cells = layout.contiguous(grads.output), layout.contiguous(grads.cell_states)
    gates = [[None] * len(parts.slices) for _ in range(L)]  # their gradients, (chunk, B, 4H)
    below = [[None] * len(parts.slices) for _ in range(L)]  # the gradient of a layer's output, from the layer above
    results, of_weights = {}, by_direction(needs[3:])

    def chunk(layer: int, part: int) -> None:
        steps, last = parts.slices[part], layer == L - 1
        output = below[layer][part]
        if last:
            output = None if of_output is None else of_output[steps]
        gates[layer][part], dh[layer], dc[layer] = _native.operators.lstm_recurrence_backward.default(
            output,
            dh[layer],
            dc[layer],
            of_cells[steps] if last and of_cells is not None else None,
            activations[layer][steps],
            cells[layer][steps],
            cells[layer][steps.start - 1 : steps.start] if part else parts.c0[layer],
            parts.weight_hh[layer],
            parts.lengths[part],
            False,
            parts.tf32,
            True,
        )
        if layer:
            x = native_cuda.product_of_steps(gates[layer][part], parts.weight_ih[layer])
            below[layer - 1][part] = _dropped(x, given, layer - 1, steps)

    def finish(layer: int) -> None:
        rows, wanted = torch.cat(gates[layer]), of_weights[layer]
        before = None
        if wanted.hh:
            states = (activations[layer], cells[layer], given.h0[layer])
            before = layout.hidden_before(*states, given.lengths, False)
        results["weights", layer] = native_cuda.weight_gradients(rows, inputs[layer], before, wanted)
        if not layer and needs[0]:
            results["input"] = native_cuda.product_of_steps(rows, parts.weight_ih[0])

    def tensors() -> list[Tensor]:
        made = [results["weights", layer] for layer in range(L)]
        other = [first, *saved, of_output, of_cells, results.get("input")]
        return _present(given, parts, other, *of_states, dh, dc, *gates, *below, *made)

    streams.run(parts.tasks(plan.backward, chunk, finish, True), given.input.device, tensors)
    states = [
        torch.cat(g).to(like.dtype) if need else None
        for g, like, need in zip((dh, dc), (given.h0, given.c0), needs[1:3], strict=True)
    ]
    of_layers = itertools.chain(*(results["weights", layer] for layer in range(L)))
    return [results.get("input"), *states, *of_layers]


def _dropped(x: Tensor, given: Given, boundary: int, steps: slice) -> Tensor:
    """Dropout of these steps between two layers, or of their gradient: one rounding, as in torch's kernels."""
    return x * given.masks[boundary][steps] * given.scale if given.masks else x


def _present(given: Given, parts: _Parts, *more) -> list[Tensor]:
    """All tensors of a call that more than one stream may use."""
    flat = itertools.chain(
        (given.input, given.h0, given.lengths),
        *given.weights,
        given.masks,
        parts.lengths,
        parts.weight_hh,
        parts.h0,
        parts.c0,
    )
    return [t for t in itertools.chain(flat, *more) if t is not None]
