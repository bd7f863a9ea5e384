"""The model card: what it says comes from the folder's files, what it was told stays, and what may be published."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from convert.checkpoints import edit_json, load_weights, save_weights, snapshot, source
from huggingface_hub import ModelCard
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert, verify
from olmem_convert.cli import app
from olmem_convert.publish.model_card import (
    MARK,
    check_card,
    config_values,
    evaluation_values,
    make_card,
    read_template,
    verification_values,
)
from typer.testing import CliRunner

card_module = sys.modules["olmem_convert.publish.model_card"]  # the package has the function by this name

NAME = "olmo_core_swa"
TOLD = {"license": "apache-2.0", "base_model": "allenai/OLMo-2-0425-1B", "language": ["en", "no"]}
DATASETS = ["allenai/dolma", "imdb"]
HOSTILE = "`x`\n---\nlicense: mit\n---\n<!-- --> {{ 7 * 7 }} {% raw %} <script>|\u202e\x00\ud800</script>\n# HOSTILE"
OWN = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [mine]
---
# My own words
"""


@pytest.fixture
def out(changeable) -> Path:
    return changeable(NAME)


@pytest.fixture
def told(out) -> Path:
    card(out, CardOptions(**TOLD, datasets=DATASETS))
    return out


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata_of(folder: Path) -> dict:
    return ModelCard(text_of(folder)).data.to_dict()


def evaluation(folder: Path, **changes) -> dict:
    """An evaluation.json as `olmem evaluate` writes it, of the folder as it is."""
    files = snapshot(folder)
    part = {"tokens": 10, "nats_per_token": 2.123456}
    text = {
        **{"name": "a.txt", "sha256": "ab" * 32, "bytes": 99, "tokens": 21, "nats_per_token": 1.2345678},
        **{"perplexity": 3.4370012, "bits_per_byte": 0.7654321, "memory": "on", "positions": []},
        **dict.fromkeys(("inside", "one_to_four", "further"), part),
    }
    return {
        "texts": [text | changes],
        "recall": [{"task": "qa1", "questions": 4, "exact_match": 0.25, "likeliest": 0.25, "nats_per_token": 1.5}],
        "state": [{"tokens": 9, "bytes": 99, "seconds_per_token": None, "seconds_per_step": 0.001}],
        "plots": {},
        **{"window": 16, "bos_token": False, "dtype": "float32", "attention": "sdpa"},
        "sha256": {name: files[name] for name in files if name.endswith((".safetensors", "config.json"))},
    }


def write_evaluation(folder: Path, **changes) -> None:
    (folder / "evaluation.json").write_text(json.dumps(evaluation(folder, **changes)))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_card(folder)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_card_has_what_it_was_told(told):
    assert metadata_of(told) == {
        **TOLD,
        "model_name": "olmo_core_swa",
        "datasets": DATASETS,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["olmem"],
    }
    check_card(told)


def test_what_it_was_told_stays_unless_told_anew(told):
    before = text_of(told)
    card(told)
    assert text_of(told) == before
    verify(told, source(NAME))
    assert text_of(told) == before
    convert(source(NAME), told, ConvertOptions(overwrite=True))
    assert text_of(told) == before
    card(told, CardOptions(license="mit", language=["de", "de"]))
    assert metadata_of(told) == metadata_of(told) | {"license": "mit", "language": ["de"], "datasets": DATASETS}


def test_license_other_has_a_name_and_a_link(told):
    card(told, CardOptions(license="other", license_name="my-license", license_link="LICENSE"))
    verify(told, source(NAME))
    found = metadata_of(told)
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "my-license", "LICENSE")
    refused(told, "`license_link`", "LICENSE")
    (told / "LICENSE").write_text("All yours.")
    check_card(told)
    card(told, CardOptions(license="mit"))
    assert not {"license_name", "license_link"} & metadata_of(told).keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"license": "apache 2"}, "`license` must be an identifier of the Hub"),
        ({"license": "Apache-2.0"}, "`license`"),
        ({"license": "other"}, "--license-name"),
        ({"license": "other", "license_name": "My License"}, "`license_name`"),
        ({"license": "other", "license_name": "mine", "license_link": "../secret"}, "`license_link`"),
        ({"license": "other", "license_name": "mine", "license_link": "javascript:x"}, "`license_link`"),
        ({"license": "mit", "license_name": "mine"}, "use --license other"),
        ({"license_link": "https://x.example"}, "use --license other"),
        ({"base_model": "/home/me/model"}, "`base_model` must be the id of a repository"),
        ({"base_model": "a/b/c"}, "`base_model`"),
        ({"base_model": HOSTILE}, "`base_model`"),
        ({"datasets": ["imdb", "a b"]}, "`datasets`"),
        ({"language": ["english"]}, "`language`"),
        ({"language": ["EN"]}, "`language`"),
        ({"language": ["en_US"]}, "`language`"),
        ({"language": ["en\n"]}, "`language`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_hub_would_not_take_is_refused(options, words, told):
    before = snapshot(told)
    with pytest.raises(CheckpointError) as caught:
        card(told, CardOptions(**options))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert snapshot(told) == before


@pytest.mark.parametrize("license", ["openrail++", "llama3.1", "one-of-next-year"])
def test_which_licenses_there_are_is_the_hub_s_to_say(license, told):
    """It was a list of a day; the Hub is asked before anything is sent."""
    assert card(told, CardOptions(license=license))["metadata"]["license"] == license


def test_card_tells_the_config(told):
    text = text_of(told)
    config = json.loads((told / "config.json").read_text())
    sliding = config["layer_types"].count("sliding_attention")
    assert f"{sliding} with a sliding window of {config['sliding_window']} tokens" in text
    assert f"| trained length | {config['max_position_embeddings']} tokens |" in text
    assert f"| vocabulary | {config['vocab_size']} |" in text
    assert "AutoTokenizer" not in text and "constant memory" not in text and "sinks" not in text


def test_card_of_a_bounded_model_with_sinks_and_a_tokenizer(tmp_path):
    convert(source("demo"), tmp_path / "out", ConvertOptions(verify=False))
    edit_json(tmp_path / "out" / "config.json", layer_types="sliding_attention", num_sink_tokens=4)
    card(tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert "AutoTokenizer" in text and "constant memory" in text and "see the first 4 tokens" in text


def test_code_in_the_card_runs(converted):
    """Its block for Python, on the folder it is of."""
    folder = converted("demo")
    block = re.search(r"```python\n(.*?)```", text_of(folder), re.S)[1].replace('"…"', repr(str(folder)))
    printed = []
    exec(block, {"print": printed.append})
    assert len(printed) == 1 and printed[0].startswith("Once upon a time")


def test_evaluation_is_in_table_and_metadata(told):
    write_evaluation(told, name="a|b.txt")
    refused(told, "`olmem card")
    card(told)
    check_card(told)
    assert r"| `a\|b.txt` | 21 | 1.2346 | 3.437 | 0.76543 | 2.1235 | 2.1235 | 2.1235 |" in text_of(told)
    assert "| `qa1` | 4 | 0.25 | 0.25 | 1.5 |" in text_of(told) and "| 9 | 99 |  | 1000 |" in text_of(told)
    (index,) = metadata_of(told)["model-index"]
    result, recall = index["results"]
    assert recall["dataset"] == {"name": "qa1", "type": "generated", "config": "qa1"}
    assert [(metric["type"], metric["value"]) for metric in recall["metrics"]] == [("exact_match", 0.25)]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {"name": "a|b.txt", "type": "text", "revision": "ab" * 32}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "loss": 1.2346,
        "perplexity": 3.437,
        "bits_per_byte": 0.76543,
    }
    (told / "evaluation.json").unlink()
    refused(told, "`olmem card")


def test_texts_and_tasks_of_one_name_space_stay_apart(told):
    report = evaluation(told)
    report["texts"].append(report["texts"][0] | {"name": "b.txt", "sha256": "cd" * 32, "perplexity": 9.0})
    report["recall"].append(report["recall"][0] | {"task": "qa2", "exact_match": 0.5})
    (told / "evaluation.json").write_text(json.dumps(report))
    card(told)
    results = metadata_of(told)["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["a.txt", "b.txt", "qa1", "qa2"]
    check_card(told)


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_figures_of_other_files_are_refused(changed, told):
    write_evaluation(told)
    card(told)
    if changed == "config.json":
        edit_json(told / changed, num_sink_tokens=2)
    else:
        weights = load_weights(told)
        weights["model.norm.weight"][0] += 1
        save_weights(told, weights)
    refused(told, "`verification.json`", changed, "`olmem verify")
    with pytest.raises(CheckpointError, match=re.escape(changed)):
        card(told)
    (told / "verification.json").unlink()
    refused(told, "`evaluation.json`", changed, "`olmem evaluate")
    (told / "evaluation.json").unlink()
    refused(told, "verified")


def test_verifying_leaves_out_an_evaluation_of_other_weights(told):
    write_evaluation(told)
    edit_json(told / "evaluation.json", sha256={"model.safetensors": "0" * 64})
    verify(told, source(NAME))
    assert "## Evaluation" not in text_of(told) and "model-index" not in metadata_of(told)
    refused(told, "`evaluation.json`")


def test_known_digests_are_not_computed(told, monkeypatch):
    known = json.loads((told / "verification.json").read_text())["sha256"]
    monkeypatch.setattr(card_module, "digest", None)
    check_card(told, known)
    with pytest.raises(TypeError):
        check_card(told)


def test_card_that_is_not_verified_is_refused(told):
    (told / "verification.json").unlink()
    card(told)
    assert "Not verified" in text_of(told)
    refused(told, "olmem verify")


def test_card_of_a_failed_verification_is_not_verified(told):
    edit_json(told / "verification.json", passed=False)
    card(told)
    assert "Not verified" in text_of(told)


def test_metadata_edited_by_hand_is_what_it_was_told(told):
    before = text_of(told)
    (told / "README.md").write_text(before.replace("license: apache-2.0", "license: mit"))
    card(told)
    assert metadata_of(told)["license"] == "mit", "what stands there is what it was told"
    check_card(told)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "`README.md` must exist"),
        ("# no metadata\n", "no metadata"),
        ("---\nlicense: [\n---\n", "README.md"),
        ("---\n- a\n---\n", "README.md"),
        ("---\n1: 2\n---\n", "README.md"),
        (OWN.replace("license: mit\n", ""), "`license`"),
        (OWN.replace("mit", "Mine"), "`license`"),
        (OWN.replace("library_name: transformers\n", ""), "`library_name`"),
        (OWN.replace("transformers", "olmem"), "`library_name`"),
        (OWN.replace("text-generation", "fill-mask"), "`pipeline_tag`"),
        (OWN.replace("license: mit", "license: mit\nlanguage: [no]"), "in quotes"),
        (OWN.replace("license: mit", "license: mit\nbase_model: [a/b, 3]"), "`base_model`"),
        (OWN.replace("license: mit", "license: mit\nmodel-index: [3]"), "README.md"),
        (OWN.replace("license: mit", "license: mit\nmodel-index: 3"), "README.md"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("mark", ["", f"\n<!-- {MARK} -->\n"], ids=["own", "olmem"])
def test_card_that_will_not_do_is_refused(text, words, mark, told):
    (told / "README.md").unlink()
    if text is not None:
        (told / "README.md").write_text(text + mark)
    refused(told, words)


def test_card_of_ones_own_is_checked_and_never_written(told):
    write_evaluation(told)
    (told / "README.md").write_text(OWN)
    check_card(told)
    with pytest.raises(CheckpointError, match="somebody's own"):
        card(told, CardOptions(license="mit"))
    assert text_of(told) == OWN
    figures = {"type": "perplexity", "value": 3.437}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "a.txt", "type": "text"},
        "metrics": [figures],
    }

    def with_index() -> str:
        index = yaml.safe_dump({"model-index": [{"name": "m", "results": [result]}]})
        return OWN.replace("license: mit\n", "license: mit\n" + index)

    (told / "README.md").write_text(with_index())
    check_card(told)
    figures["value"] = 3.4
    (told / "README.md").write_text(with_index())
    refused(told, "`model-index`", "3.4 on 'a.txt'")
    result["dataset"]["name"] = "another"  # of which nothing was measured
    (told / "README.md").write_text(with_index())
    refused(told, "`model-index`", "3.4 on 'another'")
    result["dataset"]["type"] = "wikitext"  # which is not of `olmem evaluate`
    (told / "README.md").write_text(with_index())
    check_card(told)


def test_damaged_metadata_of_an_own_card_costs_nothing(told):
    """Verification and conversion say so before they do anything."""
    (told / "README.md").write_text(text_of(told).replace("license: apache-2.0", "license: Mine"))
    before = snapshot(told)
    for run in (
        lambda: verify(told, source(NAME)),
        lambda: convert(source(NAME), told, ConvertOptions(overwrite=True)),
        lambda: card(told, CardOptions(base_model="a/b")),
    ):
        with pytest.raises(CheckpointError, match="`license` must be"):
            run()
    assert snapshot(told) == before
    card(told, CardOptions(license="mit"))
    check_card(told)


def test_hostile_strings_stay_in_their_code_spans(told):
    report = json.loads((told / "verification.json").read_text())
    report |= {"source": HOSTILE, "memory": {"fields": {HOSTILE: HOSTILE}, "new_parameters": [HOSTILE]}}
    report["memory"]["relative_difference_when_on"] = 0.5
    (told / "verification.json").write_text(json.dumps(report))
    edit_json(told / "config.json", num_memory_tokens=1, memory_segment_length=8)
    sealed = report["sha256"] | {"config.json": snapshot(told)["config.json"]}
    edit_json(told / "verification.json", sha256=sealed)
    write_evaluation(told, name=HOSTILE, sha256=HOSTILE)
    recall = [evaluation(told)["recall"][0] | {"task": HOSTILE}]
    edit_json(told / "evaluation.json", dtype=HOSTILE, attention=HOSTILE, recall=recall)
    card(told)
    check_card(told)
    text = text_of(told)
    assert metadata_of(told).keys() == metadata_of(told).keys() & {
        *("license", "base_model", "language", "datasets", "library_name", "pipeline_tag", "tags", "model-index")
    }
    assert metadata_of(told)["license"] == "apache-2.0"
    body = ModelCard(text).text
    lines = [line for line in body.splitlines() if "HOSTILE" in line]
    assert len(lines) == 6 and all("{{ 7 * 7 }}" in line for line in lines)
    for line in lines:
        assert line.count("`") % 2 == 0
        for outside in line.split("`")[::2]:
            assert not re.search(r"HOSTILE|<|---|\{", outside), line
    assert body.count("<!--") == 3 + sum(line.count("<!--") for line in lines)
    assert not any(sign in text for sign in "\u202e\x00\ud800")
    rows = [line for line in lines if line.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [9, 6], "as many cells as the tables have"
    write_evaluation(told, memory=HOSTILE)
    with pytest.raises(CheckpointError, match="evaluation"):
        card(told)


VALUES = (None, True, -1, 1e308, "x", "`", [], [1], {}, {"a": 1}, float("nan"), float("inf"), 10**400)


def places(value, path=()):
    """The path of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("name", ["verification.json", "evaluation.json"])
def test_any_report_makes_a_card_or_one_line(name, told):
    report = json.loads((told / "verification.json").read_text())
    report["stages"], report["rounding"] = [], {"max_difference": 1.0, "mean_difference": 1.0}
    report["memory"] = {"fields": {"a": 1}, "new_parameters": ["b"], "relative_difference_when_on": 0.1}
    report = report if name == "verification.json" else evaluation(told)
    made_of = report["sha256"] = {"config.json": report["sha256"]["config.json"]}
    read = verification_values if name == "verification.json" else evaluation_values
    config = config_values(told, {})
    made = refusals = 0
    for path in [(), *places(report)]:
        for value in VALUES:
            changed = json.loads(json.dumps(report))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if path:
                inner[path[-1]] = value
            else:
                changed = value
            (told / name).write_text(json.dumps(changed))
            try:
                ModelCard(make_card({"model_name": "x"}, config | read(told, made_of)))
                made += 1
            except CheckpointError as error:
                refusals += 1
                assert "\n" not in str(error) and name in str(error)
    assert made > 50 and refusals > 50
    for text in ("", "{", "[" * 10_000, "\xff"):
        (told / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=re.escape(name)):
            card(told)


@pytest.mark.parametrize("change", [{"model_type": "olmo2"}, {"sliding_window": "x"}, {"layer_types": None}, None])
def test_folder_that_is_none_of_olmem(change, told):
    before = text_of(told)
    if change is None:
        (told / "config.json").unlink()
    else:
        edit_json(told / "config.json", **change)
    with pytest.raises(CheckpointError):
        card(told)
    assert text_of(told) == before


def test_exported_folder_has_no_such_card(tmp_path):
    convert(source("olmo"), tmp_path / "olmem", ConvertOptions(verify=False))
    convert(tmp_path / "olmem", tmp_path / "olmo2", ConvertOptions(to="olmo2", verify=False))
    with pytest.raises(CheckpointError, match="`OUT` must be an Olmem folder"):
        card(tmp_path / "olmo2")
    assert not (tmp_path / "olmo2" / "README.md").exists()


def test_interrupted_write_leaves_the_card(told, monkeypatch):
    before = snapshot(told)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        card(told, CardOptions(license="mit"))
    assert snapshot(told) == before


def test_command(out):
    options = ["--license", "mit", "--base-model", "a/b", "--language", "en", "--language", "code", "--dataset", "c/d"]
    result = CliRunner().invoke(app, ["card", str(out), *options, "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["metadata"] == metadata_of(out) and report["verified"] and not report["evaluated"]
    assert report["metadata"]["language"] == ["en", "code"] and report["metadata"]["datasets"] == ["c/d"]
    assert result.stderr.splitlines()[0] == f"wrote {out / 'README.md'}"
    result = CliRunner().invoke(app, ["card", str(out), "--license", "No License"])
    assert result.exit_code == 1 and result.stderr.startswith("error: `license`") and result.stdout == ""


def test_command_says_what_publishing_needs(out):
    (out / "verification.json").unlink()
    result = CliRunner().invoke(app, ["card", str(out)])
    assert result.exit_code == 0
    last = result.stdout.splitlines()[-1]
    assert last.startswith("next: ") and f"`olmem verify {out}`, with `--against SRC`" in last


def test_template_lies_where_cards_do():
    path = Path(__file__).parents[2] / "model_cards" / "card.md"
    assert read_template() == path.read_text(encoding="utf-8")
    assert set(re.findall(r"\d{2,}", read_template())) == {"32", "64", "256"}, "float32, float64, sha256"
