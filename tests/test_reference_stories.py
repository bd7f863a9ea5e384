"""The reference models that read stories, in little: texts tell what is asked, and a run writes what it found."""

import json
import runpy
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from olmem_convert.metrics import recall_tasks

REFERENCE = Path(__file__).parents[1] / "benchmarks" / "reference"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(REFERENCE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield import_module
    torch.set_num_threads(threads)


@pytest.fixture
def stories(load):
    return load("stories")


def places_of(words: list[str], subject: str) -> list[str]:
    """The places where a thing has been, or a person, one after the other, as the words of a story tell it."""
    place, holder, traces = {}, {}, {}
    for sentence in " ".join(words).split(" . "):
        parts = sentence.split()
        who, what = parts[0], parts[-1]
        verb = " ".join(parts[1:-2])
        if verb in recall_tasks.MOVE:
            place[who] = what
            traces.setdefault(who, []).append(what)
            for thing in (thing for thing, held_by in holder.items() if held_by == who):
                traces[thing].append(what)
        elif verb in recall_tasks.TAKE:
            holder[what] = who
            traces.setdefault(what, [place[who]])
        else:
            assert verb in recall_tasks.DROP and holder.pop(what) == who
    return traces[subject]


@pytest.mark.parametrize("task", ("qa1", "qa2", "qa3"))
def test_the_answers_to_a_story_follow_from_its_sentences(stories, task):
    source, tokenizer = stories.Stories(task, 3, 2**12), stories.make_tokenizer()
    texts = source.make(40, 300, sentences=6, gaps=(0,), asked=(task, "qa1"))
    for ids, counts in zip(texts.ids, texts.counts, strict=True):
        words = tokenizer.convert_ids_to_tokens(ids.tolist())
        people = [index for index, word in enumerate(words) if word in recall_tasks.PERSONS[0]]
        asked = words.index("Where")
        first, last = people[0], max(index for index in people if index < asked)
        story = words[first : words.index(".", last)]
        answers = tokenizer.convert_ids_to_tokens(ids[texts.asked].tolist())
        subject = words[asked + (2 if task == "qa1" else 3)]
        traces = places_of(story, subject)
        if task == "qa3":
            assert words[asked + 6] == traces[-1] and traces.count(traces[-1]) == 1
        assert answers[0] == traces[-2 if task == "qa3" else -1]
        assert counts[0]


def test_a_story_tells_of_each_person_once_if_asked_to(stories):
    worlds = stories.live(50, 4, handles=False, random=np.random.default_rng(0), again=False)
    assert (np.sort(worlds.person, axis=1) == np.arange(4)).all()


@pytest.mark.parametrize("task", ("passkey", "niah_single_1", "qa1", "qa2", "qa3"))
def test_texts_have_the_words_of_the_tasks_that_others_evaluate(stories, task):
    """All words of such a text are known, and questions differ in names and numbers only."""
    tokenizer = stories.make_tokenizer()
    example = recall_tasks.make_example(task, tokenizer, 100, 50, seed=4, held_out=False)
    question, answer, _ = example.questions[0]
    other = [*example.context, *question, *answer]
    assert tokenizer.unk_token_id not in other
    text = stories.Stories(task, 1, 2**12).make(1, len(other), np.array([0.5])).ids[0]
    asked = len(question) + len(answer)
    ours, theirs = (tokenizer.convert_ids_to_tokens(ids[-asked:]) for ids in (text.tolist(), other))
    names = {*stories.PERSONS, *stories.PLACES, *stories.OBJECTS, *stories.THINGS, *recall_tasks.KINDS, *"0123456789"}
    assert [word not in names and word for word in ours] == [word not in names and word for word in theirs]


def test_a_passage_stands_at_its_depth_in_filler_that_ends_with_sentences(stories):
    source, tokenizer = stories.Stories("passkey", 0, 2**12), stories.make_tokenizer()
    texts = source.make(3, 200, np.array([0.0, 0.5, 1.0]))
    begins = []
    for ids in texts.ids:
        words = tokenizer.convert_ids_to_tokens(ids.tolist())
        begins.append(words.index("pass") - 1)
        number = words[begins[-1] + 4 : begins[-1] + 9]
        assert words[-5:] == number == tokenizer.convert_ids_to_tokens(ids[texts.asked].tolist())
        assert begins[-1] == 0 or words[begins[-1] - 1] == "."
        assert words[-15] == "What" and words[-16] == "."
    assert begins[0] == 0 and begins[2] == 200 - 15 - 23 and abs(begins[1] - begins[2] / 2) <= 1


def test_texts_without_room_are_refused(stories):
    with pytest.raises(ValueError, match="room for"):
        stories.Stories("qa3", 0, 2**12).make(2, 40)
    with pytest.raises(ValueError, match="`task` must be one of"):
        stories.Stories("qa9", 0)


def test_what_a_model_writes_is_read_as_it_was_told(stories):
    tokenizer, text = stories.make_tokenizer(), "The pass key is 48213. What is the pass key? One is: 7."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[4:9]) == "48213"


def test_training_begins_with_the_first_stage_and_leaves_the_sizes_of_the_model(load, stories):
    training = load("story_training")
    recipe = training.Recipe(steps=2, tokens=256)
    task = training.TASKS["qa1"]
    model, log = training.train(task, stories.Stories("qa1", 0, 2**12), recipe, 0, "cpu")
    assert (log.steps, log.stage, log.reached) == (2, 0, {})
    assert model.config.sliding_window == task.fields["sliding_window"]
    assert model.config.retrieval_capacity == task.fields["retrieval_capacity"]


def test_a_training_that_loses_what_it_knew_returns_what_it_had(load, stories, monkeypatch):
    training, called = load("story_training"), iter(range(100))
    measure = training.measure

    def collapse(model, inputs):
        return measure(model, inputs)[0], torch.tensor(float(next(called) < 10))

    def train(steps):
        recipe = training.Recipe(steps=steps, tokens=96)
        return training.train(
            training.TASKS["niah_single_1"], stories.Stories("niah_single_1", 0, 2**12), recipe, 0, "cpu"
        )

    monkeypatch.setattr(training, "measure", collapse)
    monkeypatch.setattr(training, "ENOUGH", 2.0)
    long, log = train(21)
    called = iter(range(100))
    short, _ = train(14)
    assert (log.kept, log.best, log.curve[-1][3]) == (10, 1.0, 0.0)
    assert all(torch.equal(weight, short.state_dict()[name]) for name, weight in long.state_dict().items())


@pytest.mark.slow
def test_a_run_writes_what_it_tried(load, tmp_path, capsys):
    file = tmp_path / "found.json"
    arguments = ["stories", "--jobs", "passkey;qa1:two", "--seeds", "1", "--steps", "1", "--tokens", "128"]
    arguments += ["--rows", "1", "--most", "4096", "--processes", "1", "--trial-seconds", "60"]
    command = runpy.run_path(str(REFERENCE / "__main__.py"))["main"]
    command([*arguments, "--folder", str(tmp_path / "run"), "--json", str(file)])
    found = json.loads(file.read_text())
    assert [row["job"] for row in found["trainings"]] == ["passkey", "qa1:two"]
    assert not any("error" in row for row in found["trainings"])
    assert set(found["table"]["passkey"]) >= {"length", "off", "recall_tasks"}
    assert "next:" in capsys.readouterr().out
    command(["evaluate", str(tmp_path / "run" / "passkey-0"), "--task", "passkey", "--rows", "1"])
    tried = json.loads(capsys.readouterr().out)["length"]
    assert tried == {"4096": found["table"]["passkey"]["length"]["4096"][0]}
    command(["time", str(tmp_path / "run" / "passkey-0"), "--task", "passkey", "--most", "8192"])
    assert set(json.loads(capsys.readouterr().out)["state"]) == {"4096"}
    command(["draw", str(file)])
    assert file.with_suffix(".svg").read_bytes().startswith(b"<?xml")
