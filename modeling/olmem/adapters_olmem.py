# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Tells PEFT which modules of an Olmem model an adapter changes by default."""

import sys

NORMS = {
    "post": ["post_attention_layernorm", "post_feedforward_layernorm", "norm"],
    "pre": ["pre_attention_layernorm", "pre_feedforward_layernorm", "norm"],
    "peri": [f"{place}_{part}_layernorm" for place in ("pre", "post") for part in ("attention", "feedforward")]
    + ["norm"],
    "parallel": ["input_layernorm", "norm"],
}


def name_targets(model_type: str, norm_placement: str) -> None:
    """Names the default targets of a model in PEFT's tables, if PEFT is imported.

    They are those of Llama, whose projections have the same names. Keys join values, because keys are the values too
    with some `shared_projections`. A table in which others have named targets stays as it is.
    """
    for name, table in vars(sys.modules.get("peft.utils.constants", object)).items():
        if not (name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table):
            continue
        targets = [*table["llama"]]
        if "norm" in targets:
            targets = NORMS[norm_placement]
        elif "v_proj" in targets and "k_proj" not in targets:
            targets.append("k_proj")
        if table.get(model_type) in (None, *NORMS.values()):
            table[model_type] = targets


__all__ = ["name_targets"]
