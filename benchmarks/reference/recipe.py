"""The recipe: Transformers' `Trainer`, with what a memory needs to be learned.

- A curriculum over the number of segments, which the data sets make from the number of a step.
- Gates and scores of admission learn at a rate of their own, and nothing pulls them to zero.
- Stores are as small for short texts as they are for long ones, so that they must select from the first steps on.
- Noise is added to the scores of admission, so that they must be far apart.

`accelerate launch` runs it on several GPUs as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import Shape, build
from pairs import STAGES, PairTexts
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed

SLOW_TO_MOVE = ("retrieval_gate", "memory_gate", "retrieval_score")  # parameters with a rate of their own


@dataclass(frozen=True)
class Recipe:
    """Holds the settings of a training."""

    rate: float = 2e-3
    gate_rate: float = 1e-2
    decay: float = 0.01
    noise: float = 0.0
    small_stores: bool = True
    half: bool = True  # autocast to bfloat16, on a GPU


class RecipeTrainer(Trainer):
    """Trains on batches that a data set makes, and scores the answers only where it says what is asked."""

    def __init__(self, recipe: Recipe, model: nn.Module, texts: PairTexts, arguments: TrainingArguments):
        super().__init__(model, arguments, data_collator=lambda items: items[0], train_dataset=texts)
        self.recipe, self.trained, self.texts = recipe, model, texts
        self.right: list[torch.Tensor] = []  # shares of right answers since the last record
        for module in model.modules() if recipe.noise else ():
            if type(module).__name__ == "OlmemAdmission":
                module.register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, _: Any, scores: torch.Tensor) -> torch.Tensor:
        """Adds noise to the scores of admission in training."""
        return scores + self.recipe.noise * torch.randn_like(scores) if module.training else scores

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.texts)

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

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, asked = inputs["input_ids"], inputs["asked"]
        outputs = model(input_ids=ids, logits_to_keep=asked - 1, use_cache=False)
        targets = ids[:, asked]
        self.right.append((outputs.logits.detach().argmax(-1) == targets).float().mean())
        loss = cross_entropy(outputs.logits.flatten(0, 1).float(), targets.flatten())
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def store_for(self, stage: int) -> Iterator[None]:
        """Makes stores as much smaller as the texts of a stage are."""
        config: Any = self.trained.config
        if not self.recipe.small_stores or not getattr(config, "retrieval_layers", None):
            yield
            return
        whole = config.retrieval_capacity
        config.retrieval_capacity = max(config.retrieval_top_k, whole * STAGES[stage][0] // STAGES[-1][0])
        try:
            yield
        finally:
            config.retrieval_capacity = whole

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        if self.right and "loss" in logs:
            logs["right"] = float(torch.stack(self.right).mean())
            self.right.clear()
        super().log(logs, *given, **named)


def train(
    arm: str, shape: Shape, recipe: Recipe, texts: PairTexts, folder: Path, seed: int, resume: bool = False,
    silent: bool = False,
) -> tuple[nn.Module, list[dict[str, float]]]:  # fmt: skip
    """Trains an arm, and saves it in a folder.

    Returns:
        The model, and what was recorded on the way.
    """
    set_seed(seed)
    model = build(arm, shape)
    steps = len(texts)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=recipe.rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 4, "min_lr_ratio": 0.01},
        warmup_steps=min(100, steps // 10),
        logging_steps=max(1, steps // 40),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        dataloader_num_workers=0 if silent else 2,
        report_to="none",
        seed=seed,
        data_seed=seed,
        bf16=recipe.half and torch.cuda.is_available(),
        tf32=torch.cuda.is_available() or None,
        disable_tqdm=silent,
    )
    trainer = RecipeTrainer(recipe, model, texts, arguments)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    return model, trainer.state.log_history
