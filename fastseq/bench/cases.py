"""The one table of benchmark cases, for ``fastseq bench`` and ``benchmarks/``, and the problem of each."""

import argparse
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastseq.testing.problems import Problem
from fastseq.testing.problems.modules import lstm_cell_module_problem, lstm_module_problem
from fastseq.testing.problems.ops import context_problem, loss_problem

MODES = ("inference", "training")
KINDS = {  # kind -> the baseline that ratios refer to, and the measured call
    "lstm": ("nn.LSTM", "LSTM on a padded batch"),
    "packed": ("nn.LSTM", "LSTM on a PackedSequence, lengths uniform in T/5..T"),
    "lengths": ("nn.LSTM + pack", "the same lengths given as lengths=, where nn.LSTM packs and pads"),
    "cell": ("nn.LSTMCell", "one decode step from given states"),
    "additive": ("eager", "additive attention on projected queries and keys"),
    "dot": ("SDPA", "dot attention"),
    "loss": ("F.linear + F.cross_entropy", "output layer and label-smoothed loss of B rows"),
}

SHORT = {torch.float32: "", torch.bfloat16: " bf16", torch.float16: " f16", torch.float64: " f64"}


@dataclass(frozen=True)
class BenchCase:
    """One call to time.

    Attributes:
        group: the cases that its results are averaged with.
        kind: a key of ``KINDS``.
        steps, batch, input_size, hidden_size: T, B, I, H; attention ignores I, and H is the size of queries, keys and
            values.
        keys: S, attention only.
        classes: V, the loss only; its B rows have size H.
        tf32: allow TF32 in float32 products on a GPU; False: they are full float32; None: torch's flags stay as they
            are, by default TF32 in cuDNN and full float32 in matmul.
        goals: target ratios for inference and training; 0.97 means "no slower", less the noise.
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
    classes: int = 0
    dtype: torch.dtype = torch.float32
    tf32: bool | None = False
    device: str = "cpu"
    goals: tuple[float, float] = (0.97, 0.97)

    @property
    def name(self) -> str:
        """For example "lstm (50, 32, 256, 256) bf16": T, B, I, H; for attention B, T, S, H; for the loss B, V, H."""
        if self.keys:
            sizes = (self.batch, self.steps, self.keys, self.hidden_size)
        elif self.classes:
            sizes = (self.batch, self.classes, self.hidden_size)
        else:
            sizes = (self.steps, self.batch, self.input_size, self.hidden_size)
        sizes = sizes[1:] if self.kind == "cell" else sizes
        short = {True: " tf32", None: " default", False: SHORT[self.dtype]}[self.tf32]
        shape = f" {self.layers}-layer bidirectional" if self.bidirectional else ""
        shape = f" {self.layers}-layer" if self.layers > 1 and not self.bidirectional else shape
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


def _attention(kind: str, size: tuple[int, int, int, int], training_goal: float = 0.97) -> BenchCase:
    batch, steps, keys, hidden = size
    return BenchCase(f"{kind} attention", kind, steps, batch, hidden, hidden, keys=keys, goals=(0.97, training_goal))


LOSS_CASES = tuple(
    BenchCase("loss", "loss", 1, rows, hidden, hidden, classes=classes, dtype=dtype, goals=goals)
    for rows, classes, hidden, dtype, goals in (
        (2560, 64, 256, torch.float32, (0.97, 0.97)),
        (1600, 1024, 256, torch.float32, (0.97, 0.97)),
        (400, 4096, 512, torch.float32, (0.97, 0.97)),
        (1600, 16384, 512, torch.float32, (1.2, 1.4)),
        (400, 32000, 256, torch.float32, (1.2, 1.4)),
        (1600, 16384, 512, torch.bfloat16, (0.97, 0.97)),
    )
)
DOT_CASES = tuple(
    _attention("dot", (16, steps, keys, hidden))
    for steps, keys, hidden in itertools.product((1, 10, 50, 100), (50, 400), (64, 256, 512))
)
CPU_CASES = (
    *(BenchCase("float32", "lstm", *size, goals=goals) for size, goals in SIZES.items()),
    *(BenchCase("2-layer bidirectional", "lstm", *s, layers=2, bidirectional=True, goals=(1.1, 1.1)) for s in SIZES),
    *(BenchCase("packed", "packed", *size, goals=(1.35, 1.4)) for size in BATCHED),
    *(BenchCase("lengths", "lengths", *size) for size in BATCHED),
    *(BenchCase("bfloat16", "lstm", *size, dtype=torch.bfloat16) for size in SIZES),
    *(BenchCase("decode step", "cell", 1, 1, size, size, goals=(1.8, 0.97)) for size in (256, 512)),
    BenchCase("decode step", "cell", 1, 32, 256, 256),
    *(_attention("additive", size, goal) for size, goal in ATTENTION.items()),
    _attention("dot", (32, 1, 50, 256)),
    _attention("dot", (16, 50, 50, 256)),
    BenchCase("other forms", "lstm", *MIDDLE, proj_size=128),
    BenchCase("other forms", "lstm", *MIDDLE, dtype=torch.float16),
    BenchCase("other forms", "lstm", *MIDDLE, dtype=torch.float64),
)


PRECISIONS = {
    "bf16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "tf32": True},
    "f16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "default": {"dtype": torch.float32, "tf32": None},
}
CUDA_PRECISIONS = ("bf16", "tf32", "f16", "float32")
HIDDEN_SIZES = (512, 1024, 256, 128, 768, 2048, 64, 192)
LAYERS = {
    "one layer": {"kind": "lstm"},
    "packed": {"kind": "packed"},
    "2-layer bidirectional": {"kind": "lstm", "layers": 2, "bidirectional": True},
}


def _cuda_cases() -> tuple[BenchCase, ...]:
    """All combinations, most informative first: an interrupted run still holds the most important figures.

    Axis values are listed most informative first; cases are sorted by the sum of their axis indices.
    """
    ranked = []

    def add(rank: int, group: str, kind: str, steps: int, batch: int, hidden: int, precision: str, **options) -> None:
        options |= PRECISIONS[precision] | {"device": "cuda"}
        ranked.append((rank, BenchCase(f"{precision} {group}", kind, steps, batch, hidden, hidden, **options)))

    for rank, group, batch, hidden, precision in _ranked(LAYERS, (16, 64, 1, 128), HIDDEN_SIZES, CUDA_PRECISIONS):
        add(rank, group, steps=256, batch=batch, hidden=hidden, precision=precision, **LAYERS[group])
    for rank, batch, hidden, precision in _ranked((16, 64, 1), (1024, 512), ("bf16", "tf32", "float32")):
        add(rank, "projection", "lstm", 256, batch, hidden, precision, proj_size=hidden // 2)
    for rank, batch, hidden, precision in _ranked((1, 16, 64), (512, 1024, 256), ("bf16", "float32")):
        add(rank, "decode step", "cell", 1, batch, hidden, precision)
    for rank, kind, steps, hidden, precision in _ranked(("additive", "dot"), (1, 100), (512, 256), ("bf16", "float32")):
        add(rank, f"{kind} attention", kind, steps, 32, hidden, precision, keys=100)
    return tuple(case for _, case in sorted(ranked, key=lambda pair: pair[0]))


def _ranked(*axes):
    """All combinations of the axes' values, each preceded by the sum of its axis indices."""
    for pairs in itertools.product(*map(enumerate, axes)):
        indices, values = zip(*pairs, strict=True)
        yield sum(indices), *values


HEADLINE = (
    "lstm (50, 1, 256, 256)",
    "lstm (50, 64, 512, 512)",
    "packed (50, 64, 512, 512)",
    "lengths (50, 32, 256, 256)",
    "lstm (100, 1, 512, 512) bf16",
    "cell (1, 512, 512)",
    "additive (16, 50, 50, 256)",
    "dot (16, 50, 50, 256)",
)
CUDA_CASES = _cuda_cases()
SUITES = {  # name -> cases, description
    "quick": (
        tuple(case for case in CPU_CASES if case.batch * case.steps * case.hidden_size < 6e5 and case.layers == 1),
        "the small cases, about a minute",
    ),
    "headline": (
        tuple(case for name in HEADLINE for case in CPU_CASES if case.name == name),
        "the rows of the README, half a minute",
    ),
    "cpu": (CPU_CASES, "everything on the CPU, about six minutes"),
    "loss": (LOSS_CASES, "output layer and loss on the CPU, about a minute"),
    "dot": (DOT_CASES, "dot attention on the CPU over steps, positions and sizes, about a minute"),
    "cuda": (CUDA_CASES[:40], "the most informative cases on a GPU, some minutes"),
    "cuda-full": (CUDA_CASES, "everything on a GPU, about an hour"),
}
CASES = tuple(dict.fromkeys(case for cases, _ in SUITES.values() for case in cases))  # each once
MEAN_GOALS = {("bfloat16", "inference"): 1.05, ("bfloat16", "training"): 1.4}  # of a group's geometric mean


def parse_projected(text: str) -> tuple[int, ...]:
    """ "50,32,40,256" or "50,32,40,256,128" -> T, B, I, H and the projection's size, 0 for none."""
    shape, _, last = text.rpartition(",") if text.count(",") == 4 else (text, "", "0")
    sizes = (*parse_shape(shape), int(last) if last.strip().isdigit() else -1)
    if not 0 <= sizes[-1] < sizes[-2]:
        raise argparse.ArgumentTypeError(f"expected T,B,I,H,P with P below H, got {text!r}")
    return sizes


def parse_shape(text: str) -> tuple[int, ...]:
    """ "50,32,40,256" -> T, B, I, H."""
    sizes = tuple(int(part) if part.strip().isdigit() else 0 for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected T,B,I,H, four numbers of at least 1, got {text!r}")
    return sizes


def make_problem(case: BenchCase) -> Problem:
    """The computation of a case, its inputs drawn in float32."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if case.keys:
        return context_problem(draw, (case.batch, case.steps, case.keys, case.hidden_size), case.kind)
    if case.classes:
        shape = (case.batch, case.classes, case.hidden_size)
        return loss_problem(draw, shape, label_smoothing=0.1)
    if case.kind == "cell":
        return lstm_cell_module_problem(draw, (case.batch, case.input_size, case.hidden_size))
    shape = (case.steps, case.batch, case.input_size, case.hidden_size)
    options = {"num_layers": case.layers, "bidirectional": case.bidirectional, "proj_size": case.proj_size}
    form = "full" if case.kind == "lstm" else case.kind
    return lstm_module_problem(draw, shape, form, states=False, lengths=case_lengths(case), **options)


def case_lengths(case: BenchCase) -> Tensor:
    """(B,) lengths: uniform in T/5..T for the kinds "packed" and "lengths", else T."""
    if case.kind not in ("packed", "lengths"):
        return torch.full((case.batch,), case.steps)
    generator = torch.Generator().manual_seed(2)
    return torch.randint(max(1, case.steps // 5), case.steps + 1, (case.batch,), generator=generator)
