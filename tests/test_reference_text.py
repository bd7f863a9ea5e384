"""The text models of benchmarks/reference, in little: what they read, what is the same for all, and each command."""

import importlib.util
import json
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from olmem import OlmemCache
from safetensors.torch import load_file

REFERENCE = Path(__file__).parents[1] / "benchmarks/reference"
LENGTH, END = 64, 7


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(REFERENCE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield import_module
    torch.set_num_threads(threads)


@pytest.fixture
def ids():
    return torch.randint(2048, (5000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def little(load, ids):
    """A text of random tokens, small sizes, and a builder of arms of these sizes."""
    text, jobs, arms = load("text"), load("text_jobs"), load("arms")
    shape = jobs.TEXT_SMOKE.shape(2048)

    def build(name: str):
        torch.manual_seed(0)
        return arms.build(name, shape, arms.ARMS | text.ARMS).eval()

    return SimpleNamespace(text=text.Text(ids, ids[:2000], ids, END, 2048), shape=shape, build=build)


class Here:
    """Does each job at once, in this process."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@contextmanager
def here(processes):
    yield Here()


def test_long_files_train(load):
    split = load("text").split_documents
    files = [[0] * 10, [1] * 10, [2] * 3, [3] * 4, [4] * 3, [5] * 70]
    assert split(files, 0.1) == (files[1:], files[:1])
    assert split(files, 0.1, 0.4) == ([*files[:2], files[5]], files[2:5])


def test_a_batch_is_made_from_its_number_and_an_epoch_reads_each_span_once(load, little):
    text = load("text")
    stream = replace(little.text, training=torch.arange(2000))
    rows = text.TextRows(stream, 40, 256, LENGTH, seed=3, curriculum=False)
    epoch = [rows[index]["input_ids"] for index in range(rows.batches)]
    assert all(each.shape == (4, LENGTH + 1) and (each[:, 0] == END).all() for each in epoch)
    tokens = Counter(torch.cat(epoch)[:, 1:].flatten().tolist())
    assert set(tokens.values()) == {1} and len(tokens) == rows.batches * 256
    assert all((each[:, 1:].diff(dim=1) == 1).all() for each in epoch)  # contiguous
    later = rows[rows.batches + 1]["input_ids"]
    assert (rows[1]["input_ids"] == epoch[1]).all() and (later != epoch[1]).any()
    other = text.TextRows(stream, 40, 256, LENGTH, seed=4, curriculum=False)
    assert (other[1]["input_ids"] != epoch[1]).any()


def test_rows_grow_repeat_and_draw_windows(load, little):
    text = load("text")
    rows = text.TextRows(little.text, 40, 256, LENGTH, seed=0, repeats=1.0, windows=1.0, window=16, capacity=24)
    shapes = [rows[index]["input_ids"].shape for index in range(40)]
    assert shapes[0] == (16, 17) and shapes[-2] == (4, 65) and shapes[8] != shapes[7]
    assert {shape[0] for shape in shapes[8:]} >= {4, 8}  # some are short to the end
    found = rows[38]
    row = found["input_ids"][0, 1:]
    assert any((row[first : first + 8] == row[-8:]).all() for first in range(49))
    assert {int(rows[index]["window"]) for index in range(40)} == {8, 4}
    assert found["capacity"] == 24 and rows[0]["capacity"] == 6
    assert text.TextRows(little.text, 4, 256, LENGTH, seed=0, window=16)[0]["window"] == 0


@pytest.mark.parametrize("task", ["recall", "text"])
def test_arms_have_the_same_parameters_and_state(load, task):
    text, jobs, arms = load("text"), load("text_jobs"), load("arms")
    is_text = task == "text"
    shape = jobs.TextSettings().shape(2048) if is_text else load("jobs").SHAPE
    kinds, models = text.ARMS if is_text else arms.ARMS, {}
    for name in kinds:
        with torch.device("meta"):
            models[name] = arms.build(name, shape, kinds)
    parameters = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    assert max(parameters.values()) / min(parameters.values()) < 1.01
    assert 4 * max(parameters.values()) < 20e6  # bytes
    state = {name: arms.numbers(model) for name, model in models.items()}
    assert state.pop("full") is None
    convolved = state.pop("OlmoHybrid")  # what its short convolutions hold is beside its matrices
    assert max(state.values()) / min(state.values()) < 1.01 and 1 < convolved / state["window"] < 1.04


@pytest.mark.parametrize(
    "arm",
    ["window", "sinks", "memory", "recent", "selected", "selected, key_value", "all", "key_value", "half heads"],
)
def test_numbers_are_what_a_cache_holds(load, little, arm):
    model = little.build(arm)
    cache = OlmemCache(model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(little.text.held_out[None, :600], past_key_values=cache, use_cache=True)
    numbers = load("arms").numbers(model)
    slots = 2 * 32 * (3 + 1) + 4 * 6  # each ring has one that nobody reads
    assert numbers < cache.nbytes / 2 <= numbers + slots


@pytest.mark.parametrize("arm", ["all", "sinks"])
def test_a_stream_has_the_losses_of_one_call(load, little, monkeypatch, arm):
    trials = load("text_trials")
    model = little.build(arm)
    row = load("text").begun(little.text.held_out[None, :300], END)
    whole = trials.row_losses(model, row)
    monkeypatch.setattr(trials, "PIECE", 70)
    with torch.no_grad():
        pieces = list(trials.stream_losses(model, row, OlmemCache(model.config)))
    assert [each.shape[1] for each in pieces] == [70, 70, 70, 70, 20]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_octaves_are_means_of_ever_longer_parts(load):
    losses = torch.arange(10.0)[None]
    assert load("text_trials").octaves(losses, 2) == [[2, 0.5], [4, 2.5], [8, 5.5], [10, 8.5]]


class Copier(torch.nn.Module):
    """Predicts that what follows is what followed so many tokens before."""

    def __init__(self, distance: int):
        super().__init__()
        self.distance = distance

    def forward(self, input_ids, **_):
        before = input_ids.roll(self.distance - 1, dims=1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(before, 2048).float() * 20)


def test_copying_counts_what_can_be_copied_and_nothing_else(load, ids):
    copying = load("text_trials").copying
    found = copying(Copier(56), ids, LENGTH, END)
    assert found["right"] == 1 and found["perplexity"] == pytest.approx(1, abs=1e-4)
    assert copying(Copier(55), ids, LENGTH, END)["right"] < 0.1


def test_sizes_hold_for_one_step(load, little):
    model = little.build("selected")
    trainer = SimpleNamespace(trained=model)
    row, found = little.text.held_out[None, : LENGTH + 1], []
    with torch.no_grad():
        for window, capacity in ((0, 0), (8, 0), (0, 4), (0, 0)):
            with load("recipe").RecipeTrainer.sizes(trainer, window, capacity):
                found.append(load("recipe").predict(model, row, None)[0])
    assert (found[0] == found[3]).all()
    narrow, small = ((found[0] != each).any(-1).any(0) for each in found[1:3])
    assert not narrow[:8].any() and narrow[8:].any()  # the same until a window is full
    assert not small[: 16 + 4].any() and small[16 + 4 :].any()  # … and until a store is
    assert load("text_jobs").sizes(model) == (16, 16)


def test_the_lowest_loss_decides_on_a_rate(load):
    best = load("text_jobs").best_rate
    rows = [{"arm": "full", "short": True, "rate": rate, "loss": loss} for rate, loss in ((1, 5.0), (2, 4.0), (4, 6.0))]
    others = [{"arm": "window", "short": True, "rate": 1, "loss": 1.0}, {"arm": "full", "short": False, "rate": 4}]
    broken = [{"arm": "full", "short": True, "rate": 8, "loss": float("nan")}]
    assert best([*broken, *rows, *others], "full") == 2
    with pytest.raises(RuntimeError, match="no short training of full"):
        best(broken, "full")


def test_a_training_that_stops_and_goes_on_comes_to_the_same_weights(load, little, tmp_path):
    jobs = load("text_jobs")
    settings = replace(jobs.TEXT_SMOKE, steps=8, windows=0.5)

    def train(place: Path, resume: bool = False) -> dict[str, torch.Tensor]:
        model, _ = jobs.train_text(jobs.Job("all", 0, 2e-3, settings, place), little.text, resume)
        return {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    whole = train(tmp_path / "whole")
    fetch = jobs.TextRows.__getitem__

    def stops(rows, index):
        if index == 5:
            raise KeyboardInterrupt
        return fetch(rows, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.TextRows, "__getitem__", stops)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped/all-0").glob("checkpoint-*")] == ["checkpoint-4"]
    found = train(tmp_path / "stopped", resume=True)
    assert all((found[name] == weight).all() for name, weight in whole.items())


@pytest.mark.slow
def test_each_command_in_little(load, tmp_path, monkeypatch, capsys):
    for name in ("text_jobs", "distill"):
        monkeypatch.setattr(load(name), "workers", here)
    spec = importlib.util.spec_from_file_location("reference_commands", REFERENCE / "__main__.py")
    assert spec is not None and spec.loader is not None
    commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(commands)
    places = ["--folder", str(tmp_path / "models"), "--json"]
    files = {name: tmp_path / f"{name}.json" for name in ("text", "distill")}

    commands.main(["text", "--smoke", "--arms", "full;selected;OlmoHybrid;RMT", *places, str(files["text"])])
    printed, found = capsys.readouterr().out, json.loads(files["text"].read_text())
    assert "next: python benchmarks/reference distill" in printed
    assert not [row for row in found["trainings"] if "error" in row]
    assert len(found["trainings"]) == 4 * (2 + 1) and list(found["table"]) == ["full", "selected", "OlmoHybrid", "RMT"]
    selected = found["table"]["selected"]
    assert selected["rate"] in (0.002, 0.004) and set(selected) >= {"stream", "state", "off", "beside_full", "copied"}
    assert found["table"]["full"]["beside_full"][0] == 0 and "stream" not in found["table"]["full"]

    commands.main(["distill", "--smoke", *places, str(files["distill"])])
    found = json.loads(files["distill"].read_text())
    assert not [row for row in found["trainings"] if "error" in row]
    [(layers, store)] = found["table"]["stores"].items()
    assert layers == "[1]" and store["trained"] == 4 * 32 + 4  # a score of each key head, a gate of each head
    assert store["full"]["perplexity_back"] == [1, 0] and store["sinks"]["perplexity_back"] == [0, 0]
    assert set(found["table"]["streams"]) == {
        "selected", "full attention, in rows", "window of 16, 0 of them sinks", "window of 16, 4 of them sinks",
    }  # fmt: skip
    before, after = (
        load_file(tmp_path / "models" / name / "model.safetensors") for name in ("full-0", "distilled-1-0")
    )
    assert all((after[name] == weight).all() for name, weight in before.items())
    new = after.keys() - before.keys()
    assert {name.rsplit(".", 2)[1] for name in new} == {"retrieval_gate", "retrieval_score"}
    assert (after["model.layers.1.self_attn.retrieval_score.weight"] != 0).any()

    monkeypatch.setattr(commands, "TextSettings", lambda: load("text_jobs").TEXT_SMOKE)
    capsys.readouterr()
    commands.main(["evaluate", str(tmp_path / "models/selected-0")])
    tried = json.loads(capsys.readouterr().out)
    assert tried["length"]["1"] == pytest.approx(selected["length"]["1"][0], rel=1e-4)
    for file in files.values():
        commands.main(["draw", str(file)])
        assert b"perplexity" in file.with_suffix(".svg").read_bytes()
