"""Transformers' own Olmo, Olmo2 and Olmo3 become Olmem and come back: the same logits, and every bit of the folder."""

import importlib
import json
import os
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.checkpoints import (
    DEMO,
    EXACT,
    GOLDEN,
    edit_json,
    expected,
    load_weights,
    read_config,
    save_weights,
    snapshot,
    source,
)
from convert.test_bad_input import refuse
from convert.test_verify import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem import OlmemConfig, OlmemForCausalLM
from olmem_convert import CheckpointError, ConvertOptions, convert, verify
from olmem_convert.cli import app
from olmem_convert.formats import transformers_olmo
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2ForSequenceClassification,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedConfig,
)
from typer.testing import CliRunner

FULL, SLIDING = "full_attention", "sliding_attention"
CLASSES: dict[str, tuple[Any, Any]] = {
    "olmo": (OlmoConfig, OlmoForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
}
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_OF_LAYERS = {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 300.0}}
LLAMA = {"rope_type": "llama3", "rope_theta": 90.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
IDS = torch.randint(40, (2, 40), generator=torch.Generator().manual_seed(3))


def save(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, shards: str = "5GB", **changes) -> Path:
    """A folder by the class's own `save_pretrained`, its weights drawn wide apart, norms too."""
    config_class, model_class = CLASSES[model_type]
    window = {"sliding_window": 5} if model_type == "olmo3" else {}
    model = model_class(config_class(**(SIZES | window | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


@torch.no_grad()
def logits(folder: Path, model_class: Any = OlmemForCausalLM, load: str = "from_pretrained") -> torch.Tensor:
    model = getattr(model_class, load)(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()(IDS).logits


def tensors_equal(one: Path, other: Path) -> bool:
    first, second = load_weights(one), load_weights(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


# There and back

scalings = st.sampled_from(
    [
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
        YARN,
        YARN | {"attention_factor": 1.2, "beta_fast": 16.0, "beta_slow": 2.0},
        LLAMA | {"original_max_position_embeddings": 16},
    ]
)


@st.composite
def changes_of(draw, model_type: str) -> dict[str, Any]:
    layers = draw(st.integers(1, 3))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu"])),
        "initializer_range": draw(st.sampled_from([0.02, 0.5])),
        "use_cache": draw(st.booleans()),
        "eos_token_id": draw(st.sampled_from([2, [3, 4], None])),
        "rope_parameters": dict(draw(scalings)),
    }
    changes |= draw(st.sampled_from([{}, {"head_dim": 4}, {"head_dim": 8}]))
    changes |= draw(
        st.sampled_from([{}, {"made_by": {"name": "nobody", "numbers": [1, 2.5]}, "clip_qkv_stage": "odd"}])
    )
    if model_type == "olmo":
        changes["clip_qkv"] = draw(st.sampled_from([None, 0.7]))
    else:
        changes["rms_norm_eps"] = draw(st.sampled_from([1e-6, 1e-5]))
    if model_type == "olmo3":
        theta = draw(st.sampled_from([50.0, 2000.0]))
        sliding = {"rope_type": "default", "rope_theta": theta}
        changes["rope_parameters"] = {FULL: changes["rope_parameters"], SLIDING: sliding}
        changes["sliding_window"] = draw(st.integers(1, 7))
        changes["layer_types"] = draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers, max_size=layers))
    return changes


@pytest.mark.parametrize("model_type", CLASSES)
@settings(max_examples=5)
@given(data=st.data())
def test_there_and_back(model_type, data, tmp_path_factory):
    """In through both doors the logits are the original's, and out again all of the folder is."""
    folder, model_class = tmp_path_factory.mktemp("there"), CLASSES[model_type][1]
    changes = data.draw(changes_of(model_type))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    original = save(folder / "original", model_type, dtype, data.draw(st.sampled_from(["5GB", "4KB"])), **changes)
    wanted = logits(original, model_class)

    report = convert(original, folder / "olmem")
    assert report["verification"]["max_difference"] == 0.0
    assert torch.equal(logits(folder / "olmem"), wanted)
    assert torch.equal(logits(original, load="from_olmo"), wanted)
    OlmemForCausalLM.from_olmo(original).save_pretrained(folder / "from_olmo")

    for through in ("olmem", "from_olmo"):
        back = folder / f"back from {through}"
        report = convert(folder / through, back, ConvertOptions(to=model_type))
        assert report["verification"]["max_difference"] == 0.0
        assert tensors_equal(back, original)
        assert (back / "config.json").read_bytes() == (original / "config.json").read_bytes()
        assert named(back) == named(original)
        assert torch.equal(logits(back, model_class), wanted)
    assert (back / "generation_config.json").is_file()


def named(folder: Path) -> dict[str, Any]:
    return AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": None}


EXPORTED = {
    "olmo": "olmo2",
    "olmo_gqa_tied": "olmo2",
    "olmo_core": "olmo2",
    "olmo_core_tied": "olmo3",
    "olmo_core_swa": "olmo3",
    "olmo_core_swa_yarn": "olmo3",
    "olmo1": "olmo",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_native_checkpoint_reaches_transformers_own_class(name, converted, tmp_path):
    target = EXPORTED[name]
    convert(converted(name), tmp_path / "out", ConvertOptions(to=target))
    model = CLASSES[target][1].from_pretrained(tmp_path / "out", dtype=torch.float32)
    input_ids, native = expected(GOLDEN / name)
    with torch.no_grad():
        got = model(input_ids).logits
    assert (got - native).abs().max() <= 1e-5 * max(1.0, native.std())
    assert torch.equal(got, native) or name not in EXACT
    assert tensors_equal(tmp_path / "out", converted(name))


def test_scaled_logits_are_refused(converted, tmp_path):
    with pytest.raises(CheckpointError, match=r"`logits_scaling` must be 1\.0 \(got .*no OLMo class can"):
        convert(converted("olmo_clip_scale"), tmp_path / "out", ConvertOptions(to="olmo"))
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_is_the_callers_choice(tmp_path):
    original = save(tmp_path / "original", "olmo2")
    convert(original, tmp_path / "olmem")
    lines: list[str] = []
    report = convert(
        tmp_path / "olmem", tmp_path / "back", ConvertOptions(to="olmo2", dtype="bfloat16"), say=lines.append
    )
    assert report["verification"]["passed"] and any("rounded to bfloat16" in line for line in lines)
    assert read_config(tmp_path / "back")["dtype"] == "bfloat16"
    before, after = load_weights(original), load_weights(tmp_path / "back")
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)


def test_rounding_on_the_way_in_is_measured(tmp_path):
    original = save(tmp_path / "original", "olmo3")
    verification = convert(original, tmp_path / "olmem", ConvertOptions(dtype="bfloat16"))["verification"]
    assert verification["max_difference"] == 0.0 < verification["rounding"]["max_difference"] < 1.0


# Files of other releases


def as_bin(folder: Path, sharded: bool, extra: dict[str, torch.Tensor] | None = None) -> None:
    """The weights as `torch.save` wrote them, in one file or two with an index."""
    weights = load_weights(folder) | (extra or {})
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = sorted(weights)
    halves = {"pytorch_model.bin": names}
    if sharded:
        halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        places = {name: file for file, held in halves.items() for name in held}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file, held in halves.items():
        torch.save({name: weights[name] for name in held}, folder / file)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("model_type", CLASSES)
def test_pickled_weights_with_old_buffers(model_type, sharded, tmp_path):
    original = save(tmp_path / "original", model_type)
    wanted = logits(original, CLASSES[model_type][1])
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
    as_bin(original, sharded, buffers | {"model.rotary_emb.inv_freq": torch.ones(2)})
    convert(original, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), wanted)


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; `...` removes one."""
    config = {name: value for name, value in (read_config(folder) | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", CLASSES)
def test_config_of_an_older_release(model_type, tmp_path):
    """Its theta and scaling stand at the top level, of which Olmo3Config today loses a part."""
    rope = YARN_OF_LAYERS if model_type == "olmo3" else YARN
    original = save(tmp_path / "original", model_type, rope_parameters=rope, num_hidden_layers=4)
    wanted = logits(original, CLASSES[model_type][1])
    scaling = {name: value for name, value in YARN.items() if name != "rope_theta"}
    rewrite(original, rope_parameters=..., rope_theta=300.0, rope_scaling=scaling, dtype=..., torch_dtype="float32")
    convert(original, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), wanted)
    rewrite(original, rope_parameters=YARN, rope_theta=..., rope_scaling=...)
    convert(original, tmp_path / "flat")
    assert torch.equal(logits(tmp_path / "flat"), wanted)
    convert(tmp_path / "flat", tmp_path / "back", ConvertOptions(to=model_type))
    assert torch.equal(logits(tmp_path / "back", CLASSES[model_type][1]), wanted)


def test_a_tied_head_may_be_stored(tmp_path):
    original = save(tmp_path / "original", "olmo2", tie_word_embeddings=True)
    weights = load_weights(original)
    save_weights(original, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    convert(original, tmp_path / "olmem")
    assert load_weights(tmp_path / "olmem").keys() == weights.keys()
    save_weights(original, weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    refuse(original, "`lm_head.weight` must equal `model.embed_tokens.weight`")


def test_another_trained_length_leaves_the_scaling_as_it_is(tmp_path):
    scaling = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    original = save(tmp_path / "original", "olmo2", rope_parameters=scaling)
    rewrite(original, rope_parameters=scaling)
    convert(original, tmp_path / "out", ConvertOptions(max_length=64))
    config = read_config(tmp_path / "out")
    assert config["max_position_embeddings"] == 64
    assert config["rope_parameters"][FULL]["original_max_position_embeddings"] == 32


# What the config says beside what Olmem has fields for


def test_fields_that_the_class_does_not_read_are_kept_but_not_followed(tmp_path):
    original = save(tmp_path / "original", "olmo2")
    extra = {"clip_qkv": 0.01, "norm_placement": "pre", "layer_types": [SLIDING] * 2, "logits_scaling": 9.0}
    wanted = logits(original, Olmo2ForCausalLM)
    edit_json(original / "config.json", **extra)
    convert(original, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), wanted)
    assert torch.equal(logits(original, load="from_olmo"), wanted)
    convert(tmp_path / "out", tmp_path / "back", ConvertOptions(to="olmo2"))
    assert read_config(tmp_path / "back") == read_config(original)


def test_other_words_of_the_original_return_only_while_they_mean_the_same(tmp_path):
    unused = {"rope_type": "default", "rope_theta": 7.0}
    rope = {FULL: {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}, SLIDING: unused}
    original = save(tmp_path / "original", "olmo3", layer_types=[FULL] * 2, rope_parameters=rope, note="mine")
    convert(original, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back", ConvertOptions(to="olmo3"))
    assert read_config(tmp_path / "back") == read_config(original)
    assert read_config(tmp_path / "back")["rope_parameters"] == rope

    changed_rope = {FULL: {"rope_type": "default", "rope_theta": 90.0}}
    edit_json(tmp_path / "out" / "config.json", rope_parameters=changed_rope, note="an Olmem user's")
    convert(tmp_path / "out", tmp_path / "changed", ConvertOptions(to="olmo3"))
    config = read_config(tmp_path / "changed")
    assert config["rope_parameters"][FULL] == changed_rope[FULL]
    assert config["note"] == "mine"


def test_keys_that_an_olmem_config_was_given_go_along(converted, tmp_path):
    folder = Path(shutil.copytree(converted("olmo"), tmp_path / "olmem"))
    edit_json(folder / "config.json", license="mine")
    convert(folder, tmp_path / "back", ConvertOptions(to="olmo2"))
    config = read_config(tmp_path / "back")
    assert config["license"] == "mine" and not {"auto_map", "olmo_config", "norm_type"} & set(config)


# What is refused on the way in


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"is_causal": False}, "`is_causal` must be true"),
        ({"hidden_act": "no such"}, "`hidden_act`"),
        (
            {"num_hidden_layers": 10**9, "layer_types": None},
            "`num_hidden_layers` of the config must fit the 25 tensors",
        ),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "must divide `num_attention_heads`"),
        ({"hidden_size": 32}, "of shape"),
        ({"eos_token_id": [2, 40]}, "`eos_token_id` of the config must be in the vocabulary of 40 (got 40)"),
        ({"layer_types": [FULL]}, "layer"),
        ({"layer_types": ["chunked_attention"] * 2}, "`layer_types` must be made of"),
        ({"rope_parameters": {FULL: YARN, SLIDING: YARN}}, "`rope_parameters['sliding_attention']['rope_type']`"),
        ({"rope_parameters": YARN_OF_LAYERS | {FULL: {"rope_theta": 1.0, "rope_type": "longrope"}}}, "rope"),
        ({"rope_parameters": []}, "config"),
        ({"rope_parameters": "yarn"}, "config"),
        ({"architectures": ["Olmo3ForSequenceClassification"]}, "`architectures`"),
        ({"architectures": ["Olmo3Model"]}, "`architectures`"),
        ({"model_type": "llama"}, "`model_type` 'llama', of which olmo, olmo2, olmo3 convert"),
        ({"model_type": ["olmo3"]}, "olmo, olmo2, olmo3 convert"),
        ({"tie_word_embeddings": True}, "`lm_head.weight` must equal"),
        ({"attention_bias": True}, "lacks 8 tensors"),
    ],
    ids=str,
)
def test_config_that_is_refused(changes, words, tmp_path):
    (tmp_path / "place").mkdir()
    original = save(tmp_path / "place" / "original", "olmo3", layer_types=[SLIDING, FULL])
    edit_json(original / "config.json", **changes)
    refuse(original, words)


def test_folder_of_another_family(tmp_path):
    (tmp_path / "place").mkdir()
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "place" / "llama")
    refuse(tmp_path / "place" / "llama", "`model_type` 'llama', of which olmo, olmo2, olmo3 convert")


def test_classifier_is_refused(tmp_path):
    (tmp_path / "place").mkdir()
    Olmo2ForSequenceClassification(Olmo2Config(**SIZES)).save_pretrained(tmp_path / "place" / "original")
    refuse(tmp_path / "place" / "original", "`architectures` of config.json must be a causal language model's")


@pytest.fixture
def sharded(tmp_path) -> Path:
    (tmp_path / "place").mkdir()
    return save(tmp_path / "place" / "original", "olmo2", shards="4KB")


def edit_index(folder: Path, name: str, file: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert name in index["weight_map"]
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "", 3, None, ["model.safetensors"], {}])
def test_index_that_leads_out_of_the_folder(file, sharded):
    shutil.copy(min(sharded.glob("model-*.safetensors")), sharded.parent / "x.safetensors")
    edit_index(sharded, "model.norm.weight", file)
    refuse(sharded, "must name files of its own folder only")


def test_index_that_is_wrong(sharded):
    index = sharded / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(places.values()))
    assert len(shards) > 2
    other = next(shard for shard in shards if shard != places["model.norm.weight"])
    edit_index(sharded, "model.norm.weight", other)
    refuse(sharded, "must hold the tensors that model.safetensors.index.json lists in it", "'model.norm.weight'")
    edit_index(sharded, "model.norm.weight", places["model.norm.weight"])
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'):
        index.write_text(text)
        refuse(sharded, str(index.name))


def test_shards_that_are_wrong(sharded):
    first = min(sharded.glob("model-*.safetensors"))
    kept = first.read_bytes()
    first.unlink()
    refuse(sharded, f"`{first}` must exist")
    first.write_bytes(kept[:100])
    refuse(sharded, "cut short, damaged")
    first.write_bytes(kept)
    (sharded / "model-00009-of-00009.safetensors").write_bytes(kept)
    refuse(sharded, "must be listed in `model.safetensors.index.json`")
    (sharded / "model-00009-of-00009.safetensors").rename(sharded / "model.safetensors")
    refuse(sharded, "it holds both")
    (sharded / "model.safetensors").unlink()
    convert(sharded, sharded.parent / "out")


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("model.norm.weight", lambda value: None, "lacks 1 tensors: model.norm.weight"),
        ("model.norm.weight", lambda value: value[:-1], "`model.norm.weight` must give model.norm.weight of shape"),
        ("model.extra", lambda value: torch.ones(2), "holds, unexpectedly, 1 tensors: model.extra"),
        ("lm_head.weight", lambda value: value * float("nan"), "`lm_head.weight` must be finite"),
        ("lm_head.weight", lambda value: value.int(), "must hold floating-point weights"),
        ("lm_head.weight", lambda value: value.half(), "add --dtype"),
    ],
)
def test_weights_that_are_wrong(name, spoil, words, tmp_path):
    (tmp_path / "place").mkdir()
    original = save(tmp_path / "place" / "original", "olmo2")
    weights = load_weights(original)
    value = spoil(weights.get(name))
    save_weights(
        original,
        {**{key: weights[key] for key in weights if key != name}, **({name: value} if value is not None else {})},
    )
    refuse(original, words)


class Code:
    """A pickle that writes a file when it is read by `pickle`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_does_not_run(tmp_path):
    (tmp_path / "place").mkdir()
    original, canary = save(tmp_path / "place" / "original", "olmo2"), tmp_path / "ran"
    as_bin(original, sharded=False)
    torch.save({"model.norm.weight": Code(canary)}, original / "pytorch_model.bin")
    refuse(original, "must hold tensors and nothing that acts")
    assert not canary.exists()


def test_settings_of_generation_in_the_wrong_file_are_noted(tmp_path):
    """Transformers too drops them when it writes the config, unless they are in a file of their own."""
    original = save(tmp_path / "original", "olmo2")
    edit_json(original / "config.json", temperature=0.5, do_sample=True)
    assert convert(original, tmp_path / "own file")["notes"] == []
    (original / "generation_config.json").unlink()
    (note,) = convert(original, tmp_path / "no file")["notes"]
    assert note.startswith("config.json has do_sample, temperature of generation")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_config(text, tmp_path):
    (tmp_path / "place").mkdir()
    original = save(tmp_path / "place" / "original", "olmo2")
    (original / "config.json").write_text(text)
    refuse(original, "config.json")


def test_damaged_generation_config(tmp_path):
    (tmp_path / "place").mkdir()
    original = save(tmp_path / "place" / "original", "olmo2")
    (original / "generation_config.json").write_text("{")
    refuse(original, "generation_config.json")


# The tokenizer and the other files


@pytest.fixture
def instruct(tmp_path) -> Path:
    """A small instruct model, as it is published: a model's own tokenizer class, a chat template, two ends of text."""
    (tmp_path / "place").mkdir()
    folder = save(tmp_path / "place" / "original", "olmo2", vocab_size=2048, eos_token_id=[2, 3])
    shutil.copy(DEMO / "tokenizer.json", folder)
    added = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": added[0]["content"], "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": added[0]["content"]}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    edit_json(folder / "generation_config.json", temperature=0.6, do_sample=True, eos_token_id=[2, 3])
    return folder


def test_tokenizer_and_chat_template_go_along_both_ways(instruct, tmp_path):
    convert(instruct, tmp_path / "olmem")
    convert(tmp_path / "olmem", tmp_path / "back", ConvertOptions(to="olmo2"))
    text = "def f(x):\n    return 12345\n\n\n"
    native = AutoTokenizer.from_pretrained(DEMO)(text).input_ids
    chat = [{"role": "user", "content": "hi"}]
    for out in (tmp_path / "olmem", tmp_path / "back"):
        for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
            assert (out / name).read_bytes() == (instruct / name).read_bytes()
        settings = json.loads((instruct / "tokenizer_config.json").read_text())
        wanted = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
        assert json.loads((out / "tokenizer_config.json").read_text()) == wanted
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer(text).input_ids == native
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hi"
    assert tensors_equal(tmp_path / "back", instruct)
    assert (tmp_path / "back" / "config.json").read_bytes() == (instruct / "config.json").read_bytes()


def test_a_class_that_keeps_the_ids_stays_as_it_is(instruct, tmp_path):
    edit_json(instruct / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    convert(instruct, tmp_path / "olmem")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "olmem" / name).read_bytes() == (instruct / name).read_bytes()


def test_another_tokenizer_may_be_chosen(instruct, tmp_path):
    edit_json(instruct / "config.json", eos_token_id=[2046, 2047], pad_token_id=None)
    (instruct / "tokenizer.json").write_text("{")
    refuse(instruct, "must be a readable tokenizer.json", "--tokenizer")
    convert(instruct, tmp_path / "olmem", ConvertOptions(tokenizer=DEMO / "tokenizer.json"))
    assert (tmp_path / "olmem" / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert not (tmp_path / "olmem" / "chat_template.jinja").exists()


def test_templates_by_name(instruct, tmp_path):
    (instruct / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit_json(instruct / "tokenizer_config.json", chat_template=templates)
    convert(instruct, tmp_path / "olmem")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "olmem").chat_template
    assert loaded == {"default": "plain", "tool_use": "tools"}


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model"])
def test_tokenizer_that_only_code_could_read(name, instruct):
    (instruct / "tokenizer.json").rename(instruct / name)
    refuse(instruct, "must have a tokenizer.json", name, "--tokenizer")


def test_tokenizer_larger_than_the_vocabulary(tmp_path):
    (tmp_path / "place").mkdir()
    original = save(tmp_path / "place" / "original", "olmo2")
    shutil.copy(DEMO / "tokenizer.json", original)
    refuse(original, "`vocab_size` must cover the 2048 tokens")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_tokenizer_files(name, instruct):
    (instruct / name).write_text("[")
    refuse(instruct, name)


def test_code_that_a_folder_names_does_not_run(instruct, tmp_path):
    canary = tmp_path / "ran"
    (instruct / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\n")
    edit_json(instruct / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"})
    edit_json(instruct / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.C", "code.C"]})
    lines: list[str] = []
    convert(instruct, tmp_path / "olmem", say=lines.append)
    assert sum("`auto_map`" in line for line in lines) == 2
    assert "code" not in str(read_config(tmp_path / "olmem")["auto_map"])
    assert not (tmp_path / "olmem" / "code.py").exists()
    convert(tmp_path / "olmem", tmp_path / "back", ConvertOptions(to="olmo2"))
    assert "auto_map" not in read_config(tmp_path / "back")
    assert "auto_map" not in (tmp_path / "back" / "tokenizer_config.json").read_text()
    assert not canary.exists()


def test_overwrite_takes_what_a_conversion_wrote_and_nothing_else(instruct, tmp_path):
    for _ in range(2):
        convert(instruct, tmp_path / "olmem", ConvertOptions(overwrite=True))
        convert(tmp_path / "olmem", tmp_path / "back", ConvertOptions(to="olmo2", overwrite=True))
    before = snapshot(instruct)
    with pytest.raises(CheckpointError, match="a model of another kind"):
        convert(tmp_path / "olmem", instruct, ConvertOptions(to="olmo2", overwrite=True))
    assert snapshot(instruct) == before


# What is refused on the way out

TINY: dict[str, Any] = SIZES | {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 4}
# A change of every field, the target, and the words of the error; none where the target carries it.
OF_OLMO1 = {"norm_placement": "pre", "norm_type": "layer_plain", "qk_norm": "none", "rms_norm_eps": 1e-5}
CHANGES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "vocab_size": ({"vocab_size": 41}, "olmo3", None),
    "hidden_size": ({"hidden_size": 8}, "olmo3", None),
    "intermediate_size": ({"intermediate_size": 8}, "olmo3", None),
    "num_hidden_layers": ({"num_hidden_layers": 1, "layer_types": [FULL]}, "olmo3", None),
    "num_attention_heads": ({"num_attention_heads": 2}, "olmo3", None),
    "num_key_value_heads": ({"num_key_value_heads": 2}, "olmo3", None),
    "head_dim": ({"head_dim": 8}, "olmo3", None),
    "hidden_act": ({"hidden_act": "elephant"}, "olmo3", "an activation of Transformers"),
    "max_position_embeddings": ({"max_position_embeddings": 64}, "olmo3", None),
    "norm_placement": ({"norm_placement": "peri"}, "olmo3", "'post'"),
    "norm_type": ({"norm_type": "layer"}, "olmo3", "'rms'"),
    "rms_norm_eps": (OF_OLMO1 | {"rms_norm_eps": 1e-6, "layer_types": FULL}, "olmo", "1e-05"),
    "qk_norm": ({"qk_norm": "head"}, "olmo3", "'full'"),
    "clip_qkv": ({"clip_qkv": 3.0}, "olmo3", "None"),
    "clip_qkv_stage": (
        OF_OLMO1 | {"clip_qkv": 3.0, "clip_qkv_stage": "rotary", "layer_types": FULL},
        "olmo",
        "'projec",
    ),
    "rope_parameters": (
        {"rope_parameters": {FULL: {"rope_theta": 50.0, "inverse_frequencies": [1.0, 0.5]}}},
        "olmo3",
        "{'full_attention'",
    ),
    "layer_types": ({"layer_types": [SLIDING, SLIDING]}, "olmo2", "['full_attention', 'full_attention']"),
    "sliding_window": ({"sliding_window": 9}, "olmo3", None),
    "attention_chunk_size": ({"attention_chunk_size": 4}, "olmo3", "None"),
    "attention_chunk_lookback": ({"attention_chunk_lookback": 1}, "olmo3", "0"),
    "num_sink_tokens": ({"num_sink_tokens": 2}, "olmo3", "0"),
    "sink_logit_init": ({"sink_logit_init": 0.0}, "olmo3", "None"),
    "num_memory_tokens": ({"num_memory_tokens": 2}, "olmo3", "0"),
    "memory_segment_length": ({"memory_segment_length": 3}, "olmo3", "None"),
    "memory_bptt_segments": ({"memory_bptt_segments": 1}, "olmo3", "None"),
    "retrieval_layers": ({"retrieval_layers": [0]}, "olmo3", "[]"),
    "retrieval_top_k": ({"retrieval_top_k": 5}, "olmo3", "32"),
    "retrieval_capacity": ({"retrieval_capacity": 50}, "olmo3", "65536"),
    "retrieval_admission": ({"retrieval_admission": "learned"}, "olmo3", "'recent'"),
    "memory_gate_init": ({"memory_gate_init": -2.0}, "olmo3", "None"),
    "retrieval_gate_init": ({"retrieval_gate_init": -2.0}, "olmo3", "-4.0"),
    "retrieval_device": ({"retrieval_device": "cpu"}, "olmo3", "None"),
    "position_embedding": ({"position_embedding": "none"}, "olmo3", "'rope'"),
    "shared_projections": ({"shared_projections": "key_value"}, "olmo3", "'none'"),
    "attention_bias": ({"attention_bias": True}, "olmo3", None),
    "attention_dropout": ({"attention_dropout": 0.5}, "olmo3", None),
    "residual_dropout": ({"residual_dropout": 0.5}, "olmo3", None),
    "logits_scaling": ({"logits_scaling": 4.0}, "olmo3", "1.0"),
    "initializer_range": ({"initializer_range": 0.3}, "olmo3", None),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, "olmo3", None),
    "use_cache": ({"use_cache": False}, "olmo3", None),
    "pad_token_id": ({"pad_token_id": None}, "olmo3", None),
    "bos_token_id": ({"bos_token_id": 5}, "olmo3", None),
    "eos_token_id": ({"eos_token_id": [5, 6]}, "olmo3", None),
}


def test_the_changes_are_of_every_field():
    """So that a field that Olmem gains is carried, or refused, by a test."""
    own = {field.name for field in fields(OlmemConfig)} - {field.name for field in fields(PreTrainedConfig)}
    assert set(CHANGES) == own


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_is_carried_or_refused(name, tmp_path):
    changes, target, wanted = CHANGES[name]
    model = OlmemForCausalLM(OlmemConfig(**(TINY | changes)))
    model.save_pretrained(tmp_path / "olmem")
    lines: list[str] = []
    if wanted is not None:
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / "olmem", tmp_path / "out", ConvertOptions(to=target))
        assert f"`{name}` must be {wanted}" in str(caught.value) and "(got " in str(caught.value)
        assert os.listdir(tmp_path) == ["olmem"]
        return
    convert(tmp_path / "olmem", tmp_path / "out", ConvertOptions(to=target), say=lines.append)
    config = OlmemConfig.from_olmo(tmp_path / "out")
    dropped = 0.0 if name == "residual_dropout" else getattr(model.config, name)
    assert getattr(config, name) == dropped
    assert any("residual_dropout 0.5 was of training only" in line for line in lines) == (name == "residual_dropout")
    assert any("head_dim 8 is not" in line for line in lines) == (name == "head_dim")


@pytest.mark.parametrize(
    ("changes", "target", "way_out"),
    [
        ({}, "olmo2", "use --to olmo3."),
        ({"layer_types": FULL}, "olmo", "use --to olmo2 or olmo3."),
        (OF_OLMO1 | {"layer_types": FULL, "clip_qkv": 2.0}, "olmo2", "use --to olmo."),
        ({"layer_types": "chunked_attention", "attention_chunk_size": 4}, "olmo3", "no OLMo class can"),
        ({"norm_type": "layer", "logits_scaling": 2.0}, "olmo3", "no OLMo class can"),
    ],
)
def test_a_refusal_names_the_class_that_fits(changes, target, way_out, tmp_path):
    (tmp_path / "place").mkdir()
    OlmemForCausalLM(OlmemConfig(**(TINY | changes))).save_pretrained(tmp_path / "place" / "olmem")
    refuse(tmp_path / "place" / "olmem", way_out, f"for Transformers' {target}", options=("--to", target))


def test_everything_that_is_lost_is_named(tmp_path):
    (tmp_path / "place").mkdir()
    changes = {"num_sink_tokens": 2, "logits_scaling": 4.0}
    OlmemForCausalLM(OlmemConfig(**(TINY | changes))).save_pretrained(tmp_path / "place" / "olmem")
    words = ("`num_sink_tokens` must be 0 (got 2)", "`logits_scaling` must be 1.0 (got 4.0)")
    refuse(tmp_path / "place" / "olmem", *words, options=("--to", "olmo3"))


def test_a_model_without_windows_needs_none(tmp_path):
    config = OlmemConfig(**(TINY | {"layer_types": FULL, "sliding_window": None}))
    OlmemForCausalLM(config).save_pretrained(tmp_path / "olmem")
    for target in ("olmo2", "olmo3"):
        assert (
            convert(tmp_path / "olmem", tmp_path / target, ConvertOptions(to=target))["verification"]["max_difference"]
            == 0.0
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["OlmemForSequenceClassification"]}, "`architectures`"),
        ({"quantization_config": {}, "olmo_config": 3}, "`olmo_config`"),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"num_hidden_layers": "two"}, "`num_hidden_layers` of config.json must be an integer"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "`num_hidden_layers` of the config must fit"),
        ({"norm_type": "none"}, "must describe a model: `norm_type` must be one of"),
        ({"num_hidden_layers": 3, "layer_types": FULL}, "lacks"),
        ({"is_causal": False}, "`is_causal` must be true"),
        ({"model_type": "olmo2"}, "must be an Olmem folder with --to (got `model_type` 'olmo2'"),
    ],
    ids=str,
)
def test_olmem_folder_that_is_refused(changes, words, changeable):
    folder = changeable("olmo")
    edit_json(folder / "config.json", **changes)
    refuse(folder, words, out=folder.parent / "out", options=("--to", "olmo2"))


def test_native_checkpoint_goes_in_before_it_goes_out(tmp_path):
    with pytest.raises(CheckpointError, match="must be an Olmem folder with --to"):
        convert(source("olmo"), tmp_path / "out", ConvertOptions(to="olmo2"))
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out", ConvertOptions(to="olmo2"))


def test_damaged_weights_of_an_olmem_folder(changeable):
    folder = changeable("olmo")
    weights = load_weights(folder)
    save_weights(folder, {name: value for name, value in weights.items() if name != "model.norm.weight"})
    refuse(folder, "lacks 1 tensors: model.norm.weight", out=folder.parent / "out", options=("--to", "olmo2"))


# The proof


def retargeted(table):
    """A mistaken table, by which gate and up change places."""
    places = {"gate": "up", "up": "gate"}
    return [
        key
        if not (kind := next((kind for kind in places if f".{kind}_proj" in str(key.native)), None))
        else type(key)(key.native, (key.targets[0].replace(kind, places[kind]),))
        for key in table
    ]


def test_mistake_on_the_way_in_is_caught(monkeypatch, tmp_path):
    original = save(tmp_path / "original", "olmo2")
    monkeypatch.setattr(transformers_olmo, "key_table", changed(transformers_olmo.key_table, retargeted))
    with pytest.raises(CheckpointError, match="native logits"):
        convert(original, tmp_path / "out")
    assert os.listdir(tmp_path) == ["original"]


@pytest.mark.parametrize(
    ("function", "change", "word"),
    [
        ("key_table", retargeted, "block 0"),
        ("config_of", lambda config: (setattr(config, "rms_norm_eps", 1e-3), config)[1], "block 0"),
    ],
)
def test_mistake_on_the_way_out_is_caught(function, change, word, monkeypatch, converted, tmp_path):
    module = importlib.import_module("olmem_convert.formats.olmem")
    targets = importlib.import_module("olmem_convert.commands.targets")
    monkeypatch.setattr(targets, "check_nothing_lost", lambda *_: None)
    for place in (module, targets):
        if hasattr(place, function):
            monkeypatch.setattr(place, function, changed(getattr(module, function), change))
    with pytest.raises(CheckpointError, match=r"(?s)the Olmem logits.*first to diverge") as caught:
        convert(converted("olmo"), tmp_path / "out", ConvertOptions(to="olmo2"))
    assert f"{word} " in str(caught.value) and os.listdir(tmp_path) == []


def test_verify_against_a_transformers_folder(tmp_path):
    original = save(tmp_path / "original", "olmo3")
    convert(original, tmp_path / "out", ConvertOptions(verify=False))
    report = verify(tmp_path / "out", original)
    assert report["passed"] and report["prompt"]["tokens"] > 5 and len(report["stages"]) == 5
    edit_json(tmp_path / "out" / "config.json", sliding_window=6)
    with pytest.raises(CheckpointError, match="`sliding_window` is 6, the checkpoint's is 5"):
        verify(tmp_path / "out", original)


def test_what_was_exported_is_verified_against_an_olmem_folder_alone(converted, tmp_path):
    convert(converted("olmo"), tmp_path / "out", ConvertOptions(to="olmo2"))
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"`--against` must name the Olmem folder that .* was made from"):
        verify(tmp_path / "out", source("olmo"))
    assert snapshot(tmp_path) == before


# The command


def test_command_goes_back(converted, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(converted("olmo")), str(tmp_path / "out"), "--to", "olmo2"])
    assert result.exit_code == 0 and result.stderr == ""
    assert "the logits of Olmo2ForCausalLM differ by at most 0 from Olmem's" in result.stdout
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["passed"] is True
    options = ["--to", "olmo2", "--overwrite", "--json", "--max-shard-size", "50KB"]
    result = CliRunner().invoke(app, ["convert", str(converted("olmo")), str(tmp_path / "out"), *options])
    report = json.loads(result.stdout)
    assert report["format"] == "Transformers olmo2" and report["verification"]["weight_differences"] == []
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert tensors_equal(tmp_path / "out", converted("olmo"))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--to", "llama"], "`to` must be one of"),
        (["--to", "olmo2", "--max-length", "9"], "`max_length` must be left out with `to` (got 9)"),
        (["--to", "olmo2", "--set", "num_memory_tokens=2"], "`memory` must be left out with `to`"),
    ],
)
def test_wrong_use_of_to(options, rule, converted, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(converted("olmo")), str(tmp_path / "out"), *options])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert f"error: {rule}" in result.stderr and os.listdir(tmp_path) == []


def test_dynamic_rope_is_verified_as_far_as_a_call_is_its_tokens(tmp_path):
    """Beyond the trained length a call of Transformers depends on its length: an honest model was refused."""
    rope = {"rope_type": "dynamic", "rope_theta": 90.0, "factor": 2.0}
    folder = save(tmp_path / "place" / "src", "olmo2", rope_parameters=rope)
    report = convert(folder, tmp_path / "out")
    assert report["verification"]["prompt"]["tokens"] == SIZES["max_position_embeddings"]
    assert report["verification"]["max_difference"] == 0.0
    assert any("'dynamic' is verified up to 32 tokens" in note for note in report["notes"])
    assert (
        convert(tmp_path / "out", tmp_path / "back", ConvertOptions(to="olmo2"))["verification"]["max_difference"]
        == 0.0
    )
    assert read_config(tmp_path / "back") == read_config(folder)
    refuse(folder, "`max_length` must be left out with rope_type 'dynamic'", options=("--max-length", "64"))


@pytest.mark.parametrize("window", [2**14 + 1, 10**9, 2**53 - 1])
def test_a_window_that_no_prompt_can_be_longer_than_is_refused(window, tmp_path):
    folder = save(tmp_path / "place" / "src", "olmo3")
    edit_json(folder / "config.json", sliding_window=window)
    refuse(folder, "`sliding_window` must be at most 16384 to be verified")


def test_models_whose_parts_return_tuples_are_refused(tmp_path):
    """They cannot be run in Transformers either; the comparison was a traceback."""
    folder = save(tmp_path / "place" / "src", "olmo2")
    convert(folder, tmp_path / "place" / "olmem")
    for path, options in ((folder, ()), (tmp_path / "place" / "olmem", ("--to", "olmo2"))):
        edit_json(path / "config.json", return_dict=False)
        refuse(path, "`return_dict` of config.json must be true (got False)", options=options)


@pytest.mark.parametrize("labels", [10**9, "many"])
def test_labels_without_end_are_refused_before_they_are_made(labels, tmp_path):
    folder = save(tmp_path / "place" / "src", "olmo2")
    convert(folder, tmp_path / "place" / "olmem")
    edit_json(folder / "config.json", num_labels=labels)
    refuse(folder, "`num_labels` of config.json must be at most")
    for changes in ({"num_labels": labels}, {"olmo_config": {"num_labels": labels}}):
        edit_json(tmp_path / "place" / "olmem" / "config.json", **changes)
        refuse(tmp_path / "place" / "olmem", "`num_labels` of config.json must be at", options=("--to", "olmo2"))
        edit_json(tmp_path / "place" / "olmem" / "config.json", num_labels=2)


def test_fields_without_end_are_refused_on_the_way_back(tmp_path):
    folder = save(tmp_path / "place" / "src", "olmo2")
    convert(folder, tmp_path / "place" / "olmem")
    edit_json(tmp_path / "place" / "olmem" / "config.json", olmo_config={f"field{index}": 1 for index in range(201)})
    refuse(
        tmp_path / "place" / "olmem", "`olmo_config` of config.json must have at most 200", options=("--to", "olmo2")
    )


def test_values_that_a_state_dict_does_not_hold_are_refused(tmp_path):
    """A few bytes that say that they are many, none at all, or that unpack into many."""
    folder = save(tmp_path / "place" / "src", "olmo2")
    weights = load_weights(folder)
    (folder / "model.safetensors").unlink()
    name = "model.embed_tokens.weight"
    for value in (torch.zeros(1, 1).expand(40, 16), torch.zeros(40, 16, device="meta")):
        torch.save(weights | {name: value}, folder / "pytorch_model.bin")
        refuse(folder, f"must hold every value of '{name}'")
    torch.save(weights, folder / "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin") as stored:
        records = {record: stored.read(record) for record in stored.namelist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for record, data in records.items():
            packed.writestr(record, data)
    refuse(folder, "must be as `torch.save` writes it, not compressed")


def test_a_window_is_not_to_blame_where_layers_may_not_slide(tmp_path):
    convert(save(tmp_path / "place" / "src", "olmo3", sliding_window=5), tmp_path / "place" / "olmem")
    assert "sliding_window" not in refuse(tmp_path / "place" / "olmem", "`layer_types` must", options=("--to", "olmo2"))
