"""``fastseq bench``: time fastseq's backends against torch's modules, interleaved, after an accuracy check."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from fastseq.bench import grid, models, own, plot, roofline, runs
from fastseq.bench.baselines import BASELINES, make_baselines
from fastseq.bench.cases import KINDS, MEAN_GOALS, MODES, SHORT, SUITES, BenchCase, parse_projected
from fastseq.bench.memory import Saved, measure_memory
from fastseq.bench.timing import Setup, Timing, measure
from fastseq.console import Bar, chosen_names, environment, load_average, markdown_table, quiet_torch
from fastseq.dispatch import BACKENDS
from fastseq.errors import SuggestingParser

EPILOG = """\
how it measures:
  Every candidate first passes an accuracy check against float64 on the timed call. Then the candidates take turns in
  one process, in a new random order each round, for --seconds per case and mode, at least 5 rounds. "ratio" is the
  median over rounds of baseline time / candidate time in the same round: above 1 is faster than the baseline.
  "roofline" is a lower bound: the time of the matrix products alone, at the peak and the cache bandwidth measured in
  the same run. On a GPU, CUDA events measure the time; cases named float32 multiply in full float32 on both sides,
  cases named tf32 in TF32, and there is no roofline.

examples:
  fastseq bench                                       # the small cases, about a minute
  fastseq bench --suite cpu --threads 1 --output cpu  # the whole table; writes cpu.json and cpu.md
  fastseq bench --suite cpu --filter "packed (50"     # cases whose name contains the text
  fastseq bench --backends native,torch --mode training
  fastseq bench --baselines all --filter decode       # more baselines: loops of cells, torch.compile, onnxruntime
  fastseq bench --suite cuda --output gpu             # native, triton and auto against cuDNN, SDPA and eager torch
  fastseq bench --suite seq2seq --quick --threads 1   # whole models beside plain PyTorch: training, greedy, beam 5
  fastseq bench --memory                              # bytes kept for the backward, instead of times
  fastseq bench --shape 50,32,40,256 --layers 2       # your own sizes: T,B,I,H or T,B,I,H,P; may be repeated
  fastseq bench --model mymodels:translator           # your model; the function returns it and a tuple of its inputs
  fastseq bench --suite grid --output grid --resume --minutes 2   # part of a long suite; repeat until it is complete
  fastseq bench --suite cpu --output new --compare old.json       # which ratios moved beyond noise
  fastseq bench --read grid.json --plot charts        # ratios, times over H and B, measured over roofline
  fastseq bench --suite headline --fail-under 0.97    # exit code 1 if a ratio of a backend is smaller

Exit code: 0; 1 if an accuracy check failed, and then that case has no figure, or if a ratio is below --fail-under; 2
for an option that does not exist.
For figures to publish, run nothing else on the machine: the header shows the load average.
"""


WRONG = models.WRONG
STOPPED = "stopped"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SHORT}
BASELINE_BACKEND = "torch"  # runs the baseline's own kernels
MEMORY = (
    "Storages that the forward saves for its backward, without inputs and parameters; a ratio above 1 saves memory."
)


def to_row(case: BenchCase, train: bool, timing: Timing) -> dict:
    """One row of the results, as in the JSON file."""
    bound = roofline.roofline_ms(case, train) if roofline.has_roofline(case) else None
    return {
        "case": case.name,
        "group": case.group,
        "mode": MODES[train],
        "baseline": KINDS[case.kind][0],
        "goal": case.goals[train],
        **asdict(timing),
        "roofline_ms": bound,
        "over_roofline": None if bound is None else timing.median_ms / bound,
    }


def summarise(rows: list[dict]) -> list[dict]:
    """Geometric means of the ratios of each group, mode and candidate."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["candidate"] != row["baseline"]:
            groups.setdefault((row["group"], row["mode"], row["candidate"]), []).append(row["ratio"])
    return [
        {
            "group": group,
            "mode": mode,
            "candidate": candidate,
            "cases": len(ratios),
            "geometric_mean": statistics.geometric_mean(ratios),
            "smallest": min(ratios),
            "goal": MEAN_GOALS.get((group, mode)) if candidate in BACKENDS else None,
        }
        for (group, mode, candidate), ratios in groups.items()
    ]


def markdown(facts: dict, rows: list[dict], remarks: list[str], goals: bool = False) -> str:
    """The results as tables; ratio > 1 means faster than the baseline. goals: also the columns of project goals."""
    baseline_ms = {(r["case"], r["mode"]): r["median_ms"] for r in rows if r["candidate"] == r["baseline"]}
    header = ("case", "mode", "candidate", "served by", "baseline", "baseline ms", "own ms", "p20..p80", "ratio",
              "goal", "roofline ms", "own/roofline")  # fmt: skip
    lines = [
        (
            r["case"], r["mode"], r["candidate"], r["served_by"], r["baseline"],
            f"{baseline_ms[r['case'], r['mode']]:.3g}", f"{r['median_ms']:.3g}",
            f"{r['p20_ms']:.3g}..{r['p80_ms']:.3g}", f"{r['ratio']:.2f}", _goal(r),
            _figure(r["roofline_ms"], ".3g"), _figure(r["over_roofline"], ".2f"),
        )
        for r in rows
        if r["candidate"] != r["baseline"]
    ]  # fmt: skip
    means = [
        (
            s["group"], s["mode"], s["candidate"], str(s["cases"]), f"{s['geometric_mean']:.2f}",
            _figure(s["goal"], ".2f"), f"{s['smallest']:.2f}",
        )
        for s in summarise(rows)
    ]  # fmt: skip
    means_header = ("group", "mode", "candidate", "cases", "geometric mean", "goal", "smallest ratio")
    tables = (header, lines), (means_header, means)
    return _join(facts, [markdown_table(*(table if goals else _without_goals(*table))) for table in tables], remarks)


def _without_goals(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list]:
    """A table without its column "goal"."""
    k = header.index("goal")
    return (*header[:k], *header[k + 1 :]), [(*row[:k], *row[k + 1 :]) for row in rows]


def _join(facts: dict, parts: list[str], remarks: list[str]) -> str:
    lists = ("\n".join(f"- {key}: {value}" for key, value in facts.items()), "\n".join(f"- {r}" for r in remarks))
    return "\n\n".join(part for part in (lists[0], *parts, lists[1]) if part) + "\n"


def _figure(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _goal(row: dict) -> str:
    if row["candidate"] not in BACKENDS:
        return "–"
    return f"{row['goal']:.2f}" + ("" if row["ratio"] >= row["goal"] else " missed")


def noise(rows: list[dict]) -> list[str]:
    """Remark on rows that run the baseline's kernel for over 1 ms and yet deviate from a ratio of 1.00.

    Shorter calls may deviate: the choice of the backend takes a visible part of their time.
    """
    ratios = [row["ratio"] for row in rows if row["served_by"] == BASELINE_BACKEND and row["median_ms"] > 1]
    off = [ratio for ratio in ratios if not 0.95 <= ratio <= 1.05]
    if not off:
        return []
    return [
        f"noisy: {len(off)} rows run the baseline's kernel and show {min(off):.2f} to {max(off):.2f}, not 1.00; "
        "trust no ratio within that range, or measure again on a quiet machine"
    ]


def suites_of(quick: bool) -> dict[str, tuple[tuple, str]]:
    """Every suite: name -> cases, description. quick: the smaller choice of whole models."""
    return SUITES | {
        "grid": (grid.CASES, "shapes over the whole range, by which the rules of auto are held, some minutes"),
        models.SUITE: (models.QUICK if quick else models.CASES, models.DESCRIPTION),
    }


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="fastseq bench",
        description=__doc__.replace("``", ""),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = "; ".join(f"{name}: {description}" for name, (_, description) in suites_of(quick=False).items())
    names = suites_of(quick=False)
    parser.add_argument("--suite", choices=names, default="quick", help=f"{suites} (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer models and rounds; suite seq2seq only")
    parser.add_argument("--list", action="store_true", help="list the cases of the suite, and measure nothing")
    parser.add_argument(
        "--shape",
        action="append",
        type=parse_projected,
        metavar="T,B,I,H[,P]",
        help="an LSTM in place of a suite: steps, sequences, input and hidden size, and proj_size; may be repeated",
    )
    parser.add_argument("--layers", type=int, default=1, help="of --shape (default: %(default)s)")
    parser.add_argument("--bidirectional", action="store_true", help="both directions, of --shape")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of --shape (default: %(default)s)")
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="a model, before and after fastseq.accelerate, in place of a suite"
    )
    parser.add_argument("--filter", default="", help="only cases whose group or name contains this text")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: %(default)s")
    parser.add_argument(
        "--backends", help=f"comma-separated, of {', '.join(BACKENDS)} (default: auto; on a GPU native,triton,auto)"
    )
    parser.add_argument(
        "--baselines",
        default="",
        help=f"further baselines: 'all', or comma-separated of {', '.join(BASELINES)} (default: none)",
    )
    parser.add_argument("--memory", action="store_true", help="bytes kept for the backward, instead of times")
    parser.add_argument("--goals", action="store_true", help="also show the ratios that the project aims at")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case and mode (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no further case after this time")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--resume", action="store_true", help="keep the rows of OUTPUT.json, measure the missing ones")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="list the ratios that moved beyond noise since an older run"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw charts into this folder (needs matplotlib)")
    parser.add_argument("--read", type=Path, metavar="RUN.json", help="report a saved run, and measure nothing")
    parser.add_argument("--fail-under", type=float, metavar="R", help="exit code 1 if a backend's ratio is below R")
    return parser


def _own_cases(args: argparse.Namespace) -> tuple[BenchCase, ...]:
    """The cases of --shape."""
    options = {"layers": args.layers, "bidirectional": args.bidirectional, "dtype": DTYPES[args.dtype]}
    return tuple(BenchCase("shape", "lstm", *shape, proj_size=P, **options) for *shape, P in args.shape)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[BenchCase]]:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.layers < 1:
        parser.error(f"--layers must be at least 1, got {args.layers}")
    if args.model and (args.memory or args.shape or args.backends or args.baselines or args.resume):
        parser.error("--model times one model: leave out --memory, --shape, --backends, --baselines and --resume")
    if args.resume and (not args.output or args.memory or args.suite == models.SUITE):
        parser.error("--resume continues a run of times: give its --output, without --memory and --suite seq2seq")
    suite = _own_cases(args) if args.shape else suites_of(args.quick)[args.suite][0]
    if args.suite == models.SUITE and (args.memory or args.backends or args.baselines):
        parser.error("--suite seq2seq times whole models: leave out --memory, --backends and --baselines")
    if args.quick and args.suite != models.SUITE:
        parser.error(f"--quick chooses models of --suite {models.SUITE}; the suite {args.suite} has no such choice")
    on_gpu = suite[0].device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--suite {args.suite} needs a GPU and a torch built for it; torch finds none: try --suite cpu.")
    if args.backends is None:
        args.backends = "native,triton,auto" if on_gpu else "auto"
    args.backends = chosen_names(parser, "--backends", args.backends, BACKENDS)
    args.baselines = chosen_names(parser, "--baselines", args.baselines, tuple(BASELINES), required=False)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    cases = [case for case in suite if args.filter in f"{case.group}: {case.name}"]
    if not cases:
        names = "\n  ".join(f"{case.group}: {case.name}" for case in suite)
        parser.error(f"--filter {args.filter!r} matches no case of the suite {args.suite!r}:\n  {names}")
    return args, cases


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq bench``."""
    argv = sys.argv[1:] if argv is None else argv
    args, cases = _parse(argv)
    if args.list:
        print("\n".join(f"{case.group}: {case.name}" for case in cases))
        return
    old = runs.read(args.compare) if args.compare else None
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = environment(["fastseq", "bench", *argv])
    with quiet_torch():
        text, content = _report_of(args)(args, cases, facts)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.md").write_text(text)
        Path(f"{args.output}.json").write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        files = plot.draw(content.get("rows", []), args.plot)
        print("charts: " + (" ".join(map(str, files)) or "none, no case was timed"))
    if old:
        print(runs.compare(old, content))
    if any(remark.startswith(WRONG) for remark in content["remarks"]) or _too_slow(content, args.fail_under):
        raise SystemExit(1)


def _report_of(args: argparse.Namespace) -> Callable[..., tuple[str, dict]]:
    """The function that measures what the options ask for."""
    if args.read:
        return saved
    if args.memory:
        return memory
    if args.model:
        return own_model
    return whole_models if args.suite == models.SUITE else times


def _too_slow(content: dict, limit: float | None) -> bool:
    """Print the rows of fastseq's backends whose ratio is below the limit; True if there are any."""
    rows = [] if limit is None else content.get("rows", ())
    slow = [row for row in rows if row["candidate"] in BACKENDS and row["ratio"] < limit]
    for row in slow:
        print(f"below {limit}: {row['case']}, {row['mode']}, {row['candidate']}: {row['ratio']:.3f}", file=sys.stderr)
    return bool(slow)


def times(args: argparse.Namespace, cases: list[BenchCase], facts: dict) -> tuple[str, dict]:
    """Time the cases; the report as Markdown, and as data."""
    kept = runs.earlier(Path(f"{args.output}.json"), facts) if args.resume else {"rows": [], "remarks": []}
    facts |= roofline.describe(cases[0].device)
    modes = (False, True) if args.mode == "both" else (args.mode == "training",)
    rows, remarks = kept["rows"], [r for r in kept["remarks"] if not r.startswith(STOPPED)]
    measured = {(row["case"], row["mode"]) for row in rows}
    end = time.monotonic() + 60 * (math.inf if args.minutes is None else args.minutes)
    missing = {c: [train for train in modes if (c.name, MODES[train]) not in measured] for c in cases}
    bar = Bar(sum(map(len, missing.values())))
    for case in cases:
        if time.monotonic() >= end:
            break
        if not missing[case]:
            continue
        setup = Setup(case)
        for train in missing[case]:
            bar.show(f"{case.name}, {MODES[train]}")
            baselines, absent = make_baselines(setup, train, args.baselines)
            timings, refusals = _unless_wrong(partial(measure, setup, args.backends, train, args.seconds, baselines))
            rows += [to_row(case, train, timing) for timing in timings]
            remarks += absent + refusals
            bar.step()
    bar.close()
    facts["load average at the end"] = load_average()
    if bar.done < bar.total:
        remarks.append(f"{STOPPED} after --minutes {args.minutes:g}: {bar.total - bar.done} measurements are missing")
    remarks = list(dict.fromkeys([*remarks, *noise(rows)]))
    content = {"environment": facts, "rows": rows, "summary": summarise(rows), "remarks": remarks}
    return markdown(facts, rows, remarks, args.goals), content


def whole_models(args: argparse.Namespace, cases: list[models.ModelCase], facts: dict) -> tuple[str, dict]:
    """Time whole models; the report as Markdown, and as data. Baseline: the faster one of the two plain models."""
    figures = {"training": models.FIGURES[:1], "inference": models.FIGURES[1:], "both": models.FIGURES}[args.mode]
    rows, remarks = models.run(tuple(cases), args.seconds, models.QUICK_ROUNDS if args.quick else None, figures)
    facts["load average at the end"] = load_average()
    content = {"environment": facts, "rows": rows, "summary": summarise(rows), "remarks": remarks}
    return markdown(facts, rows, remarks, args.goals), content


def saved(args: argparse.Namespace, cases: list[BenchCase], facts: dict) -> tuple[str, dict]:
    """The run of --read."""
    content = runs.read(args.read)
    return markdown(content["environment"], content["rows"], content["remarks"], args.goals), content


def own_model(args: argparse.Namespace, cases: list[BenchCase], facts: dict) -> tuple[str, dict]:
    """Time the model of --model before and after ``fastseq.accelerate``; the report as Markdown, and as data."""
    modes = (False, True) if args.mode == "both" else (args.mode == "training",)
    rows, remarks = _unless_wrong(lambda: (own.rows(args.model, modes, args.seconds), []))
    facts["load average at the end"] = load_average()
    content = {"environment": facts, "rows": rows, "summary": summarise(rows), "remarks": remarks}
    return markdown(facts, rows, remarks, args.goals), content


def _unless_wrong(run: Callable[[], tuple[list, list[str]]]) -> tuple[list, list[str]]:
    """Run; if the accuracy check fails, return no figures and a remark that leads to exit code 1."""
    try:
        return run()
    except AssertionError as error:
        return [], [f"{WRONG}, no figure: {error}"]


def memory(args: argparse.Namespace, cases: list[BenchCase], facts: dict) -> tuple[str, dict]:
    """Count the bytes that the cases keep for their backward; the report as Markdown, and as data."""
    rows, remarks, bar = [], [], Bar(len(cases))
    for case in cases:
        bar.show(case.name)
        counts, refusals = _unless_wrong(partial(measure_memory, Setup(case), args.backends))
        rows += [(case, counts[0], saved) for saved in counts[1:]]
        remarks += refusals
        bar.step()
    bar.close()
    header = ("case", "candidate", "served by", "baseline", "baseline MiB", "own MiB", "baseline / own")
    table = markdown_table(header, [_memory_line(*row) for row in rows])
    data = [asdict(saved) | {"case": case.name, "baseline": baseline.candidate, "baseline_bytes": baseline.bytes}
            for case, baseline, saved in rows]  # fmt: skip
    return _join(facts, [MEMORY, table], remarks), {"environment": facts, "memory": data, "remarks": remarks}


def _memory_line(case: BenchCase, baseline: Saved, saved: Saved) -> tuple[str, ...]:
    sizes = (f"{baseline.bytes / 2**20:.3g}", f"{saved.bytes / 2**20:.3g}", f"{saved.ratio:.2f}")
    return case.name, saved.candidate, saved.served_by, baseline.candidate, *sizes
