"""Checkpoints of OLMo-core 1.8 to 3.x (github.com/allenai/OLMo-core): `config.json` and a torch.distributed.checkpoint
folder, `model_and_optim`, or the same files beside the config.

Config fields: `olmo_core_fields`; weights: olmo_core/nn/hf/convert.py.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..options import Given
from ..proof import olmo_core_forward
from ..reading.distributed import read_distributed
from ..reading.fields import typed
from ..reading.plain import require_own
from ..reading.texts import read_json, require_numbers
from . import NO_EFFECT, Checkpoint, Field, Key, carried, check_layers, expand, read_fields, required
from .olmo_core_fields import ACTIVATIONS, BLOCK, MODEL, NORM_PLACEMENTS, NORM_TYPES, SCALING

TAKES_GIVEN: bool = False
# Where an experiment says what length it trained, the first that does.
LENGTHS = ("train_module.max_sequence_length", "dataset.sequence_length", "data_loader.sequence_length")


def weights_folder(folder: Path) -> Path | None:
    """Returns the folder that has the `.metadata` of the weights, if there is one."""
    return next((path for path in (folder / "model_and_optim", folder) if (path / ".metadata").is_file()), None)


def recognise(folder: Path) -> str | None:
    """Says that it is a checkpoint of OLMo-core, if it is one."""
    return "OLMo-core" if (folder / "config.json").is_file() and weights_folder(folder) else None


def open_checkpoint(folder: Path, max_length: int | None, given: Given) -> Checkpoint:
    """Opens the checkpoint of the folder: its config in either schema, and its sharded tensors."""
    experiment = read_json(folder / "config.json")
    native = experiment.get("model")
    if not isinstance(native, dict):
        raise CheckpointError(
            f"`model` of {folder / 'config.json'} must be an object (got {native!r}); copy the config of the run."
        )
    weights = weights_folder(folder)
    assert weights is not None  # `recognise` found it
    require_numbers(native, "config.json", "model")
    tensors = read_distributed(weights if weights == folder else require_own(weights))
    num_layers = required(native.get("n_layers"), "n_layers", "`model` of config.json")
    check_layers(typed(num_layers, int, "n_layers", "`model` of config.json"), tensors)
    config, keys = olmem_config(native)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        token = lookup(experiment, f"dataset.tokenizer.{name}")
        if token is not None:
            config[name] = token
    lengths = (max_length, *(lookup(experiment, path) for path in LENGTHS))
    config["max_position_embeddings"] = next((length for length in lengths if length is not None), None)
    if config["max_position_embeddings"] is None:
        raise CheckpointError(
            f"`{LENGTHS[0]}` of config.json must say what length was trained (it is absent, and so is `{LENGTHS[1]}`); "
            "give it with --max-length."
        )
    version = ""
    if (folder / ".metadata.json").is_file():
        said = str(read_json(folder / ".metadata.json").get("version", ""))
        version = f" {said}" if re.fullmatch(r"[\w.+-]{1,40}", said, re.ASCII) else ""
    return Checkpoint(
        description=f"OLMo-core{version}",
        path=folder,
        native_config=native,
        olmem_config=config,
        tensors=tensors,
        keys=expand(keys, config["num_hidden_layers"]),
        tokenizer_size=lookup(experiment, "dataset.tokenizer.vocab_size") or config["vocab_size"],
        forward=partial(olmo_core_forward.forward, native),
    )


def lookup(experiment: Mapping[str, Any], path: str) -> int | None:
    """A number at a path of the experiment's config, outside the model's."""
    value: Any = experiment
    for name in path.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"`{path}` of config.json must be in an object (got {value!r}); correct it.")
        value = value.get(name)
    return typed(value, int, path, "config.json")


def flatten(value: Mapping[str, Any], table: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """Nested fields by path; Python class names dropped; an object that is itself a field of the table stays whole."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        path = prefix + name
        if name == "_CLASS_":
            continue
        if item is None and path not in table and any(field.startswith(f"{path}.") for field in table):
            continue  # the same as absent
        if isinstance(item, Mapping) and path not in table:
            flat |= flatten(item, table, f"{path}.")
        else:
            flat[path] = item
    return flat


def read_block(block: Any, where: str) -> dict[str, Any]:
    """Reads the config of a block, in either schema."""
    if not isinstance(block, Mapping):
        raise CheckpointError(f"`{where}` of config.json must be an object (got {block!r}); correct it.")
    block = dict(block)
    if "attention" in block:  # the name of the field up to 2.x
        if "sequence_mixer" in block:
            raise CheckpointError(f"`{where}` must hold `attention` or `sequence_mixer`, not both; remove one of them.")
        block["sequence_mixer"] = block.pop("attention")
    for part in ("sequence_mixer", "layer_norm", "feed_forward"):
        if not isinstance(block.get(part), Mapping):
            raise CheckpointError(
                f"`{part}` of `{where}` must be an object (got {block.get(part)!r}); Olmem has no block without it."
            )
    read = read_fields(flatten(block, BLOCK), BLOCK, f"`{where}` of config.json")
    read["has_qk_norm"] = block["sequence_mixer"].get("qk_norm") is not None
    read["has_rope"] = block["sequence_mixer"].get("rope") is not None
    return read


def olmem_config(native: Mapping[str, Any]) -> tuple[dict[str, Any], list[Key]]:
    """OlmemConfig fields and the key table of a native `model` object."""
    values = {name: value for name, value in native.items() if name not in ("block", "block_overrides")}
    model = read_fields(flatten(values, MODEL), MODEL, "`model` of config.json")
    for name in ("d_model", "n_layers", "vocab_size"):
        required(model[name], name, "`model` of config.json")
    num_layers = model["n_layers"]
    overrides = native.get("block_overrides") or {}
    if num_layers < 1 or not isinstance(overrides, Mapping):
        raise CheckpointError(
            f"`n_layers` must be positive and `block_overrides` an object (got {num_layers} and {overrides!r}); "
            "correct the one that is not."
        )
    strays = set(overrides) - {str(layer) for layer in range(num_layers)}
    if strays:
        raise CheckpointError(f"`block_overrides` must name layers 0 to {num_layers - 1} (got {sorted(strays)}).")
    base = read_block(native.get("block"), "block")
    required(base["feed_forward.hidden_size"], "feed_forward.hidden_size", "`block` of config.json")
    blocks = [
        read_block(overrides[str(layer)], f"block_overrides.{layer}") if str(layer) in overrides else base
        for layer in range(num_layers)
    ]
    require_uniform(blocks)
    block = blocks[0]
    layer_types, window = read_windows(blocks)
    positions = read_positions(blocks, layer_types)
    norm_type, eps = read_norms(model, block)
    config = carried(model, MODEL) | carried(block, BLOCK)
    config |= {
        "norm_placement": NORM_PLACEMENTS[block["name"]],
        "norm_type": norm_type,
        "rms_norm_eps": eps,
        "hidden_act": ACTIVATIONS[block["feed_forward.activation"]],
        "qk_norm": "none"
        if not block["has_qk_norm"]
        else "head"
        if block["sequence_mixer.use_head_qk_norm"]
        else "full",
        "layer_types": layer_types,
        "position_embedding": positions if len(set(positions)) > 1 else positions[0],
        "rope_parameters": read_rope(config, blocks, layer_types, positions),
    }
    if window is not None:
        config["sliding_window"] = window
    return config, key_table(config, model, block)


def require_uniform(blocks: list[dict[str, Any]]) -> None:
    """Layers may differ in their window and their RoPE, and in nothing else."""
    for layer, block in enumerate(blocks):
        for name, value in block.items():
            per_layer = name.startswith(("has_rope", "sequence_mixer.rope.", "sequence_mixer.sliding_window."))
            if value != blocks[0][name] and not per_layer and BLOCK.get(name) is not NO_EFFECT:
                raise CheckpointError(
                    f"`{name}` must be one value for all layers (got {value!r} in layer {layer}, {blocks[0][name]!r} "
                    "in layer 0); Olmem's layers differ in window and RoPE only."
                )


def read_windows(blocks: list[dict[str, Any]]) -> tuple[list[str], int | None]:
    """Layer types and the one window, by SlidingWindowAttentionConfig's rule: a pattern repeats, counted from the
    second layer when the first is forced full. A window of W sees W keys, the query's own included."""
    windows = []
    for layer, block in enumerate(blocks):
        pattern = block["sequence_mixer.sliding_window.pattern"]
        first = block["sequence_mixer.sliding_window.force_full_attention_on_first_layer"]
        last = block["sequence_mixer.sliding_window.force_full_attention_on_last_layer"]
        if pattern is None or (first and layer == 0) or (last and layer == len(blocks) - 1):
            windows.append(-1)
        elif not isinstance(pattern, list) or not pattern or not all(isinstance(w, int) for w in pattern):
            raise CheckpointError(
                f"`sliding_window.pattern` must be a list of windows, -1 for none (got {pattern!r}); correct it."
            )
        else:
            windows.append(pattern[(layer - 1 if first else layer) % len(pattern)])
    sizes = sorted({window for window in windows if window != -1})
    if len(sizes) > 1 or any(size < 1 for size in sizes):
        raise CheckpointError(
            f"`sliding_window.pattern` must use one window, at least 1, or -1 (got {sizes}); Olmem's sliding layers "
            "share one `sliding_window`."
        )
    layer_types = ["full_attention" if window == -1 else "sliding_attention" for window in windows]
    return layer_types, sizes[0] if sizes else None


def read_norms(model: Mapping[str, Any], block: Mapping[str, Any]) -> tuple[str, float]:
    """The one norm type and epsilon of a model, `layer_plain` when none has weights."""
    norms = [(block, "layer_norm"), (model, "lm_head.layer_norm")]
    if block["has_qk_norm"]:
        norms.append((block, "sequence_mixer.qk_norm"))
    types = {f"{path}.name": NORM_TYPES[read[f"{path}.name"]] for read, path in norms}
    if len(set(types.values())) > 1:
        raise CheckpointError(f"`layer_norm.name` must be one for all norms (got {types}); Olmem has one norm type.")
    epsilons = {f"{path}.eps": read[f"{path}.eps"] for read, path in norms}
    if len(set(epsilons.values())) > 1:
        raise CheckpointError(f"`layer_norm.eps` must be one for all norms (got {epsilons}); Olmem has one epsilon.")
    norm_type, eps = types["layer_norm.name"], epsilons["layer_norm.eps"]
    for read, path in norms:
        if norm_type == "rms" and read[f"{path}.bias"] and read[f"{path}.elementwise_affine"]:
            raise CheckpointError(
                f"`{path}.bias` of config.json must be False with RMSNorm (got True, or absent, which native code "
                "reads as True); Olmem's RMSNorm has no bias."
            )
    if norm_type == "layer" and not any(read[f"{path}.elementwise_affine"] for read, path in norms):
        norm_type = "layer_plain"
    return norm_type, eps


def read_positions(blocks: list[dict[str, Any]], layer_types: list[str]) -> list[str]:
    """A block without `rope` has no positions, nor has one without a window whose `rope` is not for such."""
    return [
        "none"
        if not block["has_rope"] or (block["sequence_mixer.rope.no_global_rope"] and layer_type == "full_attention")
        else "rope"
        for block, layer_type in zip(blocks, layer_types, strict=True)
    ]


def read_rope(
    config: Mapping[str, Any], blocks: list[dict[str, Any]], layer_types: list[str], positions: list[str]
) -> dict[str, Any]:
    """RoPE by layer type, of the layers that have it."""
    parameters: dict[str, Any] = {}
    head_dim = config.get("head_dim") or config["hidden_size"] // max(config["num_attention_heads"], 1)
    for layer, (block, layer_type) in enumerate(zip(blocks, layer_types, strict=True)):
        if positions[layer] == "none":
            continue
        theta, scaling = block["sequence_mixer.rope.theta"], block["sequence_mixer.rope.scaling"]
        entry = {"rope_type": "default", "rope_theta": float(theta)}
        if scaling is not None:
            entry |= read_scaling(scaling, float(theta), head_dim)
        if parameters.setdefault(layer_type, entry) != entry:
            raise CheckpointError(
                f"`rope` must be one for all {layer_type} layers (got {entry} in layer {layer}, "
                f"{parameters[layer_type]} before it); Olmem's RoPE is chosen by layer type."
            )
    sliding = parameters.get("sliding_attention", {})
    if sliding.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"`rope.scaling` must be on full-attention layers only (got {sliding} on sliding ones); Olmem scales no "
            "window."
        )
    return parameters


def read_scaling(scaling: Any, theta: float, head_dim: int) -> dict[str, Any]:
    """OLMo-core's RoPE scalings in Transformers' terms (olmo_core/nn/rope.py)."""
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"`rope.scaling` must be an object (got {scaling!r}); correct it.")
    form = next((form for form in SCALING if form in scaling), None)
    if form is None:
        raise CheckpointError(f"`rope.scaling` must be a scaling this version knows (got {dict(scaling)}).")
    read = read_fields(flatten(scaling, SCALING[form]), SCALING[form], "`rope.scaling` of config.json")
    for name, value in read.items():
        if isinstance(value, float | int) and value <= 0 and name != "low_freq_proportion":
            raise CheckpointError(f"`rope.scaling.{name}` must be positive (got {value}); correct it.")
    if form == "new_theta":
        return {"rope_theta": float(read["new_theta"])}
    if form == "factor":
        return {"rope_type": "linear", "factor": read["factor"]}
    shared = {"factor": read["factor"], "original_max_position_embeddings": read["old_context_len"]}
    if form == "beta_fast":
        turns = read["old_context_len"] / (2 * math.pi * read["beta_slow"])
        # OLMo-core stops the ramp at the last frequency; Transformers lets it run on.
        if math.ceil(head_dim * math.log(turns) / (2 * math.log(theta))) > head_dim // 2 - 1:
            raise CheckpointError(
                f"`rope.scaling` must leave its ramp inside the head's {head_dim // 2} frequencies (got "
                f"{dict(scaling)} with theta {theta:g}); beyond it Transformers' YaRN has other angles."
            )
        return shared | {
            "rope_type": "yarn",
            "beta_fast": read["beta_fast"],
            "beta_slow": read["beta_slow"],
            "attention_factor": 0.1 * math.log(read["factor"]) + 1.0,
        }
    low, high = read.get("low_freq_factor"), read.get("high_freq_factor")
    if form == "high_freq_proportion":
        if not 0 <= read["low_freq_proportion"] < 1:
            raise CheckpointError(
                f"`rope.scaling.low_freq_proportion` must be in [0, 1) (got {read['low_freq_proportion']}); correct it."
            )
        low, high = 1.0 / (1.0 - read["low_freq_proportion"]), 1.0 / read["high_freq_proportion"]
    return shared | {"rope_type": "llama3", "low_freq_factor": low, "high_freq_factor": high}


def key_table(config: Mapping[str, Any], model: Mapping[str, Any], block: Mapping[str, Any]) -> list[Key]:
    """Returns the table of the names of weights, which the norms and their places decide."""
    native, olmem = "blocks.{layer}.", "model.layers.{layer}."
    attention, feed_forward = f"{native}attention.", f"{native}feed_forward."
    projections = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}
    table = [
        Key("embeddings.weight", ("model.embed_tokens.weight",)),
        *(
            Key(f"{attention}{name}.weight", (f"{olmem}self_attn.{target}.weight",))
            for name, target in projections.items()
        ),
        Key(f"{feed_forward}w1.weight", (f"{olmem}mlp.gate_proj.weight",)),
        Key(f"{feed_forward}w2.weight", (f"{olmem}mlp.down_proj.weight",)),
        Key(f"{feed_forward}w3.weight", (f"{olmem}mlp.up_proj.weight",)),
    ]
    if config["attention_bias"]:
        table += [
            Key(f"{attention}{name}.bias", (f"{olmem}self_attn.{target}.bias",)) for name, target in projections.items()
        ]
    if config["tie_word_embeddings"]:
        table.append(Key("lm_head.w_out.weight", (), same_as="embeddings.weight"))
    else:
        table.append(Key("lm_head.w_out.weight", ("lm_head.weight",)))

    place = "post" if config["norm_placement"] == "post" else "pre"
    norms = [
        ("lm_head.norm", "model.norm", model, "lm_head.layer_norm"),
        (f"{native}attention_norm", f"{olmem}{place}_attention_layernorm", block, "layer_norm"),
        (f"{native}feed_forward_norm", f"{olmem}{place}_feedforward_layernorm", block, "layer_norm"),
    ]
    if config["norm_placement"] == "peri":
        norms += [
            (f"{native}post_attention_norm", f"{olmem}post_attention_layernorm", block, "layer_norm"),
            (f"{native}post_feed_forward_norm", f"{olmem}post_feedforward_layernorm", block, "layer_norm"),
        ]
    if config["qk_norm"] != "none":
        norms += [
            (f"{attention}{name}", f"{olmem}self_attn.{name}", block, "sequence_mixer.qk_norm")
            for name in ("q_norm", "k_norm")
        ]
    for source, target, read, path in norms:
        weighted = read[f"{path}.elementwise_affine"]
        if config["norm_type"] != "layer_plain":
            table.append(Key(f"{source}.weight" if weighted else None, (f"{target}.weight",)))
        if config["norm_type"] == "layer":
            biased = weighted and read[f"{path}.bias"]
            table.append(Key(f"{source}.bias" if biased else None, (f"{target}.bias",), fill=0.0))
    return table
