"""``fastseq bench --model module:function``: a user's model before and after ``fastseq.accelerate``."""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseq.bench.cases import MODES
from fastseq.bench.timing import Candidate, timings
from fastseq.console import Bar
from fastseq.dispatch import record
from fastseq.errors import UserError
from fastseq.nn import accelerate
from fastseq.testing.numerics import Results, compare, evaluate

PLAIN, SWAPPED = "as it is", "auto"


def load(name: str) -> tuple[nn.Module, tuple]:
    """The model of "module:function" and its inputs, as the function returns them.

    Raises:
        UserError: no such function, or a result of another kind.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--model {name}: {error}; give module:function, as in mymodels:translator") from None
    result = make()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise UserError(f"--model {name} must return the model and a tuple of its inputs, got {type(result).__name__}")
    model, inputs = result
    return model, inputs if isinstance(inputs, tuple) else (inputs,)


def rows(name: str, modes: tuple[bool, ...], seconds: float) -> list[dict]:
    """Check the swapped model against the plain one, then time both interleaved; rows as of cases.

    Raises:
        AssertionError: an output or a gradient of the swapped model is wrong.
        UserError: the model has no LSTM to swap.
    """
    plain, inputs = load(name)
    swapped = copy.deepcopy(plain)
    report = accelerate(swapped)
    if not any(row.swapped for row in report):
        raise UserError(f"--model {name}: fastseq.accelerate swaps none of its modules; {report}")
    found, bar = [], Bar(len(modes))
    for train in modes:
        bar.show(f"{name}, {MODES[train]}")
        with record() as choices:
            _check(name, plain, swapped, inputs, train)
        served = "+".join(sorted({choice.backend for choice in choices}))
        entrants = [Candidate(PLAIN, plain, PLAIN), Candidate(SWAPPED, swapped, served)]
        runs = {c.name: _step(c.call.train(train), inputs, train) for c in entrants}
        for timing in timings(entrants, runs, seconds):
            facts = {"case": name, "group": "model", "mode": MODES[train], "baseline": PLAIN, "goal": 0.97}
            found.append(facts | asdict(timing) | {"roofline_ms": None, "over_roofline": None})
        bar.step()
    bar.close()
    return found


def _check(name: str, plain: nn.Module, swapped: nn.Module, inputs: tuple, train: bool) -> None:
    """Compare outputs and, in training, gradients in eval mode, where dropout draws nothing, by the float64 rule."""
    wide = copy.deepcopy(plain).double()
    oracle = _results(wide, tuple(map(_double, inputs)), train)
    actual, baseline = (_results(model, inputs, train) for model in (swapped, plain))
    wrong = [c for c in compare(actual, oracle, baseline) if not c.ok]
    assert not wrong, f"{name}: {'; '.join(map(str, wrong))}"


def _results(model: nn.Module, inputs: tuple, train: bool) -> Results:
    model.eval()
    with torch.set_grad_enabled(train):
        outputs = dict(_tensors(model(*inputs)))
        leaves = {n: p for n, p in model.named_parameters() if p.requires_grad} if train else {}
        return evaluate(outputs, leaves)


def _step(model: nn.Module, inputs: tuple, train: bool) -> Callable[[], None]:
    """The timed function: a forward without gradients, or forward and backward from all outputs."""

    def infer() -> None:
        with torch.no_grad():
            model(*inputs)

    def train_step() -> None:
        outputs = [t for _, t in _tensors(model(*inputs)) if t.requires_grad]
        torch.autograd.backward(outputs, list(map(torch.ones_like, outputs)))
        model.zero_grad()

    return train_step if train else infer


def _tensors(value: object, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of nested tuples, lists and dicts, with their paths."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, tuple | list):
        for k, item in enumerate(value):
            yield from _tensors(item, f"{name}[{k}]")


def _double(value: object) -> object:
    """``value`` with its floating-point tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return value.double()
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return type(value)(map(_double, value)) if type(value) in (tuple, list) else value
