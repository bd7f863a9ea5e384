"""Rules for single fields of a config, whoever wrote it: of what type and size their values must be."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from olmem import OlmemConfig
from transformers import PreTrainedConfig

from ..errors import CheckpointError
from .texts import require_numbers

LARGEST_NUMBER = 2**53  # of any field: beyond it, a JSON number is no exact integer
LARGEST_NUM_LABELS = 10**5
LARGEST_FLOAT = torch.finfo(torch.float32).max
MOST_LAYERS = 1024  # OLMo's largest model has 64
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def typed(value: Any, kind: type, name: str, where: str) -> Any:
    """The value as an int, a float or a bool, where it must be one; YAML reads `1e-6` as a string."""
    if value is None or kind not in (bool, int, float):
        return value
    if kind is float and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool):
        fits = kind is bool
    else:
        fits = kind is not bool and isinstance(value, int | float) and abs(value) < LARGEST_NUMBER
        fits = fits and (kind is float or float(value).is_integer())
    if fits:
        return kind(value)
    names = {bool: "true or false", int: "an integer", float: "a number"}
    raise CheckpointError(f"`{name}` of {where} must be {names[kind]} (got {value!r}); correct it.")


def check_common(raw: Mapping[str, Any]) -> None:
    """Of the fields that every config of Transformers may have, those with which nothing can be computed: it makes a
    name for each of `num_labels` as it reads them, and its own models fail where their parts return tuples."""
    labels = raw.get("num_labels", 0)
    if not isinstance(labels, int | None) or (labels or 0) > LARGEST_NUM_LABELS:
        raise CheckpointError(
            f"`num_labels` of config.json must be at most {LARGEST_NUM_LABELS} (got {labels!r}); remove it, as a "
            "causal language model has none."
        )
    if raw.get("return_dict", True) is not True:
        raise CheckpointError(
            f"`return_dict` of config.json must be true (got {raw['return_dict']!r}); remove it, and ask for tuples "
            "where you call the model."
        )


# Parts of RoPE beside those that its class knows to be positive, and the least that each may be.
OF_ROPE = {"attention_factor": 0.0, "beta_fast": 0.0, "beta_slow": 0.0, "mscale": -1.0, "mscale_all_dim": -1.0}


def require_meaning(config: OlmemConfig) -> None:
    """What the config's class lets pass: numbers that are none, or of no size that a model has."""
    values = config.to_dict()
    require_numbers(values, "the config")
    for name, value in values.items():
        if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
            raise CheckpointError(f"`{name}` of the config must be below 2**53 (got {value}); correct it.")
        if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
            raise CheckpointError(f"`{name}` of the config must be a number of float32 (got {value}); correct it.")
    if config.initializer_range < 0:
        raise CheckpointError(
            f"`initializer_range` of the config must not be negative (got {config.initializer_range}); correct it."
        )
    for layer_type, entry in config.rope_parameters.items():
        where = f"`rope_parameters[{layer_type!r}]"
        for name, least in OF_ROPE.items():
            value = entry.get(name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and (value > 0 or value == 0 > least)):
                rule = "positive" if least == 0 else "zero or more"
                raise CheckpointError(f"{where}[{name!r}]` must be {rule} (got {value!r}); correct it.")
        if not isinstance(entry.get("truncate"), bool | None):
            raise CheckpointError(
                f"{where}['truncate']` must be true or false (got {entry['truncate']!r}); correct it."
            )


def tokens_of(config: PreTrainedConfig, name: str) -> list[int]:
    """The ids of a field, of which the end of a text may have several."""
    value = getattr(config, name)
    return value if isinstance(value, list) else [] if value is None else [value]
