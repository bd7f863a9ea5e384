"""Trains and tries many models at a time, each in a process that has one GPU."""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Shape, build
from figures import make_table
from olmem import OlmemForCausalLM
from pairs import ASKED, VOCABULARY, PairTexts
from recipe import Recipe, train
from torch import nn
from tqdm import tqdm
from trials import TIMES, progress, recall

SHAPE = Shape(VOCABULARY)
RATES = (5e-4, 1e-3, 2e-3)  # of a sweep
SWEEP_SEED = 1000  # so that rates are not chosen by the texts of a trial


@dataclass(frozen=True)
class Settings:
    """Holds what a run of trainings is asked for."""

    arms: str = ";".join(ARMS)
    seeds: int = 5
    first: int = 0
    steps: int = 2200
    tokens: int = 16384
    rate: float = 2e-3
    gate_rate: float = 1e-2
    noise: float = 1.0
    patience: float = 0.1
    half: int = 1
    graphs: int = 1
    processes: int = 4
    most: int = TIMES[-1]
    rows: int = 8
    resume: int = 0


HELP = {
    "arms": "that are trained, with semicolons between them",
    "seeds": "trainings of each arm",
    "first": "seed",
    "steps": "of a training",
    "tokens": "of a batch",
    "rate": "largest learning rate, where no file has one of the arm",
    "gate_rate": "the same of gates and scores",
    "noise": "standard deviation of what is added to written memory in training",
    "patience": "share of the steps after which a stage ends, whatever is answered",
    "half": "1 for bfloat16 on a GPU, 0 for float32",
    "graphs": "1 replays steps as CUDA graphs where there is one GPU, 0 does not",
    "processes": "trainings at a time on each GPU",
    "most": "times the trained length that are tried",
    "resume": "1 goes on from the checkpoints in the folder, where there are some",
    "rows": f"texts of a trial, of {ASKED} questions each, and a quarter of it of the longest texts",
}


@dataclass(frozen=True)
class Job:
    """Holds one training: an arm and a seed, and whether it is a short one of a sweep."""

    arm: str
    seed: int
    settings: Settings
    folder: Path
    sweep: bool = False


def start(devices: "multiprocessing.Queue[int]") -> None:
    """Gives a process its GPU, before anything asks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    torch.set_num_threads(1)


def do(job: Job) -> dict[str, Any]:
    """Trains and tries one arm. Of a training that fails, the row has the error."""
    row = {"arm": job.arm, "seed": job.seed, "rate": job.settings.rate}
    try:
        return row | train_one(job)
    except Exception:
        return row | {"error": traceback.format_exc(limit=-3)}


def train_one(job: Job) -> dict[str, Any]:
    """Trains and tries one arm."""
    settings, arm = job.settings, ARMS[job.arm]
    recipe = Recipe(
        settings.rate,
        settings.gate_rate,
        memory_noise=settings.noise,
        half=settings.half > 0,
        graphs=settings.graphs > 0,
    )
    torch.manual_seed(job.seed)
    model: nn.Module = build(job.arm, SHAPE)
    capacity = model.config.retrieval_capacity if arm.has_store and isinstance(model, OlmemForCausalLM) else 0
    texts = PairTexts(settings.steps, settings.tokens, job.seed, capacity)
    place = job.folder / f"{job.arm.replace(', ', '_')}-{job.seed}"
    begin = time.perf_counter()
    resume = settings.resume > 0 and any(place.glob("checkpoint-*"))
    patience = int(settings.patience * settings.steps)
    log = train(model, recipe, texts, place, job.seed, resume, silent=True, patience=patience)
    row: dict[str, Any] = {"seconds": time.perf_counter() - begin, "begins": texts.begins}
    row["parameters"] = sum(weight.numel() for weight in model.parameters())
    row["curve"] = [[each["step"], each["loss"], each["right"]] for each in log if "right" in each]
    device = str(next(model.parameters()).device)
    if job.sweep:
        return row | {"right": progress(model, job.seed, device)}
    return row | recall(model, SHAPE, job.seed, min(arm.most, settings.most), settings.rows, device)


def work(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Does jobs at the same time, so many on each GPU, and yields the row of each that is done.

    Errors: ValueError for an arm that does not exist, and SystemExit at the end if trainings have failed.
    """
    for job in jobs:
        if job.arm not in ARMS:
            raise ValueError(f"an arm must be one of {'; '.join(ARMS)} (got {job.arm!r}); choose some of them")
    gpus = max(1, torch.cuda.device_count())
    context = multiprocessing.get_context("spawn")
    devices, failed = context.Queue(), 0
    for _ in range(processes):
        for index in range(gpus):
            devices.put(index)
    with (
        context.Pool(gpus * processes, start, (devices,)) as pool,
        tqdm(total=len(jobs), unit="training", disable=None) as bar,
    ):
        for row in pool.imap_unordered(do, jobs):
            found = row.get("error") or row.get("length") or row.get("right")
            bar.write(f"{row['arm']:<22}seed {row['seed']}  rate {row['rate']:g}  {found}  {row.get('pairs', '')}")
            bar.update()
            failed += "error" in row
            yield row
    if failed:
        raise SystemExit(f"{failed} of {len(jobs)} trainings failed; their errors are above and in the file")


def save(file: Path | None, settings: Settings, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Writes what is done so far."""
    if file is not None:
        found = {"torch": torch.__version__, "settings": asdict(settings), "shape": asdict(SHAPE)}
        file.write_text(json.dumps(found | {"trainings": rows} | more, indent=1) + "\n")


def run(settings: Settings, folder: Path, file: Path | None, rates: dict[str, float]) -> None:
    """Trains every arm with every seed, and writes each to the file as soon as it was tried."""
    jobs = [
        Job(arm, seed, replace(settings, rate=rates.get(arm, settings.rate)), folder)
        for seed in range(settings.first, settings.first + settings.seeds)
        for arm in settings.arms.split(";")
    ]
    rows: list[dict[str, Any]] = []
    for row in work(jobs, settings.processes):
        rows.append(json.loads(json.dumps(row)))  # keys are text, as they are in the file
        save(file, settings, rows, {"table": make_table(rows)})


def sweep(settings: Settings, folder: Path, file: Path | None) -> dict[str, float]:
    """Trains every arm with every rate for a while, and returns the rate of each with which it gets farthest."""
    jobs = [
        Job(arm, SWEEP_SEED, replace(settings, rate=rate), folder / f"{rate:g}", sweep=True)
        for arm in settings.arms.split(";")
        for rate in RATES
    ]
    rows: list[dict[str, Any]] = []
    best: dict[str, float] = {}
    for row in work(jobs, settings.processes):
        rows.append(row)
        tried = [row for row in rows if "right" in row]
        best = {
            arm: max((row["right"], row["rate"]) for row in tried if row["arm"] == arm)[1]
            for arm in dict.fromkeys(row["arm"] for row in tried)
        }
        save(file, settings, rows, {"rates": best})
    return best
