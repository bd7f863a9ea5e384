"""Position schemes: perplexity at the trained length, and at twice and four times as many tokens.

    python benchmarks/positions.py [--minutes 9] [--seeds 3] [--smoke] [--json FILE]

Every `position_embedding` of the model, and `rope` with `none` in each fourth layer, trained on the same batches; how
is in training.py. Attention is full and the trained length is all that a model has seen, so beyond it each
extrapolates. The divisor of `linspace` is, in a full layer, the trained length (`max_position_embeddings`) less one.

1×, 2×, 4×  perplexity of the same validation tokens in windows of that many times the trained length; mean ± standard
            deviation over the seeds
all         every token of a window
last        those of its last quarter: at 2× and 4× all of them lie beyond the trained length

Below: the change against `rope` in percent, from pairs of the same seed.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict

from olmem import OlmemConfig
from training import (
    Settings,
    Spread,
    announce,
    evaluate,
    experiment,
    find_device,
    load_text,
    make_config,
    paired_change,
    parse,
    perplexity,
    save,
)

FACTORS = (1, 2, 4)
ROPE = "rope"
COLUMNS = [f"{factor}× {part}" for part in ("all", "last") for factor in FACTORS]


def make_variants(settings: Settings) -> dict[str, OlmemConfig]:
    mixed = ["none" if layer % 4 == 3 else ROPE for layer in range(settings.layers)]
    choices = {name: name for name in (ROPE, "xpos", "linspace", "none")} | {"rope + none": mixed}
    return {name: make_config(settings, position_embedding=choice) for name, choice in choices.items()}


def make_table(rows: list[dict], names: Sequence[str]) -> tuple[list[str], dict]:
    """The lines to print, and the figures in them."""
    found = {name: [row for row in rows if row["variant"] == name] for name in names}
    table = {name: {} for name in names}
    lines = ["perplexity  " + "".join(f"{column:>19}" for column in COLUMNS)]
    changes = ["change %    " + "".join(f"{column:>19}" for column in COLUMNS)]
    for name in names:
        line, change_line = f"{name:<12}", f"{name:<12}"
        for column in COLUMNS:
            values, base = ([row[column] for row in found[which]] for which in (name, ROPE))
            spread, change = Spread.of(values), paired_change(values, base)
            table[name][column] = {"perplexity": asdict(spread), "change": asdict(change)}
            line += f"{spread.text('.4g', '.2g'):>19}"
            change_line += f"{change.text('+.2f', '.2f'):>19}"
        lines.append(line)
        changes.append(change_line)
    return [*lines, "", *changes], table


def main(arguments: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    settings, file = parse(__doc__ or "", arguments)
    device = find_device()
    text, variants = load_text(settings, device), make_variants(settings)
    announce(text, settings)
    longest = max(FACTORS) * settings.length
    ids = text.validation[: (len(text.validation) - 1) // longest * longest + 1]  # whole windows of every length

    def assess(model) -> dict[str, float]:
        result = {}
        for factor in FACTORS:
            length = factor * settings.length
            losses = evaluate(model, ids, length, settings.batch * settings.length)
            result.setdefault("validation", float(losses.mean()))  # at the trained length
            result |= {f"{factor}× all": perplexity(losses), f"{factor}× last": perplexity(losses[-(length // 4) :])}
        return result

    rows = experiment(variants, text, settings, assess, started)
    lines, table = make_table(rows, list(variants))
    print("\n" + "\n".join(lines), flush=True)
    save(file, settings, device, rows, table)


if __name__ == "__main__":
    main()
