"""Draws how much is still known after how many tokens."""

import io
from typing import Any

import matplotlib
from figures import SETTINGS
from matplotlib.figure import Figure


def draw_stories(table: dict[str, dict[str, Any]]) -> bytes:
    """Returns an SVG of shares of right answers, with standard deviations over trainings."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for job, entry in table.items():
            if "length" in entry:
                places = [int(key) for key in entry["length"]]
                means, deviations, _ = zip(*entry["length"].values(), strict=True)
                axes.errorbar(places, [100 * mean for mean in means], [100 * each for each in deviations],
                              marker=".", capsize=2, label=job)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of a text")
        axes.set_ylabel("right answers, %")
        axes.set_ylim(-3, 103)
        if axes.has_data():
            handles = axes.get_legend_handles_labels()[0]
            figure.legend(handles=handles, loc="outside right upper", frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
        return content.getvalue()
