"""Which backend serves a call, and why: the one place where that is decided.

A backend of an op is a module with ``unsupported(call) -> str | None``: None, or the sentence that says why not and
what to do instead. A backend asked for by name runs or raises that sentence; ``auto`` takes the first rule of ``RULES``
that holds.
"""

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastseq import _native

BACKENDS = ("auto", "reference", "torch", "native", "triton")

# One row per kernel: adding a kernel is one file in the op's folder and one row here.
IMPLEMENTATIONS = {
    ("lstm_cell", "reference"): "fastseq.ops.lstm_cell.reference",
    ("lstm_cell", "torch"): "fastseq.ops.lstm_cell.torch",
    ("lstm_cell", "native"): "fastseq.ops.lstm_cell.native",
    ("lstm_cell", "triton"): "fastseq.ops.lstm_cell.triton",
    ("lstm", "reference"): "fastseq.ops.lstm.reference",
    ("lstm", "torch"): "fastseq.ops.lstm.torch",
    ("lstm", "native"): "fastseq.ops.lstm.native",
    ("lstm", "triton"): "fastseq.ops.lstm.triton",
    ("attention", "reference"): "fastseq.ops.attention.reference",
    ("attention", "torch"): "fastseq.ops.attention.torch",
    ("attention", "native"): "fastseq.ops.attention.native",
    ("attention", "triton"): "fastseq.ops.attention.triton",
}
OPS = ("lstm_cell", "lstm", "attention")


class LSTMCellCall(NamedTuple):
    """What decides who serves one ``lstm_cell`` call. ``with_gemms``: the gates are computed in it too (LSTMCell).

    While a graph is traced ``batch`` is None: dynamic. ``device_index``, as in the calls below: which of several GPUs;
    None is the current one.
    """

    device: str
    dtype: torch.dtype
    hidden_size: int
    with_gemms: bool = False
    requires_grad: bool = False
    compiling: bool = False
    batch: int | None = None
    device_index: int | None = None


class LSTMCall(NamedTuple):
    """What decides who serves one ``lstm`` call. While a graph is traced ``batch`` and ``steps`` are None: dynamic."""

    device: str
    dtype: torch.dtype
    input_size: int
    hidden_size: int
    proj_size: int = 0
    packed: bool = False
    lengths: bool = False
    reverse: bool = False
    return_cell_states: bool = False
    requires_grad: bool = False
    autocast: bool = False
    batch: int | None = None
    steps: int | None = None
    compiling: bool = False
    device_index: int | None = None


class AttentionCall(NamedTuple):
    """What decides who serves one ``attention`` call; ``score`` is "dot" or "additive" (the others reduce to these).

    ``batch``, ``steps`` and ``positions`` are B, T and S, None while a graph is traced: dynamic. ``prepared``: the keys
    were prepared.
    """

    score: str
    device: str
    dtype: torch.dtype
    need_weights: bool = False
    requires_grad: bool = False
    padded: bool = False
    prepared: bool = False
    batch: int | None = None
    steps: int | None = None
    positions: int | None = None
    compiling: bool = False
    device_index: int | None = None


class Rule(NamedTuple):
    """A row of the table behind ``auto``: where ``when`` holds, ``backend`` is the fastest; ``why`` is the evidence."""

    op: str
    backend: str
    when: Callable[[Any], bool]
    why: str


_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _eager_on_cpu(call: LSTMCall) -> bool:
    """Not traced, and not under autocast: there the vendor's kernels decide the dtypes."""
    return call.device == "cpu" and not (call.autocast or call.compiling)


def _variable(call: LSTMCall) -> bool:
    """A batch of sequences of different lengths: torch runs these op by op, native skips the padding."""
    return (call.packed or call.lengths) and call.batch > 1


@functools.cache
def _wide_vectors() -> bool:
    """Whether the compiled kernels use AVX-512 here: with narrower vectors they were not measured against oneDNN."""
    return _native.build_info().get("cpu", "").startswith("avx512")


@functools.cache
def _matrix_unit() -> bool:
    """Whether oneDNN has AMX for bfloat16, several times what vector instructions reach."""
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def _bfloat16_products() -> bool:
    """Whether oneDNN and the compiled kernels multiply bfloat16 by the same instruction, AVX-512's dot product."""
    return _native.build_info().get("cpu", "") == "avx512_bf16"


def _eager_on_cuda(call: LSTMCall) -> bool:
    return call.device == "cuda" and not (call.autocast or call.compiling)


def _gates_on_cuda(call: LSTMCellCall) -> bool:
    return call.device == "cuda" and not (call.with_gemms or call.compiling)


def _dot_on_cpu(call: AttentionCall) -> bool:
    return call.device == "cpu" and call.score == "dot" and not call.compiling


# Ratios are the time of nn.LSTM, nn.LSTMCell or the other backends over that of the backend named, by `fastseq bench`
# on a Xeon (Emerald Rapids, AVX-512, no AMX) and an EPYC (Zen 4), 1 and 2 threads: the cases in benchmarks/results, and
# more like them.
RULES = (
    Rule("lstm", "native", lambda c: c.return_cell_states, "the vendor's kernels keep the cell states to themselves"),
    Rule("lstm", "native", lambda c: c.compiling, "one opaque op: the graph stays whole, T and B stay dynamic"),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cpu(c) and c.dtype == _F16,
        "torch has no float16 kernel on CPU and runs op by op: native is 1.2 to 29 times as fast",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cpu(c) and c.dtype == _F64 and c.batch <= 4,
        "torch has no float64 kernel on CPU and runs op by op: native is 1.1 to 3.7 times as fast for few sequences",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cpu(c) and _variable(c) and c.dtype in (_F32, _BF16),
        "variable lengths, where torch runs op by op: native is 1.3 to 3.9 times as fast",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cpu(c) and c.batch <= 4 and c.dtype in (_F32, _BF16),
        "few sequences: native reads the weights where they lie, 1.1 to 3.4 times as fast",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cpu(c) and c.dtype == _F32 and _wide_vectors(),
        "the products end in the cell, in registers: native is 1.0 to 1.5 times as fast",
    ),
    Rule(
        "lstm",
        "torch",
        lambda c: _eager_on_cpu(c) and c.dtype == _BF16 and _bfloat16_products() and not c.requires_grad,
        "inference with AVX-512's bfloat16 dot product: native is 0.97 to 1.04 times as fast (Zen 4)",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cpu(c) and c.dtype == _BF16 and _wide_vectors() and not _matrix_unit(),
        "without a matrix unit: native is 1.4 to 2.0 times as fast (Xeon), training on Zen 4 0.97 to 2.2 times",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cuda(c) and _variable(c),
        "not measured yet: variable lengths, for which cuDNN launches kernels step by step",
    ),
    Rule(
        "lstm",
        "native",
        lambda c: _eager_on_cuda(c) and c.dtype in (_F32, _BF16) and 192 < c.hidden_size <= 1024,
        "not measured yet: torch takes cuDNN's persistent kernels only for float16, or up to hidden_size=192",
    ),
    Rule(
        "lstm", "torch", lambda c: True, "the vendor's kernel (oneDNN, cuDNN): no own kernel was measured faster here"
    ),
    Rule(
        "lstm",
        "native",
        lambda c: c.device == "cpu" and c.autocast,
        "oneDNN, which nn.LSTM calls under autocast, has no LSTM in this dtype on this processor",
    ),
    Rule("lstm", "triton", lambda c: c.device == "cuda", "the vendor's kernel refuses this call; not measured yet"),
    Rule("lstm", "reference", lambda c: True, "nothing else serves this call"),
    Rule(
        "lstm_cell",
        "native",
        lambda c: not c.with_gemms and c.device == "cpu" and c.dtype == _F32 and not c.compiling,
        "one pass instead of seven kernels: native is 1.08 to 1.66 times as fast (B 1 to 256, H 256 and 512)",
    ),
    Rule(
        "lstm_cell",
        "native",
        lambda c: (
            c.with_gemms and not c.requires_grad and c.device == "cpu" and c.dtype == _F32 and (c.batch or 99) <= 32
        ),
        "both products and the cell in one pass over the weights: native is 1.03 to 4 times as fast (B 1 to 32)",
    ),
    Rule("lstm_cell", "native", _gates_on_cuda, "not measured yet: one kernel, where torch launches nine"),
    Rule("lstm_cell", "triton", _gates_on_cuda, "not measured yet: one kernel, where torch launches nine"),
    Rule("lstm_cell", "torch", lambda c: True, "no own kernel was measured faster here"),
    Rule(
        "attention",
        "torch",
        lambda c: c.device != "cpu" and c.score == "dot" and not c.requires_grad and not c.need_weights,
        "the vendor's fused kernel (SDPA); not measured by this project yet",
    ),
    Rule(
        "attention",
        "native",
        lambda c: c.device == "cuda" and c.score == "additive",
        "not measured yet: one pass over the keys, no (B, T, S, A) intermediate",
    ),
    Rule(
        "attention",
        "triton",
        lambda c: c.device == "cuda",
        "one pass over the keys instead of a kernel per formula sign; not measured by this project yet",
    ),
    Rule(
        "attention",
        "native",
        lambda c: c.device == "cpu" and c.score == "additive" and (c.dtype != _F64 or (c.steps or 1) > 1),
        "no (B, T, S, A) intermediate: 1.15 to 3.9 times as fast as the better of the others for one step, 1.3 to 58 "
        "times for many (Xeon, AVX-512, 1 thread)",
    ),
    Rule(
        "attention",
        "torch",
        lambda c: (
            _dot_on_cpu(c) and c.dtype == _BF16 and c.steps == 1 and not (c.requires_grad or c.need_weights or c.padded)
        ),
        "one step without padding in bfloat16: SDPA is up to twice as fast as native",
    ),
    Rule(
        "attention",
        "native",
        lambda c: _dot_on_cpu(c) and c.dtype != _F64,
        "one pass, which skips the padding: 1.08 to 1.8 times as fast as reference in float32, with lengths 1.4 to 2.3 "
        "times; one step without gradients as fast as SDPA to 1.6 times (Xeon, AVX-512, 1 thread)",
    ),
    Rule("attention", "reference", lambda c: True, "nothing was measured faster here"),
)
_RULES_OF = {op: tuple(rule for rule in RULES if rule.op == op) for op in OPS}


class Choice(NamedTuple):
    """One decision, as recorded by :func:`fastseq.explain`."""

    op: str
    call: Any
    backend: str
    why: str
    objections: dict[str, str]


_loaded: dict[tuple[str, str], Any] = {}
_records: list[tuple[int, list[Choice]]] = []  # who listens: a thread, and what it heard


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    return name


_default = _checked(os.environ.get("FASTSEQ_BACKEND") or "auto", "FASTSEQ_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` in this block for every op and module that was not given a backend of its own.

    Process-wide, like torch's own backend flags. The environment variable ``FASTSEQ_BACKEND`` sets the same for a whole
    run.

    Args:
        name: "auto", "reference", "torch", "native" or "triton".

    Raises:
        ValueError: the name is none of these.
    """
    global _default
    previous, _default = _default, _checked(name, "use_backend")
    try:
        yield
    finally:
        _default = previous


def load() -> None:
    """Import every implementation, once, at import of fastseq: TorchDynamo cannot trace an import."""
    for key, path in IMPLEMENTATIONS.items():
        _loaded[key] = importlib.import_module(path)


def implementation(op: str, backend: str) -> Any:
    """The module that implements ``op`` on ``backend``; KeyError where there is none."""
    return _loaded[op, backend]


def objection(op: str, backend: str, call: Any) -> str | None:
    """None if ``backend`` can serve ``call``, else the sentence that says why not and what to do."""
    if (op, backend) not in IMPLEMENTATIONS:
        others = ", ".join(f"{name!r}" for known, name in IMPLEMENTATIONS if known == op)
        return f"{op}: this version of fastseq has no {backend} kernel; use backend='auto' or one of {others}."
    return implementation(op, backend).unsupported(call)


def check_name(name: str | None) -> str:
    """Return ``name`` ("auto" for None), or raise ValueError listing the valid backends."""
    return _checked("auto" if name is None else name, "backend")


def select(op: str, backend: str | None, call: Any) -> str:
    """Name the backend that serves ``call``.

    Args:
        op: "lstm_cell", "lstm" or "attention".
        backend: a name, or None / "auto" for what ``use_backend`` or ``FASTSEQ_BACKEND`` say, else for the fastest.
        call: LSTMCellCall, LSTMCall or AttentionCall.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: the backend asked for cannot serve this call; the message says why and what to do.
    """
    requested = check_name(backend)
    if requested == "auto":
        requested = _default
    if requested != "auto":
        sentence = objection(op, requested, call)
        if sentence is not None:
            raise RuntimeError(sentence)
        chosen, why = requested, "asked for by name"
    else:
        chosen, why = _first_rule(op, call)
    if _records:
        _tell(op, call, chosen, why)
    return chosen


def takes_auto(backend: str | None) -> bool:
    """Whether ``auto`` decides and nobody listens to its decisions: a caller that knows them need not ask."""
    return backend in (None, "auto") and _default == "auto" and not _records


def _tell(op: str, call: Any, chosen: str, why: str) -> None:
    objections = {name: objection(op, name, call) for name in BACKENDS[1:]}
    choice = Choice(op, call, chosen, why, {k: v for k, v in objections.items() if v is not None})
    for thread, choices in _records:
        if thread == threading.get_ident():
            choices.append(choice)


def _first_rule(op: str, call: Any) -> tuple[str, str]:
    for rule in _RULES_OF[op]:
        if rule.when(call) and objection(op, rule.backend, call) is None:
            return rule.backend, rule.why
    raise RuntimeError(f"{op}: no backend serves {call}; see `fastseq info`")


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect every decision that this thread takes in this block."""
    entry = threading.get_ident(), []
    _records.append(entry)
    try:
        yield entry[1]
    finally:
        _records[:] = [other for other in _records if other is not entry]


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> str:
    """Run ``module(*args, **kwargs)`` once and say which backend served each call, and why the others did not.

    The answer holds for just these inputs, in the module's current mode, with gradients on or off as they are now.

    Returns:
        A text with one paragraph per distinct call; print it.
    """
    with record() as choices:
        module(*args, **kwargs)
    seen: dict[tuple, int] = {}
    for choice in choices:
        key = (choice.op, choice.call, choice.backend, choice.why, tuple(choice.objections.items()))
        seen[key] = seen.get(key, 0) + 1
    lines = []
    for (op, call, chosen, why, objections), count in seen.items():
        facts = ", ".join(f"{k}={v}" for k, v in call._asdict().items() if v not in (None, False, 0))
        lines.append(f"{op} ({count}x: {facts})\n  -> {chosen}: {why}")
        lines += [f"     {name}: {sentence}" for name, sentence in objections]
    return (
        "\n".join(lines) or f"{type(module).__name__} called no fastseq op; fastseq.accelerate(module) swaps its LSTMs"
    )
