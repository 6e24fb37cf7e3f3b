"""The modules of ``fastseq parity``: fastseq's beside torch's, on the same weights; see parity_ops.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from fastseq.nn.attention import Attention
from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell
from fastseq.parity.ops import Draw, Leaves, Problem, beside, make_padding, uneven_lengths
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq
from fastseq.testing.numerics import plain_attention


def draw_parameters(draw: Draw, module: nn.Module) -> Leaves:
    """Values for all parameters, so that sums over a row are of order 1."""
    return {name: draw(*p.shape) / (p.shape[-1] if p.dim() else 1) ** 0.5 for name, p in module.named_parameters()}


def lstm_module_problem(
    draw: Draw,
    shape: tuple[int, int, int, int],
    form: str = "full",
    states: bool = True,
    spread: float = 1.0,
    **options,
) -> Problem:
    """``shape``: T, B, I, H. ``form``: "full", "unbatched", "packed" (unsorted) or "lengths" (the first is 0)."""
    steps, batch, inputs, hidden = shape
    theirs = nn.LSTM(inputs, hidden, **options)
    rows = theirs.num_layers * (2 if theirs.bidirectional else 1)
    sizes = (steps, inputs) if form == "unbatched" else (steps, batch, inputs)
    sizes = (batch, steps, inputs) if theirs.batch_first and form != "unbatched" else sizes
    leaves = draw_parameters(draw, theirs)
    leaves["input"] = spread * draw(*sizes)
    if states:
        middle = () if form == "unbatched" else (batch,)
        leaves |= {"h0": draw(rows, *middle, theirs.proj_size or hidden), "c0": draw(rows, *middle, hidden)}
    lengths = uneven_lengths(steps, batch, form == "lengths")

    def run(module: nn.Module, x: Leaves, input, hx, **kwargs) -> Leaves:
        weights = {name: x[name] for name, _ in theirs.named_parameters()}
        output, (h_n, c_n) = functional_call(module, weights, (input, hx), kwargs)
        output = output.data if form == "packed" else output
        return {"output": output, "h_n": h_n, "c_n": c_n}

    def given(x: Leaves) -> tuple:
        input = x["input"]
        if form == "packed":
            mixed = lengths.flip(0)
            input = pack_padded_sequence(input, mixed, theirs.batch_first, enforce_sorted=False)
        return input, (x["h0"], x["c0"]) if states else None

    def ours(x: Leaves, backend: str) -> Leaves:
        module = LSTM(inputs, hidden, dtype=x["input"].dtype, backend=backend, **options)
        return run(module, x, *given(x), **({"lengths": lengths.to(x["input"].device)} if form == "lengths" else {}))

    def plain(x: Leaves) -> Leaves:
        module = nn.LSTM(inputs, hidden, dtype=x["input"].dtype, **options)
        if form != "lengths":
            return run(module, x, *given(x))

        def alone(input: Tensor, hx: tuple[Tensor, Tensor]) -> Leaves:
            return run(module, x, input, hx)

        return _one_by_one(alone, x, lengths, 0 if theirs.batch_first else 1)

    return Problem(leaves, ours, plain)


def _one_by_one(run: Callable[..., Leaves], x: Leaves, lengths: Tensor, dim: int) -> Leaves:
    """What ``lengths`` means, without packing: each sequence alone, cut to its length. ``dim``: that of the batch."""
    results, steps = [], x["input"].size(1 - dim)
    for b, length in enumerate(lengths.tolist()):
        input = x["input"].narrow(dim, b, 1).narrow(1 - dim, 0, max(length, 1))
        hx = tuple(x[name][:, b : b + 1].contiguous() for name in ("h0", "c0"))
        row = run(input, hx)
        if length == 0:
            row = {"output": row["output"] * 0, "h_n": hx[0], "c_n": hx[1]}
        missing = steps - row["output"].size(1 - dim)
        row["output"] = F.pad(row["output"], (0, 0) + ((0, 0, 0, missing) if dim == 1 else (0, missing)))
        results.append(row)
    dims = {"output": dim, "h_n": 1, "c_n": 1}
    return {name: torch.cat([row[name] for row in results], d) for name, d in dims.items()}


def lstm_cell_module_problem(
    draw: Draw,
    shape: tuple[int, int, int],
    states: bool = True,
    unbatched: bool = False,
    spread: float = 1.0,
    **options,
) -> Problem:
    """``shape``: B, I, H."""
    batch, inputs, hidden = shape
    weights = draw_parameters(draw, nn.LSTMCell(inputs, hidden, **options))
    leading = () if unbatched else (batch,)
    leaves = dict(weights)
    leaves["input"] = spread * draw(*leading, inputs)
    if states:
        leaves |= {"h": draw(*leading, hidden), "c": draw(*leading, hidden)}

    def run(module: nn.Module, x: Leaves) -> Leaves:
        own = {name: x[name] for name in weights}
        args = (x["input"], (x["h"], x["c"])) if states else (x["input"],)
        return dict(zip(("h_n", "c_n"), functional_call(module, own, args), strict=True))

    def ours(x: Leaves, backend: str) -> Leaves:
        return run(LSTMCell(inputs, hidden, dtype=x["input"].dtype, backend=backend, **options), x)

    return Problem(leaves, ours, lambda x: run(nn.LSTMCell(inputs, hidden, dtype=x["input"].dtype, **options), x))


def attention_module_problem(
    draw: Draw, shape: tuple[int, int, int, int, int], score: str, padding: str = "lengths", **options
) -> Problem:
    """``shape``: B, T, S, Q, K."""
    batch, steps, keys, query_size, key_size = shape

    def module(dtype: torch.dtype, backend: str) -> Attention:
        return Attention(query_size, key_size, score=score, dtype=dtype, backend=backend, **options)

    weights = draw_parameters(draw, module(torch.float64, "auto"))
    leaves = weights | {"query": draw(batch, steps, query_size), "memory": draw(batch, keys, key_size)}
    padded, allowed = make_padding(padding, batch, steps, keys)

    def ours(x: Leaves, backend: str) -> Leaves:
        own = {name: x[name] for name in weights}
        args = (x["query"], x["memory"])
        options = beside(padded, x["query"]) | {"need_weights": True}
        called = functional_call(module(x["query"].dtype, backend), own, args, options)
        return dict(zip(("context", "weights"), called, strict=True))

    def plain(x: Leaves) -> Leaves:
        query, memory, rest = x["query"], x["memory"], {}
        keys = memory if score == "dot" else F.linear(memory, x["key_proj.weight"])
        if "v" in x:
            query = F.linear(query, x["query_proj.weight"], x.get("query_proj.bias"))
            rest = {"weight": x["v"], "gain": x.get("gain")}
        kind = "dot" if score == "general" else score  # the keys are projected already
        scale = options.get("scale", 1.0)
        called = plain_attention(
            query, keys, memory, score=kind, scale=scale, **beside({"allowed": allowed}, query), **rest
        )
        return dict(zip(("context", "weights"), called, strict=True))

    return Problem(leaves, ours, plain)


def seq2seq_problem(draw: Draw, **options) -> Problem:
    """A whole model, against itself on the torch backend; the first source has length 0, unless it is all there is."""
    sizes = {"src_vocab_size": 11, "tgt_vocab_size": 13, "embedding_dim": 6, "hidden_size": 8}

    def module(dtype: torch.dtype, backend: str) -> Seq2Seq:
        return Seq2Seq(Seq2SeqConfig(**sizes, backend=backend, **options)).to(dtype).eval()

    leaves = draw_parameters(draw, module(torch.float64, "torch"))
    tokens = torch.Generator().manual_seed(1)
    source = torch.randint(4, 11, (3, 5), generator=tokens)
    target = torch.randint(4, 13, (3, 4), generator=tokens)

    def run(x: Leaves, backend: str) -> Leaves:
        some = next(iter(x.values()))
        args = (t.to(some.device) for t in (source, torch.tensor([0, 5, 3]), target))
        return {"logits": functional_call(module(some.dtype, backend), x, tuple(args)).logits}

    return Problem(leaves, run, lambda x: run(x, "torch"))
