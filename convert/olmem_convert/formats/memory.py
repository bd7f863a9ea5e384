"""Memory that a converted checkpoint gains beside what it was trained with: fields of the config, new parameters.

With all of it off the model is the checkpoint's, and that is what verification compares.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig
from olmem.rules_olmem import MEMORY_FIELDS, with_memory_gates

from ..errors import CheckpointError, reason, shortened
from ..reading.fields import LARGEST_NUMBER
from . import Checkpoint, Key

# The parameters of a new norm of each `norm_type`.
NORMS: dict[str, list[tuple[str, float]]] = {
    "rms": [("weight", 1.0)],
    "layer": [("weight", 1.0), ("bias", 0.0)],
    "layer_plain": [],
}
OFF: dict[str, Any] = {"num_memory_tokens": 0, "retrieval_layers": []}
KINDS: dict[str, Any] = {field.name: field.type for field in fields(OlmemConfig) if field.name in MEMORY_FIELDS}


def with_memory(checkpoint: Checkpoint, memory: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with these of MEMORY_FIELDS, and with rows in its key table for the parameters that they add.

    Gates start where `retrieval_gate_init` and `memory_gate_init` say, the latter at −10 unless it is given. Memory
    tokens start as they do in a new model, drawn with `initializer_range`: at zero the gradients of norms explode. So
    does their norm, at ones.
    """
    if not memory:
        return checkpoint
    memory = with_memory_gates(checkpoint.olmem_config, memory)
    for name, value in memory.items():
        check_field(name, value)
    try:
        config = OlmemConfig(**checkpoint.olmem_config | dict(memory))
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(reason(error)) from error
    if not config.has_memory:
        unused = [name for name in memory if name not in OFF]
        if not unused:
            return checkpoint
        raise CheckpointError(
            f"`{unused[0]}` must go with a memory that is on (got {memory[unused[0]]!r} without one); set "
            "num_memory_tokens or retrieval_layers too."
        )
    gates = [f"model.layers.{layer}.self_attn.retrieval_gate.logits" for layer in config.retrieval_layers]
    added = [Key(None, (name,), fill=float(config.retrieval_gate_init)) for name in gates]
    if config.selects:
        scores = [f"model.layers.{layer}.self_attn.retrieval_score.weight" for layer in config.retrieval_layers]
        added += [Key(None, (name,), fill=0.0) for name in scores]
    if config.num_memory_tokens:
        added.append(Key(None, ("model.memory.embeddings",), fill=0.0, spread=config.initializer_range))
        added += [Key(None, (f"model.memory.norm.{name}",), fill=value) for name, value in NORMS[config.norm_type]]
    if config.num_memory_tokens and config.memory_gate_init is not None:
        gates = [f"model.layers.{layer}.self_attn.memory_gate.logits" for layer in range(config.num_hidden_layers)]
        added += [Key(None, (name,), fill=float(config.memory_gate_init)) for name in gates]
    made = memory_of(config)
    made |= {name: float(made[name]) for name in ("retrieval_gate_init", "memory_gate_init") if made[name] is not None}
    return replace(checkpoint, olmem_config=checkpoint.olmem_config | made, keys=[*checkpoint.keys, *added])


def switch_on(checkpoint: Checkpoint, memory: Mapping[str, Any]) -> tuple[Checkpoint, list[str], dict[str, Any]]:
    """The checkpoint with a memory, the names of the parameters that it adds, and the fields that it changes.

    A field that was given of one memory where only the other is on is an error.
    """
    planned = with_memory(checkpoint, memory)
    try:
        OlmemConfig(**planned.olmem_config).refuse_without_effect(memory)
    except ValueError as error:
        raise CheckpointError(reason(error)) from error
    return planned, new_parameters(planned, checkpoint), switched(planned, checkpoint)


def new_parameters(checkpoint: Checkpoint, native: Checkpoint) -> list[str]:
    """The names that `with_memory` has added."""
    return [target for key in checkpoint.keys[len(native.keys) :] for target in key.targets]


def memory_of(config: OlmemConfig) -> dict[str, Any]:
    """The fields of a memory that is on, as `with_memory` takes them."""
    return {name: getattr(config, name) for name in MEMORY_FIELDS} if config.has_memory else {}


def switched(checkpoint: Checkpoint, native: Checkpoint) -> dict[str, Any]:
    """Those of the fields that are not the native checkpoint's."""
    before = OlmemConfig(**native.olmem_config)
    given = {name: checkpoint.olmem_config[name] for name in MEMORY_FIELDS if name in checkpoint.olmem_config}
    return {name: value for name, value in given.items() if value != getattr(before, name)}


def listed(values: Mapping[str, Any]) -> str:
    """Writes fields and their values out, as a line of text."""
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def check_field(name: str, value: Any) -> None:
    """Before OlmemConfig's rules: one of MEMORY_FIELDS, of its type, in numbers that are exact."""
    if name not in MEMORY_FIELDS:
        guesses = get_close_matches(name, MEMORY_FIELDS, n=3)
        hint = f"did you mean {' or '.join(guesses)}?" if guesses else f"choose among {', '.join(MEMORY_FIELDS)}."
        raise CheckpointError(
            f"`{name}` must be a field of memory to be set (got {shortened(value)}), as any other would change what "
            f"the checkpoint computes, which could then not be verified; {hint}"
        )
    numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int | float)]
    if any(abs(number) >= LARGEST_NUMBER for number in numbers):
        raise CheckpointError(f"`{name}` must be below 2**53 (got {shortened(value)}); give a number of a real size.")
    try:
        type_validator(name, value, KINDS[name])
    except TypeError as error:
        raise CheckpointError(
            f"`{name}` must be of type {inspect.formatannotation(KINDS[name])} (got {shortened(value)}); correct it."
        ) from error
