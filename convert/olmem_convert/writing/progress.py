"""How far a command has come: a bar for a person, figures for a script."""

import io
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Tell = Callable[[dict[str, float | None]], object]


class Progress(tqdm):
    """Bytes or tokens, their rate and the time left, as a bar where there is a terminal; with `tell`, as figures about
    once a second."""

    def __init__(self, total: int, desc: str, tell: Tell | None = None, unit: str = "B"):
        self.tell, self.counted = tell, "bytes" if unit == "B" else f"{unit}s"
        if tell is None:
            options: dict[str, Any] = {"disable": None}
        else:
            options = {"disable": False, "file": io.StringIO(), "mininterval": 1.0}
        super().__init__(total=total, desc=desc, unit=unit, unit_scale=True, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Tells the script, or else draws the bar."""
        if self.tell is None:
            super().display(msg, pos)
            return
        done, total, elapsed = (self.format_dict[name] for name in ("n", "total", "elapsed"))
        rate = done / elapsed if elapsed else 0.0
        self.tell(
            {
                self.counted: done,
                "of": total,
                "seconds": elapsed,
                f"{self.counted}_per_second": rate,
                "seconds_left": (total - done) / rate if rate else None,
            }
        )
