"""The plots of an evaluation, as PNG and SVG: perplexity by position, recall, and the state by length."""

import io
from collections.abc import Sequence
from math import exp
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {"on": "-", "off": "--", "reset": ":"}  # of lines, by memory
PANELS = 4  # in a row
SETTINGS: Any = {"svg.hashsalt": "olmem", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(report: dict[str, Any]) -> dict[str, bytes]:
    """Returns the files of the plots that the report has figures for, by name."""
    drawn = {}
    with matplotlib.rc_context(SETTINGS):
        for name, rows, make in (
            ("perplexity", report["texts"], perplexity),
            ("recall", report["recall"], recall),
            ("state", report["state"], state),
        ):
            if rows:
                figure = make(rows, report["window"])
                for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                    content = io.BytesIO()
                    figure.savefig(content, format=form, dpi=150, metadata=metadata)
                    drawn[f"evaluation_{name}.{form}"] = content.getvalue()
    return drawn


def perplexity(rows: Sequence[dict[str, Any]], window: int | None) -> Figure:
    """Returns a line for each text and each way of reading it."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["name"] for row in rows))
    has_modes = any(row["memory"] != "on" for row in rows)
    for row in rows:
        places = [place for place in row["positions"] if place["tokens"]]
        middles = [place["from"] + (place["tokens"] - 1) / 2 for place in places]
        axes.plot(
            middles,
            [exp(place["nats_per_token"]) for place in places],
            STYLES[row["memory"]],
            color=f"C{names.index(row['name']) % 10}",
            marker=".",
            label=f"{row['name']}, memory {row['memory']}" if has_modes else row["name"],
        )
    for edge, name in ((window, "1 window"), (4 * (window or 0), "4 windows")):
        if edge and edge < axes.get_xlim()[1]:
            axes.axvline(edge, color="0.75", linewidth=0.8)
            axes.annotate(
                name,
                (edge, 1),
                xycoords=("data", "axes fraction"),
                color="0.5",
                xytext=(2, -2),
                textcoords="offset points",
                va="top",
            )
    axes.set(xscale="log", yscale="log", xlabel="position in the text (tokens)", ylabel="perplexity")
    if len(rows) <= 12:
        axes.legend(frameon=False)
    return figure


def recall(rows: Sequence[dict[str, Any]], window: int | None) -> Figure:
    """Returns a heat map of distance and position for each task."""
    across = min(len(rows), PANELS)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(1 + 2.4 * across, 0.6 + 2.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    image = None
    for axes, row in zip(panels.flat, rows, strict=False):
        image = heat_map(axes, row)
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    figure.supxlabel("distance (tokens)")
    figure.supylabel("position (tokens)")
    figure.colorbar(image, ax=panels, label="exact match", shrink=0.8)  # pyright: ignore[reportArgumentType]
    return figure


def heat_map(axes: Axes, row: dict[str, Any]) -> Any:
    """Draws the cells of a task, each with its share in it."""
    distances = sorted({cell["distance"] for cell in row["cells"]})
    positions = sorted({cell["position"] for cell in row["cells"]})
    shares = {(cell["position"], cell["distance"]): cell["exact_match"] for cell in row["cells"]}
    values = [[shares[position, distance] for distance in distances] for position in positions]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(values):
        for x, share in enumerate(line):
            axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share < 0.6 else "black")
    axes.set_xticks(range(len(distances)), [f"{distance:,}" for distance in distances])
    axes.set_yticks(range(len(positions)), [f"{position:,}" for position in positions])
    axes.spines[:].set_visible(False)
    axes.set_title(row["task"])
    return image


def state(rows: Sequence[dict[str, Any]], window: int | None) -> Figure:
    """Returns the bytes, and the times of a token, by length."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    sizes, times = figure.subplots(1, 2)
    lengths = [row["tokens"] for row in rows]
    sizes.plot(lengths, [row["bytes"] / 2**20 for row in rows], marker=".")
    sizes.set(xlabel="tokens", ylabel="MiB of state", ylim=(0, None))
    read = [row for row in rows if row["seconds_per_token"] is not None]
    times.plot(lengths, [1e6 * row["seconds_per_step"] for row in rows], marker=".", label="in calls of one token")
    if read:
        seconds = [1e6 * row["seconds_per_token"] for row in read]
        times.plot([row["tokens"] for row in read], seconds, marker=".", label="in calls of many")
    times.set(xlabel="tokens", ylabel="µs per token", ylim=(0, None))
    times.legend(frameon=False)
    return figure
