"""Safetensors written as a stream: one tensor in memory, each file and its sha256 made in one pass."""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .errors import CheckpointError
from .tensors import LazyTensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
INDEX_NAME = "model.safetensors.index.json"


def write_shards(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    max_shard_size: int | str,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> int:
    """Writes `model*.safetensors` and, when there are several, the index. `advance` is told of bytes written.

    Returns the weights' bytes, which the index states as `total_size`.
    """
    check_size(max_shard_size)
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: math.prod(tensor.shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_size) if str(max_shard_size).isdigit() else max_shard_size,
    )
    for file_name, names in plan.filename_to_tensors.items():
        with (folder / file_name).open("xb") as file:
            write_file(file, {name: tensors[name] for name in names}, dtype, advance)
    total = sum(math.prod(tensor.shape) * dtype.itemsize for tensor in tensors.values())
    if plan.is_sharded:
        index = {
            "metadata": {
                "total_size": total,
                "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
            },
            "weight_map": dict(sorted(plan.tensor_to_filename.items())),
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def check_size(max_shard_size: int | str) -> None:
    if not re.fullmatch(r"0*[1-9]\d*([KMGT]B)?", str(max_shard_size), re.IGNORECASE):
        raise CheckpointError(f"`max_shard_size` must be a size (got {max_shard_size!r}); write it as in 5GB.")


def write_file(
    file: BinaryIO, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, advance: Callable[[int], object]
) -> None:
    """One safetensors file (github.com/huggingface/safetensors, "Format"): header length, header, bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in tensors.items():
        values = tensor.load()
        require_finite(name, values)
        if values.dtype != dtype:
            values = values.to(dtype)
            require_finite(name, values, f" as {str(dtype).removeprefix('torch.')}")
        data = values.contiguous().flatten().view(torch.uint8).numpy()
        file.write(data.data)
        advance(data.nbytes)
        del values, data  # before the next one is read: one tensor in memory, not two
    file.flush()
    os.fsync(file.fileno())


def require_finite(name: str, tensor: torch.Tensor, when: str = "") -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        remedy = "choose --dtype bfloat16" if when else "the file is damaged or the run diverged: convert another step"
        raise CheckpointError(
            f"`{name}` must be finite{when} (got {bad} NaN or infinite values of {tensor.numel()}); {remedy}."
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
