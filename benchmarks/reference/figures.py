"""Makes a table and a plot of what trainings have found."""

import io
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

THROUGH = 0.9  # the share of right answers at the trained length from which on a training has learned it
SETTINGS: Any = {"svg.hashsalt": "olmem", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
Rows = Sequence[dict[str, Any]]


def by_arm(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Returns the trainings that were tried, of each arm, in the order of the arms."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "length" in row:
            found.setdefault(row["arm"], []).append(row)
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation, which is 0 of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def make_table(rows: Rows) -> dict[str, dict[str, Any]]:
    """Returns of each arm what its trainings have in common: parameters, state, shares of right answers."""
    table = {}
    for arm, found in by_arm(rows).items():
        entry: dict[str, Any] = {
            "trainings": len(found),
            "through": sum(next(iter(row["length"].values())) >= THROUGH for row in found),
            "parameters": found[0]["parameters"],
            "state": max((state for state in found[0]["state"].values() if state), default=None),
        }
        for kind in ("length", "pairs"):
            columns = [key for key in found[0][kind] if all(key in row[kind] for row in found)]
            entry[kind] = {key: spread([row[kind][key] for row in found]) for key in columns}
        for kind in ("late", "off"):
            if kind in found[0]:
                entry[kind] = spread([row[kind] for row in found])
        table[arm] = entry
    return table


def draw(table: dict[str, dict[str, Any]], length: int) -> bytes:
    """Returns an SVG: right answers by the length of a text, and by the number of pairs that were told."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for axes, kind, factor, label in zip(
            figure.subplots(1, 2, sharey=True),
            ("length", "pairs"),
            (length, 1),
            ("tokens of a text", "pairs that were told"),
            strict=True,
        ):
            for number, (arm, entry) in enumerate(table.items()):
                if not entry[kind]:
                    continue
                places = [factor * int(key) for key in entry[kind]]
                means, deviations = zip(*entry[kind].values(), strict=True)
                axes.errorbar(places, [100 * each for each in means], [100 * each for each in deviations],
                              color=f"C{number}", marker=".", capsize=2, label=arm)  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xlabel(label)
        figure.axes[0].set_ylabel("right answers, %")
        figure.axes[0].set_ylim(-3, 103)
        figure.legend(handles=figure.axes[0].get_legend_handles_labels()[0], loc="outside right upper", frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
        return content.getvalue()
