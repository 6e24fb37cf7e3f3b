"""Pictures of a run: learning curves and attention."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.files import read_text, write_bytes

MAX_BYTES = 1 << 30  # of metrics.csv


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv; an empty list when there is no such file yet. Raises UserError for a damaged one.

    A last line without its end, which a killed process may leave, is no row.
    """
    if not path.exists():
        return []
    try:
        text = read_text(path, MAX_BYTES)
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True))
        for row in rows:
            int(row["step"])
            _ = [float(value) for value in row.values() if value]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:100]}); remove it: training writes a new one") from error
    return rows


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curve(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(metrics: Path, png: Path) -> None:
    """Draw the learning curves of a run's metrics.csv."""
    _save(curves_figure(read_metrics(metrics)), png)


def curves_figure(rows: list[dict[str, str]]) -> Figure:
    """Losses (left) and error rates of greedy decoding (right), or the metrics of --data.metrics, over the updates."""
    figure = _figure(10, 4)
    rates = ("valid_sequence_error_rate", "valid_token_error_rate")
    measured = [name for name in (rows[0] if rows else ()) if name.startswith("valid_") and name != "valid_loss"]
    panels = {
        "loss per target token": ("train_loss", "valid_loss"),
        "percent": rates if set(rates) & set(measured) else measured,
    }
    for axes, (label, columns) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for column in columns:
            steps, values = _curve(rows, column)
            marker = "" if column == "train_loss" and len(steps) > 20 else "."  # a single point has no line
            if steps:
                axes.plot(steps, values, label=column.replace("_", " "), marker=marker)
        axes.set(xlabel="update", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend()
    return figure


def plot_attention(weights: Tensor, source: Sequence[str], target: Sequence[str], png: Path) -> None:
    """Draw attention weights (T, S) as a heat map: target tokens downwards, source tokens to the right."""
    figure = _figure(*(min(1.5 + 0.35 * len(tokens), 40.0) for tokens in (source, target)))
    axes = figure.subplots()
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(source)), _visible(source), rotation=90 if max(map(len, source)) > 2 else 0)
    axes.set_yticks(range(len(target)), _visible(target))
    axes.set(xlabel="source", ylabel="prediction")
    figure.colorbar(image, label="attention weight")
    _save(figure, png)


def plot_attention_over(weights: Tensor, frames: Tensor, target: Sequence[str], reduction: int, png: Path) -> None:
    """Draw attention weights (T, S') below the features (S, F) that they attend to, over one axis of frames.

    Each of the S' positions of the encoder's output stands for `reduction` frames. Feature 0 is at the bottom.
    """
    steps, size = frames.shape
    reach = reduction * weights.size(1)  # frames, with the padding in the last group
    figure = _figure(min(4 + 0.03 * steps, 20.0), min(3.5 + 0.2 * len(target), 40.0))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, max(1.0, 0.12 * len(target))))
    above.imshow(frames.T.numpy(), cmap="magma", origin="lower", aspect="auto", extent=(0, steps, 0, size))
    above.set(ylabel="feature")
    extent = (0, reach, len(target) - 0.5, -0.5)
    image = below.imshow(weights.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", extent=extent)
    below.set_yticks(range(len(target)), _visible(target))
    below.set(xlabel="frame", ylabel="prediction", xlim=(0, steps))
    figure.colorbar(image, ax=below, label="attention weight")
    _save(figure, png)


def plot_explanation(maps: Mapping[str, Tensor], source: Sequence[str], target: Sequence[str], png: Path) -> None:
    """Draw a heat map (T, S) for each method: blue raises the probability of a target token, red lowers it."""
    side = min(1.5 + 0.35 * min(len(source), 40), 20.0)
    figure = _figure(side * len(maps), min(1.8 + 0.35 * len(target), 40.0))
    for axes, (name, weights) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        most = float(weights.abs().max()) or 1.0
        colours = {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0}
        if name != "attention":
            colours = {"cmap": "RdBu", "vmin": -most, "vmax": most}
        image = axes.imshow(weights.numpy(), aspect="auto", **colours)
        if weights.size(1) == len(source) <= 60:
            axes.set_xticks(range(len(source)), _visible(source), rotation=90 if max(map(len, source)) > 2 else 0)
        axes.set_yticks(range(len(target)), _visible(target))
        axes.set(title=name.replace("_", " "), xlabel="source")
        figure.colorbar(image, ax=axes)
    _save(figure, png)


def plot_robustness(attacks: Sequence[tuple], png: Path) -> None:
    """Draw attacks (name, strength, changed, sequence errors, ...), the first without one: noise left, flips right."""
    (_, _, _, clean, *_), *rest = attacks
    noise = [attack for attack in rest if not attack[0].endswith("flips")]
    flips = [attack for attack in rest if attack[0].endswith("flips")]
    panels = [panel for panel in ((noise, "rate of the noise"), (flips, "tokens flipped")) if panel[0]]
    figure = _figure(5 * max(len(panels), 1), 4)
    for axes, (rows, label) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        for name in dict.fromkeys(row[0] for row in rows):
            points = [(0.0, clean), *((row[1], row[3]) for row in rows if row[0] == name)]
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(xlabel=label, ylabel="sequence error rate %", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, png)


def _save(figure: Figure, png: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_bytes(png, content.getvalue())


def _visible(tokens: Sequence[str]) -> list[str]:
    return [token.replace(" ", "␣").replace("$", r"\$") for token in tokens]
