"""Draws how much is still known after how many tokens, and after how many segments of memory tokens alone."""

import io
from typing import Any

import matplotlib
from figures import SETTINGS
from matplotlib.figure import Figure


def draw_stories(table: dict[str, dict[str, Any]]) -> bytes:
    """Returns an SVG of shares of right answers, with standard deviations over trainings."""
    kinds = {"length": "tokens of a text", "start": "segments"}
    shown = [kind for kind in kinds if any(kind in entry for entry in table.values())]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(1.5 + 3.4 * len(shown), 3.6), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, shown, strict=True):
            for job, entry in table.items():
                for each in [kind, "late"] if kind == "start" else [kind]:
                    if each not in entry:
                        continue
                    places = [int(key) for key in entry[each]]
                    means, deviations, _ = zip(*entry[each].values(), strict=True)
                    label = f"{job}, told late" if each == "late" else job
                    axes.errorbar(places, [100 * mean for mean in means], [100 * each for each in deviations],
                                  marker=".", capsize=2, label=label)  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xlabel(kinds[kind])
            axes.set_ylim(-3, 103)
            axes.legend(frameon=False, fontsize=7)
        panels[0].set_ylabel("right answers, %")
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
        return content.getvalue()
