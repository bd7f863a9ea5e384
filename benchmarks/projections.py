"""Shared projections: what they cost in perplexity and save in cache, beside the published figures.

    python benchmarks/projections.py [--minutes 9] [--seeds 3] [--smoke] [--json FILE]

Every `shared_projections` of the model, a quarter as many key/value heads (`GQA-4`: 4 for 16 heads), and both at once,
trained on the same batches; how is in training.py.

parameters  of the whole model
cache       bytes of an OlmemCache in bfloat16 that has read one stream of the trained length
a token     bytes by which each further token makes it larger
decode      tokens a second of a batch, a token a call, bfloat16, beside a cache of `DECODING`'s length; the median
perplexity  of all tokens of the validation text in windows of the trained length; mean ± deviation over the seeds
change      of perplexity against separate projections, percent, from pairs of the same seed; mean ± their deviation
published   the same by Kayyam, Gopal and Lewis (arXiv 2606.04032, 300 million parameters, one seed), measured with
            padding counted in the loss, learned absolute positions, LayerNorm, and no norm of queries and keys

The last column says `agrees` where the published figure lies within two standard errors (deviation / √seeds) of ours,
else on which side of it ours lies. Below the table: whether the variants come in the published order.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations

import torch
from olmem import OlmemCache, OlmemConfig
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
    synchronize,
)
from transformers import AutoModelForCausalLM

SEPARATE = "separate"
# Change of validation perplexity in percent: arXiv 2606.04032, 300M models; their names Q-K=V, Q=K-V, Q=K=V, GQA-4 and
# Q-GQA-4.
PUBLISHED = {
    SEPARATE: 0.0,
    "key_value": 3.1,
    "query_key": 4.9,
    "query_key_value": 25.4,
    "GQA-4": 0.7,
    "GQA-4 + key_value": 3.9,
}
DECODING = {"cuda": (64, 8192), "cpu": (2, 512)}  # streams, and tokens that each has read
WARM_CALLS, TIMED_CALLS = 10, 50


def make_variants(settings: Settings) -> dict[str, OlmemConfig]:
    fewer = {"num_key_value_heads": settings.heads // 4}
    choices = {SEPARATE: {}}
    choices |= {
        name: {"shared_projections": name} for name in ("key_value", "query_key", "query_key_value", "value_difference")
    }
    choices |= {"GQA-4": fewer, "GQA-4 + key_value": fewer | {"shared_projections": "key_value"}}
    return {name: make_config(settings, **choice) for name, choice in choices.items()}


@torch.no_grad()
def measure(config: OlmemConfig, length: int, device: torch.device) -> dict:
    """What needs no training: weights are random."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()

    def read(rows: int, tokens: int, room: int) -> OlmemCache:
        cache = OlmemCache(config, max_length=room)
        ids = torch.randint(config.vocab_size, (rows, tokens), device=device)
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    cache_bytes, twice = (read(1, tokens, tokens).nbytes for tokens in (length, 2 * length))
    streams, before = DECODING[device.type]
    cache = read(streams, before, before + WARM_CALLS + TIMED_CALLS)
    ids = torch.randint(config.vocab_size, (WARM_CALLS + TIMED_CALLS, streams, 1), device=device)
    seconds = []
    for token in ids:
        synchronize(device)
        start = time.perf_counter()
        model(token, past_key_values=cache)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": model.num_parameters(),
        "cache_bytes": cache_bytes,
        "bytes_per_token": (twice - cache_bytes) / length,
        "tokens_per_second": streams / statistics.median(seconds[WARM_CALLS:]),
    }


def verdict(ours: Spread, published: float | None) -> str:
    if published is None or ours.error is None:
        return "–"
    if math.isnan(ours.mean):
        return "ours diverged"
    if abs(published - ours.mean) <= 2 * ours.error:
        return "agrees"
    return "ours is less" if ours.mean < published else "ours is more"


def orders(changes: dict[str, Spread]) -> list[str]:
    """Lines that say which variants do not come in the published order."""
    names = list(PUBLISHED)
    published = sorted(names, key=lambda name: PUBLISHED[name])
    ours = sorted(names, key=lambda name: math.inf if math.isnan(changes[name].mean) else changes[name].mean)
    swapped = [f"{one} and {two}" for one, two in combinations(published, 2) if ours.index(one) > ours.index(two)]
    return [
        "agrees: the published figure lies within two standard errors of ours",
        "best first, published: " + " < ".join(published),
        "best first, ours:      " + " < ".join(ours),
        "the same order" if not swapped else "the other way round: " + "; ".join(swapped),
    ]


def make_table(rows: list[dict], measured: dict[str, dict]) -> tuple[list[str], dict]:
    """The lines to print, and the figures in them."""
    found = {name: [row["perplexity"] for row in rows if row["variant"] == name] for name in measured}
    changes = {name: paired_change(values, found[SEPARATE]) for name, values in found.items()}
    lines = [
        f"{'variant':<19}{'parameters':>11}{'cache KiB':>11}{'B a token':>11}{'decode/s':>10}"
        f"{'perplexity':>18}{'change %':>18}{'published':>11}"
    ]
    table = {}
    for name, about in measured.items():
        spread, change, published = Spread.of(found[name]), changes[name], PUBLISHED.get(name)
        says = verdict(change, published) if name != SEPARATE else "–"
        table[name] = about | {
            "perplexity": asdict(spread),
            "change": asdict(change),
            "published": published,
            "verdict": says,
        }
        lines.append(
            f"{name:<19}{about['parameters']:>11}{about['cache_bytes'] / 2**10:>11.1f}"
            f"{about['bytes_per_token']:>11.0f}{about['tokens_per_second']:>10.0f}{spread.text('.4f', '.4f'):>18}"
            f"{change.text('+.2f', '.2f'):>18}{'–' if published is None else f'{published:+.1f}':>11}  {says}"
        )
    return [*lines, "", *orders(changes)], table


def main(arguments: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    settings, file = parse(__doc__ or "", arguments)
    device = find_device()
    text, variants = load_text(settings, device), make_variants(settings)
    announce(text, settings)
    for config in variants.values():  # the first time around, the device is cold
        measure(config, settings.length, device)
    measured = {name: measure(config, settings.length, device) for name, config in variants.items()}

    def assess(model) -> dict[str, float]:
        losses = evaluate(model, text.validation, settings.length, settings.batch * settings.length)
        return {"validation": float(losses.mean()), "perplexity": perplexity(losses)}

    rows = experiment(variants, text, settings, assess, started)
    lines, table = make_table(rows, measured)
    streams, before = DECODING[device.type]
    print(f"\ndecode: {streams} streams after {before} tokens each")
    print("\n".join(lines), flush=True)
    save(file, settings, device, rows, table)


if __name__ == "__main__":
    main()
