"""Evaluation by lm-eval and evaluate, embeddings by sentence-transformers, and pipelines."""

import math

import pytest
import torch
from ecosystem.variants import OLMO3, make, save, text
from olmem import OlmemForSequenceClassification, OlmemForTokenClassification
from transformers import Olmo3ForSequenceClassification, pipeline

LONG = [text(length, seed=length) for length in (5, 30, 17)]  # two of them are longer than the window


def ids_of(tokenizer, *texts: str) -> torch.Tensor:
    return tokenizer(" ".join(texts), return_tensors="pt")["input_ids"]


@torch.no_grad()
def log_likelihood(model, ids: torch.Tensor, last: int) -> float:
    """Of the last ids of a row, given those before."""
    shares = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
    return float(shares.gather(1, ids[0, 1:, None])[-last:].sum())


def harness(model, tokenizer, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=64, **options)


def request(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


@pytest.mark.tool("`loglikelihood`, in batches, past the window", "lm_eval")
def test_likelihoods_of_continuations(variant, tokenizer):
    model = make(variant)
    pairs = [(context, " " + text(6, seed=90 + index)) for index, context in enumerate(LONG)]
    found = harness(model, tokenizer, batch_size=3).loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, rest), (share, _) in zip(pairs, found, strict=True):
        assert math.isclose(share, log_likelihood(model, ids_of(tokenizer, context, rest), 6), abs_tol=1e-3)


@pytest.mark.tool("`loglikelihood_rolling`", "lm_eval")
def test_likelihoods_of_texts(variant, tokenizer):
    model = make(variant)
    found = harness(model, tokenizer, batch_size=3).loglikelihood_rolling(
        [request("loglikelihood_rolling", each) for each in LONG]
    )
    for each, share in zip(LONG, found, strict=True):
        ids = torch.cat((torch.tensor([[tokenizer.bos_token_id]]), ids_of(tokenizer, each)), dim=1)
        assert math.isclose(share, log_likelihood(model, ids, ids.shape[1] - 1), abs_tol=1e-3)


@pytest.mark.tool("`generate_until`, in batches, past the window", "lm_eval")
def test_generated_answers(variant, tokenizer):
    model = make(variant)
    options = {"until": ["</s>"], "max_gen_toks": 10, "do_sample": False}
    found = harness(model, tokenizer, batch_size=3).generate_until(
        [request("generate_until", each, dict(options)) for each in LONG]
    )
    for each, answer in zip(LONG, found, strict=True):
        ids = ids_of(tokenizer, each)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert answer.split() == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).split()


@pytest.mark.tool("evaluator of a text-generation pipeline", "evaluate")
def test_evaluator(variant, tokenizer, broken, tmp_path):
    import evaluate
    from datasets import Dataset

    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "words.py").write_text(METRIC)
    model = make(variant)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    task = evaluate.evaluator("text-generation")
    task.predictions_prefix = "generated"
    data = Dataset.from_dict({"text": LONG})
    metric = evaluate.load(str(tmp_path / "words" / "words.py"))
    with broken("has no attribute TFPreTrainedModel", AttributeError):  # of Transformers 4
        assert task.compute(generate, data=data, metric=metric)["words"] > 0


METRIC = """
import datasets
import evaluate


class Words(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions):
        return {"words": sum(len(each.split()) for each in predictions)}
"""


@pytest.mark.tool("embeddings, the mean over tokens", "sentence-transformers")
def test_embeddings(variant, tokenizer, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = save(variant, tmp_path)
    tokenizer.chat_template = None  # with which each text would be a chat
    tokenizer.save_pretrained(folder)
    (tmp_path / "chat_template.jinja").unlink()
    words = Transformer(folder)
    encoder = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), "mean")], device="cpu")
    together = torch.tensor(encoder.encode(LONG, batch_size=3))
    model = make(variant).model
    for each, found in zip(LONG, together, strict=True):
        with torch.no_grad():
            states = model(ids_of(tokenizer, each), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(found, states.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.tool("pipeline: text-generation, in batches and chats", "transformers")
def test_generation_pipeline(variant, tokenizer, tmp_path):
    folder = save(variant, tmp_path)
    generate = pipeline("text-generation", model=folder)
    options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    together = generate(LONG, batch_size=3, **options)
    for each, found in zip(LONG, together, strict=True):
        assert found[0]["generated_text"] == generate(each, **options)[0]["generated_text"]
    chat = [{"role": "user", "content": LONG[1]}]
    assert generate(chat, **options)[0]["generated_text"]


@pytest.mark.tool("pipeline: text-classification", "transformers")
def test_classification_pipeline(variant, tokenizer):
    model = make(variant, OlmemForSequenceClassification, num_labels=3)
    if variant == OLMO3:
        model = Olmo3ForSequenceClassification(model.config).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    together = classify(LONG, batch_size=3)
    for each, found in zip(LONG, together, strict=True):
        assert math.isclose(found["score"], classify(each)[0]["score"], abs_tol=1e-4)


@pytest.mark.tool("pipeline: token-classification", "transformers")
@pytest.mark.variants(["plain", "sinks", "memory", "key_value"])
def test_tagging_pipeline(variant, tokenizer):
    model = make(variant, OlmemForTokenClassification, num_labels=3)
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    assert [len(tag(each)) for each in LONG] == [len(each.split()) for each in LONG]


@pytest.mark.tool("pipeline: feature-extraction", "transformers")
def test_features_pipeline(variant, tokenizer):
    extract = pipeline("feature-extraction", model=make(variant).model, tokenizer=tokenizer)
    assert [len(extract(each)[0]) for each in LONG] == [len(each.split()) for each in LONG]
