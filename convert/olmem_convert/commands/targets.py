"""What a conversion can make of a checkpoint: an Olmem folder, or one of Transformers' own classes.

A target is made before anything is written, and knows all of what is to be written but the weights' bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Protocol, cast

from olmem import OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import OLMO_BLOCKS
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import CheckpointError, reason
from ..formats import Checkpoint
from ..formats.detect import of_hub, open_checkpoint
from ..formats.memory import switch_on
from ..formats.olmem import CONFIG_ERRORS, as_checkpoint, check_nothing_lost, config_of, read_olmem
from ..formats.planning import check_made, choose_dtype, make_config, make_tensors
from ..options import ConvertOptions, Say
from ..proof.verification import verify_checkpoint, verify_exported
from ..publish.model_card import write_card
from ..reading.installed import write_code
from ..writing.shards import WeightFiles
from .next_steps import to_describe


class Target(Protocol):
    """What the one writer of folders asks of a target.

    Attributes:
        checkpoint: what is converted.
        config: the config that is written.
        files: the weights that are written, still unread, and the files that they go to.
        added: the names of those that the checkpoint does not have.
        format: what is written, or what it was made from, in words.
        memory: the fields of a memory that was switched on, if any.
    """

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def files(self) -> WeightFiles: ...
    @property
    def added(self) -> Sequence[str]: ...
    @property
    def format(self) -> str: ...
    @property
    def memory(self) -> Mapping[str, Any]: ...

    def save(self, folder: Path) -> None:
        """Writes the config, and the code if the model has some of its own."""
        ...

    def verify(self, folder: Path, say: Say) -> dict[str, Any]:
        """Proves that the folder computes what the checkpoint does, and writes verification.json."""
        ...

    def describe(self, folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None) -> None:
        """Writes the card, if it has one. kept: what an earlier card said. known: the sha256 of files by name."""
        ...

    def next_step(self, source: Path, out: Path) -> str:
        """What to do with the folder `out`, made of `source`."""
        ...


def target_of(source: Path, options: ConvertOptions) -> Target:
    """Opens the checkpoint, and plans what becomes of it."""
    return ToOlmem.of(source, options) if options.to is None else ToTransformers.of(source, options, options.to)


@dataclass(frozen=True)
class ToOlmem:
    """An Olmem folder, of a checkpoint in any of the formats that convert."""

    options: ConvertOptions
    checkpoint: Checkpoint
    config: OlmemConfig
    files: WeightFiles
    added: Sequence[str]
    memory: Mapping[str, Any]

    @classmethod
    def of(cls, source: Path, options: ConvertOptions) -> "ToOlmem":
        """Opens the checkpoint, and plans the Olmem model that is made of it."""
        checkpoint = open_checkpoint(source, options.max_length, options)
        stored = choose_dtype(checkpoint.tensors, options.dtype)
        config = make_config(checkpoint, stored)  # whose errors are the checkpoint's, and not those of a memory
        planned, added, memory = checkpoint, [], {}
        if options.memory:
            planned, added, memory = switch_on(checkpoint, options.memory)
            config = make_config(planned, stored)
        tensors = make_tensors(planned, config)
        check_made(checkpoint, tensors, added, options.allow_growth)
        return cls(options, checkpoint, config, WeightFiles(tensors, stored, options.max_shard_size), added, memory)

    @property
    def format(self) -> str:
        return self.checkpoint.description

    def save(self, folder: Path) -> None:
        self.config.auto_map = OlmemForCausalLM.auto_map()
        write_code(folder)
        self.config.save_pretrained(folder)

    def verify(self, folder: Path, say: Say) -> dict[str, Any]:
        return verify_checkpoint(folder, self.checkpoint, say, self.options.allow_nonfinite)

    def describe(self, folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None) -> None:
        place = of_hub(self.checkpoint.path)
        base = {"base_model": place[0]} if place and "origin" not in kept else {}
        write_card(folder, {**base, **kept}, known)

    def next_step(self, source: Path, out: Path) -> str:
        if not self.options.verify:
            against = f"{quote(str(out))} --against {quote(str(source))}{self.options.arguments}"
            return f"not verified: `olmem verify {against}` does it"
        return to_describe(out)


@dataclass(frozen=True)
class ToTransformers:
    """A folder of a class of Transformers' own, of an Olmem folder that has nothing which the class cannot say."""

    options: ConvertOptions
    checkpoint: Checkpoint
    config: PreTrainedConfig
    files: WeightFiles
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
        check_made(checkpoint, tensors, (), options.allow_growth)
        files = WeightFiles(tensors, config.dtype, options.max_shard_size)
        return cls(options, checkpoint, config, files, model_class, f"Transformers {name}")

    def save(self, folder: Path) -> None:
        try:
            self.config.save_pretrained(folder)
        except CONFIG_ERRORS as error:
            raise CheckpointError(f"the config must be one that Transformers can write: {reason(error)}") from error

    def verify(self, folder: Path, say: Say) -> dict[str, Any]:
        allowed = self.options.allow_nonfinite
        return verify_exported(folder, self.model_class, self.checkpoint, self.files, say, allowed)

    def describe(self, folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None) -> None:
        """Transformers' own classes have no card of Olmem's."""

    def next_step(self, source: Path, out: Path) -> str:
        if not self.options.verify:
            against = f"{quote(str(out))} --against {quote(str(source))}"
            return f"not verified: `olmem verify {against}` does it"
        return f"next: `hf upload REPO_ID {quote(str(out))}` publishes it"
