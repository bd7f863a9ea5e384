"""Trains and tries text models: a learning rate for each arm by short trainings, then every seed, many at a time."""

import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from arms import Shape, build
from jobs import start
from olmem import OlmemForCausalLM
from recipe import Recipe, train
from text import ARMS, Text, TextRows, make_text
from text_figures import text_table
from text_trials import read_text
from torch import nn
from tqdm import tqdm
from training import TOKENIZER
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

SWEEP_SEED = 1000
TEXT = "text.pt"


@dataclass(frozen=True)
class TextSettings:
    """Holds what a run of trainings is asked for."""

    arms: str = ";".join(ARMS)
    seeds: int = 3
    first: int = 0
    steps: int = 1000
    tokens: int = 16384
    rates: str = "0.0015;0.004"
    sweep: int = 100
    gate_rate: float = 1e-2
    decay: float = 0.1
    repeats: float = 0.125
    windows: float = 0.0
    width: int = 256
    layers: int = 3
    heads: int = 4
    mlp: int = 704
    window: int = 64
    length: int = 1024
    capacity: int = 560
    top_k: int = 32
    retrieval_layers: str = "1"
    memory_tokens: int = 16
    evaluated: int = 2**17
    characters: int = 10**9
    processes: int = 6
    half: int = 1
    graphs: int = 1

    def shape(self, vocabulary: int) -> Shape:
        """Returns the sizes of all models."""
        layers = tuple(int(each) for each in self.retrieval_layers.split(";"))
        return Shape(
            vocabulary, self.width, self.layers, self.heads, self.window, self.length, self.capacity, self.top_k,
            layers, self.memory_tokens, mlp=self.mlp, linear_heads=2,
        )  # fmt: skip


TEXT_SMOKE = TextSettings(
    seeds=1, steps=6, tokens=256, rates="0.002;0.004", sweep=2, width=32, layers=3, heads=4, mlp=64, window=16,
    length=64, capacity=16, top_k=4, retrieval_layers="1", memory_tokens=4, evaluated=1024, characters=200_000,
    processes=1,
)  # fmt: skip
TEXT_HELP = {
    "arms": "that are trained, with semicolons between them",
    "seeds": "trainings of each arm",
    "first": "seed",
    "steps": "of a training",
    "tokens": "of a batch",
    "rates": "learning rates of which each arm takes the best, with semicolons between them; one is taken as it is",
    "sweep": "steps of the short trainings that find it",
    "gate_rate": "largest learning rate of gates and scores",
    "decay": "of matrices",
    "repeats": "share of rows whose last part repeats an earlier one",
    "windows": "share of steps in which windows are drawn at random",
    "width": "of a model",
    "layers": "of a model",
    "heads": "of a layer",
    "mlp": "columns of the MLPs of `window`",
    "window": "tokens of a window beside a store",
    "length": "tokens of a row",
    "capacity": "tokens of a store",
    "top_k": "tokens that a query looks up",
    "retrieval_layers": "layers with a store, with semicolons between them",
    "memory_tokens": "of arms that have some",
    "evaluated": "held-out tokens that a training is tried on",
    "characters": "of text at most",
    "processes": "trainings at a time on each GPU",
    "half": "1 for bfloat16 on a GPU, 0 for float32",
    "graphs": "1 replays steps as CUDA graphs where there is one GPU, 0 does not",
}


@dataclass(frozen=True)
class Job:
    """Holds one training: a short one of a sweep, or one that is tried and kept."""

    arm: str
    seed: int
    rate: float
    settings: TextSettings
    folder: Path
    is_short: bool = False

    @property
    def place(self) -> Path:
        """The folder of the model."""
        name = self.arm.replace(" ", "_")
        return self.folder / (f"sweep/{name}-{self.rate:g}" if self.is_short else f"{name}-{self.seed}")


@cache
def load_text(file: Path) -> Text:
    """Returns the text that was tokenized before the trainings."""
    found = torch.load(file, weights_only=True)
    return Text(**found)


def prepare_text(folder: Path, characters: int) -> Text:
    """Tokenizes the text, and writes it to a folder for all trainings."""
    folder.mkdir(parents=True, exist_ok=True)
    text = make_text(characters)
    found = {name: getattr(text, name).short() for name in ("training", "held_out", "stream")}
    torch.save(found | {"end": text.end, "vocabulary": text.vocabulary}, folder / TEXT)
    return text


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer beside a model."""
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), bos_token=end, eos_token=end, pad_token=end)
    tokenizer.save_pretrained(folder)


def sizes(model: nn.Module) -> tuple[int, int]:
    """Returns a model's window and the capacity of its stores, each 0 without one."""
    config = model.config if isinstance(model, OlmemForCausalLM) else None
    if config is None:
        return 0, 0
    return config.sliding_window or 0, config.retrieval_capacity if config.retrieval_layers else 0


def train_text(job: Job, text: Text, resume: bool = False) -> tuple[nn.Module, list[dict[str, float]]]:
    """Trains a model, saves it in the job's folder, and returns it with what was recorded on the way."""
    settings = job.settings
    steps = settings.sweep if job.is_short else settings.steps
    recipe = Recipe(job.rate, settings.gate_rate, settings.decay, half=settings.half > 0, graphs=settings.graphs > 0)
    set_seed(job.seed)
    model = build(job.arm, settings.shape(text.vocabulary), ARMS)
    if isinstance(model, PreTrainedModel):
        model.config.bos_token_id = model.config.eos_token_id = text.end
    batches = TextRows(
        text, steps, settings.tokens, settings.length, job.seed, settings.repeats, settings.windows, *sizes(model)
    )
    log = train(model, recipe, batches, job.place, job.seed, resume, silent=True)
    if isinstance(model, PreTrainedModel):
        save_tokenizer(job.place)
    return model, log


def run_job(job: Job) -> dict[str, Any]:
    """Trains and tries one model. Of a training that fails, the row has the error."""
    row = {"arm": job.arm, "seed": job.seed, "rate": job.rate, "short": job.is_short}
    try:
        text, begin = load_text(job.folder / TEXT), time.perf_counter()
        model, log = train_text(job, text)
        curve = [[each["step"], each["loss"], each["right"]] for each in log if "right" in each]
        row |= {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "seconds": time.perf_counter() - begin,
            "curve": curve,
            "loss": statistics.fmean(loss for _, loss, _ in curve[-(len(curve) // 4 or 1) :]),
        }
        if not job.is_short:
            begin = time.perf_counter()
            row |= read_text(model, text, job.settings.length, job.settings.evaluated)
            row["seconds_of_trials"] = time.perf_counter() - begin
    except Exception:
        row["error"] = traceback.format_exc(limit=-3)
    return row


def finished(futures: set[Future[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields what is done, and waits for one if nothing is."""
    done, _ = wait(futures, return_when=FIRST_COMPLETED)
    for each in done:
        futures.remove(each)
        yield each.result()


def best_rate(rows: Sequence[dict[str, Any]], arm: str) -> float:
    """Returns the rate whose short training of an arm came to the lowest loss."""
    losses = {row["rate"]: row["loss"] for row in rows if row["short"] and row["arm"] == arm and "loss" in row}
    known = {rate: loss for rate, loss in losses.items() if loss == loss}
    if not known:
        raise RuntimeError(f"no short training of {arm} was done; see `error` of its rows in the JSON")
    return min(known, key=lambda rate: known[rate])


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Starts so many processes on each GPU, or on the CPU."""
    gpus = max(1, torch.cuda.device_count())
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for _ in range(processes):
        for index in range(gpus):
            devices.put(index)
    with ProcessPoolExecutor(gpus * processes, context, start, (devices,)) as pool:
        yield pool


def save(file: Path | None, found: dict[str, Any], rows: Iterable[dict[str, Any]], table: Callable[..., Any]) -> None:
    """Writes everything that was measured so far."""
    if file is not None:
        written = json.loads(json.dumps(found | {"trainings": list(rows)}))  # keys are text, as they are in the file
        written["table"] = table(written["trainings"])
        file.write_text(json.dumps(written, indent=1) + "\n")


def describe(row: dict[str, Any]) -> str:
    """Returns a line about a training."""
    name = f"{row['arm']:<12}seed {row['seed']:<5}rate {row['rate']:<7g}"
    if "error" in row:
        return name + row["error"]
    if row["short"]:
        return f"{name}loss {row['loss']:.4f}  {row['seconds']:.0f} s"
    figures = "  ".join(f"{times}x {each:.3f}" for times, each in row["length"].items())
    seconds = f"{row['seconds']:.0f} + {row['seconds_of_trials']:.0f} s"
    return f"{name}perplexity {figures}  copied {100 * row['copying']['right']:.1f} %  {seconds}"


def run_text(settings: TextSettings, folder: Path, file: Path | None) -> list[dict[str, Any]]:
    """Finds a rate for each arm, trains it with every seed, and writes each as soon as it was tried."""
    begin = time.perf_counter()
    text = prepare_text(folder, settings.characters)
    rates = [float(each) for each in settings.rates.split(";")]
    arms, seeds = settings.arms.split(";"), range(settings.first, settings.first + settings.seeds)
    found = {
        "task": "text",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "settings": asdict(settings),
        "shape": asdict(settings.shape(text.vocabulary)),
        "tokens": {name: len(getattr(text, name)) for name in ("training", "held_out", "stream")},
    }
    print(f"{len(text.training)} tokens train, {len(text.held_out)} are held out", flush=True)
    rows: list[dict[str, Any]] = []
    short = [Job(arm, SWEEP_SEED, rate, settings, folder, True) for arm in reversed(arms) for rate in rates]
    short = short if len(rates) > 1 else []
    with (
        workers(settings.processes) as pool,
        tqdm(total=len(short) + len(arms) * len(seeds), unit="training", disable=None) as progress,
    ):

        def do(jobs: list[Job]) -> None:
            """Writes each training as soon as it is done. Those of the first seed come first, and slow arms."""
            futures = {pool.submit(run_job, job) for job in jobs}
            while futures:
                for row in finished(futures):
                    rows.append(row)
                    progress.write(f"{time.perf_counter() - begin:5.0f} s  {describe(row)}")
                    progress.update()
                    rows.sort(key=lambda row: (not row["short"], arms.index(row["arm"]), row["seed"], row["rate"]))
                    save(file, found | {"seconds": time.perf_counter() - begin}, rows, text_table)

        do(short)
        best = {arm: best_rate(rows, arm) if short else rates[0] for arm in arms}
        do([Job(arm, seed, best[arm], settings, folder) for seed in seeds for arm in reversed(arms)])
    return rows
