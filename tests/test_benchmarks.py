"""The benchmarks that train, in little: what they compare is the same text for all, and is what it is said to be."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


@pytest.fixture
def training(load):
    return load("training")


def run(load, monkeypatch, capsys, tmp_path, name, *arguments) -> tuple[dict, dict]:
    """What a benchmark wrote, and the batches of each of its models."""
    training, benchmark, batches = load("training"), load(name), {}
    token_losses = training.token_losses

    def watched(model, rows):
        if model.training:
            batches.setdefault(model, []).append(rows)
        return token_losses(model, rows)

    monkeypatch.setattr(training, "token_losses", watched)
    generator = torch.Generator().manual_seed(0)
    text = training.Text(*(torch.randint(2000, (size,), generator=generator) for size in (4000, 600)))
    monkeypatch.setattr(benchmark, "load_text", lambda settings, device: text)
    monkeypatch.setattr(benchmark, "find_device", lambda: torch.device("cpu"))
    file = tmp_path / "found.json"
    benchmark.main(["--smoke", "--steps", "2", "--json", str(file), *arguments])
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert all(name in printed for name in found["table"])
    names = [(row["variant"], row["seed"]) for row in found["trainings"]]
    return found, dict(zip(names, map(torch.stack, batches.values()), strict=True))


def test_packed_text_is_whole_and_every_token_is_predicted_once(training):
    ids = training.pack([[1, 2], [], [3, 4, 5]], end=9)
    assert ids.tolist() == [1, 2, 9, 9, 3, 4, 5, 9]
    rows = training.windows(torch.arange(13), 4)
    assert rows[:, 1:].flatten().tolist() == list(range(1, 13))
    assert (rows[1:, 0] == rows[:-1, -1]).all()


def test_text_is_split_by_whole_documents(training):
    settings = replace(training.SMOKE, characters=200_000)
    texts = list(training.documents(settings.characters))
    text = training.load_text(settings, torch.device("cpu"))
    tokenizer = training.Tokenizer.from_file(str(training.TOKENIZER))
    split = []
    for ids in (text.training, text.validation):
        decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded.endswith(training.END_OF_TEXT)
        split.append(decoded.removesuffix(training.END_OF_TEXT).split(training.END_OF_TEXT))
    assert sorted(split[0] + split[1]) == sorted(texts)
    assert split[1] and len(text.validation) < 0.1 * len(text.training)


def test_a_seed_orders_the_batches_and_an_epoch_repeats_none(training):
    def starts(seed, count):
        batches = training.batches(torch.arange(1000), 10, 8, seed)
        return torch.stack([next(batches)[:, 0] for _ in range(count)])

    assert starts(0, 30).equal(starts(0, 30))
    assert not starts(0, 5).equal(starts(1, 5))
    assert len(starts(0, 12).unique()) == 12 * 8
    assert len(starts(0, 30).unique()) > 12 * 8  # the next epoch is cut elsewhere


def test_training_lowers_the_loss(training):
    settings = training.SMOKE
    ids = training.pack([torch.arange(40).tolist()] * 60, end=0)
    text = training.Text(ids, ids)
    run = training.Training(training.make_config(settings), text, settings, steps=12, seed=0)
    rates, losses = [], []
    for _ in range(12):
        rates.append(run.rate)
        losses.append(float(run.step()))
    assert losses[-1] < losses[0] - 0.5
    assert max(rates) == settings.rate and rates[0] > 0 and rates[-1] < 0.2 * settings.rate
    by_place = training.evaluate(run.model, ids, 64, 500)
    assert by_place.shape == (64,) and float(by_place.mean()) < losses[0] - 0.5


def test_projections_share_batches_and_halve_the_cache(load, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(load("projections"), "DECODING", {"cpu": (1, 64)})
    monkeypatch.setattr(load("projections"), "TIMED_CALLS", 2)
    found, batches = run(load, monkeypatch, capsys, tmp_path, "projections", "--seeds", "2")
    first = batches["separate", 0]
    assert all(rows.equal(batches["separate", seed]) for (_, seed), rows in batches.items())
    assert not first.equal(batches["separate", 1])

    table = found["table"]
    size = {name: row["bytes_per_token"] for name, row in table.items()}
    whole = size["separate"]
    assert whole == 4 * 2 * 64 * 2  # layers, tensors, width, bytes
    assert size == {
        "separate": whole,
        "key_value": whole / 2,
        "query_key": whole,
        "query_key_value": whole / 2,
        "value_difference": whole,
        "GQA-4": whole / 4,
        "GQA-4 + key_value": whole / 8,
    }
    assert table["separate"]["change"] == {"mean": 0, "deviation": 0, "count": 2}
    losses = {row["validation"] for row in found["trainings"]}
    assert len(losses) == len(found["trainings"]), "variants or seeds are one and the same model"


def test_published_figures_agree_within_two_standard_errors(load):
    projections = load("projections")
    spread = projections.Spread.of([2.0, 3.0, 4.0])
    assert spread.mean == 3 and spread.deviation == 1 and spread.error == pytest.approx(3**-0.5)
    assert [projections.verdict(spread, figure) for figure in (1.8, 1.9, 4.1, 4.2)] == [
        "ours is more",
        "agrees",
        "agrees",
        "ours is less",
    ]
    assert projections.verdict(projections.Spread.of([2.0, float("nan")]), 1.8) == "ours diverged"
    changes = {name: projections.Spread.of([figure]) for name, figure in projections.PUBLISHED.items()}
    assert "the same order" in projections.orders(changes)
    changes["key_value"], changes["query_key"] = changes["query_key"], changes["key_value"]
    assert any("key_value and query_key" in line for line in projections.orders(changes))


def test_positions_share_batches_and_differ(load, monkeypatch, capsys, tmp_path):
    found, batches = run(load, monkeypatch, capsys, tmp_path, "positions")
    assert all(rows.equal(batches["rope", 0]) for rows in batches.values())
    assert len({row["validation"] for row in found["trainings"]}) == len(found["trainings"])
    assert set(found["table"]["rope"]) == {f"{factor}× {part}" for factor in (1, 2, 4) for part in ("all", "last")}


@pytest.mark.parametrize("distance", [0, 1, 5])
def test_recall_asks_for_what_it_has_told(load, distance):
    recall = load("recall")
    ids, asked = recall.make_rows(20, distance, torch.Generator().manual_seed(3))
    assert ids.shape == (20, (distance + 1) * recall.WINDOW)
    told = ids[:, : 2 * recall.PAIRS].unflatten(1, (-1, 2))
    for row, columns in enumerate(asked.tolist()):
        pairs = dict(told[row].tolist())
        assert len(pairs) == recall.PAIRS == len({int(ids[row, column - 1]) for column in columns})
        assert all(pairs[int(ids[row, column - 1])] == int(ids[row, column]) for column in columns)
        between = ids[row, 2 * recall.PAIRS : -2 * recall.PAIRS]
        assert (between >= recall.KEYS + recall.VALUES).all()
    values = ids.gather(1, asked)
    assert (values >= recall.KEYS).all() and (values < recall.KEYS + recall.VALUES).all()
    assert len(values.unique()) > recall.VALUES // 2


def test_recall_strews_decoys_over_the_filler_behind_a_marker(load):
    recall = load("recall")
    (ids, asked), (plain, _) = (recall.make_rows(20, 9, torch.Generator().manual_seed(3), decoys=n) for n in (2, 0))
    between = ids[:, 2 * recall.PAIRS : -2 * recall.PAIRS]
    row, column = (between == recall.MARKER).nonzero(as_tuple=True)
    assert abs(len(row) / (20 * 9) - 2) < 0.3
    assert (between[row, column + 1] < recall.KEYS).all()
    value = between[row, column + 2]
    assert ((value >= recall.KEYS) & (value < recall.KEYS + recall.VALUES)).all()
    assert ((between < recall.KEYS + recall.VALUES).sum() == 2 * len(row)) and (plain < recall.MARKER).all()
    told = ids[:, : 2 * recall.PAIRS].unflatten(1, (-1, 2))
    for index, columns in enumerate(asked.tolist()):
        pairs = dict(told[index].tolist())
        assert all(pairs[int(ids[index, column - 1])] == int(ids[index, column]) for column in columns)


def test_recall_counts_right_answers(load):
    """A model that knows the row says every value; one that says the next value instead, none."""
    recall = load("recall")
    ids, asked = recall.make_rows(6, 2, torch.Generator().manual_seed(3))

    def knows(shift: int):
        def model(rows, use_cache, logits_to_keep):
            following = torch.cat((rows[:, 1:], rows[:, :1]), dim=1)[:, -logits_to_keep:]
            size = recall.KEYS + recall.VALUES + recall.FILLER
            return SimpleNamespace(logits=20.0 * torch.nn.functional.one_hot((following + shift) % size, size))

        return model

    for shift, share in ((0, 1.0), (1, 0.0)):
        loss, right = recall.answers(knows(shift), ids, asked)
        assert right.float().mean() == share and (loss < 0.01) == (shift == 0)
