"""Trains a model to keep what a text tells: a curriculum that goes on by accuracy, from texts of one sentence on.

- The first texts are so short, and their windows so small, that what is asked for has just left the window.
- A stage is left when 90 of 100 questions of the longest texts are answered, never by the clock.
- Half of the steps have texts of the longest stage, the others of any stage up to it.
- The first stories tell of each person once, and have one question: of several a model guesses the first, and answers
  the others by the places that are left, which keeps it from learning whose place it is.
- Windows of each step are drawn, and stores are small, so that a model must select.
- Noise is added to the scores of admission.
- The weights that are kept are the last of those that answered the most of the longest texts. A training may lose what
  it has learned.
- On a GPU a step is replayed as a CUDA graph.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from captured import Passes, Tensors
from olmem import OlmemConfig, OlmemForCausalLM
from recipe import SLOW_TO_MOVE
from stories import Stories, make_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

ENOUGH = 0.9  # the share of right answers from which on a stage is left
RECENT = 10  # steps of the longest stage over which it is counted
CHECKED = 10  # steps between two looks at what is answered


@dataclass(frozen=True)
class Stage:
    """Holds what texts of a stage are like.

    Args:
        length: of a text in tokens.
        windows: of which one is drawn for each step.
        sentences: of a story.
        gaps: numbers of sentences of filler between two of a story.
        asked: the tasks of the questions.
        capacity: of a store.
        again: whether what is told of a person may be followed by more.
    """

    length: int
    windows: tuple[int, int]
    sentences: int = 1
    gaps: tuple[int, ...] = (0,)
    asked: tuple[str, ...] = ()
    capacity: int = 32
    again: bool = True


@dataclass(frozen=True)
class Task:
    """Holds what a model is trained for.

    Args:
        texts: one of `stories.SENTENCES`.
        stages: of the curriculum.
        fields: of the model's configuration, which are its own.
    """

    texts: str
    stages: tuple[Stage, ...]
    fields: dict[str, Any] = field(default_factory=dict)


NUMBERS = (
    Stage(64, (12, 16)),
    Stage(96, (18, 24)),
    Stage(256, (24, 32)),
    Stage(1024, (24, 32)),
    Stage(4096, (24, 32)),
)
SOME, ALL = (0, 0, 1), (0, 0, 1, 2)
TASKS = {
    "passkey": Task("passkey", NUMBERS),
    "niah_single_1": Task("niah_single_1", (replace(NUMBERS[0], length=96), *NUMBERS[1:])),
    "qa1": Task(
        "qa1",
        (
            Stage(36, (12, 36), 3, asked=("qa1",), again=False),
            Stage(44, (12, 24), 4, asked=("qa1",), again=False),
            Stage(44, (16, 24), 3, asked=("qa1",)),
            Stage(68, (24, 32), 4, asked=("qa1",) * 2),
            Stage(112, (36, 48), 4, asked=("qa1",) * 4),
            Stage(160, (48, 64), 6, asked=("qa1",) * 4, capacity=48),
            Stage(256, (72, 96), 8, asked=("qa1",) * 4, capacity=64),
            Stage(384, (120, 160), 8, SOME, ("qa1",) * 4, 64),
            Stage(512, (192, 256), 8, ALL, ("qa1",) * 4, 96),
            Stage(1024, (192, 256), 8, ALL, ("qa1",) * 4, 128),
            Stage(4096, (192, 256), 8, ALL, ("qa1",) * 4, 128),
        ),
        {"sliding_window": 256, "retrieval_capacity": 256},
    ),
    "qa2": Task(
        "qa2",
        (
            Stage(56, (18, 24), 3, asked=("qa2", "qa1")),
            Stage(96, (24, 32), 4, asked=("qa2", "qa1", "qa2")),
            Stage(128, (36, 48), 6, asked=("qa2", "qa1", "qa2", "qa1"), capacity=48),
            Stage(160, (48, 64), 8, asked=("qa2", "qa1", "qa2", "qa1"), capacity=64),
            Stage(256, (72, 96), 12, asked=("qa2", "qa1", "qa2", "qa2"), capacity=96),
            Stage(448, (144, 192), 12, SOME, ("qa2", "qa2", "qa1", "qa2"), 128),
            Stage(640, (192, 256), 12, ALL, ("qa2", "qa2", "qa1", "qa2"), 128),
            Stage(1024, (192, 256), 12, ALL, ("qa2",) * 3, 192),
            Stage(4096, (192, 256), 12, ALL, ("qa2",) * 3, 192),
        ),
        {"num_hidden_layers": 4, "sliding_window": 256, "retrieval_layers": [2, 3], "retrieval_capacity": 384},
    ),
    "qa3": Task(
        "qa3",
        (
            Stage(56, (18, 24), 4, asked=("qa3", "qa1")),
            Stage(96, (30, 40), 5, asked=("qa3", "qa1", "qa2")),
            Stage(128, (36, 48), 6, asked=("qa3", "qa1", "qa2", "qa3"), capacity=48),
            Stage(160, (48, 64), 8, asked=("qa3", "qa1", "qa2", "qa3"), capacity=64),
            Stage(224, (72, 96), 12, asked=("qa3", "qa1", "qa2", "qa3"), capacity=96),
            Stage(320, (96, 128), 16, asked=("qa3", "qa2", "qa3", "qa3"), capacity=128),
            Stage(384, (120, 160), 20, asked=("qa3", "qa2", "qa3", "qa3"), capacity=160),
            Stage(640, (192, 256), 20, SOME, ("qa3", "qa2", "qa3", "qa3"), 192),
            Stage(896, (288, 384), 20, ALL, ("qa3",) * 3, 256),
            Stage(4096, (288, 384), 20, ALL, ("qa3",) * 3, 256),
        ),
        {"num_hidden_layers": 4, "sliding_window": 384, "retrieval_layers": [2, 3], "retrieval_capacity": 512},
    ),
}
# Changes of the fields of models that are tried beside them.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "wide": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8},
    "two": {"num_hidden_layers": 4, "retrieval_layers": [2, 3]},
    "both": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "retrieval_layers": [2, 3],
    },
}


def make_model(fields: dict[str, Any], vocabulary: int) -> OlmemForCausalLM:
    """Makes a model of windows and a store that selects, with other fields where they are given."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "layer_types": "sliding_attention",
        "sliding_window": 32,
        "norm_placement": "pre",
        "rope_parameters": {"rope_theta": 10000.0},
        "max_position_embeddings": 4096,
        "retrieval_layers": [2],
        "retrieval_top_k": 8,
        "retrieval_capacity": 64,
        "retrieval_admission": "learned",
        "retrieval_gate_init": 0.0,
    }
    return OlmemForCausalLM(OlmemConfig(**common | fields))


@dataclass(frozen=True)
class Recipe:
    """Holds the settings of a training."""

    seconds: float = 150.0
    steps: int = 10**9
    tokens: int = 16384
    rate: float = 2e-3
    gate_rate: float = 1e-2
    decay: float = 0.01
    noise: float = 0.3  # of scores of admission
    warm: int = 50
    half: bool = True  # autocast to bfloat16, on a GPU
    graphs: bool = True  # on a GPU


@dataclass
class Log:
    """Holds what a training has come to."""

    steps: int = 0
    seconds: float = 0.0
    stage: int = 0
    best: float = 0.0  # the largest share of right answers in this stage
    kept: int = 0  # the step whose weights these are
    reached: dict[int, float] = field(default_factory=dict)  # of each stage, the seconds after which it began
    curve: list[tuple[int, int, float, float]] = field(default_factory=list)  # step, stage, loss, right


def measure(model: nn.Module, inputs: Tensors) -> Tensors:
    """Returns the loss of answers, and the share of questions that are answered whole, of those that count.

    The inputs are ids (R, T), the columns (n,) of answers, and which questions (R, Q) count.
    """
    ids, asked, counts = inputs
    targets = ids[:, asked].long()
    logits = model(input_ids=ids.long(), logits_to_keep=asked - 1, use_cache=False).logits.float()
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    losses = losses.unflatten(1, (counts.shape[1], -1)).mean(-1)
    right = (logits.detach().argmax(-1) == targets).unflatten(1, (counts.shape[1], -1)).all(-1)
    return (losses * counts).sum() / counts.sum(), (right & counts).sum() / counts.sum()


def train(
    task: Task, stories: Stories, recipe: Recipe, seed: int, device: str, say: Callable[[str], None] = lambda _: None,
) -> tuple[OlmemForCausalLM, Log]:  # fmt: skip
    """Trains a model of a task until its time is over, and returns the best weights of the last stage that it reached.

    In the last quarter of the time the rate falls.
    """
    torch.manual_seed(seed)
    draw, log, begin, on_gpu = random.Random(seed), Log(), time.perf_counter(), device == "cuda"
    model = make_model(task.fields, len(make_tokenizer())).to(device).train()  # pyright: ignore[reportArgumentType]
    config, whole = model.config, (model.config.sliding_window, model.config.retrieval_capacity)

    def add_noise(module: nn.Module, _: Any, scores: torch.Tensor) -> torch.Tensor:
        return scores + recipe.noise * torch.randn_like(scores) if module.training else scores

    def run(inputs: Tensors) -> Tensors:
        with torch.autocast(device, torch.bfloat16, enabled=recipe.half and on_gpu, cache_enabled=False):
            return measure(model, inputs)

    for module in model.modules() if recipe.noise else ():
        if type(module).__name__ == "OlmemAdmission":
            module.register_forward_hook(add_noise)
    passes = Passes(model, run) if recipe.graphs and on_gpu else None
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, weight in model.named_parameters():
        groups[any(part in name for part in SLOW_TO_MOVE)].append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": groups[False], "weight_decay": recipe.decay, "rate": recipe.rate},
         {"params": groups[True], "weight_decay": 0.0, "rate": recipe.gate_rate}],
        betas=(0.9, 0.95), fused=on_gpu,
    )  # fmt: skip
    recent: deque[torch.Tensor] = deque(maxlen=RECENT)
    best: dict[str, torch.Tensor] = {}
    spent = 0.0
    while spent < 1:
        longest = log.steps % 2 == 0 or not log.stage
        stage = task.stages[log.stage if longest else draw.randrange(log.stage)]
        config.sliding_window, config.retrieval_capacity = draw.choice(stage.windows), stage.capacity
        rows = max(1, recipe.tokens // stage.length)
        texts = stories.make(rows, stage.length, None, stage.sentences, stage.gaps, stage.asked, stage.again)
        inputs = texts.ids, texts.asked, texts.counts
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (log.steps + 1) / recipe.warm, 4 * (1 - spent) + 0.02)
        if passes is None:
            loss, right = run(tuple(each.to(device) for each in inputs))
            loss.backward()
        else:
            inputs = tuple(each.pin_memory().to(device, non_blocking=True) for each in inputs)
            loss, right = passes.step((config.sliding_window, stage.capacity), inputs)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.steps += 1
        if longest:
            recent.append(right)
        if log.steps % CHECKED == 0 and recent:
            share = float(torch.stack(tuple(recent)).mean())
            log.curve.append((log.steps, log.stage, float(loss.detach()), share))
            if len(recent) == RECENT and share >= log.best:
                log.kept, log.best = log.steps, share
                best = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            if log.steps % (10 * CHECKED) == 0:
                say(f"step {log.steps}, stage {log.stage}, {share:.3f} right, {log.seconds:.0f} s")
            if len(recent) == RECENT and share >= ENOUGH and log.stage < len(task.stages) - 1:
                log.stage, log.best = log.stage + 1, 0.0
                recent.clear()
                log.reached[log.stage] = log.seconds
                say(f"step {log.steps}: stage {log.stage}")
        log.seconds = time.perf_counter() - begin
        spent = max(log.seconds / recipe.seconds, log.steps / recipe.steps)
    config.sliding_window, config.retrieval_capacity = whole
    if best:
        model.load_state_dict(best)
    return model.eval(), log
