"""The one table of benchmark cases, their modules and their inputs: for ``fastseq bench`` and ``benchmarks/``."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell
from fastseq.ops import attention
from fastseq.testing.numerics import plain_attention

MODES = ("inference", "training")
KINDS = {  # kind -> the peer that ratios refer to, and the call that is measured
    "lstm": ("nn.LSTM", "LSTM on a padded batch"),
    "packed": ("nn.LSTM", "LSTM on a PackedSequence, lengths uniform in T/5..T"),
    "lengths": ("nn.LSTM + pack", "the same lengths given as lengths=, where nn.LSTM packs and pads"),
    "cell": ("nn.LSTMCell", "one decode step from given states"),
    "additive": ("eager", "additive attention on projected queries and keys"),
    "dot": ("SDPA", "dot attention"),
}

SHORT = {torch.float32: "", torch.bfloat16: " bf16", torch.float16: " f16", torch.float64: " f64"}


@dataclass(frozen=True)
class Case:
    """One call to time.

    Attributes:
        group: what its results are summarised with.
        kind: a key of ``KINDS``.
        steps, batch, input_size, hidden_size: T, B, I, H; for attention I counts nothing and H is the size of queries,
            keys and values.
        keys: S, attention only.
        tf32: float32 on a GPU whose products may be rounded to TF32; else they are full float32.
        goals: ratios that the project wants to reach, for inference and training; under 0.97 a user is slower off.
    """

    group: str
    kind: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    keys: int = 0
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    device: str = "cpu"
    goals: tuple[float, float] = (0.97, 0.97)

    @property
    def name(self) -> str:
        """For example "lstm (50, 32, 256, 256) bf16": T, B, I, H; for attention B, T, S, H."""
        if self.keys:
            sizes = (self.batch, self.steps, self.keys, self.hidden_size)
        else:
            sizes = (self.steps, self.batch, self.input_size, self.hidden_size)
        sizes = sizes[1:] if self.kind == "cell" else sizes
        short = " tf32" if self.tf32 else SHORT[self.dtype]
        shape = f" {self.layers}-layer bidirectional" if self.bidirectional else ""
        place = f" {self.device}" if self.device != "cpu" else ""
        return f"{self.kind} {sizes}{short}{shape}" + (f" proj {self.proj_size}" if self.proj_size else "") + place


SIZES = {  # (T, B, I, H) -> goals of one float32 layer: inference, training
    (50, 1, 256, 256): (1.6, 1.8),
    (100, 1, 512, 512): (1.5, 1.6),
    (50, 32, 256, 256): (1.05, 1.08),
    (50, 64, 512, 512): (1.05, 1.08),
    (25, 128, 512, 512): (1.05, 1.08),
    (100, 16, 1024, 1024): (1.2, 1.25),
}
BATCHED = tuple(size for size in SIZES if size[1] > 1)
MIDDLE = (50, 32, 256, 256)
ATTENTION = {(32, 1, 50, 256): 2.5, (16, 50, 50, 256): 15.0, (8, 100, 100, 512): 25.0}  # (B, T, S, H) -> training goal


def _attention(kind: str, size: tuple[int, int, int, int], training_goal: float = 0.97) -> Case:
    batch, steps, keys, hidden = size
    return Case(f"{kind} attention", kind, steps, batch, hidden, hidden, keys=keys, goals=(0.97, training_goal))


CPU_CASES = (
    *(Case("float32", "lstm", *size, goals=goals) for size, goals in SIZES.items()),
    *(Case("2-layer bidirectional", "lstm", *s, layers=2, bidirectional=True, goals=(1.1, 1.1)) for s in SIZES),
    *(Case("packed", "packed", *size, goals=(1.35, 1.4)) for size in BATCHED),
    *(Case("lengths", "lengths", *size) for size in BATCHED),
    *(Case("bfloat16", "lstm", *size, dtype=torch.bfloat16) for size in SIZES),
    *(Case("decode step", "cell", 1, 1, size, size, goals=(1.8, 0.97)) for size in (256, 512)),
    Case("decode step", "cell", 1, 32, 256, 256),
    *(_attention("additive", size, goal) for size, goal in ATTENTION.items()),
    _attention("dot", (32, 1, 50, 256)),
    _attention("dot", (16, 50, 50, 256)),
    Case("other forms", "lstm", *MIDDLE, proj_size=128),
    Case("other forms", "lstm", *MIDDLE, dtype=torch.float16),
    Case("other forms", "lstm", *MIDDLE, dtype=torch.float64),
)


PRECISIONS = {
    "bf16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "tf32": True},
    "f16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}
HIDDEN_SIZES = (512, 1024, 256, 128, 768, 2048, 64, 192)
LAYERS = {
    "one layer": {"kind": "lstm"},
    "packed": {"kind": "packed"},
    "2-layer bidirectional": {"kind": "lstm", "layers": 2, "bidirectional": True},
}


def _cuda_cases() -> tuple[Case, ...]:
    """All combinations, the most telling ones first, so that a run that is cut short has what matters.

    Each axis lists its values by how much they tell; a case comes the earlier, the nearer it is to the front of all.
    """
    found = []

    def add(rank: int, group: str, kind: str, steps: int, batch: int, hidden: int, precision: str, **options) -> None:
        options |= PRECISIONS[precision] | {"device": "cuda"}
        found.append((rank, Case(f"{precision} {group}", kind, steps, batch, hidden, hidden, **options)))

    for rank, group, batch, hidden, precision in _ranked(LAYERS, (16, 64, 1, 128), HIDDEN_SIZES, PRECISIONS):
        add(rank, group, steps=256, batch=batch, hidden=hidden, precision=precision, **LAYERS[group])
    for rank, batch, hidden, precision in _ranked((1, 16, 64), (512, 1024, 256), ("bf16", "float32")):
        add(rank, "decode step", "cell", 1, batch, hidden, precision)
    for rank, kind, steps, hidden, precision in _ranked(("additive", "dot"), (1, 100), (512, 256), ("bf16", "float32")):
        add(rank, f"{kind} attention", kind, steps, 32, hidden, precision, keys=100)
    return tuple(case for _, case in sorted(found, key=lambda pair: pair[0]))


def _ranked(*axes):
    """All combinations, each after the sum of the places of its values on their axes."""
    for pairs in itertools.product(*map(enumerate, axes)):
        places, values = zip(*pairs, strict=True)
        yield sum(places), *values


CUDA_CASES = _cuda_cases()
SUITES = {  # name -> cases, and what they are
    "quick": (
        tuple(case for case in CPU_CASES if case.batch * case.steps * case.hidden_size < 6e5 and case.layers == 1),
        "the small cases, about a minute",
    ),
    "cpu": (CPU_CASES, "everything on the CPU, about six minutes"),
    "cuda": (CUDA_CASES[:40], "the most telling cases on a GPU, some minutes"),
    "cuda-full": (CUDA_CASES, "everything on a GPU, about an hour"),
}
CASES = tuple(dict.fromkeys(case for cases, _ in SUITES.values() for case in cases))  # each once
MEAN_GOALS = {("bfloat16", "inference"): 1.05, ("bfloat16", "training"): 1.4}  # of a group's geometric mean


class PackAndPad(nn.Module):
    """What nn.LSTM needs around it to take lengths."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = lstm

    def forward(self, input: Tensor, *, lengths: Tensor):
        packed, states = self.lstm(pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False))
        return pad_packed_sequence(packed, total_length=input.size(0))[0], states


class AttentionOp(nn.Module):
    """:func:`fastseq.ops.attention` as a module; v of the additive score is its parameter."""

    def __init__(self, case: Case, backend: str | None):
        super().__init__()
        self.options, self.backend = {"score": case.kind}, backend
        factor = case.hidden_size**-0.5  # scores of order 1
        if case.kind == "dot":
            self.options["scale"] = factor
        else:
            self.weight = nn.Parameter(factor * torch.randn(case.hidden_size).to(case.dtype))

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        options = self.options | {"weight": getattr(self, "weight", None)}
        if self.backend is not None:
            return attention(query, keys, values, **options, backend=self.backend)[0]
        if self.options["score"] == "additive":
            return plain_attention(query, keys, values, **options)[0]
        heads = (x.unsqueeze(1) for x in (query, keys, values))  # one head: SDPA's fused kernels take 4 dimensions only
        return nn.functional.scaled_dot_product_attention(*heads, scale=options["scale"]).squeeze(1)


def make_module(case: Case, backend: str | None) -> nn.Module:
    """The main peer for None, else fastseq's with that backend; the same weights for all."""
    torch.manual_seed(0)
    return _on_cpu(case, backend).to(case.device)


def _on_cpu(case: Case, backend: str | None) -> nn.Module:
    if case.kind in ("additive", "dot"):
        return AttentionOp(case, backend)
    options = {"dtype": case.dtype} if backend is None else {"dtype": case.dtype, "backend": backend}
    if case.kind == "cell":
        return (nn.LSTMCell if backend is None else LSTMCell)(case.input_size, case.hidden_size, **options)
    options |= {"num_layers": case.layers, "bidirectional": case.bidirectional, "proj_size": case.proj_size}
    module = (nn.LSTM if backend is None else LSTM)(case.input_size, case.hidden_size, **options)
    return PackAndPad(module) if backend is None and case.kind == "lengths" else module


def make_inputs(case: Case) -> dict[str, object]:
    """Keyword arguments of the call, the same for every candidate; floating-point tensors require gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.device, case.dtype).requires_grad_()

    size = case.hidden_size
    if case.keys:
        shapes = {"query": case.steps, "keys": case.keys, "values": case.keys}
        return {name: draw(case.batch, length, size) for name, length in shapes.items()}
    if case.kind == "cell":
        return {"input": draw(case.batch, case.input_size), "hx": (draw(case.batch, size), draw(case.batch, size))}
    input = draw(case.steps, case.batch, case.input_size)
    if case.kind == "lstm":
        return {"input": input}
    lengths = case_lengths(case)
    if case.kind == "lengths":
        return {"input": input, "lengths": lengths.to(case.device)}
    packed = pack_padded_sequence(input.detach(), lengths, enforce_sorted=False)
    return {"input": packed._replace(data=packed.data.requires_grad_())}


def case_lengths(case: Case) -> Tensor:
    """(B,) lengths: uniform in T/5..T for the kinds "packed" and "lengths", else T."""
    if case.kind not in ("packed", "lengths"):
        return torch.full((case.batch,), case.steps)
    generator = torch.Generator().manual_seed(2)
    return torch.randint(max(1, case.steps // 5), case.steps + 1, (case.batch,), generator=generator)


def tensors_of(result: object) -> list[Tensor]:
    """The floating-point tensors of nested tuples and PackedSequences, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [t for part in result or () for t in tensors_of(part)]
