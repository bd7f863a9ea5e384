"""`import olmem` is all that Auto classes and pipelines need."""

import pytest
import torch
from modeling.helpers import TINY, left_padded, tiny, tokens
from olmem import (
    OlmemConfig,
    OlmemForCausalLM,
    OlmemForSequenceClassification,
    OlmemForTokenClassification,
    OlmemModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

CLASSES = [
    (AutoModel, OlmemModel),
    (AutoModelForCausalLM, OlmemForCausalLM),
    (AutoModelForSequenceClassification, OlmemForSequenceClassification),
    (AutoModelForTokenClassification, OlmemForTokenClassification),
]
HEADS = CLASSES[2:]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = WordLevel({f"w{index}": index for index in range(60)} | {"<pad>": 60}, unk_token="w0")
    backend = Tokenizer(words)
    backend.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", padding_side="left")


def saved(folder, tokenizer, model_class, **changes):
    model = tiny(model_class, pad_token_id=60, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("auto_class", "model_class"), CLASSES)
def test_auto_classes_know_the_models(auto_class, model_class, tmp_path):
    config = AutoConfig.for_model("olmem", **TINY)
    assert type(config) is OlmemConfig
    assert type(auto_class.from_config(config)) is model_class
    model = tiny(model_class)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert torch.equal(loaded(tokens(1, 9))[0], model(tokens(1, 9))[0])
    assert type(AutoConfig.from_pretrained(tmp_path)) is OlmemConfig


@pytest.mark.parametrize(("auto_class", "model_class"), HEADS)
def test_a_head_takes_the_backbone_of_a_causal_model(auto_class, model_class, tmp_path):
    causal = tiny()
    causal.save_pretrained(tmp_path)
    model, info = auto_class.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert type(model) is model_class
    assert set(info["missing_keys"]) <= {"score.weight", "score.bias"}
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert model.score.weight.shape == (3, 24)
    assert 0.05 < model.score.weight.std() < 0.15
    backbone, expected = model.model.state_dict(), causal.model.state_dict()
    assert backbone.keys() == expected.keys()
    assert all(torch.equal(backbone[name], expected[name]) for name in expected)


def test_a_row_is_classified_by_its_last_real_token():
    model = tiny(OlmemForSequenceClassification, num_labels=3, pad_token_id=60)
    rows = [tokens(9, vocab_size=60), tokens(4, vocab_size=60, seed=1)]
    alone = torch.cat([model(row[None]).logits for row in rows])
    assert alone.shape == (2, 3)
    assert_close(model(**left_padded(*rows, pad=60)).logits, alone, rtol=0, atol=1e-5)
    flipped = left_padded(*(row.flip(0) for row in rows), pad=60)
    right_padded = {name: tensor.flip(1) for name, tensor in flipped.items()}
    assert torch.equal(right_padded["input_ids"][1, :4], rows[1])
    assert_close(model(**right_padded).logits, alone, rtol=0, atol=1e-5)

    labels = torch.tensor([2, 0])
    loss = model(**right_padded, labels=labels).loss
    assert_close(loss, -alone.log_softmax(-1)[[0, 1], labels].mean())
    loss.backward()


def test_every_token_is_classified():
    model = tiny(OlmemForTokenClassification, num_labels=3)
    ids = tokens(2, 9)
    labels = ids % 3
    labels[0, :5] = -100
    outputs = model(ids, labels=labels)
    expected = model.score(model.model(ids).last_hidden_state)
    assert_close(outputs.logits, expected)
    kept = labels != -100
    assert_close(outputs.loss, -expected[kept].log_softmax(-1).gather(1, labels[kept][:, None]).mean())
    outputs.loss.backward()


def test_text_generation_pipeline(tokenizer, tmp_path):
    model = saved(tmp_path, tokenizer, OlmemForCausalLM)
    texts = ["w5 w6 w7 w8 w9 w10", "w11 w12"]
    generate = pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path))
    assert type(generate.model) is OlmemForCausalLM
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = [found[0]["generated_text"] for found in generate(texts, batch_size=2, **options)]
    for text, found in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert found.split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def test_text_classification_pipeline(tokenizer, tmp_path):
    labels = {0: "bad", 1: "good", 2: "odd"}
    model = saved(tmp_path, tokenizer, OlmemForSequenceClassification, id2label=labels)
    texts = ["w5 w6 w7 w8 w9 w10", "w11 w12"]
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path))
    for text, found in zip(texts, classify(texts, batch_size=2), strict=True):
        shares = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].softmax(-1)
        assert found["label"] == labels[int(shares.argmax())]
        assert found["score"] == pytest.approx(float(shares.max()), abs=1e-5)


def test_token_classification_pipeline(tokenizer, tmp_path):
    labels = {0: "A", 1: "B", 2: "C"}
    model = saved(tmp_path, tokenizer, OlmemForTokenClassification, id2label=labels)
    text = "w5 w6 w7 w8 w9 w10"
    tag = pipeline("token-classification", model=str(tmp_path), tokenizer=str(tmp_path), ignore_labels=[])
    expected = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].argmax(-1)
    assert [found["entity"] for found in tag(text)] == [labels[index] for index in expected.tolist()]
    assert [found["word"] for found in tag(text)] == text.split()
