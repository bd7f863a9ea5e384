"""Trains a model to keep what a text tells: a curriculum that goes on by accuracy, from texts of one sentence on.

- The first texts are so short, and their windows so small, that what is asked for has just left the window.
- A stage is left when 90 of 100 questions of the longest texts are answered, never by the clock.
- Half of the steps have texts of the longest stage, the others of any stage up to it.
- Windows of each step are drawn, and stores are small, so that a model must select.
- Noise is added to the scores of admission, and to memory that was written, so that both must bear it.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM, retrieval_olmem
from stories import Stories, Texts, make_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

retrieval_olmem.BLOCK = 512  # queries at a time: fewer launches, and the same results
ENOUGH = 0.9  # the share of right answers from which on a stage is left
RECENT = 10  # steps of the longest stage over which it is counted
TO_MOVE_FAST = ("retrieval_gate", "memory_gate", "retrieval_score")


@dataclass(frozen=True)
class Stage:
    """Holds what texts of a stage are like.

    Args:
        length: of a text in tokens.
        window: the largest sliding window.
        sentences: of a story.
        gaps: numbers of sentences of filler between two of a story.
        asked: the tasks of the questions.
        capacity: of a store.
    """

    length: int
    window: int
    sentences: int = 1
    gaps: tuple[int, ...] = (0,)
    asked: tuple[str, ...] = ()
    capacity: int = 32


@dataclass(frozen=True)
class Task:
    """Holds what a model is trained for.

    Args:
        texts: one of `stories.SENTENCES`.
        stages: of the curriculum.
        fields: of the model's configuration, which are its own.
        many: whether texts of a stage have any number of segments up to that of its longest.
    """

    texts: str
    stages: tuple[Stage, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    many: bool = False


NUMBERS = (
    Stage(64, 16),
    Stage(96, 24),
    Stage(256, 32),
    Stage(1024, 32),
    Stage(4096, 32),
)
SOME, ALL = (0, 0, 1), (0, 0, 1, 2)
SEGMENT = 32
TASKS = {
    "passkey": Task("passkey", NUMBERS),
    "niah_single_1": Task("niah_single_1", (replace(NUMBERS[0], length=96), *NUMBERS[1:])),
    "qa1": Task(
        "qa1",
        (
            Stage(36, 14, 2, asked=("qa1",) * 2),
            Stage(80, 32, 3, asked=("qa1",) * 3),
            Stage(112, 48, 4, asked=("qa1",) * 4),
            Stage(160, 64, 6, asked=("qa1",) * 4, capacity=48),
            Stage(256, 96, 8, asked=("qa1",) * 4, capacity=64),
            Stage(384, 160, 8, SOME, ("qa1",) * 4, 64),
            Stage(512, 256, 8, ALL, ("qa1",) * 4, 96),
            Stage(1024, 256, 8, ALL, ("qa1",) * 4, 128),
            Stage(4096, 256, 8, ALL, ("qa1",) * 4, 128),
        ),
        {"sliding_window": 256, "retrieval_capacity": 256},
    ),
    "qa2": Task(
        "qa2",
        (
            Stage(56, 24, 3, asked=("qa2", "qa1")),
            Stage(96, 32, 4, asked=("qa2", "qa1", "qa2")),
            Stage(128, 48, 6, asked=("qa2", "qa1", "qa2", "qa1"), capacity=48),
            Stage(160, 64, 8, asked=("qa2", "qa1", "qa2", "qa1"), capacity=64),
            Stage(256, 96, 12, asked=("qa2", "qa1", "qa2", "qa2"), capacity=96),
            Stage(448, 192, 12, SOME, ("qa2", "qa2", "qa1", "qa2"), 128),
            Stage(640, 256, 12, ALL, ("qa2", "qa2", "qa1", "qa2"), 128),
            Stage(1024, 256, 12, ALL, ("qa2",) * 3, 192),
            Stage(4096, 256, 12, ALL, ("qa2",) * 3, 192),
        ),
        {"num_hidden_layers": 4, "sliding_window": 256, "retrieval_layers": [2, 3], "retrieval_capacity": 384},
    ),
    "qa3": Task(
        "qa3",
        (
            Stage(56, 24, 4, asked=("qa3", "qa1")),
            Stage(96, 40, 5, asked=("qa3", "qa1", "qa2")),
            Stage(128, 48, 6, asked=("qa3", "qa1", "qa2", "qa3"), capacity=48),
            Stage(160, 64, 8, asked=("qa3", "qa1", "qa2", "qa3"), capacity=64),
            Stage(224, 96, 12, asked=("qa3", "qa1", "qa2", "qa3"), capacity=96),
            Stage(320, 128, 16, asked=("qa3", "qa2", "qa3", "qa3"), capacity=128),
            Stage(384, 160, 20, asked=("qa3", "qa2", "qa3", "qa3"), capacity=160),
            Stage(640, 256, 20, SOME, ("qa3", "qa2", "qa3", "qa3"), 192),
            Stage(896, 384, 20, ALL, ("qa3",) * 3, 256),
            Stage(4096, 384, 20, ALL, ("qa3",) * 3, 256),
        ),
        {"num_hidden_layers": 4, "sliding_window": 384, "retrieval_layers": [2, 3], "retrieval_capacity": 512},
    ),
    # Memory tokens alone: windows of one segment, 8 segments at most.
    "memory": Task(
        "passkey",
        tuple(Stage(SEGMENT * segments, SEGMENT) for segments in (2, 3, 4, 6, 8)),
        {"num_memory_tokens": 8, "memory_segment_length": SEGMENT, "sliding_window": SEGMENT, "retrieval_layers": []},
        many=True,
    ),
}
# Changes of the fields of models that are tried beside them.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "wide": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8},
    "deep": {"num_hidden_layers": 5, "retrieval_layers": [2, 3]},
    "two": {"num_hidden_layers": 4, "retrieval_layers": [2, 3]},
    "all": {"retrieval_layers": [1, 2]},
    "no norm": {"qk_norm": "none"},
    "recent": {"retrieval_admission": "recent"},
    "memory": {"num_memory_tokens": 8, "memory_segment_length": 128},
    "sinks": {"sink_logit_init": 0.0},
    "many": {"num_memory_tokens": 16},
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
    memory_noise: float = 0.0  # of memory that was written
    warm: int = 50
    half: bool = True


@dataclass
class Log:
    """Holds what a training has come to."""

    steps: int = 0
    seconds: float = 0.0
    stage: int = 0
    reached: dict[int, float] = field(default_factory=dict)  # of each stage, the seconds after which it began
    curve: list[tuple[int, int, float, float]] = field(default_factory=list)  # step, stage, loss, right


def answers(model: nn.Module, texts: Texts, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of answers, and which questions (n,) that count are answered whole."""
    ids = texts.ids.to(device).long()
    asked, question, counts = (each.to(device) for each in (texts.asked, texts.question, texts.counts))
    logits = model(input_ids=ids, logits_to_keep=asked - 1, use_cache=False).logits.float()
    targets = ids[:, asked]
    weight = counts[:, question].float()
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    right = (logits.detach().argmax(-1) == targets).unflatten(1, (counts.shape[1], -1)).all(-1)
    return (losses * weight).sum() / weight.sum(), (right & counts).sum() / counts.sum()


def add_noise(scale: float, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Returns what a module gives with noise in training; a memory that begins a stream stays as it is."""
    given = bool(inputs) and inputs[0] is not None
    return output + scale * torch.randn_like(output) if given and module.training else output


def train(
    task: Task, stories: Stories, recipe: Recipe, seed: int, device: str, say: Callable[[str], None] = lambda _: None,
) -> tuple[OlmemForCausalLM, Log]:  # fmt: skip
    """Trains a model of a task until its time is over. In the last quarter the rate falls."""
    torch.manual_seed(seed)
    draw, log, begin = random.Random(seed), Log(), time.perf_counter()
    model = make_model(task.fields, len(make_tokenizer())).to(device).train()  # pyright: ignore[reportArgumentType]
    config, whole = model.config, (model.config.sliding_window, model.config.retrieval_capacity)
    for module in model.modules():
        name = type(module).__name__
        if scale := {"OlmemAdmission": recipe.noise, "OlmemMemory": recipe.memory_noise}.get(name):
            module.register_forward_hook(partial(add_noise, scale))
    own = [weight for name, weight in model.named_parameters() if any(part in name for part in TO_MOVE_FAST)]
    fast = {id(weight) for weight in own}
    others = [weight for weight in model.parameters() if id(weight) not in fast]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": recipe.decay, "rate": recipe.rate},
         {"params": own, "weight_decay": 0.0, "rate": recipe.gate_rate}],
        betas=(0.9, 0.95), fused=device == "cuda",
    )  # fmt: skip
    recent: deque[torch.Tensor] = deque(maxlen=RECENT)
    spent = 0.0
    while spent < 1:
        longest = log.steps // 4 % 2 == 0 or not log.stage
        number = log.stage if longest else draw.randrange(log.stage)
        stage = task.stages[number]
        length = stage.length
        if task.many and log.steps % 2:
            length = draw.randint(task.stages[0].length, length)
        else:
            config.sliding_window = draw.randint(3 * stage.window // 4, stage.window)
        config.retrieval_capacity = stage.capacity
        rows = max(1, recipe.tokens // stage.length)
        texts = stories.make(rows, length, None, stage.sentences, stage.gaps, stage.asked)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (log.steps + 1) / recipe.warm, 4 * (1 - spent) + 0.02)
        with torch.autocast(device, torch.bfloat16, enabled=recipe.half and device == "cuda"):
            loss, right = answers(model, texts, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.steps += 1
        if longest:
            recent.append(right)
        if log.steps % 10 == 0 and recent:
            share = float(torch.stack(tuple(recent)).mean())
            log.curve.append((log.steps, log.stage, float(loss.detach()), share))
            if log.steps % 50 == 0:
                say(f"step {log.steps}, stage {log.stage}, {share:.3f} right, {log.seconds:.0f} s")
            if len(recent) == RECENT and share >= ENOUGH and log.stage < len(task.stages) - 1:
                log.stage += 1
                recent.clear()
                log.reached[log.stage] = log.seconds
                say(f"step {log.steps}: stage {log.stage}")
        log.seconds = time.perf_counter() - begin
        spent = max(log.seconds / recipe.seconds, log.steps / recipe.steps)
    config.sliding_window, config.retrieval_capacity = whole
    return model.eval(), log
