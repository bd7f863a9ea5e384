"""Olmem folders as a source, in the terms of Transformers' own OLMo classes.

What a target's class cannot say is found by going there and back: the config is written in its terms and read again as
an OLMo folder's is, and a field that did not return is an error that names it. So a field that Olmem gains is refused
until its class can carry it.
"""

import copy
import reprlib
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import OLMO_BLOCKS
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from ..errors import CheckpointError
from ..proof.transformers_forward import transformers_forward
from ..reading.fields import typed
from ..reading.olmem_folder import read_config
from ..reading.tensors import LazyTensor
from ..reading.texts import NAMES_CODE, NAMES_KERNELS, read_json
from ..reading.weight_files import read_weights
from . import Checkpoint, check_layers, expand
from .transformers_olmo import key_table

LAYER_TYPES = ("full_attention", "sliding_attention")  # of Olmo3; the others have full attention alone
NOT_OF_THE_MODEL = {"architectures", "dtype", "residual_dropout", "transformers_version"}
NOT_OF_THE_TARGET = {"_name_or_path", "model_type", "olmo_config", "quantization_config", *NAMES_CODE, *NAMES_KERNELS}
MOST_KEPT = 200  # fields of a config that are tried one by one
CONFIG_ERRORS = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_olmem(source: Path) -> tuple[OlmemConfig, dict[str, LazyTensor]]:
    """The config of an Olmem folder and its tensors, still on disk."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise CheckpointError(f"`SRC` must be an Olmem folder ({source} {what}); name the folder that holds it.")
    path = source / "config.json"
    raw = read_json(path) if path.is_file() else {}
    if raw.get("model_type") != "olmem":
        raise CheckpointError(
            f"`SRC` must be an Olmem folder with --to (got `model_type` {raw.get('model_type')!r} in {source}); "
            "convert it to one without --to first."
        )
    if raw.get("architectures") not in (None, ["OlmemForCausalLM"]):
        raise CheckpointError(
            f"`architectures` of config.json must be ['OlmemForCausalLM'] (got {raw['architectures']}); only causal "
            "language models go back."
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            "`quantization_config` of config.json must be absent (the weights are quantized); convert the model that "
            "was quantized."
        )
    if not isinstance(raw.get("olmo_config", {}), dict):
        raise CheckpointError(
            f"`olmo_config` of config.json must be an object (got {raw['olmo_config']!r}); remove it."
        )
    kept = raw.get("olmo_config", {})
    if len(kept) > MOST_KEPT:
        raise CheckpointError(
            f"`olmo_config` of config.json must have at most {MOST_KEPT} fields (got {len(kept)}); remove what no "
            "config of OLMo has."
        )
    weights = read_weights(source)
    num_layers = typed(raw.get("num_hidden_layers", 1), int, "num_hidden_layers", "config.json")
    check_layers(num_layers, weights, "num_hidden_layers")
    config = read_config(source)
    return config, weights


def check_nothing_lost(config: OlmemConfig, target: str) -> None:
    """Raises CheckpointError if the target's class cannot carry a field, and says which class can."""
    lost = losses(config, target)
    if not lost:
        return
    rules = ", ".join(f"`{name}` must be {wanted} (got {reprlib.repr(got)})" for name, (got, wanted) in lost.items())
    fitting = [other for other in OLMO_BLOCKS if not losses(config, other)]
    way_out = f"use --to {' or '.join(fitting)}" if fitting else "no OLMo class can: use the Olmem folder as it is"
    raise CheckpointError(f"{rules} for Transformers' {target} to compute the same; {way_out}.")


def losses(config: OlmemConfig, target: str) -> dict[str, tuple[Any, str]]:
    """The fields that the target's class cannot carry: what they are, and what they would have to be."""
    if config.hidden_act not in ACT2FN:
        return {"hidden_act": (config.hidden_act, "an activation of Transformers")}
    if set(config.layer_types) - set(LAYER_TYPES):
        return {"layer_types": (config.layer_types, f"made of {' and '.join(LAYER_TYPES)}")}
    returned = in_olmems_terms(config_of(config, target))
    unused = set(NOT_OF_THE_MODEL)
    if "sliding_attention" not in config.layer_types:
        unused.add("sliding_window")
    if config.clip_qkv is None:
        unused.add("clip_qkv_stage")
    if returned.layer_types != config.layer_types:  # by which these are
        unused |= {"rope_parameters", "sliding_window"}
    names = [field.name for field in fields(config) if field.name not in unused]
    return {
        name: (getattr(config, name), reprlib.repr(getattr(returned, name)))
        for name in names
        if getattr(config, name) != getattr(returned, name)
    }


def in_olmems_terms(config: PreTrainedConfig) -> OlmemConfig:
    """Reads a config of OLMo as an OLMo folder that is converted has it read."""
    return OlmemConfig(**OlmemConfig.fields_of_olmo(config.to_dict()))


def config_of(config: OlmemConfig, target: str) -> PreTrainedConfig:
    """The config in the terms of the target's class, without what it has no terms for.

    What `olmo_config` keeps of the config that the model once had goes back into it as long as it means the same.
    """
    target_class = CONFIG_MAPPING[target]
    names = {field.name for field in fields(target_class)} - {"transformers_version"}
    own = {field.name for field in fields(config)} | NOT_OF_THE_TARGET
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    values |= {name: value for name, value in config.to_dict().items() if name not in own}
    rope = {
        layer_type: {name: value for name, value in entry.items() if name != "inverse_frequencies"}
        for layer_type, entry in config.rope_parameters.items()
    }
    first = next(iter(rope.values()))
    if "layer_types" in names:
        plain = {"rope_type": "default", "rope_theta": first["rope_theta"]}
        values["rope_parameters"] = {layer_type: rope.get(layer_type, plain) for layer_type in LAYER_TYPES}
    else:
        values["rope_parameters"] = first
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        values["head_dim"] = config.head_dim
    if values.get("sliding_window", 0) is None:
        del values["sliding_window"]  # Olmo3 wants one even where no layer slides

    def made(values: dict[str, Any]) -> PreTrainedConfig:
        return target_class(**copy.deepcopy(values))

    if kept := getattr(config, "olmo_config", {}):
        meaning = in_olmems_terms(made(values))
        for name, value in kept.items():
            trial = values | {name: value}
            if name not in NOT_OF_THE_TARGET and means(made, trial, meaning):
                values = trial
    return made(values)


def means(make: Callable[[dict[str, Any]], PreTrainedConfig], values: dict[str, Any], meaning: OlmemConfig) -> bool:
    """Whether these fields make a config, and it is the same in Olmem's terms."""
    try:
        other = in_olmems_terms(make(values))
    except CONFIG_ERRORS:
        return False
    return all(getattr(other, field.name) == getattr(meaning, field.name) for field in fields(meaning))


def as_checkpoint(source: Path, config: OlmemConfig, tensors: dict[str, LazyTensor], target: str) -> Checkpoint:
    """What is converted, in the terms of the other direction."""
    notes = []
    if config.residual_dropout:
        notes.append(f"residual_dropout {config.residual_dropout} was of training only and is not carried over")
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        notes.append(
            f"head_dim {config.head_dim} is not hidden_size / num_attention_heads, which Transformers computes with "
            "and others may not"
        )
    return Checkpoint(
        description="Olmem",
        path=source,
        native_config=config.to_dict(),
        olmem_config=config.to_dict(),
        tensors=tensors,
        keys=expand(key_table(target, config.to_dict(), tensors), config.num_hidden_layers),
        tokenizer_size=config.vocab_size,
        forward=partial(transformers_forward, OlmemForCausalLM, config),
        of_transformers=True,
        notes=tuple(notes),
    )
