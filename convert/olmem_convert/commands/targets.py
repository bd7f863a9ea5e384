"""What a conversion can make of a checkpoint: an Olmem folder, or one of Transformers' own classes.

A target is made before anything is written, and knows all of what is to be written but the weights' bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Protocol, cast

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import OLMO_BLOCKS
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import CheckpointError, reason
from ..formats import Checkpoint
from ..formats.detect import open_checkpoint
from ..formats.memory import switch_on
from ..formats.olmem import CONFIG_ERRORS, as_checkpoint, check_nothing_lost, config_of, read_olmem
from ..formats.planning import make_config, make_tensors
from ..options import ConvertOptions, Say
from ..proof.verification import verify_checkpoint, verify_exported
from ..publish.model_card import write_card
from ..reading.tensors import LazyTensor
from ..writing.shards import WeightFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Target(Protocol):
    """What the one writer of folders asks of a target.

    Attributes:
        checkpoint: what is converted.
        config: the config that is written.
        tensors: the weights that are written, by name, still unread.
        added: the names of those that the checkpoint does not have.
        dtype: the dtype that they are written in.
        format: what is written, or what it was made from, in words.
        memory: the fields of a memory that was switched on, if any.
    """

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def tensors(self) -> dict[str, LazyTensor]: ...
    @property
    def added(self) -> Sequence[str]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def format(self) -> str: ...
    @property
    def memory(self) -> Mapping[str, Any]: ...

    def save(self, folder: Path) -> None:
        """Writes the config, and the code if the model has some of its own."""
        ...

    def verify(self, folder: Path, files: WeightFiles, say: Say) -> dict[str, Any]:
        """Proves that the folder computes what the checkpoint does, and writes verification.json."""
        ...

    def describe(self, folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None) -> None:
        """Writes the card, if it has one. kept: what an earlier card said. known: the sha256 of files by name."""
        ...

    def how_to_verify(self, source: Path, out: Path) -> str:
        """What to do where verification was left out."""
        ...


def target_of(source: Path, options: ConvertOptions) -> Target:
    """Opens the checkpoint, and plans what becomes of it."""
    return ToOlmem.of(source, options) if options.to is None else ToTransformers.of(source, options, options.to)


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


@dataclass(frozen=True)
class ToOlmem:
    """An Olmem folder, of a checkpoint in any of the formats that convert."""

    options: ConvertOptions
    checkpoint: Checkpoint
    config: OlmemConfig
    tensors: dict[str, LazyTensor]
    added: Sequence[str]
    dtype: torch.dtype
    memory: Mapping[str, Any]

    @classmethod
    def of(cls, source: Path, options: ConvertOptions) -> "ToOlmem":
        """Opens the checkpoint, and plans the Olmem model that is made of it."""
        checkpoint = open_checkpoint(source, options.max_length, options.given)
        stored = choose_dtype(checkpoint.tensors, options.dtype)
        config = make_config(checkpoint, stored)  # whose errors are the checkpoint's, and not those of a memory
        if not options.memory:
            return cls(options, checkpoint, config, make_tensors(checkpoint, config), (), stored, {})
        planned, added, memory = switch_on(checkpoint, options.memory)
        config = make_config(planned, stored)
        return cls(options, checkpoint, config, make_tensors(planned, config), added, stored, memory)

    @property
    def format(self) -> str:
        return self.checkpoint.description

    def save(self, folder: Path) -> None:
        self.config.auto_map = OlmemForCausalLM.auto_map()
        with torch.device("meta"):
            custom_object_save(OlmemForCausalLM(self.config), folder)
        self.config.save_pretrained(folder)

    def verify(self, folder: Path, files: WeightFiles, say: Say) -> dict[str, Any]:
        return verify_checkpoint(folder, self.checkpoint, say, self.options.allow_nonfinite)

    def describe(self, folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None) -> None:
        write_card(folder, kept, known)

    def how_to_verify(self, source: Path, out: Path) -> str:
        against = f"{quote(str(out))} --against {quote(str(source))}{self.options.given.options}"
        return f"`olmem verify {against}` does it"


@dataclass(frozen=True)
class ToTransformers:
    """A folder of a class of Transformers' own, of an Olmem folder that has nothing which the class cannot say."""

    options: ConvertOptions
    checkpoint: Checkpoint
    config: PreTrainedConfig
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    model_class: type[PreTrainedModel]
    format: str
    added: Sequence[str] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path, options: ConvertOptions, name: str) -> "ToTransformers":
        """Opens the Olmem folder, and plans the model of this class of Transformers' that is made of it."""
        if name not in OLMO_BLOCKS:
            raise CheckpointError(f"`to` must be one of {', '.join(OLMO_BLOCKS)} (got {name!r}); choose one.")
        of_olmem, weights = read_olmem(source)
        try:
            check_nothing_lost(of_olmem, name)
            config = config_of(of_olmem, name)
        except CONFIG_ERRORS as error:
            raise CheckpointError(f"the config must be one that Transformers can read: {reason(error)}") from error
        checkpoint = as_checkpoint(source, of_olmem, weights, name)
        config.dtype = choose_dtype(weights, options.dtype)
        model_class = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        config.architectures = [model_class.__name__]
        tensors = make_tensors(checkpoint, config, model_class)
        return cls(options, checkpoint, config, tensors, config.dtype, model_class, f"Transformers {name}")

    def save(self, folder: Path) -> None:
        try:
            self.config.save_pretrained(folder)
        except CONFIG_ERRORS as error:
            raise CheckpointError(f"the config must be one that Transformers can write: {reason(error)}") from error

    def verify(self, folder: Path, files: WeightFiles, say: Say) -> dict[str, Any]:
        allowed = self.options.allow_nonfinite
        return verify_exported(folder, self.model_class, self.checkpoint, files, say, allowed)

    def describe(self, folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None) -> None:
        """Transformers' own classes have no card of Olmem's."""

    def how_to_verify(self, source: Path, out: Path) -> str:
        return "run it again without --no-verify for the proof"
