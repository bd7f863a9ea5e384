"""How far a command has come: a bar where there is a terminal, lines where there is none, figures for a script."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

Tell = Callable[[dict[str, float | None]], object]
Item = TypeVar("Item")
BETWEEN_LINES = 10.0  # seconds


class Progress(tqdm):
    """Bytes, tokens or whatever is counted, their rate and the time left.

    With `tell` they are told as figures about once a second. Where standard error is no terminal, as in a log, they are
    a line each ten seconds, and none of what takes less.
    """

    def __init__(self, total: int, desc: str, tell: Tell | None = None, unit: str = "B"):
        self.tell, self.counted = tell, "bytes" if unit == "B" else f"{unit}s"
        self.as_lines = tell is None and not sys.stderr.isatty()
        options: dict[str, Any] = {}
        if tell is not None:
            options = {"file": io.StringIO(), "mininterval": 1.0}
        elif self.as_lines:
            options = {
                "mininterval": BETWEEN_LINES,
                "maxinterval": BETWEEN_LINES,
                "delay": BETWEEN_LINES,
                "leave": False,
            }
        super().__init__(total=total, desc=desc, unit=unit, unit_scale=unit in ("B", "token"), **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Tells the script, writes a line, or draws the bar."""
        if self.tell is not None:
            self.tell(self.figures())
        elif not self.as_lines:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

    def figures(self) -> dict[str, float | None]:
        """Returns what a script is told."""
        done, total, elapsed = (self.format_dict[name] for name in ("n", "total", "elapsed"))
        rate = done / elapsed if elapsed else 0.0
        return {
            self.counted: done,
            "of": total,
            "seconds": elapsed,
            f"{self.counted}_per_second": rate,
            "seconds_left": (total - done) / rate if rate else None,
        }


def each(items: Sequence[Item], desc: str, unit: str) -> Iterator[Item]:
    """Yields the items, and shows how many are done."""
    with Progress(len(items), desc, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
