"""What every native format is described by: a table of its config fields and a table of its weight names.

A format is one module: `recognise(folder)` says what it is, or None; `open_checkpoint(folder, …)` reads its config
through the config table and opens its tensors without loading them. Both tables read from native to Olmem; the
inverse of the key table is computed.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError
from ..options import Given
from ..proof.native_forward import Forward
from ..reading.fields import MOST_LAYERS, typed
from ..reading.tensors import LazyTensor


@dataclass(frozen=True)
class PairsToHalves:
    """An order of the rows of a query or key projection, D = `head_dim` for each head: native RoPE turns dimension 2j
    with 2j + 1, Olmem's turns j with j + D/2."""

    head_dim: int

    def to_olmem(self, native: torch.Tensor) -> torch.Tensor:
        """Puts rows that are in native order into the order of Olmem."""
        return native.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).reshape(native.shape)

    def to_native(self, olmem: torch.Tensor) -> torch.Tensor:
        """Puts rows that are in the order of Olmem into native order."""
        return olmem.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).reshape(olmem.shape)


@dataclass(frozen=True)
class Key:
    """One row of a key table. `{layer}` stands for each block's number.

    A native tensor becomes the target of the same values; or, with `order`, of the same rows in that order; or, with
    `rows`, several targets stacked along its first dimension in that order. Without a native name, the target is filled
    with a constant that the native model leaves out, or with draws that `spread` around it. Without a target, the
    native tensor is dropped: it must repeat another one, `same_as`, or its `numbers` are in the config.
    """

    native: str | None
    targets: tuple[str, ...]
    rows: tuple[int, ...] = ()
    fill: float = 1.0
    spread: float = 0.0
    same_as: str | None = None
    order: PairsToHalves | None = None
    numbers: tuple[float, ...] = ()

    def at(self, layer: int) -> "Key":
        """Returns the row with a block's number in place of `{layer}`."""

        def name(text: str | None) -> str | None:
            return None if text is None else text.replace("{layer}", str(layer))

        targets = tuple(target.replace("{layer}", str(layer)) for target in self.targets)
        return replace(self, native=name(self.native), targets=targets, same_as=name(self.same_as))


def check_layers(num_layers: int | None, tensors: Mapping[str, LazyTensor], name: str = "n_layers") -> None:
    """Before anything is made for each layer: no more of them than tensors, nor than any model has."""
    if num_layers is None or not 0 < num_layers <= len(tensors):
        raise CheckpointError(
            f"`{name}` of the config must fit the {len(tensors)} tensors of the checkpoint (got {num_layers}); "
            "config and weights are of two checkpoints."
        )
    if num_layers > MOST_LAYERS:
        raise CheckpointError(f"`{name}` must be at most {MOST_LAYERS} (got {num_layers}); no model has more.")


def expand(table: Iterable[Key], num_layers: int) -> list[Key]:
    """The table with a row for each block, blocks in numeric order."""
    keys = list(table)
    of_blocks = [key for key in keys if "{layer}" in (key.native or "".join(key.targets))]
    of_model = [key for key in keys if key not in of_blocks]
    return of_model + [key.at(layer) for layer in range(num_layers) for key in of_blocks]


@dataclass(frozen=True)
class Field:
    """One row of a config table: the value native code takes when the field is absent, and what becomes of it.

    `to` carries it to that field of OlmemConfig; `only` lists the values Olmem can represent; neither: it is read by
    the format's `olmem_config`, or has no effect on logits. `kind` is the type, that of the default if not given.
    """

    default: Any = None
    to: str | None = None
    only: tuple[Any, ...] | None = None
    kind: type | None = None


NO_EFFECT = Field()


def read_fields(values: Mapping[str, Any], table: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Every field of the table with its value or default; a field the table does not know is an error."""
    for name, value in values.items():
        if name not in table:
            guess = difflib.get_close_matches(name, table, n=1)
            hint = f"did you mean {guess[0]!r}? " if guess else ""
            raise CheckpointError(
                f"`{name}` of {where} must be a field this version knows (got {value!r}); {hint}a field may change the "
                "logits, so none is ignored: use a newer olmem, or remove it if it has no effect."
            )
        field = table[name]
        if field.only is not None and value not in field.only:
            allowed = " or ".join(map(repr, field.only))
            raise CheckpointError(
                f"`{name}` of {where} must be {allowed} (got {value!r}); Olmem cannot compute its logits otherwise."
            )
    for name, field in table.items():
        if name not in values and field.only is not None and field.default not in field.only:
            allowed = " or ".join(map(repr, field.only))
            raise CheckpointError(
                f"`{name}` of {where} must be {allowed} (absent, which native code reads as {field.default!r}); Olmem "
                "cannot compute the same logits otherwise."
            )
    return {
        name: typed(values.get(name, field.default), field.kind or type(field.default), name, where)
        for name, field in table.items()
    }


def carried(read: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the fields of OlmemConfig that fields of the native config become as they are."""
    return {field.to: read[name] for name, field in table.items() if field.to and read[name] is not None}


def is_dynamic(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether any layer's RoPE is stretched by the length of the text, in either form of `rope_parameters`."""
    entries = [rope_parameters, *(entry for entry in rope_parameters.values() if isinstance(entry, Mapping))]
    return any(entry.get("rope_type") == "dynamic" for entry in entries)


def required(value: Any, name: str, where: str) -> Any:
    """Returns the value of a field that must be given."""
    if value is None:
        raise CheckpointError(f"`{name}` of {where} must be given (it is absent); add it, as the run had it.")
    return value


class Format(Protocol):
    """What each module of a format is: it recognises its checkpoints, and opens them.

    TAKES_GIVEN: whether it reads what the caller says of a checkpoint, as its own files may not.
    """

    TAKES_GIVEN: bool

    @staticmethod
    def recognise(folder: Path, /) -> str | None:
        """What the checkpoint is, in words, or None where it is of another format."""
        ...

    @staticmethod
    def open_checkpoint(folder: Path, max_length: int | None, given: Given, /) -> "Checkpoint":
        """The checkpoint, without any weight read. max_length: in place of the config's. given: what it lacks."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A native checkpoint, opened: what it is, its config in both languages, its tensors still on disk."""

    description: str
    path: Path
    native_config: Mapping[str, Any]  # as written, or what stands for it where nothing is
    olmem_config: dict[str, Any]  # fields of OlmemConfig
    tensors: dict[str, LazyTensor]  # by native name
    keys: list[Key]
    tokenizer_size: int  # tokens that were trained; rows beyond are padding
    forward: Forward  # its reference, which shares nothing with what is said here
    of_transformers: bool = False  # a folder of `save_pretrained`, with its tokenizer and its generation_config.json
    notes: tuple[str, ...] = ()

    @property
    def window(self) -> int:
        """The longest sliding window, 0 without one."""
        sliding = "sliding_attention" in self.olmem_config["layer_types"]
        return self.olmem_config["sliding_window"] if sliding else 0

    @property
    def chunk(self) -> int:
        """The tokens of a chunk, 0 without one."""
        chunked = "chunked_attention" in self.olmem_config["layer_types"]
        return self.olmem_config["attention_chunk_size"] if chunked else 0

    @property
    def in_config(self) -> set[str | None]:
        """Native tensors that become no weight but numbers of the config, which keeps them as they are."""
        return {key.native for key in self.keys if key.numbers}
