"""The tables of the formats: every weight has its place both ways, every config field its effect or its error."""

import copy
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from convert.checkpoints import FOLDERS, copy_source, edit_json, edit_model, golden, read_config
from convert.writers import (
    NORM,
    OLMO_CORE_MODEL,
    OLMO_MODEL,
    olmo_core_state,
    olmo_state,
    random,
    write_olmo,
    write_olmo_core,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from olmem import OlmemConfig, OlmemForCausalLM
from olmem_convert import CheckpointError, convert
from olmem_convert.formats import olmo, read_fields
from olmem_convert.formats.detect import open_checkpoint
from olmem_convert.formats.planning import to_native, to_olmem
from olmem_convert.reading.tensors import LazyTensor


def target_shapes(checkpoint) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = OlmemForCausalLM(OlmemConfig(**checkpoint.olmem_config))
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


# Keys


@pytest.mark.parametrize("name", FOLDERS)
def test_keys_go_there_and_back_without_a_bit_changed(name):
    checkpoint = golden(name)
    shapes = target_shapes(checkpoint)
    made = {target: tensor.load() for target, tensor in to_olmem(checkpoint.keys, checkpoint.tensors, shapes).items()}
    assert {target: tuple(tensor.shape) for target, tensor in made.items()} == shapes
    back = to_native(checkpoint.keys, made)
    assert set(back) == set(checkpoint.tensors)
    for native, tensor in checkpoint.tensors.items():
        assert back[native].dtype == tensor.dtype and torch.equal(back[native], tensor.load()), native


@pytest.mark.parametrize("name", FOLDERS)
def test_keys_are_a_bijection(name):
    checkpoint = golden(name)
    natives = Counter(key.native for key in checkpoint.keys if key.native)
    targets = Counter(target for key in checkpoint.keys for target in key.targets)
    assert set(natives.values()) == set(targets.values()) == {1}
    assert set(natives) == set(checkpoint.tensors)
    assert set(targets) == set(target_shapes(checkpoint))
    assert all(len(key.targets) == 1 or key.rows or key.same_as or key.numbers for key in checkpoint.keys)


@pytest.mark.parametrize(
    "name", ["olmo", "olmo1", "olmo_sharded_core", "core300_12layers", "olmo_core_tied", "baka_pristine"]
)
class TestCoverage:
    def opened(self, name):
        checkpoint = golden(name)
        return checkpoint, dict(checkpoint.tensors), target_shapes(checkpoint)

    def test_missing_tensor_is_named(self, name):
        checkpoint, tensors, shapes = self.opened(name)
        for lost in list(tensors)[::7]:
            with pytest.raises(CheckpointError, match=rf"lacks 1 tensors: {lost}"):
                to_olmem(checkpoint.keys, {key: value for key, value in tensors.items() if key != lost}, shapes)

    def test_extra_tensor_is_named(self, name):
        checkpoint, tensors, shapes = self.opened(name)
        extra = {"blocks.0.attention.w_g.weight": next(iter(tensors.values()))}
        with pytest.raises(CheckpointError, match=r"unexpectedly, 1 tensors: blocks\.0\.attention\.w_g\.weight"):
            to_olmem(checkpoint.keys, tensors | extra, shapes)

    def test_misshapen_tensor_is_named(self, name):
        checkpoint, tensors, shapes = self.opened(name)
        used = [key.native for key in checkpoint.keys if key.native and key.targets]
        for wrong in used[:6]:
            tensor = tensors[wrong]
            for shape in ((tensor.shape[0] + 1, *tensor.shape[1:]), (*tensor.shape, 1)):
                with pytest.raises(CheckpointError, match=f"`{wrong}` must"):
                    to_olmem(checkpoint.keys, tensors | {wrong: replace(tensor, shape=shape)}, shapes)

    def test_integers_are_no_weights(self, name):
        checkpoint, tensors, shapes = self.opened(name)
        wrong = next(key.native for key in checkpoint.keys if key.targets)
        with pytest.raises(CheckpointError, match=f"`{wrong}` must be floating-point"):
            to_olmem(checkpoint.keys, tensors | {wrong: replace(tensors[wrong], dtype=torch.int64)}, shapes)

    def test_target_that_no_row_makes_is_named(self, name):
        checkpoint, tensors, shapes = self.opened(name)
        with pytest.raises(CheckpointError, match=r"model\.memory\.embeddings"):
            to_olmem(checkpoint.keys, tensors, shapes | {"model.memory.embeddings": (2, 2)})


def test_layers_are_numbered_not_sorted(converted):
    """Layer 10 comes after layer 9, though "10" sorts before "2"."""
    checkpoint = golden("core300_12layers")
    table = {key.native: key.targets for key in checkpoint.keys}
    for layer in range(12):
        assert table[f"blocks.{layer}.feed_forward.w1.weight"] == (f"model.layers.{layer}.mlp.gate_proj.weight",)
    assert list(target_shapes(checkpoint)) == list(
        to_olmem(checkpoint.keys, checkpoint.tensors, target_shapes(checkpoint))
    )


def test_rows_of_fused_projections():
    """Queries, keys, values; up, then gate."""
    table = {key.native: key for key in olmo.key_table(read_fields(OLMO_MODEL, olmo.CONFIG, "test"))}
    fused = table["transformer.blocks.{layer}.att_proj.weight"]
    assert [target.rpartition(".self_attn.")[2][0] for target in fused.targets] == ["q", "k", "v"]
    fused = table["transformer.blocks.{layer}.ff_proj.weight"]
    assert [target.rpartition(".mlp.")[2] for target in fused.targets] == ["up_proj.weight", "gate_proj.weight"]


def test_wrapped_and_grouped_names_are_read(tmp_path):
    def wrapped(name):
        return name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module.")

    plain = olmo.canonical(dict.fromkeys(olmo_state()), 1)
    assert olmo.canonical(dict.fromkeys(map(wrapped, olmo_state())), 1) == plain
    grouped = {"transformer.block_groups.1.2.ff_out.weight": None, "transformer.block_groups.10.0.ff_out.weight": None}
    assert set(olmo.canonical(grouped, 3)) == {
        "transformer.blocks.5.ff_out.weight",
        "transformer.blocks.30.ff_out.weight",
    }
    with pytest.raises(CheckpointError, match="block_group_size"):
        olmo.canonical({f"transformer.block_groups.{name}.w": None for name in ("0.1", "1.0")}, 1)


# Config fields of OLMo


def olmo_config(**changes) -> dict[str, Any]:
    """What the smallest OLMo checkpoint becomes with these fields changed, or, for `...`, removed."""
    model = {name: value for name, value in (OLMO_MODEL | changes).items() if value is not ...}
    with tempfile.TemporaryDirectory() as name:
        folder = write_olmo(
            Path(name), "model.pt", olmo_state() | {f"more.{index}": torch.ones(1) for index in range(5)}
        )
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        return open_checkpoint(folder).olmem_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_type", "llama"),
        ("activation_type", "gelu"),
        ("activation_type", "relu"),
        ("alibi", True),
        ("rope", False),
        ("rope", ...),
        ("include_bias", True),
        ("include_bias", ...),
        ("embedding_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("layer_norm_type", "amd_compatible"),
        ("d_modell", 8),
        ("norm_befor", True),
        ("scale_embeddings", True),
        ("n_layers", "many"),
        ("d_model", []),
        ("layer_norm_eps", "small"),
    ],
)
def test_olmo_field_that_cannot_be_kept_is_refused_by_name(field, value):
    with pytest.raises(CheckpointError, match=f"`{field}`"):
        olmo_config(**{field: value})


def test_misspelled_field_gets_a_hint():
    with pytest.raises(CheckpointError, match="did you mean 'd_model'"):
        olmo_config(d_modell=8)


def test_olmo_defaults_are_those_of_its_model_config():
    """A partial config.yaml relies on them."""
    config = olmo_config(**dict.fromkeys(OLMO_MODEL, ...) | {"rope": True, "include_bias": False})
    assert config == {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "num_hidden_layers": 12,
        "intermediate_size": 4 * 768 // 2,
        "norm_placement": "pre",
        "norm_type": "layer",
        "qk_norm": "none",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "logits_scaling": 1.0,
        "tie_word_embeddings": True,
        "vocab_size": 50304,
        "max_position_embeddings": 1024,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "layer_types": ["full_attention"] * 12,
    }


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"n_kv_heads": 1}, {"num_key_value_heads": 1}),
        ({"multi_query_attention": True}, {"num_key_value_heads": 1}),
        ({"multi_query_attention": False}, {"num_key_value_heads": 2}),
        ({"mlp_hidden_size": None, "mlp_ratio": 8}, {"intermediate_size": 32}),
        ({"embedding_size": None}, {"vocab_size": 12}),
        ({"embedding_size": 16}, {"vocab_size": 16}),
        ({"embedding_size": ...}, {"vocab_size": 50304}),
        ({"scale_logits": True}, {"logits_scaling": 8**0.5}),
        ({"clip_qkv": 3.5}, {"clip_qkv": 3.5}),
        ({"layer_norm_eps": "1e-6"}, {"rms_norm_eps": 1e-6}),
        ({"rope_theta": 500000}, {"rope_theta": 500000}),
        ({"norm_after": False}, {"norm_placement": "pre"}),
        ({"attention_layer_norm": False}, {"qk_norm": "none"}),
        ({"layer_norm_type": "default"}, {"norm_type": "layer"}),
        ({"layer_norm_type": "low_precision", "layer_norm_with_affine": False}, {"norm_type": "layer"}),
        (
            {"layer_norm_type": "default", "layer_norm_with_affine": False, "attention_layer_norm": False},
            {"norm_type": "layer_plain"},
        ),
        ({"layer_norm_with_affine": False}, {"norm_type": "rms"}),
    ],
)
def test_olmo_field_is_carried(changes, wanted):
    assert wanted.items() <= olmo_config(**changes).items()


@pytest.mark.parametrize(
    "field", ["n_kv_heads", "multi_query_attention", "clip_qkv", "bias_for_layer_norm", "mlp_hidden_size"]
)
def test_null_is_as_good_as_absent(field):
    assert olmo_config(**{field: None}) == olmo_config(**{field: ...})


# Config fields of OLMo-core


def changed(path: str, value: Any, model: dict | None = None) -> dict[str, Any]:
    """The model with the field at this path set, or, for `...`, removed."""
    model = copy.deepcopy(OLMO_CORE_MODEL if model is None else model)
    *parents, leaf = path.split(".")
    fields = model
    for parent in parents:
        fields = fields.setdefault(parent, {})
    if value is ...:
        del fields[leaf]
    else:
        fields[leaf] = value
    return model


def opened(model: Any):
    """The smallest OLMo-core checkpoint under this model's config."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_olmo_core(Path(name))
        edit_json(folder / "config.json", model=model)
        return open_checkpoint(folder)


def with_layers(count: int, **sliding) -> dict[str, Any]:
    model = changed("n_layers", count)
    if sliding:
        model["block"]["sequence_mixer"]["sliding_window"] = sliding
    return model


YARN = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "old_context_len": 16}
BLOCK = OLMO_CORE_MODEL["block"]
CLIPPED = changed("sequence_mixer.clip_qkv", 0.5, BLOCK)
ONE_LAYER_SLIDES = {
    "pattern": [4],
    "force_full_attention_on_first_layer": False,
    "force_full_attention_on_last_layer": False,
}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("name", "moe", "name"),
        ("name", "normalized", "name"),
        ("block.name", "moe_reordered_norm", "name"),
        ("block.name", "normalized", "name"),
        ("block.name", "default_scaled", "name"),
        ("block.feed_forward_moe", {"num_experts": 8}, "feed_forward_moe"),
        ("block.sequence_mixer.gate", {"granularity": "headwise"}, "gate"),
        ("block.sequence_mixer.type", "gated_delta_net", "type"),
        ("block.sequence_mixer.name", "fused", "name"),
        ("block.sequence_mixer.name", "normalized", "name"),
        ("block.sequence_mixer.scalable_softmax", True, "scalable_softmax"),
        ("block.sequence_mixer.attention_sinks", True, "attention_sinks"),
        ("block.sequence_mixer.qk_norm_per_head_gains", True, "qk_norm_per_head_gains"),
        ("block.sequence_mixer.rope.name", "complex", "rope.name"),
        ("block.sequence_mixer.rope.name", "fused", "rope.name"),
        ("block.sequence_mixer.rope.no_global_rope", "x", "no_global_rope"),
        ("block.sequence_mixer.rope.partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("block.sequence_mixer.rope.scaling", {"unknown": 1}, "scaling"),
        ("block.sequence_mixer.rope.scaling", 8.0, "scaling"),
        (
            "block.sequence_mixer.rope.scaling",
            {"factor": 2.0, "attention_rescale_factor": 2.0},
            "attention_rescale_factor",
        ),
        (
            "block.sequence_mixer.rope.scaling",
            {"new_theta": 1e6, "attention_rescale_factor": 2.0},
            "attention_rescale_factor",
        ),
        ("block.sequence_mixer.rope.scaling", YARN | {"extra": 1}, "extra"),
        ("block.sequence_mixer.rope.scaling", YARN | {"old_context_len": 10**9}, "rope.scaling"),
        ("block.sequence_mixer.rope.extra", 1, "rope.extra"),
        ("block.sequence_mixer.extra", 1, "sequence_mixer.extra"),
        ("block.sequence_mixer.sliding_window", {"pattern": [4], "extra": 1}, "sliding_window.extra"),
        ("block.sequence_mixer.qk_norm.eps", 1e-5, "eps"),
        ("block.sequence_mixer.qk_norm.bias", True, "qk_norm.bias"),
        ("block.sequence_mixer.qk_norm.bias", ..., "qk_norm.bias"),
        ("block.sequence_mixer.qk_norm.name", "default", "layer_norm.name"),
        ("block.sequence_mixer.qk_norm.name", "l2_norm", "qk_norm.name"),
        ("block.sequence_mixer", ..., "sequence_mixer"),
        ("block.attention", {"n_heads": 2}, "attention"),
        ("block.attention_residual_alpha", 0.5, "attention_residual_alpha"),
        ("block.feed_forward_residual_alpha", 0.5, "feed_forward_residual_alpha"),
        ("block.extra", 1, "extra"),
        ("block.layer_norm", ..., "layer_norm"),
        ("block.layer_norm.eps", 1e-5, "eps"),
        ("block.layer_norm.bias", True, "layer_norm.bias"),
        ("block.layer_norm.extra", 1, "layer_norm.extra"),
        ("block.feed_forward", ..., "feed_forward"),
        ("block.feed_forward.bias", True, "feed_forward.bias"),
        ("block.feed_forward.bias", ..., "feed_forward.bias"),
        ("block.feed_forward.name", "normalized", "feed_forward.name"),
        ("block.feed_forward.activation", "relu", "feed_forward.activation"),
        ("block.feed_forward.hidden_size", ..., "intermediate_size|hidden_size"),
        ("block", ..., "block"),
        ("block", [], "block"),
        ("block", {"a": BLOCK, "b": BLOCK}, "sequence_mixer"),
        ("block_pattern", ["a", "b"], "block_pattern"),
        ("block_overrides", {"1": BLOCK}, "block_overrides"),
        ("block_overrides", {"x": BLOCK}, "block_overrides"),
        ("embed_scale", 8.0, "embed_scale"),
        ("embedding_norm", NORM, "embedding_norm"),
        ("lm_head.bias", True, "lm_head.bias"),
        ("lm_head.bias", ..., "lm_head.bias"),
        ("lm_head.name", "normalized", "lm_head.name"),
        ("lm_head.layer_norm.eps", 1e-5, "eps"),
        ("lm_head.layer_norm.bias", True, "lm_head.layer_norm.bias"),
        ("lm_head.layer_norm", None, "norm"),
        ("lm_head.layer_norm", ..., "norm"),
        ("lm_head.extra", 1, "lm_head.extra"),
        ("d_model", ..., "d_model|hidden_size"),
        ("vocab_size", ..., "vocab_size"),
        ("n_layers", ..., "n_layers"),
        ("extra", 1, "extra"),
    ],
)
def test_olmo_core_field_that_cannot_be_kept_is_refused_by_name(path, value, named):
    with pytest.raises(CheckpointError, match=rf"`[^`]*({named})[^`]*`"):
        opened(changed(path, value))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (with_layers(4, pattern=[8, 4, -1], force_full_attention_on_first_layer=False), "sliding_window.pattern"),
        (with_layers(4, pattern=[0]), "sliding_window.pattern"),
        (with_layers(4, pattern=[-2]), "sliding_window.pattern"),
        (with_layers(4, pattern=[]), "sliding_window.pattern"),
        (with_layers(4, pattern="8"), "sliding_window.pattern"),
        (with_layers(4, pattern=8), "sliding_window.pattern"),
        (with_layers(2) | {"block_overrides": {"1": CLIPPED}}, "clip_qkv"),
        (with_layers(2) | {"block_overrides": {"0": CLIPPED}}, "clip_qkv"),
        (with_layers(2) | {"block_overrides": {"1": changed("name", "peri_norm", BLOCK)}}, "name"),
        (with_layers(2) | {"block_overrides": {"1": changed("sequence_mixer.n_heads", 4, BLOCK)}}, "n_heads"),
        (with_layers(2) | {"block_overrides": {"1": changed("sequence_mixer.qk_norm", None, BLOCK)}}, "qk_norm"),
        (with_layers(2) | {"block_overrides": {"1": changed("feed_forward.hidden_size", 9, BLOCK)}}, "hidden_size"),
        (with_layers(2) | {"block_overrides": {"1": changed("sequence_mixer.rope.theta", 5, BLOCK)}}, "rope"),
        (with_layers(2) | {"block_overrides": {"1": changed("sequence_mixer.rope.scaling", YARN, BLOCK)}}, "rope"),
        (changed("block.sequence_mixer.rope.scaling", YARN, with_layers(2, **ONE_LAYER_SLIDES)), "rope.scaling"),
        (
            changed("block.sequence_mixer.rope.scaling", {"factor": 2.0}, with_layers(2, **ONE_LAYER_SLIDES)),
            "rope.scaling",
        ),
    ],
)
def test_layers_that_differ_in_what_olmem_has_once_are_refused(model, named):
    with pytest.raises(CheckpointError, match=named):
        opened(model)


def test_olmo_core_defaults_are_those_of_its_classes():
    model = copy.deepcopy(OLMO_CORE_MODEL)
    model["d_model"] = 64
    model["block"]["sequence_mixer"] = {"rope": {}}
    checkpoint = opened(model)
    config, keys = checkpoint.olmem_config, checkpoint.keys
    wanted = {
        "num_attention_heads": 16,
        "attention_bias": True,
        "qk_norm": "none",
        "hidden_act": "silu",
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500000.0}},
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
    }
    assert wanted.items() <= config.items() and "clip_qkv" not in config
    assert any(key.native == "blocks.0.attention.w_out.bias" for key in keys)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("block.name", "default", {"norm_placement": "pre"}),
        ("block.name", "peri_norm", {"norm_placement": "peri"}),
        ("block.name", "reordered_norm", {"norm_placement": "post"}),
        ("block.sequence_mixer.clip_qkv", 8.0, {"clip_qkv": 8.0}),
        ("block.sequence_mixer.n_kv_heads", 1, {"num_key_value_heads": 1}),
        ("block.sequence_mixer.head_dim", 16, {"head_dim": 16}),
        ("block.sequence_mixer.bias", True, {"attention_bias": True}),
        ("block.sequence_mixer.dropout", 0.1, {"attention_dropout": 0.1}),
        ("block.dropout", 0.2, {"residual_dropout": 0.2}),
        ("block.sequence_mixer.use_head_qk_norm", True, {"qk_norm": "head"}),
        ("block.sequence_mixer.qk_norm", None, {"qk_norm": "none"}),
        ("block.feed_forward.activation", "gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"}),
        ("block.sequence_mixer.rope.theta", 10000, {"position_embedding": "rope"}),
        ("block.sequence_mixer.rope", ..., {"position_embedding": "none", "rope_parameters": {}}),
        ("block.sequence_mixer.rope", None, {"position_embedding": "none", "rope_parameters": {}}),
        ("block.sequence_mixer.rope", {}, {"position_embedding": "rope"}),
        ("block.sequence_mixer.rope.no_global_rope", True, {"position_embedding": "none", "rope_parameters": {}}),
        ("block.sequence_mixer.rope.no_global_rope", None, {"position_embedding": "rope"}),
        ("tie_word_embeddings", True, {"tie_word_embeddings": True}),
        ("embed_scale", None, {}),
        ("block.sequence_mixer.backend", "flash_2", {}),
        ("block.sequence_mixer.use_flash", True, {}),
        ("init_seed", 3, {}),
        ("compile", True, {}),
        ("_CLASS_", "x.Y", {}),
        (
            "block.sequence_mixer.rope.theta",
            5,
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}},
        ),
    ],
)
def test_olmo_core_field_is_carried(path, value, wanted):
    assert opened(changed(path, value)).olmem_config.items() >= wanted.items()


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        (
            YARN,
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 16,
            },
        ),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"new_theta": 8e6}, {"rope_type": "default", "rope_theta": 8e6}),
        (
            {"factor": 32.0, "low_freq_proportion": 0.5, "high_freq_proportion": 0.25, "old_context_len": 64},
            {
                "rope_type": "llama3",
                "low_freq_factor": 2.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 64},
            {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 32.0},
        ),
    ],
)
def test_scalings_in_the_terms_of_transformers(scaling, wanted):
    config = opened(changed("block.sequence_mixer.rope.scaling", scaling)).olmem_config
    assert config["rope_parameters"]["full_attention"].items() >= wanted.items()


def test_the_older_name_of_the_mixer():
    model = copy.deepcopy(OLMO_CORE_MODEL)
    model["block"]["attention"] = model["block"].pop("sequence_mixer")
    assert opened(model).olmem_config == opened(OLMO_CORE_MODEL).olmem_config


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("pattern", "first", "last", "wanted"),
    [
        ([4, 4, 4, -1], False, True, [S, S, S, F, S, S, S, F]),
        ([4, 4, 4, -1], False, False, [S, S, S, F, S, S, S, F]),
        ([4, 4, 4, -1], True, False, [F, S, S, S, F, S, S, S]),
        ([4, 4, 4, -1], True, True, [F, S, S, S, F, S, S, F]),
        ([4, 4, 4, -1], None, None, [F, S, S, S, F, S, S, F]),
        ([4], True, True, [F, S, S, S, S, S, S, F]),
        ([4], False, False, [S] * 8),
        ([-1], False, False, [F] * 8),
        ([4, -1, -1], False, True, [S, F, F, S, F, F, S, F]),
        ([-1, 4], True, False, [F, F, S, F, S, F, S, F]),
    ],
)
def test_layer_types_of_a_pattern(pattern, first, last, wanted):
    """The pattern is counted from the second layer when the first is forced to see all."""
    forced = {"force_full_attention_on_first_layer": first, "force_full_attention_on_last_layer": last}
    sliding = {"pattern": pattern} | {name: value for name, value in forced.items() if value is not None}
    config = opened(with_layers(8, **sliding)).olmem_config
    assert config["layer_types"] == wanted
    assert config.get("sliding_window") == (4 if S in wanted else None)


WITHOUT_ROPE = changed("sequence_mixer.rope", ..., BLOCK)


@pytest.mark.parametrize(
    ("overrides", "no_global_rope", "wanted"),
    [
        ({}, False, "rope"),
        ({"1": BLOCK}, False, "rope"),
        ({"2": WITHOUT_ROPE}, False, ["rope", "rope", "none", "rope"]),
        ({"0": WITHOUT_ROPE, "3": WITHOUT_ROPE}, False, ["none", "rope", "rope", "none"]),
        ({str(layer): WITHOUT_ROPE for layer in range(4)}, False, "none"),
        ({}, True, ["rope", "rope", "rope", "none"]),
        ({"1": WITHOUT_ROPE}, True, ["rope", "none", "rope", "none"]),
    ],
)
def test_layers_without_positions(overrides, no_global_rope, wanted):
    """Three that slide, and one that sees all."""
    sliding = {"pattern": [4, 4, 4, -1], "force_full_attention_on_first_layer": False}
    model = changed("block.sequence_mixer.rope.no_global_rope", no_global_rope, with_layers(4, **sliding))
    overrides = {layer: changed("sequence_mixer.sliding_window", sliding, block) for layer, block in overrides.items()}
    config = opened(model | {"block_overrides": overrides}).olmem_config
    assert config["position_embedding"] == wanted and config["layer_types"] == [S, S, S, F]
    assert OlmemConfig(**config).layer_position_embeddings == ([wanted] * 4 if isinstance(wanted, str) else wanted)


def test_rope_of_layers_without_it_is_no_contradiction():
    """Scaling on one full layer, a second one without positions."""
    model = changed("block.sequence_mixer.rope.scaling", YARN, with_layers(2))
    config = opened(model | {"block_overrides": {"1": WITHOUT_ROPE}}).olmem_config
    assert config["rope_parameters"]["full_attention"]["rope_type"] == "yarn"
    assert config["position_embedding"] == ["rope", "none"]


def test_model_without_any_position(tmp_path):
    folder = write_olmo_core(tmp_path / "source", block=WITHOUT_ROPE)
    assert convert(folder, tmp_path / "out")["verification"]["passed"]
    assert read_config(tmp_path / "out")["position_embedding"] == "none"


# The rest of config.json


@pytest.mark.parametrize(
    ("experiment", "given", "wanted"),
    [
        ({"train_module": {"max_sequence_length": 32}, "dataset": {"sequence_length": 16}}, None, 32),
        ({"train_module": {"max_sequence_length": 32}}, 99, 99),
        ({"dataset": {"sequence_length": 16}, "data_loader": {"sequence_length": 8}}, None, 16),
        ({"data_loader": {"sequence_length": 8}, "train_module": {}, "dataset": {"sequence_length": None}}, None, 8),
        ({}, 7, 7),
        ({}, None, None),
    ],
)
def test_trained_length(experiment, given, wanted, tmp_path):
    folder = write_olmo_core(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model": OLMO_CORE_MODEL} | experiment))
    if wanted is None:
        with pytest.raises(CheckpointError, match="--max-length"):
            open_checkpoint(folder, given)
    else:
        assert open_checkpoint(folder, given).olmem_config["max_position_embeddings"] == wanted


def test_token_ids_of_the_experiment(tmp_path):
    folder = write_olmo_core(tmp_path / "source")
    experiment = json.loads((folder / "config.json").read_text())
    experiment["dataset"] = {"tokenizer": {"vocab_size": 11, "eos_token_id": 0, "pad_token_id": 9, "bos_token_id": 10}}
    (folder / "config.json").write_text(json.dumps(experiment))
    assert open_checkpoint(folder).tokenizer_size == 11
    convert(folder, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["bos_token_id"]) == (0, 9, 10)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [12, -1, "x"])
def test_token_outside_the_vocabulary_is_refused_by_name(name, value, tmp_path):
    folder = write_olmo_core(tmp_path / "source")
    experiment = json.loads((folder / "config.json").read_text())
    experiment["dataset"] = {"tokenizer": {"vocab_size": 12, name: value}}
    (folder / "config.json").write_text(json.dumps(experiment))
    with pytest.raises(CheckpointError, match=name):
        convert(folder, tmp_path / "out")


def test_tokens_that_only_a_default_names_are_left_out(tmp_path):
    """OLMo's default end of text, 50256, means nothing in another vocabulary."""
    folder = write_olmo(tmp_path / "source", "model.pt")
    edit_model(folder, eos_token_id=..., pad_token_id=...)
    convert(folder, tmp_path / "out")
    assert read_config(tmp_path / "out")["eos_token_id"] is None


# Blocks that no golden checkpoint has


def biases(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    shapes = {
        f"{name}.bias": (value.shape[0],) for name in names for key, value in state.items() if key == f"{name}.weight"
    }
    assert len(shapes) == len(names)
    return state | {name: 0.1 * (value - 1) for name, value in random(shapes).items()}


def test_biased_projections_and_norms_of_olmo_core(tmp_path):
    """Both sides were written by one hand; that they agree is all that this shows."""
    parts = (
        "attention.w_q",
        "attention.w_k",
        "attention.w_v",
        "attention.w_out",
        "attention_norm",
        "feed_forward_norm",
    )
    norms = ("attention.q_norm", "attention.k_norm")
    state = biases(olmo_core_state(), "lm_head.norm", *(f"blocks.0.{part}" for part in (*parts, *norms)))
    norm = {"name": "default", "eps": 1e-5, "bias": True}
    model = changed("block.sequence_mixer.bias", True)
    model["block"] |= {"layer_norm": norm}
    model["block"]["sequence_mixer"]["qk_norm"] = norm
    model["lm_head"]["layer_norm"] = norm
    folder = write_olmo_core(tmp_path / "source", state, **model)
    assert convert(folder, tmp_path / "out")["verification"]["passed"]
    del state["blocks.0.attention.w_k.bias"]
    write_olmo_core(folder, state, **model)
    with pytest.raises(CheckpointError, match=r"w_k\.bias"):
        convert(folder, tmp_path / "again")


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_type": "default", "bias_for_layer_norm": True},
        {"layer_norm_type": "default", "bias_for_layer_norm": True, "norm_after": False},
        {"layer_norm_type": "default", "bias_for_layer_norm": True, "layer_norm_with_affine": False},
        {"layer_norm_type": "default", "bias_for_layer_norm": True, "attention_layer_norm_with_affine": False},
        {"layer_norm_type": "low_precision", "attention_layer_norm": False},
        {"norm_after": False, "attention_layer_norm": False},
        {"scale_logits": True, "weight_tying": True},
        {
            "norm_after": True,
            "layer_norm_type": "default",
            "layer_norm_with_affine": False,
            "attention_layer_norm": False,
        },
    ],
    ids=str,
)
def test_every_kind_of_norm_of_olmo(changes, tmp_path):
    model = OLMO_MODEL | {"layer_norm_with_affine": True, "attention_layer_norm_with_affine": True} | changes
    state = olmo_state()
    if model["weight_tying"]:
        del state["transformer.ff_out.weight"]
    block = "transformer.blocks.0."
    for names, there in (
        (
            (f"{block}q_norm", f"{block}k_norm"),
            model["attention_layer_norm"] and model["attention_layer_norm_with_affine"],
        ),
        (("transformer.ln_f", f"{block}attn_norm", f"{block}ff_norm"), model["layer_norm_with_affine"]),
    ):
        if not there:
            state = {key: value for key, value in state.items() if key.removesuffix(".weight") not in names}
        elif model.get("bias_for_layer_norm"):
            state = biases(state, *names)
    folder = write_olmo(tmp_path / "source", "model.pt", state, **model)
    assert convert(folder, tmp_path / "out")["verification"]["passed"]


# Whatever a config holds, it is converted or refused

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from(
        [0.5, -1.0, float("nan"), float("inf"), 1e300, "", "x", "1e-6", "12", [], [1], [[8]], {}, {"a": 1}]
    ),
)


def paths_of(value: Any, prefix: tuple[str, ...] = ()):
    for name, item in value.items():
        yield (*prefix, name)
        if isinstance(item, dict):
            yield from paths_of(item, (*prefix, name))


CORE_EXPERIMENT = {
    "model": changed("block.sequence_mixer.rope.scaling", YARN, with_layers(1, pattern=[4])) | {"block_overrides": {}},
    "train_module": {"max_sequence_length": 32},
    "dataset": {"tokenizer": {"vocab_size": 12, "eos_token_id": 1}},
}
NULLABLE = (
    "n_kv_heads",
    "clip_qkv",
    "multi_query_attention",
    "bias_for_layer_norm",
    "mlp_ratio",
    "rope_theta",
    "layer_norm_eps",
)
YAML_EXPERIMENT = {"model": OLMO_MODEL | dict.fromkeys((*NULLABLE, "block_group_size", "max_sequence_length"))}


def opened_or_refused(folder):
    """Converts all but the weights' bytes."""
    from olmem_convert.formats.planning import make_config, make_tensors

    try:
        checkpoint = open_checkpoint(folder)
        make_tensors(checkpoint, make_config(checkpoint, torch.float32))
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        return None
    return checkpoint


@pytest.fixture(scope="module")
def olmo_folder(tmp_path_factory):
    return write_olmo(tmp_path_factory.mktemp("olmo"), "model.pt")


@pytest.fixture(scope="module")
def olmo_core_folder(tmp_path_factory):
    folder = write_olmo_core(tmp_path_factory.mktemp("olmo_core"))
    (folder / ".metadata.json").write_text('{"version": "3.0.0"}')
    return folder


def replaced(experiment: dict, path: tuple[str, ...], value: Any) -> dict:
    experiment = copy.deepcopy(experiment)
    fields = experiment
    for name in path[:-1]:
        fields = fields[name]
    fields[path[-1]] = value
    return experiment


@given(st.sampled_from(list(paths_of(YAML_EXPERIMENT))), JUNK)
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_config_yaml_converts_or_is_refused(olmo_folder, path, value):
    (olmo_folder / "config.yaml").write_text(yaml.safe_dump(replaced(YAML_EXPERIMENT, path, value)))
    opened_or_refused(olmo_folder)


@given(st.sampled_from(list(paths_of(CORE_EXPERIMENT))), JUNK)
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_config_json_converts_or_is_refused(olmo_core_folder, path, value):
    (olmo_core_folder / "config.json").write_text(json.dumps(replaced(CORE_EXPERIMENT, path, value)))
    opened_or_refused(olmo_core_folder)


def test_what_the_junk_starts_from_converts(olmo_folder, olmo_core_folder):
    (olmo_folder / "config.yaml").write_text(yaml.safe_dump({"model": OLMO_MODEL}))
    (olmo_core_folder / "config.json").write_text(json.dumps(CORE_EXPERIMENT))
    assert opened_or_refused(olmo_folder) and opened_or_refused(olmo_core_folder)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{", "", '{"version": 3}', '{"version": null}', "\xff"])
def test_version_file_is_read_or_refused(text, tmp_path):
    folder = write_olmo_core(tmp_path)
    (folder / ".metadata.json").write_text(text, encoding="latin-1")
    opened_or_refused(folder)


@pytest.mark.parametrize("version", ["3.0.0\x1b[2J", "3\nverified", "x" * 41, "\ud800"])
def test_a_version_that_none_is_is_not_told(version, tmp_path):
    folder = write_olmo_core(tmp_path)
    (folder / ".metadata.json").write_text(json.dumps({"version": version}))
    assert open_checkpoint(folder).description == "OLMo-core"
    (folder / ".metadata.json").write_text('{"version": "3.0.0.dev1+a"}')
    assert open_checkpoint(folder).description == "OLMo-core 3.0.0.dev1+a"


def test_every_field_of_the_golden_configs_is_known():
    """Of all versions of the native packages that wrote them."""
    for name in FOLDERS:
        checkpoint = golden(name)
        assert checkpoint.native_config and checkpoint.olmem_config["vocab_size"] >= checkpoint.tokenizer_size


def test_field_from_the_future_is_refused(tmp_path):
    folder = copy_source("olmo_core_swa", tmp_path / "source")
    edit_model(folder, **{"block.sequence_mixer.multi_token_heads": 3})
    with pytest.raises(CheckpointError, match=r"multi_token_heads.*use a newer olmem"):
        open_checkpoint(folder)


def test_lazy_tensor_is_all_that_the_tables_need():
    tensor = LazyTensor.whole((2, 3), torch.float16, lambda: torch.zeros(2, 3, dtype=torch.float16))
    assert tensor.nbytes == 12
