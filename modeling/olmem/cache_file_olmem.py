# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Writes the state of a batch of streams to a safetensors file, and checks such a file before its content is used."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORMAT = "olmem-cache-4"
FACTS = ("architecture", "max_length", "began_anew")
NOTES = "notes"  # what a file of a stream says beside these
MOST_ROOM = 2**31  # tokens, more than any buffer holds
MOST_COLUMNS = 2**60  # columns, more than any stream has, so that sums of them stay in the range of int64
# The types that tensors of a store may have; those that are not named here are of one floating type.
TYPES = {"store_scores": ("F32", "F64"), "store_counts": ("I64",)}
COUNTERS = {"seen": (1, torch.long), "columns": (0, torch.long), "gaps": (0, torch.bool)}
HINT = "pip install safetensors"


def checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256 of the facts, and of the names, types, shapes and values of tensors on the CPU."""
    names = [*FACTS, NOTES] if NOTES in metadata else FACTS
    digest = hashlib.sha256(json.dumps({name: metadata.get(name) for name in names}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_state(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors and facts to a file, which appears whole or not at all."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"`OlmemCache.save` needs safetensors: {HINT}") from error

    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    metadata |= {"format": FORMAT, "checksum": checksum(on_cpu, metadata)}
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode  # the mode that the umask gives; safetensors lets only the owner read
        save_file(on_cpu, scratch, metadata)
        scratch.chmod(mode)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


class StateFile:
    """Reads an open state file.

    Attributes:
        facts: the facts `architecture`, `max_length` and `began_anew`, whose types are checked, and `notes` as they
            are, or None.
        batch_size: the number of rows.
        columns: the number of columns that the rows have read.
    """

    def __init__(self, path: str | os.PathLike, file: Any):
        self.path, self.file = path, file
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"`path` must be a file of `OlmemCache.save` (got {path}, of format {metadata.get('format')!r}); this "
                f"version reads {FORMAT!r}: read the text again with this version, and save it."
            )
        self.metadata = metadata
        self.facts = {name: parse(metadata.get(name)) for name in FACTS}
        self.require(isinstance(self.facts["architecture"], dict), "its `architecture` is damaged")
        most = self.facts["max_length"]
        self.require(most is None or (type(most) is int and 0 < most < MOST_ROOM), "its `max_length` is damaged")
        self.require(isinstance(self.facts["began_anew"], bool), "its `began_anew` is damaged")
        self.facts[NOTES] = parse(metadata[NOTES]) if NOTES in metadata else None
        self.names = set(file.keys())
        for name, (dimensions, dtype) in COUNTERS.items():
            self.require(name in self.names, f"`{name}` is missing")
            shape, stored = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
            kind = {torch.long: "I64", torch.bool: "BOOL"}[dtype]
            self.require(len(shape) == dimensions and stored == kind, f"`{name}` is damaged")
        self.counters = {name: self.copied(name) for name in COUNTERS}
        seen, self.columns = self.counters["seen"], int(self.counters["columns"])
        self.batch_size = len(seen)
        self.require(self.batch_size > 0, "`seen` is damaged")
        least, most = int(seen.min()), int(seen.max())
        fits = 0 <= least <= most <= self.columns < MOST_COLUMNS and self.columns > 0
        self.require(fits, f"`seen` counts {least} to {most} tokens in {self.columns} `columns`")

    def copied(self, name: str) -> torch.Tensor:
        """Returns a tensor of its own, as the one that safetensors gives changes whenever the file is written to."""
        return self.file.get_tensor(name).clone()

    def require(self, holds: bool, problem: str) -> None:
        """Raises an error that names a problem of the file, unless a condition holds."""
        if not holds:
            raise ValueError(
                f"`path` must be a whole file of `OlmemCache.save` (got {self.path}: {problem}); save it anew."
            )

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Returns the counters and the tensors with these names, after it has checked the whole content of the file.

        Args:
            shapes: the shape that each tensor must have, by name.
        """
        dtypes = set()
        for name, shape in shapes.items():
            self.require(name in self.names, f"`{name}` is damaged or missing")
            found = self.file.get_slice(name)
            self.require(tuple(found.get_shape()) == shape, f"`{name}` is damaged or missing")
            dtype, own = found.get_dtype(), TYPES.get(name.rpartition(".")[2])
            self.require(dtype in (own or ("F64", "F32", "F16", "BF16")), f"`{name}` is damaged or missing")
            if name != "memory" and own is None:
                dtypes.add(dtype)
        self.require(len(dtypes) == 1, f"its keys and values are of several types, {', '.join(sorted(dtypes))}")
        unknown = sorted(self.names - set(shapes) - set(COUNTERS))
        self.require(not unknown, f"`{unknown[0] if unknown else ''}` is not part of such a state")
        tensors = self.counters | {name: self.copied(name) for name in shapes}
        self.require(
            checksum(tensors, self.metadata) == self.metadata.get("checksum"), "its content does not have its checksum"
        )
        for name, tensor in tensors.items():
            if name.startswith("layers.") and not bool(tensor.isfinite().all()):
                self.require(False, f"`{name}` holds non-finite values")
        return tensors


@contextmanager
def read_state(path: str | os.PathLike) -> Iterator[StateFile]:
    """Opens a file that `write_state` has written.

    Raises:
        ValueError: if the file was not written by it, or is damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"`OlmemCache.load` needs safetensors: {HINT}") from error

    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(
            f"`path` must be a file of `OlmemCache.save` (got {path}, which is of another kind); name one."
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield StateFile(path, file)
    except (FileNotFoundError, PermissionError):
        raise
    except (SafetensorError, OSError, MemoryError) as error:  # the last two of a file that cannot be mapped into memory
        raise ValueError(f"`path` must be a whole file of `OlmemCache.save` (got {path}: {error}).") from None


def parse(text: str | None) -> Any:
    """Returns the value of a JSON text, or an ellipsis, which no fact can be, if the text cannot be read."""
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return ...


__all__ = ["read_state", "write_state"]
