"""Verification catches every way a converted folder can be wrong while it still loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert.checkpoints import DEMO, edit_json, load_weights, options, read_config, save_weights, snapshot, source
from convert.mutations import MUTATIONS, mutate
from convert.writers import OLMO_CORE_MODEL, write_olmo_core
from olmem_convert import CheckpointError, ConvertOptions, VerifyOptions, convert, verify
from olmem_convert.cli import app
from olmem_convert.formats import baka, olmo, olmo_core
from olmem_convert.proof import comparing, loading, verification
from transformers import Olmo3Config, Olmo3ForCausalLM
from typer.testing import CliRunner

ALL = (
    "olmo",
    "olmo_gqa_tied",
    "olmo_core_swa_yarn",
    "core300_fsdp2_4rank_empty",
    "core300_prenorm_headqk",
    "core300_pi",
)
SLIDING = ("olmo_core_swa", "olmo_core_swa_yarn", "olmo_core_swa_fsdp2", "core300_swa_first_full", "core300_abf_swa")
EPSILON = (
    "olmo_core_v2_3_0",
    "olmo_clip_scale",
    "olmo1",
    "core300_12layers",
    "core300_layernorm",
    "legacy_mqa",
    "demo",
)
SCALED = ("olmo_core_swa_yarn", "core180_llama3_scaling", "core300_pi")
WITHOUT_POSITIONS = ("core300_nope", "core300_no_global_rope")
CHUNKED = ("baka_pristine", "baka_elephant", "baka_bfloat16")
CLIPPED = ("olmo_clip_scale", "legacy_clip_gqa", "core300_clip")
# Where a mutation applies; to ALL unless it is named here.
FOLDERS = {
    "epsilon_of_another_generation": tuple(dict.fromkeys((*ALL, *SLIDING, *EPSILON, *CHUNKED))),
    "theta_of_another_generation": (*ALL, "baka_pristine", "baka_elephant", "olmo1", "core180_llama3_scaling", "demo"),
    "theta_off_by_a_hundredth": (
        *ALL,
        "baka_pristine",
        "baka_elephant",
        "olmo1",
        "core180_llama3_scaling",
        "core300_abf_swa",
        "demo",
    ),
    "query_and_key_norm_swapped": ("olmo", "olmo_clip_scale", "olmo_core_swa", "core300_prenorm_headqk", "demo"),
    "query_and_key_swapped": ("olmo", "olmo_clip_scale", "olmo_core_swa", "olmo1", *CHUNKED, "demo"),
    "attention_and_feedforward_norm_swapped": (*ALL, "core300_peri_norm", "core300_layernorm", "demo"),
    "window_one_longer": (*SLIDING, "demo"),
    "window_one_shorter": (*SLIDING, "demo"),
    "layer_types_rotated": (*SLIDING, "demo"),
    "rope_interleaved": (*ALL, *CHUNKED),
    "gate_and_up_swapped": (*ALL, *CHUNKED),
    "chunk_one_longer": CHUNKED,
    "chunk_one_shorter": CHUNKED,
    "chunks_that_see_the_one_before": CHUNKED,
    "stored_frequencies_dropped": ("baka_bfloat16",),
    "positions_everywhere": WITHOUT_POSITIONS,
    "positions_rotated": WITHOUT_POSITIONS,
    "positions_dropped": ("olmo", "olmo_core_swa", "baka_pristine", *WITHOUT_POSITIONS),
    "rope_scaling_dropped": SCALED,
    "yarn_attention_factor_dropped": ("olmo_core_swa_yarn",),
    "tied_flag_flipped": (*ALL, "olmo_core_tied", "olmo1"),
    "clip_dropped": CLIPPED,
    "clip_after_rope": CLIPPED,
    "logits_scaling_dropped": ("olmo_clip_scale",),
    "activation_of_another_kind": ("olmo", "core300_gelu", *CHUNKED),
    "one_norm_scaled": (*ALL, "core300_layernorm", "legacy_qk_noaffine"),
}
# What no logits can show: a factor that a norm takes out, a row that no prompt need hold, a flag that the loader mends.
UNSEEN = ("normalised_tensor_scaled", "embedding_row_changed", "tied_flag_flipped")
PAIRS = [(mutation, name) for mutation in MUTATIONS for name in FOLDERS.get(mutation, ALL)]


def report_of(out: Path) -> dict | None:
    path = out / "verification.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(("mutation", "name"), PAIRS)
def test_every_mutation_is_caught(mutation, name, converted, changeable):
    """By the comparison of files, and, where they can show it, by the logits alone."""
    out, before = changeable(name), read_config(converted(name))
    assert mutate(out, mutation), "the mutation changes nothing here"
    with pytest.raises(CheckpointError):
        verify(out, source(name), VerifyOptions(**options(name)))
    if (report := report_of(out)) is None:  # it did not even load
        assert mutation == "tied_flag_flipped"
        return
    assert report["passed"] is False
    assert bool(report["config_differences"]) == (read_config(out) != before)
    assert bool(report["weight_differences"]) == (read_config(out) == before)
    if mutation not in UNSEEN:
        assert not all(stage["equal"] for stage in report["stages"])


@pytest.mark.parametrize("name", ["olmo", "olmo_core_tied", "olmo_core_swa_yarn", "core300_layernorm", "demo"])
def test_what_the_mutations_start_from_passes(name, changeable):
    """Written anew by the same code as a mutation, only unchanged."""
    out = changeable(name)
    (out / "config.json").write_text(json.dumps(read_config(out)))
    save_weights(out, load_weights(out))
    assert verify(out, source(name), VerifyOptions(**options(name)))["passed"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mutation", ["one_value_changed", "theta_off_by_a_hundredth", "window_one_longer"])
def test_mutations_of_rounded_weights_are_caught(mutation, dtype, converted, tmp_path):
    out = shutil.copytree(converted("olmo_core_swa", dtype), tmp_path / "out")
    verify(out, source("olmo_core_swa"))
    assert mutate(out, mutation)
    with pytest.raises(CheckpointError, match="native logits"):
        verify(out, source("olmo_core_swa"))


@pytest.mark.parametrize("mutation", ["gate_and_up_swapped", "window_one_longer", "rope_scaling_dropped"])
def test_command_exits_with_one_and_names_the_first_block_that_diverges(mutation, changeable):
    out = changeable("olmo_core_swa_yarn")
    mutate(out, mutation)
    result = CliRunner().invoke(app, ["verify", str(out), "--against", str(source("olmo_core_swa_yarn"))])
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == result.stderr.splitlines()[:1]
    first = "block 3" if mutation == "rope_scaling_dropped" else "block 0"  # the only full layer is the last
    marked = [line for line in result.stderr.splitlines() if "first to diverge" in line]
    assert len(marked) == 1 and marked[0].startswith(first)
    assert "Traceback" not in result.output and result.stdout == ""


def test_command_verifies_a_good_folder(converted, changeable):
    out = changeable("olmo_core_swa_yarn")
    (out / "verification.json").unlink()
    result = CliRunner().invoke(app, ["verify", str(out), "--against", str(source("olmo_core_swa_yarn")), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((out / "verification.json").read_text())
    assert snapshot(out) == snapshot(converted("olmo_core_swa_yarn"))


def refused(out, name: str, words: str) -> None:
    """`verify` refuses the folder, and no report stays that vouches for it."""
    with pytest.raises(CheckpointError, match=words):
        verify(out, source(name))
    report = report_of(out)
    assert report is None or report["passed"] is False


def changed(function, change):
    """The function with `change` applied to what it returns."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def with_fields(**fields):
    """A mistaken `olmem_config`, of OLMo (the fields) or OLMo-core (the fields and the key table)."""
    return lambda made: made | fields if isinstance(made, dict) else (made[0] | fields, made[1])


def retargeted(one: str, other: str):
    """A mistaken `key_table`, in which two targets have changed places."""

    def swap(target: str) -> str:
        return target.replace(one, "\0").replace(other, one).replace("\0", other)

    return lambda table: [replace(key, targets=tuple(map(swap, key.targets))) for key in table]


def without_order(table):
    """A mistaken `key_table` that leaves the rows of queries and keys where they are."""
    return [replace(key, order=None) for key in table]


# Mistakes in the conversion's own tables, of which it would write a folder that agrees with itself.
MISTAKES = [
    (olmo, "key_table", "olmo", retargeted("gate_proj", "up_proj")),
    (olmo, "key_table", "olmo", retargeted("q_proj", "k_proj")),
    (olmo, "key_table", "olmo", retargeted("q_norm", "k_norm")),
    (olmo, "key_table", "olmo", retargeted("attention_layernorm", "feedforward_layernorm")),
    (olmo, "olmem_config", "olmo", with_fields(rms_norm_eps=1e-5)),
    (olmo, "olmem_config", "olmo", with_fields(rope_theta=10000.0)),
    (olmo, "olmem_config", "olmo_clip_scale", with_fields(logits_scaling=1.0)),
    (olmo, "olmem_config", "olmo_clip_scale", with_fields(clip_qkv=None)),
    (olmo, "olmem_config", "legacy_clip_gqa", with_fields(clip_qkv_stage="rotary")),
    (olmo_core, "key_table", "olmo_core", retargeted("gate_proj", "up_proj")),
    (olmo_core, "key_table", "core300_peri_norm", retargeted("pre_", "post_")),
    (olmo_core, "olmem_config", "olmo_core_swa_fsdp2", with_fields(rms_norm_eps=1e-5)),
    (olmo_core, "olmem_config", "core300_gelu", with_fields(hidden_act="gelu")),
    (olmo_core, "read_windows", "olmo_core_swa", lambda made: (made[0], made[1] + 1)),
    (olmo_core, "read_windows", "olmo_core_swa", lambda made: (made[0], made[1] - 1)),
    (olmo_core, "read_windows", "core300_swa_first_full", lambda made: (made[0][1:] + made[0][:1], made[1])),
    (olmo_core, "read_positions", "core300_nope", lambda made: [*made[:3], "rope"]),
    (olmo_core, "read_positions", "core300_nope", lambda made: made[::-1]),
    (olmo_core, "read_positions", "core300_no_global_rope", lambda made: ["rope"] * len(made)),
    (olmo_core, "read_scaling", "olmo_core_swa_yarn", lambda made: {}),
    (olmo_core, "read_scaling", "olmo_core_swa_yarn", lambda made: made | {"attention_factor": 1.0}),
    (olmo_core, "read_scaling", "olmo_core_swa_yarn", lambda made: made | {"factor": made["factor"] * 1.01}),
    (olmo_core, "read_scaling", "core180_llama3_scaling", lambda made: made | {"low_freq_factor": 2.0}),
    (baka, "key_table", "baka_pristine", without_order),
    (baka, "key_table", "baka_pristine", retargeted("gate_proj", "up_proj")),
    (baka, "key_table", "baka_pristine", retargeted("q_proj", "k_proj")),
    (baka, "olmem_config", "baka_pristine", with_fields(attention_chunk_size=15)),
    (baka, "olmem_config", "baka_pristine", with_fields(attention_chunk_size=17)),
    (baka, "olmem_config", "baka_pristine", with_fields(attention_chunk_lookback=1)),
    (baka, "olmem_config", "baka_pristine", with_fields(rms_norm_eps=1e-6)),
    (baka, "olmem_config", "baka_pristine", with_fields(hidden_act="gelu")),
    (baka, "olmem_config", "baka_elephant", with_fields(hidden_act="silu")),
    (baka, "rope_parameters", "baka_pristine", lambda made: made | {"rope_theta": 10100.0}),
    (baka, "rope_parameters", "baka_bfloat16", lambda made: {"rope_type": "default", "rope_theta": 10000.0}),
    (olmo_core, "read_scaling", "core300_pi", lambda made: made | {"factor": made["factor"] * 1.01}),
]


@pytest.mark.parametrize(("module", "function", "name", "change"), MISTAKES)
def test_mistake_of_the_conversion_itself_is_caught(module, function, name, change, monkeypatch, tmp_path):
    monkeypatch.setattr(module, function, changed(getattr(module, function), change))
    with pytest.raises(CheckpointError, match="native logits"):
        convert(source(name), tmp_path / "out", ConvertOptions(**options(name)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["olmo1", "olmo_gqa_tied", "olmo_core"])
def test_another_checkpoint_is_no_witness(other, changeable):
    with pytest.raises(CheckpointError):
        verify(changeable("olmo"), source(other))


def test_missing_config_is_refused(changeable):
    out = changeable("olmo")
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        verify(out, source("olmo"))


def test_missing_weights_are_refused(changeable):
    out = changeable("olmo")
    (out / "model.safetensors").unlink()
    refused(out, "olmo", "must hold its weights in safetensors")


@pytest.mark.parametrize("length", [0, 7, 100, 50_000])
def test_truncated_weights_are_refused(length, changeable):
    out = changeable("olmo")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    refused(out, "olmo", "readable")


def test_missing_shard_is_refused(tmp_path):
    out = tmp_path / "out"
    convert(source("olmo"), out, ConvertOptions(max_shard_size="100KB", verify=False))
    next(iter(sorted(out.glob("*.safetensors")))).unlink()
    refused(out, "olmo", ".")


def test_lost_tensor_is_refused_by_name(changeable):
    out = changeable("olmo")
    tensors = load_weights(out)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_weights(out, tensors)
    refused(out, "olmo", r"model\.layers\.1\.mlp\.up_proj\.weight")


def test_extra_tensor_is_refused_by_name(changeable):
    out = changeable("olmo")
    tensors = load_weights(out)
    save_weights(out, tensors | {"model.layers.1.mlp.up_proj.bias": tensors["model.norm.weight"].clone()})
    refused(out, "olmo", r"up_proj\.bias")


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 255}, {"hidden_size": 32}, {"num_hidden_layers": 1}, {"dtype": "int8"}, {"dtype": None}]
)
def test_config_that_does_not_fit_is_refused(changes, changeable):
    out = changeable("olmo")
    edit_json(out / "config.json", **changes)
    refused(out, "olmo", ".")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "nothing"}', '{"model_type": "gpt2"}'])
def test_spoilt_config_is_refused(text, changeable):
    out = changeable("olmo")
    (out / "config.json").write_text(text)
    refused(out, "olmo", ".")


def test_nan_in_the_weights_is_no_equality(changeable):
    out = changeable("olmo")
    tensors = load_weights(out)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_weights(out, tensors)
    with pytest.raises(CheckpointError, match=r"up_proj.* must be finite"):
        verify(out, source("olmo"))
    assert not (out / "verification.json").exists()
    with pytest.raises(CheckpointError, match="native logits"):
        verify(out, source("olmo"), VerifyOptions(allow_nonfinite=True))


def test_code_in_the_folder_does_not_run(changeable, tmp_path):
    """A verified folder's own code is not what is verified, nor trusted."""
    out, canary = changeable("olmo"), tmp_path / "ran"
    for path in out.glob("*.py"):
        path.write_text(f"open({str(canary)!r}, 'w')\n" + path.read_text())
    verify(out, source("olmo"))
    assert not canary.exists()


def test_a_model_larger_than_memory_is_verified_from_its_files(monkeypatch, tmp_path):
    """Bit for bit as one that fits, and with most of it on the disk."""
    convert(DEMO / "step1872", tmp_path / "whole", ConvertOptions(dtype="bfloat16"))
    placed, load = [], loading.load

    def watched(*arguments, **options):
        model = load(*arguments, **options)
        placed.append(set(model.hf_device_map.values()))
        return model

    monkeypatch.setattr(loading, "load", watched)
    monkeypatch.setattr(loading, "free_memory", lambda: 8_000_000)
    convert(DEMO / "step1872", tmp_path / "out", ConvertOptions(dtype="bfloat16"))
    assert placed == [{"cpu", "disk"}] * 2 or placed == [{"cpu", "disk"}, {"cpu"}]
    one, other = (json.loads((tmp_path / name / "verification.json").read_text()) for name in ("whole", "out"))
    assert one == other


def test_infinity_is_not_a_scale():
    """One native value that is infinite would let any other pass."""
    native = torch.tensor([[[float("inf"), 5.0, 5.0]]])
    for converted in (torch.zeros(1, 1, 3), torch.tensor([[[float("inf"), 1.0, 1.0]]])):
        for nonfinite in (False, True):
            assert not comparing.difference(converted, native, nonfinite)["equal"]


def nan_in(index: int) -> torch.Tensor:
    values = torch.zeros(1, 600, 3)
    values[0, index, 1] = float("nan")
    return values


@pytest.mark.parametrize("index", [0, 300, 599])
def test_nan_is_a_difference_wherever_it_is(index):
    for one, other in ((nan_in(index), torch.zeros(1, 600, 3)), (torch.zeros(1, 600, 3), nan_in(index))):
        for nonfinite in (False, True):
            assert not comparing.difference(one, other, nonfinite)["equal"]
    assert not comparing.difference(nan_in(index), nan_in(index))["equal"]
    assert comparing.difference(nan_in(index), nan_in(index), True)["equal"]


def write_long_window(folder: Path, kind: str) -> Path:
    """A small checkpoint, trained on 32 tokens, whose window holds far more, and whose frequencies are high."""
    window, theta = 4096, 1.5
    if kind == "transformers":
        sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        rope = {"rope_type": "default", "rope_theta": theta}
        config = Olmo3Config(
            **sizes,
            num_hidden_layers=1,
            layer_types=["sliding_attention"],
            sliding_window=window,
            max_position_embeddings=32,
            rope_parameters={"full_attention": rope, "sliding_attention": rope},
            pad_token_id=1,
            eos_token_id=2,
        )
        model = Olmo3ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(
                parameter, float(parameter.ndim == 1), 0.5, generator=torch.Generator().manual_seed(0)
            )
        model.save_pretrained(folder)
        return folder
    ends = {"force_full_attention_on_first_layer": False, "force_full_attention_on_last_layer": False}
    mixer = {"rope": {"theta": theta}, "sliding_window": {"pattern": [window]} | ends}
    block = OLMO_CORE_MODEL["block"]
    return write_olmo_core(folder, block=block | {"sequence_mixer": block["sequence_mixer"] | mixer})


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_window_far_beyond_the_trained_length_is_verified(kind, tmp_path):
    """Of angles that float32 rounds, by far more than the tolerance of the logits."""
    convert(write_long_window(tmp_path / "source", kind), tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["prompt"]["tokens"] > 4096
    assert all(stage["max_difference"] < stage["tolerance"] / 2 for stage in report["stages"])


def test_logits_that_overflow_in_the_stored_dtype_are_counted(monkeypatch):
    """They were left out of what rounding costs, without a word."""
    reference = torch.zeros(1, 2, 3, dtype=torch.float64)
    reference[0, 0, 0] = float("nan")
    logits = torch.tensor([[[float("nan"), 0.5, float("inf")], [0.0, float("nan"), 0.0]]])
    monkeypatch.setattr(verification, "native_stages", lambda *_: iter([("logits", reference)]))
    monkeypatch.setattr(verification, "logits_of", lambda *_: logits)
    found = verification.rounding(None, None, torch.zeros(1, 2, dtype=torch.long))
    assert found == {"max_difference": 0.5, "mean_difference": 0.5 / 3, "nonfinite": 2}
