"""What a configuration refuses, with what words, and what it keeps."""

import json
import sys
import types
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from modeling.helpers import TINY, tiny, tokens
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import POSITION_EMBEDDINGS
from torch.testing import assert_close
from transformers import AutoConfig, GenerationConfig, LlamaConfig, Olmo2Config, Olmo3Config, OlmoConfig

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
BOTH = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500000.0}


ROTARY_CLIP = {"clip_qkv": 1.0, "clip_qkv_stage": "rotary"}


def refusal(make=OlmemConfig, *arguments, **changes) -> str:
    with pytest.raises((ValueError, StrictDataclassError)) as info:
        make(*arguments, **changes)
    return str(info.value)


@pytest.mark.parametrize(
    ("field", "value", "rule", "rest"),
    [
        ("norm_placement", "middle", "must be one of post, pre, peri, parallel", {}),
        ("norm_type", "batch", "must be one of rms, layer, layer_plain", {}),
        ("qk_norm", "width", "must be one of full, head, none", {}),
        ("clip_qkv_stage", "late", "must be one of projection, rotary", {}),
        ("hidden_act", "mammoth", "must be an activation of Transformers or 'elephant'", {}),
        *(
            (field, 0, "must be positive", {})
            for field in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
        ),
        ("num_key_value_heads", 3, "must divide `num_attention_heads` = 4", {"num_attention_heads": 4}),
        ("head_dim", 3, "must be even", {}),
        ("rms_norm_eps", 0.0, "must be positive", {}),
        ("clip_qkv", 0, "must be positive or None", {}),
        ("clip_qkv", -1.5, "must be positive or None", {}),
        ("logits_scaling", 0.0, "must be positive", {}),
        ("attention_dropout", 1.0, "must be in [0, 1)", {}),
        ("residual_dropout", -0.1, "must be in [0, 1)", {}),
        ("sliding_window", 0, "must be at least 1 when a layer slides", {}),
        ("sliding_window", None, "must be at least 1 when a layer slides", {}),
        ("num_sink_tokens", -1, "must not be negative", {}),
        ("attention_chunk_lookback", -1, "must not be negative", {}),
        ("attention_chunk_size", None, "must be at least 1 when a layer is chunked", {"layer_types": CHUNKED}),
        ("attention_chunk_size", 0, "must be at least 1 when a layer is chunked", {"layer_types": CHUNKED}),
        ("num_sink_tokens", 2, "must be 0 with `clip_qkv_stage` 'rotary'", {"clip_qkv": 1, "clip_qkv_stage": "rotary"}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field_rule_value_and_remedy(field, value, rule, rest):
    message = refusal(**rest, **{field: value})
    assert f"`{field}` {rule}" in message
    assert f"(got {value!r}); " in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("layer_types", "rule"),
    [
        ([SLIDING, "fool_attention"], f"`layer_types` must be made of {SLIDING}, chunked_attention, {FULL}"),
        ("fool_attention", f"`layer_types` must be made of {SLIDING}, chunked_attention, {FULL}"),
        ([FULL], "`layer_types` must name `num_hidden_layers` = 2 layers"),
    ],
)
def test_layer_types_are_refused_in_our_words(layer_types, rule):
    """Transformers' own `validate_layer_type` ran first: it offers kinds that we refuse, and names no way out."""
    assert rule in refusal(num_hidden_layers=2, layer_types=layer_types)


def test_a_wrong_type_is_refused():
    assert "hidden_size" in refusal(hidden_size="64")


def test_what_an_assignment_breaks_is_refused_when_saved(tmp_path):
    config = OlmemConfig(**TINY)
    config.sliding_window = 0
    assert "`sliding_window` must be at least 1" in refusal(config.save_pretrained, tmp_path)


def test_a_window_is_not_needed_where_no_layer_slides():
    assert OlmemConfig(layer_types=FULL, sliding_window=None).sliding_window is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("slidng_window", "sliding_window"),
        ("num_attention_head", "num_attention_heads"),
        ("norm_placment", "norm_placement"),
        ("tie_word_embedding", "tie_word_embeddings"),
        ("rope_parameter", "rope_parameters"),
    ],
)
def test_a_misspelled_field_is_refused_with_the_right_one(name, meant, tmp_path):
    message = refusal(**{name: 7})
    assert f"`{name}`" in message
    assert "(got 7)" in message
    assert f"did you mean `{meant}`?" in message

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmem", name: 7}))
    assert f"did you mean `{meant}`?" in refusal(AutoConfig.from_pretrained, tmp_path)


def test_keywords_that_resemble_no_field_are_kept(tmp_path):
    config = OlmemConfig(training_tokens=5, pretraining_tp=2, unsloth_version="1")
    config.save_pretrained(tmp_path)
    again = OlmemConfig.from_pretrained(tmp_path)
    assert (again.training_tokens, again.pretraining_tp, again.unsloth_version) == (5, 2, "1")


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_labels": 3},
        {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
        {"problem_type": "regression"},
        {"sep_token_id": 3, "decoder_start_token_id": 4, "cls_token_id": 5, "mask_token_id": 6},
        {"rope_theta": 1e4},
        {"rope_scaling": None, "rope_theta": 1e4},
        {"attn_implementation": "eager"},
        {"_attn_implementation": "eager"},
        {"name_or_path": "a/b", "_name_or_path": "a/b", "_commit_hash": "c"},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": True},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"architectures": ["OlmemForCausalLM"], "auto_map": {"AutoConfig": "a.B"}, "transformers_version": "5.0.0"},
        {"quantization_config": {"quant_method": "bitsandbytes"}, "tokenizer_class": "PreTrainedTokenizerFast"},
        {"is_decoder": True, "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "model_type": "olmem"},
    ],
    ids=str,
)
def test_keywords_of_transformers_are_never_refused(keywords):
    config = OlmemConfig(num_hidden_layers=2, **keywords)
    assert config.num_labels == keywords.get("num_labels", 2)
    assert config.dtype == (torch.bfloat16 if {"dtype", "torch_dtype"} & set(keywords) else None)


def test_generation_parameters_are_never_refused():
    names = set(GenerationConfig().to_dict()) - set(OlmemConfig().to_dict())
    assert "temperature" in names
    OlmemConfig(num_hidden_layers=2, **dict.fromkeys(names, 1))


@pytest.mark.parametrize(
    ("name", "value", "rule", "rest"),
    [
        ("num_memory_tokens", -1, "must not be negative", {}),
        ("num_memory_tokens", 4, "must be 0 with `clip_qkv_stage` 'rotary'", ROTARY_CLIP),
        ("memory_segment_length", 0, "must be at least 1 with memory tokens", {"num_memory_tokens": 4}),
        (
            "memory_segment_length",
            None,
            "must be at least 1 with memory tokens",
            {"num_memory_tokens": 4, "layer_types": FULL, "sliding_window": None},
        ),
        ("memory_bptt_segments", -1, "must not be negative", {}),
        ("retrieval_layers", [0, 32], "must name layers 0 to 31, each once", {}),
        ("retrieval_layers", [-1], "must name layers 0 to 31, each once", {}),
        ("retrieval_layers", [0, 0], "must name layers 0 to 31, each once", {}),
        ("retrieval_layers", [0], "must be empty with `clip_qkv_stage` 'rotary'", ROTARY_CLIP),
        ("retrieval_top_k", 0, "must be at least 1", {}),
        ("retrieval_capacity", 31, "must be at least `retrieval_top_k` = 32", {}),
        ("retrieval_admission", "surprise", "must be one of recent, learned", {}),
        ("retrieval_gate_init", float("nan"), "must be finite", {}),
        ("memory_gate_init", float("inf"), "must be finite", {}),
        ("sink_logit_init", float("-inf"), "must be finite", {}),
        ("retrieval_device", "drum", "must be a device of torch", {}),
        ("retrieval_device", "", "must be a device of torch", {}),
    ],
)
def test_rules_of_memory(name, value, rule, rest):
    message = refusal(**{name: value} | rest)
    assert f"`{name}` {rule}" in message
    assert f"(got {value!r}" in message


def test_retrieval_in_a_full_layer_is_refused():
    message = refusal(retrieval_layers=[1, 3, 7])
    assert "`retrieval_layers` must name sliding or chunked layers (got [3, 7], of full attention" in message


def test_fields_of_memory_are_completed(tmp_path):
    config = OlmemConfig(num_hidden_layers=4, num_memory_tokens=2, sliding_window=7, retrieval_layers=[2, 0])
    assert (config.memory_segment_length, config.retrieval_layers, config.has_memory) == (7, [0, 2], True)
    assert OlmemConfig(retrieval_layers=[10, 9]).retrieval_layers == [9, 10]
    for wrong in (2, "2", [1.5], ["1"], {"1": 2}):
        assert "retrieval_layers" in refusal(retrieval_layers=wrong)
    config.save_pretrained(tmp_path)
    assert OlmemConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    plain = OlmemConfig(num_hidden_layers=4)
    assert (plain.memory_segment_length, plain.retrieval_layers, plain.has_memory) == (None, [], False)
    chunked = OlmemConfig(num_hidden_layers=4, layer_types=CHUNKED, attention_chunk_size=9, num_memory_tokens=1)
    assert chunked.memory_segment_length == 9


@pytest.mark.parametrize(("name", "value", "neutral"), [("partial_rotary_factor", 0.5, 1.0)])
def test_fields_of_later_versions_are_refused_unless_they_ask_for_nothing(name, value, neutral):
    message = refusal(**{name: value})
    assert f"`{name}` is not supported yet (got {value!r})" in message
    assert name not in OlmemConfig(**{name: neutral}).to_dict()


def test_defaults_are_completed():
    config = OlmemConfig(num_hidden_layers=8, hidden_size=64, num_attention_heads=4)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.layer_types == [SLIDING, SLIDING, SLIDING, FULL] * 2
    assert config.rope_parameters == {SLIDING: DEFAULT_ROPE, FULL: DEFAULT_ROPE}
    assert OlmemConfig(num_hidden_layers=3, layer_types=FULL).layer_types == [FULL] * 3


OPTIONS: dict[str, Any] = {
    "norm_placement": "peri",
    "norm_type": "layer",
    "qk_norm": "head",
    "clip_qkv": 3,
    "clip_qkv_stage": "rotary",
    "hidden_act": "elephant",
    "logits_scaling": 2.5,
    "residual_dropout": 0.1,
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
    "id2label": {0: "a", 1: "b", 2: "c"},
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
        FULL: {"rope_type": "yarn", "rope_theta": 60.0, "factor": 4.0, "original_max_position_embeddings": 8},
    },
}


FREQUENCIES = [1.0, 0.5, 0.25, 0.125]  # for a `head_dim` of 8
MORE_OPTIONS: dict[str, Any] = {
    "position_embedding": ["xpos", "linspace"],
    "shared_projections": "key_value",
    "attention_chunk_size": 3,
    "attention_chunk_lookback": 2,
    "num_sink_tokens": 4,
    "sink_logit_init": -0.5,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 50.0, "inverse_frequencies": FREQUENCIES},
        FULL: {"rope_type": "dynamic", "rope_theta": 60.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_types": FULL, "rope_theta": 7.0, "rope_parameters": None}, OPTIONS, MORE_OPTIONS],
)
def test_a_configuration_survives_its_round_trips(changes, tmp_path):
    config = OlmemConfig(**(TINY | changes))
    options = OPTIONS | MORE_OPTIONS
    given = {name: value for name, value in changes.items() if name in options and value is not None}
    assert {name: getattr(config, name) for name in given} == given

    config.save_pretrained(tmp_path)
    expected = config.to_dict()
    for again in (
        OlmemConfig.from_dict(expected),
        OlmemConfig(**expected),
        OlmemConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert type(again) is OlmemConfig
        assert again.to_dict() | {"_name_or_path": ""} == expected | {"_name_or_path": ""}


@pytest.mark.parametrize("load", [OlmemConfig.from_pretrained, AutoConfig.from_pretrained])
def test_overrides_are_expanded_and_validated_like_fields(load, tmp_path):
    OlmemConfig(**TINY).save_pretrained(tmp_path)
    config = load(tmp_path, layer_types=SLIDING, sliding_window=3, num_labels=5)
    assert config.layer_types == [SLIDING, SLIDING]
    assert config.sliding_window == 3
    assert config.num_labels == 5
    assert config.rope_parameters == {SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
    assert "`qk_norm` must be one of" in refusal(load, tmp_path, qk_norm="width")
    assert load(tmp_path, num_memory_tokens=4, sliding_window=3).memory_segment_length == 3
    assert "`partial_rotary_factor` is not supported yet" in refusal(load, tmp_path, partial_rotary_factor=0.5)


# Fields of what is off, with a value and what is off.
WITHOUT_EFFECT: list[tuple[str, Any, str]] = [
    ("attention_chunk_size", 4, "`layer_types` has no 'chunked_attention'"),
    ("attention_chunk_lookback", 2, "`layer_types` has no 'chunked_attention'"),
    ("clip_qkv_stage", "rotary", "`clip_qkv` is None"),
    ("memory_segment_length", 5, "`num_memory_tokens` is 0"),
    ("memory_bptt_segments", 2, "`num_memory_tokens` is 0"),
    ("memory_gate_init", -2.0, "`num_memory_tokens` is 0"),
    ("retrieval_top_k", 3, "`retrieval_layers` is empty"),
    ("retrieval_capacity", 99, "`retrieval_layers` is empty"),
    ("retrieval_admission", "learned", "`retrieval_layers` is empty"),
    ("retrieval_gate_init", 0.0, "`retrieval_layers` is empty"),
    ("retrieval_device", "cpu", "`retrieval_layers` is empty"),
]


@pytest.mark.parametrize(("name", "value", "off"), WITHOUT_EFFECT)
def test_overrides_without_an_effect_are_refused(name, value, off, tmp_path):
    """Said in a call, a field is meant; written in a folder, it may be of a memory that was switched off."""
    OlmemConfig(**TINY).save_pretrained(tmp_path / "olmem")
    Olmo2Config(num_hidden_layers=2).save_pretrained(tmp_path / "olmo")
    for load, folder in (
        (OlmemConfig.from_pretrained, "olmem"),
        (AutoConfig.from_pretrained, "olmem"),
        (OlmemConfig.from_olmo, "olmo"),
        (OlmemForCausalLM.from_olmo, "olmo"),
    ):
        message = refusal(load, tmp_path / folder, **{name: value})
        assert (
            f"`{name}` must be left out where {off}, because it has no effect there (got {value!r}); leave it"
            in message
        )
    default = getattr(OlmemConfig(**TINY), name)
    assert getattr(OlmemConfig.from_pretrained(tmp_path / "olmem", **{name: default}), name) == default
    OlmemConfig(**(TINY | {name: value})).save_pretrained(tmp_path / "saved")
    assert getattr(OlmemConfig.from_pretrained(tmp_path / "saved"), name) == value
    assert getattr(OlmemConfig.from_pretrained(tmp_path / "saved", num_sink_tokens=1), name) == value


def test_a_memory_may_be_switched_off_in_the_call(tmp_path):
    memory = {"num_memory_tokens": 2, "memory_segment_length": 5, "retrieval_layers": [0], "retrieval_top_k": 3}
    OlmemConfig(**(TINY | memory)).save_pretrained(tmp_path)
    config = OlmemConfig.from_pretrained(tmp_path, num_memory_tokens=0, retrieval_layers=[])
    assert not config.has_memory and config.retrieval_top_k == 3


def test_unused_keywords_are_returned(tmp_path):
    OlmemConfig(**TINY).save_pretrained(tmp_path)
    config, unused = OlmemConfig.from_pretrained(tmp_path, sliding_window=3, other=1, return_unused_kwargs=True)
    assert config.sliding_window == 3
    assert unused == {"other": 1}


@pytest.mark.parametrize(("saved", "asked"), [(FULL, SLIDING), (SLIDING, FULL)])
def test_other_layer_types_keep_the_theta_of_the_model(saved, asked, tmp_path):
    """The saved folder has no entry for a layer type that no layer had: the theta silently became 500000."""
    OlmemConfig(num_hidden_layers=2, layer_types=saved, rope_theta=10000.0).save_pretrained(tmp_path)
    config = OlmemConfig.from_pretrained(tmp_path, layer_types=asked)
    assert config.rope_parameters == {asked: {"rope_type": "default", "rope_theta": 10000.0}}


LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("given", "full", "sliding_theta"),
    [
        ({}, DEFAULT_ROPE, 500000.0),
        ({"rope_parameters": {}}, DEFAULT_ROPE, 500000.0),
        ({"rope_parameters": {"rope_theta": 1e4}}, {"rope_type": "default", "rope_theta": 1e4}, 1e4),
        ({"rope_parameters": LINEAR | {"rope_theta": 1e4}}, LINEAR | {"rope_theta": 1e4}, 1e4),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, LINEAR | {"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"type": "x", **LINEAR}}, LINEAR | {"rope_theta": 5e5}, 5e5),
        (
            {"rope_parameters": {FULL: LINEAR | {"rope_theta": 3.0}, SLIDING: {"rope_theta": 4.0}}},
            LINEAR | {"rope_theta": 3.0},
            4.0,
        ),
        ({"rope_parameters": {FULL: LINEAR, SLIDING: None}, "rope_theta": 6.0}, LINEAR | {"rope_theta": 6.0}, 6.0),
        ({"rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e4}, 1e4),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e4}, 1e4),
        ({"rope_theta": 1e4, "rope_scaling": LINEAR}, LINEAR | {"rope_theta": 1e4}, 1e4),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR | {"rope_theta": 1e4}, 1e4),
        ({"rope_parameters": YARN}, YARN | {"rope_theta": 5e5, "original_max_position_embeddings": 64}, 5e5),
        (
            {"rope_parameters": YARN | {"original_max_position_embeddings": 9}},
            YARN | {"rope_theta": 5e5, "original_max_position_embeddings": 9},
            5e5,
        ),
    ],
    ids=str,
)
def test_every_form_of_rope_parameters_has_one_meaning(given, full, sliding_theta):
    before = json.dumps(given)
    config = OlmemConfig(**BOTH, max_position_embeddings=64, **given)
    assert config.rope_parameters == {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": sliding_theta}}
    assert json.dumps(given) == before
    assert OlmemConfig(**config.to_dict()).rope_parameters == config.rope_parameters


def test_rope_scaling_may_be_nested_as_rope_parameters():
    """`rope_scaling` is another name of `rope_parameters` in Transformers: nested, it became an entry inside an entry,
    without the thetas and the scaling it gives."""
    nested = {FULL: LINEAR | {"rope_theta": 3.0}, SLIDING: {"rope_type": "default", "rope_theta": 4.0}}
    assert OlmemConfig(**BOTH, rope_scaling=nested).rope_parameters == nested


def test_rope_scaling_beside_rope_parameters_is_not_lost():
    """A `type` of an old-style `rope_scaling` lost against the `rope_type` "default" of `rope_parameters`: no layer
    was scaled."""
    given = {"rope_parameters": DEFAULT_ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert OlmemConfig(**BOTH, **given).rope_parameters[FULL] == LINEAR | {"rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, FULL: LINEAR}}, ["`rope_parameters`", "not both", FULL, "rope_theta"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, [f"`rope_parameters['{FULL}']['rope_type']`", "(got 'spiral')"]),
        ({"rope_parameters": {SLIDING: LINEAR}}, [f"`rope_parameters['{SLIDING}']['rope_type']`", "(got 'linear')"]),
        ({"rope_parameters": {"rope_theta": -1}}, ["['rope_theta']`", "positive", "(got -1)"]),
        ({"rope_parameters": {"rope_theta": "1e4"}}, ["['rope_theta']`", "positive", "(got '1e4')"]),
        ({"rope_theta": -1}, ["['rope_theta']`", "positive", "(got -1)"]),
    ],
    ids=str,
)
def test_rope_that_means_nothing_is_refused(given, parts):
    message = refusal(**BOTH, **given)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"rope_theta": 0}, "(got 0)"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "(got 'longrope')"),
    ],
    ids=str,
)
def test_incomplete_rope_is_refused_in_our_words(given, part):
    """A top-level theta of 0 became 500000; a missing factor and an unknown type with keys of its own met
    Transformers' check first, a bare `KeyError`."""
    message = refusal(**BOTH, **given)
    assert f"`rope_parameters['{FULL}']" in message or f"`rope_parameters['{SLIDING}']" in message
    assert part in message


@pytest.mark.parametrize("layer_types", [[FULL, SLIDING], [CHUNKED, SLIDING], [CHUNKED, FULL]], ids=str)
def test_flat_inverse_frequencies_reach_every_layer_type(layer_types):
    given = {"inverse_frequencies": FREQUENCIES, "rope_theta": 7.0}
    config = OlmemConfig(**TINY | {"layer_types": layer_types, "attention_chunk_size": 3, "rope_parameters": given})
    assert config.rope_parameters == {name: {"rope_type": "default"} | given for name in layer_types}


@pytest.mark.parametrize("layer_type", [SLIDING, CHUNKED, FULL])
def test_inverse_frequencies_stand_in_for_those_of_the_theta(layer_type):
    """Those of another theta give its logits, in one forward and in steps."""
    sinks = 0 if layer_type == FULL else 2
    changes = {"layer_types": layer_type, "attention_chunk_size": 3, "num_sink_tokens": sinks}
    model = tiny(**changes, rope_parameters={"rope_theta": 20.0})
    stored = getattr(model.model.rotary_emb, f"{layer_type}_inv_freq").tolist()
    found = tiny(**changes, rope_parameters={"rope_theta": 5000.0, "inverse_frequencies": stored})
    other = tiny(**changes, rope_parameters={"rope_theta": 5000.0})
    ids = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
        assert (found(ids).logits - other(ids).logits).abs().max() > 0.01
        caches = [model(ids[:, :9]).past_key_values, found(ids[:, :9]).past_key_values]
        for index in range(9, 12):
            step = ids[:, index : index + 1]
            steps = [each(step, past_key_values=cache) for each, cache in zip((model, found), caches, strict=True)]
            assert torch.equal(steps[0].logits, steps[1].logits)


@pytest.mark.parametrize(
    "stored", [FREQUENCIES[:3], [*FREQUENCIES, 0.1], [], [1, 2, 3, 0], [1, 2, 3, -1], [1, 2, 3, "4"], 0.5], ids=str
)
@pytest.mark.parametrize("layer_type", [SLIDING, FULL])
def test_inverse_frequencies_of_another_size_or_kind_are_refused(layer_type, stored):
    for given in ({"inverse_frequencies": stored}, {layer_type: {"inverse_frequencies": stored}}):
        message = refusal(**TINY | {"layer_types": layer_type, "rope_parameters": given})
        assert f"`rope_parameters['{layer_type}']['inverse_frequencies']` must be `head_dim` / 2 = 4 pos" in message
        assert f"(got {stored!r})" in message


@pytest.mark.parametrize("rope", [LINEAR, YARN, LINEAR | {"rope_type": "dynamic"}], ids=str)
def test_inverse_frequencies_are_not_scaled(rope):
    """A scaling is of the theta's."""
    stored = {"inverse_frequencies": FREQUENCIES}
    for given in (
        {"rope_parameters": rope | stored},
        {"rope_parameters": {FULL: rope | stored}},
        {"rope_parameters": stored, "rope_scaling": rope},
    ):
        message = refusal(**TINY | given)
        assert f"`rope_parameters['{FULL}']['inverse_frequencies']` is no entry of rope_type '{rope['rope_type']}'" in (
            message
        )


def test_dynamic_rope_needs_two_pairs():
    rope = {FULL: LINEAR | {"rope_type": "dynamic"}}
    message = refusal(**TINY | {"head_dim": 2, "rope_parameters": rope})
    assert f"`head_dim` must be at least 4 with rope_type 'dynamic' in `rope_parameters['{FULL}']` (got 2)" in message
    assert OlmemConfig(**TINY | {"head_dim": 4, "rope_parameters": rope}).head_dim == 4


@pytest.mark.parametrize("scheme", POSITION_EMBEDDINGS)
def test_one_position_embedding_for_all_layers_is_one_value(scheme):
    """Given one a layer or as one, and a cache that one model has written is read by the other."""
    listed, one = (tiny(position_embedding=given) for given in ([scheme, scheme], scheme))
    assert listed.config.to_dict() == one.config.to_dict()
    assert listed.config.position_embedding == scheme
    assert listed.config.layer_position_embeddings == [scheme, scheme]
    ids = tokens(1, 9)
    with torch.no_grad():
        cache = listed(ids[:, :6]).past_key_values
        assert_close(one(ids[:, 6:], past_key_values=cache).logits, one(ids).logits[:, 6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("polar", "must be made of rope, xpos, linspace, none (got ['polar'])"),
        (["rope", "polar"], "must be made of rope, xpos, linspace, none (got ['polar'])"),
        (["polar", "polar"], "must be made of rope, xpos, linspace, none (got ['polar'])"),
        (["rope"], "must be one value or `num_hidden_layers` = 2 of them (got ['rope'])"),
        (["none", "rope", "none"], "must be one value or `num_hidden_layers` = 2 of them (got ['none', 'rope', 'none'"),
        ([], "must be one value or `num_hidden_layers` = 2 of them (got [])"),
    ],
    ids=str,
)
def test_position_embeddings_are_refused_in_our_words(given, rule):
    assert f"`position_embedding` {rule}" in refusal(num_hidden_layers=2, position_embedding=given)


OLMO_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize(
    ("config_class", "changes", "expected"),
    [
        (
            OlmoConfig,
            {"clip_qkv": 3.0, "num_key_value_heads": 2},
            {
                "norm_placement": "pre",
                "norm_type": "layer_plain",
                "qk_norm": "none",
                "rms_norm_eps": 1e-5,
                "clip_qkv": 3.0,
                "layer_types": [FULL, FULL],
                "num_key_value_heads": 2,
                "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 10000.0}},
                **{"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279},
            },
        ),
        (
            Olmo2Config,
            {"attention_bias": True, "rms_norm_eps": 1e-4, **NO_TOKENS},
            {
                "norm_placement": "post",
                "norm_type": "rms",
                "qk_norm": "full",
                "rms_norm_eps": 1e-4,
                "attention_bias": True,
                "layer_types": [FULL, FULL],
                "num_key_value_heads": 4,
                **NO_TOKENS,
            },
        ),
        (
            Olmo3Config,
            {"layer_types": [FULL, SLIDING], "sliding_window": 3, "rope_theta": 70.0, "tie_word_embeddings": True},
            {
                "norm_placement": "post",
                "layer_types": [FULL, SLIDING],
                "sliding_window": 3,
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-5,
            },
        ),
    ],
)
def test_an_olmo_configuration_in_our_terms(config_class, changes, expected, tmp_path):
    source = config_class(**OLMO_SIZES, **changes)
    source.save_pretrained(tmp_path)
    config = OlmemConfig.from_olmo(tmp_path)
    assert {name: getattr(config, name) for name in OLMO_SIZES} == OLMO_SIZES
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "olmem"


@pytest.mark.parametrize("config_class", [OlmoConfig, Olmo2Config, Olmo3Config])
def test_overrides_of_an_olmo_configuration(config_class, tmp_path):
    config_class(**OLMO_SIZES).save_pretrained(tmp_path)
    config = OlmemConfig.from_olmo(tmp_path, layer_types=SLIDING, sliding_window=3, logits_scaling=2.0)
    assert config.layer_types == [SLIDING, SLIDING]
    assert (config.sliding_window, config.logits_scaling) == (3, 2.0)
    theta = 500000.0 if config_class is Olmo3Config else 10000.0
    assert config.rope_parameters == {SLIDING: {"rope_type": "default", "rope_theta": theta}}
    sinks = OlmemConfig.from_olmo(tmp_path, layer_types=SLIDING, sliding_window=3, num_sink_tokens=4)
    assert sinks.num_sink_tokens == 4
    assert OlmemConfig.from_olmo(tmp_path, num_memory_tokens=4).num_memory_tokens == 4


def test_fields_that_an_olmo_class_does_not_read_are_kept_but_not_followed(tmp_path):
    """A `clip_qkv` in the config of an Olmo2 model was clipped at, which its own class does not."""
    Olmo2Config(
        **OLMO_SIZES, clip_qkv=3.0, logits_scaling=2.0, layer_types=[SLIDING] * 2, note={"by": "us"}
    ).save_pretrained(tmp_path)
    config = OlmemConfig.from_olmo(tmp_path)
    assert (config.clip_qkv, config.logits_scaling, config.layer_types) == (None, 1.0, [FULL, FULL])
    kept = {"clip_qkv": 3.0, "logits_scaling": 2.0, "layer_types": [SLIDING] * 2, "note": {"by": "us"}}
    assert config.olmo_config == kept
    config.save_pretrained(tmp_path / "olmem")
    assert OlmemConfig.from_pretrained(tmp_path / "olmem").olmo_config == kept


def test_what_an_olmo_configuration_cannot_have_may_be_overridden(tmp_path):
    scaled = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}
    rope = {"rope_parameters": {FULL: scaled, SLIDING: scaled}, "layer_types": [SLIDING, FULL]}
    Olmo3Config(**OLMO_SIZES, **rope).save_pretrained(tmp_path)
    assert "must be 'default'" in refusal(OlmemConfig.from_olmo, tmp_path)
    plain = {kind: {"rope_type": "default", "rope_theta": 50.0} for kind in (FULL, SLIDING)}
    assert OlmemConfig.from_olmo(tmp_path, rope_parameters=plain).rope_parameters == plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_causal": False}, "`is_causal` must be true"),
        ({"layer_types": [FULL, "chunked_attention"]}, "`layer_types` must be made of full_attention and sliding"),
    ],
)
def test_what_an_olmo_class_cannot_do_here_is_refused(changes, words, tmp_path):
    Olmo3Config(**OLMO_SIZES).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    assert words in refusal(OlmemConfig.from_olmo, tmp_path)


def test_a_misspelled_override_of_an_olmo_configuration_is_refused(tmp_path):
    """It went to the Hub's arguments, which ignore what they do not know."""
    Olmo2Config(**OLMO_SIZES).save_pretrained(tmp_path)
    assert "did you mean `sliding_window`?" in refusal(OlmemConfig.from_olmo, tmp_path, slidng_window=3)


def test_keywords_of_transformers_override_an_olmo_configuration(tmp_path):
    """They went to the Hub's arguments, which ignore what they do not know."""
    Olmo2Config(**OLMO_SIZES).save_pretrained(tmp_path)
    assert OlmemConfig.from_olmo(tmp_path, num_labels=5).num_labels == 5


def test_a_folder_that_is_no_olmo_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    OlmemConfig(**TINY).save_pretrained(tmp_path / "olmem")
    for name in ("llama", "olmem"):
        message = refusal(OlmemConfig.from_olmo, tmp_path / name)
        assert "`model_type` must be one of olmo, olmo2, olmo3" in message
        assert f"got {name!r} in {tmp_path / name}" in message


def test_another_models_configuration_is_refused(tmp_path):
    """Transformers only warns, and the model then has our defaults, sliding layers included."""
    Olmo2Config(num_hidden_layers=2, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model_type` must be 'olmem' \(got 'olmo2'\); load .* with `from_olmo`"):
        OlmemConfig.from_pretrained(tmp_path)


def test_a_misspelled_override_is_refused(tmp_path):
    OlmemConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean `sliding_window`"):
        OlmemConfig.from_pretrained(tmp_path, slidng_window=3)


@pytest.mark.parametrize(
    "changes", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}], ids=str
)
def test_partial_rotation_is_refused(changes):
    with pytest.raises((ValueError, StrictDataclassError), match="partial_rotary_factor"):
        OlmemConfig(num_hidden_layers=4, **changes)


# Choices that would have no effect, or another than was meant, in silence


def test_sinks_of_a_model_without_windows_are_refused():
    message = refusal(layer_types=FULL, num_sink_tokens=4)
    assert "`num_sink_tokens` must be 0 where every layer is 'full_attention'" in message
    assert "(got 4)" in message and "leave it out, or give some `layer_types` a window" in message
    assert OlmemConfig(num_sink_tokens=4).num_sink_tokens == 4
    assert OlmemConfig(layer_types="chunked_attention", attention_chunk_size=8, num_sink_tokens=4).num_sink_tokens == 4


@pytest.mark.parametrize("original", [OlmoConfig, Olmo2Config], ids=lambda kind: kind.model_type)
def test_a_default_window_beyond_what_an_olmo_was_trained_on_is_refused(original, tmp_path):
    original(max_position_embeddings=128).save_pretrained(tmp_path)
    message = refusal(OlmemConfig.from_olmo, tmp_path, layer_types=SLIDING)
    assert "`sliding_window` must be given with `layer_types` that slide (got the default 4096)" in message
    assert "trained on fewer tokens, 128; give a window of at most 128" in message
    for window in (64, 4096):
        assert OlmemConfig.from_olmo(tmp_path, layer_types=SLIDING, sliding_window=window).sliding_window == window
    assert OlmemConfig.from_olmo(tmp_path).sliding_window == 4096, "no layer slides"
    original(max_position_embeddings=4096).save_pretrained(tmp_path)
    assert OlmemConfig.from_olmo(tmp_path, layer_types=SLIDING).sliding_window == 4096


def test_a_default_window_of_a_model_of_full_layers_is_nobodys_choice(tmp_path):
    """Its folder holds the default, which no layer uses; a folder whose layers slide holds a choice."""
    OlmemConfig(layer_types=FULL, max_position_embeddings=128).save_pretrained(tmp_path)
    for load in (OlmemConfig.from_pretrained, AutoConfig.from_pretrained):
        message = refusal(load, tmp_path, layer_types=SLIDING)
        assert "`sliding_window` must be given with `layer_types` that slide (got the default 4096)" in message
        assert load(tmp_path, layer_types=SLIDING, sliding_window=4096).sliding_window == 4096
        assert "`sliding_window` must be left out where `layer_types` has no" in refusal(
            load, tmp_path, sliding_window=9
        )
    OlmemConfig(max_position_embeddings=128).save_pretrained(tmp_path)
    assert OlmemConfig.from_pretrained(tmp_path, layer_types=SLIDING).sliding_window == 4096


def test_a_window_that_an_olmo3_has_is_its_own(tmp_path):
    Olmo3Config(max_position_embeddings=128, sliding_window=200, num_hidden_layers=4).save_pretrained(tmp_path)
    assert OlmemConfig.from_olmo(tmp_path, layer_types=SLIDING).sliding_window == 200
    assert OlmemConfig.from_olmo(tmp_path).sliding_window == 200


def test_peft_is_told_which_modules_to_adapt(monkeypatch):
    """Where it is imported, each time that it asks for a configuration: norms are other ones by their placement."""
    tables = types.ModuleType("peft.utils.constants")
    lora, norms = {"llama": ["q_proj", "v_proj"]}, {"llama": ["input_layernorm", "norm"]}
    tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = lora
    tables.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = norms
    monkeypatch.setitem(sys.modules, "peft.utils.constants", tables)
    for placement in ("post", "pre", "peri", "parallel"):
        model = tiny(norm_placement=placement, num_memory_tokens=1)
        model.config.to_dict()
        assert lora["olmem"] == ["q_proj", "v_proj", "k_proj"]
        names = [name for name, module in model.named_modules() if type(module).__name__ == "OlmemRMSNorm"]
        found = {name.rpartition(".")[2] for name in names if not name.endswith(("q_norm", "k_norm"))}
        assert set(norms["olmem"]) == found
    lora["olmem"] = ["q_proj"]  # by somebody else
    tiny().config.to_dict()
    assert lora["olmem"] == ["q_proj"] and lora["llama"] == ["q_proj", "v_proj"]
