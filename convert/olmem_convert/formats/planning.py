"""What a native checkpoint becomes: the configuration and, still unread, the tensors of its Olmem model."""

import torch
from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig, OlmemForCausalLM
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, reason
from ..reading.fields import TOKEN_IDS, require_meaning, tokens_of
from ..reading.tensors import LazyTensor, same_bits
from . import Checkpoint, to_olmem


def make_config(checkpoint: Checkpoint, dtype: torch.dtype) -> OlmemConfig:
    """Returns the config of the Olmem model, once all of its numbers mean something."""
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


def make_tensors(
    checkpoint: Checkpoint, config: PreTrainedConfig, model_class: type[PreTrainedModel] = OlmemForCausalLM
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
