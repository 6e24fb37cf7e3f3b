"""Problems of the modules: LSTM, LSTMCell, Attention and Seq2Seq, each beside plain torch with the same weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq.nn.attention import Attention
from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq
from fastseq.testing.problems import Draw, Leaves, Problem, uneven_lengths
from fastseq.testing.problems.ops import make_padding, one_by_one, torch_attention


def lstm_module_problem(
    draw: Draw,
    shape: tuple[int, int, int, int],
    form: str = "full",
    states: bool = True,
    spread: float = 1.0,
    lengths: Tensor | None = None,
    **options,
) -> Problem:
    """``fastseq.LSTM`` beside ``nn.LSTM``.

    ``shape``: T, B, I, H. ``form``: "full", "unbatched", "packed" or "lengths". ``lengths``: (B,); default: uneven
    ones, unsorted, for "lengths" with a 0 if B > 1. ``options``: of ``nn.LSTM``.
    """
    steps, batch, input_size, hidden = shape
    like = nn.LSTM(input_size, hidden, device="meta", **options)
    if lengths is None:
        lengths = uneven_lengths(steps, batch, form == "lengths")
        lengths = lengths.flip(0) if form == "packed" else lengths
    leading = (steps,) if form == "unbatched" else (batch, steps) if like.batch_first else (steps, batch)
    inputs = {"input": spread * draw(*leading, input_size)}
    if form == "packed":
        packed = pack_padded_sequence(inputs["input"], lengths, like.batch_first, enforce_sorted=False)
        inputs["input"] = packed.data
    if states:
        rows = like.num_layers * (2 if like.bidirectional else 1)
        middle = () if form == "unbatched" else (batch,)
        inputs |= {"h0": draw(rows, *middle, like.proj_size or hidden), "c0": draw(rows, *middle, hidden)}
    plain = nn.LSTM
    if form == "lengths":
        plain = PackAndPad if int(lengths.min()) > 0 else _OneByOne

    def make(backend: str | None, dtype: torch.dtype) -> nn.Module:
        if backend is None:
            return plain(input_size, hidden, dtype=dtype, **options)
        return LSTM(input_size, hidden, dtype=dtype, backend=backend, **options)

    def arguments(x: Leaves) -> dict[str, object]:
        input, device = x["input"], x["input"].device
        if form == "packed":
            order = (t.to(device) for t in (packed.sorted_indices, packed.unsorted_indices))
            input = PackedSequence(input, packed.batch_sizes, *order)
        result = {"input": input} | ({"hx": (x["h0"], x["c0"])} if states else {})
        return result | ({"lengths": lengths.to(device)} if form == "lengths" else {})

    def named(result: tuple) -> Leaves:
        output, (h_n, c_n) = result
        return {"output": output.data if form == "packed" else output, "h_n": h_n, "c_n": c_n}

    return Problem(inputs, make, arguments, named)


class PackAndPad(nn.LSTM):
    """``nn.LSTM`` between ``pack_padded_sequence`` and ``pad_packed_sequence``; raises for length 0."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor) -> tuple:
        packed = pack_padded_sequence(input, lengths.cpu(), self.batch_first, enforce_sorted=False)
        output, states = super().forward(packed, hx)
        total = input.size(1 if self.batch_first else 0)
        return pad_packed_sequence(output, self.batch_first, total_length=total)[0], states


class _OneByOne(nn.LSTM):
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor], *, lengths: Tensor) -> tuple:
        batch_dim = 0 if self.batch_first else 1
        return one_by_one(super().forward, input, hx, lengths, batch_dim=batch_dim, state_dim=1)


def lstm_cell_module_problem(
    draw: Draw,
    shape: tuple[int, int, int],
    states: bool = True,
    unbatched: bool = False,
    spread: float = 1.0,
    **options,
) -> Problem:
    """``fastseq.LSTMCell`` beside ``nn.LSTMCell``. ``shape``: B, I, H."""
    batch, input_size, hidden = shape
    leading = () if unbatched else (batch,)
    inputs = {"input": spread * draw(*leading, input_size)}
    if states:
        inputs |= {"h": draw(*leading, hidden), "c": draw(*leading, hidden)}

    def make(backend: str | None, dtype: torch.dtype) -> nn.Module:
        if backend is None:
            return nn.LSTMCell(input_size, hidden, dtype=dtype, **options)
        return LSTMCell(input_size, hidden, dtype=dtype, backend=backend, **options)

    def arguments(x: Leaves) -> dict[str, object]:
        return {"input": x["input"]} | ({"hx": (x["h"], x["c"])} if states else {})

    return Problem(inputs, make, arguments, lambda result: dict(zip(("h_n", "c_n"), result, strict=True)))


def attention_module_problem(
    draw: Draw, shape: tuple[int, int, int, int, int], score: str, padding: str = "lengths", **options
) -> Problem:
    """``fastseq.Attention`` beside the same parameters in plain torch. ``shape``: B, T, S, Q, K."""
    batch, steps, keys, query_size, key_size = shape
    inputs = {"query": draw(batch, steps, query_size), "memory": draw(batch, keys, key_size)}
    padded = make_padding(padding, batch, steps, keys)

    def make(backend: str | None, dtype: torch.dtype) -> nn.Module:
        if backend is None:
            return _PlainAttention(query_size, key_size, score=score, dtype=dtype, **options)
        return Attention(query_size, key_size, score=score, dtype=dtype, backend=backend, **options)

    def arguments(x: Leaves) -> dict[str, object]:
        beside = {name: t.to(x["query"].device) for name, t in padded.items()}
        return {"query": x["query"], "keys": x["memory"], "need_weights": True} | beside

    return Problem(inputs, make, arguments, lambda result: dict(zip(("context", "weights"), result, strict=True)))


class _PlainAttention(Attention):
    """Parameters of ``fastseq.Attention``; the forward is its table of scores in plain torch."""

    def forward(self, query: Tensor, keys: Tensor, **padding) -> tuple[Tensor, Tensor | None]:
        memory, options = keys, {"scale": self.scale or 1.0}
        keys = memory if self.score == "dot" else F.linear(memory, self.key_proj.weight)
        if "additive" in self.score:
            query = F.linear(query, self.query_proj.weight, self.query_proj.bias)
            options |= {"weight": self.v, "gain": getattr(self, "gain", None)}
        score = "dot" if self.score == "general" else self.score  # the keys are projected already
        return torch_attention(query, keys, memory, score=score, **padding, **options)


def seq2seq_problem(draw: Draw, **options) -> Problem:
    """A whole model, beside the same model on the torch backend. Lengths of the sources: 0, 5, 3."""
    sizes = {"src_vocab_size": 11, "tgt_vocab_size": 13, "embedding_dim": 6, "hidden_size": 8}
    tokens = torch.Generator().manual_seed(1)
    source = torch.randint(4, 11, (3, 5), generator=tokens)
    target = torch.randint(4, 13, (3, 4), generator=tokens)
    batch = {"src": source, "src_lengths": torch.tensor([0, 5, 3]), "tgt_in": target}

    def make(backend: str | None, dtype: torch.dtype) -> nn.Module:
        return Seq2Seq(Seq2SeqConfig(**sizes, backend=backend or "torch", **options)).to(dtype).eval()

    def arguments(x: Leaves) -> dict[str, object]:
        return {name: t.to(next(iter(x.values())).device) for name, t in batch.items()}

    return Problem({}, make, arguments, lambda result: {"logits": result.logits})
