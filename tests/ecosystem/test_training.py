"""Training by Transformers' Trainer and by TRL."""

import pytest
import torch
from datasets import Dataset
from ecosystem.variants import OLMO3, make, text, tokens
from torch.testing import assert_close
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_strategy": "no", "learning_rate": 1e-3}
ROWS = [{"input_ids": (ids := tokens(20, seed=seed)), "labels": ids} for seed in range(8)]


def trainer(model, folder, **arguments) -> Trainer:
    arguments = {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "no"} | QUIET | arguments
    return Trainer(model, TrainingArguments(folder, **arguments), train_dataset=ROWS, eval_dataset=ROWS[:4])


def moved(model, before) -> bool:
    """Whether every weight of a layer's projections was trained."""
    return all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters() if "_proj" in name)


@pytest.mark.tool("Trainer: train, save, resume with the same bits, evaluate", "transformers")
def test_resumed_training_goes_on(variant, tmp_path):
    whole = make(variant)
    trainer(whole, tmp_path / "whole").train()
    half = trainer(make(variant), tmp_path / "half", save_strategy="steps", save_steps=2, max_steps=4)
    half.train()
    resumed = trainer(make(variant), tmp_path / "half")
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name
    assert 0 < resumed.evaluate()["eval_loss"] < 20


@pytest.mark.tool("Trainer: gradient accumulation", "transformers")
def test_gradients_are_accumulated(variant, tmp_path):
    found = []
    for size in (4, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 2}
        model = make(variant)
        trainer(model, tmp_path, optim="sgd", **sizes).train()
        found.append(dict(model.named_parameters()))
    for name, weight in found[0].items():
        assert_close(found[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.tool("Trainer: gradient checkpointing", "transformers")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_no_gradient(variant, reentrant, tmp_path):
    found = []
    for arguments in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = make(variant)
        trainer(model, tmp_path, optim="sgd", max_steps=2, **arguments).train()
        found.append(dict(model.named_parameters()))
    for name, weight in found[0].items():
        assert_close(found[1][name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.tool("Trainer: bf16", "transformers")
def test_training_in_bfloat16(variant, tmp_path):
    model = make(variant)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert 0 < trainer(model, tmp_path, bf16=True).train().training_loss < 20
    assert moved(model, before)


@pytest.mark.tool("Trainer: batches by length, padded", "transformers")
def test_rows_of_other_lengths(variant, tokenizer, tmp_path):
    rows = [{"input_ids": tokens(length, seed=length).tolist()} for length in (3, 20, 4, 21)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=2, train_sampling_strategy="group_by_length", **QUIET
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert Trainer(make(variant), arguments, train_dataset=rows, data_collator=collator).train().training_loss > 0


@pytest.mark.tool("DataCollatorWithFlattening", "transformers")
def test_flat_rows_have_the_loss_of_padded_ones(variant, tokenizer):
    """Documents of one row, which positions tell apart."""
    rows = [{"input_ids": tokens(length, seed=length).tolist()} for length in (12, 20, 9)]
    model = make(variant)
    flat = DataCollatorWithFlattening(return_tensors="pt")([dict(row) for row in rows])
    tokenizer.padding_side = "right"  # so that no first token is predicted from padding
    padded = DataCollatorWithPadding(tokenizer)([dict(row) for row in rows])
    padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    losses = [model(**batch, use_cache=False).loss for batch in (flat, padded)]
    assert_close(*losses, rtol=1e-5, atol=1e-5)


CHATS = [
    {
        "messages": [
            {"role": "user", "content": text(6, seed)},
            {"role": "assistant", "content": text(9, seed + 100)},
            {"role": "user", "content": text(4, seed + 200)},
            {"role": "assistant", "content": text(5, seed + 300)},
        ]
    }
    for seed in range(8)
]
TEXTS = [{"text": text(5 + 4 * seed, seed)} for seed in range(8)]


WAYS = {
    "SFT": {},
    "SFT: packing, bfd": {"packing": True, "packing_strategy": "bfd"},
    "SFT: packing, wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "SFT: padding-free": {"padding_free": True, "max_length": None},
    "SFT: assistant-only loss": {"assistant_only_loss": True},
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.tool(name, "trl"), id=name) for name, way in WAYS.items()]
)
@pytest.mark.filterwarnings("ignore")  # of attention functions that TRL knows
def test_supervised_training(variant, way, tokenizer, tmp_path):
    model = make(variant)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = SFTConfig(
        tmp_path,
        **{"max_length": 24, "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False} | QUIET | way,
    )
    rows = Dataset.from_list(CHATS if "assistant_only_loss" in way else TEXTS)
    run = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    assert 0 < run.train().training_loss < 20
    assert moved(run.model, before)


@pytest.mark.tool("DPO", "trl")
def test_preferences(variant, tokenizer, tmp_path):
    rows = [{"prompt": text(9, i), "chosen": text(5, i + 50), "rejected": text(7, i + 90)} for i in range(4)]
    arguments = DPOConfig(tmp_path, max_steps=2, per_device_train_batch_size=2, bf16=False, **QUIET)
    model = make(variant)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    run = DPOTrainer(
        model, make(variant), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert 0 < run.train().training_loss < 5
    assert moved(run.model, before)


@pytest.mark.tool("GRPO", "trl")
def test_rewards(variant, tokenizer, tmp_path):
    """The model writes its own texts, past its window."""
    rows = [{"prompt": text(9, i)} for i in range(4)]
    arguments = GRPOConfig(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        bf16=False,
        **QUIET,
    )
    model = make(variant)
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    def rewards(completions, **_):
        return [float(len(set(each.split()))) + index for index, each in enumerate(completions)]

    run = GRPOTrainer(model, rewards, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    run.train()
    assert moved(run.model, before)
    assert variant == OLMO3 or run.model.config.model_type == "olmem"
