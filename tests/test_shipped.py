"""The models in `model_cards`: each loads, does what its card prints, and holds a figure that it was published with."""

import contextlib
import io
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from olmem import OlmemForCausalLM
from olmem_convert.metrics.recall_tasks import make_example
from olmem_convert.publish.model_card import check_digests, digests
from olmem_convert.publish.standing_card import require_unedited
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/model.safetensors"))
TOLD = 16384  # tokens between what is told and its question


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path) -> OlmemForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is OlmemForCausalLM
    return model


@torch.no_grad()
def recalled(name: str, task: str) -> float:
    """Returns the share of eight texts whose answer is the likeliest one, token by token."""
    folder = ROOT / "model_cards" / name
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    rows = [make_example(task, tokenizer, TOLD, 0, seed=1, number=number) for number in range(8)]
    stream = model.stream()
    texts = [row.context + row.questions[0][0] for row in rows]
    stream.read([torch.tensor(ids) for ids in texts])
    answers = [row.questions[0][1] for row in rows]
    written = list(stream.write(max_new_tokens=len(answers[0]), do_sample=False))
    return sum([step[row] for step in written] == answers[row] for row in range(8)) / 8


@torch.no_grad()
def pairs(folder: Path, monkeypatch) -> float:
    """Returns the share of right answers to 64 questions about 256 pairs in a text of 2,048 tokens."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks/reference")
    texts = import_module("pairs").make_texts(1, 256, 2048, torch.Generator().manual_seed(1))
    return import_module("trials").read(load(folder), texts.ids, texts.asked).right


@torch.no_grad()
def perplexity(folder: Path) -> float:
    """Returns the perplexity of the first 1,024 tokens of the text that the models of code were evaluated on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((ROOT / "tests/shipped_text.txt").read_text(), return_tensors="pt").input_ids[:, :1024]
    logits = load(folder)(ids).logits[0, :-1].float()
    return float(cross_entropy(logits, ids[0, 1:]).exp())


def test_there_are_models():
    assert [folder.name for folder in FOLDERS] == ["code", "code-store", "needle", "pairs", "passkey"]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_a_model_is_small_and_does_what_its_card_prints(folder, monkeypatch):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
    require_unedited(folder / "README.md")
    report = json.loads((folder / "evaluation.json").read_text())
    check_digests("evaluation.json", report, digests(folder), "evaluate again")
    card, printed = (folder / "README.md").read_text(), io.StringIO()
    written, generated = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(printed):
        exec(compile(written, str(folder), "exec"), {})
    expected = re.search(r"\)  # (\w+)\n$", written)
    assert printed.getvalue().strip() == expected[1] if expected else printed.getvalue().strip()
    exec(compile(generated.replace('"…"', repr(str(folder))), str(folder), "exec"), {})


@pytest.mark.parametrize(("name", "task"), [("passkey", "passkey"), ("needle", "niah_single_1")])
def test_what_was_told_is_known_after_many_tokens(name, task):
    assert recalled(name, task) == 1


def test_pairs_are_recalled(monkeypatch):
    assert pairs(ROOT / "model_cards/pairs", monkeypatch) >= 0.8


@pytest.mark.parametrize("name", ["code", "code-store"])
def test_a_text_has_the_perplexity_of_the_evaluation(name):
    folder = ROOT / "model_cards" / name
    rows = json.loads((folder / "evaluation.json").read_text())["texts"]
    published = next(row["perplexity"] for row in rows if row["memory"] == "on")
    assert perplexity(folder) == pytest.approx(published, rel=0.01)


def test_the_demo_answers_from_memory(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "model_cards/demo")
    remember = import_module("remember")
    monkeypatch.setattr(remember, "TOKENS", 5000)
    remember.main(str(ROOT / "model_cards/passkey"))
    line = capsys.readouterr().out.splitlines()[-1]
    told, answered = re.findall(r"\d{5}", line)
    assert told == answered
