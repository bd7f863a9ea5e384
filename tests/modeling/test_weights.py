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
from olmem import OlmemForCausalLM, OlmemForSequenceClassification, OlmemModel
from olmem.weights_olmem import OLD_NAMES, new_name
from safetensors.torch import load_file, save_file

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
