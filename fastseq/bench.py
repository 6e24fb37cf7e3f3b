"""``fastseq bench``: fastseq's backends against torch's modules, interleaved in one process, after a parity check."""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fastseq import bench_floor
from fastseq.backend import BACKENDS
from fastseq.bench_cases import KINDS, MEAN_GOALS, MODES, SUITES, Case
from fastseq.bench_engine import Problem, Timing, measure
from fastseq.report import Bar, environment, load_average, markdown_table

EPILOG = """\
how it measures:
  Every candidate first passes a parity check against float64 on the very call that is timed. Then the candidates
  take turns in one process (A B, B A, ...), for --seconds per case and mode, at least 5 rounds. "ratio" is the median
  over rounds of peer time / own time in the same round: above 1 is faster than the peer. "floor" is the time that the
  matrix products alone must take on this machine, at its measured peak and cache bandwidth.

examples:
  fastseq bench                                       # the small cases, about a minute
  fastseq bench --suite cpu --threads 1 --output cpu  # the whole table; writes cpu.json and cpu.md
  fastseq bench --suite cpu --filter "packed (50"     # cases whose name contains the text
  fastseq bench --backends native,torch --mode training
  fastseq bench --peers all --filter decode           # more peers: loops of cells, torch.compile, onnxruntime
  fastseq bench --memory                              # bytes kept for the backward, instead of times

For figures to publish, leave the machine alone meanwhile: the header shows the load average.
"""


def to_row(case: Case, train: bool, timing: Timing) -> dict:
    """One line of the results, as it goes into JSON."""
    floor = None if bench_floor.why_no_floor(case) else bench_floor.floor_ms(case, train)
    return {
        "case": case.name,
        "group": case.group,
        "mode": MODES[train],
        "peer": KINDS[case.kind][0],
        "goal": case.goals[train],
        **asdict(timing),
        "floor_ms": floor,
        "over_floor": None if floor is None else timing.median_ms / floor,
    }


def summarise(rows: list[dict]) -> list[dict]:
    """Geometric means of the ratios of each group, mode and candidate."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["candidate"] != row["peer"]:
            groups.setdefault((row["group"], row["mode"], row["candidate"]), []).append(row["ratio"])
    return [
        {
            "group": group,
            "mode": mode,
            "candidate": candidate,
            "cases": len(ratios),
            "geometric_mean": statistics.geometric_mean(ratios),
            "smallest": min(ratios),
            "goal": MEAN_GOALS.get((group, mode)),
        }
        for (group, mode, candidate), ratios in groups.items()
    ]


def markdown(facts: dict, rows: list[dict], remarks: list[str]) -> str:
    """The results as tables; ratio > 1 means faster than the peer."""
    peers = {(row["case"], row["mode"]): row["median_ms"] for row in rows if row["candidate"] == row["peer"]}
    header = ("case", "mode", "candidate", "served by", "peer", "peer ms", "own ms", "p20..p80", "ratio", "goal",
              "floor ms", "own/floor")  # fmt: skip
    lines = [
        (
            r["case"], r["mode"], r["candidate"], r["served_by"], r["peer"], f"{peers[r['case'], r['mode']]:.3g}",
            f"{r['median_ms']:.3g}", f"{r['p20_ms']:.3g}..{r['p80_ms']:.3g}", f"{r['ratio']:.2f}", _goal(r),
            _figure(r["floor_ms"], ".3g"), _figure(r["over_floor"], ".2f"),
        )
        for r in rows
        if r["candidate"] != r["peer"]
    ]  # fmt: skip
    means = [
        (
            s["group"], s["mode"], s["candidate"], str(s["cases"]), f"{s['geometric_mean']:.2f}",
            _figure(s["goal"], ".2f"), f"{s['smallest']:.2f}",
        )
        for s in summarise(rows)
    ]  # fmt: skip
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        markdown_table(header, lines),
        markdown_table(("group", "mode", "candidate", "cases", "geometric mean", "goal", "smallest ratio"), means),
        "\n".join(f"- {remark}" for remark in remarks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _goal(row: dict) -> str:
    return f"{row['goal']:.2f}" + ("" if row["ratio"] >= row["goal"] else " missed")


def noise(rows: list[dict]) -> list[str]:
    """A remark where rows that run the peer's own kernel do not read 1.00; short calls pay for the policy and may."""
    ratios = [row["ratio"] for row in rows if row["served_by"] == "torch" and row["median_ms"] > 1]
    same = [ratio for ratio in ratios if not 0.95 <= ratio <= 1.05]
    if not same:
        return []
    return [
        f"noisy: {len(same)} rows run torch's own kernel and read {min(same):.2f} to {max(same):.2f}, not 1.00; "
        "trust no ratio within that range, or measure again on a quiet machine"
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastseq bench",
        description=__doc__.replace("``", ""),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = "; ".join(f"{name}: {what}" for name, (_, what) in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, default="quick", help=f"{suites} (default: %(default)s)")
    parser.add_argument("--filter", default="", help="only cases whose group or name contains this text")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="what to time (default: %(default)s)")
    parser.add_argument("--backends", default="auto", help=f"comma-separated, of {', '.join(BACKENDS)} (default: auto)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case and mode (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md too")
    return parser


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[Case], tuple[str, ...]]:
    parser = _parser()
    args = parser.parse_args(argv)
    backends = tuple(args.backends.split(","))
    for name in backends:
        if name not in BACKENDS:
            parser.error(f"--backends: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    suite, _ = SUITES[args.suite]
    cases = [case for case in suite if args.filter in f"{case.group}: {case.name}"]
    if not cases:
        names = "\n  ".join(f"{case.group}: {case.name}" for case in suite)
        parser.error(f"--filter {args.filter!r} fits none of the suite {args.suite!r}:\n  {names}")
    return args, cases, backends


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq bench``."""
    argv = sys.argv[1:] if argv is None else argv
    args, cases, backends = _parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = environment(["fastseq", "bench", *argv]) | bench_floor.describe()
    modes = (False, True) if args.mode == "both" else (args.mode == "training",)
    rows, remarks, bar = [], [], Bar(len(cases) * len(modes))
    for case in cases:
        problem = Problem(case)
        for train in modes:
            bar.show(f"{case.name}, {MODES[train]}")
            timings, said = measure(problem, backends, train, args.seconds)
            rows += [to_row(case, train, timing) for timing in timings]
            remarks += said
            bar.step()
    bar.close()
    facts["load average at the end"] = load_average()
    remarks = list(dict.fromkeys([*remarks, *noise(rows)]))
    text = markdown(facts, rows, remarks)
    print(text)
    if args.output:
        write(args.output, text, {"environment": facts, "rows": rows, "summary": summarise(rows), "remarks": remarks})


def write(path: Path, text: str, content: dict) -> None:
    """PATH.md and PATH.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.md").write_text(text)
    Path(f"{path}.json").write_text(json.dumps(content, indent=1) + "\n")
