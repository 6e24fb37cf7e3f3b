"""What gpu_check.py found: report.json and report.md, written anew after everything that happens."""

import json
import time
from pathlib import Path

from fastseq.console import markdown_table

WRONG = ("WRONG", "failed", "lost", "FOUND")  # verdicts that end in exit code 1
LEGEND = """\
Times are medians of the GPU's own events, in microseconds per time step (decoding and attention: per step of the
query); the candidates took turns. ratio: how many times as fast as the peer, the median over rounds. limit: a model of
what no kernel can undercut on an H200 (fastseq/bench_floor.py). "CUDA graph": inference, replayed."""


class Report:
    """Everything found so far. A run that is cut keeps what it has: both files are always whole."""

    def __init__(self, folder: Path, command: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._start = folder, time.monotonic()
        self.data = {"command": command, "finished": False, "environment": {}, "stages": []}
        self.data |= {name: [] for name in ("compile", "parity", "sanitizer", "latencies", "bench")}

    def add(self, section: str, row: dict) -> None:
        """Append a finding and write the files."""
        self.data[section].append(row)
        self.write()

    def stage(self, name: str, seconds: float, note: str) -> None:
        """A stage has ended."""
        self.add("stages", {"stage": name, "seconds": round(seconds, 1), "note": note})

    def wrong(self) -> list[dict]:
        """The findings that end in exit code 1."""
        sections = ("parity", "sanitizer", "bench")
        return [row for section in sections for row in self.data[section] if row.get("verdict") in WRONG]

    def write(self) -> None:
        """Both files, each put in its place when it is whole."""
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
        state = "" if data["finished"] else " (not finished: what follows is what there was)"
        title = "GPU check" + (", simulated: its times mean nothing" if "simulation" in self._facts() else "")
        facts = "\n".join(f"- {key}: {value}" for key, value in self._facts().items())
        stages = [(s["stage"], f"{s['seconds']}", s["note"]) for s in data["stages"]]
        parts = [
            f"# {title}, {data['seconds']:.0f} s{state}",
            facts,
            _section("Stages", ("stage", "s", "what happened"), stages),
            _section("Wrong", ("where", "candidate", "verdict", "detail"), [_wrong_line(row) for row in self.wrong()]),
            _section("Parity", PARITY, parity_lines(data["parity"])),
            _section("Refusals", ("backend", "sentence"), refusals(data["parity"] + data["bench"])),
            _section(
                "Sanitizer", ("tool", "verdict", "detail"), _columns(data["sanitizer"], "tool", "verdict", "detail")
            ),
            _section("Latencies", ("what", "where", "value"), _columns(data["latencies"], "what", "where", "value")),
            _section("Ahead-of-time compilation", ("H", "dtype", "s"), _columns(data["compile"], "H", "dtype", "s")),
            _section("Speed", BENCH, bench_lines(data["bench"])),
            LEGEND if data["bench"] else "",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return f"## {title}\n\n{markdown_table(header, lines)}" if lines else ""


def _columns(rows: list[dict], *names: str) -> list[tuple[str, ...]]:
    return [tuple(_short(str(row.get(name, ""))) for name in names) for row in rows]


def _short(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]


def _wrong_line(row: dict) -> tuple[str, ...]:
    where = " ".join(str(row[k]) for k in ("tool", "op", "case", "dtype", "mode") if k in row)
    candidate = row.get("backend") or row.get("candidate", "")
    return where, candidate, row["verdict"], _short(row.get("detail", ""))


PARITY = ("op", "dtype", "backend", "cases", "ok", "refused", "wrong", "worst of bound", "in case")


def parity_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each op, dtype and backend."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"], row["backend"]), []).append(row)
    lines = []
    for key, several in groups.items():
        counts = [sum(row["verdict"] in kinds for row in several) for kinds in (("ok",), ("refused",), WRONG)]
        worst = max(several, key=lambda row: row.get("of_bound", -1.0))
        figure = (f"{worst['of_bound']:.2f}", worst["case"]) if "of_bound" in worst else ("–", "")
        lines.append((*key, str(len(several)), *map(str, counts), *figure))
    return lines


def refusals(rows: list[dict]) -> list[tuple[str, ...]]:
    """Each sentence once."""
    said = {(row.get("backend") or row.get("candidate"), row["detail"]) for row in rows if row["verdict"] == "refused"}
    return [(backend, _short(sentence)) for backend, sentence in sorted(said)]


BENCH = (
    "case",
    "mode",
    "candidate",
    "served by",
    "peer",
    "peer µs",
    "own µs",
    "p20..p80",
    "ratio",
    "limit",
    "own/limit",
)


def bench_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each candidate that was timed, beside its peer."""
    timed = [row for row in rows if "us_per_step" in row]
    peers = {(row["case"], row["mode"]): row["us_per_step"] for row in timed if row["candidate"] == row["peer"]}
    lines = []
    for row in timed:
        if row["candidate"] == row["peer"]:
            continue
        steps = 1e3 * row["median_ms"] / row["us_per_step"]
        spread = "..".join(f"{1e3 * row[k] / steps:.3g}" for k in ("p20_ms", "p80_ms"))
        limit = [f"{row[k]:.3g}" if k in row else "–" for k in ("limit_us_per_step", "over_limit")]
        times = (f"{peers[row['case'], row['mode']]:.3g}", f"{row['us_per_step']:.3g}", spread, f"{row['ratio']:.2f}")
        lines.append((row["case"], row["mode"], row["candidate"], row["served_by"], row["peer"], *times, *limit))
    return lines
