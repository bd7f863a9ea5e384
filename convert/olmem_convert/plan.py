"""What a native checkpoint becomes: the configuration and, still unread, the tensors of its Olmem model."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig, OlmemForCausalLM
from transformers import PreTrainedConfig

from .errors import CheckpointError, reason
from .formats import LARGEST_NUMBER, Checkpoint, to_olmem
from .reading.tensors import LazyTensor, same_bits
from .reading.texts import require_numbers

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_config(checkpoint: Checkpoint, dtype: torch.dtype) -> OlmemConfig:
    try:
        config = OlmemConfig(**checkpoint.olmem_config, dtype=dtype, architectures=["OlmemForCausalLM"])
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's config gives no valid model: {reason(error)}") from error
    require_meaning(config)
    for name in TOKEN_IDS:
        for token in tokens_of(config, name):
            if not 0 <= token < config.vocab_size:
                raise CheckpointError(
                    f"`{name}` of the config must be in the vocabulary of {config.vocab_size} (got {token}); correct "
                    "it."
                )
    return config


# Parts of RoPE beside those that its class knows to be positive, and the least that each may be.
OF_ROPE = {"attention_factor": 0.0, "beta_fast": 0.0, "beta_slow": 0.0, "mscale": -1.0, "mscale_all_dim": -1.0}


LARGEST_FLOAT = torch.finfo(torch.float32).max


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


def make_tensors(
    checkpoint: Checkpoint, config: PreTrainedConfig, model_class: Any = OlmemForCausalLM
) -> dict[str, LazyTensor]:
    """By the name that `save_pretrained` would give each, complete and of the model's shapes."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's config must give a model of a possible size (got: {str(error).splitlines()[0]})."
        ) from error
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    return to_olmem(checkpoint.keys, checkpoint.tensors, shapes)


def check_copies(checkpoint: Checkpoint) -> None:
    """A tied checkpoint may store its head all the same; it must then be the embedding, bit for bit."""
    for key in checkpoint.keys:
        if key.native and key.same_as:
            copy, original = checkpoint.tensors[key.native], checkpoint.tensors[key.same_as]
            if (copy.shape, copy.dtype) != (original.shape, original.dtype) or not same_bits(copy, original):
                raise CheckpointError(
                    f"`{key.native}` must equal `{key.same_as}`, to which the config ties it (it differs); config and "
                    "weights are of two checkpoints."
                )
