"""A genuine checkpoint becomes a folder that computes its logits, and holds all that the Hub and a user need."""

import json
import os
from pathlib import Path

import olmem
import pytest
import torch
from convert.checkpoints import DEMO, EXACT, FOLDERS, GOLDEN, expected, read_config, snapshot, source
from fresh import run_fresh
from olmem_convert import CheckpointError, ConvertOptions, convert
from olmem_convert.proof.prompts import draw_prompt
from olmem_convert.writing.shards import INDEX_NAME, sha256
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

DEMO_STEP = DEMO / "step1872"
CODE = tuple(path.name for path in Path(olmem.__file__).parent.glob("*_olmem.py"))


@torch.no_grad()
def logits_of(folder: Path, input_ids: torch.Tensor, attention: str = "sdpa", **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32, **options)
    return model(input_ids).logits


@pytest.mark.parametrize("name", FOLDERS)
def test_sdpa_gives_the_native_logits(name, converted):
    input_ids, native = expected(GOLDEN / name)
    logits = logits_of(converted(name), input_ids)
    assert (logits - native).abs().max() <= 1e-5 * max(1.0, native.std())
    assert torch.equal(logits, native) or name not in EXACT


@pytest.mark.parametrize("name", FOLDERS)
def test_eager_gives_the_native_logits(name, converted):
    input_ids, native = expected(GOLDEN / name)
    gap = (logits_of(converted(name), input_ids, "eager") - native).abs().max()
    assert gap <= (5e-5 if name == "olmo1" else 2e-5)


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-4), ("eager", 5e-5)])
def test_demo_gives_the_native_logits_of_its_last_positions(attention, tolerance, converted):
    input_ids, native = expected(DEMO)
    logits = logits_of(converted("demo"), input_ids, attention)
    assert (logits[:, -native.shape[1] :] - native).abs().max() <= tolerance


@pytest.mark.parametrize("name", [*FOLDERS, "demo"])
def test_report_vouches_for_the_files_that_are_there(name, converted):
    folder = converted(name)
    report = json.loads((folder / "verification.json").read_text())
    assert report["passed"] is True and report["max_difference"] <= report["tolerance"]
    written_later = ("verification.json", "README.md")
    assert report["sha256"] == {path.name: sha256(path) for path in folder.iterdir() if path.name not in written_later}
    prompt = report["prompt"]
    drawn = draw_prompt(prompt["tokens"], prompt["vocabulary"], prompt["seed"])
    assert drawn.shape == (1, prompt["tokens"]) and int(drawn.max()) < prompt["vocabulary"]
    assert {stage["equal"] for stage in report["stages"]} == {True}
    assert len(report["stages"]) == len(read_config(folder)["layer_types"]) + 3


@pytest.mark.parametrize("name", ["olmo_core_swa_fsdp2", "core300_swa_first_full", "demo"])
def test_verification_looks_past_the_window(name, converted):
    prompt = json.loads((converted(name) / "verification.json").read_text())["prompt"]
    assert prompt["tokens"] > prompt["sliding_window"] == read_config(converted(name))["sliding_window"]


@pytest.mark.parametrize("name", ["baka_pristine", "baka_elephant", "baka_bfloat16"])
def test_verification_ends_in_the_middle_of_a_later_chunk(name, converted):
    prompt = json.loads((converted(name) / "verification.json").read_text())["prompt"]
    chunk = prompt["attention_chunk_size"]
    assert chunk == read_config(converted(name))["attention_chunk_size"]
    assert prompt["tokens"] > chunk and 0 < prompt["tokens"] % chunk < chunk - 1


def test_cached_steps_give_the_logits_of_one_forward(converted):
    input_ids, native = expected(GOLDEN / "olmo_core_swa_yarn")
    model = AutoModelForCausalLM.from_pretrained(converted("olmo_core_swa_yarn"))
    output, logits = model(input_ids[:, :20]), []
    logits.append(output.logits)
    for step in range(20, input_ids.shape[1]):
        output = model(input_ids[:, step : step + 1], past_key_values=output.past_key_values)
        logits.append(output.logits)
    assert (torch.cat(logits, 1) - native).abs().max() <= 2e-5


# What OUT holds


def test_demo_folder_is_complete(converted):
    folder = converted("demo")
    assert {path.name for path in folder.iterdir()} == {
        *CODE,
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "verification.json",
    }
    assert (folder / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    for name in CODE:
        assert (folder / name).read_bytes() == (Path(olmem.__file__).parent / name).read_bytes()


def test_demo_config_is_what_the_native_one_says(converted):
    config, native = read_config(converted("demo")), json.loads((DEMO_STEP / "config.json").read_text())
    assert config["model_type"] == "olmem"
    assert config["architectures"] == ["OlmemForCausalLM"]
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"
    assert config["auto_map"]["AutoConfig"] == "configuration_olmem.OlmemConfig"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_olmem.OlmemForCausalLM"
    assert config["hidden_size"] == native["model"]["d_model"]
    assert config["vocab_size"] == native["model"]["vocab_size"]
    assert config["max_position_embeddings"] == native["train_module"]["max_sequence_length"]
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    generation = GenerationConfig.from_pretrained(converted("demo"))
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2046, 2047, None)


def test_config_survives_a_round_trip(converted, tmp_path):
    config = AutoConfig.from_pretrained(converted("olmo_core_swa_yarn"))
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path) == read_config(converted("olmo_core_swa_yarn"))


def test_demo_writes_through_a_pipeline(converted):
    generate = pipeline("text-generation", model=str(converted("demo")))
    text = generate("def f(x):\n    return", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("def f(x):\n    return") and len(text) > 20


def test_tokenizer_gives_the_native_ids(converted):
    from tokenizers import Tokenizer

    text = "for i in range(10000):\n\n    print(f'{i:>8}')  # naïve ﬁ<|endoftext|>"
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids
    assert AutoTokenizer.from_pretrained(converted("demo")).encode(text) == ids


def test_chosen_tokenizer_is_written(tmp_path):
    edit = tmp_path / "tokenizer"
    edit.mkdir()
    (edit / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    report = convert(DEMO_STEP, tmp_path / "out", ConvertOptions(tokenizer=edit, verify=False))
    assert report["tokenizer"]["size"] == 2048 and report["verification"] is None
    assert not (tmp_path / "out" / "verification.json").exists()


def test_folder_loads_without_olmem(converted, tmp_path):
    """As a user has it who never installed this package: the code comes with the weights."""
    name = "olmo_core_swa_yarn"
    script = f"""
import sys
sys.modules["olmem"] = None  # as if it were not installed, though an editable installation puts it on every path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(converted(name))!r}, trust_remote_code=True)
native = load_file({str(GOLDEN / name / "expected.safetensors")!r})
assert torch.equal(model(native["input_ids"]).logits, native["logits"])
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
print(type(model).__name__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = run_fresh(script, cwd=tmp_path, env=environment)
    assert run.stdout.strip() == "OlmemForCausalLM", run.stderr


def test_source_is_left_as_it_was(tmp_path):
    before = snapshot(DEMO)
    convert(DEMO_STEP, tmp_path / "out", ConvertOptions(verify=False))
    assert snapshot(DEMO) == before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        convert(source("olmo"), tmp_path / "out", ConvertOptions(max_shard_size="100KB"))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.name not in CODE}
    assert set(modes.values()) == {0o666 & ~umask}, modes


# Shards and dtypes


@pytest.mark.parametrize("size", ["20KB", "100KB", 150_000])
def test_shards_respect_their_size(size, tmp_path):
    out = tmp_path / "out"
    convert(source("olmo"), out, ConvertOptions(max_shard_size=size, verify=False))
    limit = int(size[:-2]) * 1000 if isinstance(size, str) else size
    index = json.loads((out / INDEX_NAME).read_text())
    held, total = {}, 0
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= limit or len(sizes) == 1
        held |= dict.fromkeys(sizes, path.name)
        total += sum(sizes.values())
    assert len(set(held.values())) > 1
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == total
    input_ids, native = expected(GOLDEN / "olmo")
    assert torch.equal(logits_of(out, input_ids), native)


ROUNDED = ["olmo_core_swa_yarn", "olmo_gqa_tied", "legacy_norm_noaffine", "core300_layernorm", "baka_pristine"]


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_rounded_once(name, dtype, converted, tmp_path):
    out = tmp_path / "out"
    report = convert(source(name), out, ConvertOptions(dtype=dtype, verify=False))
    kind = getattr(torch, dtype)
    assert read_config(out)["dtype"] == report["dtype"] == dtype
    with (
        safe_open(out / "model.safetensors", "pt") as file,
        safe_open(converted(name) / "model.safetensors", "pt") as full,
    ):
        assert set(file.keys()) == set(full.keys())
        for key in full.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), full.get_tensor(key).to(kind)), key
    assert AutoModelForCausalLM.from_pretrained(out).dtype == kind


@pytest.mark.parametrize("name", ["olmo", "olmo_core_swa_yarn", "olmo1", "core300_prenorm_headqk"])
def test_rounded_weights_are_verified_exactly_and_the_rounding_is_told(name, converted):
    report = json.loads((converted(name, "bfloat16") / "verification.json").read_text())
    assert report["passed"] is True and report["dtype"] == "bfloat16"
    assert report["max_difference"] == report["mean_difference"] == 0.0
    assert 0 < report["rounding"]["mean_difference"] < report["rounding"]["max_difference"] < 1.0
    assert "rounding" not in json.loads((converted(name) / "verification.json").read_text())


def test_tied_head_is_not_written(converted):
    with safe_open(converted("olmo_core_tied") / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(converted("olmo_core_tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


# OUT appears whole or not at all


def test_overwrite_replaces_a_whole_folder(converted, changeable):
    out = changeable("olmo1")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of a former conversion")
    convert(source("olmo"), out, ConvertOptions(overwrite=True))
    assert snapshot(out).keys() == snapshot(converted("olmo")).keys()
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def test_empty_folder_may_be_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    convert(source("olmo"), tmp_path / "out", ConvertOptions(overwrite=True))
    assert (tmp_path / "out" / "config.json").is_file()


def test_missing_parents_are_made(tmp_path):
    convert(source("olmo"), tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    "stage",
    [
        *(f"commands.converting.{name}" for name in ("write_weights", "copy_tokenizer")),
        *(f"commands.targets.{name}" for name in ("write_code", "verify_checkpoint")),
        "writing.transaction.sync",
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_whatever_stops_a_conversion_leaves_nothing(stage, error, monkeypatch, changeable, tmp_path):
    def stop(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(f"olmem_convert.{stage}", stop)
    with pytest.raises((error, CheckpointError)):
        convert(source("olmo"), tmp_path / "new" / "deep" / "out")
    assert list(tmp_path.iterdir()) == []

    out = changeable("olmo1")
    before = snapshot(out)
    with pytest.raises((error, CheckpointError)):
        convert(source("olmo"), out, ConvertOptions(overwrite=True))
    assert snapshot(out) == before and list(tmp_path.iterdir()) == [out]


def test_failed_last_step_brings_the_old_folder_back(monkeypatch, changeable, tmp_path):
    out, rename = changeable("olmo1"), Path.rename
    before = snapshot(out)

    def fail(self, target):
        if self.suffix == ".partial":
            raise OSError(28, "No space left on device", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        convert(source("olmo"), out, ConvertOptions(overwrite=True))
    assert snapshot(out) == before and list(tmp_path.iterdir()) == [out]


# Lengths, ids, notes


def test_length_of_the_config_and_of_the_caller(tmp_path, converted):
    assert read_config(converted("olmo"))["max_position_embeddings"] == 64
    convert(source("olmo"), tmp_path / "out", ConvertOptions(max_length=96))
    assert read_config(tmp_path / "out")["max_position_embeddings"] == 96


def test_notes_reach_the_user(tmp_path):
    lines = []
    convert(source("legacy_partial_yaml"), tmp_path / "out", say=lines.append)
    assert lines[0].startswith("found OLMo, unsharded: ")
    assert any(line.startswith("note: ") for line in lines)
    assert any(line.startswith("verified: logits differ by at most") for line in lines)
    assert f"wrote {tmp_path / 'out'}" in lines
