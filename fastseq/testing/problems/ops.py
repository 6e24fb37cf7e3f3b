"""Problems of the ops, each beside the same computation in plain torch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import ops
from fastseq.testing.numerics import plain_attention
from fastseq.testing.problems import Draw, Leaves, Problem, uneven_lengths


def lstm_cell_problem(draw: Draw, shape: tuple[int, ...], spread: float = 1.0) -> Problem:
    """``ops.lstm_cell``. ``shape``: (..., H). ``spread``: factor of the gates' pre-activations."""
    inputs = {"gates": spread * draw(*shape[:-1], 4 * shape[-1]), "c": draw(*shape)}

    def make(backend: str | None, dtype: torch.dtype) -> Callable[..., object]:
        return _plain_cell if backend is None else partial(ops.lstm_cell, backend=backend)

    return Problem(inputs, make, dict, lambda states: dict(zip(("h", "c_n"), states, strict=True)))


def _plain_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    c_n = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_n.tanh(), c_n


def lstm_problem(
    draw: Draw,
    shape: tuple[int, int, int, int],
    form: str = "full",
    reverse: bool = False,
    bias: bool = True,
    proj_size: int = 0,
    cell_states: bool = False,
    spread: float = 1.0,
) -> Problem:
    """``ops.lstm``. ``shape``: T, B, I, H. ``form``: "full", "lengths" (the first is 0 if B > 1) or "packed"."""
    steps, batch, input_size, hidden = shape
    projected = proj_size or hidden
    inputs = {
        "input": spread * draw(steps, batch, input_size),
        "h0": draw(batch, projected),
        "c0": draw(batch, hidden),
        "weight_ih": draw(4 * hidden, input_size) / input_size**0.5,
        "weight_hh": draw(4 * hidden, projected) / projected**0.5,
    }
    if bias:
        inputs |= {"bias_ih": draw(4 * hidden), "bias_hh": draw(4 * hidden)}
    if proj_size:
        inputs["weight_hr"] = draw(proj_size, hidden) / hidden**0.5
    lengths = uneven_lengths(steps, batch, form == "lengths")
    sizes = {}
    if form == "packed":
        inputs["input"], sizes["batch_sizes"], *_ = pack_padded_sequence(inputs["input"], lengths)
    if form == "lengths":
        sizes["lengths"] = lengths
    options = {"reverse": reverse, "return_cell_states": cell_states}

    def make(backend: str | None, dtype: torch.dtype) -> Callable[..., object]:
        return partial(_plain_lstm, **options) if backend is None else partial(ops.lstm, **options, backend=backend)

    def arguments(x: Leaves) -> dict[str, object]:
        weights = {name: t for name, t in x.items() if name.startswith(("weight", "bias"))}
        beside = {name: t.to(x["input"].device) if name == "lengths" else t for name, t in sizes.items()}
        return {"input": x["input"], "hx": (x["h0"], x["c0"])} | weights | beside

    def named(result: tuple) -> Leaves:
        output, (h_n, c_n), *cells = result
        return {"output": output, "h_n": h_n, "c_n": c_n} | ({"cell_states": cells[0]} if cells else {})

    return Problem(inputs, make, arguments, named)


def _plain_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool,
    return_cell_states: bool,
    **weights: Tensor,
) -> tuple:
    """``torch._VF.lstm`` with the arguments of ``ops.lstm``: on the whole batch, or on each sequence alone."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    flat = [weights[name].contiguous() for name in names if name in weights]

    def kernel(part: Tensor, hx: tuple[Tensor, Tensor]) -> tuple:
        part = part.flip(0) if reverse else part
        hx = tuple(state.unsqueeze(0).contiguous() for state in hx)  # cuDNN refuses others
        # bias, layers, dropout, training (cuDNN differentiates nothing else), bidirectional, batch_first
        options = "bias_ih" in weights, 1, 0.0, torch.is_grad_enabled(), False, False
        output, h_n, c_n = torch._VF.lstm(part, hx, flat, *options)
        per_step = [output]
        if return_cell_states:  # c_t is the final state of the first t steps
            prefixes = (part[: t + 1] for t in range(part.size(0)))
            per_step.append(torch.cat([torch._VF.lstm(p, hx, flat, *options)[2] for p in prefixes]))
        output, *cells = (t.flip(0) if reverse else t for t in per_step)
        return output, (h_n[0], c_n[0]), *cells

    if batch_sizes is not None:
        input, lengths = pad_packed_sequence(PackedSequence(input, batch_sizes))
    if lengths is None:
        return kernel(input, hx)
    output, states, *cells = one_by_one(kernel, input, hx, lengths, batch_dim=1, state_dim=0)
    if batch_sizes is not None:
        output, *cells = (pack_padded_sequence(t, lengths).data for t in (output, *cells))
    return output, states, *cells


def one_by_one(
    run: Callable[[Tensor, tuple[Tensor, Tensor]], tuple],
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    lengths: Tensor,
    *,
    batch_dim: int,
    state_dim: int,
) -> tuple:
    """Run each sequence alone, cut to its length: the definition of ``lengths``, without packing.

    A sequence of length 0 gives zeros and its initial states.

    Args:
        run: (input, (h0, c0)) of one sequence -> output, (h_n, c_n), further tensors per step.
        batch_dim: the batch's dimension of the input, 0 or 1; the other one holds the steps.
        state_dim: the batch's dimension of h0 and c0.
    """
    time_dim, rows = 1 - batch_dim, []
    for b, length in enumerate(lengths.tolist()):
        part = input.narrow(batch_dim, b, 1).narrow(time_dim, 0, max(length, 1))
        before = tuple(state.narrow(state_dim, b, 1).contiguous() for state in hx)
        output, after, *more = run(part, before)
        per_step = [t if length else 0 * t for t in (output, *more)]
        missing = [(0, 0) * (2 - time_dim) + (0, input.size(time_dim) - t.size(time_dim)) for t in per_step]
        per_step = [F.pad(t, pad) for t, pad in zip(per_step, missing, strict=True)]
        rows.append((*(after if length else before), *per_step))
    h_n, c_n, output, *more = zip(*rows, strict=True)
    h_n, c_n = torch.cat(h_n, state_dim), torch.cat(c_n, state_dim)
    return torch.cat(output, batch_dim), (h_n, c_n), *(torch.cat(t, batch_dim) for t in more)


def attention_problem(
    draw: Draw,
    shape: tuple[int, int, int, int],
    score: str,
    padding: str = "none",
    spread: float = 1.0,
    one_step: bool = False,
    coverage: bool = False,
) -> Problem:
    """``ops.attention``, called with and without weights; "contexts" stacks both results.

    ``shape``: B, T, S, A. ``padding``: "none", "lengths", "mask" or "step_mask", each with a row without any key.

    With a ``spread``, queries and keys of dot scores are whole numbers, whose products and sums are exact. Scores of
    some hundreds that depend on the order of summation would give different softmax results.
    """
    batch, steps, keys, size = shape
    inputs = _attention_inputs(draw, (batch,) if one_step else (batch, steps), keys, size, score, spread)
    if coverage:
        inputs |= {"coverage": draw(*inputs["query"].shape[:-1], keys), "coverage_weight": draw(size)}
    padded = make_padding(padding, batch, 1 if one_step else steps, keys)
    options = {"score": score, "scale": 2.0 ** -(size.bit_length() // 2)}  # about size ** -0.5, and exact

    def make(backend: str | None, dtype: torch.dtype) -> Callable[..., object]:
        call = torch_attention if backend is None else partial(ops.attention, backend=backend)
        op_by_op = backend is None and ("additive" in score or dtype == torch.float64)

        def both(**arguments) -> tuple[Tensor, Tensor]:
            context, weights = call(**arguments, **options, need_weights=True)
            alone = context if op_by_op else call(**arguments, **options, need_weights=False)[0]
            return torch.stack((context, alone)), weights

        return both

    def arguments(x: Leaves) -> dict[str, object]:
        return x | {name: t.to(x["query"].device) for name, t in padded.items()}

    return Problem(inputs, make, arguments, lambda result: dict(zip(("contexts", "weights"), result, strict=True)))


def _attention_inputs(draw: Draw, leading: tuple[int, ...], keys: int, size: int, score: str, spread: float) -> Leaves:
    """``leading``: B and, for more than one step, T."""
    queries = size + 1 if score == "general" else size
    inputs = {
        "query": spread * draw(*leading, queries),
        "keys": (spread if "additive" in score else 1.0) * draw(leading[0], keys, size),
    }
    if score == "general":
        inputs["weight"] = draw(queries, size) / (queries**0.5 if spread == 1 else 1)
    if spread != 1 and "additive" not in score:
        inputs = {name: t.round() for name, t in inputs.items()}
    inputs["values"] = draw(leading[0], keys, size + 2)
    if score in ("additive", "normed_additive"):
        inputs |= {"weight": draw(size), "bias": draw(size)}
    if score == "normed_additive":
        inputs["gain"] = draw()
    return inputs


def context_problem(draw: Draw, shape: tuple[int, int, int, int], score: str) -> Problem:
    """``ops.attention`` without weights and padding, for timing. ``shape``: B, T, S, A; values have size A."""
    batch, steps, keys, size = shape
    inputs = {"query": draw(batch, steps, size), "keys": draw(batch, keys, size), "values": draw(batch, keys, size)}
    factor = size**-0.5  # scores of order 1
    options = {"score": score} | ({"scale": factor} if score == "dot" else {})
    if score == "additive":
        inputs["weight"] = factor * draw(size)

    def make(backend: str | None, dtype: torch.dtype) -> Callable[..., object]:
        call = (
            partial(torch_attention, need_weights=False) if backend is None else partial(ops.attention, backend=backend)
        )
        return partial(call, **options)

    return Problem(inputs, make, dict, lambda result: {"context": result[0]})


def torch_attention(
    query: Tensor,  # (B, T, A), or (B, A) for a single step
    keys: Tensor,  # (B, S, A)
    values: Tensor,  # (B, S, D)
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the arguments of ``ops.attention``: op by op, or by SDPA for dot scores without weights.

    In float64, as the oracle, always op by op.
    """
    if query.dim() == 2:
        if "coverage" in options:
            options["coverage"] = options["coverage"].unsqueeze(1)
        one_step = torch_attention(
            query.unsqueeze(1), keys, values, lengths=lengths, mask=mask, need_weights=need_weights, **options
        )
        return tuple(t if t is None else t.squeeze(1) for t in one_step)
    allowed = mask if mask is None or mask.dim() == 3 else mask.unsqueeze(1)
    if lengths is not None:
        allowed = (torch.arange(keys.size(1), device=keys.device) < lengths.unsqueeze(1)).unsqueeze(1)
    if need_weights or "additive" in options["score"] or query.dtype == torch.float64:
        return plain_attention(query, keys, values, allowed=allowed, **options)
    query = query if options["score"] == "dot" else query @ options["weight"]
    return _sdpa(query, keys, values, options["scale"], allowed), None


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """SDPA for dot scores without weights; rows without any key give 0."""
    heads = (t.unsqueeze(1) for t in (query, keys, values))  # one head: the fused kernels take 4 dimensions only
    if allowed is None:
        return F.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
    empty = ~allowed.any(-1, keepdim=True)  # such rows may be NaN in torch
    context = F.scaled_dot_product_attention(*heads, attn_mask=(allowed | empty).unsqueeze(1), scale=scale)
    return context.squeeze(1).masked_fill(empty, 0)


def make_padding(kind: str, batch: int, steps: int, keys: int) -> dict[str, Tensor]:
    """The argument of ``ops.attention`` for a padding: {"lengths": (B,)}, {"mask": (B, S)}, {"mask": (B, T, S)}."""
    if kind == "none":
        return {}
    lengths = torch.tensor([keys - b if b else 0 for b in range(batch)]).clamp(0)
    if kind == "lengths":
        return {"lengths": lengths}
    if kind == "mask":  # padding on the left, which no lengths can express
        return {"mask": (torch.arange(keys) < lengths.unsqueeze(1)).flip(1)}
    mask = torch.rand(batch, steps, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, 0] = False
    return {"mask": mask}


def loss_problem(
    draw: Draw,
    shape: tuple[int, int, int],
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    bias: bool = True,
    ignored: bool = False,
    spread: float = 1.0,
) -> Problem:
    """``ops.linear_cross_entropy``. ``shape``: N, V, H. ``ignored``: every third target is ``ignore_index``.

    With a ``spread``, the logits are whole numbers, exact in every dtype: see ``attention_problem``.
    """
    rows, classes, size = shape
    inputs = {"input": draw(rows, size) * spread, "weight": draw(classes, size)}
    if bias:
        inputs["bias"] = draw(classes)
    if spread != 1:
        inputs = {name: t.round() for name, t in inputs.items()}
    else:
        inputs["weight"] = inputs["weight"] / size**0.5
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    if ignored:
        targets[::3] = -100
    options = {"label_smoothing": label_smoothing, "reduction": reduction}

    def make(backend: str | None, dtype: torch.dtype) -> Callable[..., object]:
        call = torch_loss if backend is None else partial(ops.linear_cross_entropy, backend=backend)
        return partial(call, **options)

    def arguments(x: Leaves) -> dict[str, object]:
        return x | {"target": targets.to(x["input"].device)}

    return Problem(inputs, make, arguments, lambda result: {"loss": result})


def torch_loss(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    """Output layer and cross-entropy as plain torch code writes them: all logits, then the loss in float32 at least."""
    logits = F.linear(input, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)
