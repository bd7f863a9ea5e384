"""Writes pages from what they are about: results and the README's table from benchmarks/results, and the config.

    python benchmarks/report.py

No figure of these pages is typed by hand. A test compares them with what they are made of.
"""

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import Any

from olmem import OlmemConfig

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, README = ROOT / "benchmarks/results", ROOT / "docs/results.md", ROOT / "README.md"
CONFIG = ROOT / "docs/config.md"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
INTRODUCTION = """# Results

`python benchmarks/report.py` writes this page from the files in [`benchmarks/results`](../benchmarks/results). Each of
them was written by a benchmark, and is never edited. `--help` of a benchmark says what it does. × is the ratio of the
measured figure to the one that it is compared with, which is in parentheses.
"""
FIELDS = """# Fields of the config

`python benchmarks/report.py` writes this page from the documentation of `OlmemConfig`. A field is an argument of
`OlmemConfig`. It is also an argument of `from_pretrained` and `from_olmo`, where it replaces what the loaded config
says. Where no default is named, it is None."""
HEADINGS = {  # by the first field below each
    "vocab_size": "Size",
    "norm_placement": "Norms and clipping",
    "position_embedding": "Positions",
    "layer_types": "Windows and sinks",
    "shared_projections": "Shared projections",
    "num_memory_tokens": "Memory",
    "attention_bias": "Other fields",
}
RECALL = {
    "recall_store.json": "In this task a store of 64 tokens has to keep pairs of a key and a value, and to drop decoys "
    "that are never asked for. `learned` keeps the tokens with the highest scores, `random` keeps random ones, "
    "`recent` keeps the last ones, and `wider` has no store, but a window that is wider by the same bytes.",
    "recall_memory.json": "In this task eight memory tokens have to carry eight pairs of a key and a value. This run "
    "began with rows of eight pairs, as the benchmark did before.",
}
RUNS = {  # of benchmarks/gpu.py: what is shown of each
    "gpu.json": ("step", "generate", "repeated", "memory", "full", "retrieval", "shared", "grouped", "first", "peers"),
    "gpu_prompts.json": ("prompt", "training"),
    "gpu_training.json": ("training",),
}
LEARNED = 0.9  # the share of right answers from which on a training counts as learned
TITLES = {
    "step": "A plain one-token call, the window full",
    "generate": "`generate()`, with its prompt",
    "repeated": "Many calls of `generate()`",
    "memory": "Steps with 4 sinks and 16 memory tokens",
    "full": "Steps with OLMo-3's three sliding layers to one full",
    "retrieval": "Steps with one layer that looks up a million tokens",
    "shared": "Keys and values in one tensor",
    "grouped": "Eight key heads",
    "prompt": "Long prompts in one call",
    "training": "A training step of a 1B model on packed documents",
    "first": "The first call of a process",
    "peers": "Transformers' Olmo3 in the same shape",
}


def read(name: str) -> Any:
    """Returns what a result file holds."""
    return json.loads((RESULTS / name).read_text())


def number(value: float) -> str:
    """Returns a number with three digits or all those before its point, and commas between thousands."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def gpu() -> str:
    """Returns what benchmarks/gpu.py has measured."""
    picture = "![Times and rates of gpu.json, and what each is compared with](../benchmarks/results/gpu.svg)"
    return f"## On a GPU\n\n{picture}\n\n" + "\n".join(gpu_run(name, rows) for name, rows in RUNS.items())


def gpu_run(name: str, rows: Sequence[str]) -> str:
    """Returns the rows of one run of benchmarks/gpu.py, with the ceilings that were measured in it."""
    found = read(name)
    figures: list[dict[str, Any]] = found["figures"]
    ceilings = ", ".join(
        f"{each['name']} {number(each['measured'])} {each['unit']}" for each in figures if each["row"] == "ceilings"
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"*{name}*: {found['device']}; {versions}. Ceilings of the same run: {ceilings}.\n"]
    for row in rows:
        title, own = TITLES[row], [each for each in figures if each["row"] == row]
        if own:
            lines = [[each["name"].replace("|", "·"), measured(each), held_against(each)] for each in own]
            parts.append(f"### {title} ({name})\n\n" + table(["", "measured", "compared with"], lines))
    greedy = [each for each in figures if each["row"] == "greedy"]
    errors = [each for each in figures if each["row"] == "errors"]
    if "step" in rows and greedy and errors:
        worst = max(errors, key=lambda each: each["ratio"])
        least = number(min(each["ratio"] for each in errors))
        parts.append(
            "### Exactness\n\n"
            f"In float32, at least {number(min(each['measured'] for each in greedy))} of "
            f"{number(greedy[0]['reference'])} greedy tokens are the same as on the CPU, in each of {len(greedy)} "
            f"variants. In {len(errors)} variants and types, the logits of a captured step are {least} to "
            f"{number(worst['ratio'])} times as far from float64 as those of a step that runs module by module (most "
            f"in {worst['name']}).\n"
        )
    return "\n".join(parts)


def measured(figure: dict[str, Any]) -> str:
    """Returns what a figure says, with its unit."""
    return f"{number(figure['measured'])} {figure['unit']}"


def held_against(figure: dict[str, Any]) -> str:
    """Returns what a figure is held against, and their ratio."""
    if figure["reference"] is None:
        return ""
    return f"{number(figure['ratio'])} × {figure['against']} ({number(figure['reference'])})"


def recall(name: str, text: str) -> str:
    """Returns the share of right answers of benchmarks/recall.py, by distance."""
    found = read(name)
    settings, shares = found["settings"], found["table"]
    distances = list(next(iter(shares.values())))
    rows = []
    for variant, of_variant in shares.items():
        own = [each["right"] for each in found["trainings"] if each["variant"] == variant]
        learned = sum(right[distances[0]] >= LEARNED for right in own)
        cells = [f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in of_variant.values()]
        rows.append([variant, f"{learned} of {len(own)}", *cells])
    return (
        f"{text} The table has the share of right answers in %, by the distance in windows, as the mean and standard "
        f"deviation over {settings['seeds']} seeds. Each training took {settings['minutes']} minutes, at distances of "
        "0 to 7 windows. The second column counts the trainings that learned to answer within one window "
        f"({100 * LEARNED:.0f} %); the means count the others too. A guess is right in 3.1 % of cases.\n\n"
        + table(["windows", "learned", *distances], rows)
    )


def conversion() -> str:
    """Returns what benchmarks/convert.py has measured."""
    rows = [
        [
            each["checkpoint"],
            each["command"],
            each["cache"],
            f"{each['bytes'] / 2**30:.2f} GiB",
            number(each["seconds"]),
            number(each["cpu_seconds"]),
            number(each["peak_bytes"] / 2**20),
        ]
        for each in read("convert.json")
    ]
    head = ["checkpoint", "command", "cache", "size", "seconds", "CPU seconds", "peak MiB"]
    return (
        "The native checkpoint of a model was converted, with its files in the cache of the operating system and not. "
        "`olmem before` is version 0.1, and `cp`, which was run first and last, copies the same files.\n\n"
        + table(head, rows)
    )


def robustness() -> str:
    """Returns what fuzzing and kills have found."""
    fuzz, kills = read("fuzz.json"), read("kills.json")["kills"]
    whole = sum(each["whole"] for each in kills)
    return (
        f"{fuzz['cases']:,} damaged inputs were tried. {fuzz['escapes']:,} of them led to another error than one that "
        f"says what is wrong, and {fuzz['tokens_sent_elsewhere']} led to a token that was sent to another host. None "
        f"took more than {number(fuzz['slowest_seconds'])} s and {number(fuzz['greatest_memory_mib'])} MiB.\n\n"
        f"{len(kills)} conversions that replace a folder were killed while they renamed folders, and a command that "
        f"fails was run after each. The old folder or the new one was whole in {whole} of these cases.\n"
    )


def tracing() -> str:
    """Returns what benchmarks/tracing.py has found."""
    found: dict[str, dict[str, Any]] = read("tracing.json")["table"]
    ways = list(next(iter(found.values())))

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return "refused"
        return f"{value:.1e}".replace("e-0", "e−") if value else "0"

    rows = [[variant, *(cell(of_way[way]) for way in ways)] for variant, of_way in found.items()]
    return (
        "Models of random weights are recorded as a graph, or computed in another way. The table has the greatest "
        "difference of logits, or of gradients in the columns on training and checkpointing, from the model as it "
        f"runs, in float32 on a CPU with torch {read('tracing.json')['torch']}.\n\n" + table(["variant", *ways], rows)
    )


def summary() -> str:
    """Returns the table of the README."""
    figures = {
        (each["row"], each["name"]): each for name, rows in RUNS.items() for each in read(name)["figures"]
        if each["row"] in rows
    }  # fmt: skip
    store = read("recall_store.json")["table"]
    rows = []
    for key, text in {
        ("step", "step at token 1,000,000"): "7B model on one H200, window 4,096: a step at token 1,000,000",
        ("generate", "generate, greedy"): "… `generate()` of 256 tokens, its prompt included",
        ("peers", "Olmo3, static, greedy"): "… the same with Transformers' Olmo3 and a compiled static cache",
        ("prompt", "plain, 65536 tokens"): "… a prompt of 65,536 tokens in one call",
        ("prompt", "Olmo3 in calls"): "… the same with Transformers' Olmo3 in calls of 4,096",
        ("prompt", "plain, 1048576 tokens"): "… a prompt of 1,048,576 tokens in one call",
    }.items():
        if key in figures:
            rows.append([text, measured(figures[key])])
    far = list(store["learned"])[-1]
    own = [each["right"] for each in read("recall_store.json")["trainings"] if each["variant"] == "learned"]
    learned = sum(right["0"] >= LEARNED for right in own)
    for variant, text in {
        "learned": f"pairs that are recalled {far} windows later, after decoys: a store of 64 tokens that selects "
        f"({learned} of {len(own)} trainings learned to recall)",
        "random": "… a store of 64 tokens drawn at random",
        "recent": "… a store of the last 64 tokens",
        "wider": "… a window that is wider by the same number of bytes",
    }.items():
        rows.append([text, f"{100 * store[variant][far][0]:.1f} ± {100 * store[variant][far][1]:.1f} %"])
    return table(["", "measured"], rows)


def page() -> str:
    """Returns the whole page of results."""
    parts = [INTRODUCTION, gpu(), "## Recall\n"]
    parts += [recall(name, text) for name, text in RECALL.items()]
    parts += ["## Tracing\n", tracing(), "## Conversion\n", conversion(), "## Robustness\n", robustness()]
    return "\n".join(parts)


def readme() -> str:
    """Returns the README with its table."""
    text = README.read_text()
    return re.sub(f"(?s){BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{summary()}\n{END}", text)


def config() -> str:
    """Returns the page of the config's fields, by their documentation in the class."""
    defaults = {field.name: field.default for field in fields(OlmemConfig)}
    described = inspect.getdoc(OlmemConfig) or ""
    parts = [FIELDS]
    for names, kind, text in re.findall(r"^    (\w[\w, ]*) \((.*?)\): (.*(?:\n {8}.*)*)", described, re.MULTILINE):
        of_each = [name.strip() for name in names.split(",")]
        if heading := HEADINGS.get(of_each[0]):
            parts += ["", f"## {heading}", ""]
        (default,) = {defaults[name] for name in of_each}
        facts = [] if default is None else [f"default `{json.dumps(default) if isinstance(default, str) else default}`"]
        facts = [fact for fact in kind.split(", ") if fact != "*optional*"] + facts
        line = f"- {', '.join(f'`{name}`' for name in of_each)} ({', '.join(facts)}): {' '.join(text.split())}"
        parts.append(fill(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    CONFIG.write_text(config())
    README.write_text(readme())
