"""The ``native`` backend of the decoder op: C++ on the CPU (csrc/cpu/ops/decoder_forward.cpp)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import _native
from fastseq.ops.common.layout import contiguous
from fastseq.ops.decoder.spec import Grads, Greedy, Packed, Result, Search, Sequence, Source, State, Step, Weights

SKINNY_ROWS = 4  # up to here weights are read in place, the output projection too: packing costs more than it saves


def step_of_any_rows(
    tokens: Tensor, state: State, weights: Weights, source: Source, packed: Packed | None, need_weights: bool
) -> tuple[Step, Packed | None]:
    """One step for tokens (N,) of any integer dtype. Packs the weights for many rows, unless ``packed`` has them."""
    packed = packed_for(state.h.shape[1], weights, packed)
    if tokens.dtype != torch.int64:
        tokens = tokens.to(torch.int64)
    return step(tokens.contiguous(), state, weights, packed, source, need_weights), packed


def step(tokens: Tensor, state: State, weights: Weights, packed: Packed | None, source: Source, need_weights) -> Step:
    """One step for tokens (N,), without gradients."""
    table = None
    if packed is not None:
        weights, table = packed.weights, packed.table
    with_logits = weights.output is not None and state.h.shape[1] <= SKINNY_ROWS
    vector, logits, h_n, c_n, attention = _native.operators.decoder_step.default(
        tokens, *_arguments(state, weights, table, source, with_logits), need_weights
    )
    if source.memory is None:
        vector = h_n[-1]
    if not with_logits:
        logits = None if weights.output is None else F.linear(vector, weights.output, weights.output_bias)
    return Step(vector, logits, h_n, c_n, attention if need_weights and source.memory is not None else None)


def greedy(
    tokens: Tensor, state: State, weights: Weights, source: Source, packed: Packed | None, search: Search
) -> tuple[Greedy, Packed | None]:
    """Steps from tokens (N,), each with the most likely token of the one before."""
    packed, outputs, table = packed_for(state.h.shape[1], weights, packed), weights.output.shape[0], None
    if packed is not None:
        if packed.output is None:
            packed = packed._replace(output=_pack(weights.output, False))
        weights, table = packed.weights._replace(output=packed.output), packed.table
    if tokens.dtype != torch.int64:
        tokens = tokens.to(torch.int64)
    run, chosen, log_probs, done, h, c, vector = _native.operators.decoder_greedy.default(
        tokens.contiguous(), *_arguments(state, weights, table, source, True), outputs, *search
    )
    count = int(run)
    state = State(h, c, None if state.feed is None else vector)
    return Greedy(chosen[:count].t(), log_probs[:count].t(), done, state), packed


def _arguments(state: State, weights: Weights, table: Tensor | None, source: Source, with_logits: bool) -> tuple:
    h, c, feed = state
    return (
        weights.embedding,
        table,
        h.contiguous(),
        c.contiguous(),
        None if feed is None else feed.contiguous(),
        weights.matrices,
        weights.biases,
        weights.combine,
        weights.query,
        weights.query_bias,
        weights.score,
        weights.gain,
        source.keys,
        source.memory,
        source.lengths,
        source.prepared,
        weights.output if with_logits else None,
        weights.output_bias if with_logits else None,
        source.scale,
    )


def packed_for(rows: int, weights: Weights, packed: Packed | None) -> Packed | None:
    """The weights for a step of ``rows`` rows: ``packed`` if it has them as they are now; None: read them in place."""
    if rows <= SKINNY_ROWS:
        return None
    return packed if packed is not None and fits(packed, weights) else pack(weights, rows)


def pack(weights: Weights, rows: int) -> Packed:
    """The weights for steps of ``rows`` rows."""
    first, *others = weights.matrices
    vocabulary, size = weights.embedding.shape
    table = weights.embedding @ first[:, :size].t() if vocabulary <= 4 * rows else None
    packed = weights._replace(
        matrices=[_pack(w, True) for w in (first, *others)],
        combine=None if weights.combine is None else _pack(weights.combine, False),
        query=None if weights.query is None else _pack(weights.query, False),
    )
    sources = sources_of(weights)
    return Packed(packed, table, None, sources, tuple(version(t) for t in sources))


def fits(packed: Packed, weights: Weights) -> bool:
    """True if ``packed`` was made from these weights as they are now."""
    sources = sources_of(weights)
    return len(sources) == len(packed.made_from) and all(
        a is b and version(a) == v for a, b, v in zip(sources, packed.made_from, packed.versions, strict=True)
    )


def sources_of(weights: Weights) -> tuple[Tensor, ...]:
    """The tensors that ``pack`` and ``greedy`` copy."""
    given = (weights.embedding, *weights.matrices, weights.combine, weights.query, weights.output)
    return tuple(t for t in given if t is not None)


def version(t: Tensor) -> int:
    """The counter of changes in place; -1 for inference tensors, which have none."""
    return -1 if t.is_inference() else t._version


def _pack(weight: Tensor, is_gates: bool) -> Tensor:
    return _native.operators.decoder_pack.default(weight.contiguous(), is_gates)


def forward(s: Sequence) -> Result:
    """T steps with input feeding. Saved: states, cell states, activations and attention's tensors of every step."""
    vectors, attention, h_steps, *saved = _native.operators.decoder_forward.default(
        s.gates.contiguous(),
        s.h0.contiguous(),
        s.c0.contiguous(),
        s.feed.contiguous(),
        [w.contiguous() for w in s.matrices],
        [b.contiguous() for b in s.biases],
        contiguous(s.masks),
        s.combine.contiguous(),
        contiguous(s.query),
        contiguous(s.query_bias),
        contiguous(s.score),
        s.keys,
        s.memory,
        contiguous(s.lengths),
        s.prepared,
        s.scale,
    )
    return Result(vectors, attention, h_steps[:, -1].clone(), saved[0][:, -1].clone(), (h_steps, *saved))


def backward(s: Sequence, saved: tuple[Tensor, ...], grads: Grads, needs: tuple[bool, ...]) -> tuple:
    """The gradients of ``Sequence.tensors()``. saved: vectors, attention, then ``Result.saved``.

    The operator runs the steps; the gradients of the weights that need one follow by a product each over all steps.
    """
    vectors, attention, h_steps, cell_states, activations, inputs, queries, contexts = saved
    h_top, additive = h_steps[-1], s.query is not None
    gates, sums, joined, grad_queries, scores, key_sums, weight_sums, h0, c0, feed = (
        _native.operators.decoder_backward.default(
            torch.zeros_like(vectors) if grads.vectors is None else grads.vectors.contiguous(),
            contiguous(grads.attention),
            contiguous(grads.h_n),
            contiguous(grads.c_n),
            s.h0.contiguous(),
            s.c0.contiguous(),
            s.feed.contiguous(),
            [w.contiguous() for w in s.matrices],
            contiguous(s.masks),
            s.combine.contiguous(),
            contiguous(s.query),
            contiguous(s.score),
            s.keys,
            s.memory,
            contiguous(s.lengths),
            s.prepared,
            vectors,
            attention,
            cell_states,
            activations,
            queries if additive else h_top,
            s.scale,
        )
    )
    A, D = s.keys.shape[2], s.memory.shape[2]
    top, grad_sums, grad_rows = h_top.flatten(0, 1), sums.flatten(0, 1).t(), grad_queries.flatten(0, 1)
    starts = (*s.h0.unsqueeze(1), s.feed.unsqueeze(0))

    def combine():
        return torch.cat((grad_sums @ contexts.flatten(0, 1), grad_sums @ top), 1)

    def keys():
        return key_sums[..., :A] * s.score if additive else _sum_of_steps(scores, h_top, s)

    def of_input(k: int):
        if k == 0:
            below = torch.cat((starts[-1], vectors[:-1]))
        else:
            below = h_steps[k - 1] if s.masks is None else inputs[k - 1]
        return gates[k].flatten(0, 1).t() @ below.flatten(0, 1)

    def of_hidden(k: int):
        return gates[k].flatten(0, 1).t() @ torch.cat((starts[k], h_steps[k, :-1])).flatten(0, 1)

    @functools.cache  # b_ih and b_hh have the same one
    def of_bias(k: int):
        return gates[k].sum((0, 1))

    layers = range(s.layers())
    products = [lambda: gates[0], lambda: h0, lambda: c0, lambda: feed, combine, lambda: grad_rows.t() @ top]
    products += [lambda: grad_rows.sum(0), lambda: weight_sums.sum(0)[:A]]
    products += [keys, lambda: _sum_of_steps(attention, joined[..., :D], s), None, None, None]
    products += [functools.partial(of, k) for k in layers for of in (of_input, of_hidden)]
    products += [functools.partial(of_bias, k) for k in layers[1:] for _ in range(2)]
    return tuple(product() if need else None for product, need in zip(products, needs, strict=True))


def _sum_of_steps(weights: Tensor, rows: Tensor, s: Sequence) -> Tensor:
    """weights (T, N, P), rows (T, N, D) -> (B, P, D), the sum over the steps and rows of each sentence."""
    shape = s.memory.shape[0], s.rows_each()
    by_sentence = (t.unflatten(1, shape).transpose(0, 1).flatten(1, 2) for t in (weights, rows))
    weights, rows = by_sentence
    return weights.mT @ rows


# The fakes have the parameters of the operators' schemas (csrc/schemas.h).


def _fake_forward(gates, h, c, feed, weights, biases, masks, combine, query, query_bias, score, keys, memory, *_):  # noqa: PLR0917
    (T, N, _), (L, _, H) = gates.shape, h.shape
    P, A, D = *keys.shape[1:], memory.shape[2]
    inputs = (0,) if masks is None else (L - 1, T, N, H)
    queries = (0,) if query is None else (T, N, A)
    steps = (L, T, N, H)
    shapes = (T, N, H), (T, N, P), steps, steps, (L, T, N, 4 * H), inputs, queries, (T, N, D)
    return tuple(h.new_empty(shape) for shape in shapes)


def _fake_backward(grad_vectors, grad_weights, grad_h_n, grad_c_n, h, c, feed, weights, masks, combine, query, *others):  # noqa: PLR0917
    (T, N, H), L = grad_vectors.shape, h.shape[0]
    _, keys, memory = others[:3]
    (B, P, A), D = keys.shape, memory.shape[2]
    A16 = (A + 15) // 16 * 16
    scores = (T, N, P) if query is None else (0,)
    sums = [(0,), (0,)] if query is None else [(B, P, A16), (B, A16)]
    state = (L, N, H)
    shapes = (L, T, N, 4 * H), (T, N, H), (T, N, D + H), (T, N, A), scores, *sums, state, state, (N, H)
    return tuple(h.new_empty(shape) for shape in shapes)


def _fake_step(tokens, embedding, table, h, c, feed, weights, biases, combine, query_weight, query_bias, *others):  # noqa: PLR0917
    *_, memory, _, _, output_weight, _, _, need_weights = others
    (L, N, H), V = h.shape, 0 if output_weight is None else output_weight.shape[0]
    vector = (N, H) if memory is not None else (0,)
    logits = (N, V) if output_weight is not None else (0,)
    attention = (N, memory.shape[1]) if memory is not None and need_weights else (0,)
    return tuple(h.new_empty(shape) for shape in (vector, logits, (L, N, H), (L, N, H), attention))


def _fake_greedy(tokens, embedding, table, h, c, *others):
    steps, (L, N, H) = others[-1], h.shape
    counts, flags = tokens.new_empty, others[-6].new_empty
    states = [h.new_empty(L, N, H) for _ in range(2)]
    return counts(1), counts(steps, N), h.new_empty(steps, N), flags(N), *states, h.new_empty(N, H)


def _fake_pack(weight, is_gates):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())  # whole panels of the instruction set


if _native.available():
    torch.library.register_fake("fastseq::decoder_step", _fake_step)
    torch.library.register_fake("fastseq::decoder_greedy", _fake_greedy)
    torch.library.register_fake("fastseq::decoder_pack", _fake_pack)
    torch.library.register_fake("fastseq::decoder_forward", _fake_forward)
    torch.library.register_fake("fastseq::decoder_backward", _fake_backward)
