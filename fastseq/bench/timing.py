"""The engine of ``fastseq bench``: a parity check, then timings in which the candidates take turns in one process."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.bench.cases import KINDS, Case, make_inputs, make_module, tensors_of
from fastseq.dispatch import record
from fastseq.testing.numerics import Results, compare, evaluate, float32_products, is_refusal

ROUNDS = 5  # at least
SAMPLE_MS = 3.0  # short calls are repeated for about this long between two looks at the clock


class Problem:
    """Everything about one case that all candidates share: inputs, gradients of the outputs, and the float64 oracle."""

    def __init__(self, case: Case):
        self.case = case
        self.peer = make_module(case, None)
        self.inputs = make_inputs(case)
        self._oracle: Results | None = None
        self._baselines: dict[bool, Results] = {}
        self._cotangents: list[Tensor] = []

    def oracle(self) -> Results:
        """The peer in float64 on the same, already rounded numbers; outputs and gradients."""
        if self._oracle is None:
            self._oracle = self.run(make_module(self.case, None).double(), _wide(self.inputs))
        return self._oracle

    def baseline(self, train: bool) -> Results:
        """What the peer gives in the dtype and mode that are timed: oneDNN rounds differently without gradients."""
        if train not in self._baselines:
            self._baselines[train] = self.run(self.peer, train=train)
        return self._baselines[train]

    def run(self, module: nn.Module, inputs: dict | None = None, train: bool = True) -> Results:
        """Outputs and, in training, gradients of all inputs and parameters, under the peer's names."""
        inputs = self.inputs if inputs is None else inputs
        leaves = [*tensors_of(tuple(inputs.values())), *module.parameters()]
        names = [f"{name} {k}" for name, value in inputs.items() for k in range(len(tensors_of(value)))]
        names += [name for name, _ in self.peer.named_parameters()]
        with torch.set_grad_enabled(train):
            outputs = tensors_of(module(**inputs))
            return evaluate(
                {f"output {k}": t for k, t in enumerate(outputs)},
                dict(zip(names, leaves, strict=True)) if train else {},
            )

    def step(self, module: nn.Module, train: bool) -> Callable[[], None]:
        """What is timed: a forward without gradients, or a forward and a backward from all outputs to all leaves."""
        inputs = self.inputs
        leaves = [*tensors_of(tuple(inputs.values())), *module.parameters()]

        def infer() -> None:
            with torch.no_grad():
                module(**inputs)

        def train_step() -> None:
            outputs = tensors_of(module(**inputs))
            if not self._cotangents:
                self._cotangents += [torch.randn_like(t) for t in outputs]
            torch.autograd.backward(outputs, self._cotangents)
            for leaf in leaves:
                leaf.grad = None

        return train_step if train else infer


def _wide(value):
    """The same nested arguments with floating-point tensors in float64, as new leaves."""
    if isinstance(value, dict):
        return {name: _wide(part) for name, part in value.items()}
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_() if value.is_floating_point() else value
    if hasattr(value, "batch_sizes"):
        return value._replace(data=_wide(value.data))
    return tuple(_wide(part) for part in value)


def check_parity(problem: Problem, module: nn.Module, train: bool) -> None:
    """AssertionError unless ``module`` is as accurate as the peer, both measured against float64.

    Compares what is timed: the outputs, and in training the gradients of every parameter and input.
    """
    results = problem.run(module, train=train)
    wrong = [c for c in compare(results, problem.oracle(), problem.baseline(train)) if not c.ok]
    assert not wrong, f"{problem.case.name}: {'; '.join(map(str, wrong))}"


@dataclass(frozen=True)
class Timing:
    """One candidate of one case and mode; times in milliseconds per call.

    ``ratio``: how many times as fast as the main peer, the median over rounds of peer / own. Both sides of a round meet
    the same neighbours, so load that comes and goes cancels; in a quotient of two medians it does not.
    """

    candidate: str
    served_by: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rounds: int


def wall_ms(run: Callable[[], None], calls: int) -> float:
    """Milliseconds that ``calls`` calls take by the clock on the wall."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) / 1e6


def cuda_ms(run: Callable[[], None], calls: int) -> float:
    """Milliseconds from the first to the last of what the calls give the GPU to do, gaps included: its own events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


CLOCKS = {"cpu": wall_ms, "cuda": cuda_ms}


def time_interleaved(
    runs: dict[str, Callable[[], None]], seconds: float, clock: Callable[[Callable[[], None], int], float] = wall_ms
) -> dict[str, list[float]]:
    """Milliseconds per call, the candidates taking turns; at least ``ROUNDS`` rounds.

    Each round has an order of its own, drawn: who runs after whom, and so finds whose caches, favours none.
    """
    repeats = {name: _calls_per_sample(run, clock) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    generator, order, end = random.Random(0), list(runs), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < ROUNDS:
        generator.shuffle(order)
        for name in order:
            times[name].append(clock(runs[name], repeats[name]) / repeats[name])
    return times


def _calls_per_sample(run: Callable[[], None], clock: Callable[[Callable[[], None], int], float]) -> int:
    """Warm up, and count how many calls fill SAMPLE_MS."""
    for _ in range(2):
        milliseconds = clock(run, 1)
        if milliseconds > 20 * SAMPLE_MS:  # warm or not, one call is enough
            return 1
    return max(1, round(SAMPLE_MS / milliseconds))


class Candidate(NamedTuple):
    """A module that passed the parity check, and who serves its call."""

    name: str
    module: nn.Module
    served_by: str


def candidates(problem: Problem, backends: tuple[str, ...], train: bool) -> tuple[list[Candidate], list[str]]:
    """The main peer, then every backend that serves the case in this mode; and the refusals of the others.

    Raises:
        AssertionError: a backend's result is wrong.
    """
    main = KINDS[problem.case.kind][0]
    found, remarks = [Candidate(main, problem.peer, main)], []
    for name in backends:
        module = make_module(problem.case, name)
        try:
            with record() as choices:
                check_parity(problem, module, train)
        except RuntimeError as error:
            if not is_refusal(error):
                raise
            remarks.append(f"{problem.case.name}: {error}")
            continue
        found.append(Candidate(name, module, "+".join(sorted({choice.backend for choice in choices}))))
    return found, remarks


def measure(
    problem: Problem, backends: tuple[str, ...], train: bool, seconds: float, peers: dict[str, nn.Module] | None = None
) -> tuple[list[Timing], list[str]]:
    """Time one case in one mode: the main peer first, then each backend that serves it, then other ``peers``.

    Returns:
        timings and remarks: refusals of backends, and peers that are less accurate than fastseq may be.

    Raises:
        AssertionError: a backend's result is wrong; nothing of this case is timed then.
    """
    with float32_products(problem.case.tf32):
        found, remarks = candidates(problem, backends, train)
        for name, module in (peers or {}).items():
            try:
                check_parity(problem, module, train)
            except AssertionError as error:
                remarks.append(f"peer {name}: {error}")
            found.append(Candidate(name, module, name))
        runs = {c.name: problem.step(c.module, train) for c in found}
        return time_candidates(problem.case, found, runs, seconds), remarks


def time_candidates(
    case: Case, found: list[Candidate], runs: dict[str, Callable[[], None]], seconds: float
) -> list[Timing]:
    """Time the ``runs`` of candidates, by name; the first one is the peer of the ratios."""
    times = time_interleaved(runs, seconds, CLOCKS[case.device])
    return [_timing(c.name, c.served_by, times[c.name], times[found[0].name]) for c in found]


def _timing(name: str, served_by: str, own: list[float], peer: list[float]) -> Timing:
    p20, *_, p80 = statistics.quantiles(own, n=5)
    ratio = statistics.median(theirs / ours for theirs, ours in zip(peer, own, strict=True))
    return Timing(name, served_by, statistics.median(own), p20, p80, ratio, len(own))
