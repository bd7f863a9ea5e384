"""What of a folder may not be published, each refused by name, with its value and the way out."""

import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from convert.checkpoints import edit_json, load_weights, save_weights, snapshot, source
from convert.releases import reseal
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert
from olmem_convert.publish.release import check_release
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(released, tmp_path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "out"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """The same in several files."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    convert(source("olmo_core_swa"), out, ConvertOptions(max_shard_size="50KB"))
    card(out, CardOptions(license="apache-2.0"))
    return out


def refuse(out: Path, *words: str) -> None:
    before = snapshot(out)
    with pytest.raises(CheckpointError) as caught:
        check_release(out)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and snapshot(out) == before


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")


STRAYS = {
    "pickle by name": ("weights.pt", lambda path: path.write_bytes(b""), "a pickle by its name"),
    "pickle inside": ("LICENSE", lambda path: path.write_bytes(pickle.dumps([1], 2)), "by its first bytes"),
    "zip inside": ("chat_template.jinja", write_zip, "by its first bytes"),
    "torch file inside": ("NOTICE.txt", lambda path: torch.save({}, path), "by its first bytes"),
    "folder": ("runs", Path.mkdir, "a folder"),
    "pipe": ("NOTICE", os.mkfifo, "no plain file"),
    "link": ("LICENSE", lambda path: path.symlink_to(ROOT / "LICENSE"), "symbolic link"),
    "hidden": (".env", lambda path: path.write_text("A=1"), "hidden"),
    "partial": ("model.safetensors.incomplete", lambda path: path.write_bytes(b"x"), "not on the list"),
    "code": ("setup.py", lambda path: path.write_text("print()"), "not on the list"),
    "bytes for text": ("merges.txt", lambda path: path.write_bytes(b"\xff\xfe"), "not text"),
    "zip for safetensors": ("model-00001-of-00001.safetensors", write_zip, "model-00001"),
}


@pytest.mark.parametrize("kind", STRAYS)
def test_files_that_are_not_published(kind, out):
    name, make, words = STRAYS[kind]
    make(out / name)
    reseal(out, with_card=False)
    refuse(out, name, *([] if kind == "zip for safetensors" else [words]))


def test_a_verification_must_have_passed(out):
    edit_json(out / "verification.json", passed=False)
    refuse(out, "`passed`", "False", "convert again")
    (out / "verification.json").unlink()
    refuse(out, "`verification.json`", "with `--against SRC` if it was converted")


def test_the_verification_must_be_of_these_files(out):
    weights = load_weights(out)
    save_weights(out, weights | {"model.norm.weight": weights["model.norm.weight"] + 1})
    (out / "LICENSE").write_text("mine\n")  # which may come later
    (out / "added_tokens.json").write_text("{}")
    seal = json.loads((out / "verification.json").read_text())["sha256"]
    edit_json(out / "verification.json", sha256=seal | {"merges.txt": "0" * 64})
    refuse(out, "changed: model.safetensors", "missing: merges.txt", "extra: added_tokens.json)", "olmem verify")


def test_code_is_the_package_s_own(out):
    path = out / "modeling_olmem.py"
    path.write_text(path.read_text() + "\nimport os\n")
    reseal(out)
    refuse(out, "modeling_olmem.py", "byte for byte")
    shutil.copy(ROOT / "modeling" / "olmem" / path.name, path)
    (out / "extra_olmem.py").write_text("")
    reseal(out)
    refuse(out, "extra_olmem.py", "byte for byte")
    (out / "extra_olmem.py").unlink()
    (out / "cache_olmem.py").unlink()
    reseal(out)
    refuse(out, "cache_olmem.py", "is missing")


@pytest.mark.parametrize(
    ("field", "value"),
    [("auto_map", {"AutoModelForCausalLM": "other/repo--modeling_olmem.OlmemForCausalLM"}), ("model_type", "llama")],
)
def test_config_names_this_model_and_its_own_code(field, value, out):
    edit_json(out / "config.json", **{field: value})
    reseal(out, with_card=False)
    refuse(out, f"`{field}`", "config.json")


def test_generation_uses_a_cache(out):
    """`generate()` does so whatever config.json says, in which Trainer writes false."""
    edit_json(out / "config.json", use_cache=False)
    reseal(out)
    check_release(out)
    edit_json(out / "generation_config.json", use_cache=False)
    reseal(out)
    refuse(out, "`use_cache`", "generation_config.json", "set it to true")


def test_card_needs_a_license(out):
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("license: apache-2.0\n", ""))
    refuse(out, "`license`", "olmem card", "--license")
    (out / "README.md").write_text(text.replace("---\n", "---\n[", 1))
    refuse(out, "README.md")


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("generation_config.json", {"eos_token_id": None}, ("`eos_token_id`", "none in generation_config.json")),
        ("generation_config.json", {"eos_token_id": [1]}, ("`eos_token_id`", "[1] in generation_config.json")),
        ("generation_config.json", {"pad_token_id": 3}, ("`pad_token_id`", "[3] in generation_config.json")),
        ("generation_config.json", {"bos_token_id": 10**6}, ("`bos_token_id`", "`vocab_size` 2048")),
        ("generation_config.json", {"eos_token_id": "end"}, ("`eos_token_id`", "'end'")),
        ("tokenizer_config.json", {"eos_token": "the"}, ("`eos_token_id`", "tokenizer_config.json")),
        ("tokenizer_config.json", {"eos_token": "<|absent|>"}, ("`eos_token`", "<|absent|>")),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}, ("`auto_map`",)),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "o/r--p.P"}}}, ("`custom_pipelines`",)),
        ("generation_config.json", {"custom_generate": "some/repo"}, ("`custom_generate`",)),
        ("generation_config.json", {"trust_remote_code": True}, ("`trust_remote_code`",)),
    ],
    ids=str,
)
def test_ids_agree(file, fields, words, changeable):
    out = changeable("demo")
    edit_json(out / file, **fields)
    reseal(out, license="apache-2.0")
    refuse(out, *words)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_is_not_fetched(name, out):
    """By the name of a repository of kernels, which Transformers would load with the model."""
    edit_json(out / "config.json", **{name: "some/kernel@main:f"})
    reseal(out, with_card=False)
    refuse(out, f"`{name}`", "some/kernel", "fetch code")
    edit_json(out / "config.json", **{name: "sdpa"})
    reseal(out)
    check_release(out)


def test_a_tokenizer_s_config_names_no_code_without_a_tokenizer(out):
    (out / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "o/r--t.T"]}}')
    reseal(out)
    refuse(out, "`auto_map`", "fetch code")


def test_an_end_may_have_several_ids(changeable):
    out = changeable("demo")
    end = json.loads((out / "config.json").read_text())["eos_token_id"]
    edit_json(out / "generation_config.json", eos_token_id=[end, 5])
    reseal(out, license="apache-2.0")
    assert "tokenizer.json" in check_release(out)


def test_vocabulary_covers_the_tokenizer(changeable, released):
    out = changeable("demo")
    for name in ("config.json", "model.safetensors", "verification.json", "generation_config.json"):
        shutil.copy(released / name, out / name)
    reseal(out, license="apache-2.0")
    refuse(out, "`vocab_size`", "2048 tokens")


def test_weights_are_the_config_s(out):
    weights = load_weights(out)
    name = "model.norm.weight"
    for change in ({name: weights[name][1:]}, {name: weights[name].half()}, {"spare": weights[name].clone()}):
        save_weights(out, weights | change)
        reseal(out)
        refuse(out, f"`{next(iter(change))}`", "by config.json")
    save_weights(out, {key: value for key, value in weights.items() if key != name})
    reseal(out)
    refuse(out, f"`{name}`", "got nothing")


def test_shards_are_those_of_the_index(sharded, tmp_path):
    out = Path(shutil.copytree(sharded, tmp_path / "out"))
    index = out / "model.safetensors.index.json"
    assert len(check_release(out)) > 10
    edit_json(index, metadata={"total_size": 1})
    reseal(out)
    refuse(out, "`total_size`", "got 1")
    shutil.copy(sharded / index.name, index)
    first, second = sorted(out.glob("*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    save_file(both, first)
    reseal(out, with_card=False)
    refuse(out, first.name, "must hold the tensors that")
    shutil.copy(sharded / first.name, first)
    second.unlink()
    reseal(out, with_card=False)
    refuse(out, second.name, "must exist")


def test_a_folder_that_was_converted_may_be_published(released):
    files = check_release(released)
    assert files.keys() == snapshot(released).keys()
    assert {name: file.sha256 for name, file in files.items()} == snapshot(released)
    blob = subprocess.run(["git", "hash-object", released / "config.json"], capture_output=True, text=True)
    assert files["config.json"].git_sha1 == blob.stdout.strip()
