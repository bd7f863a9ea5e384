"""What is evaluated: the loss on texts is that of a plain loop over tokens, recall and state are written, a run that is
stopped goes on, and what does not fit is refused."""

import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert.checkpoints import edit_json, load_weights, save_weights, snapshot, source
from olmem import OlmemConfig, OlmemForCausalLM
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, EvaluateOptions, card, convert, evaluate
from olmem_convert.cli import app
from olmem_convert.commands import measuring
from olmem_convert.metrics import recall_tasks
from olmem_convert.metrics.perplexity_stream import figures
from olmem_convert.options import TASKS
from olmem_convert.publish.model_card import MARK, check_card
from olmem_convert.publish.release import check_kind
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

TEXT = 'def f(x):\n    """Ünïcode × 漢字."""\n    return [y for y in range(x) if y % 2]\n'
WINDOW = 8
MEMORY = {
    **{"num_memory_tokens": 2, "memory_segment_length": 8, "memory_gate_init": -2.0, "retrieval_gate_init": 0.0},
    **{"retrieval_layers": [1], "retrieval_top_k": 4, "retrieval_capacity": 32},
}


@pytest.fixture(scope="module")
def folders(converted, tmp_path_factory) -> dict[str, Path]:
    """The demo with a short window and everything on, and as it is."""
    out = tmp_path_factory.mktemp("evaluated") / "memory"
    convert(source("demo"), out, ConvertOptions(memory=MEMORY, verify=False))
    edit_json(out / "config.json", sliding_window=WINDOW, num_sink_tokens=2)
    return {"memory": out, "plain": converted("demo")}


@pytest.fixture
def out(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["plain"], tmp_path / "out"))


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.py").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.py"


def ids_of(folder: Path, text: str = TEXT) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def one_at_a_time(folder: Path, ids: list[int], window: int | None = None, **fields) -> list[float]:
    """The loss of each token but the first, by a call without a cache of all before it, or of what of that is in its
    own window, where those do not see one another."""
    model = OlmemForCausalLM.from_pretrained(folder, **fields).eval()
    losses = []
    for length in range(1, len(ids)):
        first = (length - 1) // window * window if window else 0
        logits = model(torch.tensor([ids[first:length]]), use_cache=False).logits[0, -1]
        losses.append(-float(logits.double().log_softmax(-1)[ids[length]]))
    return losses


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def refused(out: Path, texts: list[Path], *words: str, **options) -> None:
    before = snapshot(out)
    with pytest.raises(CheckpointError) as caught:
        evaluate(out, texts, EvaluateOptions(**options))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value) and snapshot(out) == before


@pytest.mark.parametrize("name", ["memory", "plain"])
def test_loss_is_that_of_tokens_one_at_a_time(name, folders, text, tmp_path):
    out = Path(shutil.copytree(folders[name], tmp_path / "out"))
    ids = ids_of(out)
    losses = one_at_a_time(out, ids)
    window = {"memory": WINDOW, "plain": 256}[name]
    assert len(ids) > 3 * WINDOW
    for chunk in (1, 7, 512):
        report = evaluate(out, [text], EvaluateOptions(chunk=chunk, memory=["on"]))
        (row,) = report["texts"]
        assert (report["window"], report["memory"]) == (window, name == "memory")
        assert abs(row["nats_per_token"] - mean(losses)) < 1e-5
        assert row["perplexity"] == math.exp(row["nats_per_token"])
        num_bytes = len(TEXT.encode()) - len(b"def")
        assert abs(row["bits_per_byte"] - sum(losses) / math.log(2) / num_bytes) < 1e-5
        assert abs(row["inside"]["nats_per_token"] - mean(losses[:window])) < 1e-5
        if name == "memory":
            assert abs(row["one_to_four"]["nats_per_token"] - mean(losses[window : 4 * window])) < 1e-5
            assert abs(row["further"]["nats_per_token"] - mean(losses[4 * window :])) < 1e-5
        else:
            assert row["one_to_four"] == row["further"] == {"tokens": 0, "nats_per_token": None}
        for place in row["positions"]:
            inside = losses[place["from"] - 1 : 2 * place["from"] - 1]
            assert place["tokens"] == len(inside) and place["nats_per_token"] == pytest.approx(mean(inside), rel=1e-5)
        assert sum(place["tokens"] for place in row["positions"]) == row["tokens"] - 1 == len(losses)


def test_memory_is_on_off_and_reset_at_each_window(folders, text, tmp_path):
    out = Path(shutil.copytree(folders["memory"], tmp_path / "out"))
    rows = {row["memory"]: row for row in evaluate(out, [text], EvaluateOptions(chunk=7))["texts"]}
    ids = ids_of(out)
    off = one_at_a_time(out, ids, num_memory_tokens=0, retrieval_layers=[], memory_gate_init=None)
    losses = {"on": one_at_a_time(out, ids), "off": off, "reset": one_at_a_time(out, ids, WINDOW)}
    assert rows.keys() == losses.keys()
    for memory, row in rows.items():
        assert abs(row["nats_per_token"] - mean(losses[memory])) < 1e-5
        assert abs(row["further"]["nats_per_token"] - mean(losses[memory][4 * WINDOW :])) < 1e-5
    assert len({round(row["nats_per_token"], 4) for row in rows.values()}) == 3
    card = (out / "README.md").read_text()
    assert all(f"| {memory} | {row['tokens']} | {row['nats_per_token']:.5g} |" in card for memory, row in rows.items())
    assert card.count("name: nats per token") == 1, "the model's own figures are those with its memory"


def test_report_says_what_was_measured(out, text):
    report = evaluate(out, [text], EvaluateOptions(max_tokens=30))
    assert json.loads((out / "evaluation.json").read_text()) == report
    (row,) = report["texts"]
    assert (row["name"], row["bytes"], row["tokens"]) == ("text.py", len(TEXT.encode()), 30)
    assert row["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    files = snapshot(out)
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    assert report["sha256"] == {name: files[name] for name in names}
    assert (report["dtype"], report["attention"], report["bos_token"]) == ("float32", "sdpa", False)
    assert report["max_tokens"] == 30 and report["versions"]["torch"] == torch.__version__


def test_bytes_are_those_of_the_tokens_read(out, text):
    (row,) = evaluate(out, [text], EvaluateOptions(max_tokens=12))["texts"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = ids_of(out)[:12]
    nats = row["nats_per_token"] * 11
    read = len(tokenizer.decode(ids[1:]).encode())
    assert "\ufffd" not in tokenizer.decode(ids) and row["bits_per_byte"] == pytest.approx(nats / math.log(2) / read)


def test_bos_is_read_first_where_the_tokenizer_gives_one(out, text):
    (out / "verification.json").unlink()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end = "<|endoftext|>"
    pairs = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=pairs)
    tokenizer.save(str(out / "tokenizer.json"))
    edit_json(out / "tokenizer_config.json", bos_token=end)
    report = evaluate(out, [text])
    ids = [pairs[0][1], *ids_of(out)]
    assert report["bos_token"] and report["texts"][0]["tokens"] == len(ids)
    losses = one_at_a_time(out, ids)
    assert abs(report["texts"][0]["nats_per_token"] - mean(losses)) < 1e-5
    assert abs(report["texts"][0]["bits_per_byte"] - sum(losses) / math.log(2) / len(TEXT.encode())) < 1e-5


@pytest.mark.parametrize(("window", "inside"), [(None, None), (1, 1.0), (2, 1.5), (5, 3.0), (9, 3.0)])
def test_figures_by_hand(window, inside):
    made = figures([torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)], 10, window)
    assert made["nats_per_token"] == 3 and made["bits_per_byte"] == pytest.approx(1.5 / math.log(2))
    assert [(place["from"], place["tokens"], place["nats_per_token"]) for place in made["positions"]] == [
        (1, 1, 1.0),
        (2, 2, 2.5),
        (4, 2, 4.5),
    ]
    assert (made["inside"] and made["inside"]["nats_per_token"]) == inside
    if window == 1:
        assert made["one_to_four"] == {"tokens": 3, "nats_per_token": 3.0}
        assert made["further"] == {"tokens": 1, "nats_per_token": 5.0}
    both = figures([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 6.0])], 8, 2)
    assert both["tokens"] == 7 and both["nats_per_token"] == pytest.approx(3.2) and both["further"]["tokens"] == 0
    assert both["inside"] == {"tokens": 4, "nats_per_token": 2.5} and both["one_to_four"]["nats_per_token"] == 6
    assert [place["nats_per_token"] for place in both["positions"]] == [2.0, 4.0]


def test_card_has_the_figures_at_once(out, text):
    card(out, CardOptions(license="mit"))
    (row,) = evaluate(out, [text])["texts"]
    check_card(out)
    assert f"| `text.py` | {row['tokens']} | {row['nats_per_token']:.5g} |" in (out / "README.md").read_text()


def test_card_of_ones_own_stays(out, text):
    (out / "README.md").write_text("mine")
    evaluate(out, [text])
    assert (out / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least 2 tokens (got 0"),
        (b"x", "at least 2 tokens (got 1"),
        (b"caf\xe9 and more", "UTF-8"),
        ("def f".encode("utf-16"), "UTF-8"),
        (None, "must exist"),
        (..., "must be readable"),
    ],
    ids=["empty", "one token", "latin-1", "utf-16", "missing", "folder"],
)
def test_text_that_is_not_fit(content, words, out, text):
    if not isinstance(content, bytes):
        text.unlink()
        if content is ...:
            text.mkdir()
    else:
        text.write_bytes(content)
    refused(out, [text], words, "text.py")


def test_options_that_are_not_fit(out, text, tmp_path):
    (tmp_path / "b").mkdir()
    other = Path(shutil.copy(text, tmp_path / "b"))
    refused(out, [], "`text` must be given")
    refused(out, [text, other], "a name of its own")
    refused(out, [text], "`max_tokens`", max_tokens=1)
    refused(out, [text], "`chunk`", chunk=0)
    refused(out, [text], "`memory` must be one of", memory=["of"])
    refused(out, [], "`memory` must be given with a text", "add --text FILE", memory=["off"], tasks=["passkey"])
    refused(out, [], "`task` must be one of passkey", tasks=["qa4"])
    refused(out, [], "`distance` must be at least 0", tasks=["qa1"], distances=[5, -1])
    refused(out, [], "`state` must be at least 1", state=[0])


def test_folder_that_is_not_fit(out, text, tmp_path):
    (out / "verification.json").unlink()
    (out / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused(out, [text], "must have a tokenizer", "`olmem tokenizer ")
    (out / "tokenizer.json").write_text("{}")
    refused(out, [text], "tokenizer.json")
    shutil.move(tmp_path / "tokenizer.json", out / "tokenizer.json")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(tokenizer).replace('"id": 2047', '"id": 2048'))
    weights = load_weights(out)
    weights["model.norm.weight"][0] = float("nan")
    save_weights(out, weights)
    refused(out, [text], "the loss on text.py must be finite")
    (out / "model.safetensors").unlink()
    refused(out, [text], "must hold its weights in safetensors")
    edit_json(out / "config.json", model_type="olmo2")
    refused(out, [text], "`OUT` must be an Olmem folder")
    refused(tmp_path / "nothing", [text], "`OUT` must be a converted folder")


def test_token_that_the_model_has_not(out, tmp_path):
    (out / "verification.json").unlink()
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=2048, content="<|more|>"))
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "more.txt").write_text("a<|more|>")
    refused(out, [tmp_path / "more.txt"], "`vocab_size` must cover", "2048")


def test_no_code_of_the_folder_runs(out, text, tmp_path):
    canary = tmp_path / "ran"
    line = f"open({str(canary)!r}, 'w')\n"
    for path in out.glob("*.py"):
        path.write_text(line + path.read_text())
    (out / "tokenization_x.py").write_text(line + "class X: pass\n")
    edit_json(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})
    try:
        evaluate(out, [text])
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not canary.exists()


def test_interrupted_write_leaves_the_evaluation(out, text, monkeypatch):
    evaluate(out, [text], EvaluateOptions(max_tokens=20))
    before = snapshot(out)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, [text], EvaluateOptions(max_tokens=30))
    assert snapshot(out) == before


def test_weights_of_bfloat16_are_measured_as_they_are(text, tmp_path):
    convert(source("demo"), tmp_path / "out", ConvertOptions(dtype="bfloat16", verify=False))
    assert evaluate(tmp_path / "out", [text], EvaluateOptions(max_tokens=20))["dtype"] == "bfloat16"


def test_command(out, text, tmp_path):
    (tmp_path / "other.txt").write_text("for i in range(10):\n    print(i)\n")
    command = ["evaluate", str(out), "--text", str(text), "--text", str(tmp_path / "other.txt"), "--max-tokens", "30"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("text.py: ") and lines[0].endswith(" bits per byte (30 tokens)")
    assert lines[1].startswith("other.txt: ") and lines[2] == f"wrote {out / 'evaluation.json'}"
    assert lines[3:] == [f"next: `olmem card {out} --license ID` names the license, which publishing needs"]
    more = ["--memory", "reset", "--task", "qa1", "--distance", "8", "--position", "2"]
    more += ["--questions", "1", "--seed", "3", "--state", "9", "--json"]
    result = CliRunner().invoke(app, [*command, *more])
    report = json.loads(result.stdout)
    assert report == json.loads((out / "evaluation.json").read_text())
    assert [(row["name"], row["memory"]) for row in report["texts"]] == [("text.py", "reset"), ("other.txt", "reset")]
    (recall,), (state,) = report["recall"], report["state"]
    assert (recall["task"], recall["questions"], recall["seed"], state["tokens"]) == ("qa1", 1, 3, 9)
    assert [(cell["distance"], cell["position"]) for cell in recall["cells"]] == [(8, 2)]
    for wrong, code in ((["evaluate", str(out)], 1), ([*command[:4], "--max-tokens", "1"], 2)):
        assert CliRunner().invoke(app, wrong).exit_code == code
    result = CliRunner().invoke(app, ["evaluate", str(out), "--text", str(tmp_path / "none")])
    assert result.exit_code == 1 and result.stderr.startswith("error: `none` must exist")


def test_overwriting_takes_an_evaluation_along(out, text):
    evaluate(out, [text], EvaluateOptions(max_tokens=20))
    convert(source("demo"), out, ConvertOptions(overwrite=True, verify=False))
    assert not (out / "evaluation.json").exists() and "## Evaluation" not in (out / "README.md").read_text()


def test_a_text_that_takes_longer_than_it_may_is_refused(out, text):
    text.write_text(TEXT * 20)
    refused(out, [text], "`seconds` must suffice", "--max-tokens", seconds=1e-9)
    refused(out, [text], "`seconds` must be positive (got 0)", seconds=0)


def test_a_script_is_told_how_far_reading_has_come(out, text):
    told: list[dict] = []
    evaluate(out, [text], EvaluateOptions(chunk=1), tell=told.append)
    assert told[-1]["tokens"] == told[-1]["of"] == len(ids_of(out)) and "seconds_left" in told[-1]


RECALL = {"tasks": ["passkey", "qa1"], "distances": [8, 30], "positions": [4], "questions": 1, "state": [16, 40]}


def test_recall_state_plots_and_card_are_those_of_the_report(out, text):
    card(out, CardOptions(license="mit"))
    report = evaluate(out, [text], EvaluateOptions(max_tokens=40, **RECALL))
    assert json.loads((out / "evaluation.json").read_text()) == report and "_interpreter_path" not in report
    assert report["_evaluate_version"] and report["_timestamp"]
    assert [row["task"] for row in report["recall"]] == ["passkey", "qa1"]
    for row in report["recall"]:
        assert [(cell["distance"], cell["position"]) for cell in row["cells"]] == [(8, 4), (30, 4)]
        assert row["nats_per_token"] == pytest.approx(mean([cell["nats_per_token"] for cell in row["cells"]]))
    assert [row["tokens"] for row in report["state"]] == [16, 40]
    names = {f"evaluation_{plot}.{form}" for plot in ("perplexity", "recall", "state") for form in ("png", "svg")}
    assert report["plots"].keys() == names
    for name, sha256 in report["plots"].items():
        content = (out / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") and len(content) > 5000
    readme = (out / "README.md").read_text()
    for row in report["recall"]:
        shares = f"{row['exact_match']} | {row['likeliest']} | {row['nats_per_token']:.5g} |"
        assert f"| `{row['task']}` | 2 | {shares}" in readme
    for row in report["state"]:
        assert f"| {row['tokens']} | {row['bytes']} |" in readme
    assert readme.count("![evaluation_") == 3 and readme.count("name: exact match") == 2
    check_card(out)
    for name in names:
        check_kind(out / name)
    (out / "README.md").write_text(readme.replace("value: 0.0\n", "value: 1.0\n").replace(MARK, "mine"))
    with pytest.raises(CheckpointError, match="must have the figures of"):
        check_card(out)
    (out / "README.md").write_text(readme)
    (out / "evaluation_recall.png").write_bytes((out / "evaluation_state.png").read_bytes())
    with pytest.raises(CheckpointError, match=r"evaluation_recall\.png"):
        check_card(out)
    (out / "evaluation_recall.png").write_text("no picture")
    with pytest.raises(CheckpointError, match="no picture"):
        check_kind(out / "evaluation_recall.png")
    (out / "evaluation.json").unlink()
    with pytest.raises(CheckpointError, match="must lie beside its plots"):
        card(out)
    evaluate(out, [text], EvaluateOptions(max_tokens=40))
    check_card(out)
    assert {path.name for path in out.glob("evaluation_*")} == {name for name in names if "perplexity" in name}
    convert(source("demo"), out, ConvertOptions(overwrite=True, verify=False))
    assert not list(out.glob("evaluation*"))


def test_a_run_that_is_stopped_goes_on(out, text, monkeypatch):
    compute, asked = measuring.computed, []
    options = EvaluateOptions(max_tokens=40, tasks=["passkey"], distances=[8, 30], positions=[4], questions=1)

    def stopped(metric, *names, **given):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(metric.__name__)
        return compute(metric, *names, **given)

    def counted(metric, *names, **given):
        asked.append(metric.__name__)
        return compute(metric, *names, **given)

    before, told = snapshot(out), []
    monkeypatch.setattr(measuring, "computed", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, [text], options)
    assert snapshot(out) == before and asked == ["PerplexityStream", "LongRecall"]
    monkeypatch.setattr(measuring, "computed", counted)
    journal = out.with_name(".out.evaluation.json")
    kept = journal.read_bytes()

    def again(**changes) -> tuple[dict, list[str]]:
        asked.clear()
        report = evaluate(out, [text], EvaluateOptions(**(vars(options) | changes)), say=told.append)
        assert not journal.exists()
        return report, list(asked)

    report, computed = again()
    assert computed == ["LongRecall"] and told[0].startswith("note: 2 of 3 parts were measured")
    whole, computed = again()
    assert len(computed) == 3 and whole["texts"] == report["texts"] and whole["recall"] == report["recall"]
    journal.write_bytes(kept)
    assert again(seed=1)[1] == ["LongRecall", "LongRecall"], "a changed setting is measured anew"
    journal.write_bytes(kept)
    weights = load_weights(out)
    weights["model.norm.weight"][0] += 1
    (out / "verification.json").unlink()
    save_weights(out, weights)
    assert len(again()[1]) == 3, "a changed model is measured anew"


def test_what_is_finished_is_found_without_the_part_that_cannot_be_measured(out, text, monkeypatch):
    """It was thrown away. A folder of which nothing can be measured has no file left beside it."""
    compute, journal = measuring.computed, out.with_name(".out.evaluation.json")
    options, told = EvaluateOptions(tasks=["passkey"], distances=[8]), []

    def computed(metric, *names, **given):
        if metric.__name__ == "PerplexityStream":
            return compute(metric, *names, **given)
        raise CheckpointError("the loss must be finite")

    monkeypatch.setattr(measuring, "computed", computed)
    with pytest.raises(CheckpointError, match="must be finite"):
        evaluate(out, [], options)
    assert not journal.exists()
    with pytest.raises(CheckpointError, match="must be finite"):
        evaluate(out, [text], options)
    monkeypatch.setattr(measuring, "computed", None)
    assert evaluate(out, [text], replace(options, tasks=[]), say=told.append)["texts"]
    assert told[0].startswith("note: 1 of 1 parts were measured") and not journal.exists()


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation_perplexity.svg", "evaluation_recall.png", "README.md"])
def test_a_folder_in_the_place_of_what_is_written_is_found_first(name, out, text, monkeypatch):
    """It was found when all was measured, and what was finished stayed beside the folder."""
    monkeypatch.setattr(measuring, "computed", None)
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    refused(out, [text], f"`{name}` must be a file", "move it away")


def test_a_snapshot_of_the_hub_s_cache_is_evaluated(out, text, tmp_path):
    """An error said that the links in it had "changed since it was checked", at every run."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "a1"
    snapshot.parent.mkdir(parents=True)
    out.rename(tmp_path / "models--org--name" / "blobs")
    snapshot.mkdir()
    for path in (tmp_path / "models--org--name" / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    report = evaluate(snapshot, [text], EvaluateOptions(max_tokens=40))
    assert json.loads((snapshot / "evaluation.json").read_text()) == report
    assert os.listdir(snapshot.parent) == ["a1"]


def test_without_a_window_there_is_no_reset(out, text):
    memory = {"num_memory_tokens": 2, "memory_segment_length": 8}
    config = OlmemConfig.from_pretrained(out, layer_types="full_attention", **memory)
    assert measuring.Measured(out, config, [text], EvaluateOptions()).modes == ["on", "off"]
    with pytest.raises(CheckpointError, match="`memory` must not be reset"):
        measuring.Measured(out, config, [text], EvaluateOptions(memory=["reset"]))


def test_the_command_knows_each_task():
    assert tuple(recall_tasks.TASKS) == TASKS


def test_libraries_that_are_missing_are_named(out, text, monkeypatch):
    evaluating = sys.modules["olmem_convert.commands.evaluating"]
    monkeypatch.setattr(evaluating, "find_spec", lambda name: None)
    refused(out, [text], "`evaluate` must be installed", "olmem[evaluate]")
