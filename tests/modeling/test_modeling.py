"""The network against Transformers' OLMo models, bit for bit, and against the design's formulas in plain loops."""

import itertools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import WINDOW, left_padded, oracle, shake, tiny, tokens
from olmem import OlmemConfig, OlmemForCausalLM, OlmemModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTH = 2 * WINDOW + 3
SLIDING, FULL = "sliding_attention", "full_attention"
PLACEMENTS, NORMS, QK_NORMS = (
    ("post", "pre", "peri", "parallel"),
    ("rms", "layer", "layer_plain"),
    ("full", "head", "none"),
)
CLIPS = (None, "projection", "rotary")


def logits(model: OlmemForCausalLM, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None], **{"use_cache": False} | kwargs).logits[0]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("norm_placement", PLACEMENTS)
def test_every_block_is_the_one_of_the_design(norm_placement, norm_type, qk_norm, clip):
    clipping = {"clip_qkv": 0.5, "clip_qkv_stage": clip} if clip else {}
    model = tiny(norm_placement=norm_placement, norm_type=norm_type, qk_norm=qk_norm, **clipping)
    ids = tokens(LENGTH)
    assert_close(logits(model, ids).double(), oracle(model, ids), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "elephant"},
        {"logits_scaling": 3},
        {"attention_bias": True, "qk_norm": "none"},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": None},
        {"head_dim": 2},
        {"rms_norm_eps": 0.5},
        {"sliding_window": 1},
        {"sliding_window": LENGTH - 1},
        {"sliding_window": LENGTH + 5},
        {"layer_types": SLIDING},
        {"layer_types": FULL, "sliding_window": None},
        {"layer_types": [FULL, SLIDING]},
        {"rope_parameters": {"rope_theta": 20.0, "rope_type": "linear", "factor": 3.0}},
        {"num_hidden_layers": 5, "layer_types": None},
    ],
    ids=str,
)
def test_every_other_choice_is_the_one_of_the_design(changes):
    model = tiny(**changes)
    ids = tokens(LENGTH)
    assert_close(logits(model, ids).double(), oracle(model, ids), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("norm_placement", PLACEMENTS)
def test_dropout_thins_sublayers_and_attention_in_training_only(norm_placement, monkeypatch):
    def thin(states, p=0.5, training=True, inplace=False):
        return states * (1 - p) if training else states

    monkeypatch.setattr(nn.functional, "dropout", thin)
    model = tiny(norm_placement=norm_placement, residual_dropout=0.25, attention_dropout=0.125)
    model.set_attn_implementation("eager")
    ids = tokens(LENGTH)
    assert_close(logits(model, ids).double(), oracle(model, ids), rtol=1e-4, atol=2e-5)
    model.train()
    expected = oracle(model, ids, kept=0.75, attention_kept=0.875)
    assert_close(logits(model, ids).double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("distance", [WINDOW - 1, WINDOW])
def test_a_query_sees_the_window_with_its_own_key(distance):
    """W keys, its own included: the key W-1 before is the last one seen."""
    model = tiny(num_hidden_layers=1, layer_types=SLIDING)
    ids = tokens(LENGTH)
    changed = ids.clone()
    changed[LENGTH - 1 - distance] = (ids[LENGTH - 1 - distance] + 1) % 61
    is_same = torch.equal(logits(model, ids)[-1], logits(model, changed)[-1])
    assert is_same == (distance == WINDOW)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("norm_placement", PLACEMENTS)
def test_a_parameter_exists_exactly_when_it_is_used(norm_placement, qk_norm, norm_type):
    model = tiny(norm_placement=norm_placement, qk_norm=qk_norm, norm_type=norm_type, layer_types=FULL)
    modules = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
    layer = {f"self_attn.{name}.weight": shape for name, shape in modules.items()}
    layer |= {"mlp.gate_proj.weight": (20, 24), "mlp.up_proj.weight": (20, 24), "mlp.down_proj.weight": (24, 20)}
    norms = {}
    if qk_norm != "none":
        norms = {"self_attn.q_norm": (32,), "self_attn.k_norm": (16,)}
    if qk_norm == "head":
        norms = dict.fromkeys(norms, (8,))
    placed = {"pre": ["pre"], "post": ["post"], "peri": ["pre", "post"], "parallel": []}[norm_placement]
    norms |= {f"{place}_{part}_layernorm": (24,) for place in placed for part in ("attention", "feedforward")}
    norms |= {"input_layernorm": (24,)} if norm_placement == "parallel" else {}
    expected = {"model.embed_tokens.weight": (61, 24), "lm_head.weight": (61, 24)}
    kinds = {"rms": ["weight"], "layer": ["weight", "bias"], "layer_plain": []}[norm_type]
    expected |= {f"model.norm.{kind}": (24,) for kind in kinds}
    for index in range(2):
        expected |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        expected |= {f"model.layers.{index}.{name}.{kind}": shape for name, shape in norms.items() for kind in kinds}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


OLMO: dict[str, tuple[Any, Any]] = {
    "olmo": (OlmoConfig, OlmoForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": None,
    "eos_token_id": None,
}


@st.composite
def olmo_options(draw, model_type: str) -> dict[str, Any]:
    """Options of a Transformers OLMo configuration."""
    layers = draw(st.integers(1, 4))
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (2, 2)]))
    options = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": draw(st.sampled_from(["silu", "gelu"])),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([None, 3])),
    }
    if head_dim := draw(st.sampled_from([None, 4, 10])):
        options["head_dim"] = head_dim
    if model_type == "olmo":
        options["clip_qkv"] = draw(st.sampled_from([None, 0.5]))
    else:
        options["rms_norm_eps"] = draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    thetas = st.sampled_from([10.0, 10000.0, 500000.0])
    rope_type = draw(st.sampled_from(sorted(SCALINGS)))
    rope = {"rope_theta": draw(thetas), "rope_type": rope_type, **SCALINGS[rope_type]}
    options["rope_parameters"] = rope
    if rope_type == "dynamic":  # beyond it, Transformers gives a whole call the frequencies of its last token
        options["max_position_embeddings"] = 32
    if model_type == "olmo3":
        options["sliding_window"] = draw(st.integers(2, 6))
        layer_types = st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers)
        options["layer_types"] = draw(st.none() | layer_types)
        options["rope_parameters"] = {FULL: rope, SLIDING: {"rope_theta": draw(thetas), "rope_type": "default"}}
    return options


def olmo(model_type: str, folder: Path | str, **options) -> Any:
    """A Transformers OLMo model with random weights, saved to the folder too."""
    config_class, model_class = OLMO[model_type]
    model = shake(model_class(config_class(**(SIZES | options))))
    model.save_pretrained(folder)
    return model


def everything(model: Any, ids: torch.Tensor, mask: torch.Tensor, backend: str, **kwargs) -> dict[str, torch.Tensor]:
    """Logits, hidden states, gradients and a greedy continuation of a batch with its logits, padding left out."""
    model.set_attn_implementation(backend)
    model.zero_grad()
    real = mask.bool()
    labels = ids.where(real & real.roll(1, dims=1), -100)  # nothing that padding predicts
    outputs = model(ids, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=False)
    outputs.loss.backward()
    written = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    found = {"loss": outputs.loss, "logits": outputs.logits[real], "written": written.sequences}
    found |= {f"hidden {index}": states[real] for index, states in enumerate(outputs.hidden_states)}
    found |= {f"step {index}": step for index, step in enumerate(written.logits)}
    return found | {f"gradient of {name}": weight.grad for name, weight in model.named_parameters()}


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", OLMO)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_an_olmo_model_is_the_same_model_bit_for_bit(model_type, backend, data):
    options = data.draw(olmo_options(model_type))
    with tempfile.TemporaryDirectory() as folder:
        reference = olmo(model_type, folder, **options)
        model = OlmemForCausalLM.from_olmo(folder).eval()
    assert different(model.state_dict(), reference.state_dict()) == []
    ids, cache = tokens(2, LENGTH), {"cache_implementation": "dynamic"}
    expected = everything(reference, ids, torch.ones_like(ids), backend)
    assert expected["step 0"].isfinite().all()
    assert different(everything(model, ids, torch.ones_like(ids), backend, **cache), expected) == []

    batch = left_padded(tokens(LENGTH), tokens(LENGTH - 4, seed=1))
    found, expected = (everything(either, *batch.values(), backend) for either in (model, reference))
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("model_type", OLMO)
def test_an_olmo_folder_of_an_older_release_keeps_its_rope(model_type, type_key, tmp_path):
    """Olmo3Config itself loses a top-level theta."""
    rope = {"rope_theta": 30.0, "rope_type": "yarn", **SCALINGS["yarn"]}
    nested = {FULL: rope, SLIDING: {"rope_theta": 30.0, "rope_type": "default"}}
    reference = olmo(model_type, tmp_path, rope_parameters=nested if model_type == "olmo3" else rope)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {type_key if key == "rope_type" else key: value for key, value in rope.items() if key != "rope_theta"}
    config |= {"rope_theta": 30.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens(LENGTH)
    assert torch.equal(logits(OlmemForCausalLM.from_olmo(tmp_path), ids), logits(reference, ids))


@pytest.mark.parametrize("model_type", OLMO)
def test_an_olmo_model_takes_other_choices(model_type, tmp_path):
    reference = olmo(model_type, tmp_path, eos_token_id=5, pad_token_id=6)
    ids = tokens(LENGTH)
    changes = {"layer_types": SLIDING, "sliding_window": 3, "logits_scaling": 2.0}
    model = OlmemForCausalLM.from_olmo(tmp_path, **changes, dtype=torch.float64, attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.float64, "eager")
    assert_close(logits(model, ids), oracle(model, ids), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(logits(model, ids).float() * 2, logits(reference, ids), atol=1e-2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (5, 6)
    full = OlmemForCausalLM.from_olmo(tmp_path, layer_types=FULL)
    assert full.config.layer_types == [FULL, FULL]


@pytest.mark.parametrize("model_type", OLMO)
def test_bfloat16_is_as_near_to_float64_as_the_olmo_model_is(model_type, tmp_path):
    options = {"attention_bias": True} if model_type == "olmo" else {}
    olmo(model_type, tmp_path, **options, max_position_embeddings=512)
    ids = tokens(64)
    exact = oracle(OlmemForCausalLM.from_olmo(tmp_path, dtype=torch.float32), ids)
    reference = OLMO[model_type][1].from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = OlmemForCausalLM.from_olmo(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert {tensor.dtype for tensor in buffers.values()} == {torch.float32}
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in buffers.values())
    errors = [(logits(each, ids).double() - exact).abs().max() for each in (model, reference)]
    assert 0 < errors[0] <= 2 * errors[1]


def test_angles_are_float32_whatever_the_dtype(tmp_path):
    single = tiny()
    single.save_pretrained(tmp_path)
    half = OlmemForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    with torch.no_grad():
        positions = torch.arange(5000, 5010)[None]
        for layer_type in (SLIDING, FULL):
            expected = single.model.rotary_emb(torch.ones(1), positions, layer_type)
            found = half.model.rotary_emb(torch.ones(1).bfloat16(), positions, layer_type)
            assert torch.equal(torch.stack(found), torch.stack(expected))


BACKEND_MODELS = [
    {},
    {"layer_types": SLIDING},
    {"layer_types": FULL},
    {"num_attention_heads": 6, "num_key_value_heads": 3},
    {"num_key_value_heads": 4, "sliding_window": 1, "qk_norm": "head"},
    {"norm_placement": "parallel", "clip_qkv": 0.5},
]
ROTARY_CLIP = {"clip_qkv": 0.5, "clip_qkv_stage": "rotary"}


@pytest.mark.parametrize("changes", BACKEND_MODELS, ids=str)
def test_eager_sdpa_and_flex_agree_on_a_left_padded_batch(changes):
    model = tiny(**changes)
    batch = left_padded(tokens(LENGTH), tokens(LENGTH - 5, seed=1), tokens(1, seed=2))
    outputs = {}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex without a compiler
        for backend in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(backend)
            outputs[backend] = model(**batch, use_cache=False).logits
            assert outputs[backend].isfinite().all()
    real = batch["attention_mask"].bool()
    for backend in ("sdpa", "flex_attention"):
        assert_close(outputs[backend][real], outputs["eager"][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [*BACKEND_MODELS, ROTARY_CLIP], ids=str)
def test_a_left_padded_row_is_what_it_is_alone(changes):
    """A clip after RoPE is the one choice that depends on absolute positions: they must be those of the real tokens."""
    model = tiny(**changes)
    batch = left_padded(tokens(LENGTH), tokens(LENGTH - 5, seed=1), tokens(1, seed=2))
    with torch.no_grad():
        outputs = model(**batch, use_cache=False).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        assert_close(outputs[row][mask], logits(model, batch["input_ids"][row][mask]), rtol=0, atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    model = tiny()
    parts = tokens(7), tokens(6, seed=1)
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts)[None], position_ids=positions, use_cache=False).logits[0]
    assert_close(packed, torch.cat([logits(model, part) for part in parts]), rtol=0, atol=1e-5)


def test_a_flash_like_backend_gets_the_window_the_mask_and_every_keyword(monkeypatch):
    calls = []

    def record(module, query, key, value, attention_mask, **kwargs):
        calls.append((module, query, key, value, attention_mask, kwargs))
        return query.transpose(1, 2), None

    def padding_only(*_arguments, attention_mask=None, **_kwargs):
        return attention_mask

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recording", record)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "recording", padding_only)
    model = tiny(attention_dropout=0.25)
    model.set_attn_implementation("recording")
    batch = left_padded(tokens(LENGTH), tokens(LENGTH - 5, seed=1))
    marker = object()
    model(**batch, cu_seq_lens_q=marker, use_cache=False)
    model.train()
    model(**batch, cu_seq_lens_q=marker, use_cache=False)

    assert [kwargs["sliding_window"] for *_, kwargs in calls] == [WINDOW, None, WINDOW, None]
    assert [kwargs["dropout"] for *_, kwargs in calls] == [0.0, 0.0, 0.25, 0.25]
    for index, (module, query, key, value, mask, kwargs) in enumerate(calls):
        assert module.is_causal is True
        assert module.layer_idx == index % 2
        assert module.num_key_value_groups == 2
        assert query.shape == (2, 4, LENGTH, 8)
        assert key.shape == value.shape == (2, 2, LENGTH, 8)
        assert torch.equal(mask.bool(), batch["attention_mask"].bool())
        assert kwargs["scaling"] == 8**-0.5
        assert kwargs["cu_seq_lens_q"] is marker


def test_every_attention_implementation_is_supported():
    for name in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(OlmemForCausalLM, name) is True


@pytest.mark.parametrize("tied", [False, True])
def test_plans_name_modules_that_exist(tied):
    model = tiny(tie_word_embeddings=tied)
    modules = {name for name, _ in model.named_modules()}
    for pattern in [*OlmemConfig.base_model_tp_plan, *OlmemConfig.base_model_pp_plan]:
        assert f"model.{pattern.replace('*', '0')}" in modules
    assert {*OlmemForCausalLM._tp_plan, *OlmemForCausalLM._pp_plan} == {"lm_head"}
    planned = {pattern.split(".")[-1] for pattern in OlmemConfig.base_model_tp_plan}
    linear = {name.split(".")[-1] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    assert planned == linear


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("norm_placement", ["post", "parallel"])
def test_gradient_checkpointing_changes_no_gradient(norm_placement, use_reentrant):
    ids = tokens(2, LENGTH)
    found = []
    for checkpointing in (False, True):
        model = tiny(norm_placement=norm_placement, residual_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_arguments, runs=runs: runs.append(1))
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        assert len(runs) == (2 if checkpointing else 1)
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert different(found[1], found[0]) == []


def test_labels_give_the_cross_entropy_of_the_next_token():
    model = tiny()
    ids = tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        outputs = model(ids, labels=labels)
    shares = outputs.logits[:, :-1].log_softmax(-1)
    losses = [-shares[row, i, ids[row, i + 1]] for row in range(2) for i in range(3 if row == 0 else 0, LENGTH - 1)]
    assert_close(outputs.loss, torch.stack(losses).mean())
    assert_close(model(ids, labels=labels, num_items_in_batch=5).loss, torch.stack(losses).sum() / 5)
    assert_close(model(ids, labels=labels, return_dict=False)[0], outputs.loss)


@pytest.mark.parametrize("kept", [1, 3, LENGTH, torch.tensor([0, 4, 2])], ids=str)
def test_logits_to_keep(kept):
    model = tiny(logits_scaling=2.0)
    ids = tokens(LENGTH)
    rows = kept if isinstance(kept, torch.Tensor) else slice(LENGTH - kept, None)
    assert_close(logits(model, ids, logits_to_keep=kept), logits(model, ids)[rows])


def test_hidden_states_and_attentions_have_their_shapes_and_meaning():
    model = tiny()
    model.set_attn_implementation("eager")
    ids = tokens(2, LENGTH)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in outputs.hidden_states] == [(2, LENGTH, 24)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, LENGTH, LENGTH)] * 2
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    for weights, visible in zip(outputs.attentions, (seen.triu(1 - WINDOW), seen), strict=True):
        assert_close(weights.sum(-1), torch.ones(2, 4, LENGTH))
        assert torch.equal(weights > 0, visible.expand_as(weights))
    tensors = model(ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(tensors[0], outputs.logits)


def test_what_is_asked_for_and_left_out_is_told(monkeypatch):
    """They are attentions under sdpa, and a cache beside checkpoints. A compiled forward stays one graph."""
    told, model, ids = [], tiny(), tokens(2, LENGTH)
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message: told.append(message))
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(ids, output_attentions=True, use_cache=False)
    assert not told
    assert not model(ids, output_attentions=True).attentions
    assert told == [
        "`output_attentions` gives no attentions with `attn_implementation` 'sdpa', which computes none; call "
        '`model.set_attn_implementation("eager")` for them.'
    ]
    model.train().gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None
    assert "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`." in told


def test_ids_or_embeddings():
    model = tiny()
    ids = tokens(LENGTH)
    embedded = model.get_input_embeddings()(ids)[None]
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits[0], logits(model, ids))
    for both in ({}, {"input_ids": ids[None], "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**both)


@pytest.mark.parametrize("norm_type", NORMS)
def test_initial_weights(norm_type):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 200, "head_dim": 16, "num_hidden_layers": 2}
    config = OlmemConfig(
        **sizes, num_attention_heads=8, norm_type=norm_type, norm_placement="peri", attention_bias=True
    )
    config.initializer_range = 0.05
    with torch.no_grad():
        model = OlmemForCausalLM(config)
        for parameter in model.parameters():
            parameter.fill_(7.0)
            parameter._is_hf_initialized = False
        model.apply(model._init_weights)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert abs(weight.std() - 0.05) < 0.002, name


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_only_a_missing_weight_is_initialised_anew(missing, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = OlmemForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    assert different(loaded.state_dict(), model.state_dict()) == [missing]
    fresh = loaded.state_dict()[missing]
    assert (fresh == 1).all() if fresh.ndim == 1 else abs(fresh.std() - 0.1) < 0.02
    buffers = dict(loaded.named_buffers())
    assert different(buffers, dict(model.named_buffers())) == []
    assert len(buffers) == 2


def test_tied_weights_are_one_tensor_and_stored_once(tmp_path):
    assert OlmemForCausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = OlmemForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, tokens(LENGTH)), logits(model, tokens(LENGTH)))
    assert tiny().lm_head.weight is not tiny().model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [70, 40])
def test_the_vocabulary_can_be_resized(tied, size):
    model = tiny(tie_word_embeddings=tied)
    ids = tokens(LENGTH, vocab_size=40)
    before = logits(model, ids)
    model.resize_token_embeddings(size)
    assert (model.config.vocab_size, model.get_output_embeddings().out_features) == (size, size)
    after = logits(model, ids)
    assert after.shape == (LENGTH, size)
    common = min(size, 61)
    assert_close(after[:, :common], before[:, :common])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model(ids[None], labels=ids[None]).loss.backward()


def test_a_saved_model_comes_back(tmp_path):
    options = itertools.product(("peri", "parallel"), ("layer", "layer_plain"), ("head", "none"))
    for index, (placement, norm_type, qk_norm) in enumerate(options):
        changes = {"norm_placement": placement, "norm_type": norm_type, "qk_norm": qk_norm, "logits_scaling": 1.5}
        model = tiny(**changes, hidden_act="elephant", clip_qkv=0.5, clip_qkv_stage="rotary")
        model.save_pretrained(tmp_path / str(index), max_shard_size="8KB")
        assert (tmp_path / str(index) / "model.safetensors.index.json").exists()
        loaded, info = OlmemForCausalLM.from_pretrained(tmp_path / str(index), output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(logits(loaded, tokens(LENGTH)), logits(model, tokens(LENGTH)))
    backbone = OlmemModel.from_pretrained(tmp_path / "0")
    expected = OlmemForCausalLM.from_pretrained(tmp_path / "0").model
    assert different(backbone.state_dict(), expected.state_dict()) == []
