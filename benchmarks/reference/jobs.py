"""Trains and tries many models at a time, each in a process that has one GPU."""

import json
import multiprocessing
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Shape, build
from figures import make_table
from pairs import VOCABULARY, PairTexts
from recipe import Recipe, train
from tqdm import tqdm
from trials import TIMES, recall

SHAPE = Shape(VOCABULARY)


@dataclass(frozen=True)
class Settings:
    """Holds what a run of trainings is asked for."""

    arms: str = ";".join(ARMS)
    seeds: int = 5
    first: int = 0
    steps: int = 1500
    tokens: int = 16384
    rate: float = 2e-3
    gate_rate: float = 1e-2
    noise: float = 0.0
    patience: float = 0.15
    half: int = 1
    graphs: int = 1
    processes: int = 4
    most: int = TIMES[-1]


HELP = {
    "arms": "that are trained, with semicolons between them",
    "seeds": "trainings of each arm",
    "first": "seed",
    "steps": "of a training",
    "tokens": "of a batch",
    "rate": "largest learning rate",
    "gate_rate": "the same of gates and scores",
    "noise": "standard deviation of what is added to scores of admission in training",
    "patience": "share of the steps after which a stage ends, whatever is answered",
    "graphs": "1 replays steps as CUDA graphs",
    "half": "1 for bfloat16 on a GPU, 0 for float32",
    "processes": "trainings at a time on each GPU",
    "most": "times the trained length that are tried",
}


def start(devices: "multiprocessing.Queue[int]") -> None:
    """Gives a process its GPU, before anything asks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    torch.set_num_threads(1)


def train_one(job: tuple[str, int, Settings, Path]) -> dict[str, Any]:
    """Trains and tries one arm. Of a training that fails, the row has the error."""
    arm, seed, settings, folder = job
    recipe = Recipe(
        settings.rate, settings.gate_rate, noise=settings.noise, half=settings.half > 0, graphs=settings.graphs > 0
    )
    remembers = ARMS[arm].remembers
    texts = PairTexts(settings.steps, settings.tokens, seed, SHAPE.capacity * remembers, remembers > 0)
    begin = time.perf_counter()
    try:
        torch.manual_seed(seed)
        model = build(arm, SHAPE)
        place = folder / f"{arm.replace(', ', '_')}-{seed}"
        log = train(model, recipe, texts, place, seed, silent=True, patience=int(settings.patience * settings.steps))
        seconds = time.perf_counter() - begin
        found = recall(model, SHAPE, seed, settings.most, str(next(model.parameters()).device))
    except Exception:
        return {"arm": arm, "seed": seed, "error": traceback.format_exc(limit=-3)}
    return {
        "arm": arm,
        "seed": seed,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": seconds,
        "begins": texts.begins,
        "curve": [[each["step"], each["loss"], each["right"]] for each in log if "right" in each],
        **found,
    }


def run(settings: Settings, folder: Path, file: Path | None) -> None:
    """Trains every arm with every seed, and writes each to the file as soon as it was tried."""
    gpus = max(1, torch.cuda.device_count())
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for _ in range(settings.processes):
        for index in range(gpus):
            devices.put(index)
    seeds = range(settings.first, settings.first + settings.seeds)
    jobs = [(arm, seed, settings, folder) for seed in seeds for arm in settings.arms.split(";")]
    rows: list[dict[str, Any]] = []
    with (
        context.Pool(gpus * settings.processes, start, (devices,)) as pool,
        tqdm(total=len(jobs), unit="training", disable=None) as progress,
    ):
        for row in pool.imap_unordered(train_one, jobs):
            rows.append(row)
            shares = row.get("length") or row["error"]
            progress.write(f"{row['arm']:<22}seed {row['seed']}  {shares}  {row.get('pairs', '')}")
            progress.update()
            if file is not None:
                found = {"torch": torch.__version__, "settings": asdict(settings), "shape": asdict(SHAPE)}
                written = json.loads(json.dumps(found | {"trainings": rows}))  # keys are text, as they are in the file
                written["table"] = make_table(written["trainings"])
                file.write_text(json.dumps(written, indent=1) + "\n")
