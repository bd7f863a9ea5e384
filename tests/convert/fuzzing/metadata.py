"""Folders of torch.distributed.checkpoint whose `.metadata` says something else than its files hold."""

import io
import pickle
from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath
from random import Random
from typing import Any

import torch
from convert.fuzzing.archives import mutate_archive
from convert.fuzzing.pickles import HUGE, dumped, mutate_pickle
from convert.fuzzing.seeds import Files, saved, seeds
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata

NUMBERS = (0, 1, -1, 2, HUGE, -HUGE, 2**63, 2**100, 3.5, float("nan"), True, None, "x", "9", (1,), [])
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, "float32", None, 7)
PATHS = (
    *(
        "../config.json",
        "/etc/passwd",
        "..",
        ".",
        "",
        ".metadata",
        "a\0b",
        "x" * 5000,
        "__0_0.distcp/",
        "./__0_0.distcp",
    ),
    *("nowhere.distcp", None, 3, PurePosixPath("__0_0.distcp"), PurePosixPath("/etc/passwd"), b"__0_0.distcp", ("a",)),
)


class Loose(tuple):
    """A Size that takes anything, pickled as the genuine one is."""

    def __reduce__(self) -> Any:
        return (torch.Size, (tuple(self),))


def mutate_distributed(rng: Random, files: Files, name: str) -> None:
    """`name` is the `.metadata` of the folder, or one of its chunk files."""
    path = str(PurePosixPath(name).with_name(".metadata"))
    kind = rng.randrange(10)
    genuine = any(files[path] in seed.values() for seed in seeds_with_metadata())
    if kind <= 2 or not genuine:  # which alone may be unpickled
        files[path] = mutate_pickle(rng, files[path])
        return
    metadata: Metadata = pickle.loads(files[path])
    if kind <= 5:
        other_chunk_bytes(rng, files, path, metadata)
    for _ in range(0 if kind <= 5 else rng.choice((1, 1, 2))):
        entries = sorted(key for key, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks"))
        if not entries:
            break
        rng.choice((other_entry, other_entry, other_storage))(rng, metadata, rng.choice(entries))
    files[path] = dumped(metadata, rng.choice((2, 4)))


@cache
def seeds_with_metadata() -> list[Files]:
    return [seed for reader in ("olmo_torch_new", "olmo_core") for seed in seeds(reader)]


def other_number(rng: Random, sizes: tuple[int, ...]) -> Any:
    """The same sizes but for one."""
    numbers: list[Any] = list(sizes) or [1]
    at = rng.randrange(len(numbers))
    old = numbers[at] if isinstance(numbers[at], int) else 1
    numbers[at] = rng.choice((*NUMBERS, old + 1, old - 1, old * 2, old // 2))
    return Loose(rng.choice((numbers, numbers, numbers, numbers[1:], [*numbers, 1], numbers * 400)))


def other_entry(rng: Random, metadata: Metadata, fqn: str) -> None:
    """A tensor's sizes, dtype or chunks."""
    entries: dict[Any, Any] = metadata.state_dict_metadata  # pyright: ignore[reportAssignmentType]
    entry = entries[fqn]
    kind = rng.randrange(9)
    if kind == 0:
        entry.size = other_number(rng, tuple(entry.size))
    elif kind == 1:
        entry.properties = replace(entry.properties, dtype=rng.choice(DTYPES))
    elif kind == 2:
        entry.chunks = rng.choice((entry.chunks * 2, entry.chunks[1:], [], entry.chunks * 3000, None, "x"))
    elif kind <= 5 and entry.chunks:
        at = rng.randrange(len(entry.chunks))
        chunk = entry.chunks[at]
        offsets, sizes = chunk.offsets, chunk.sizes
        if rng.random() < 0.5:
            offsets = other_number(rng, tuple(offsets))
        else:
            sizes = other_number(rng, tuple(sizes))
        entry.chunks = [*entry.chunks[:at], ChunkStorageMetadata(offsets, sizes), *entry.chunks[at + 1 :]]
    elif kind == 6:
        other = rng.choice(("", "model.", "../x", "x" * 5000, f"{fqn}x", f"optim.{fqn}", fqn.upper(), "a\0b"))
        entries[other] = entries.pop(fqn)
    elif kind == 7:
        entries[fqn] = rng.choice((BytesStorageMetadata(), None, 3, entry.chunks, {}))
    else:  # sizes that fit each other and no file
        sizes = torch.Size((2**30, *tuple(entry.size)[1:]))
        entry.size, entry.chunks = sizes, [ChunkStorageMetadata(torch.Size([0] * len(sizes)), sizes)]


def other_storage(rng: Random, metadata: Metadata, fqn: str) -> None:
    """Where a chunk's bytes are."""
    storage: dict[Any, Any] = metadata.storage_data
    places = [index for index in storage if index.fqn == fqn]
    if not places:
        return
    index = rng.choice(places)
    info = storage[index]
    kind = rng.randrange(6)
    if kind == 0:
        info.relative_path = rng.choice(PATHS)
    elif kind == 1:
        info.offset = rng.choice((*NUMBERS, info.offset + 1, info.offset - 1, info.offset + 64))
    elif kind == 2:
        info.length = rng.choice((*NUMBERS, info.length + 1, info.length - 1, info.length // 2, 10**9))
    elif kind == 3:
        other = rng.choice(list(storage))
        storage[index], storage[other] = storage[other], storage[index]
    elif kind == 4:
        del storage[index]
    else:
        storage[index] = rng.choice((None, 3, "x", (info.relative_path, info.offset, info.length)))


def other_chunk_bytes(rng: Random, files: Files, path: str, metadata: Metadata) -> None:
    """One chunk's archive changes, and those behind it move."""
    index = rng.choice(sorted(metadata.storage_data, key=str))
    info = metadata.storage_data[index]
    file = str(PurePosixPath(path).with_name(info.relative_path))
    if file not in files:
        return
    data = files[file]
    old = data[info.offset : info.offset + info.length]
    kind = rng.randrange(4)
    if kind <= 1:
        new = mutate_archive(rng, old)
    elif kind == 2:
        value = torch.load(io.BytesIO(old), weights_only=True)
        new = saved(rng.choice(OTHER_VALUES)(value) if isinstance(value, torch.Tensor) else [value])
    else:
        new = rng.choice((b"", old[:-1], old + b"\0", old * 2, rng.randbytes(len(old)), b"PK\x05\x06" + bytes(18)))
    files[file] = data[: info.offset] + new + data[info.offset + info.length :]
    for other in metadata.storage_data.values():
        if other.relative_path == info.relative_path and other.offset > info.offset:
            other.offset += len(new) - len(old)
    if rng.random() < 0.9:
        info.length = len(new)


OTHER_VALUES = (
    lambda value: value.double(),
    lambda value: value.bfloat16(),
    lambda value: value.to(torch.int32),
    lambda value: value.reshape(-1),
    lambda value: value.unsqueeze(0),
    lambda value: value[:-1],
    lambda value: torch.zeros(1).expand(value.shape),
    lambda value: torch.zeros(10**5)[3 : 3 + value.numel()].view(value.shape),
    lambda value: value.t().contiguous().t() if value.ndim == 2 else value.flip(0),
    lambda value: value.to_sparse(),
    lambda value: value.to("meta"),
    lambda value: value * float("nan"),
    lambda value: {"x": value},
    lambda value: [value, value],
    lambda value: torch.nn.Parameter(value),
    lambda value: torch.zeros(1).expand(2**40),
)
