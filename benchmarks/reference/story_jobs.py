"""Trains and tries many models that read stories, each in a process that has one GPU."""

import json
import multiprocessing
import os
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from figures import spread
from stories import Stories, make_tokenizer
from story_training import TASKS, VARIANTS, Recipe, train
from story_trials import LENGTHS, try_lengths
from tqdm import tqdm

LEARNED = 0.9  # the share of right answers at the shortest length from which on a training counts as through


@dataclass(frozen=True)
class Settings:
    """Holds what a run is asked for."""

    jobs: str = "passkey;niah_single_1;qa1:both"
    seeds: int = 3
    first: int = 0
    seconds: float = 150.0
    steps: int = 10**9
    trial_seconds: float = 90.0
    tokens: int = 32768
    rate: float = 2e-3
    gate_rate: float = 1e-2
    noise: float = 0.3
    graphs: int = 1
    rows: int = 64
    most: int = 2**20
    processes: int = 7


HELP = {
    "jobs": f"TASK or TASK:VARIANT, with semicolons between them; tasks are {', '.join(TASKS)}; "
    f"variants are {', '.join(name for name in VARIANTS if name)}",
    "seeds": "trainings of each job",
    "first": "seed",
    "seconds": "of a training",
    "steps": "of a training at most",
    "trial_seconds": "in which a model is tried; of longer texts there are fewer, or none",
    "tokens": "of a batch",
    "rate": "largest learning rate",
    "gate_rate": "the same of gates and scores",
    "noise": "standard deviation of what is added to scores of admission in training",
    "graphs": "1 replays steps as CUDA graphs on a GPU, 0 does not",
    "rows": "texts of each length that are tried",
    "most": f"tokens of the longest texts that are tried ({', '.join(map(str, LENGTHS))})",
    "processes": "trainings at a time on each GPU",
}
Job = tuple[str, int, Settings, Path]


def start(devices: "multiprocessing.Queue[int]") -> None:
    """Gives a process its GPU, before anything asks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    torch.set_num_threads(1)


def place_of(job: str, seed: int) -> str:
    """Returns the name of the folder and of the file of a training."""
    return f"{job.replace(':', '-').replace(' ', '_')}-{seed}"


def train_one(given: Job) -> None:
    """Trains and tries one model, and writes to a file of its own what is done so far."""
    job, seed, settings, folder = given
    name, variant = (*job.split(":"), "")[:2]
    task = replace(TASKS[name], fields=TASKS[name].fields | VARIANTS[variant])
    file = folder / f"{place_of(job, seed)}.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(
        seconds=settings.seconds,
        steps=settings.steps,
        tokens=settings.tokens,
        rate=settings.rate,
        gate_rate=settings.gate_rate,
        noise=settings.noise,
        graphs=settings.graphs > 0,
    )
    row: dict[str, Any] = {"job": job, "seed": seed}

    def tell(found: dict[str, Any]) -> None:
        row.update(found)
        written = file.with_suffix(".part")
        written.write_text(json.dumps(row) + "\n")
        written.replace(file)

    try:
        model, log = train(task, Stories(task.texts, seed), recipe, seed, device)
        model.save_pretrained(folder / place_of(job, seed))
        make_tokenizer().save_pretrained(folder / place_of(job, seed))
        tell(
            asdict(log)
            | {"parameters": sum(each.numel() for each in model.parameters()), "config": model.config.to_diff_dict()}
        )
        until = time.perf_counter() + settings.trial_seconds
        try_lengths(model, task.texts, seed, settings.rows, settings.most, until, tell)
        if device == "cuda":
            tell({"peak": torch.cuda.max_memory_allocated()})
    except Exception:
        tell({"error": traceback.format_exc(limit=-4)})


def make_table(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns of each job, mean and standard deviation of the shares of right answers, over all of its trainings."""
    table: dict[str, dict[str, Any]] = {}
    for job in dict.fromkeys(row["job"] for row in rows):
        found = [row for row in rows if row["job"] == job and "error" not in row]
        entry: dict[str, Any] = {"trainings": len(found), "stages": [row.get("stage") for row in found]}
        tried = [row for row in found if row.get("length")]
        if tried:
            lengths = sorted({int(key) for row in tried for key in row["length"]})
            values = {key: [row["length"][str(key)] for row in tried if str(key) in row["length"]] for key in lengths}
            entry["length"] = {key: (*spread(shares), len(shares)) for key, shares in values.items()}
            shares = [next(iter(row["length"].values())) for row in tried]
            entry["through"] = sum(share >= LEARNED for share in shares)
        for kind in ("off", "recall_tasks"):
            if shares := [row[kind] for row in found if kind in row]:
                entry[kind] = spread(shares)
        table[job] = entry
    return table


def collect(settings: Settings, folder: Path, file: Path | None) -> list[dict[str, Any]]:
    """Reads what trainings have written, and writes it as one file."""
    jobs = [(job, seed) for job in settings.jobs.split(";") for seed in seeds_of(settings)]
    files = [folder / f"{place_of(*each)}.json" for each in jobs]
    rows = [json.loads(each.read_text()) for each in files if each.exists()]
    found = {"torch": torch.__version__, "settings": asdict(settings), "trainings": rows}
    found["table"] = make_table(rows)
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")
    return rows


def seeds_of(settings: Settings) -> range:
    """Returns the seeds of a run."""
    return range(settings.first, settings.first + settings.seeds)


def describe(row: dict[str, Any]) -> str:
    """Returns a line on a training."""
    shares = {int(key): round(share, 3) for key, share in row.get("length", {}).items()}
    head = f"{row['job']:<16} seed {row['seed']}  {row.get('steps')} steps  stage {row.get('stage')}"
    more = {kind: row[kind] for kind in ("off", "recall_tasks") if kind in row}
    return f"{head}  {shares}  {more or ''}  {row.get('error', '')}"


def run(settings: Settings, folder: Path, file: Path | None) -> None:
    """Trains and tries all models, and writes what is done so far to the file every few seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    gpus = max(1, torch.cuda.device_count())
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for _ in range(settings.processes):
        for index in range(gpus):
            devices.put(index)
    jobs: list[Job] = [(job, seed, settings, folder) for seed in seeds_of(settings) for job in settings.jobs.split(";")]
    for job, seed, *_ in jobs:
        (folder / f"{place_of(job, seed)}.json").unlink(missing_ok=True)
    begin = time.perf_counter()
    with (
        context.Pool(min(len(jobs), gpus * settings.processes), start, (devices,)) as pool,
        tqdm(total=len(jobs), unit="training", disable=None) as progress,
    ):
        waiting = {(job[0], job[1]): pool.apply_async(train_one, (job,)) for job in jobs}
        while waiting:
            time.sleep(1)
            ended = [each for each, result in waiting.items() if result.ready()]
            rows = {(row["job"], row["seed"]): row for row in collect(settings, folder, file)}
            for each in ended:
                waiting.pop(each).get()
                progress.write(f"{time.perf_counter() - begin:.0f} s  {describe(rows[each])}")
                progress.update()
