"""Associative recall: a pair is told, many windows later its key is asked for.

    python benchmarks/recall.py [--variants memory,…] [--minutes 4] [--seeds 3] [--processes 1] [--smoke] [--json FILE]
    python benchmarks/recall.py --variants wider,recent,random,learned --decoys 2
    python benchmarks/recall.py --variants memory --noise 1 --longest 4095

A row is segments of as many tokens as the window has. The first half of the first tells pairs of a key and a value; the
last half of the last asks for the keys, in another order, a value after each, which is what is scored; all between is
filler. At a distance of d windows, d times as many tokens as the window has lie between a pair and its question, more
or less half a window. Guessing among the values is right in one of 32 cases. Three layers of windows, one behind the
other, reach three windows far at most.

Three small models of the same block (norms before sublayers), sliding windows in every layer, and the same time: with
windows alone, with retrieval in the middle layer, and with memory tokens. All train on distances of 0 to 7 windows, 8
segments at most: a row's distance is drawn up to a limit that doubles whenever the longest rows are answered. The first
rows have four pairs in half a window: without them some trainings never learn to look anything up. The table has the
share of right answers, mean and standard deviation over the seeds.

With `--decoys` pairs of the same keys and values are strewn over the filler behind a marker, so many a window, and are
never asked for. Then stores of 64 tokens, too small for a text, show what is worth keeping: the last tokens (`recent`),
tokens drawn at random (`random`), or those of scores that are learned (`learned`). Windows that take the same bytes are
beside them (`wider`).

With `--noise` memory that was written is disturbed in training, so that what is written next must undo small errors.
Then it is kept for many more segments than a training has.

A training is a process of its own with as many threads as there are cores to it; `--processes` at a time, all on one
GPU if there is one, where a training step is replayed as a CUDA graph.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from reference.captured import Passes
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

KEYS, VALUES, FILLER = 32, 32, 16  # kinds of tokens, numbered in this order
WINDOW = 32  # tokens, of a segment too
PAIRS = 8  # told in a row's first half window, and asked for in its last
FEW = 4  # pairs of the first rows, which have no filler
TRAINED = 7  # windows' distance at most: 8 segments
DISTANCES = (0, 1, 4, 7, 8, 16, 64, 256, 511, 1535, 4095, 16383)
MARKER = KEYS + VALUES + FILLER  # stands before a pair that is never asked for
CHECKED = 4  # steps between two looks at what is answered
PLACES = 4  # of a window, where such a pair may be
SMALL: dict[str, Any] = {
    "retrieval_layers": [1],
    "retrieval_top_k": 8,
    "retrieval_capacity": 64,
    "retrieval_gate_init": 0.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "window": {},
    "retrieval": {
        "retrieval_layers": [1],
        "retrieval_top_k": 8,
        "retrieval_capacity": 4096,
        "retrieval_gate_init": 0.0,
    },
    "memory": {"num_memory_tokens": 8, "memory_segment_length": WINDOW},
    "wider": {"sliding_window": 110},
    "recent": SMALL,
    "random": SMALL | {"retrieval_admission": "learned"},
    "learned": SMALL | {"retrieval_admission": "learned"},
}


@dataclass(frozen=True)
class Settings:
    minutes: float = 4.0
    seeds: int = 3
    steps: int = 0
    batch: int = 256
    rate: float = 2e-3
    width: int = 128
    layers: int = 3
    heads: int = 4
    processes: int = 1
    rows: int = 256
    longest: int = 1535
    decoys: int = 0
    noise: float = 0.0
    late: int = 0
    trial_minutes: float = 10.0
    graphs: int = 1
    variants: str = "window,retrieval,memory"


SMOKE = Settings(minutes=0.5, seeds=1, steps=3, batch=4, width=32, rows=4, longest=64)
HELP = {
    "minutes": "of a training, at most",
    "seeds": "trainings of each variant",
    "steps": "of a training, at most; 0 is as many as the minutes allow",
    "batch": "rows of a batch",
    "rate": "largest learning rate",
    "processes": "trainings at a time",
    "rows": "of an evaluation, with 4 answers each",
    "longest": "distance that is tried",
    "decoys": f"pairs of a window that are never asked for, {PLACES} at most",
    "noise": "standard deviation of what is added to written memory in training",
    "late": f"1 also tries pairs that are told {TRAINED} windows before they are asked for, at the end of long rows",
    "trial_minutes": "in which a model is tried; longer distances are left out",
    "graphs": "1 replays steps as CUDA graphs on a GPU, 0 does not",
    "variants": "that are trained",
}


def make_config(variant: str, settings: Settings) -> OlmemConfig:
    common = {
        "vocab_size": MARKER + (settings.decoys > 0),
        "hidden_size": settings.width,
        "intermediate_size": 2 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "layer_types": ["sliding_attention"] * settings.layers,
        "sliding_window": WINDOW,
        "norm_placement": "pre",
        "rope_parameters": {"rope_theta": 10000.0},
        "max_position_embeddings": WINDOW,
    }
    return OlmemConfig(**common | VARIANTS[variant])


def make_rows(
    count: int, distance: int, generator: torch.Generator, decoys: int = 0, pairs: int = PAIRS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (count, tokens), and where the values are that answer (count, pairs); few pairs have no filler."""

    def permutations(size: int) -> torch.Tensor:
        return torch.rand(count, size, generator=generator).argsort(-1)

    length = (distance + 1) * WINDOW if pairs == PAIRS else 4 * pairs
    ids = KEYS + VALUES + torch.randint(FILLER, (count, length), generator=generator)
    keys = permutations(KEYS)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (count, pairs), generator=generator)
    order = permutations(pairs)
    if decoys and distance:
        between = ids[:, 2 * pairs : -2 * pairs].unflatten(1, (-1, WINDOW // PLACES))
        size = between.shape[:2]
        key, value = (torch.randint(kinds, size, generator=generator) for kinds in (KEYS, VALUES))
        found = torch.stack((torch.full(size, MARKER), key, KEYS + value), dim=-1)
        is_decoy = torch.rand(size, generator=generator) < decoys / PLACES
        between[..., :3] = torch.where(is_decoy[..., None], found, between[..., :3])
    ids[:, : 2 * pairs] = torch.stack((keys, values), dim=-1).flatten(1)
    ids[:, -2 * pairs :] = torch.stack((keys.gather(1, order), values.gather(1, order)), dim=-1).flatten(1)
    return ids, (length - 2 * pairs + 1 + 2 * torch.arange(pairs)).expand(count, -1)


def answers(model: OlmemForCausalLM, ids: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the values in these columns, and which of them are the likeliest."""
    tail = 2 * asked.shape[1]  # the columns that ask
    logits = model(ids, use_cache=False, logits_to_keep=tail).logits
    places = asked - 1 - (ids.shape[1] - tail)
    logits = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
    targets = ids.gather(1, asked)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), logits.argmax(-1) == targets


def drawn(_: nn.Module, given: object, scores: torch.Tensor) -> torch.Tensor:
    """Draws scores that are too small to matter but for who stays."""
    return 1e-4 * torch.rand_like(scores)


def add_noise(scale: float, memory: nn.Module, given: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> Any:
    """Adds noise to memory that was written, in training; the memory that begins a stream stays as it is."""
    written = bool(given) and given[0] is not None
    return output + scale * torch.randn_like(output) if written and memory.training else output


def train(variant: str, seed: int, settings: Settings, device: str) -> dict[str, Any]:
    """One model, trained and tried: its share of right answers at each distance."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = OlmemForCausalLM(make_config(variant, settings))
    if variant == "random":
        for name, module in model.named_modules():
            if name.endswith("retrieval_score"):
                module.register_forward_hook(drawn)
    if settings.noise and model.model.memory is not None:
        model.model.memory.register_forward_hook(partial(add_noise, settings.noise))
    model.to(device).train()
    passes = None
    if settings.graphs and device == "cuda":
        passes = Passes(model, lambda inputs: answers(model, *inputs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, limit, step = time.perf_counter(), -1, 0
    longest: deque[torch.Tensor] = deque(maxlen=20)  # shares of right answers of the longest rows
    reached = {}
    while time.perf_counter() - start < 60 * settings.minutes and not 0 < settings.steps <= step:
        spent = (time.perf_counter() - start) / (60 * settings.minutes)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / 100, 4 * (1 - spent) + 0.01)
        distance = limit if step % 2 or limit < 0 else int(torch.randint(limit + 1, (), generator=generator))
        rows = make_rows(settings.batch, max(0, distance), generator, settings.decoys, PAIRS if distance >= 0 else FEW)
        ids, asked = (each.to(device) for each in rows)
        if passes is None:
            loss, right = answers(model, ids, asked)
            loss.backward()
        else:
            loss, right = passes.step(ids.shape, (ids, asked))
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if distance == limit:
            longest.append(right.float().mean())
            full = len(longest) == longest.maxlen and step % CHECKED == 0  # to look at them waits for the device
            if full and limit < TRAINED and float(torch.stack(tuple(longest)).mean()) > 0.9:
                limit = min(2 * limit or 1, TRAINED) if limit >= 0 else 0
                reached[limit] = step
                longest.clear()
    found = {
        "variant": variant,
        "seed": seed,
        "steps": step,
        "seconds": time.perf_counter() - start,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "limits": reached,
    }
    model.eval()
    until = time.perf_counter() + 60 * settings.trial_minutes
    shares: dict[int, float] = {}
    late: dict[int, float] = {}
    took, before = 0.0, 1
    for distance in (each for each in DISTANCES if each <= settings.longest):
        if time.perf_counter() + took * (distance + 1) / before > until:
            break
        start, before, generator = time.perf_counter(), distance + 1, torch.Generator().manual_seed(1000 + seed)
        ids, asked = make_rows(settings.rows, distance, generator, settings.decoys)
        with_late = settings.late and distance > TRAINED
        if with_late:
            told_late, _ = make_rows(settings.rows, TRAINED, generator, settings.decoys)
            size = settings.rows, (distance - TRAINED) * WINDOW
            filler = KEYS + VALUES + torch.randint(FILLER, size, generator=generator)
            ids, asked = torch.cat((ids, torch.cat((filler, told_late), dim=1))), asked.repeat(2, 1)
        right = try_rows(model, ids, asked, device)
        shares[distance] = float(right[: settings.rows].mean())
        if with_late:
            late[distance] = float(right[settings.rows :].mean())
        took = time.perf_counter() - start
    return found | {"right": shares} | ({"late": late} if late else {})


@torch.no_grad()
def try_rows(model: OlmemForCausalLM, ids: torch.Tensor, asked: torch.Tensor, device: str) -> torch.Tensor:
    """Returns the share of right answers in each row (R,), of as many rows at a time as find room."""
    some = max(1, min(64, 2**22 // ids.shape[1]))
    parts = zip(ids.split(some), asked.split(some), strict=True)
    right = [answers(model, *(each.to(device) for each in part))[1] for part in parts]
    return torch.cat(right).float().mean(1).cpu()


def train_alone(arguments: tuple[str, int, Settings, str]) -> dict[str, Any]:
    settings = arguments[2]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.processes))
    return train(*arguments)


def make_table(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, dict[int, tuple[float, float]]]]:
    """The lines to print, and mean and standard deviation of the shares in them."""
    lines, table = ["right answers, %, at a distance of so many windows"], {}
    distances = [each for each in DISTANCES if any(each in row["right"] for row in rows)]
    lines.append(f"{'':<10}{'parameters':>11}" + "".join(f"{distance:>14}" for distance in distances))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = [row for row in rows if row["variant"] == variant]
        line, table[variant] = f"{variant:<10}{found[0]['parameters']:>11}", {}
        for distance in distances:
            shares = [row["right"][distance] for row in found if distance in row["right"]]
            if not shares:
                break
            spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
            table[variant][distance] = statistics.fmean(shares), spread
            line += f"{100 * statistics.fmean(shares):>7.1f} ± {100 * spread:<4.1f}"
        lines.append(line)
    return lines, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        text = f"{HELP.get(field.name, '')} ({field.default}; smoke {getattr(SMOKE, field.name)})".strip()
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help=text)
    parser.add_argument("--smoke", action="store_true", help="the same in little, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    given = vars(parser.parse_args())
    smoke, file = given.pop("smoke"), given.pop("json")
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = replace(SMOKE if smoke else Settings(), **chosen)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [
        (variant, seed, settings, device) for seed in range(settings.seeds) for variant in settings.variants.split(",")
    ]
    print(f"{device}, torch {torch.__version__}: {len(jobs)} trainings, {settings.processes} at a time", flush=True)
    rows, lines = [], []
    pool = multiprocessing.get_context("spawn").Pool(settings.processes, maxtasksperchild=1)
    with pool, tqdm(total=len(jobs), unit="training", leave=False, disable=None) as progress:
        for row in pool.imap_unordered(train_alone, jobs):
            rows.append(row)
            shares = "  ".join(f"{distance}: {100 * share:.1f} %" for distance, share in row["right"].items())
            progress.write(f"{row['variant']:<10}seed {row['seed']}  {row['steps']} steps  {shares}")
            progress.update()
            lines, table = make_table(rows)
            if file is not None:  # what is done stays if the rest is broken off
                found = {"device": device, "torch": torch.__version__, "settings": asdict(settings)}
                file.write_text(json.dumps(found | {"trainings": rows, "table": table}, indent=2) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
