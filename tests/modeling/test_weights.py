"""How weights come into a model: parameters of version 0.1 are read by the names that they had."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import olmem
import pytest
import torch
from modeling.helpers import BOTH, MEMORIES, SLIDING, tiny, tokens
from olmem import OlmemConfig, OlmemForCausalLM, OlmemForSequenceClassification, OlmemModel
from olmem.weights_olmem import OLD_NAMES, new_name
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GATED: dict[str, Any] = {"layer_types": SLIDING, "memory_gate_init": -1.0} | BOTH
AGAIN = "must be trained again"


def old_name(name: str) -> str:
    """A parameter's name in version 0.1."""
    return re.sub(
        r"(memory|retrieval)_gate\.logits$", r"\1_gate", name.replace("memory.embeddings", "memory_embeddings")
    )


def of_0_1(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as version 0.1 has it: parameters of modules were parameters, and memory had no norm."""
    return {old_name(name): tensor for name, tensor in state.items() if "memory.norm" not in name}


def as_0_1(folder: Path) -> Path:
    """Has every weight file of a folder hold what version 0.1 would have written."""
    for path in folder.glob("*.safetensors"):
        save_file(of_0_1(load_file(path)), path, {"format": "pt"})
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = of_0_1(index["weight_map"])
        path.write_text(json.dumps(index))
    return folder


# Names


@pytest.mark.parametrize("norm_type", ["rms", "layer", "layer_plain"])
def test_parameters_of_memory_are_those_of_modules(norm_type):
    model = tiny(**GATED | {"norm_type": norm_type})
    names = {name for name, _ in model.named_parameters() if "memory" in name or "retrieval" in name}
    gates = {
        f"model.layers.{layer}.self_attn.{kind}_gate.logits" for layer in (0, 1) for kind in ("memory", "retrieval")
    }
    norm = {"rms": {"weight"}, "layer": {"weight", "bias"}, "layer_plain": set()}[norm_type]
    assert names == gates | {"model.memory.embeddings"} | {f"model.memory.norm.{name}" for name in norm}
    assert model.model.memory.embeddings.shape == (2, 24)
    assert model.model.layers[0].self_attn.memory_gate.logits.shape == (4,)
    assert type(model.model.memory.norm) is type(model.model.norm)


def test_new_norms_are_ones_and_new_gates_are_where_they_are_told():
    model = OlmemForCausalLM(tiny(**GATED).config)
    attention = model.model.layers[1].self_attn
    assert torch.equal(model.model.memory.norm.weight, torch.ones(24))
    assert torch.equal(attention.memory_gate.logits, torch.full((4,), -1.0))
    assert torch.equal(attention.retrieval_gate.logits, torch.full((4,), -4.0))


@pytest.mark.parametrize(
    "changes", [GATED, MEMORIES["retrieval"], MEMORIES["memory"]], ids=["both", "retrieval", "memory"]
)
def test_a_state_dict_of_version_0_1_is_read(changes):
    """Every tensor goes where it belongs, whatever surrounds the model; the caller's dictionary stays as it is."""
    model, other = tiny(**changes), OlmemForCausalLM(tiny(**changes).config)
    given = of_0_1(model.state_dict())
    names = list(given)
    if "num_memory_tokens" in changes:
        with pytest.warns(UserWarning, match=AGAIN):
            other.load_state_dict(given)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(given)
    assert list(given) == names
    fresh = "model.memory.norm.weight"
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, torch.ones(24) if name == fresh else model.state_dict()[name]), name


def test_a_state_dict_of_today_is_read_in_silence():
    model = tiny(**GATED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OlmemForCausalLM(model.config).load_state_dict(model.state_dict())


def test_what_is_no_name_of_any_version_is_still_refused():
    model = tiny(**GATED)
    for name in ("model.memory_embedding", "model.layers.0.self_attn.memory_gates", "memory_embeddings"):
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{name}"'):
            model.load_state_dict(model.state_dict() | {name: torch.zeros(2, 24)})


def test_an_old_memory_in_a_model_without_is_unexpected_under_its_new_name():
    """As it is under any other."""
    state = of_0_1(tiny(**GATED).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"model\.memory\.embeddings"'), pytest.warns(match=AGAIN):
        tiny(layer_types=SLIDING).load_state_dict(state)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("saved", [OlmemForCausalLM, OlmemModel], ids=lambda kind: f"saved {kind.__name__}")
@pytest.mark.parametrize("loaded", [OlmemForCausalLM, OlmemModel], ids=lambda kind: f"loaded {kind.__name__}")
def test_a_folder_of_version_0_1_is_read_and_saved_anew(saved, loaded, shards, tmp_path):
    """With and without the prefix of the base model; only the norm is missing."""
    model = tiny(saved, **GATED)
    model.save_pretrained(tmp_path / "old", **shards)
    as_0_1(tmp_path / "old")
    with pytest.warns(UserWarning, match=AGAIN):
        found, info = loaded.from_pretrained(tmp_path / "old", output_loading_info=True)
    missing = {name.removeprefix("model.") for name in info["missing_keys"]}
    assert missing - {"lm_head.weight"} == {"memory.norm.weight"}
    base, meant = found.get_decoder().state_dict(), model.get_decoder().state_dict()
    for name, tensor in base.items():
        assert torch.equal(tensor, torch.ones(24) if name == "memory.norm.weight" else meant[name]), name
    found.save_pretrained(tmp_path / "new", **shards)
    names = {name for path in (tmp_path / "new").glob("*.safetensors") for name in load_file(path)}
    assert names == set(found.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = loaded.from_pretrained(tmp_path / "new")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_weights_in_memory_and_names_of_ones_own_are_read_too(tmp_path):
    """`key_mapping` goes on meaning what it means in Transformers, also when the model is saved."""
    model = tiny(**GATED)
    state = {name.replace("lm_head", "my_head"): tensor for name, tensor in of_0_1(model.state_dict()).items()}
    with pytest.warns(UserWarning, match=AGAIN):
        found = OlmemForCausalLM.from_pretrained(
            None, config=model.config, state_dict=state, key_mapping={"^my_head": "lm_head"}
        )
    for name in ("lm_head.weight", "model.memory.embeddings", "model.layers.1.self_attn.retrieval_gate.logits"):
        assert torch.equal(found.state_dict()[name], model.state_dict()[name]), name
    found.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "my_head.weight" in names and "model.memory.embeddings" in names


def test_offloaded_weights_of_version_0_1_are_read(tmp_path):
    """Gates that stay on the disk, too."""
    model = tiny(**GATED)
    model.save_pretrained(tmp_path / "old")
    as_0_1(tmp_path / "old")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.memory", "model.rotary_emb", "lm_head")
    places: dict[str, Any] = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    with pytest.warns(UserWarning, match=AGAIN):
        split = OlmemForCausalLM.from_pretrained(tmp_path / "old", device_map=places, offload_folder=tmp_path / "off")
        whole = OlmemForCausalLM.from_pretrained(tmp_path / "old")
    ids = tokens(1, 17)
    with torch.no_grad():
        assert torch.equal(split(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_every_name_of_version_0_1_has_one_today():
    names = list(tiny(**GATED).state_dict())
    assert [new_name(old_name(name)) for name in names] == names
    assert len({pattern for pattern in OLD_NAMES for name in names if re.search(pattern, old_name(name))}) == 3


def test_parameters_of_a_classifier_are_read_by_the_same_names(tmp_path):
    model = tiny(OlmemForSequenceClassification, **GATED, num_labels=3)
    model.save_pretrained(tmp_path)
    as_0_1(tmp_path)
    with pytest.warns(UserWarning, match=AGAIN):
        found = olmem.OlmemForSequenceClassification.from_pretrained(tmp_path)
    name = "model.layers.0.self_attn.memory_gate.logits"
    assert torch.equal(found.state_dict()[name], model.state_dict()[name])


# Gates of a memory beside weights that had none

NEW: dict[str, Any] = {"num_memory_tokens": 2, "memory_segment_length": 5}
LARGE: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
LARGE |= {"num_attention_heads": 4, "sliding_window": 4, "pad_token_id": None, "eos_token_id": None}


@pytest.fixture
def without_memory(tmp_path) -> Path:
    """A folder of a model that was trained without memory."""
    tiny(layer_types=SLIDING).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def by_config(model_class: Any, folder: Path, **fields: Any) -> Any:
    return model_class.from_pretrained(folder, config=OlmemConfig.from_pretrained(folder, **fields))


def by_attributes(model_class: Any, folder: Path, **fields: Any) -> Any:
    """By a configuration that was changed after it was read, the gates' field being given to the call, if at all."""
    config = OlmemConfig.from_pretrained(folder)
    choice = {name: fields.pop(name) for name in ("memory_gate_init",) if name in fields}
    for name, value in fields.items():
        setattr(config, name, value)
    return model_class.from_pretrained(folder, config=config, **choice)


def by_a_new_config(model_class: Any, folder: Path, **fields: Any) -> Any:
    """By a configuration made from scratch, and weights given as a dictionary."""
    choice = {name: fields.pop(name) for name in ("memory_gate_init",) if name in fields}
    config = tiny(layer_types=SLIDING, **fields).config
    return model_class.from_pretrained(
        None, config=config, state_dict=load_file(folder / "model.safetensors"), **choice
    )


def by_an_edited_file(model_class: Any, folder: Path, **fields: Any) -> Any:
    choice = {name: fields.pop(name) for name in ("memory_gate_init",) if name in fields}
    return model_class.from_pretrained(edited(folder, **fields), **choice)


DOORS: dict[str, Any] = {
    "from_pretrained": lambda model_class, folder, **fields: model_class.from_pretrained(folder, **fields),
    "AutoModel": lambda _, folder, **fields: AutoModelForCausalLM.from_pretrained(folder, **fields),
    "config": by_config,
    "attributes": by_attributes,
    "new config": by_a_new_config,
    "edited file": by_an_edited_file,
}
doors = pytest.mark.parametrize("door", DOORS)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


@doors
def test_a_new_memory_beside_trained_weights_is_harmless_by_every_door(door, without_memory):
    plain = OlmemForCausalLM.from_pretrained(without_memory)
    model = DOORS[door](OlmemForCausalLM, without_memory, **NEW)
    assert model.config.memory_gate_init == -10.0
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.memory_gate.logits, torch.full((4,), -10.0))
    ids = tokens(1, 40)
    apart = (logits_of(model, ids) - logits_of(plain, ids)).abs().max()
    assert 0 < apart < 2e-3


def test_a_state_dict_without_memory_gates_it_too(without_memory):
    """It does if it holds all else; a part of the weights, such as an adapter's, says nothing of memory."""
    plain, ids = OlmemForCausalLM.from_pretrained(without_memory), tokens(1, 40)
    model = OlmemForCausalLM(tiny(layer_types=SLIDING, **NEW).config)
    state = plain.state_dict()
    model.load_state_dict({name: state[name] for name in list(state)[1:]}, strict=False)
    assert model.config.memory_gate_init is None and model.model.layers[0].self_attn.memory_gate is None
    with pytest.warns(UserWarning, match="`memory_gate_init` became -10"):
        model.load_state_dict(state, strict=False)
    assert model.config.memory_gate_init == -10.0
    assert 0 < (logits_of(model, ids) - logits_of(plain, ids)).abs().max() < 2e-3


@doors
@pytest.mark.parametrize("value", [None, -2.0])
def test_what_the_call_says_of_gates_is_what_they_are(value, door, without_memory):
    """None is a choice: no gates."""
    model = DOORS[door](OlmemForCausalLM, without_memory, **NEW, memory_gate_init=value)
    assert model.config.memory_gate_init == value
    gates = {name: weight for name, weight in model.named_parameters() if "memory_gate" in name}
    assert len(gates) == (0 if value is None else 2)
    assert all(torch.equal(gate, torch.full((4,), value)) for gate in gates.values())


@pytest.mark.parametrize("model_class", [OlmemModel, OlmemForSequenceClassification], ids=lambda kind: kind.__name__)
def test_every_class_gates_a_memory_that_its_weights_lack(model_class, without_memory):
    for door in ("from_pretrained", "edited file"):
        model = DOORS[door](model_class, without_memory, **NEW)
        assert model.get_decoder().layers[0].self_attn.memory_gate is not None


@pytest.mark.parametrize("model_type", ["olmo", "olmo2", "olmo3"])
def test_from_olmo_gates_the_memory_that_it_adds(model_type, tmp_path):
    config = AutoConfig.for_model(model_type, **LARGE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = OlmemForCausalLM.from_olmo(tmp_path, **NEW)
    assert torch.equal(model.model.layers[0].self_attn.memory_gate.logits, torch.full((4,), -10.0))
    assert OlmemForCausalLM.from_olmo(tmp_path).config.memory_gate_init is None
    for value in (None, -1.5):
        model = OlmemForCausalLM.from_olmo(tmp_path, **NEW, memory_gate_init=value)
        assert model.config.memory_gate_init == value
        assert (model.model.layers[0].self_attn.memory_gate is not None) == (value is not None)


def test_a_model_made_from_scratch_has_no_gates_unless_asked():
    assert OlmemForCausalLM(tiny(**NEW).config).model.layers[0].self_attn.memory_gate is None
    gated = OlmemForCausalLM(tiny(**NEW, memory_gate_init=0).config)
    assert gated.model.layers[0].self_attn.memory_gate is not None


@doors
def test_a_memory_without_gates_that_was_saved_loads_without_gates(door, tmp_path):
    """Weights with memory are what they are."""
    model = tiny(layer_types=SLIDING, **NEW)
    model.save_pretrained(tmp_path)
    found = DOORS[door](OlmemForCausalLM, tmp_path, **NEW)
    assert found.config.memory_gate_init is None and found.model.layers[0].self_attn.memory_gate is None
    ids = tokens(1, 20)
    assert torch.equal(logits_of(found, ids), logits_of(model, ids))


def test_a_memory_with_gates_that_was_loaded_is_saved_and_loads_with_them(without_memory, tmp_path):
    model = OlmemForCausalLM.from_pretrained(without_memory, **NEW)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["memory_gate_init"] == -10.0 and "chooses_memory_gate" not in written
    again, info = OlmemForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and again.config.memory_gate_init == -10.0
    ids = tokens(1, 20)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_a_configuration_knows_nothing_of_how_it_was_read(without_memory):
    config = OlmemConfig.from_pretrained(without_memory, memory_gate_init=None)
    plain = OlmemConfig.from_pretrained(without_memory)
    assert config.to_dict() == plain.to_dict() and config.to_json_string() == plain.to_json_string()
