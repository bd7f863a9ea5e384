# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""How weights come into a model: `from_pretrained` and `load_state_dict` also read the parameter names of version 0.1.

In 0.1 the parameters of memory and of gates were no modules of their own. Their values fit, but a memory itself does
not: version 0.1 wrote it without a norm, so what it has learnt to read is of another size.
"""

import re
import warnings
from typing import Any

from transformers.modeling_utils import PreTrainedModel

# Ends of the names of version 0.1, as regular expressions, and what takes their place.
OLD_NAMES = {
    r"memory_embeddings$": "memory.embeddings",
    r"self_attn\.memory_gate$": "self_attn.memory_gate.logits",
    r"self_attn\.retrieval_gate$": "self_attn.retrieval_gate.logits",
}
OLD_MEMORY = next(iter(OLD_NAMES))


def new_name(name: str) -> str:
    """Returns the name that a parameter of version 0.1 has today, which may be the same."""
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def warn_of_old_memory(stacklevel: int) -> None:
    warnings.warn(
        "These weights hold a memory of olmem 0.1, which was written without a norm; it must be trained again, as "
        "`model.memory.norm` is new and what its gates and embeddings have learnt is of another size.",
        stacklevel=stacklevel + 1,
    )


def read_old_names(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the parameters of version 0.1 in a state dict before `module`, an `OlmemModel`, loads it.

    It is a hook for `register_load_state_dict_pre_hook`. The norm of memory, which version 0.1 did not have, is left
    as it is.
    """
    old_names = [name for name in state_dict if name.startswith(prefix) and new_name(name) != name]
    had_memory = any(re.search(OLD_MEMORY, name) for name in old_names)
    for name in old_names:
        state_dict[new_name(name)] = state_dict.pop(name)
    if had_memory:
        if "memory" in module._modules:
            for name, value in module.memory.norm.state_dict().items():
                state_dict.setdefault(f"{prefix}memory.norm.{name}", value)
        warn_of_old_memory(stacklevel=5)


class ReadsOldNames(PreTrainedModel):
    """A model of Transformers whose `from_pretrained` also reads weights that version 0.1 has saved."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs
    ) -> Any:
        """Loads weights as `PreTrainedModel.from_pretrained` does; parameters may have their names of version 0.1.

        What is saved again has today's names.
        """
        kwargs["key_mapping"] = OLD_NAMES | (kwargs.get("key_mapping") or {})
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, loading_info = loaded
        used = [conversion.source_patterns[0] for conversion in model._weight_conversions]
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions if conversion.source_patterns[0] not in OLD_NAMES
        ]
        if OLD_MEMORY in used:
            warn_of_old_memory(stacklevel=2)
        return (model, loading_info) if output_loading_info else model


__all__ = ["OLD_NAMES", "ReadsOldNames", "new_name", "read_old_names"]
