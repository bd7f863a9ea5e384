"""The reference models' recall of pairs, in little: texts, curriculum, and each command."""

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks/reference"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module


@pytest.mark.parametrize(("pairs", "length", "before"), [(4, 16, 0), (16, 128, 24), (256, 1024, 64)])
def test_what_is_asked_was_told_and_decoys_are_not(load, pairs, length, before):
    module = load("pairs")
    texts = module.make_texts(3, pairs, length, torch.Generator().manual_seed(0), before)
    assert texts.ids.shape == (3, length)
    assert len(texts.asked) == min(pairs, module.ASKED)
    for row in texts.ids.tolist():
        told = dict(zip(row[before : before + 2 * pairs : 2], row[before + 1 : before + 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        for column in texts.asked.tolist():
            assert told[row[column - 1]] == row[column]
        between = row[before + 2 * pairs : length - 2 * len(texts.asked)]
        for index, token in enumerate(between):
            if token < module.KEYS:
                assert between[index - 1] == module.MARKER


def test_batches_are_made_from_their_numbers_and_grow_with_the_stage(load):
    module = load("pairs")
    texts = module.PairTexts(100, 2048, 0, capacity=640)
    assert all(texts[index]["input_ids"].shape == (128, 16) for index in range(4))
    texts.begins += [10] * (texts.stages - 2)
    assert texts[8]["input_ids"].shape == (128, 16)
    batch, again = texts[20], texts[20]
    assert batch["input_ids"].shape == (1, 2048)
    assert bool(batch["longest"]) and not bool(texts[21]["longest"])
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert all(0 < int(texts[index]["capacity"]) <= 640 for index in range(40))


def test_the_curriculum_goes_on_when_texts_are_answered(load):
    recipe = load("recipe")
    texts = SimpleNamespace(begins=[0], stages=5)
    curriculum = recipe.Curriculum(texts, patience=50)

    def steps(first: int, last: int, share: float) -> None:
        for step in range(first, last + 1):
            curriculum.add(torch.tensor(share))
            curriculum.on_step_end(None, SimpleNamespace(global_step=step), None)

    steps(1, 100, 0.5)
    assert texts.begins == [0]
    steps(101, 110, 0.95)
    assert texts.begins == [0, 112]
    steps(111, 120, 0.95)
    assert texts.begins == [0, 112, 122]
    steps(121, 300, 0.5)
    assert texts.begins == [0, 112, 122]
    steps(301, 310, 0.95)
    assert texts.begins == [0, 112, 122, 312]
    steps(311, 370, 0.5)  # the fourth stage ends, answered or not
    assert texts.begins == [0, 112, 122, 312, 372]


def test_a_training_that_stops_goes_on_with_its_stage(load, monkeypatch, tmp_path):
    arms, pairs, recipe = load("arms"), load("pairs"), load("recipe")
    monkeypatch.setattr(recipe, "CHECKED", 2)
    monkeypatch.setattr(recipe, "THROUGH", -1.0)
    shape = arms.Shape(pairs.VOCABULARY, width=32, heads=2, window=16, length=64, capacity=64, memory_tokens=4)

    def train(folder, last=100, resume=False):
        class Texts(pairs.PairTexts):
            def __getitem__(self, index):
                if index == last:
                    raise KeyboardInterrupt
                return super().__getitem__(index)

        torch.manual_seed(0)
        model, texts = arms.build("all", shape), Texts(16, 128, 0, 64)
        recipe.train(model, recipe.Recipe(memory_noise=1.0), texts, folder, 0, resume, silent=True)
        return model.state_dict(), texts.begins

    whole, begins = train(tmp_path / "whole")
    assert len(begins) > 3
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", last=11)
    found, again = train(tmp_path / "stopped", resume=True)
    assert again == begins
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_a_training_is_tried_drawn_and_evaluated(load, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    main = runpy.run_path(str(FOLDER / "__main__.py"))["main"]
    file, folder = tmp_path / "found.json", tmp_path / "models"
    few = ["--arms", "selected", "--steps", "12", "--tokens", "128", "--processes", "1", "--most", "1", "--rows", "1"]
    main(["train", *few, "--seeds", "1", "--folder", str(folder), "--json", str(file)])
    found = json.loads(file.read_text())
    (row,) = found["trainings"]
    assert row["arm"] == "selected" and row["begins"][0] == 0 and len(row["curve"]) > 0
    assert found["table"]["selected"]["length"]["1"] == [row["length"]["1"], 0.0]
    main(["draw", str(file)])
    assert "<svg" in file.with_suffix(".svg").read_text()
    main(["evaluate", str(folder / "selected-0"), "--most", "1", "--rows", "1"])
    assert json.loads(capsys.readouterr().out.split("found.svg\n")[-1])["length"]["1"] == row["length"]["1"]


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["selected", "recent", "memory"])
def test_a_replayed_step_has_the_gradients_of_one_that_is_not(load, arm):
    arms, captured, pairs = load("arms"), load("captured"), load("pairs")
    torch.manual_seed(0)
    shape = arms.Shape(pairs.VOCABULARY, width=64, heads=2, window=16, length=256, capacity=32, memory_tokens=4)
    model = arms.build(arm, shape).cuda()

    def run(inputs):
        ids, asked = inputs
        logits = model(input_ids=ids, logits_to_keep=asked - 1, use_cache=False).logits
        return (torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, asked].flatten()),)

    passes = captured.Passes(model, run)
    for seed in range(3):
        texts = pairs.make_texts(4, 16, 1024, torch.Generator().manual_seed(seed))
        inputs = texts.ids.cuda(), texts.asked.cuda()
        (loss,) = passes.step(0, inputs)
        replayed = [weight.grad.clone() for weight in model.parameters()]
        expected = run(inputs)[0]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for found, wanted in zip(replayed, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
