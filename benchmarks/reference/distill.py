"""Puts a store beside a trained model of full attention, under a window, and lets it learn from that model.

The student has the weights of the model, windows with 4 sinks, and a store that selects. Only what is new is trained,
the scores and the gates of the store, so that the student's predictions come close to those of full attention. Windows
are drawn at random. Compared are full attention, windows with and without sinks, and the store before and after.

The same models show what StreamingLLM found: read as one long stream under a window, a model that was trained with full
attention fails as soon as the first tokens have left the window, and does not with 4 sinks. Beside the streams stand
the losses of full attention on the same tokens, in rows of the length that it was trained on.
"""

import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captured import Tensors
from olmem import OlmemForCausalLM
from recipe import SLOW_TO_MOVE, Recipe, RecipeTrainer, predict, train
from text import STREAMED, Text, TextRows, begun
from text_figures import distill_table
from text_jobs import TEXT, finished, load_text, save, save_tokenizer, sizes, workers
from text_trials import copying, cut, octaves, perplexity, read_stream, row_losses
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm
from transformers import set_seed


@dataclass(frozen=True)
class DistillSettings:
    """Holds what is distilled, and what is read as a stream."""

    seeds: int = 3
    steps: int = 200
    tokens: int = 16384
    length: int = 1024
    gate_rate: float = 2e-2
    gate_init: float = -2.0
    windows: float = 0.5
    repeats: float = 0.125
    window: int = 128
    sinks: int = 4
    capacity: int = 512
    top_k: int = 32
    stores: str = "1|0;1;2"
    streamed: int = STREAMED
    streaming_windows: str = "128;1024"
    bounded: str = "window;sinks;memory;selected;all"
    evaluated: int = 2**17
    processes: int = 6
    half: int = 1
    graphs: int = 1


DISTILL_SMOKE = DistillSettings(
    seeds=1, steps=3, tokens=256, length=64, window=16, capacity=16, top_k=4, stores="1", streamed=1024,
    streaming_windows="16", bounded="selected", evaluated=1024, processes=1,
)  # fmt: skip
DISTILL_HELP = {
    "seeds": "models of full attention in the folder, from 0 on",
    "steps": "of a distillation",
    "tokens": "of a batch",
    "length": "tokens of a row, as in the training of the models",
    "gate_rate": "largest learning rate of gates and scores",
    "gate_init": "logit of the gates at first",
    "windows": "share of steps in which windows are drawn at random",
    "repeats": "share of rows whose last part repeats an earlier one",
    "window": "tokens of a window",
    "sinks": "first tokens that stay",
    "capacity": "tokens of a store",
    "top_k": "tokens that a query looks up",
    "stores": "layers that get a store, with semicolons between them; bars are between several choices",
    "streamed": "tokens of one stream at most",
    "streaming_windows": "windows of these streams, with semicolons between them",
    "bounded": "arms in the folder that read the same stream, with semicolons between them",
    "evaluated": "held-out tokens that other figures are of",
    "processes": "at a time on each GPU",
    "half": "1 for bfloat16 on a GPU, 0 for float32",
    "graphs": "1 replays steps as CUDA graphs where there is one GPU, 0 does not",
}


@dataclass(frozen=True)
class DistillJob:
    """Holds one distillation (`store`), or one stream: of full attention under a window, or of an arm."""

    kind: str
    seed: int
    settings: DistillSettings
    folder: Path
    store: tuple[int, ...] = ()
    window: int = 0
    sinks: int = 0
    arm: str = "full"

    @property
    def place(self) -> Path:
        """The folder of the model that is begun with."""
        return self.folder / f"{self.arm.replace(' ', '_')}-{self.seed}"


class Distillation(RecipeTrainer):
    """Trains a student on what a teacher predicts: the Kullback-Leibler divergence of its predictions."""

    def __init__(self, teacher: nn.Module, *given: Any):
        super().__init__(*given)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def measure(self, model: nn.Module, ids: torch.Tensor, asked: torch.Tensor | None = None) -> Tensors:
        """Returns the divergence, and the share of tokens that both think likeliest."""
        with torch.no_grad():
            expected, _ = predict(self.teacher, ids, asked)
        logits, _ = predict(model, ids, asked)
        predicted, wanted = (log_softmax(each.flatten(0, 1).float(), dim=-1) for each in (logits, expected))
        loss = kl_div(predicted, wanted, reduction="batchmean", log_target=True)
        return loss, (logits.detach().argmax(-1) == expected.argmax(-1)).float().mean()


def load(place: Path, **changes: Any) -> OlmemForCausalLM:
    """Loads a model with other fields, where there is a GPU onto it."""
    model = OlmemForCausalLM.from_pretrained(place, dtype=torch.float32, **changes)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # pyright: ignore[reportArgumentType]


def under_window(window: int, sinks: int) -> dict[str, Any]:
    """Returns the fields of a window with sinks in every layer."""
    return {"layer_types": "sliding_attention", "sliding_window": window, "num_sink_tokens": sinks}


def with_store(settings: DistillSettings, layers: tuple[int, ...]) -> dict[str, Any]:
    """Returns the fields of a store that selects, under a window."""
    return under_window(settings.window, settings.sinks) | {
        "retrieval_layers": list(layers),
        "retrieval_admission": "learned",
        "retrieval_top_k": settings.top_k,
        "retrieval_capacity": settings.capacity,
        "retrieval_gate_init": settings.gate_init,
    }


def figures(model: OlmemForCausalLM, text: Text, settings: DistillSettings) -> dict[str, Any]:
    """Returns a model's perplexity at the trained length, by place, and what it copies from afar."""
    ids = text.held_out[: settings.evaluated].long().to(model.device)
    losses = row_losses(model, cut(ids, settings.length, text.end))
    return {
        "perplexity": perplexity(losses),
        "places": [mean for _, mean in octaves(losses, max(1, settings.length // 64))],
        "copying": copying(model, ids, settings.length, text.end),
    }


def gates(model: OlmemForCausalLM) -> dict[str, list[float]]:
    """Returns the share of each head that is looked up."""
    found = {name: weight for name, weight in model.named_parameters() if "retrieval_gate" in name}
    return {name: weight.sigmoid().tolist() for name, weight in found.items()}


def distill(job: DistillJob, text: Text) -> dict[str, Any]:
    """Compares full attention, windows, and a store before and after it has learned, and saves the last."""
    settings = job.settings
    teacher = load(job.place)
    found = {"full": figures(teacher, text, settings)}
    for name, sinks in (("window", 0), ("sinks", settings.sinks)):
        found[name] = figures(load(job.place, **under_window(settings.window, sinks)), text, settings)
    set_seed(job.seed)
    student = load(job.place, **with_store(settings, job.store))
    found["untrained"] = figures(student, text, settings)
    for name, weight in student.named_parameters():
        weight.requires_grad_(any(part in name for part in SLOW_TO_MOVE))
    recipe = Recipe(settings.gate_rate, settings.gate_rate, half=settings.half > 0, graphs=settings.graphs > 0)
    batches = TextRows(
        text, settings.steps, settings.tokens, settings.length, job.seed, settings.repeats, settings.windows,
        *sizes(student), curriculum=False,
    )  # fmt: skip
    place = job.folder / f"distilled-{'-'.join(map(str, job.store))}-{job.seed}"
    begin = time.perf_counter()
    log = train(student, recipe, batches, place, job.seed, silent=True, make=partial(Distillation, teacher))
    seconds = time.perf_counter() - begin
    save_tokenizer(place)
    found["distilled"] = figures(student.eval(), text, settings)
    return {
        "figures": found,
        "seconds": seconds,
        "curve": [[each["step"], each["loss"], each["right"]] for each in log if "right" in each],
        "trained": sum(weight.numel() for weight in student.parameters() if weight.requires_grad),
        "gates": gates(student),
    }


def stream(job: DistillJob, text: Text) -> dict[str, Any]:
    """Reads the text of a stream as one, under a window for a model of full attention, else as the model is."""
    settings = job.settings
    model = load(job.place, **under_window(job.window, job.sinks) if job.window else {})
    ids = text.stream[: settings.streamed].long().to(model.device)[None]
    begin = time.perf_counter()
    with torch.no_grad():
        found = read_stream(model, begun(ids, text.end), settings.length)
    found["microseconds"] = 1e6 * (time.perf_counter() - begin) / ids.shape[1]
    return {"stream": found}


def rows_of_stream(job: DistillJob, text: Text) -> dict[str, Any]:
    """Reads the same tokens in rows of the trained length, each afresh."""
    model, settings = load(job.place), job.settings
    ids = text.stream[: settings.streamed].long().to(model.device)
    losses = row_losses(model, cut(ids, settings.length, text.end)).flatten()[None]
    return {"stream": {
        "tokens": losses.shape[1], "perplexity": perplexity(losses), "octaves": octaves(losses, settings.length),
    }}  # fmt: skip


KINDS = {"store": distill, "stream": stream, "rows": rows_of_stream}


def run_one(index: int, job: DistillJob) -> dict[str, Any]:
    """Does the job of a number. Of one that fails, the row has the error."""
    row = {"job": index, "kind": job.kind, "arm": job.arm, "seed": job.seed, "window": job.window, "sinks": job.sinks}
    row["store"] = list(job.store)
    try:
        return row | KINDS[job.kind](job, load_text(job.folder / TEXT))
    except Exception:
        return row | {"error": traceback.format_exc(limit=-3)}


def describe(row: dict[str, Any]) -> str:
    """Returns a line about a row."""
    name = f"{row['kind']:<7}{row['arm']:<10}seed {row['seed']}  "
    if "error" in row:
        return name + row["error"]
    if row["kind"] == "store":
        parts = [
            f"{key} {each['perplexity']:.3f} ({100 * each['copying']['right']:.1f} %)"
            for key, each in row["figures"].items()
        ]
        return f"{name}{row['store']}  " + "  ".join(parts) + f"  {row['seconds']:.0f} s"
    kind = f"window {row['window']}, {row['sinks']} sinks  " if row["window"] else ""
    return f"{name}{kind}perplexity {row['stream']['perplexity']:.3f} of {row['stream']['tokens']} tokens"


def run_distill(settings: DistillSettings, folder: Path, file: Path | None) -> list[dict[str, Any]]:
    """Distils and streams the models of a folder of `text`, and writes each row as soon as it is there."""
    text, begin = load_text(folder / TEXT), time.perf_counter()
    seeds = range(settings.seeds)
    jobs = [
        DistillJob("store", seed, settings, folder, tuple(int(each) for each in store.split(";")))
        for store in settings.stores.split("|")
        for seed in seeds
    ]
    for seed in seeds:
        jobs += [DistillJob("stream", seed, settings, folder, arm=arm) for arm in settings.bounded.split(";") if arm]
        jobs.append(DistillJob("rows", seed, settings, folder))
        jobs += [
            DistillJob("stream", seed, settings, folder, window=int(window) - sinks, sinks=sinks)
            for window in settings.streaming_windows.split(";")
            for sinks in (0, settings.sinks)
        ]
    found = {
        "task": "distill",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "settings": asdict(settings),
        "tokens": {name: len(getattr(text, name)) for name in ("training", "held_out", "stream")},
    }
    rows: list[dict[str, Any]] = []
    with workers(settings.processes) as pool, tqdm(total=len(jobs), unit="job", disable=None) as progress:
        futures = {pool.submit(run_one, index, job) for index, job in enumerate(jobs)}
        while futures:
            for row in finished(futures):
                rows.append(row)
                rows.sort(key=lambda row: row["job"])
                progress.write(f"{time.perf_counter() - begin:5.0f} s  {describe(row)}")
                progress.update()
                save(file, found | {"seconds": time.perf_counter() - begin}, rows, distill_table)
    return rows
