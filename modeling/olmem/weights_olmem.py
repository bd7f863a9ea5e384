# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Loads weights into a model, also under the names of version 0.1, and adds gates to a memory that they do not have.

In version 0.1 the parameters of memory and gates had other names. Their shapes are the same, but a trained memory must
be trained again: version 0.1 wrote memory without a norm, so that memory had another scale.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_olmem import OlmemConfig
from .rules_olmem import MEMORY_GATE, SINK_LOGIT

# The ends of the parameter names of version 0.1, as regular expressions, and the ends that replace them.
OLD_NAMES = {
    r"memory_embeddings$": "memory.embeddings",
    r"self_attn\.memory_gate$": "self_attn.memory_gate.logits",
    r"self_attn\.retrieval_gate$": "self_attn.retrieval_gate.logits",
}
OLD_MEMORY = next(iter(OLD_NAMES))


def new_name(name: str) -> str:
    """Returns today's name of a parameter of version 0.1. Most names have not changed."""
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def warn_of_old_memory(stacklevel: int) -> None:
    """Warns that a memory of version 0.1 must be trained again."""
    warnings.warn(
        "These weights hold a memory of olmem 0.1, which wrote memory without a norm; it must be trained again, "
        "because `model.memory.norm` is new, and gates and embeddings were trained for memory of another scale.",
        stacklevel=stacklevel + 1,
    )


def warn_of_new_gates(stacklevel: int) -> None:
    """Warns that a model got gates which its optimizer may not know."""
    warnings.warn(
        f"These weights hold no memory, so `memory_gate_init` became {MEMORY_GATE}, and each layer got a gate that is "
        "nearly shut. Make the optimizer after loading, or set `memory_gate_init` before the model is made.",
        stacklevel=stacklevel + 1,
    )


def read_old_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the parameters of version 0.1 in a state dict before `module`, an `OlmemModel`, loads it.

    This is a hook for `register_load_state_dict_pre_hook`. The module keeps its norm of memory, which version 0.1 did
    not have.
    """
    old_names = [name for name in state_dict if name.startswith(prefix) and new_name(name) != name]
    had_memory = any(re.search(OLD_MEMORY, name) for name in old_names)
    for name in old_names:
        state_dict[new_name(name)] = state_dict.pop(name)
    if had_memory:
        if "memory" in module._modules:
            norm = module.get_submodule("memory.norm")
            for name, value in norm.state_dict().items():
                state_dict.setdefault(f"{prefix}memory.norm.{name}", value)
        warn_of_old_memory(stacklevel=5)


def lacks_gates(config: OlmemConfig, missing_keys: Iterable[str]) -> bool:
    """Returns whether a model has memory without gates, its weights lack memory, and the caller did not choose that."""
    without = any(name.endswith("memory.embeddings") for name in missing_keys)
    return without and config.memory_gate_init is None and not config.chooses_memory_gate


def refuse_new_sinks(config: OlmemConfig, missing_keys: Iterable[str]) -> None:
    """Raises an error where weights have no learned sinks, and those of the model would change what it computes."""
    if (config.sink_logit_init or 0) > SINK_LOGIT and any(name.endswith(".self_attn.sinks") for name in missing_keys):
        raise ValueError(
            f"`sink_logit_init` must be at most {SINK_LOGIT:.0f} beside weights that have no sinks (got "
            f"{config.sink_logit_init}), because a greater one would change what the weights compute; give "
            f"{SINK_LOGIT:.0f}, which changes next to nothing, and train them."
        )


@runtime_checkable
class TakesMemoryGate(Protocol):
    """A module to whose memory a gate can be added."""

    def add_memory_gate(self, init_logit: float) -> None:
        """Adds a gate that begins at a logit."""
        ...


def gate_new_memory(module: "LoadsWeights", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adds gates to the memory of `module` before it loads weights that have no memory, but all else.

    This is a hook for `register_load_state_dict_pre_hook`. By default `load_state_dict` then raises an error for the
    memory that is missing; with `strict=False` it keeps the new one.
    """
    if module._modules.get("memory") is None:
        return
    missing = [name for name in module.state_dict() if prefix + name not in state_dict]
    is_memory_alone = all(name.startswith("memory.") or name.endswith("_gate.logits") for name in missing)
    if is_memory_alone and lacks_gates(module.config, missing):
        module.config.memory_gate_init = MEMORY_GATE
        for each in [each for each in module.modules() if isinstance(each, TakesMemoryGate)]:
            each.add_memory_gate(MEMORY_GATE)
        warn_of_new_gates(stacklevel=5)


def place_modules(device_map: Any) -> Any:
    """Returns a map of devices that names memory, a gate or an attention, where it names a parameter of theirs.

    Whatever splits modules into their parts makes such maps, but accelerate places modules: a parameter that is named
    alone stays on the meta device. The rest of memory, its norm, goes where the embeddings go.
    """
    if not isinstance(device_map, Mapping):
        return device_map
    renamed = {
        name: re.sub(r"(memory|_gate|self_attn)\.(embeddings|logits|sinks)$", r"\1", name) for name in device_map
    }
    wholes = {new for name, new in renamed.items() if new != name}
    parts = tuple(f"{whole}." for whole in wholes)
    return {new: device_map[name] for name, new in renamed.items() if new in wholes or not name.startswith(parts)}


def refuse_state_without_sinks(module: "LoadsWeights", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raises an error, as `refuse_new_sinks` does, where a state dict has a layer's keys but not its learned sinks.

    This is a hook for `register_load_state_dict_pre_hook`.
    """
    if (module.config.sink_logit_init or 0) <= SINK_LOGIT:
        return
    sinks = [name for name, _ in module.named_parameters() if name.endswith(".self_attn.sinks")]
    keys = {name: prefix + name.removesuffix("sinks") + "k_proj.weight" for name in sinks}
    refuse_new_sinks(
        module.config, [name for name in sinks if prefix + name not in state_dict and keys[name] in state_dict]
    )


class LoadsWeights(PreTrainedModel):
    """Reads weights under old names, and adds gates to a memory that the weights lack."""

    config: OlmemConfig

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs
    ) -> Any:
        """Loads weights as `PreTrainedModel.from_pretrained` does, also under the parameter names of version 0.1.

        A model that is saved again has today's names. If the model has memory and the weights have none, the model gets
        gates that begin at −10, unless `memory_gate_init` is given.
        """
        if "device_map" in kwargs:
            kwargs["device_map"] = place_modules(kwargs["device_map"])
        kwargs["key_mapping"] = OLD_NAMES | (kwargs.get("key_mapping") or {})
        config = kwargs.get("config")
        if (
            isinstance(config, PreTrainedConfig) and "memory_gate_init" in kwargs
        ):  # Transformers takes no fields beside a config
            config = kwargs["config"] = copy.deepcopy(config)
            config.memory_gate_init, config.chooses_memory_gate = kwargs.pop("memory_gate_init"), True

        def load() -> Any:
            return super(LoadsWeights, cls).from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )

        model, loading_info = load()
        refuse_new_sinks(model.config, loading_info["missing_keys"])
        if lacks_gates(model.config, loading_info["missing_keys"]):
            # The configuration has a memory that the weights lack, for instance because it was edited.
            config = copy.deepcopy(config) if isinstance(config, PreTrainedConfig) else None
            del model
            if config is None:
                kwargs["memory_gate_init"] = MEMORY_GATE
            else:
                config.memory_gate_init, kwargs["config"] = MEMORY_GATE, config
            model, loading_info = load()
        used = [conversion.source_patterns[0] for conversion in model._weight_conversions]
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions if conversion.source_patterns[0] not in OLD_NAMES
        ]
        if OLD_MEMORY in used:
            warn_of_old_memory(stacklevel=2)
        return (model, loading_info) if output_loading_info else model


__all__ = [
    "OLD_NAMES",
    "LoadsWeights",
    "gate_new_memory",
    "new_name",
    "read_old_names",
    "refuse_state_without_sinks",
]
