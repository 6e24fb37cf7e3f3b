"""``fastseq parity``: the error of every op and module against float64, beside the error of torch in the same dtype."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastseq.console import Bar, chosen_names, environment, markdown_table, quiet_torch
from fastseq.dispatch import BACKENDS
from fastseq.errors import SuggestingParser
from fastseq.parity.cases import GRIDS, PROBLEMS, ParityCase
from fastseq.testing.numerics import (
    Comparison,
    Results,
    compare,
    evaluate,
    float32_products,
    is_refusal,
    nan_filled_memory,
)
from fastseq.testing.problems import Leaves, Problem

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOG = """\
the rule:
  Inputs are rounded to the dtype first. Then the error of a result against float64 may be at most 2 times (gradients:
  3 times) the error of torch's own computation in that dtype, plus one rounding of the largest value; in float64,
  64 roundings of the largest value, if that is more (of the pre-activation, where that is +-100). "of bound" is
  error / bound: above 1 is wrong.

examples:
  fastseq parity                                      # all backends, float32 and bfloat16, half a minute
  fastseq parity --cases full --dtype all             # some minutes
  fastseq parity --backend native --dtype float32 --verbose
  fastseq parity --device cuda --backend native,triton --dtype float32,bfloat16,float16
  FASTSEQ_CPU_ISA=avx2 fastseq parity --backend native --json avx2.json

A backend without a kernel for a call refuses it with a sentence, which is listed and is no failure.
Exit code: 0 within the bound, 1 past it, 2 for an option that does not exist.
"""


@dataclass(frozen=True)
class Row:
    """One case in one dtype on one backend: all comparisons, or a refusal, or the exception that was raised."""

    op: str
    case: str
    dtype: str
    backend: str
    comparisons: list[Comparison] = field(default_factory=list)
    refusal: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and all(c.ok for c in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """The comparison with the largest error / bound."""
        return max(self.comparisons, key=of_bound, default=None)


def of_bound(c: Comparison) -> float:
    """error / bound."""
    return c.error / c.limit if c.limit else (float("inf") if c.error else 0.0)


def check(
    case: ParityCase,
    dtype: torch.dtype,
    backends: tuple[str, ...],
    device: str = "cpu",
    *,
    draws: int | None = None,
    fill: bool = True,
    tf32: bool = False,
    starting: Callable[[str], None] = lambda backend: None,
) -> list[Row]:
    """Compare one case on each backend: outputs with and without gradients, and the gradient of every leaf.

    float64 is always computed on the CPU; plain torch in ``dtype`` runs on ``device``.

    Args:
        draws: number of random draws of the leaves; default: enough to make torch's error representative.
        fill: fill new memory with NaN, which shows elements that a kernel leaves unwritten; False under a tool that
            detects unwritten memory itself.
        tf32: allow TF32 in float32 products on CUDA, for torch and fastseq alike.
        starting: called with the name of each backend before it runs.
    """
    rounded = [(p, {name: t.to(dtype).double() for name, t in x.items()}) for p, x in _draws(case)[:draws]]
    modes = (False,) if dtype == torch.float64 and not _well_conditioned(case) else (False, True)
    # many small calls: more threads gain nothing, and cost much on an oversubscribed machine
    with one_thread(), float32_products(tf32):
        try:
            oracle = {train: _run(rounded, None, torch.float64, case, train, "cpu") for train in modes}
            baseline = {train: _run(rounded, None, dtype, case, train, device) for train in modes}
        except Exception as error:  # a failure of plain torch: reported for every backend, and the next case runs
            failure = f"torch's own computation: {type(error).__name__}: {error}"
            key = (case.op, case.name, str(dtype).removeprefix("torch."))
            return [Row(*key, backend, failure=failure) for backend in backends]
    rows = []
    with float32_products(tf32), nan_filled_memory() if fill else contextlib.nullcontext():
        for backend in backends:
            starting(backend)
            rows.append(_row(case, dtype, backend, rounded, oracle, baseline, device))
    return rows


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(
    case: ParityCase, dtype: torch.dtype, backend: str, draws: list, oracle: dict, baseline: dict, device: str
) -> Row:
    key = (case.op, case.name, str(dtype).removeprefix("torch."), backend)
    comparisons = []
    try:
        for train in oracle:
            results = _run(draws, backend, dtype, case, train, device)
            several = compare(results, oracle[train], baseline[train])
            comparisons += several if train else [c._replace(name=f"{c.name} (inference)") for c in several]
        if dtype == torch.float64:  # a rounding of a pre-activation of 100 is a hundred roundings of a gate
            comparisons = [c._replace(limit=c.limit * case.options.get("spread", 1.0)) for c in comparisons]
    except Exception as error:  # counts like a wrong number, in the table and in the exit code
        if is_refusal(error):
            return Row(*key, refusal=str(error))
        return Row(*key, failure=f"{type(error).__name__}: {error}")
    return Row(*key, comparisons)


def _well_conditioned(case: ParityCase) -> bool:
    """True if 64 roundings bound the gradients in float64, which has no wider oracle.

    False for saturated cells, where 1 - tanh(x)^2 cancels, and for the many operations of a whole model.
    """
    return case.options.get("spread", 1.0) == 1.0 and case.op != "Seq2Seq"


def _draws(case: ParityCase) -> list[tuple[Problem, Leaves]]:
    """Several draws in float64, compared together: in results of few elements torch's rounding errors may cancel."""

    def drawn(seed: int) -> tuple[Problem, Leaves]:
        draw = partial(_normal, torch.Generator().manual_seed(seed))
        problem = PROBLEMS[case.op](draw, **case.options)
        return problem, problem.draw_leaves(draw)

    first = drawn(0)
    elements = sum(t.numel() for t in first[1].values())
    draws = 32 if elements < 100 else 8 if elements < 2000 else 3
    if case.op == "Seq2Seq":  # small gradients of a model are differences of large ones: torch's errors cancelled in 32
        draws = 64
    if case.options.get("spread", 1.0) != 1.0:  # saturated: large errors are rare, torch's as well as fastseq's
        draws *= 8
    return [first, *(drawn(seed) for seed in range(1, draws))]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _run(draws: list, backend: str | None, dtype: torch.dtype, case: ParityCase, train: bool, device: str) -> Results:
    """The results of all draws, stacked, on the CPU; ``backend`` None: plain torch."""
    results = []
    for problem, values in draws:
        leaves = {name: _leaf(t.to(device, dtype), case.slices) for name, t in values.items()}
        with torch.set_grad_enabled(train):
            results.append(evaluate(problem.run(leaves, backend), leaves if train else {}, strided=case.slices))
    return Results(
        *({name: torch.stack([r[k][name] for r in results]).cpu() for name in results[0][k]} for k in (0, 1))
    )


def _leaf(t: Tensor, sliced: bool) -> Tensor:
    """A leaf that requires gradients; ``sliced``: every other element, in every dimension, of a tensor full of NaN."""
    if sliced:
        whole = t.new_full([2 * n for n in t.shape], float("nan"))
        part = whole[tuple(slice(None, None, 2) for _ in t.shape)]
        t = part.copy_(t)
    return t.detach().requires_grad_()


def table(rows: list[Row], verbose: bool = False) -> str:
    """The worst row of each op, dtype and backend; every row with ``verbose``."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.dtype, row.backend) + ((row.case,) if verbose else ()), []).append(row)
    header = (
        "op",
        "dtype",
        "backend",
        "cases",
        "verdict",
        "worst case",
        "result",
        "error",
        "torch's",
        "ratio",
        "of bound",
    )
    return markdown_table(header, [_line(key, several) for key, several in groups.items()])


def _line(key: tuple, rows: list[Row]) -> tuple[str, ...]:
    run = [row for row in rows if not row.refusal]
    count = f"{len(run)}" + (f" + {len(rows) - len(run)} refused" if len(run) < len(rows) else "")
    if not run:
        return (*key[:3], count, "refused", *[""] * 6)
    worst = max(run, key=lambda row: (not row.ok, bool(row.failure), of_bound(row.worst) if row.worst else 0.0))
    verdict = "ok" if worst.ok else "WRONG"
    if worst.failure:
        return (*key[:3], count, verdict, worst.case, worst.failure.splitlines()[0], *[""] * 4)
    c = worst.worst
    ratio = f"{c.error / c.torch_error:.2f}" if c.torch_error else "–"
    result = f"{c.name}: {c.problem}" if c.problem else c.name
    figures = (f"{c.error:.2g}", f"{c.torch_error:.2g}", ratio, f"{of_bound(c):.2f}")
    return (*key[:3], count, verdict, worst.case, result, *figures)


def to_json(row: Row) -> dict:
    """A row with all its comparisons."""
    comparisons = [c._asdict() | {"ok": c.ok} for c in row.comparisons]
    key = {"op": row.op, "case": row.case, "dtype": row.dtype, "backend": row.backend}
    return key | {"ok": row.ok, "refusal": row.refusal, "failure": row.failure, "comparisons": comparisons}


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="fastseq parity",
        description=__doc__.replace("``", ""),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = "comma-separated, of {}, or 'all' (default: %(default)s)"
    parser.add_argument("--backend", default="all", help=known.format(", ".join(BACKENDS)))
    parser.add_argument("--dtype", default="float32,bfloat16", help=known.format(", ".join(DTYPES)))
    parser.add_argument("--op", default="all", help=known.format(", ".join(PROBLEMS)))
    parser.add_argument("--cases", choices=GRIDS, default="quick", help="grid of cases (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--verbose", action="store_true", help="show every case, not just the worst")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every comparison to FILE")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq parity``; exits with 1 past the bound."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    backends = chosen_names(parser, "--backend", args.backend, BACKENDS)
    dtypes = chosen_names(parser, "--dtype", args.dtype, tuple(DTYPES))
    ops = chosen_names(parser, "--op", args.op, tuple(PROBLEMS))
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a torch built for it; torch finds none: leave the option out")
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [case for case in GRIDS[args.cases]() if case.op in ops]
    rows, bar = [], Bar(len(cases) * len(dtypes))
    for dtype in dtypes:
        for case in cases:
            bar.show(f"{case.op} {case.name} {dtype}")
            with quiet_torch():
                rows += check(case, DTYPES[dtype], backends, args.device)
            bar.step()
    bar.close()
    report(rows, args.verbose)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = environment(["fastseq", "parity", *argv])
        content = {"environment": facts, "rows": [to_json(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if not all(row.ok for row in rows):
        raise SystemExit(1)


def report(rows: list[Row], verbose: bool) -> None:
    """Print the table, the refusals and the totals."""
    print(table(rows, verbose))
    refusals = {(row.backend, row.refusal) for row in rows if row.refusal}
    if refusals:
        print("\nrefused:")
        print("\n".join(f"- {backend}: {sentence}" for backend, sentence in sorted(refusals)))
    wrong = [row for row in rows if not row.ok]
    run = [row for row in rows if not row.refusal]
    count = sum(len(row.comparisons) for row in run)
    print(f"\n{len(run)} calls with {count} results compared, {len(rows) - len(run)} refused, {len(wrong)} wrong")
    for row in wrong:
        problems = row.failure or "; ".join(str(c) for c in row.comparisons if not c.ok)
        print(f"WRONG {row.op} {row.case}, {row.dtype}, {row.backend}: {problems}")
