"""The recipe: Transformers' `Trainer`, with what a memory needs to be learned.

- A curriculum of stages with more and longer segments. The longest stage grows when its texts are answered.
- Half of the short texts are read with a narrow window, so that a store is needed from the first steps on, and stores
  are so small that they must select.
- Noise is added to written memory, so that it must stand errors.
- Gates and scores of admission learn at a rate of their own, and nothing pulls them to zero.
- On one GPU a step is replayed as a CUDA graph.

A training has one GPU, and `jobs` runs many trainings side by side.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from captured import Passes, Tensors
from olmem import OlmemForCausalLM
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

SLOW_TO_MOVE = ("retrieval_gate", "memory_gate", "retrieval_score")  # parameters with a rate of their own
CHECKED = 10  # steps between two looks at what is answered
THROUGH = 0.9  # the share of right answers of the longest texts with which they grow
FIRST = 3  # stages that must be answered, however long it takes
AHEAD = 2  # steps until what was decided holds, as the next batch is already made
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Holds the settings of a training."""

    rate: float = 2e-3
    gate_rate: float = 1e-2
    decay: float = 0.01
    memory_noise: float = 0.0
    half: bool = True  # autocast to bfloat16, on a GPU
    graphs: bool = True  # on one GPU


class Texts(Protocol):
    """Batches by the number of a step: `input_ids` (R, T), and as the case may be

    - `asked`: the columns (n,) of the tokens to be predicted, all but the first without it,
    - `window` and `capacity`: the sliding window and the size of stores in this step, 0 for the model's own,
    - `longest`: whether the text is of the longest stage so far.

    `begins` holds the step with which each stage began.
    """

    begins: list[int]
    stages: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Curriculum(TrainerCallback, ExportableState):
    """Goes on to the next stage when the texts of the last one are answered, or at the latest after so many steps.

    The first stages have no such end: what is not learned from short texts is not learned from long ones.
    """

    def __init__(self, texts: Texts, patience: int = 0):
        self.texts, self.patience = texts, patience
        self.right: list[torch.Tensor] = []  # shares of right answers of the last of the longest texts

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"begins": self.texts.begins, "right": [float(each) for each in self.right]}}

    def add(self, share: torch.Tensor) -> None:
        self.right = [*self.right, share][-CHECKED:]

    def on_step_end(self, args, state, control, **given) -> None:
        texts, step = self.texts, state.global_step
        if step % CHECKED or len(texts.begins) >= texts.stages:
            return
        late = self.patience and len(texts.begins) > FIRST and step - texts.begins[-1] >= self.patience
        done = len(self.right) == CHECKED and float(torch.stack(self.right).mean()) > THROUGH
        if late or done:
            texts.begins.append(step + AHEAD)
            self.right = []


def predict(model: nn.Module, ids: torch.Tensor, asked: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (R, n, vocabulary) of asked columns (n,) of ids (R, T), else of all but the first; and ids."""
    if asked is None:
        kept, read, targets = torch.arange(ids.shape[1] - 1, device=ids.device), ids[:, :-1], ids[:, 1:]
    else:
        kept, read, targets = asked - 1, ids, ids[:, asked]
    return model(input_ids=read, logits_to_keep=kept, use_cache=False).logits, targets


class RecipeTrainer(Trainer):
    """Trains on batches that a data set makes, and scores the answers only where it says what is asked."""

    def __init__(self, recipe: Recipe, model: nn.Module, texts: Texts, arguments: TrainingArguments, patience: int = 0):
        assert isinstance(texts, Dataset)
        self.curriculum = Curriculum(texts, patience)
        super().__init__(
            model, arguments, data_collator=lambda items: items[0], train_dataset=texts, callbacks=[self.curriculum]
        )
        self.recipe, self.trained, self.texts = recipe, model, texts
        self.right: list[torch.Tensor] = []  # shares of right answers since the last record
        alone = arguments.device.type == "cuda" and arguments.parallel_mode == ParallelMode.NOT_PARALLEL
        self.passes = Passes(model, self.run_captured) if recipe.graphs and alone else None
        if recipe.memory_noise and isinstance(model, OlmemForCausalLM) and model.model.memory is not None:
            model.model.memory.register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, inputs: tuple[Any, ...], memory: torch.Tensor) -> torch.Tensor:
        """Adds noise to written memory in training, so that what is written next must undo small errors."""
        written = bool(inputs) and inputs[0] is not None
        return memory + self.recipe.memory_noise * torch.randn_like(memory) if written and module.training else memory

    def _load_callback_state(self) -> None:
        found: Any = self.state.stateful_callbacks
        found = found.get("Curriculum") if isinstance(found, dict) else None
        if found is not None:
            self.texts.begins[:] = found["attributes"]["begins"]
            self.curriculum.right = [torch.tensor(each) for each in found["attributes"]["right"]]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.texts)  # pyright: ignore[reportArgumentType]  it has a length

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
            for name, weight in (model or self.trained).named_parameters():
                own = any(part in name for part in SLOW_TO_MOVE)
                groups["gates" if own else "matrices" if weight.dim() > 1 else "vectors"].append(weight)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": groups["matrices"], "weight_decay": self.recipe.decay},
                    {"params": groups["vectors"], "weight_decay": 0.0},
                    {"params": groups["gates"], "weight_decay": 0.0, "lr": self.recipe.gate_rate},
                ],
                lr=self.args.learning_rate,
                betas=(0.9, 0.95),
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        longest = bool(inputs.pop("longest", False))
        window, capacity = (int(inputs.pop(name, 0)) for name in ("window", "capacity"))
        with self.sizes(window, capacity):
            if self.passes is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                model.train()
                inputs = self._prepare_inputs(inputs)
                tensors = tuple(inputs[name] for name in ("input_ids", "asked") if name in inputs)
                loss, right = self.passes.step((window, capacity), tensors)
                self.right.append(right)
        if longest and self.state.global_step >= self.texts.begins[-1]:
            self.curriculum.add(self.right[-1])
        return loss

    def run_captured(self, inputs: Tensors) -> Tensors:
        """Returns the loss of a batch, and the share of right answers, in the precision of the training."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.args.bf16, cache_enabled=False):
            return self.measure(self.trained, *inputs)

    def measure(self, model: nn.Module, ids: torch.Tensor, asked: torch.Tensor | None = None) -> Tensors:
        """Returns the loss of ids (R, T) in asked columns (n,), and the share of right answers."""
        logits, targets = predict(model, ids, asked)
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return loss, (logits.detach().argmax(-1) == targets).float().mean()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, right = self.measure(model, inputs["input_ids"], inputs.get("asked"))
        self.right.append(right)
        return (loss, {}) if return_outputs else loss

    @contextmanager
    def sizes(self, window: int, capacity: int) -> Iterator[None]:
        """Gives the model another sliding window, and other stores, for a while."""
        config: Any = self.trained.config
        given = {"sliding_window": window, "retrieval_capacity": capacity}
        given = {name: size for name, size in given.items() if size and getattr(config, name, None)}
        before = {name: getattr(config, name) for name in given}
        try:
            for name, size in given.items():
                setattr(config, name, size)
            yield
        finally:
            for name, size in before.items():
                setattr(config, name, size)

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        if self.right and "loss" in logs:
            logs["right"] = float(torch.stack(self.right).mean())
            logs["stage"] = len(self.texts.begins) - 1
            self.right.clear()
        super().log(logs, *given, **named)


def train(
    model: nn.Module, recipe: Recipe, texts: Texts, folder: Path, seed: int, resume: bool = False,
    silent: bool = False, patience: int = 0, make: Callable[..., RecipeTrainer] = RecipeTrainer,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains a model, saves it in a folder, and returns what was recorded on the way.

    With `resume` it goes on from the last checkpoint in the folder.
    """
    steps = len(texts)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=recipe.rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 4, "min_lr_ratio": 0.01},
        warmup_steps=min(50, steps // 10),
        logging_steps=max(1, steps // 40),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        report_to="none",
        seed=seed,
        data_seed=seed,
        bf16=recipe.half and torch.cuda.is_available(),
        tf32=torch.cuda.is_available() or None,
        disable_tqdm=silent,
    )
    if arguments.world_size > 1:
        raise ValueError(f"a training must have one process (got {arguments.world_size}); start it without a launcher")
    set_seed(seed)
    trainer = make(recipe, model, texts, arguments, patience)
    if silent:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    return trainer.state.log_history
