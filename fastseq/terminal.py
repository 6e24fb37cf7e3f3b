"""What the measuring commands show on a terminal: a progress bar on standard error, and plain tables."""

import sys
import time


class Bar:
    """A progress bar over ``total`` items; on something that is no terminal, a line every ten seconds."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self._last_line = self.start

    def show(self, item: str) -> None:
        """Say what is being worked on."""
        now = time.monotonic()
        if sys.stderr.isatty():
            filled = "#" * (20 * self.done // self.total)
            print(f"\r\x1b[K[{filled:<20}] {self._count(now)} {item}"[:140], end="", file=sys.stderr, flush=True)
        elif now - self._last_line >= 10:
            self._last_line = now
            print(f"{self._count(now)} {item}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """Count one item as done."""
        self.done += 1

    def close(self) -> None:
        """Leave the terminal clean."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _count(self, now: float) -> str:
        passed = now - self.start
        left = f", {passed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        return f"{self.done}/{self.total}{left}"


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose columns line up in plain text, too."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]

    def line(cells) -> str:
        return "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
