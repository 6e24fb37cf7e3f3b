"""Calls of the compiled LSTM operators, and the plain loop that they are compared with."""

import contextlib

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq.testing.numerics import assert_all_accurate

ops = torch.ops.fastseq

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["full", "lengths", "packed"]
DIRECTIONS = {
    "forward": (False,),
    "reverse": (True,),
    "both": (False, True),
}  # True: backwards in time
FRESH_DRAWS = 8  # that judge a problem whose own draw failed
PER_STEP = (True, False, False, True)  # of the results output, h_n, c_n, cell states


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def threads(count: int):
    """Use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loop(x, h0, c0, weight_ih, weight_hh, bias, weight_hr, lengths, backwards):
    """Run one direction, a sequence and a step at a time -> output, h_n, c_n, cell states. Differentiable.

    x (T, B, I); h0 (B, P), c0 (B, H); bias (4H,); weight_hr (P, H) or None; results (T, B, P), (B, P), (B, H) and
    (T, B, H).
    """
    T, B, _ = x.shape
    P, H = h0.size(1), c0.size(1)
    gates_x, columns = x @ weight_ih.T + bias, []
    for b in range(B):
        h, c, length = h0[b], c0[b], int(lengths[b])
        outputs, cells = [h0.new_zeros(P)] * T, [c0.new_zeros(H)] * T
        for t in reversed(range(length)) if backwards else range(length):
            i, f, g, o = (gates_x[t, b] + weight_hh @ h).split(H)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            h = h if weight_hr is None else weight_hr @ h
            outputs[t], cells[t] = h, c
        columns.append((torch.stack(outputs), h, c, torch.stack(cells)))
    output, h_n, c_n, cells = zip(*columns, strict=True)
    return torch.stack(output, 1), torch.stack(h_n), torch.stack(c_n), torch.stack(cells, 1)


def ragged(T, B, smallest):
    """Return unsorted lengths that include the smallest and the largest value."""
    return torch.tensor([smallest + (5 * b + T - smallest) % (T - smallest + 1) for b in range(B)])


class Problem:
    """Inputs of one layer, already rounded to the dtype, in the layout under test. projection: P, or 0."""

    def __init__(self, T, B, I, H, layout="full", dtype=torch.float32, direction="forward", bias=True, projection=0):  # noqa: E741
        self.form = (T, B, I, H, layout, dtype, direction, bias, projection)
        self.lengths = torch.full((B,), T)
        if layout == "lengths":
            self.lengths = ragged(T, B, smallest=0)
        if layout == "packed":
            self.lengths = ragged(T, B, smallest=1).sort(descending=True).values
        self.layout, self.dtype, self.backwards = layout, dtype, DIRECTIONS[direction]
        self.reverse = direction == "reverse"
        D, P = len(self.backwards), projection or H
        self.x = torch.randn(T, B, I).to(dtype)
        self.h0, self.c0 = torch.randn(D, B, P).to(dtype), torch.randn(D, B, H).to(dtype)
        self.bias, self.projection, self.weights = bias, projection, []
        for _ in range(D):
            self.weights += [I**-0.5 * torch.randn(4 * H, I), P**-0.5 * torch.randn(4 * H, P)]
            self.weights += [0.5 * torch.randn(4 * H), 0.5 * torch.randn(4 * H)] if bias else []
            self.weights += [2 * H**-0.5 * torch.randn(P, H)] if projection else []
        self.weights = [w.to(dtype) for w in self.weights]
        self.packed_x, self.batch_sizes = self.pack(self.x)

    def drawn_again(self):
        return Problem(*self.form)

    def pack(self, padded):
        """(T, B, X) -> (data in the layout under test, batch_sizes or None)."""
        if self.layout != "packed":
            return padded.contiguous(), None
        packed = pack_padded_sequence(padded, self.lengths)
        return packed.data.contiguous(), packed.batch_sizes

    def pad(self, data):
        """Pad per-step results of an operator -> (T, B, X)."""
        if self.layout != "packed":
            return data
        return pad_packed_sequence(PackedSequence(data, self.batch_sizes), total_length=self.x.size(0))[0]

    def arguments(self):
        """Return input, h0, c0, weights."""
        return self.packed_x, self.h0, self.c0, self.weights

    def sizes(self):
        return (self.lengths if self.layout == "lengths" else None, self.batch_sizes, self.reverse)

    def forward(self, need_activations=True, need_cell_states=True):
        return ops.lstm_forward(*self.arguments(), *self.sizes(), need_activations, need_cell_states)

    def backward(self, upstream, saved, need_input=True, need_weights=True):
        """upstream: gradients of output, h_n, c_n, cell states, or None; saved: activations, cell states."""
        return ops.lstm_backward(*upstream, *self.arguments(), *saved, *self.sizes(), need_input, need_weights)

    def both(self):
        """Return all results of a forward and a backward, with gradients of all results."""
        results = self.forward()
        output, h_n, c_n, activations, cells = results
        upstream = output, h_n, c_n, cells.to(self.dtype)
        grads = self.backward(upstream, (activations, cells))
        return [*results, *grads[:3], *grads[3]]

    def loop(self, dtype):
        """Run the loop in one dtype -> (output, h_n, c_n, cell states), and the leaves input, h0, c0, weights."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.x, self.h0, self.c0, *self.weights)]
        x, h0, c0, *weights = leaves
        count = len(weights) // len(self.backwards)
        results = []
        for d, backwards in enumerate(self.backwards):
            weight_ih, weight_hh, *rest = weights[d * count : (d + 1) * count]
            weight_hr = rest.pop() if self.projection else None
            bias = sum(rest) if rest else x.new_zeros(())
            results.append(loop(x, h0[d], c0[d], weight_ih, weight_hh, bias, weight_hr, self.lengths, backwards))
        output, h_n, c_n, cells = zip(*results, strict=True)
        return (torch.cat(output, 2), torch.stack(h_n), torch.stack(c_n), torch.cat(cells, 2)), leaves


def check(problem: Problem) -> None:
    """Compare results and all gradients of the operators with the loop in float64.

    One draw may be an outlier of the kernel, or one in which the errors of the plain loop cancel: if it fails, the
    verdict is that of ``FRESH_DRAWS`` others, compared together.
    """
    try:
        _check([problem])
    except AssertionError:
        _check([problem.drawn_again() for _ in range(FRESH_DRAWS)])


def _check(problems: list[Problem]) -> None:
    """Compare the results and the gradients of all problems, each name as one tensor."""
    outcomes = [_outcome(problem) for problem in problems]
    for group, factor in enumerate((2, 3)):
        sides = zip(*(outcome[group] for outcome in outcomes), strict=True)
        named = [{name: torch.cat([draw[name].flatten() for draw in side]) for name in side[0]} for side in sides]
        assert_all_accurate(*named, factor=factor)


def _outcome(problem: Problem) -> tuple[list[dict], list[dict]]:
    """The results, then the gradients, of the operators, of the loop in float64, and of the loop in the dtype."""
    exact, exact_leaves = problem.loop(torch.float64)
    plain, plain_leaves = problem.loop(problem.dtype)
    output, h_n, c_n, activations, cells = problem.forward()
    names, results = ("output", "h_n", "c_n", "cells"), (problem.pad(output), h_n, c_n, problem.pad(cells))
    values = [dict(zip(names, group, strict=True)) for group in (results, exact, plain)]
    values[0]["cells"] = values[0]["cells"].to(problem.dtype)

    upstream = [torch.randn(t.shape).to(problem.dtype) for t in exact]
    torch.autograd.backward(exact, [g.double() for g in upstream])
    torch.autograd.backward(plain, upstream)
    given = [problem.pack(g)[0] if per_step else g for g, per_step in zip(upstream, PER_STEP, strict=True)]
    grad_input, grad_h0, grad_c0, grad_weights = problem.backward(given, (activations, cells))
    count = 4 if problem.projection else 3
    assert len(grad_weights) == count * len(problem.backwards)
    grads = [problem.pad(grad_input), grad_h0, grad_c0]
    for k in range(0, len(grad_weights), count):
        weight_ih, weight_hh, bias, *projection = grad_weights[k : k + count]
        grads += [weight_ih, weight_hh, *[bias, bias][: 2 * problem.bias], *projection]
    leaves = [[leaf.grad for leaf in leaves] for leaves in (exact_leaves, plain_leaves)]
    names = ("input", "h0", "c0", *(f"weights[{k}]" for k in range(len(problem.weights))))
    return values, [{f"grad of {n}": g for n, g in zip(names, group, strict=True)} for group in (grads, *leaves)]
