"""The ops of ``fastseq parity``: each computation twice, by fastseq and in plain torch.

A problem draws named leaves; ``ours`` and ``plain`` map leaves to named outputs. ``plain`` runs in any dtype: in
float64 it is the oracle, in the dtype under test it is what torch itself makes of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.ops import attention, lstm, lstm_cell
from fastseq.testing.numerics import plain_attention

Leaves = dict[str, Tensor]
Draw = Callable[..., Tensor]


class Problem(NamedTuple):
    """The leaves in float64, and the two computations; ``ours`` also takes a backend."""

    leaves: Leaves
    ours: Callable[[Leaves, str], Leaves]
    plain: Callable[[Leaves], Leaves]


def lstm_cell_problem(draw: Draw, shape: tuple[int, ...], spread: float = 1.0) -> Problem:
    """``shape``: (..., H)."""
    leaves = {"gates": spread * draw(*shape[:-1], 4 * shape[-1]), "c": draw(*shape)}

    def ours(x: Leaves, backend: str) -> Leaves:
        return dict(zip(("h", "c_n"), lstm_cell(x["gates"], x["c"], backend=backend), strict=True))

    def plain(x: Leaves) -> Leaves:
        i, f, g, o = x["gates"].chunk(4, -1)
        c_n = f.sigmoid() * x["c"] + i.sigmoid() * g.tanh()
        return {"h": o.sigmoid() * c_n.tanh(), "c_n": c_n}

    return Problem(leaves, ours, plain)


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
    """``shape``: T, B, I, H. ``form``: "full", "lengths" (the first is 0 if B > 1) or "packed"."""
    steps, batch, inputs, hidden = shape
    projected = proj_size or hidden
    leaves = {
        "input": spread * draw(steps, batch, inputs),
        "h0": draw(batch, projected),
        "c0": draw(batch, hidden),
        "weight_ih": draw(4 * hidden, inputs) / inputs**0.5,
        "weight_hh": draw(4 * hidden, projected) / projected**0.5,
    }
    if bias:
        leaves |= {"bias_ih": draw(4 * hidden), "bias_hh": draw(4 * hidden)}
    if proj_size:
        leaves["weight_hr"] = draw(proj_size, hidden) / hidden**0.5
    lengths = None if form == "full" else uneven_lengths(steps, batch, form == "lengths")

    def ours(x: Leaves, backend: str) -> Leaves:
        weights = {name: t for name, t in x.items() if name.startswith(("weight", "bias"))}
        options = {"reverse": reverse, "return_cell_states": cell_states, "backend": backend}
        input = x["input"]
        if form == "lengths":
            options["lengths"] = lengths.to(input.device)
        if form == "packed":
            packed = pack_padded_sequence(input, lengths)
            input, options["batch_sizes"] = packed.data, packed.batch_sizes
        output, (h_n, c_n), *cells = lstm(input, (x["h0"], x["c0"]), **weights, **options)
        if form == "packed":
            output, *cells = (pad_packed_sequence(packed._replace(data=t))[0] for t in (output, *cells))
        return {"output": output, "h_n": h_n, "c_n": c_n} | ({"cell_states": cells[0]} if cell_states else {})

    return Problem(leaves, ours, lambda x: _plain_lstm(x, lengths, reverse, cell_states))


def uneven_lengths(steps: int, batch: int, with_zero: bool) -> Tensor:
    """(B,) from T downwards, so that they can be packed; with a zero in front where there is more than one."""
    lengths = torch.tensor([max(1, steps - b) for b in range(batch)])
    if with_zero and batch > 1:
        lengths = lengths.roll(1)
        lengths[0] = 0
    return lengths


def _plain_lstm(x: Leaves, lengths: Tensor | None, reverse: bool, cell_states: bool) -> Leaves:
    """torch's kernel: on the whole batch, or on each sequence alone, cut to its length."""
    input, h0, c0 = x["input"], x["h0"], x["c0"]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    weights = [x[name].contiguous() for name in names if name in x]

    def kernel(part: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        part = part.flip(0) if reverse else part
        hx = h.unsqueeze(0).contiguous(), c.unsqueeze(0).contiguous()  # cuDNN refuses others
        # bias, layers, dropout, training (cuDNN differentiates nothing else), bidirectional, batch_first
        options = "bias_ih" in x, 1, 0.0, torch.is_grad_enabled(), False, False
        output, h_n, c_n = torch._VF.lstm(part, hx, weights, *options)
        result = {"output": output, "h_n": h_n[0], "c_n": c_n[0]}
        if cell_states:  # after each step: the final state of what came until then
            prefixes = (part[: t + 1] for t in range(part.size(0)))
            runs = [torch._VF.lstm(p, hx, weights, *options) for p in prefixes]
            result["cell_states"] = torch.cat([c_t for _, _, c_t in runs])
        for name in {"output", "cell_states"} & result.keys():
            result[name] = result[name].flip(0) if reverse else result[name]
        return result

    if lengths is None:
        return kernel(input, h0, c0)
    rows = []
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        if length:
            row = kernel(input[:length, one], h0[one], c0[one])
        else:
            row = {"output": h0.new_zeros(0, 1, h0.size(1)), "h_n": h0[one], "c_n": c0[one]}
            row |= {"cell_states": c0.new_zeros(0, 1, c0.size(1))} if cell_states else {}
        rows.append(row)
    return {name: _join([row[name] for row in rows], input.size(0)) for name in rows[0]}


def _join(rows: list[Tensor], steps: int) -> Tensor:
    """Sequences (L, 1, X), padded to (T, 1, X), or states (1, X), side by side."""
    if rows[0].dim() == 2:
        return torch.cat(rows)
    return torch.cat([F.pad(row, (0, 0, 0, 0, 0, steps - row.size(0))) for row in rows], 1)


def attention_problem(
    draw: Draw,
    shape: tuple[int, int, int, int],
    score: str,
    padding: str = "none",
    spread: float = 1.0,
    one_step: bool = False,
) -> Problem:
    """``shape``: B, T, S, A. ``padding``: "none", "lengths", "mask" or "step_mask", each with a row without any key.
    "contexts" are those of the calls with and without weights, in torch those of matrix products and of SDPA.

    With a ``spread``, what makes dot scores large are whole numbers, whose products and sums are exact: the softmax of
    rounded scores of some hundreds is a matter of luck, and no two orders of summation agree on it.
    """
    batch, steps, keys, size = shape
    leaves = _attention_leaves(draw, (batch,) if one_step else (batch, steps), keys, size, score, spread)
    padded, allowed = make_padding(padding, batch, 1 if one_step else steps, keys)
    scale = 2.0 ** -(size.bit_length() // 2)  # about size ** -0.5, and exact

    def parts(x: Leaves) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [x[name] for name in ("query", "keys", "values")], {
            name: x[name] for name in ("weight", "bias", "gain") if name in x
        }

    def ours(x: Leaves, backend: str) -> Leaves:
        tensors, rest = parts(x)
        options = {"score": score, "scale": scale, "need_weights": True, "backend": backend}
        options |= beside(padded, tensors[0])
        context, weights = attention(*tensors, **rest, **options)
        alone = attention(*tensors, **rest, **options | {"need_weights": False})[0]
        return {"contexts": torch.stack((context, alone)), "weights": weights}

    def plain(x: Leaves) -> Leaves:
        (query, keys, values), rest = parts(x)
        query = query.unsqueeze(1) if one_step else query
        own = beside({"allowed": allowed}, query)["allowed"]
        context, weights = plain_attention(query, keys, values, score=score, scale=scale, allowed=own, **rest)
        alone = context
        if score in ("dot", "general") and query.dtype != torch.float64:
            alone = _sdpa(query if score == "dot" else query @ x["weight"], keys, values, scale, own)
        context, weights, alone = (t.squeeze(1) if one_step else t for t in (context, weights, alone))
        return {"contexts": torch.stack((context, alone)), "weights": weights}

    return Problem(leaves, ours, plain)


def _attention_leaves(draw: Draw, leading: tuple[int, ...], keys: int, size: int, score: str, spread: float) -> Leaves:
    """``leading``: B and, for more than one step, T."""
    queries = size + 1 if score == "general" else size
    leaves = {
        "query": spread * draw(*leading, queries),
        "keys": (spread if "additive" in score else 1.0) * draw(leading[0], keys, size),
    }
    if score == "general":
        leaves["weight"] = draw(queries, size) / (queries**0.5 if spread == 1 else 1)
    if spread != 1 and "additive" not in score:
        leaves = {name: t.round() for name, t in leaves.items()}
    leaves["values"] = draw(leading[0], keys, size + 2)
    if score in ("additive", "normed_additive"):
        leaves |= {"weight": draw(size), "bias": draw(size)}
    if score == "normed_additive":
        leaves["gain"] = draw()
    return leaves


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """torch's own kernel for dot scores, where the weights need not be held; rows without any key give 0."""
    heads = (t.unsqueeze(1) for t in (query, keys, values))
    if allowed is None:
        return F.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
    empty = ~allowed.any(-1, keepdim=True)  # such rows may be NaN in torch
    context = F.scaled_dot_product_attention(*heads, attn_mask=(allowed | empty).unsqueeze(1), scale=scale)
    return context.squeeze(1).masked_fill(empty, 0)


def beside(arguments: dict[str, Tensor | None], t: Tensor) -> dict[str, Tensor | None]:
    """The arguments on the device of ``t``."""
    return {name: value if value is None else value.to(t.device) for name, value in arguments.items()}


def make_padding(kind: str, batch: int, steps: int, keys: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """-> the op's argument, and where attention may go, (B, 1 or T, S)."""
    if kind == "none":
        return {}, None
    lengths = torch.tensor([keys - b if b else 0 for b in range(batch)]).clamp(0)
    allowed = (torch.arange(keys) < lengths.unsqueeze(1)).unsqueeze(1)
    if kind == "lengths":
        return {"lengths": lengths}, allowed
    if kind == "mask":
        allowed = allowed.flip(2)  # padding on the left: no lengths could say it
        return {"mask": allowed.squeeze(1)}, allowed
    allowed = torch.rand(batch, steps, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[0, 0] = False
    return {"mask": allowed}, allowed
