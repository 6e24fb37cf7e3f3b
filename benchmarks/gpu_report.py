"""The report of gpu_check.py: report.json and report.md, rewritten after every finding."""

import json
import time
from pathlib import Path

from step_prediction import scales

from fastseq.console import markdown_table

WRONG = ("WRONG", "failed", "lost", "FOUND")  # verdicts that end in exit code 1
SECTIONS = ("kernels", "smoke", "load", "parity", "sanitizer", "bench")  # whose rows have verdicts
COMPILE = ("H", "dtype", "s", "compiled", "found")  # columns; found: kernels that Triton's cache had
MOST_PRINTED = 12_000  # characters of the summary
HEADER_LINES = 4  # of a table: title, blank line, names, rule
LEGEND = """\
Times are medians between CUDA events, in microseconds per time step (decoding and attention: per step of the query);
the candidates took turns. ratio: speed-up over the baseline, the median over rounds. limit: a modelled lower bound of
an H200 (benchmarks/hopper_model.py). "CUDA graph": inference, replayed."""


class Report:
    """All findings so far. Both files are complete at every moment, also if the run is killed."""

    def __init__(self, folder: Path, command: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._start = folder, time.monotonic()
        self.data = {"command": command, "finished": False, "environment": {}, "stages": []}
        self.data |= {name: [] for name in ("compile", "latencies", *SECTIONS)}

    def add(self, section: str, row: dict) -> None:
        """Append a finding and write the files."""
        self.data[section].append(row)
        self.write()

    def stage(self, name: str, seconds: float, note: str) -> None:
        """Record the end of a stage."""
        self.add("stages", {"stage": name, "seconds": round(seconds, 1), "note": note})

    def wrong(self) -> list[dict]:
        """The findings that end in exit code 1."""
        return [row for section in SECTIONS for row in self.data[section] if row.get("verdict") in WRONG]

    def write(self) -> None:
        """Write both files, each as a .partial file that replaces the old one."""
        self.data["seconds"] = round(time.monotonic() - self._start, 1)
        for name, text in (("report.json", json.dumps(self.data, indent=1) + "\n"), ("report.md", self.markdown())):
            partial = self.folder / f"{name}.partial"
            partial.write_text(text)
            partial.replace(self.folder / name)

    def _facts(self) -> dict:
        return self.data["environment"].get("facts", {})

    def markdown(self) -> str:
        """The report as tables."""
        data = self.data
        state = "" if data["finished"] else " (not finished: findings up to here)"
        title = "GPU check" + (", simulated: its times mean nothing" if "simulation" in self._facts() else "")
        facts = "\n".join(f"- {key}: {value}" for key, value in self._facts().items())
        parts = [
            f"# {title}, {data['seconds']:.0f} s{state}",
            facts,
            *self.tables().values(),
            LEGEND if data["bench"] or data["smoke"] else "",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def tables(self) -> dict[str, str]:
        """Title -> table, the most informative first; "" for one without rows."""
        data = self.data
        stages = [(s["stage"], f"{s['seconds']}", s["note"]) for s in data["stages"]]
        sections = {
            "Stages": (("stage", "s", "note"), stages),
            "Wrong": (("where", "candidate", "verdict", "detail"), [_wrong_line(row) for row in self.wrong()]),
            "Smoke": (SMOKE, smoke_lines(data["smoke"])),
            "Scales of csrc/cuda/lstm/cost.h": (
                ("kernel", "direction", "cases", "measured / modelled"),
                [(*names, str(n), f"{ratio:.2f}") for *names, n, ratio in scales(data["smoke"])],
            ),
            "Kernels against float64": (PARITY, parity_lines(data["kernels"])),
            "Beside other work": (
                ("case", "verdict", "detail"),
                _columns(data["load"], "case", "verdict", "detail"),
            ),
            "Latencies": (
                ("quantity", "where", "value"),
                _columns(data["latencies"], "quantity", "where", "value"),
            ),
            "Speed": (BENCH, bench_lines(data["bench"])),
            "Parity": (PARITY, parity_lines(data["parity"])),
            "Sanitizer": (("tool", "verdict", "detail"), _columns(data["sanitizer"], "tool", "verdict", "detail")),
            "Refusals": (("backend", "sentence"), refusals([r for name in SECTIONS for r in data[name]])),
            "Ahead-of-time compilation": (COMPILE, _columns(data["compile"], *COMPILE)),
        }
        return {title: _section(title, header, lines) for title, (header, lines) in sections.items()}

    def summary(self, most: int = MOST_PRINTED) -> str:
        """The tables in at most ``most`` characters, the most informative first; each may take a third of them."""
        text, left_out = "", []
        for title, table in self.tables().items():
            room, kept = min(most // 3, most - 200 - len(text)), []
            for line in table.splitlines():
                room -= len(line) + 1
                if room < 0:
                    break
                kept.append(line)
            if len(kept) < len(table.splitlines()):
                left_out.append(title)
            text += "\n".join(kept) + "\n\n" if len(kept) > HEADER_LINES else ""
        return text.rstrip() + (f"\n(cut: {', '.join(left_out)})" if left_out else "") + "\n"


def _section(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return f"## {title}\n\n{markdown_table(header, lines)}" if lines else ""


def _columns(rows: list[dict], *names: str) -> list[tuple[str, ...]]:
    return [tuple(_short(str(row.get(name, ""))) for name in names) for row in rows]


def _short(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]


def _wrong_line(row: dict) -> tuple[str, ...]:
    where = " ".join(str(row[k]) for k in ("tool", "op", "case", "dtype", "mode", "kernel") if k in row)
    candidate = row.get("backend") or row.get("candidate", "")
    return where, candidate, row["verdict"], _short(row.get("detail", ""))


PARITY = ("op", "dtype", "backend", "cases", "ok", "refused", "wrong", "worst of bound", "in case")


def parity_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each op, dtype and backend."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        backend = f"{row['backend']} {row.get('kernel', '')}".strip()
        groups.setdefault((row["op"], row["dtype"], backend), []).append(row)
    lines = []
    for key, several in groups.items():
        counts = [sum(row["verdict"] in kinds for row in several) for kinds in (("ok",), ("refused",), WRONG)]
        worst = max(several, key=lambda row: row.get("of_bound", -1.0))
        figure = (f"{worst['of_bound']:.2f}", worst["case"]) if "of_bound" in worst else ("–", "")
        lines.append((*key, str(len(several)), *map(str, counts), *figure))
    return lines


def refusals(rows: list[dict]) -> list[tuple[str, ...]]:
    """Each sentence once."""
    sentences = {
        (row.get("backend") or row.get("candidate"), row["detail"]) for row in rows if row["verdict"] == "refused"
    }
    return [(backend, _short(sentence)) for backend, sentence in sorted(sentences)]


SMOKE = ("case", "mode", "cuDNN µs/step", "cluster µs/step (predicted)", "ratio", "grid µs/step (predicted)", "ratio")


def smoke_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each case and mode: the baseline beside both kernels; a verdict in place of a missing figure."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["case"], row["mode"]), {})[row["candidate"]] = row
    lines = []
    for key, found in cells.items():
        baseline = next((row for name, row in found.items() if name == row.get("baseline")), {})
        line = [*key, _figure(baseline)]
        for name in ("native cluster", "native grid"):
            row = found.get(name, {})
            line += [_figure(row), f"{row['ratio']:.2f}" if "ratio" in row else ""]
        lines.append(tuple(line))
    return lines


def _figure(row: dict) -> str:
    """The time, and in brackets the one that the step clock predicts for the recurrence alone."""
    predicted = f" ({row['predicted_us_per_step']:.2g})" if "predicted_us_per_step" in row else ""
    return f"{row['us_per_step']:.3g}{predicted}" if "us_per_step" in row else row.get("verdict", "")


BENCH = (
    "case",
    "mode",
    "candidate",
    "served by",
    "baseline",
    "baseline µs",
    "own µs",
    "p20..p80",
    "ratio",
    "limit",
    "own/limit",
)


def bench_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each candidate that was timed, beside its baseline."""
    timed = [row for row in rows if "us_per_step" in row]
    baselines = {(r["case"], r["mode"]): r["us_per_step"] for r in timed if r["candidate"] == r["baseline"]}
    lines = []
    for row in timed:
        if row["candidate"] == row["baseline"]:
            continue
        steps = 1e3 * row["median_ms"] / row["us_per_step"]
        spread = "..".join(f"{1e3 * row[k] / steps:.3g}" for k in ("p20_ms", "p80_ms"))
        limit = [f"{row[k]:.3g}" if k in row else "–" for k in ("limit_us_per_step", "over_limit")]
        baseline = baselines[row["case"], row["mode"]]
        times = (f"{baseline:.3g}", f"{row['us_per_step']:.3g}", spread, f"{row['ratio']:.2f}")
        lines.append((row["case"], row["mode"], row["candidate"], row["served_by"], row["baseline"], *times, *limit))
    return lines
