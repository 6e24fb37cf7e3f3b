"""Engine of ``fastseq bench``: check the accuracy of all candidates, then time them interleaved in one process."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.bench.cases import KINDS, BenchCase, make_problem
from fastseq.dispatch import record
from fastseq.testing.numerics import Results, compare, evaluate, float32_products, is_refusal
from fastseq.testing.problems import Leaves, parameters_of

ROUNDS = 5  # minimum
SAMPLE_MS = 3.0  # time between two readings of the clock; shorter calls are repeated


class Setup:
    """One case, ready to run: inputs and cotangents that all candidates share, the baseline and the float64 oracle."""

    def __init__(self, case: BenchCase):
        self.case, self.problem = case, make_problem(case)
        inputs = self.problem.inputs.items()
        self.inputs = {name: t.to(case.device, case.dtype).requires_grad_() for name, t in inputs}
        self.arguments = self.problem.arguments(self.inputs)
        self.baseline = self.make(None)
        self._baseline_results: dict[bool, Results] = {}
        self._cotangents: list[Tensor] = []

    def make(self, backend: str | None) -> Callable[..., object]:
        """The baseline for None, else fastseq's module or op on that backend; modules all have the same weights."""
        torch.manual_seed(0)
        call = self.problem.make(backend, self.case.dtype)
        return call.to(self.case.device) if isinstance(call, nn.Module) else call

    @cached_property
    def oracle(self) -> Results:
        """Plain torch in float64 on the same, already rounded numbers; outputs and gradients."""
        leaves = {name: t.detach().double().requires_grad_() for name, t in self.leaves(self.baseline).items()}
        with torch.enable_grad():
            return evaluate(self.problem.run(leaves, None), leaves)

    def baseline_results(self, train: bool) -> Results:
        """The baseline in the timed dtype and mode: oneDNN rounds differently without gradients."""
        if train not in self._baseline_results:
            self._baseline_results[train] = self.run(self.baseline, train)
        return self._baseline_results[train]

    def leaves(self, call: Callable[..., object]) -> Leaves:
        """The shared inputs, then the parameters of this candidate under the baseline's names."""
        parameters = call.parameters() if isinstance(call, nn.Module) else ()
        return self.inputs | dict(zip(parameters_of(self.baseline), parameters, strict=True))

    def run(self, call: Callable[..., object], train: bool) -> Results:
        """Outputs and, in training, gradients of all inputs and parameters."""
        with torch.set_grad_enabled(train):
            outputs = self.problem.named(call(**self.arguments))
            return evaluate(outputs, self.leaves(call) if train else {})

    def step(self, call: Callable[..., object], train: bool) -> Callable[[], None]:
        """The timed function: a forward without gradients, or forward and backward from all outputs to all leaves."""
        arguments, named = self.arguments, self.problem.named
        leaves = tuple(self.leaves(call).values()) if train else ()

        def infer() -> None:
            with torch.no_grad():
                call(**arguments)

        def train_step() -> None:
            outputs = tuple(named(call(**arguments)).values())
            if not self._cotangents:
                self._cotangents += [torch.randn_like(t) for t in outputs]
            torch.autograd.backward(outputs, self._cotangents)
            for leaf in leaves:
                leaf.grad = None

        return train_step if train else infer


def check_accuracy(setup: Setup, call: Callable[..., object], train: bool) -> None:
    """AssertionError unless ``call`` is as accurate as the baseline, both measured against float64.

    Compares the results of the timed call: the outputs, and in training the gradients of every parameter and input.
    """
    results = setup.run(call, train)
    wrong = [c for c in compare(results, setup.oracle, setup.baseline_results(train)) if not c.ok]
    assert not wrong, f"{setup.case.name}: {'; '.join(map(str, wrong))}"


@dataclass(frozen=True)
class Timing:
    """One candidate of one case and mode; times in milliseconds per call.

    ``ratio``: speed-up over the main baseline, the median over rounds of baseline / candidate. Both times of a round
    are measured under the same load, so varying load cancels; in a quotient of two medians it does not.
    """

    candidate: str
    served_by: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rounds: int


def wall_ms(run: Callable[[], None], calls: int) -> float:
    """Milliseconds of ``calls`` calls, by the wall clock."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) / 1e6


def cuda_ms(run: Callable[[], None], calls: int) -> float:
    """Milliseconds of ``calls`` calls between two CUDA events, gaps between kernels included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


CLOCKS = {"cpu": wall_ms, "cuda": cuda_ms}


def time_interleaved(
    runs: dict[str, Callable[[], None]],
    seconds: float,
    clock: Callable[[Callable[[], None], int], float] = wall_ms,
    rounds: int | None = None,
) -> dict[str, list[float]]:
    """Milliseconds per call, the candidates taking turns; at least ``rounds`` rounds (default: ``ROUNDS``).

    Each round shuffles the order: otherwise every candidate would find the caches of the same predecessor.
    """
    repeats = {name: _calls_per_sample(run, clock) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    generator, order, end = random.Random(0), list(runs), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < (rounds or ROUNDS):
        generator.shuffle(order)
        for name in order:
            times[name].append(clock(runs[name], repeats[name]) / repeats[name])
    return times


def _calls_per_sample(run: Callable[[], None], clock: Callable[[Callable[[], None], int], float]) -> int:
    """Warm up -> the number of calls that fill SAMPLE_MS."""
    for _ in range(2):
        milliseconds = clock(run, 1)
        if milliseconds > 20 * SAMPLE_MS:  # one call is enough, warm or not
            return 1
    return max(1, round(SAMPLE_MS / milliseconds))


class Candidate(NamedTuple):
    """A module or function that passed the accuracy check, and the backend that serves its call."""

    name: str
    call: Callable[..., object]
    served_by: str


def candidates(setup: Setup, backends: tuple[str, ...], train: bool) -> tuple[list[Candidate], list[str]]:
    """List the main baseline, then every backend that serves the case in this mode; and the refusals of the others.

    Raises:
        AssertionError: a backend's result is wrong.
    """
    main = KINDS[setup.case.kind][0]
    accurate, remarks = [Candidate(main, setup.baseline, main)], []
    for name in backends:
        call = setup.make(name)
        try:
            with record() as choices:
                check_accuracy(setup, call, train)
        except RuntimeError as error:
            if not is_refusal(error):
                raise
            remarks.append(f"{setup.case.name}: {error}")
            continue
        accurate.append(Candidate(name, call, "+".join(sorted({choice.backend for choice in choices}))))
    return accurate, remarks


def measure(
    setup: Setup,
    backends: tuple[str, ...],
    train: bool,
    seconds: float,
    baselines: dict[str, Callable[..., object]] | None = None,
) -> tuple[list[Timing], list[str]]:
    """Time one case in one mode: the main baseline first, then each backend that serves it, then other ``baselines``.

    Returns:
        timings and remarks: refusals of backends, and baselines whose error exceeds the bound.

    Raises:
        AssertionError: a backend's result is wrong; then the case has no timing.
    """
    with float32_products(setup.case.tf32):
        entrants, remarks = candidates(setup, backends, train)
        for name, call in (baselines or {}).items():
            try:
                check_accuracy(setup, call, train)
            except AssertionError as error:
                remarks.append(f"baseline {name}: {error}")
            entrants.append(Candidate(name, call, name))
        runs = {c.name: setup.step(c.call, train) for c in entrants}
        return time_candidates(setup.case, entrants, runs, seconds), remarks


def time_candidates(
    case: BenchCase, entrants: list[Candidate], runs: dict[str, Callable[[], None]], seconds: float
) -> list[Timing]:
    """Time the ``runs`` of the entrants, by name; the first one is the baseline of the ratios."""
    return timings(entrants, runs, seconds, CLOCKS[case.device])


def timings(
    entrants: list[Candidate],
    runs: dict[str, Callable[[], None]],
    seconds: float,
    clock: Callable[[Callable[[], None], int], float] = wall_ms,
) -> list[Timing]:
    """As :func:`time_candidates`, with a clock in place of a case."""
    times = time_interleaved(runs, seconds, clock)
    return [_timing(c.name, c.served_by, times[c.name], times[entrants[0].name]) for c in entrants]


def _timing(name: str, served_by: str, times: list[float], baseline: list[float]) -> Timing:
    p20, *_, p80 = statistics.quantiles(times, n=5)
    ratio = statistics.median(b / t for b, t in zip(baseline, times, strict=True))
    return Timing(name, served_by, statistics.median(times), p20, p80, ratio, len(times))
