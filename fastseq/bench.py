"""``fastseq bench``: fastseq's backends against ``nn.LSTM``, interleaved in one process, after a parity check."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq.backend import BACKENDS, record
from fastseq.nn.rnn import LSTM, LSTMCell
from fastseq.testing import assert_all_accurate


@dataclass(frozen=True)
class Case:
    """One call to time.

    ``kind``: "padded", "packed" (lengths uniform in T/5..T), "lengths" (the same, given as ``lengths=``, where nn.LSTM
    packs and pads) or "cell" (one step).
    """

    name: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    kind: str = "padded"
    dtype: torch.dtype = torch.float32


SIZES = ((50, 1, 256, 256), (100, 1, 512, 512), (50, 32, 256, 256), (50, 64, 512, 512))
CASES = (
    *(Case(f"lstm {size}", *size) for size in SIZES),
    *(Case(f"lstm {size} bf16", *size, dtype=torch.bfloat16) for size in SIZES[::2]),
    *(Case(f"lstm {size} 2-layer bidirectional", *size, layers=2, bidirectional=True) for size in SIZES[::2]),
    *(Case(f"packed {size}", *size, kind="packed") for size in SIZES[2:]),
    *(Case(f"lengths {size}", *size, kind="lengths") for size in SIZES[2:]),
    Case("lstm (50, 32, 256, 256) f16", 50, 32, 256, 256, dtype=torch.float16),
    Case("lstm (50, 32, 256, 256) f64", 50, 32, 256, 256, dtype=torch.float64),
    Case("cell (1, 256, 256)", 1, 1, 256, 256, kind="cell"),
    Case("cell (32, 256, 256)", 1, 32, 256, 256, kind="cell"),
)


def make_module(case: Case, backend: str | None) -> nn.Module:
    """nn's module for None, else fastseq's with that backend; the same weights for all."""
    torch.manual_seed(0)
    extra = {} if backend is None else {"backend": backend}
    if case.kind == "cell":
        cls = nn.LSTMCell if backend is None else LSTMCell
        return cls(case.input_size, case.hidden_size, dtype=case.dtype, **extra)
    cls = nn.LSTM if backend is None else LSTM
    options = {"num_layers": case.layers, "bidirectional": case.bidirectional, "dtype": case.dtype}
    module = cls(case.input_size, case.hidden_size, **options, **extra)
    return PackAndPad(module) if backend is None and case.kind == "lengths" else module


class PackAndPad(nn.Module):
    """What nn.LSTM needs around it to take lengths."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, *, lengths):
        packed, states = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(packed, total_length=x.size(0))[0], states


def make_input(case: Case) -> tuple[object, dict]:
    """The argument and the keyword arguments of the call; both modules get the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.steps, case.batch, case.input_size, generator=generator).to(case.dtype)
    if case.kind == "cell":
        return x[0].requires_grad_(), {}
    if case.kind == "padded":
        return x.requires_grad_(), {}
    lengths = torch.randint(max(1, case.steps // 5), case.steps + 1, (case.batch,), generator=generator)
    if case.kind == "lengths":
        return x.requires_grad_(), {"lengths": lengths}
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return packed._replace(data=packed.data.requires_grad_()), {}


def _outputs(module: nn.Module, x, options: dict) -> dict[str, torch.Tensor]:
    result = module(x, **options)
    output, states = (result[0], result[1]) if isinstance(result[1], tuple) else (result[0], result)
    output = output.data if isinstance(output, PackedSequence) else output
    return {"output": output, "h_n": states[0], "c_n": states[1]}


def make_step(module: nn.Module, x, options: dict, train: bool) -> Callable[[], None]:
    """What is timed: a forward without gradients, or a forward and a backward through all outputs."""

    def infer():
        with torch.no_grad():
            module(x, **options)

    def train_step():
        torch.autograd.backward([t.sum() for t in _outputs(module, x, options).values()])
        module.zero_grad()

    return train_step if train else infer


def check_parity(case: Case, module: nn.Module, baseline: nn.Module, x, options: dict, train: bool) -> None:
    """AssertionError unless ``module`` is as accurate as ``baseline``, both measured against float64.

    Compares what is timed: the outputs, and in training the gradients of every parameter and of the input.
    """
    oracle = make_module(case, None).double()
    wide = x._replace(data=_leaf(x.data)) if case.kind == "packed" else _leaf(x)
    results = []
    with torch.set_grad_enabled(train):
        for candidate, given in ((module, x), (oracle, wide), (baseline, x)):
            outputs = _outputs(candidate, given, options)
            leaves = {"input": given.data if case.kind == "packed" else given}
            leaves |= {name.removeprefix("lstm."): p for name, p in candidate.named_parameters()}
            grads = torch.autograd.grad([t.sum() for t in outputs.values()], list(leaves.values())) if train else ()
            results.append((outputs, dict(zip(leaves, grads, strict=True)) if train else {}))
    for kind, factor in ((0, 2.0), (1, 3.0)):
        assert_all_accurate(*(result[kind] for result in results), factor=factor)


def _leaf(t: torch.Tensor) -> torch.Tensor:
    return t.detach().double().requires_grad_()


def _time_interleaved(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Times in milliseconds, the candidates taking turns: A B C A B C ..."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(case: Case, backends: tuple[str, ...], train: bool, seconds: float) -> list[dict]:
    """Rows of one case: nn.LSTM first, then each backend that serves it, with ratio = nn.LSTM's median / its own."""
    x, options = make_input(case)
    peer = make_module(case, None)
    runs, served_by = {"nn": make_step(peer, x, options, train)}, {"nn": "nn"}
    for name in backends:
        module = make_module(case, name)
        try:
            check_parity(case, module, peer, x, options, train)
        except RuntimeError as refusal:
            print(f"{case.name}: {refusal}", file=sys.stderr)
            continue
        runs[name] = make_step(module, x, options, train)
        with record() as choices:
            runs[name]()
        served_by[name] = choices[0].backend
    times = _time_interleaved(runs, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "case": case.name,
            "mode": "training" if train else "inference",
            "backend": name,
            "served_by": served_by[name],
            "median_ms": median[name],
            "p20_ms": statistics.quantiles(values, n=5)[0],
            "p80_ms": statistics.quantiles(values, n=5)[-1],
            "ratio": median["nn"] / median[name],
        }
        for name, values in times.items()
    ]


def environment() -> dict[str, str | int]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(facts: dict, rows: list[dict]) -> str:
    """The results as a table; ratio > 1 means faster than ``nn``."""
    lines = [", ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += [
        "| case | mode | backend | served by | median ms | p20..p80 | nn / own |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        spread = f"{r['p20_ms']:.3g}..{r['p80_ms']:.3g}"
        cells = (
            r["case"],
            r["mode"],
            r["backend"],
            r["served_by"],
            f"{r['median_ms']:.3g}",
            spread,
            f"{r['ratio']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq bench``."""
    parser = argparse.ArgumentParser(prog="fastseq bench", description=__doc__.replace("``", ""))
    parser.add_argument(
        "--backends", default="auto,native", help=f"comma-separated, of {', '.join(BACKENDS)} (default: %(default)s)"
    )
    parser.add_argument("--mode", choices=("inference", "training", "both"), default="both", help="what to time")
    parser.add_argument("--filter", default="", help="only cases whose name contains this text, e.g. 'packed'")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case and mode (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md too")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    modes = {"inference": (False,), "training": (True,), "both": (False, True)}[args.mode]
    backends = tuple(args.backends.split(","))
    for name in backends:
        if name not in BACKENDS:
            parser.error(f"--backends: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    jobs = [(case, train) for case in CASES if args.filter in case.name for train in modes]
    if not jobs:
        parser.error(f"--filter {args.filter!r} fits none of: {', '.join(case.name for case in CASES)}")
    rows = []
    for done, (case, train) in enumerate(jobs):
        print(f"\r[{done + 1}/{len(jobs)}] {case.name:<50}", end="", file=sys.stderr, flush=True)
        rows += measure(case, backends, train, args.seconds)
    print(file=sys.stderr)
    facts = environment()
    text = markdown(facts, rows)
    print(text)
    noise = [r["ratio"] for r in rows if r["served_by"] == "torch" and not 0.95 <= r["ratio"] <= 1.05]
    if noise:
        span = f"{min(noise):.2f} to {max(noise):.2f}"
        print(f"noisy: {len(noise)} rows run nn.LSTM's own kernel and read {span}, not 1.00:")
        print("trust no ratio within that range, or measure again on a quiet machine")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.md").write_text(text)
        cases = [{**asdict(case), "dtype": str(case.dtype)} for case in CASES]
        content = {"environment": facts, "cases": cases, "rows": rows}
        Path(f"{args.output}.json").write_text(json.dumps(content, indent=1))
