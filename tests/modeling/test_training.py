"""Training by `Trainer`, and what a training step keeps."""

import pytest
import torch
from modeling.helpers import tiny, tokens
from olmem import OlmemForCausalLM, OlmemForSequenceClassification, OlmemForTokenClassification
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

ROWS, LENGTH = 8, 11


def some_labels(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    """Labels of which each row has more than the one before, the first one none."""
    labels = tokens(*shape, vocab_size=bound, seed=1)
    return labels.where(torch.arange(shape[1]) < torch.arange(shape[0])[:, None], -100)


HEADS = {
    "language": (OlmemForCausalLM, {}, some_labels((ROWS, LENGTH), 61)),
    "tokens": (OlmemForTokenClassification, {"num_labels": 3, "classifier_dropout": 0.0}, some_labels((ROWS, 11), 3)),
    "a class": (OlmemForSequenceClassification, {"num_labels": 3}, tokens(ROWS, vocab_size=3)),
    "classes": (OlmemForSequenceClassification, {"num_labels": 3}, tokens(ROWS, 3, vocab_size=2).float()),
    "a number": (OlmemForSequenceClassification, {"num_labels": 1}, tokens(ROWS).float() / 61),
    "numbers": (
        OlmemForSequenceClassification,
        {"num_labels": 2, "problem_type": "regression"},
        tokens(ROWS, 2).float() / 61,
    ),
}


class Gradients(TrainerCallback):
    """Keeps the gradients by which an optimizer moves."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        assert model is not None
        self.found = {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_has_one_gradient_in_however_many_steps(head, tmp_path):
    """Eight rows at once, four, or one at a time: rows with other numbers of labels too, and one that has none."""
    model_class, changes, labels = HEADS[head]
    ids = tokens(ROWS, LENGTH)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    found = []
    for size in (8, 4, 1):
        model = tiny(model_class, pad_token_id=60, **changes)
        gradients = Gradients()
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=ROWS // size,
            max_steps=1,
            max_grad_norm=0.0,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[gradients])  # pyright: ignore
        loss = trainer.train().training_loss
        found.append((loss, gradients.found))
    for loss, gradients in found[1:]:
        assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        for name, gradient in found[0][1].items():
            assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
