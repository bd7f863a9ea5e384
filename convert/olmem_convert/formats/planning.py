"""What a native checkpoint becomes: the configuration and, still unread, the tensors of its Olmem model."""

from collections.abc import Collection, Iterable, Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig, OlmemForCausalLM
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, reason
from ..reading.fields import TOKEN_IDS, require_meaning, tokens_of
from ..reading.installed import SIZE_ERRORS, shapes_of
from ..reading.tensors import LazyTensor, files_of, same_bits
from . import Checkpoint, Key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_GROWTH = 2  # a tied head that is stored with its embedding, and written apart, makes less


def choose_dtype(tensors: Mapping[str, LazyTensor], name: str | None) -> torch.dtype:
    """The dtype of this name, or else the one that all tensors have."""
    if name is not None:
        return DTYPES[name]
    found = {tensor.dtype for tensor in tensors.values()}
    if len(found) != 1 or not found <= set(DTYPES.values()):
        raise CheckpointError(
            f"`dtype` must be given for this checkpoint (its weights are {sorted(map(str, found))}); add --dtype."
        )
    return found.pop()


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
        shapes = shapes_of(config, model_class)
    except SIZE_ERRORS as error:
        raise CheckpointError(
            f"the checkpoint's config must give a model of a possible size (got: {str(error).splitlines()[0]})."
        ) from error
    return to_olmem(checkpoint.keys, checkpoint.tensors, shapes)


def to_olmem(
    keys: Iterable[Key], native: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """Target tensors by name, in the order of `shapes`, which says what the target model has.

    Every native tensor must be used, every target made, all shapes equal.
    """
    keys = list(keys)
    complain("lacks", {key.native for key in keys if key.native} - set(native))
    complain("holds, unexpectedly,", set(native) - {key.native for key in keys})
    made: dict[str, LazyTensor] = {}
    dtype = next(iter(native.values())).dtype
    for key in keys:
        if key.native is None:
            for target in key.targets:
                if target in shapes:
                    made[target] = filled(shapes[target], dtype, key.fill, key.spread)
            continue
        tensor = native[key.native]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"`{key.native}` must be floating-point (got {tensor.dtype}); export plain weights.")
        if key.order is not None:
            made |= dict.fromkeys(key.targets, tensor.changed(key.order.to_olmem))
        elif not key.rows:
            made |= dict.fromkeys(key.targets, tensor)
        elif tensor.shape[:1] == (sum(key.rows),):
            start = 0
            for target, size in zip(key.targets, key.rows, strict=True):
                made[target] = tensor.rows(start, start + size)
                start += size
        else:
            raise CheckpointError(
                f"`{key.native}` must have {sum(key.rows)} rows by the config (got shape {tensor.shape}); config and "
                "weights are of two checkpoints."
            )
    complain("does not say how to make", set(shapes) - set(made))
    complain("makes, unexpectedly,", set(made) - set(shapes))
    for key in keys:
        for target in key.targets if key.native else ():
            if made[target].shape != shapes[target]:
                raise CheckpointError(
                    f"`{key.native}` must give {target} of shape {shapes[target]} by the config (got "
                    f"{made[target].shape}); config and weights are of two checkpoints."
                )
    return {name: made[name] for name in shapes}


def to_native(keys: Iterable[Key], olmem: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of the same table: native tensors by name."""
    keys = list(keys)
    native: dict[str, torch.Tensor] = {}
    for key in keys:
        if key.native is None or not key.targets:
            continue
        made = [olmem[target] for target in key.targets]
        native[key.native] = key.order.to_native(made[0]) if key.order else torch.cat(made) if key.rows else made[0]
    dtype = next(iter(olmem.values())).dtype
    for key in keys:
        if key.native and key.same_as:
            native[key.native] = native[key.same_as]
        elif key.native and key.numbers:
            native[key.native] = torch.tensor(key.numbers, dtype=dtype)
    return native


def filled(shape: tuple[int, ...], dtype: torch.dtype, value: float, spread: float) -> LazyTensor:
    """The same numbers, or the same draws, whenever it is loaded."""

    def load() -> torch.Tensor:
        if not spread:
            return torch.full(shape, value, dtype=dtype)
        return torch.empty(shape).normal_(value, spread, generator=torch.Generator().manual_seed(0)).to(dtype)

    return LazyTensor.whole(shape, dtype, load)


def complain(verb: str, names: set[str] | set[str | None]) -> None:
    """Raises CheckpointError if there are such tensors."""
    if names:
        shown = [repr(name)[1:-1][:120] for name in sorted(map(str, names))[:8]]
        listed = ", ".join(shown) + (", …" if len(names) > 8 else "")
        raise CheckpointError(
            f"the checkpoint {verb} {len(names)} tensors: {listed}; config and weights must be of one checkpoint, and "
            "of a block that the config names."
        )


def check_made(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], added: Collection[str], allow_growth: bool
) -> None:
    """Raises CheckpointError if what is made of a checkpoint is not all that it holds, or is far more.

    Tensors can share their numbers, and a file of a megabyte then makes a model of any size.
    """
    check_copies(checkpoint)
    makes = sum(tensor.nbytes for name, tensor in tensors.items() if name not in added)
    holds = sum(file.size for file in files_of(checkpoint.tensors))
    if makes > LARGEST_GROWTH * holds and not allow_growth:
        raise CheckpointError(
            f"the model must be at most {LARGEST_GROWTH} times what its files hold (its weights take {makes:,} bytes, "
            f"the files have {holds:,}), as in them tensors share their numbers, and what is written has each apart; "
            "add --allow-growth if that is meant."
        )


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
