"""Makes the tables and plots of text models and of distillation, from what is in their files."""

import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib
from figures import SETTINGS, Rows, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

Table = dict[str, Any]
STEPS = ("full", "window", "sinks", "untrained", "distilled")  # of a distillation


def grouped(rows: Rows, name: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    """Returns rows by a name that they have in common."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """Returns the means of curves of [place, value], as far as all of them go."""
    return [[points[0][0], spread([value for _, value in points])[0]] for points in zip(*curves, strict=False)]


def text_table(rows: Rows) -> Table:
    """Returns of each arm what its trainings have in common, beside full attention of the same seeds in percent."""
    tried = [row for row in rows if not row["short"] and "length" in row]
    full = {row["seed"]: row["length"]["1"] for row in tried if row["arm"] == "full"}
    table = {}
    for arm, found in grouped(tried, lambda row: row["arm"]).items():
        entry: Table = {key: found[0][key] for key in ("parameters", "numbers", "rate")}
        entry["trainings"] = len(found)
        entry["length"] = {key: spread([row["length"][key] for row in found]) for key in found[0]["length"]}
        beside = [100 * (row["length"]["1"] / full[row["seed"]] - 1) for row in found if row["seed"] in full]
        if beside:
            entry["beside_full"] = spread(beside)
        entry["copied"] = spread([row["copying"]["right"] for row in found])
        entry["places"] = [spread(list(each))[0] for each in zip(*(row["places"] for row in found), strict=True)]
        if "stream" in found[0]:
            entry["stream"] = spread([row["stream"]["perplexity"] for row in found])
            entry["state"] = max(row["stream"]["state"] for row in found)
            entry["octaves"] = mean_curve([row["stream"]["octaves"] for row in found])
        if "off" in found[0]:
            entry["off"] = spread([row["off"]["perplexity"] for row in found])
            entry["copied_off"] = spread([row["off"]["copying"]["right"] for row in found])
        table[arm] = entry
    return table


def came_back(figures: Table, step: str, nats: Callable[[Table], float]) -> float | None:
    """Returns the share of what full attention has beyond a window with sinks that a step has too."""
    most = nats(figures["full"]) - nats(figures["sinks"])
    return (nats(figures[step]) - nats(figures["sinks"])) / most if most else None


def stream_name(row: Table) -> str:
    """Returns what read a stream."""
    if row["kind"] == "rows":
        return "full attention, in rows"
    if row["window"]:
        return f"window of {row['window'] + row['sinks']}, {row['sinks']} of them sinks"
    return row["arm"]


def distill_table(rows: Rows) -> Table:
    """Returns of each store what came back, and of each stream its perplexity, beside full attention in rows."""
    done = [row for row in rows if "error" not in row]
    stores: Table = {}
    for name, found in grouped([row for row in done if row["kind"] == "store"], lambda row: str(row["store"])).items():
        entry: Table = {"trained": found[0]["trained"], "seconds": spread([row["seconds"] for row in found])}
        for step in STEPS:
            every = [row["figures"] for row in found]
            entry[step] = {
                "perplexity": spread([each[step]["perplexity"] for each in every]),
                "copied": spread([each[step]["copying"]["right"] for each in every]),
            }
            for kind, nats in (
                ("perplexity_back", lambda figure: -math.log(figure["perplexity"])),
                ("copied_back", lambda figure: figure["copying"]["right"]),
            ):
                shares = [share for each in every if (share := came_back(each, step, nats)) is not None]
                if shares:
                    entry[step][kind] = spread(shares)
        stores[name] = entry
    streams: Table = {}
    read = [row for row in done if "stream" in row]
    base = {row["seed"]: row["stream"]["perplexity"] for row in read if row["kind"] == "rows"}
    for name, found in grouped(read, stream_name).items():
        streams[name] = {
            "perplexity": spread([row["stream"]["perplexity"] for row in found]),
            "tokens": found[0]["stream"]["tokens"],
            "state": found[0]["stream"].get("state"),
            "octaves": mean_curve([row["stream"]["octaves"] for row in found]),
        }
        beside = [100 * (row["stream"]["perplexity"] / base[row["seed"]] - 1) for row in found if row["seed"] in base]
        if beside:
            streams[name]["beside_full"] = spread(beside)
    return {"stores": stores, "streams": streams}


def save_svg(figure: Figure) -> bytes:
    """Returns a figure as SVG, the same for the same figures."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def draw_octaves(axes: Axes, table: Table) -> None:
    """Draws losses from octave to octave of a stream."""
    for name, entry in table.items():
        if "octaves" in entry:
            places, losses = zip(*entry["octaves"], strict=True)
            axes.plot(places, [math.exp(min(loss, 700)) for loss in losses], marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a stream")


def draw_text(table: Table, length: int) -> bytes:
    """Returns an SVG: perplexity by the place in a row, and in the course of a stream."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for arm, entry in table.items():
            count = len(entry["places"])
            places = [length * (place + 0.5) / count for place in range(count)]
            left.plot(places, [math.exp(loss) for loss in entry["places"]], marker=".", label=arm)
        left.set_xlabel("place in a row of the trained length")
        left.set_ylabel("perplexity")
        colours = {arm: line.get_color() for arm, line in zip(table, left.lines, strict=True)}
        draw_octaves(right, table)
        for line in right.lines:
            line.set_color(colours[str(line.get_label())])
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        return save_svg(figure)


def draw_distill(table: Table) -> bytes:
    """Returns an SVG: perplexity in the course of a stream, and what a store brings back before and after training."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_octaves(left, table["streams"])
        left.set_yscale("log", base=2)
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.set_ylabel("perplexity")
        left.legend(fontsize=6, frameon=False)
        for number, (name, entry) in enumerate(table["stores"].items()):
            means, deviations = zip(*(entry[step]["perplexity"] for step in STEPS), strict=True)
            places = [place + 0.1 * number for place in range(len(STEPS))]
            layers = f"layer{'s' if ',' in name else ''} {name[1:-1]}"
            right.errorbar(places, means, deviations, color=f"C{len(table['streams']) + number}", marker=".",
                           capsize=2, label=f"store in {layers}")  # fmt: skip
        right.set_xticks(range(len(STEPS)), STEPS)
        right.legend(fontsize=6, frameon=False)
        right.set_ylabel("perplexity at the trained length")
        return save_svg(figure)
