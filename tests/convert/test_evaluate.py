"""The loss on plain texts: equal to a plain loop over tokens, whatever the calls, and of texts that are fit for it."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from convert.checkpoints import edit_json, load_weights, save_weights, snapshot, source
from olmem import OlmemForCausalLM
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, EvaluateOptions, card, convert, evaluate
from olmem_convert.cli import app
from olmem_convert.commands.evaluating import figures
from olmem_convert.publish.model_card import check_card
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

TEXT = 'def f(x):\n    """Ünïcode × 漢字."""\n    return [y for y in range(x) if y % 2]\n'
WINDOW = 12
MEMORY = {
    **{"num_memory_tokens": 2, "memory_segment_length": 8, "memory_gate_init": -2.0, "retrieval_gate_init": 0.0},
    **{"retrieval_layers": [1], "retrieval_top_k": 4, "retrieval_capacity": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The demo with a short window and everything on, and as it is."""
    top = tmp_path_factory.mktemp("evaluated")
    convert(source("demo"), top / "memory", ConvertOptions(memory=MEMORY, verify=False))
    edit_json(top / "memory" / "config.json", sliding_window=WINDOW, num_sink_tokens=2)
    convert(source("demo"), top / "plain")
    return {name: top / name for name in ("memory", "plain")}


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
def one_at_a_time(folder: Path, ids: list[int]) -> list[float]:
    """The loss of each token but the first, by a call without a cache of all before it."""
    model = OlmemForCausalLM.from_pretrained(folder).eval()
    losses = []
    for length in range(1, len(ids)):
        logits = model(torch.tensor([ids[:length]]), use_cache=False).logits[0, -1]
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
        report = evaluate(out, [text], EvaluateOptions(chunk=chunk))
        (row,) = report["texts"]
        assert (report["window"], report["memory"]) == (window, name == "memory")
        assert abs(row["nats_per_token"] - mean(losses)) < 1e-5
        assert row["perplexity"] == math.exp(row["nats_per_token"])
        num_bytes = len(TEXT.encode()) - len(b"def")
        assert abs(row["bits_per_byte"] - sum(losses) / math.log(2) / num_bytes) < 1e-5
        assert abs(row["within"]["nats_per_token"] - mean(losses[:window])) < 1e-5
        if name == "memory":
            assert abs(row["beyond"]["nats_per_token"] - mean(losses[window:])) < 1e-5
        else:
            assert row["beyond"] == {"tokens": 0, "nats_per_token": None}
        for place in row["positions"]:
            inside = losses[place["from"] - 1 : 2 * place["from"] - 1]
            assert place["tokens"] == len(inside) and place["nats_per_token"] == pytest.approx(mean(inside), rel=1e-5)
        assert sum(place["tokens"] for place in row["positions"]) == row["tokens"] - 1 == len(losses)


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


@pytest.mark.parametrize(("window", "within"), [(None, None), (2, 1.5), (5, 3.0), (9, 3.0)])
def test_figures_by_hand(window, within):
    made = figures("x", torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64), 10, window)
    assert made["nats_per_token"] == 3 and made["bits_per_byte"] == pytest.approx(1.5 / math.log(2))
    assert [(place["from"], place["tokens"], place["nats_per_token"]) for place in made["positions"]] == [
        (1, 1, 1.0),
        (2, 2, 2.5),
        (4, 2, 4.5),
    ]
    assert (made["within"] and made["within"]["nats_per_token"]) == within
    if window == 2:
        assert made["beyond"] == {"tokens": 3, "nats_per_token": 4.0}


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


def test_folder_that_is_not_fit(out, text, tmp_path):
    (out / "verification.json").unlink()
    (out / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused(out, [text], "must have a tokenizer", "--tokenizer")
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
    assert lines[1].startswith("other.txt: ") and lines[2:] == [f"wrote {out / 'evaluation.json'}"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(result.stdout) == json.loads((out / "evaluation.json").read_text())
    for wrong in (["evaluate", str(out)], [*command[:4], "--max-tokens", "1"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
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
