"""Select the backend of a call. No op, rule or kernel is named here: each op registers its rules and backends.

A backend of an op is a module ``fastseq.ops.<op>.<backend>`` with ``unsupported(call) -> str | None``: None, or a
sentence with the limit and the way out. It computes by ``forward`` and ``backward``, or by ``run`` where torch itself
differentiates the result. A backend requested by name runs or raises its sentence. ``auto`` takes the first row of the
op's ``RULES`` whose predicates hold and whose backend has no objection.
"""

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("auto", "reference", "torch", "native", "triton")
NOT_MEASURED = "not measured yet"


class Rule(NamedTuple):
    """A row of an op's rules: ``backend`` is the fastest for calls for which every predicate of ``when`` holds."""

    backend: str
    when: tuple[Callable[[Any], bool], ...]
    why: str  # the reason, with the measured ratio
    evidence: str = NOT_MEASURED  # result files below the repository's root, separated by commas


class Choice(NamedTuple):
    """One decision, as recorded by :func:`fastseq.explain`."""

    op: str
    call: Any
    backend: str
    why: str
    objections: dict[str, str]


_rules: dict[str, tuple[Rule, ...]] = {}
_advice: dict[str, Callable[[Any], tuple[str, str] | None]] = {}
_implementations: dict[tuple[str, str], ModuleType] = {}
_records: list[tuple[int, list[Choice]]] = []  # (thread id, its decisions) of every active record()
_caches: list[Any] = []  # remembered choices


def register(op: str, rules: tuple[Rule, ...], advice: Callable[[Any], tuple[str, str] | None] | None = None) -> None:
    """Import the backends of ``op`` when fastseq is imported: TorchDynamo cannot trace an import.

    advice: backend and reason for a call that goes before the rules, or None; not asked in a traced graph.
    """
    _rules[op] = rules
    if advice is not None:
        _advice[op] = advice
    for name in BACKENDS[1:]:
        _implementations[op, name] = importlib.import_module(f"fastseq.ops.{op}.{name}")


def ops() -> tuple[str, ...]:
    """The names of the registered ops."""
    return tuple(_rules)


def rules(op: str) -> tuple[Rule, ...]:
    """The rows behind ``auto``, in the order in which they are tried."""
    return _rules[op]


def check_name(name: str | None, origin: str = "backend") -> str:
    """Return ``name`` ("auto" for None), or raise ValueError listing the valid backends."""
    if name is None:
        return "auto"
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    return name


_default = check_name(os.environ.get("FASTSEQ_BACKEND") or "auto", "FASTSEQ_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` in this block for every op and module whose ``backend`` is "auto".

    Process-wide, like torch's backend flags. The environment variable ``FASTSEQ_BACKEND`` sets the same for a whole
    run.

    Args:
        name: "auto", "reference", "torch", "native" or "triton".

    Raises:
        ValueError: the name is none of these.
    """
    global _default
    previous, _default = _default, check_name(name, "use_backend")
    try:
        yield
    finally:
        _default = previous


def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements ``op`` on ``backend``."""
    return _implementations[op, backend]


def objection(op: str, backend: str, call: Any) -> str | None:
    """None if ``backend`` can serve ``call``, else the sentence with the limit and the way out."""
    return _implementations[op, backend].unsupported(call)


def select(op: str, backend: str | None, call: Any) -> str:
    """Name the backend that serves ``call``.

    Args:
        op: a registered op.
        backend: a name, or None / "auto" for the choice of ``use_backend`` or ``FASTSEQ_BACKEND``, else the fastest.
        call: the op's call record, hashable; ``call.compiling`` while a graph is traced.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: the requested backend cannot serve this call; the message says why and what to do.
    """
    requested = _default if backend is None or backend == "auto" else check_name(backend)
    if requested != "auto":
        sentence = objection(op, requested, call)
        if sentence is not None:
            raise RuntimeError(sentence)
        chosen, why = requested, "requested by name"
    elif torch.jit.is_tracing() and objection(op, "torch", call) is None:
        chosen, why = "torch", "torch.jit.trace and the TorchScript exporter of ONNX record torch's own operators"
    elif call.compiling:
        chosen, why = first_rule(op, call)
    else:
        chosen, why = _remembered_rule(torch.get_num_threads(), op, call)
    if _records:
        _record(op, call, chosen, why)
    return chosen


def first_rule(op: str, call: Any) -> tuple[str, str]:
    """The backend and reason of the first rule that holds for ``call`` and whose backend has no objection.

    Before the rules comes the op's advice, the measurements of ``fastseq tune``.
    """
    advised = None if call.compiling or op not in _advice else _advice[op](call)
    if advised is not None and objection(op, advised[0], call) is None:
        return advised
    for rule in _rules[op]:
        if all(holds(call) for holds in rule.when) and objection(op, rule.backend, call) is None:
            return rule.backend, rule.why
    raise RuntimeError(f"{op}: no backend serves {call}; see `fastseq info`")


def remembered(choice: Callable) -> Callable:
    """Cache a function that chooses by hashable arguments, until :func:`forget`."""
    cached = functools.lru_cache(maxsize=4096)(choice)
    _caches.append(cached)
    return cached


@remembered
def _remembered_rule(threads: int, op: str, call: Any) -> tuple[str, str]:
    """:func:`first_rule`, whose rules may read the number of torch's threads."""
    return first_rule(op, call)


def forget() -> None:
    """Drop the remembered choices: for tests that replace what a rule or ``unsupported`` reads besides the call."""
    for cached in _caches:
        cached.cache_clear()


def takes_auto(backend: str | None) -> bool:
    """True if auto-selection applies, outside of record() and torch.jit.trace: a caller may take its fast path."""
    return backend in (None, "auto") and _default == "auto" and not _records and not torch.jit.is_tracing()


def unrecorded(backend: str | None) -> str | None:
    """The name by which :func:`select` would choose; None in record() and torch.jit.trace, which no caller may skip."""
    if _records or torch.jit.is_tracing():
        return None
    return _default if backend is None or backend == "auto" else backend


def _record(op: str, call: Any, chosen: str, why: str) -> None:
    objections = {name: objection(op, name, call) for name in BACKENDS[1:]}
    note(Choice(op, call, chosen, why, {k: v for k, v in objections.items() if v is not None}))


def explains(backend: str | None) -> bool:
    """True if auto-selection applies in record(): a caller of a fast path notes it, and calls the ops one by one."""
    return bool(_records) and backend in (None, "auto") and _default == "auto"


def note(choice: Choice) -> None:
    """Add a decision to the records of this thread."""
    for thread, choices in _records:
        if thread == threading.get_ident():
            choices.append(choice)


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect every decision of this thread in this block."""
    entry = threading.get_ident(), []
    _records.append(entry)
    try:
        yield entry[1]
    finally:
        _records[:] = [other for other in _records if other is not entry]


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> str:
    """Run ``module(*args, **kwargs)`` once; report which backend served each call, and why the others could not.

    The report holds for these inputs, the module's current mode, and gradients on or off as they are now.

    Args:
        module: any module; the text names its submodules by their paths in ``module.named_modules()``.
        args, kwargs: the inputs of one forward.

    Returns:
        A text to print: each backend with its reason and the calls that it served, then one sentence per refusal.
    """
    with record() as choices, _callers(module, choices) as callers:
        module(*args, **kwargs)
    if not choices:
        return f"{type(module).__name__} called no fastseq op; fastseq.accelerate(module) swaps its LSTMs"
    served: dict[str, dict[str, int]] = {}
    for caller, choice in zip(callers, choices, strict=True):
        calls = served.setdefault(f"{choice.backend}: {choice.why}", {})
        line = f"{caller or type(module).__name__}: {choice.op}({_facts(choice.call)})"
        calls[line] = calls.get(line, 0) + 1
    lines = []
    for reason, calls in served.items():
        lines += [reason, *(f"  {count}x {line}" for line, count in calls.items())]
    return "\n".join(lines + refusals((c.op, *refusal) for c in choices for refusal in c.objections.items()))


def refusals(objections: Iterable[tuple[str, str, str]]) -> list[str]:
    """(op, backend, sentence) of any number of calls -> "no BACKEND for OP, OP: sentence", each sentence once."""
    ops_of: dict[tuple[str, str], dict[str, None]] = {}
    for op, backend, sentence in objections:
        ops_of.setdefault((backend, sentence.removeprefix(f"{op}: ")), {})[op] = None
    return [f"no {backend} for {', '.join(names)}: {sentence}" for (backend, sentence), names in ops_of.items()]


def _facts(call: Any) -> str:
    """The fields of a call record that are set, without those that are None, False or 0."""
    return ", ".join(f"{k}={v}".replace("=torch.", "=") for k, v in call._asdict().items() if v not in (None, False, 0))


@contextlib.contextmanager
def _callers(root: torch.nn.Module, choices: list[Choice]) -> Iterator[list[str]]:
    """Collect, for each of ``choices``, the path of the innermost module whose forward was running; "" is ``root``."""
    callers, running = [], [""]

    def settle() -> None:
        callers.extend(running[-1:] * (len(choices) - len(callers)))

    def leave(*_) -> None:
        settle()
        running.pop()

    def enter(path: str, *_) -> None:
        settle()
        running.append(path)

    handles = []
    for path, module in root.named_modules():
        handles.append(module.register_forward_pre_hook(functools.partial(enter, path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield callers
    finally:
        for handle in handles:
            handle.remove()
