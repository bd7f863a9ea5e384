"""Ways in which a converted folder can be wrong although it loads: what verification is there to catch.

A mutation changes `config` and `tensors` of a converted folder in place, and returns False where it changes nothing.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convert.checkpoints import load_weights, read_config, save_weights

Config, Tensors = dict[str, Any], dict[str, torch.Tensor]
Mutation = Callable[[Config, Tensors], bool | None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def mutate(out: Path, name: str) -> bool:
    """Applies a mutation to the folder `out`; False when it does not apply to this model."""
    config, tensors = read_config(out), load_weights(out)
    before = copy.deepcopy((config, tensors))
    applied = MUTATIONS[name](config, tensors) is not False
    same = config == before[0] and all(torch.equal(tensors[key], value) for key, value in before[1].items())
    if not applied or same:
        return False
    (out / "config.json").write_text(json.dumps(config))
    save_weights(out, tensors)
    return True


def swap(tensors: Tensors, one: str, other: str) -> bool:
    """Swaps the tensors of two names, in every layer; False where there are none or their shapes differ."""
    names = [name for name in tensors if f".{one}." in name]
    for name in names:
        twin = name.replace(f".{one}.", f".{other}.")
        if twin not in tensors or tensors[twin].shape != tensors[name].shape:
            return False
        tensors[name], tensors[twin] = tensors[twin], tensors[name]
    return bool(names)


@mutation
def gate_and_up_swapped(config, tensors):
    return swap(tensors, "gate_proj", "up_proj")


@mutation
def query_and_key_norm_swapped(config, tensors):
    return swap(tensors, "q_norm", "k_norm")


@mutation
def query_and_key_swapped(config, tensors):
    return swap(tensors, "q_proj", "k_proj")


@mutation
def attention_and_feedforward_norm_swapped(config, tensors):
    place = "pre" if config["norm_placement"] == "pre" else "post"
    return swap(tensors, f"{place}_attention_layernorm", f"{place}_feedforward_layernorm")


@mutation
def rope_interleaved(config, tensors):
    """Rows of queries and keys, with their norms, as a model has them whose RoPE turns neighbours."""
    for name in tensors:
        if re.search(r"\.(q_proj|k_proj|q_norm|k_norm)\.", name):
            heads = tensors[name].reshape(-1, config["head_dim"] // 2, 2, *tensors[name].shape[1:])
            tensors[name] = heads.transpose(1, 2).reshape(tensors[name].shape)


def each_rope(config: Config):
    return config["rope_parameters"].values()


@mutation
def theta_of_another_generation(config, tensors):
    for rope in each_rope(config):
        rope["rope_theta"] = 10000.0 if rope["rope_theta"] != 10000.0 else 500000.0


@mutation
def theta_off_by_a_hundredth(config, tensors):
    for rope in each_rope(config):
        rope["rope_theta"] *= 1.01


@mutation
def epsilon_of_another_generation(config, tensors):
    config["rms_norm_eps"] = 1e-6 if config["rms_norm_eps"] == 1e-5 else 1e-5


@mutation
def window_one_longer(config, tensors):
    config["sliding_window"] += 1
    return "sliding_attention" in config["layer_types"]


@mutation
def window_one_shorter(config, tensors):
    config["sliding_window"] -= 1
    return "sliding_attention" in config["layer_types"]


@mutation
def chunk_one_longer(config, tensors):
    config["attention_chunk_size"] += 1


@mutation
def chunk_one_shorter(config, tensors):
    config["attention_chunk_size"] -= 1


@mutation
def chunks_that_see_the_one_before(config, tensors):
    config["attention_chunk_lookback"] = 1


@mutation
def stored_frequencies_dropped(config, tensors):
    """Those of the theta instead, which a checkpoint in bfloat16 has rounded."""
    return any(rope.pop("inverse_frequencies", False) for rope in each_rope(config))


@mutation
def positions_everywhere(config, tensors):
    config["position_embedding"] = "rope"


@mutation
def positions_rotated(config, tensors):
    given = config["position_embedding"]
    config["position_embedding"] = given[1:] + given[:1]
    return isinstance(given, list)


@mutation
def positions_dropped(config, tensors):
    config["position_embedding"] = "none"


@mutation
def layer_types_rotated(config, tensors):
    config["layer_types"] = config["layer_types"][1:] + config["layer_types"][:1]


@mutation
def rope_scaling_dropped(config, tensors):
    for layer_type, rope in config["rope_parameters"].items():
        config["rope_parameters"][layer_type] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}


@mutation
def yarn_attention_factor_dropped(config, tensors):
    ropes = [rope for rope in each_rope(config) if rope["rope_type"] == "yarn"]
    for rope in ropes:
        rope["attention_factor"] = 1.0
    return bool(ropes)


@mutation
def one_tensor_scaled(config, tensors):
    """A tensor that no norm follows at once: one that it does may grow as it likes, and the logits stay."""
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1.01


@mutation
def normalised_tensor_scaled(config, tensors):
    """The block's last projection, which a norm follows in OLMo 2: the logits hardly move, the file is wrong."""
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.01


@mutation
def one_norm_scaled(config, tensors):
    norms = [name for name in tensors if "norm" in name and name.endswith(".weight")]
    if not norms:
        return False
    tensors[norms[0]] *= 1.01


@mutation
def one_value_changed(config, tensors):
    """The largest weight of one value projection grows by a hundredth."""
    values = tensors["model.layers.1.self_attn.v_proj.weight"].view(-1)
    values[values.abs().argmax()] *= 1.01


@mutation
def one_late_value_changed(config, tensors):
    """The same in the last block's output."""
    values = tensors[f"model.layers.{config['num_hidden_layers'] - 1}.mlp.down_proj.weight"].view(-1)
    values[values.abs().argmax()] *= 1.01


@mutation
def embedding_row_changed(config, tensors):
    """The row of the last token of the table, which a prompt need not hold."""
    tensors["model.embed_tokens.weight"][-1] *= 1.01


@mutation
def embedding_rows_rotated(config, tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


@mutation
def tied_flag_flipped(config, tensors):
    config["tie_word_embeddings"] = not config["tie_word_embeddings"]


@mutation
def clip_dropped(config, tensors):
    config["clip_qkv"] = None


@mutation
def clip_after_rope(config, tensors):
    config["clip_qkv_stage"] = "rotary"
    return config["clip_qkv"] is not None


@mutation
def logits_scaling_dropped(config, tensors):
    config["logits_scaling"] = 1.0


@mutation
def activation_of_another_kind(config, tensors):
    config["hidden_act"] = {"silu": "gelu", "gelu_pytorch_tanh": "gelu", "elephant": "silu"}[config["hidden_act"]]


@mutation
def layers_swapped(config, tensors):
    return swap(tensors, "layers.0", "layers.1")


@mutation
def heads_rotated(config, tensors):
    """Query heads in another order than output heads."""
    for name in tensors:
        if ".q_proj." in name or (".q_norm." in name and config["qk_norm"] == "full"):
            tensors[name] = tensors[name].roll(config["head_dim"], 0)
    return config["num_attention_heads"] > 1
