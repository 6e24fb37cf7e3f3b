"""metrics.csv of a run folder: rows of training and validation, complete at every moment."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastseq.training.files import write_text
from fastseq.training.plots import read_metrics


class MetricsFile(Logger):
    """Appends a row for each update or validation that is logged; the columns are sorted by name.

    A row is one write. A row with a new column writes all rows anew, beside the file, and renames: a process that is
    killed at any moment leaves all earlier rows. (Lightning's CSVLogger deletes them when a run is resumed.)
    """

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the rows of the file by the earlier `rows`."""
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        if rank_zero_only.rank == 0:
            self._write(rows)

    @property
    def name(self) -> str:
        """No folder of its own in the run folder."""
        return ""

    @property
    def version(self) -> str:
        """A run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Write nothing: config.yaml holds the options."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write the row of update `step` (from 0)."""
        row = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}
        row["step"] = step
        if row.keys() <= set(self._columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text([row], header=False))
        else:
            self._write([*read_metrics(self.path), row])

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._columns = sorted({name for row in rows for name in row})
        if rows:
            write_text(self.path, self._text(rows, header=True))
        else:
            self.path.unlink(missing_ok=True)

    def _text(self, rows: Sequence[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
