"""``fastseq bench --suite seq2seq``: whole models beside plain PyTorch, in training, greedy and beam search."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.bench.timing import time_interleaved
from fastseq.console import Bar
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq
from fastseq.testing.problems.plain_seq2seq import PlainSeq2Seq

FIGURES = ("training step", "greedy", "beam 5", "one sentence, greedy")
GOALS = {"greedy": 2.0, "beam 5": 2.2, "one sentence, greedy": 1.8}
TOLERANCE = 1e-4
BEAMS = 5
PLAIN, CELLS, OURS = "nn.LSTM", "nn.LSTMCell steps", "fastseq"
SUITE = "seq2seq"
WRONG = "WRONG"
DESCRIPTION = "whole models beside plain PyTorch code with equal weights; --quick: 8 of the 12, in five to ten minutes"
QUICK_ROUNDS = 3  # at least; a round of one figure takes up to 5 seconds


@dataclass(frozen=True)
class Size:
    """The shapes of one task.

    Attributes:
        source, target: lengths are uniform in these ranges, limits included.
        train, decode: sentences of a training step, and of a search.
        ratio: the limit on the tokens of an answer is ``ceil(ratio * source length) + 10``.
    """

    name: str
    vocab_sizes: tuple[int, int]
    width: int
    layers: int
    source: tuple[int, int]
    target: tuple[int, int]
    train: int
    decode: int
    ratio: float
    quick: tuple[tuple[str, bool], ...]


BOTH = (False, True)
EVERY = tuple((attention, feeding) for attention in ("additive", "dot") for feeding in BOTH)
SIZES = (
    Size("g2p", (30, 45), 256, 1, (4, 16), (4, 16), 128, 128, 1.0, EVERY),
    Size("translation", (16_000, 16_000), 512, 2, (8, 40), (8, 40), 64, 32, 1.0, (("additive", True), ("dot", False))),
    Size("long", (30_000, 30_000), 256, 1, (200, 400), (20, 50), 16, 16, 0.1, (("additive", True), ("dot", False))),
)


@dataclass(frozen=True)
class ModelCase:
    """One model of the suite."""

    size: Size
    attention: str
    input_feeding: bool
    group: str = SUITE
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.size.name}, {self.attention}{', input feeding' if self.input_feeding else ''}"

    @property
    def config(self) -> Seq2SeqConfig:
        size = self.size
        return Seq2SeqConfig(
            src_vocab_size=size.vocab_sizes[0],
            tgt_vocab_size=size.vocab_sizes[1],
            embedding_dim=size.width,
            hidden_size=size.width,
            encoder_layers=size.layers,
            decoder_layers=size.layers,
            attention=self.attention,
            input_feeding=self.input_feeding,
        )


CASES = tuple(ModelCase(size, *variant) for size in SIZES for variant in EVERY)
QUICK = tuple(case for case in CASES if (case.attention, case.input_feeding) in case.size.quick)


class Sentences:
    """Drawn sentences: padded sources and targets, and the longest answer of each."""

    def __init__(self, size: Size, count: int):
        generator = torch.Generator().manual_seed(count)

        def lengths(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (count,), generator=generator)

        def tokens(lengths: Tensor, vocab_size: int) -> Tensor:
            drawn = torch.randint(4, vocab_size, (count, int(lengths.max())), generator=generator)
            return drawn.masked_fill(torch.arange(drawn.size(1)) >= lengths[:, None], 0)

        self.lengths = lengths(*size.source)
        self.source = tokens(self.lengths, size.vocab_sizes[0])
        self.ratio = size.ratio
        self.limits = (self.lengths * size.ratio).ceil().long() + 10
        target = tokens(lengths(*size.target), size.vocab_sizes[1])
        self.target_in = F.pad(target, (1, 0), value=1)[:, :-1]
        self.labels = target

    def part(self, rows: slice) -> "Sentences":
        """Some of the sentences, without the padding that they do not need."""
        part = object.__new__(Sentences)
        part.lengths, part.limits, part.ratio = self.lengths[rows], self.limits[rows], self.ratio
        part.source = self.source[rows, : int(part.lengths.max())]
        part.target_in, part.labels = self.target_in[rows], self.labels[rows]
        return part


def make_models(case: ModelCase) -> dict[str, nn.Module]:
    """The candidates by name, with equal weights, in eval mode."""
    torch.manual_seed(0)
    ours = Seq2Seq(case.config)
    with torch.no_grad():
        ours.decoder.output.weight *= 4  # else all tokens are about equally likely, and rounding decides
    models = {PLAIN: PlainSeq2Seq(case.config), CELLS: PlainSeq2Seq(case.config, cells=True)}
    for plain in models.values():
        plain.load_state_dict(ours.state_dict())
    return {name: model.eval() for name, model in (models | {OURS: ours}).items()}


def logits_of(model: nn.Module, batch: Sentences) -> Tensor:
    """(B, T, V)."""
    result = model(batch.source, batch.lengths, batch.target_in)
    return result if isinstance(result, Tensor) else result.logits


def loss_of(model: nn.Module, batch: Sentences) -> Tensor:
    """Mean cross-entropy of the target tokens."""
    if isinstance(model, Seq2Seq):
        return model.loss(batch.source, batch.lengths, batch.target_in, batch.labels)
    return F.cross_entropy(logits_of(model, batch).flatten(0, 1), batch.labels.flatten(), ignore_index=0)


def training_step(model: nn.Module, batch: Sentences) -> Callable[[], None]:
    """The timed function: forward, loss, backward and an update of fused Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)  # lr 0: the weights stay equal

    def step() -> None:
        model.train()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()

    return step


def search(model: nn.Module, batch: Sentences, beams: int) -> Tensor:
    """The generated tokens (B, L)."""
    if isinstance(model, PlainSeq2Seq):
        limits = () if beams == 1 else (beams,)
        run = model.greedy if beams == 1 else model.beam_search
        return run(batch.source, batch.lengths, batch.limits, *limits)
    return model.generate(batch.source, batch.lengths, num_beams=beams, max_length_ratio=batch.ratio).sequences


def check_equal(case: ModelCase, models: dict[str, nn.Module], train: Sentences, decode: Sentences) -> None:
    """AssertionError unless logits, loss, gradients and generated tokens of all candidates agree."""
    results = {name: _numbers(model, train) for name, model in models.items()}
    largest = {what: float(expected.abs().max()) for what, expected in results[PLAIN].items()}
    vanished = 1e-3 * max(size for what, size in largest.items() if what.startswith("gradient"))
    for name in models:
        for what, expected in results[PLAIN].items():
            scale = max(largest[what], vanished)  # of a gradient that has vanished nothing but rounding is left
            error = float((results[name][what] - expected).abs().max()) / scale
            assert error <= TOLERANCE, f"{case.name}: {what} of {name}: relative error {error:.2g} to {PLAIN}"
    for beams in (1, BEAMS):
        tokens = {name: _texts(search(model, decode, beams)) for name, model in models.items()}
        for name in models:
            different = sum(a != b for a, b in zip(tokens[name], tokens[PLAIN], strict=True))
            assert not different, f"{case.name}: {different} answers of {name} with {beams} beams differ from {PLAIN}"


def _numbers(model: nn.Module, batch: Sentences) -> dict[str, Tensor]:
    """Logits of the target tokens, loss, and the gradient of every parameter."""
    logits, loss = logits_of(model, batch), loss_of(model, batch)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    named = {f"gradient of {name}": grad for name, grad in zip(parameters, grads, strict=True)}
    return {"logits": logits.detach()[batch.labels != 0], "loss": loss.detach()} | named


def _texts(tokens: Tensor) -> list[list[int]]:
    """The tokens of each sentence up to its first eos, without padding."""
    cut = []
    for row in tokens.tolist():
        row = row[: row.index(2) + 1] if 2 in row else row
        cut.append([token for token in row if token != 0])
    return cut


def timed_calls(models: dict[str, nn.Module], train: Sentences, decode: Sentences) -> dict[str, dict[str, Callable]]:
    """Figure -> candidate -> the timed function. One sentence: the one of median length."""
    middle = int(decode.lengths.argsort()[len(decode.lengths) // 2])
    single = decode.part(slice(middle, middle + 1))
    calls: dict[str, dict[str, Callable]] = {figure: {} for figure in FIGURES}
    for name, model in models.items():
        calls["training step"][name] = training_step(model, train)
        calls["greedy"][name] = partial(search, model, decode, 1)
        calls["beam 5"][name] = partial(search, model, decode, BEAMS)
        calls["one sentence, greedy"][name] = partial(search, model, single, 1)
    return calls


def measure(case: ModelCase, seconds: float, rounds: int | None, figures: tuple[str, ...]) -> Iterator[dict]:
    """Check one model, then time its figures: a row for each candidate, against the faster one of the plain models.

    Raises:
        AssertionError: the results of the candidates differ; then the model has no figure.
    """
    models = make_models(case)
    train, decode = (Sentences(case.size, count) for count in (case.size.train, case.size.decode))
    check_equal(case, models, train.part(slice(4)), decode.part(slice(4)))
    for figure, calls in timed_calls(models, train, decode).items():
        if figure in figures:
            times = time_interleaved(calls, seconds, rounds=rounds)
            yield from _rows(case, figure, times)


def _rows(case: ModelCase, figure: str, times: dict[str, list[float]]) -> Iterator[dict]:
    best = min((name for name in times if name != OURS), key=lambda name: statistics.median(times[name]))
    for name, own in times.items():
        p20, *_, p80 = statistics.quantiles(own, n=5)
        yield {
            "case": case.name,
            "group": "seq2seq",
            "mode": figure,
            "baseline": best,
            "goal": GOALS.get(figure, 1.0),
            "candidate": name,
            "served_by": "",
            "median_ms": statistics.median(own),
            "p20_ms": p20,
            "p80_ms": p80,
            "ratio": statistics.median(b / t for b, t in zip(times[best], own, strict=True)),
            "rounds": len(own),
            "roofline_ms": None,
            "over_roofline": None,
        }


def run(
    cases: tuple[ModelCase, ...], seconds: float, rounds: int | None, figures: tuple[str, ...] = FIGURES
) -> tuple[list[dict], list[str]]:
    """The rows of all cases, and a remark for each model whose results differ."""
    rows, remarks, bar = [], [], Bar(len(cases))
    for case in cases:
        bar.show(case.name)
        try:
            rows += measure(case, seconds, rounds, figures)
        except AssertionError as error:
            remarks.append(f"{WRONG}, no figure: {error}")
        bar.step()
    bar.close()
    return rows, remarks
