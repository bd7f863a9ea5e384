"""Draws what a query sees, from the arithmetic that the model runs on: `python benchmarks/picture.py` writes
modeling/context.svg, the picture in the README."""

import argparse
from pathlib import Path

from olmem.visibility_olmem import Visibility

PICTURE = Path(__file__).parents[1] / "modeling/context.svg"
TOKENS, CELL = 12, 22
LEFT, TOP, GAP, FOOT = 46, 78, 34, 42
PANELS = (
    ("full_attention", "every key up to its own", Visibility("full_attention")),
    ("sliding_attention", "sliding_window=4, num_sink_tokens=2", Visibility("sliding_attention", 4, num_sinks=2)),
    (
        "chunked_attention",
        "attention_chunk_size=3, attention_chunk_lookback=1",
        Visibility("chunked_attention", chunk_size=3, lookback=1),
    ),
)
OWN, WINDOW, SINK, UNSEEN = "#1f6feb", "#9ecbff", "#f2b84b", "#f0f1f3"
LEGEND = ((OWN, "its own key"), (WINDOW, "its window"), (SINK, "sinks before it"), (UNSEEN, "not seen"))


def cell(visibility: Visibility, query: int, key: int) -> tuple[str, str]:
    """Colour and slot of a key for a query."""
    if visibility.sees(query, key):
        return OWN if query == key else WINDOW, str(visibility.key_slot(query, key))
    if key < visibility.sinks_before(query):
        return SINK, str(visibility.key_slot(query, key))
    return UNSEEN, ""


def draw() -> str:
    width = LEFT + len(PANELS) * (TOKENS * CELL + GAP) + LEFT - GAP
    height = TOP + TOKENS * CELL + FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for panel, (title, fields, visibility) in enumerate(PANELS):
        left = LEFT + panel * (TOKENS * CELL + GAP)
        middle = left + TOKENS * CELL / 2
        lines.append(f'<text x="{middle}" y="24" font-size="14" font-weight="bold">{title}</text>')
        lines.append(f'<text x="{middle}" y="42" fill="#57606a">{fields}</text>')
        for number in range(TOKENS):
            centre = number * CELL + CELL / 2
            lines.append(f'<text x="{left + centre}" y="{TOP - 8}" fill="#8b949e">{number}</text>')
            if panel == 0:
                lines.append(f'<text x="{left - 12}" y="{TOP + centre + 4}" fill="#8b949e">{number}</text>')
        for query in range(TOKENS):
            for key in range(TOKENS):
                colour, slot = cell(visibility, query, key)
                x, y = left + key * CELL, TOP + query * CELL
                lines.append(
                    f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="{colour}"/>'
                )
                if slot:
                    ink = "#ffffff" if colour == OWN else "#24292f"
                    lines.append(f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" fill="{ink}">{slot}</text>')
    lines.append(f'<text x="6" y="{TOP - 24}" text-anchor="start" fill="#57606a">query \u2193 key \u2192</text>')
    for index, (colour, name) in enumerate(LEGEND):
        x, y = LEFT + index * 130, TOP + TOKENS * CELL + 16
        lines.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{y + 11}" text-anchor="start" fill="#24292f">{name}</text>')
    numbers = "numbers in the cells: positions"
    lines.append(
        f'<text x="{LEFT + 540}" y="{TOP + TOKENS * CELL + 27}" text-anchor="start" fill="#57606a">{numbers}</text>'
    )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    PICTURE.write_text(draw())
    print(PICTURE)
