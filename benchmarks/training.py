"""What projections.py and positions.py share: text, packing, schedule, training, and how many steps a budget allows.

Text is the sources of Python's standard library, its tests too where they are installed, in the order of a hash of
their paths, tokenized by the demo's tokenizer: whole files, the first that fit into a twentieth of the text, validate;
all others train. Documents are packed: an end-of-text token after each, windows cut from that one stream, so that every
token of a row is text and counts in the loss; attention does not stop at a document's end. Each epoch cuts and shuffles
anew. A seed decides the initial weights and the order of the data, which so is the same for every variant.

Models are OLMo-2 blocks with full attention everywhere, RoPE's theta 10000 where there is RoPE. AdamW (0.9, 0.95;
decay 0.1 of matrices), gradients clipped to norm 1, one learning rate for all, warmed up over a tenth of the steps and
then falling to zero in a straight line; float32 weights under bfloat16 autocast.

All variants take the same number of steps: as many as `--minutes` allows by the time of a few steps and an evaluation
of each, measured first. `--smoke` is the same in little, a minute on a CPU; its figures mean nothing.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

TOKENIZER = Path(__file__).parents[1] / "model_cards/demo/native/tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
VALIDATION = 0.05  # of the text
WARM_UP = 0.1  # of the steps
WARM_CALLS, TIMED_CALLS = 3, 10  # steps before and in the measurement of their time
MARGIN = 0.95  # of the time that is left once everything was measured


@dataclass(frozen=True)
class Settings:
    """Of a run of either benchmark."""

    minutes: float = 9.0
    seeds: int = 3
    steps: int = 0
    layers: int = 6
    width: int = 512
    heads: int = 16
    length: int = 512
    batch: int = 32
    rate: float = 2e-3
    characters: int = 1_000_000_000
    threads: int = 0


SMOKE = Settings(minutes=0.7, seeds=1, layers=4, width=64, length=64, batch=4, characters=300_000, threads=1)
HELP = {
    "minutes": "for everything but the imports",
    "seeds": "trainings of each variant",
    "steps": "of each training; 0 is as many as the minutes allow",
    "length": "trained length in tokens",
    "batch": "rows of a batch",
    "rate": "largest learning rate",
    "characters": "of text at most",
    "threads": "fewer than there are cores, where others compute too",
}


def parse(description: str, arguments: Sequence[str] | None = None) -> tuple[Settings, Path | None]:
    """The settings and where the JSON goes."""
    parser = argparse.ArgumentParser(
        description=description.replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Settings):
        text = f"{HELP.get(field.name, '')} ({field.default}; smoke {getattr(SMOKE, field.name)})".strip()
        parser.add_argument(f"--{field.name}", type=type(field.default), help=text)
    parser.add_argument("--smoke", action="store_true", help="the same in little, on a CPU in a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    given = vars(parser.parse_args(arguments))
    smoke, file = given.pop("smoke"), given.pop("json")
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = replace(SMOKE if smoke else Settings(), **chosen)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return settings, file


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Text


@dataclass
class Text:
    """Streams of token ids (N,) on the device that trains."""

    training: torch.Tensor
    validation: torch.Tensor


def documents(limit: int, root: Path | None = None) -> Iterator[str]:
    """A folder's sources, in the order of a hash of their paths, until they are that many characters.

    Args:
        root: the folder; by default the standard library.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        paths += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # tests hold files in other encodings
            continue
        if not text:
            continue
        if limit <= 0:
            return
        limit -= len(text)
        yield text


def pack(encoded: Sequence[Sequence[int]], end: int) -> torch.Tensor:
    """Documents as one stream (N,), an `end` after each."""
    return torch.tensor([token for ids in encoded for token in (*ids, end)], dtype=torch.long)


def split_documents(
    encoded: Sequence[list[int]], share: float, largest: float = 1.0
) -> tuple[list[list[int]], list[list[int]]]:
    """The documents that train, and those that validate: the first that fit into that share of the text.

    Args:
        largest: the most of that share that one document may take.
    """
    room, training, validation = share * sum(map(len, encoded)), [], []
    most = largest * room
    for ids in encoded:
        fits = len(ids) <= min(room, most)
        (validation if fits else training).append(ids)
        room -= len(ids) if fits else 0
    return training, validation


def load_text(settings: Settings, device: torch.device) -> Text:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    end = tokenizer.encode(END_OF_TEXT).ids[0]
    texts = list(documents(settings.characters))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    training, validation = split_documents(encoded, VALIDATION)
    text = Text(pack(training, end), pack(validation, end))
    if len(text.training) < (settings.batch + 1) * settings.length or len(text.validation) <= 4 * settings.length:
        raise SystemExit(f"{len(text.training)} training and {len(text.validation)} validation tokens are too few")
    return Text(text.training.to(device), text.validation.to(device))


def announce(text: Text, settings: Settings) -> None:
    print(
        f"{describe(text.training.device)}, torch {torch.__version__}: {settings.layers} layers of width "
        f"{settings.width}, {settings.heads} heads; {len(text.training)} tokens train, {len(text.validation)} validate",
        flush=True,
    )


def windows(ids: torch.Tensor, length: int) -> torch.Tensor:
    """A stream (N,) as rows (R, length + 1): `length` tokens and, one further, those that follow them."""
    return ids.unfold(0, length + 1, length)


def batches(ids: torch.Tensor, length: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows (batch, length + 1) without end, in an order that is the seed's alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        rows = windows(ids[offset:], length)
        order = torch.randperm(len(rows), generator=generator).to(ids.device)
        for chosen in order[: len(order) // batch * batch].split(batch):
            yield rows[chosen]


# Training


def make_config(settings: Settings, **choices) -> OlmemConfig:
    options: dict[str, Any] = {
        "vocab_size": Tokenizer.from_file(str(TOKENIZER)).get_vocab_size(),
        "hidden_size": settings.width,
        "intermediate_size": -(-8 * settings.width // (3 * 64)) * 64,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.length,
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_types": "full_attention",
    }
    return OlmemConfig(**options | choices)


def token_losses(model: OlmemForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Nats (R, T) of each token of rows (R, T + 1) but the first."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1)


@torch.no_grad()
def evaluate(model: OlmemForCausalLM, ids: torch.Tensor, length: int, tokens: int) -> torch.Tensor:
    """Mean nats (length,) at each place of the windows of a stream (N,), about that many tokens a call."""
    model.eval()
    rows = windows(ids, length)
    total = torch.zeros(length, dtype=torch.double, device=ids.device)
    for some in rows.split(max(1, tokens // length)):
        total += token_losses(model, some).double().sum(0)
    return total.cpu() / len(rows)


class Training:
    """One model on its way through `steps` batches."""

    def __init__(self, config: OlmemConfig, text: Text, settings: Settings, steps: int, seed: int):
        self.settings, self.steps, self.step_number = settings, steps, 0
        self.batches = batches(text.training, settings.length, settings.batch, seed)
        torch.manual_seed(seed)
        self.model = OlmemForCausalLM(config)
        self.model.to(text.training.device).train()  # pyright: ignore[reportArgumentType]  Transformers wraps `to`
        parameters = list(self.model.parameters())
        groups = [
            {"params": [weight for weight in parameters if weight.dim() > 1], "weight_decay": 0.1},
            {"params": [weight for weight in parameters if weight.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)

    @property
    def rate(self) -> float:
        warm_up = max(1, round(WARM_UP * self.steps))
        rise, fall = (self.step_number + 1) / warm_up, (self.steps - self.step_number) / max(1, self.steps - warm_up)
        return self.settings.rate * max(0.0, min(rise, fall, 1.0))

    def step(self) -> torch.Tensor:
        """The loss, not waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        loss = token_losses(self.model, next(self.batches)).mean()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return loss.detach()


Evaluate = Callable[[OlmemForCausalLM], dict[str, float]]


def rehearse(config: OlmemConfig, text: Text, settings: Settings, assess: Evaluate) -> tuple[float, float]:
    """Seconds of a step, and of what a training takes beside its steps."""
    device, start = text.training.device, time.perf_counter()
    training = Training(config, text, settings, steps=WARM_CALLS + TIMED_CALLS, seed=0)
    beside = time.perf_counter() - start
    for _ in range(WARM_CALLS):
        training.step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED_CALLS):
        training.step()
    synchronize(device)
    step = (time.perf_counter() - start) / TIMED_CALLS
    start = time.perf_counter()
    assess(training.model)
    return step, beside + time.perf_counter() - start


def affordable_steps(
    variants: dict[str, OlmemConfig], text: Text, settings: Settings, assess: Evaluate, started: float
) -> int:
    """Of each training, for all of them to end `settings.minutes` after the start."""
    times = [rehearse(config, text, settings, assess) for config in variants.values()]
    left = MARGIN * (60 * settings.minutes - (time.perf_counter() - started)) / settings.seeds
    steps = int((left - sum(beside for _, beside in times)) / sum(step for step, _ in times))
    if steps < 1:
        raise SystemExit(f"{settings.minutes:g} minutes are not enough here for a step of each training")
    return steps


def experiment(
    variants: dict[str, OlmemConfig], text: Text, settings: Settings, assess: Evaluate, started: float
) -> list[dict]:
    """Trains every variant with every seed, and says what `assess` found as it goes: a row for each training, losses
    in nats a token; that of training over the last tenth of the steps."""
    steps = settings.steps or affordable_steps(variants, text, settings, assess, started)
    tokens = steps * settings.batch * settings.length
    print(
        f"{len(variants)} variants × {settings.seeds} seeds: {steps} steps of {settings.batch} × {settings.length} "
        f"tokens, {tokens / len(text.training):.2f} epochs; learning rate {settings.rate:g}\n",
        flush=True,
    )
    rows, width = [], max(map(len, variants))
    # On a person's screen only.
    with tqdm(total=steps * len(variants) * settings.seeds, unit="step", leave=False, disable=None) as progress:
        for seed in range(settings.seeds):
            for name, config in variants.items():
                start = time.perf_counter()
                training = Training(config, text, settings, steps, seed)
                losses = []
                for _ in range(steps):
                    losses.append(training.step())
                    progress.update()
                row = {"variant": name, "seed": seed, "steps": steps}
                row["training"] = float(torch.stack(losses[-max(1, steps // 10) :]).mean())
                row |= assess(training.model) | {"seconds": time.perf_counter() - start}
                rows.append(row)
                found = {key: value for key, value in row.items() if isinstance(value, float)}
                figures = "  ".join(f"{key} {value:.5g}" for key, value in found.items())
                progress.write(f"{name:<{width}}  seed {seed}  {figures}")
                sys.stdout.flush()
    return rows


# Figures


def perplexity(loss: torch.Tensor) -> float:
    """Not a number, or infinite, of a training that diverged."""
    return float(loss.double().mean().exp())


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of the seeds' figures; of one seed there is no deviation."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        mean, count = sum(values) / len(values), len(values)
        if count == 1:
            return cls(mean, None, count)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)), count)

    @property
    def error(self) -> float | None:
        """The mean's standard error."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)

    def text(self, form: str, deviation_form: str) -> str:
        return f"{self.mean:{form}} ± " + ("–" if self.deviation is None else f"{self.deviation:{deviation_form}}")


def paired_change(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Percent by which figures exceed those of the same seeds."""
    return Spread.of([100 * (value / other - 1) for value, other in zip(values, base, strict=True)])


def save(file: Path | None, settings: Settings, device: torch.device, rows: list[dict], table: dict) -> None:
    if file is not None:
        found = {"device": describe(device), "torch": torch.__version__, "settings": asdict(settings)}
        file.write_text(json.dumps(found | {"trainings": rows, "table": table}, indent=2) + "\n")
