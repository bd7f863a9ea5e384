"""The metrics that the package ships: read by their path without a network or Olmem, right by hand, and tasks of recall
whose answers follow from what their texts tell."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from convert.checkpoints import DEMO
from fresh import run_fresh
from olmem import OlmemConfig, OlmemForCausalLM
from olmem_convert.metrics import METRICS, path
from olmem_convert.metrics.long_recall import ask
from olmem_convert.metrics.recall_tasks import OBJECTS, PERSONS, PLACES, TASKS, THINGS, Example, make_example
from olmem_convert.metrics.stream_state import bytes_of
from torch.nn.functional import cross_entropy
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast

TOKENIZER = DEMO / "tokenizer.json"
SIZES = {
    **{"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "sliding_window": 16, "max_position_embeddings": 4096},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}
WINDOW = 16
TEXT = "def f(x):\n    return [y for y in range(x)]\n" * 5

# Runs in a process of its own that cannot import Olmem and has no network: `evaluate` and Transformers' Olmo3 alone.
ALONE = """
import json, socket, sys
def no_network(*arguments): raise AssertionError("the network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
sys.path[:] = [place for place in sys.path if not place.rstrip("/").endswith(("modeling", "convert", "tests"))]
import evaluate, torch
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast
(top, file), (sizes, text, tasks) = sys.argv[1:3], map(json.loads, sys.argv[3:])
tokenizer = PreTrainedTokenizerFast(tokenizer_file=file)
torch.set_num_threads(1)
torch.manual_seed(0)
model = Olmo3ForCausalLM(Olmo3Config(**sizes)).eval()
found = {}
metric, given = evaluate.load(f"{top}/perplexity_stream.py"), {"model": model, "tokenizer": tokenizer}
for memory in ("on", "reset"):
    found[memory] = metric.compute(predictions=[text, text[:40]], memory=memory, chunk=7, **given)
try:
    metric.compute(predictions=[text], memory="off", **given)
except ValueError as error:
    found["off"] = str(error)
answers = {"predictions": ["7", " b", "no"], "references": ["7", "b", "yes"]}
answers |= {"distances": [9, 9, 3], "positions": [0, 5, 5]}
found["given"] = evaluate.load(f"{top}/long_recall.py").compute(**answers)
for task in tasks:
    metric = evaluate.load(f"{top}/long_recall.py", task)
    found[task] = metric.compute(distances=[5], positions=[3], count=1, chunk=64, **given)
found["state"] = evaluate.load(f"{top}/stream_state.py").compute(lengths=[40, 8], model=model, chunk=10, steps=3)
assert not any(name.split(".")[0].startswith("olmem") for name in sys.modules)
print(json.dumps(found))
"""


def tokenizer_of_demo() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER))


def olmo3() -> Olmo3ForCausalLM:
    torch.manual_seed(0)
    return Olmo3ForCausalLM(Olmo3Config(**SIZES)).eval()


def olmem() -> OlmemForCausalLM:
    torch.manual_seed(0)
    memory = {"num_memory_tokens": 2, "memory_segment_length": 16, "retrieval_layers": [1], "retrieval_top_k": 4}
    return OlmemForCausalLM(OlmemConfig(**SIZES, **memory)).eval()


@torch.no_grad()
def losses_of(model, ids: list[int]) -> torch.Tensor:
    """Nats of tokens 1, 2 … by one call without a cache."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").double()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    top = tmp_path_factory.mktemp("alone")
    arguments = [str(Path(path("long_recall")).parent), str(TOKENIZER), *map(json.dumps, (SIZES, TEXT, list(TASKS)))]
    environment = {"HF_HOME": str(top), "PATH": "/usr/bin:/bin", "HOME": str(top)}
    run = run_fresh(ALONE, *arguments, env=environment, cwd=top)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_perplexity_of_olmo3_is_that_of_plain_calls(alone):
    tokenizer, model = tokenizer_of_demo(), olmo3()
    texts = [tokenizer(text).input_ids for text in (TEXT, TEXT[:40])]
    on = [losses_of(model, ids) for ids in texts]
    spans = [[ids[start : start + WINDOW + 1] for start in range(0, len(ids) - 1, WINDOW)] for ids in texts]
    reset = [torch.cat([losses_of(model, span) for span in each]) for each in spans]
    assert len(on[0]) > 4 * WINDOW and len(on[1]) < WINDOW
    for memory, losses in (("on", on), ("reset", reset)):
        found, joined = alone[memory], torch.cat(losses)
        assert (found["window"], found["memory"], found["tokens"]) == (WINDOW, memory, len(joined) + 2)
        assert found["nats_per_token"] == pytest.approx(float(joined.mean()), abs=1e-5)
        assert found["perplexities"] == pytest.approx([float(each.mean().exp()) for each in losses], rel=1e-5)
        for name, first, last in (("inside", 0, 1), ("one_to_four", 1, 4), ("further", 4, 99)):
            inside = torch.cat([each[first * WINDOW : last * WINDOW] for each in losses])
            assert found[name]["tokens"] == len(inside)
            assert found[name]["nats_per_token"] == pytest.approx(float(inside.mean()), abs=1e-5)
    assert abs(alone["on"]["nats_per_token"] - alone["reset"]["nats_per_token"]) > 1e-4
    assert "`memory`" in alone["off"] and "Olmo3ForCausalLM" in alone["off"]


def test_recall_of_given_answers_by_hand(alone):
    assert alone["given"] == {
        "questions": 3,
        "exact_match": pytest.approx(2 / 3),
        "cells": [
            {"distance": 3, "position": 5, "questions": 1, "exact_match": 0.0},
            {"distance": 9, "position": 0, "questions": 1, "exact_match": 1.0},
            {"distance": 9, "position": 5, "questions": 1, "exact_match": 1.0},
        ],
    }


def test_loss_of_each_task_is_that_of_plain_calls(alone):
    tokenizer, model = tokenizer_of_demo(), olmo3()
    for task in TASKS:
        example = make_example(task, tokenizer, 5, 3)
        losses = []
        for question, answer, _ in example.questions:
            ids = example.context + question + answer
            losses.append(float(losses_of(model, ids)[-len(answer) :].mean()))
        (cell,) = alone[task]["cells"]
        assert (cell["distance"], cell["position"], cell["questions"]) == (5, 3, len(losses))
        assert cell["nats_per_token"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_state_of_olmo3_is_its_keys_and_values(alone):
    rows = alone["state"]["rows"]
    assert [row["tokens"] for row in rows] == [8, 40] and all(row["seconds_per_step"] > 0 for row in rows)
    layer = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 dimensions in float32
    for row in rows:
        keys = row["tokens"] + 3 * min(row["tokens"], WINDOW)  # one layer of four has no window
        assert 0 <= row["bytes"] - layer * keys < 200, "and a few counters"


def test_state_of_an_olmem_is_what_its_cache_says():
    cache = olmem()(torch.arange(40)[None], use_cache=True).past_key_values
    assert bytes_of(cache) == cache.nbytes > 0


@pytest.mark.parametrize("make", [olmo3, olmem])
def test_generation_and_loss_agree(make):
    """What is generated greedily is an answer each token of which is the likeliest one; any other answer is not."""
    model, tokenizer, rng = make(), tokenizer_of_demo(), random.Random(0)
    for length in (4, 40, 90):
        told: list[int] = []
        context, question = ([rng.randrange(2000) for _ in range(size)] for size in (length, 5))
        ids = [*context, *question]
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        answer = ids[-3:]
        wrong = [*answer[:-1], (answer[-1] + 1) % 2000]
        questions = [(question, each, tokenizer.decode(each).strip()) for each in (answer, wrong)]
        right, missed = ask(model, tokenizer, Example(context, questions), chunk=16, advance=told.append)
        assert (right["exact_match"], right["likeliest"]) == (1.0, 1.0)
        assert (missed["exact_match"], missed["likeliest"]) == (0.0, 0.0)
        for row, each in ((right, answer), (missed, wrong)):
            whole = losses_of(model, [*context, *question, *each])
            assert row["nats_per_token"] == pytest.approx(float(whole[-3:].mean()), abs=1e-4)
        assert sum(told) == length


# Tasks


def solve(task: str, told: str, question: str) -> str:
    """The answer, by what a text tells and a reader's reasoning, not the task's."""
    if task == "passkey":
        return re.findall(r"The pass key is (\d{5})\.", told)[-1]
    if task.startswith("niah"):
        word = re.findall(r"magic number for (\w+ \w+) mentioned", question)[0]
        return re.findall(rf"magic numbers for {word} is: (\d{{7}})\.", told)[-1]
    if task == "mqar":
        (key,) = re.findall(r"The code of the (.+?) is$", question)
        return re.findall(rf"The code of the {key} is (\d{{4}})\.", told)[-1]
    where, holds, rooms = {}, {}, {}
    for who, did, what in re.findall(r"(\w+) (\w+(?: up| down| back)?(?: to)?) the (\w+)\.", told):
        if did.endswith("to"):
            where[who] = what
            for thing in holds.get(who, ()):
                rooms[thing].append(what)
        elif did in ("dropped", "left", "discarded", "put down"):
            holds[who].remove(what)
        elif did in ("took", "got", "grabbed", "picked up"):
            holds.setdefault(who, []).append(what)
            before = rooms.setdefault(what, [])
            assert not before or before[-1] == where[who], "a thing is taken where it lies"
            if not before:
                before.append(where[who])
    if task == "qa1":
        return where[re.findall(r"Where is (\w+)\?", question)[0]]
    if task == "qa2":
        return rooms[re.findall(r"Where is the (\w+)\?", question)[0]][-1]
    ((thing, place),) = re.findall(r"Where was the (\w+) before the (\w+)\?", question)
    assert rooms[thing].count(place) == 1
    return rooms[thing][rooms[thing].index(place) - 1]


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_what_is_told(task):
    tokenizer = tokenizer_of_demo()
    answers = set()
    for number in range(12):
        held_out = number % 3 > 0
        example = make_example(task, tokenizer, 37, 23, 1, number, held_out)
        assert example == make_example(task, tokenizer, 37, 23, 1, number, held_out)
        assert example.context != make_example(task, tokenizer, 37, 23, 2, number, held_out).context
        passage = tokenizer.decode(example.context[23:-37])
        for question, answer, right in example.questions:
            assert tokenizer.decode(answer) == f" {right}"
            assert solve(task, passage, tokenizer.decode(question)) == right
            assert right not in tokenizer.decode(example.context[:23] + example.context[-37:])
            answers.add(right)
        names = [*PERSONS[not held_out], *PLACES[not held_out], *OBJECTS[not held_out], *THINGS[not held_out]]
        assert not re.search(rf"\b({'|'.join(names)})\b", tokenizer.decode(example.context)), "names of the other kind"
        longer = make_example(task, tokenizer, 200, 0, 1, number, held_out)
        assert len(longer.context) > 200 and longer.context[:20] != example.context[23:43]
    assert len(answers) > 3


def test_mqar_tells_some_keys_anew_and_others_that_are_not_asked_for():
    tokenizer = tokenizer_of_demo()
    example = make_example("mqar", tokenizer, 400, 0)
    pairs = re.findall(r"The code of the (.+?) is (\d{4})\.", tokenizer.decode(example.context[:-400]))
    after = re.findall(r"The code of the (.+?) is (\d{4})\.", tokenizer.decode(example.context[-400:]))
    assert len(pairs) == 12 and len(dict(pairs)) == 8 and len(example.questions) == 4
    assert after and not dict(after).keys() & dict(pairs).keys()


def test_what_is_no_task_or_metric_is_refused():
    tokenizer = tokenizer_of_demo()
    with pytest.raises(ValueError, match="`task` must be one of"):
        make_example("qa4", tokenizer, 1, 1)
    with pytest.raises(ValueError, match="`distance` must be at least 0"):
        make_example("qa1", tokenizer, -1, 1)
    with pytest.raises(ValueError, match="`name` must be one of"):
        path("perplexity")


def test_each_metric_has_its_card():
    for name in METRICS:
        card = Path(path(name)).with_suffix(".md").read_text(encoding="utf-8")
        assert card.startswith("---\n") and f"{name}.py" in card
