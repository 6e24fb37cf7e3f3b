"""``fastseq bench --plot DIR``: ratios, times over H and B, and measured over roofline, as PNG files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastseq.bench.cases import KINDS

NAME = re.compile(r"(\w+) \((\d+), (\d+), (\d+), (\d+)\)(.*)")  # kind (T, B, I, H) and the rest
COLOURS = {"inference": "#1f77b4", "training": "#d95f02"}
MARKERS = "osD^vP"
MOST_LABELS = 50
MOST_PANELS = 6
SIZES = ("T", "B", "I", "H")


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """Write every chart for which the rows have data; return the files.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra [train], is missing.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    charts: dict[str, Callable[[Any, list[dict]], bool]] = {
        "ratio": _ratios,
        "time_over_hidden_size": lambda figure, rows: _sweeps(figure, rows, "H"),
        "time_over_batch": lambda figure, rows: _sweeps(figure, rows, "B"),
        "over_roofline": _over_roofline,
    }
    written = []
    for name, chart in charts.items():
        figure = Figure(figsize=(9, 6), layout="constrained", dpi=130)
        if chart(figure, rows):
            path = folder / f"{name}.png"
            figure.savefig(path)
            written.append(path)
    return written


def _ratios(figure, rows: list[dict]) -> bool:
    """A dot for each case, sorted: how many times as fast as the baseline; the bar is p20 to p80 of the own time."""
    ours = sorted((r for r in rows if r["candidate"] != r["baseline"]), key=lambda r: r["ratio"])
    if not ours:
        return False
    labelled = len(ours) <= MOST_LABELS
    figure.set_size_inches(9, min(12, 2 + 0.22 * len(ours)) if labelled else 7)
    axes = figure.subplots()
    for mode, colour in COLOURS.items():
        of_mode = [(k, r) for k, r in enumerate(ours) if r["mode"] == mode]
        low = [r["ratio"] - r["ratio"] * r["median_ms"] / r["p80_ms"] for _, r in of_mode]
        high = [r["ratio"] * r["median_ms"] / r["p20_ms"] - r["ratio"] for _, r in of_mode]
        places, ratios = [k for k, _ in of_mode], [r["ratio"] for _, r in of_mode]
        bars = [[max(0.0, x) for x in side] for side in (low, high)]
        axes.errorbar(ratios, places, xerr=bars, fmt="o", ms=4, lw=1, color=colour, label=mode)
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    least, most = ours[0]["ratio"] / 1.3, ours[-1]["ratio"] * 1.3
    ticks = [t for t in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if least < t < most]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    if labelled:
        axes.set_yticks(range(len(ours)), [f"{r['case']}, {r['candidate']}" for r in ours], fontsize=7)
    else:
        axes.set_ylabel("cases, slowest first")
    axes.set_xlabel("baseline time / own time (right of 1: faster)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    return True


def _sweep_groups(rows: list[dict], varied: str) -> list[tuple[str, dict[str, list[tuple[int, dict]]]]]:
    """(title, candidate -> (size, row) in order) of cases that differ in one size; most points first."""
    groups: dict[str, dict[str, list[tuple[int, dict]]]] = {}
    for row in rows:
        match = NAME.fullmatch(row["case"])
        if not match or match[1] not in KINDS:
            continue
        sizes = dict(zip(SIZES, map(int, match.groups()[1:5]), strict=True))
        as_hidden = sizes["I"] == sizes["H"]
        fixed = {name: size for name, size in sizes.items() if name not in (varied, "I")}
        fixed["I"] = "H" if as_hidden else sizes["I"]
        title = f"{match[1]}{match[6]}, {', '.join(f'{k}={v}' for k, v in fixed.items())}, {row['mode']}"
        groups.setdefault(title, {}).setdefault(row["candidate"], []).append((sizes[varied], row))
    found = []
    for title, lines in groups.items():
        if min(map(len, lines.values())) >= 3:
            found.append((title, {c: sorted(points, key=lambda p: p[0]) for c, points in lines.items()}))
    return sorted(found, key=lambda group: -max(map(len, group[1].values())))


def _sweeps(figure, rows: list[dict], varied: str) -> bool:
    """Milliseconds over H or B, a panel for each set of other sizes, a line for each candidate, and the roofline."""
    groups = _sweep_groups(rows, varied)[:MOST_PANELS]
    if not groups:
        return False
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure.set_size_inches(5.5 * columns, 3.6 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (title, by_candidate) in zip(panels, groups, strict=False):
        for marker, (candidate, points) in zip(MARKERS, by_candidate.items(), strict=False):
            sizes = [size for size, _ in points]
            axes.plot(sizes, [row["median_ms"] for _, row in points], marker=marker, ms=4, label=candidate)
            spread = ([row[p] for _, row in points] for p in ("p20_ms", "p80_ms"))
            axes.fill_between(sizes, *spread, alpha=0.2)
        bounds = [(size, row["roofline_ms"]) for size, row in points if row["roofline_ms"]]
        if bounds:
            axes.plot(*zip(*bounds, strict=True), "--", color="grey", lw=1, label="roofline")
        axes.set(xscale="log", yscale="log", xlabel=varied, ylabel="ms")
        axes.set_xticks(sizes, list(map(str, sizes)), fontsize=8)
        axes.minorticks_off()
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in panels:
        axes.set_axis_off()
    return True


def _over_roofline(figure, rows: list[dict]) -> bool:
    """Measured time over the roofline's, against the roofline's: 1 is the limit of the products."""
    bound = [r for r in rows if r["roofline_ms"]]
    if not bound:
        return False
    axes = figure.subplots()
    for marker, candidate in zip(MARKERS, dict.fromkeys(r["candidate"] for r in bound), strict=False):
        for mode, colour in COLOURS.items():
            points = [r for r in bound if (r["candidate"], r["mode"]) == (candidate, mode)]
            filled = "none" if candidate in {r["baseline"] for r in points} else colour
            times, over = [r["roofline_ms"] for r in points], [r["over_roofline"] for r in points]
            style = {"marker": marker, "facecolors": filled, "edgecolors": colour}
            axes.scatter(times, over, s=22, label=f"{candidate}, {mode}", **style)
    axes.axhline(1, color="black", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="roofline, ms", ylabel="measured / roofline (1: the limit)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return True
