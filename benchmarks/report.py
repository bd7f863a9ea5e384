"""Writes pages from what they are about: results and tables of other pages from benchmarks/results, and the config.

    python benchmarks/report.py

No figure of these pages is typed by hand. A test compares them with what they are made of.
"""

import inspect
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import Any

from olmem import OlmemConfig

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, README = ROOT / "benchmarks/results", ROOT / "docs/results.md", ROOT / "README.md"
CONFIG, MODELS = ROOT / "docs/config.md", ROOT / "docs/models.md"
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
    "recall_memory_noise_0.json": "The same task was learned in a short training, while other trainings ran.",
    "recall_memory_noise_1.json": "The same with noise, which is added to written memory in training.",
}
RUNS = {  # of benchmarks/gpu.py: what is shown of each
    "gpu.json": ("step", "generate", "repeated", "memory", "full", "retrieval", "shared", "grouped", "first", "peers"),
    "gpu_prompts.json": ("prompt", "training"),
    "gpu_training.json": ("training",),
}
LEARNED = 0.9  # the share of right answers from which on a training counts as learned
GUESS = 1 / 64  # the share of right answers among as many values, in benchmarks/reference
FASTER = 1.6  # the target of a prompt on two GPUs, beside one
THE = {"passkey": "the pass key", "niah_single_1": "the number of S-NIAH-1"}
NAMES = {"passkey": "pass key", "niah_single_1": "S-NIAH-1"}
ABOUT = {  # the arms of benchmarks/reference
    "full": "full attention",
    "window": "windows",
    "sinks": "windows and 4 sinks",
    "memory": "windows and memory tokens",
    "recent": "windows and a store of the last tokens",
    "selected": "windows and a store that selects",
    "selected, key_value": "… with one tensor for keys and values",
    "all": "… and memory tokens",
    "OlmoHybrid": "linear attention of Transformers' OlmoHybrid",
    "RMT": "full attention in segments, memory tokens",
}
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
        late = [each["late"] for each in found["trainings"] if each["variant"] == variant and "late" in each]
        if late:
            means = {each: 100 * statistics.fmean(right[each] for right in late) for each in late[0]}
            rows.append(
                [f"{variant}, told late", "", *(f"{means[each]:.1f}" if each in means else "" for each in distances)]
            )
    noise = (
        f"The noise has a standard deviation of {number(settings['noise'])}. A fact that is told late stands "
        f"7 windows before its question, whatever the length of the text is. "
        if settings.get("late")
        else ""
    )
    return (
        f"{text} The table has the share of right answers in %, by the distance in windows, as the mean and standard "
        f"deviation over {settings['seeds']} seeds. Each training took {settings['minutes']} minutes, at distances of "
        "0 to 7 windows. The second column counts the trainings that learned to answer within one window "
        f"({100 * LEARNED:.0f} %); the means count the others too. {noise}A guess is right in 3.1 % of cases.\n\n"
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
        f"took more than {number(fuzz['slowest_seconds'])} s of the processor and "
        f"{number(fuzz['greatest_memory_mib'])} MiB.\n\n"
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


def spread(pair: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Returns a mean and a standard deviation, as they are in a file, times a factor."""
    return f"{factor * pair[0]:.{digits}f} ± {factor * pair[1]:.{digits}f}".replace("-", "−")


def picture(name: str, text: str) -> str:
    """Returns the plot of a result file."""
    return f"![{text}](../benchmarks/results/{name}.svg)\n"


def made_by(name: str, word: str, settings: Sequence[str]) -> str:
    """Returns how a file of benchmarks/reference was made, with the settings of it that are told."""
    given = read(f"{name}.json")["settings"]
    options = " ".join(f'--{each} "{given[each]}"' if ";" in str(given[each]) else f"--{each} {given[each]}"
                       for each in settings)  # fmt: skip
    return f"*{name}.json*: `python benchmarks/reference {word} {options}`, torch {read(f'{name}.json')['torch']}."


def bytes_of(state: int | None) -> str:
    """Returns bytes of state, of which a file may have none."""
    return "" if state is None else f"{state:,}"


def pairs() -> str:
    """Returns the recall of many pairs by benchmarks/reference, of each training and of each arm."""
    found, arms = read("reference_pairs.json"), read("reference_arms.json")
    length, asked = found["shape"]["length"], arms["settings"]
    rates = " or ".join(dict.fromkeys(f"{row['rate']:g}" for row in arms["trainings"]))
    planned = asked["seeds"] * len(asked["arms"].split(";"))
    times = list(max((row["length"] for row in found["trainings"]), key=len))
    rows = [
        [row["arm"], str(row["seed"]), str(len(row["begins"])), *(percent(row["length"].get(each)) for each in times),
         percent(row.get("off"))]
        for row in sorted(found["trainings"], key=lambda row: (row["arm"], row["seed"]))
    ]  # fmt: skip
    of_arms = [
        [arm, ABOUT[arm], f"{entry['through']} of {entry['trainings']}", f"{entry['parameters']:,}",
         bytes_of(entry["state"]), *of_lengths(entry["length"], times),
         spread(entry["off"]) if "off" in entry else ""]
        for arm, entry in arms["table"].items()
    ]  # fmt: skip
    told = [
        [f"{arm} ({name})", *(spread(each) for each in entry["pairs"].values()), spread(entry["late"])]
        for name, file in (("reference_pairs", found), ("reference_arms", arms))
        for arm, entry in file["table"].items()
        if entry["pairs"]
    ]
    columns = next(entry["pairs"] for entry in found["table"].values() if entry["pairs"])
    return "\n".join(
        [
            "### Recall of many pairs\n",
            f"A text tells {next(iter(columns))} pairs of a key and a value, which have left every window before some "
            "of them are asked for. Decoys that are never asked for stand before and after them. A store that selects "
            f"has room for {found['shape']['capacity']} tokens, and texts that are trained on have at most {length:,}. "
            f"The tables have the share of right answers in %; a guess is right in {100 * GUESS:.1f} % of cases. A "
            f"training has learned it with {100 * LEARNED:.0f} % at the trained length.\n",
            made_by("reference_pairs", "train", ("arms", "seeds", "steps", "tokens"))
            + " This table has every training. `stages` counts the stages of the curriculum that were reached, and the "
            "columns are lengths in multiples of the trained length. In the last one the store is switched off.\n",
            picture("reference_pairs", "Right answers by the length of a text, and by the number of pairs"),
            table(["arm", "seed", "stages", *(f"{each}×" for each in times), "store off"], rows),
            made_by("reference_arms", "train", ("arms", "seeds", "steps", "tokens"))
            + " This run was of an earlier curriculum, which went on after a tenth of the steps, whatever was "
            f"answered. {len(arms['trainings'])} of {planned} trainings were done in time. The table has means and "
            f"standard deviations over seeds. The learning rate was {rates} in all. All arms but `full` "
            "were made with the same count of numbers of state. OlmoHybrid keeps its numbers in float32, where the "
            "others may have bfloat16: that is twice as many bytes. RMT had 64 memory tokens and segments of 256 "
            "tokens. Steps were not replayed as CUDA graphs. Bytes are the most that were counted, in Olmem's caches "
            "only, in bfloat16; those of `full` grow with the text.\n",
            picture("reference_arms", "Right answers of each arm by the length of a text, and by the number of pairs"),
            table(["arm", "", "learned", "parameters", "bytes of state", *(f"{each}×" for each in times), "store off"],
                  of_arms),
            "More pairs than a store has room for are told in this table, in texts of 16 times the trained length. In "
            f"the last column {next(iter(columns))} pairs are told in the middle of a text rather than at its start.\n",
            table(["pairs", *columns, "told late"], told),
        ]
    )  # fmt: skip


def of_lengths(found: dict[str, list[float]], lengths: Sequence[str]) -> list[str]:
    """Returns shares of right answers, for those lengths that there are."""
    return [spread(found[each]) if each in found else "" for each in lengths]


def percent(share: float | None) -> str:
    """Returns a share in percent, of which a file may have none."""
    return "" if share is None else f"{100 * share:.1f}"


def stories() -> str:
    """Returns what models find in texts of up to a million tokens, and what it takes."""
    found, timed = read("reference_stories.json"), read("reference_time.json")
    lengths = list(max((entry["length"] for entry in found["table"].values()), key=len))
    config = found["trainings"][0]["config"]
    rows = [
        [NAMES[job], f"{entry['through']} of {entry['trainings']}",
         *of_lengths(entry["length"], lengths), spread(entry["off"])]
        for job, entry in found["table"].items()
    ]  # fmt: skip
    states = {state for row in found["trainings"] for state in row["state"].values()}
    texts = [number_range(row["rows"].get(each, 0) for row in found["trainings"]) for each in lengths]
    rows.append(["texts of a training", "", *texts, ""])
    head = ["tokens", *(f"{int(each):,}" for each in timed["state"])]
    return "\n".join(
        [
            "### Pass key and S-NIAH-1\n",
            "A text tells one number: the pass key in filler that repeats a few sentences, or RULER's S-NIAH-1. It is "
            f"asked for at the end. Models of {found['trainings'][0]['parameters']:,} parameters, with a window of "
            f"{config['sliding_window']} tokens and a store that selects {config['retrieval_capacity']}, are trained "
            f"on texts of at most {config['max_position_embeddings']:,} tokens.\n",
            made_by("reference_stories", "stories", ("jobs", "seeds", "seconds", "tokens", "rows"))
            + " The table has the share of right answers in %, by the tokens of a text, as the mean and standard "
            "deviation over seeds. All digits must be right. Numbers stand at all depths. "
            f"The state of a text has {number_range(states)} bytes. In the last column the store is switched off.\n",
            picture("reference_stories", "Right answers by the tokens of a text"),
            table(["task", "learned", *(f"{int(each):,}" for each in lengths), "store off"], rows),
            f"*reference_time.json*: `python benchmarks/reference time`, with one text of {NAMES[timed['task']]} that "
            "is read alone, the median of 16 calls around each length.\n",
            table(head, [["µs a token", *(f"{each:.1f}" for each in timed["microseconds"].values())],
                         ["bytes of state", *(f"{each:,}" for each in timed["state"].values())]]),
        ]
    )  # fmt: skip


def number_range(values: Iterable[int]) -> str:
    """Returns the least and the greatest number."""
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def text() -> str:
    """Returns perplexities of text models of equal state."""
    found = read("reference_text.json")
    arms, shape = found["table"], found["shape"]
    lengths = list(next(iter(arms.values()))["length"])
    rows = [
        [arm, str(entry["trainings"]), f"{entry['rate']:g}", f"{entry['parameters']:,}", bytes_of(entry.get("state")),
         *(spread(entry["length"][each], 1, 2) for each in lengths), spread(entry["beside_full"], 1),
         spread(entry["copied"]), spread(entry["off"], 1, 2) if "off" in entry else ""]
        for arm, entry in arms.items()
    ]  # fmt: skip
    return "\n".join(
        [
            "### Text\n",
            "Models of the same size of state, and one of full attention, are trained on "
            f"{found['tokens']['training']:,} tokens of the Python standard library's sources, in rows of at most "
            f"{shape['length']:,} tokens, and read {found['settings']['evaluated']:,} held-out tokens.\n",
            made_by("reference_text", "text", ("arms", "seeds", "steps", "rates", "sweep"))
            + " The table has perplexities by the length of a row, in multiples of the trained one; how much more that "
            "is than full attention's of the same seed, in %; the share in % of the tokens of a passage that are right "
            f"when it comes a second time, {shape['length'] * 7 // 8:,} tokens later; and the perplexity with the "
            "store switched off. Means and standard deviations are over seeds.\n",
            picture("reference_text", "Perplexity by the place in a row, and in the course of a stream"),
            table(["arm", "seeds", "learning rate", "parameters", "bytes of state",
                   *(f"{each}×" for each in lengths), "beside full, %", "copied, %", "store off"], rows),
        ]
    )  # fmt: skip


def stored(layers: str) -> str:
    """Returns what layers a file says have a store."""
    return f"a store in layer{'s' if ',' in layers else ''} {layers[1:-1]}"


def distillation() -> str:
    """Returns what a store brings back beside a model of full attention, and how such a model streams."""
    found = read("reference_distill.json")
    stores, streams, settings = found["table"]["stores"], found["table"]["streams"], found["settings"]
    steps = {
        "full": "full attention",
        "window": f"window of {settings['window']}",
        "sinks": f"the same and {settings['sinks']} sinks",
    }

    def line(name: str, figures: dict[str, Any], more: Sequence[str]) -> list[str]:
        backs = [spread(figures[each], 100, 0) for each in ("perplexity_back", "copied_back")]
        return [name, spread(figures["perplexity"], 1, 2), backs[0], spread(figures["copied"]), backs[1], *more]

    rows = [line(name, next(iter(stores.values()))[step], ("", "")) for step, name in steps.items()]
    for layers, entry in stores.items():
        for step, name in (("untrained", "new"), ("distilled", "distilled")):
            more = (f"{entry['trained']:,}", spread(entry["seconds"], 1)) if step == "distilled" else ("", "")
            rows.append(line(f"… and {stored(layers)}, {name}", entry[step], more))
    read_as_one = [
        [name, spread(entry["perplexity"], 1, 2), spread(entry["beside_full"], 1), bytes_of(entry["state"])]
        for name, entry in streams.items()
    ]
    return "\n".join(
        [
            "### A store beside full attention\n",
            "The models of full attention of the section before get windows, sinks and a store that selects "
            f"{settings['capacity']} tokens. Only scores and gates of the store are trained, on what full attention "
            "predicts.\n",
            made_by("reference_distill", "distill", ("seeds", "steps", "tokens", "stores"))
            + " *back* is the share of what full attention has beyond the window with sinks, of log perplexity and of "
            "copied tokens, which may be more than 100 % or less than 0.\n",
            picture("reference_distill", "Perplexity in the course of a stream, and of each step of a distillation"),
            table(["", "perplexity", "back, %", "copied, %", "back, %", "new parameters", "seconds"], rows),
            f"These models, and those of windows, read {found['tokens']['stream']:,} tokens as one stream. Full "
            "attention reads them in rows of the trained length, and the third column says how much more perplexity "
            "there is than with that, of the same seed.\n",
            table(["", "perplexity", "beside full attention in rows, %", "bytes of state"], read_as_one),
        ]
    )  # fmt: skip


def parallel() -> str:
    """Returns what benchmarks/parallel.py has measured."""
    found = read("parallel.json")
    settings, measured = found["settings"], found["table"]
    apart = max(abs(one - two) for one, two in zip(measured["training losses, one"], measured["training losses, two"],
                                                   strict=True))  # fmt: skip
    rows = [
        [f"prompt of {settings['prompt']:,} tokens, tokens/s", number(measured["prompt tokens/s, one"]),
         number(measured["prompt tokens/s, two"]), f"{number(measured['prompt, two beside one'])} ×"],
        ["a step, ms", f"{number(measured['step ms, one'])} ({measured['step path, one']})",
         number(measured["step ms, two"]), f"{number(measured['step ms, two'] / measured['step ms, one'])} ×"],
        ["a step, module by module, ms", number(measured["step ms, one, module by module"]),
         number(measured["step ms, two"]),
         f"{number(measured['step ms, two'] / measured['step ms, one, module by module'])} ×"],
        ["a training step with memory tokens and FSDP, s", number(measured["training step s, one"]),
         number(measured["training step s, two"]),
         f"{number(measured['training step s, two'] / measured['training step s, one'])} ×"],
    ]  # fmt: skip
    return (
        f"*parallel.json*: {found['device']}; torch {found['torch']}. A model of {settings['layers']} layers of width "
        f'{settings["width"]:,} is loaded with `tp_plan="auto"`, and a small one with memory tokens is trained with '
        "`fully_shard`. In float32, logits differ by at most "
        f"{measured['largest difference of logits, float32']:.1e}, and the losses of training steps by at most "
        f"{apart:.1e}. The target of prompts was {number(FASTER)} ×: "
        f"{met(measured['prompt, two beside one'] >= FASTER)}. A step of two GPUs runs module by module.\n\n"
        + table(["", "one GPU", "two GPUs", "two beside one"], rows)
    )


def of_trainings(name: str, arm: str, times: str) -> list[float]:
    """Returns the shares of right answers of an arm's trainings, in percent, from the least on."""
    rows = read(name)["trainings"]
    return sorted(100 * row["length"][times] for row in rows if row["arm"] == arm and "length" in row)


def findings() -> str:
    """Returns what the reference models have shown, in sentences."""
    arms, times = read("reference_arms.json")["table"], "16"
    tried = [row for row in read("reference_pairs.json")["trainings"] if row["arm"] == "selected"]
    best = max(tried, key=lambda row: row["length"]["1"])["length"]
    far = list(best)[-1]
    full, full_far, own = (of_trainings("reference_pairs.json", *each)
                           for each in (("full", "1"), ("full", times), ("selected", "1")))  # fmt: skip

    def ranges(arm: str) -> str:
        every = (of_trainings("reference_arms.json", arm, each) for each in ("1", times))
        return " and ".join(f"{each[0]:.0f} to {each[-1]:.0f} %" for each in every)

    others = [arm for arm in arms if arm not in ("full", "selected", "OlmoHybrid")]
    first = max(others, key=lambda arm: arms[arm]["length"]["1"][0])
    stories, text = read("reference_stories.json"), read("reference_text.json")["table"]
    longest = list(stories["table"]["niah_single_1"]["length"])[-1]
    multiple = int(longest) // stories["trainings"][0]["config"]["max_position_embeddings"]
    finds = {
        job: sum(row["length"].get(longest) == 1 for row in stories["trainings"] if row["job"] == job)
        for job in stories["table"]
    }
    told = " and ".join(
        f"{count} of {stories['table'][job]['trainings']} trainings for {THE[job]}" for job, count in finds.items()
    )
    untried = ", ".join(f"`{arm}`" for arm in ABOUT if arm not in text)
    quiet, noisy = (read(f"recall_memory_noise_{each}.json")["table"]["memory"] for each in (0, 1))
    some = ("4", "16", "64")
    answered, answered_quiet = (", ".join(f"{100 * each[far][0]:.0f}" for far in some) for each in (noisy, quiet))
    sentences = [
        f"*Many pairs.* The best training of a store that selects answers {100 * best['1']:.0f} % at the trained "
        f"length and {100 * best[far]:.0f} % at {far} times that length. The next best answers {own[-2]:.0f} % at the "
        f"trained length, and the others less. Full attention answers {full[0]:.0f} to {full[-1]:.0f} %, and at "
        f"{times} times that length {full_far[0]:.0f} to {full_far[-1]:.0f} %.",
        f"*Linear attention.* In another run, of more arms, OlmoHybrid's linear attention with as many numbers "
        f"of state answers {ranges('OlmoHybrid')} at the trained length and at {times} times that length. There a "
        f"store that selects answers {ranges('selected')}.",
        f"*Other memories.* Of the other arms of that run, but full attention, `{first}` answers most: "
        f"{100 * arms[first]['length']['1'][0]:.1f} %, where a guess is right in {100 * GUESS:.1f} %.",
        f"*One number in a long text.* All answers in texts of {int(longest):,} tokens, {multiple} times the longest "
        f"of the training, are right in {told}.",
        "*Text.* Beside full attention, the perplexity of windows differs by "
        f"{spread(text['window']['beside_full'], 1)} %, and that of a store that selects, trained from scratch, by "
        f"{spread(text['selected']['beside_full'], 1)} %. It is {text['selected']['length']['1'][0]:.2f} with the "
        f"store and {text['selected']['off'][0]:.2f} with it switched off.",
    ]
    if untried:
        sentences.append(f"*Not tried with text:* {untried}.")
    for layers, entry in read("reference_distill.json")["table"]["stores"].items():
        logs, copies = (spread(entry["distilled"][each], 100, 0) for each in ("perplexity_back", "copied_back"))
        sentences.append(
            f"*Beside trained full attention,* {stored(layers)} that was distilled brings back {logs} % of the log "
            f"perplexity, and {copies} % of the copied tokens, that full attention has beyond a window with sinks."
        )
    sentences.append(
        f"*Noise on memory tokens.* With noise on written memory in training, {answered} % are right of pairs that are "
        f"told {', '.join(some)} windows before; without, {answered_quiet} %. Results have the share of those told "
        "late in a text."
    )
    return (
        "\n".join(fill(f"- {each}", 120, subsequent_indent="  ", break_on_hyphens=False) for each in sentences) + "\n"
    )


def met(is_met: bool) -> str:
    """Returns whether a target is reached."""
    return "reached" if is_met else "**missed**"


def targets() -> str:
    """Returns what the reference models were to show, and what they show."""
    pairs, arms = read("reference_pairs.json")["table"], read("reference_arms.json")["table"]
    tasks, timed = read("reference_stories.json")["table"], read("reference_time.json")
    texts, distilled = read("reference_text.json")["table"], read("reference_distill.json")["table"]
    selected, rows = pairs["selected"], []

    def add(name: str, target: str, found: str, is_met: bool) -> None:
        rows.append([name, target, found, met(is_met)])

    for times, least in (("1", 0.98), ("64", 0.95), ("256", 0.9)):
        name = f"recall of pairs by `selected`, {times}× the trained length"
        add(name, f"≥ {100 * least:.0f} %", f"{spread(selected['length'][times])} %",
            selected["length"][times][0] >= least)  # fmt: skip
    add("… trainings that learned it", "all", f"{selected['through']} of {selected['trainings']}",
        selected["through"] == selected["trainings"])  # fmt: skip
    add("… its store switched off", f"≤ {100 * GUESS + 1:.1f} %", f"{spread(selected['off'])} %",
        selected["off"][0] <= GUESS + 0.01)  # fmt: skip
    for arm in ("window", "sinks"):
        add(f"… `{arm}`", f"{100 * GUESS:.1f} ± 1 %", f"{spread(arms[arm]['length']['1'])} %",
            abs(arms[arm]["length"]["1"][0] - GUESS) <= 0.01)  # fmt: skip
    hybrid, beside = (arms[arm]["length"]["1"] for arm in ("OlmoHybrid", "selected"))
    add("… OlmoHybrid's linear attention, and `selected` in the same run", "lower than `selected`",
        f"{spread(hybrid)} %, {spread(beside)} %", hybrid[0] + hybrid[1] < beside[0])  # fmt: skip
    for task, length, least in (("passkey", "1048576", 0.99), ("niah_single_1", "65536", 0.95)):
        found = tasks[task]["length"][length]
        add(f"{NAMES[task]} in {int(length):,} tokens", f"≥ {100 * least:.0f} %",
            f"{spread(found)} % ({tasks[task]['through']} of {tasks[task]['trainings']} learned it)",
            found[0] >= least)  # fmt: skip
    states, times = list(timed["state"].values()), list(timed["microseconds"].values())
    lengths = f"{int(next(iter(timed['state']))):,} to {int(list(timed['state'])[-1]):,} tokens"
    add(f"bytes of state from {lengths}", "constant", number_range(states), len(set(states)) == 1)
    add("… time a token", "± 5 % of the first", f"{min(times):.1f} to {max(times):.1f} µs",
        all(abs(each / times[0] - 1) <= 0.05 for each in times))  # fmt: skip
    named = [job for job in tasks if job.startswith("qa")]
    add("BABILong's QA1 to QA3 in 1,048,576 tokens", "≥ 99, 99, 85 %", ", ".join(named) or "not measured", False)
    add("perplexity of text, `selected` beside full attention", "at most 1 % more",
        f"{spread(texts['selected']['beside_full'], 1)} %", texts["selected"]["beside_full"][0] <= 1)  # fmt: skip
    for times in list(texts["full"]["length"])[1:]:
        one, other = (texts[arm]["length"][times] for arm in ("selected", "full"))
        add(f"… in rows {times}× as long", "lower than full attention", f"{spread(one, 1, 2)}, {spread(other, 1, 2)}",
            one[0] < other[0])  # fmt: skip
    narrow = [
        (name, entry["beside_full"]) for name, entry in distilled["streams"].items() if name.startswith("window of")
    ]
    for name, beside in narrow:
        bare = ", 0 of them sinks" in name
        target = "at least twice the perplexity" if bare else "at most 3 % more"
        add(f"full attention under a {name}, as a stream", target,
            f"{spread(beside, 1)} %", beside[0] >= 100 if bare else beside[0] <= 3)  # fmt: skip
    for layers, entry in distilled["stores"].items():
        add(f"{stored(layers)}, distilled: perplexity that comes back", "≤ 30 minutes",
            f"{spread(entry['distilled']['perplexity_back'], 100, 0)} % in {number(entry['seconds'][0])} s",
            entry["seconds"][0] <= 1800)  # fmt: skip
    curve = read("recall_memory_noise_1.json")["table"]["memory"]
    farthest = list(curve)[-1]
    add(
        "memory tokens, windows to the farthest fact that was tried",
        "100,000",
        f"{int(farthest):,}",
        int(farthest) >= 100_000,
    )
    return table(["", "target", "found", ""], rows)


def guide() -> str:
    """Returns the page of the reference models with its table."""
    written = f"{BEGIN}\n\n{findings()}\n{targets()}\n{END}"
    return re.sub(f"(?s){BEGIN}.*{END}", lambda _: written, MODELS.read_text())


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
        "recent": "… a store of the last 64 tokens",
        "wider": "… a window that is wider by the same number of bytes",
    }.items():
        rows.append([text, f"{spread(store[variant][far])} %"])
    stories = read("reference_stories.json")
    longest = list(stories["table"]["passkey"]["length"])[-1]
    states = number_range(row["state"][longest] for row in stories["trainings"])
    told = [
        f"{NAMES[task]} ({entry['through']} of {entry['trainings']} trainings)"
        for task, entry in stories["table"].items()
    ]
    shares = [f"{spread(entry['length'][longest])} %" for entry in stories["table"].values()]
    rows.append([f"found in texts of {int(longest):,} tokens with a state of {states} bytes: {', '.join(told)}",
                 ", ".join(shares)])  # fmt: skip
    return table(["", "measured"], rows)


def page() -> str:
    """Returns the whole page of results."""
    parts = [INTRODUCTION, gpu(), "## Recall\n"]
    parts += [recall(name, text) for name, text in RECALL.items()]
    about = "[Reference models](models.md) has what these runs were to show, and how to repeat them.\n"
    parts += ["## Reference models\n", about, pairs(), stories(), text(), distillation(), "## Two GPUs\n", parallel()]
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
    MODELS.write_text(guide())
