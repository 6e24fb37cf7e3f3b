"""Saved runs of ``fastseq bench``: continue an interrupted one, compare with an old one."""

import json
from pathlib import Path

from fastseq.console import markdown_table
from fastseq.errors import UserError

SAME = ("cpu", "threads", "fastseq", "native", "torch", "environment")  # facts without which figures cannot be joined
NOISE = 0.05  # a ratio that moved by less has not moved, whatever its spread


def read(path: Path) -> dict:
    """The content of a file that ``fastseq bench --output`` wrote.

    Raises:
        UserError: it is no such file.
    """
    try:
        content = json.loads(path.read_text())
        rows = [(r["case"], r["mode"], r["candidate"], r["ratio"], r["median_ms"]) for r in content["rows"]]
        assert content["environment"] is not None and all(rows)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path} holds no times of fastseq bench --output; give a JSON file that it wrote") from None
    return content


def earlier(path: Path, facts: dict) -> dict:
    """The run to continue, or an empty one if the file does not exist yet.

    Raises:
        UserError: it was measured on another machine, or with other versions, threads or switches.
    """
    if not path.exists():
        return {"rows": [], "remarks": []}
    content = read(path)
    for key in SAME:
        if content["environment"].get(key) != facts.get(key):
            was, now = content["environment"].get(key, "none"), facts.get(key, "none")
            raise UserError(f"{path} was measured with {key} {was}, this run has {now}; choose another --output")
    return content


def compare(old: dict, new: dict) -> str:
    """A table of the ratios that moved beyond noise from an old run to a new one, and how many did not.

    A ratio moved if it changed by more than ``NOISE`` and by more than the spread (p20 to p80) of its two times.
    """
    before = {(r["case"], r["mode"], r["candidate"]): r for r in old["rows"]}
    lines, same, missing = [], 0, 0
    for row in new["rows"]:
        other = before.get((row["case"], row["mode"], row["candidate"]))
        if row["candidate"] == row["baseline"]:
            continue
        if other is None:
            missing += 1
            continue
        change, noise = row["ratio"] / other["ratio"], max(NOISE, _spread(row), _spread(other))
        if 1 / (1 + noise) <= change <= 1 + noise:
            same += 1
            continue
        figures = (f"{other['ratio']:.2f}", f"{row['ratio']:.2f}", f"{change:.2f}", f"{noise:.0%}")
        lines.append((row["case"], row["mode"], row["candidate"], *figures, "slower" if change < 1 else "faster"))
    lines.sort(key=lambda line: float(line[5]))
    header = ("case", "mode", "candidate", "old ratio", "new ratio", "new / old", "noise", "moved")
    table = [markdown_table(header, lines)] if lines else []
    counts = f"{len(lines)} ratios moved beyond noise, {same} did not, {missing} are not in the old run."
    return "\n\n".join([*table, counts])


def _spread(row: dict) -> float:
    """Half the distance of p20 and p80, relative to the median."""
    return (row["p80_ms"] - row["p20_ms"]) / 2 / row["median_ms"]
