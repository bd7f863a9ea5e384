"""The model's weights of a torch.distributed.checkpoint folder: `.metadata`, an index, and `__R_I.distcp`, in which
chunks of tensors lie one after another, each an archive of `torch.save`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .archives import Archive
from .pickles import LARGEST_PICKLE, TORCH_DTYPES, Names, Record, StoredTensor, plain_size, unpickle
from .plain import SourceFile, member, reading, refuse_strays
from .tensors import LazyTensor
from .texts import read_bytes


def first_argument(*arguments: Any) -> Any:
    """Stands for a class or a function of which its first argument is all that matters."""
    return arguments[0] if arguments else None


# All that a `.metadata` may name, by OLMo-core 1.8 to 3.0 and torch 2.x; the classes become records, so that not even
# their own unpickling code runs.
METADATA_NAMES: dict[str, Any] = {
    **{
        f"torch.distributed.checkpoint.metadata.{name}": Record
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    },
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": first_argument,
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties": Record,
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING": first_argument,
    "torch.distributed.checkpoint.filesystem._StorageInfo": Record,
    "olmo_core.distributed.checkpoint.filesystem._StorageInfo": Record,
    "torch.serialization._get_layout": first_argument,
    "torch.Size": plain_size,
    "collections.OrderedDict": Names,
    "pathlib.PosixPath": first_argument,  # the folder that it was written to
    "pathlib.WindowsPath": first_argument,
    "pathlib._local.PosixPath": first_argument,  # its name in Python 3.13
    "pathlib._local.WindowsPath": first_argument,
    **TORCH_DTYPES,
}

MOST_COMPARED = 2**18  # pairs of chunks of a tensor; a grid of 128 by 16 ranks takes 2**15
Place = tuple[str, int, int]  # file name, first byte, bytes


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it starts, its sizes, and the bytes of one file that hold it."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: SourceFile
    start: int
    length: int

    @property
    def path(self) -> Path:
        return self.file.path

    @cached_property
    def values(self) -> LazyTensor:
        """The box, still on disk; its archive is opened when it is first asked for."""
        with reading(self.path, "it is damaged; copy the folder again"):
            archive = Archive(self.file, self.start, self.length)
            stored = archive.value
            if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (self.sizes, self.dtype):
                got = (stored.dtype, stored.shape) if isinstance(stored, StoredTensor) else type(stored).__name__
                raise CheckpointError(
                    f"`{self.path}` must hold {self.dtype} {self.sizes} of {self.name!r} (got {got}); files of two "
                    "checkpoints are mixed: copy the folder again."
                )
            return archive.tensor(self.name, stored)


def read_distributed(folder: Path, prefix: str = "model.") -> dict[str, LazyTensor]:
    """The model weights of a torch.distributed.checkpoint folder: `.metadata` and `__R_I.distcp`.

    Keys that start with `prefix` are taken, without it; a folder written from a bare state dict has no prefix.
    """
    path = folder / ".metadata"
    with reading(path):
        metadata = unpickle(read_bytes(path, LARGEST_PICKLE), METADATA_NAMES)
        entries = {str(name): entry for name, entry in metadata.state_dict_metadata.items()}
        storage = dict(places(metadata.storage_data))
    refuse_strays(folder, "*.distcp", {file_name for file_name, _, _ in storage.values()}, path.name)
    names = [name for name in entries if name.startswith(prefix)]
    if not names:
        prefix, names = "", [name for name in entries if not name.startswith("optim.")]
    tensors, found = {}, []
    files: dict[str, SourceFile] = {}
    for name in names:
        if not hasattr(entries[name], "chunks"):
            raise CheckpointError(f"`{path}` must hold tensors only (got a pickled value {name!r}); re-save the model.")
        with reading(path):
            shape = integers(entries[name].size)
            dtype = metadata_dtype(entries[name].properties)
            boxes = [(integers(chunk.offsets), integers(chunk.sizes)) for chunk in entries[name].chunks]
            chunks = [locate(folder, name, box, dtype, storage, files) for box in boxes if math.prod(box[1]) > 0]
            check_cover(path, name, shape, chunks)
        found += chunks
        tensors[name.removeprefix(prefix)] = LazyTensor(
            shape,
            dtype,
            lambda start, stop, shape=shape, dtype=dtype, chunks=chunks: join(shape, dtype, chunks, start, stop),
            sources=frozenset(chunk.file for chunk in chunks),
        )
    if not tensors:
        raise CheckpointError(
            f"`{path}` must list the model's tensors (it lists none); name a checkpoint that has the model."
        )
    check_apart(path, found)
    return tensors


def places(storage_data: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, str], Place]]:
    """By name and offsets of a chunk, where its bytes are. Offsets as text: tuples can be made of one hash."""
    for index, info in storage_data.items():
        offsets = integers(getattr(index, "offset", None) or ())
        if not isinstance(index.fqn, str) or not isinstance(info.relative_path, str):
            raise ValueError("a chunk has no name, or no file")
        start, length = integers((info.offset, info.length))
        yield (index.fqn, str(offsets)), (info.relative_path, start, length)


def integers(values: Any) -> tuple[int, ...]:
    """Of a size, or an offset."""
    sizes = plain_size(values)
    if not all(type(value) is int and 0 <= value < 2**63 for value in sizes):
        raise ValueError("a size or an offset is no list of integers from 0")
    return sizes


def metadata_dtype(properties: Any) -> torch.dtype:
    """Returns the dtype of a tensor's properties, in the form of any release."""
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype is a {type(dtype).__name__}")
    return dtype


def locate(
    folder: Path,
    name: str,
    box: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    storage: Mapping[tuple[str, str], Place],
    files: dict[str, SourceFile],
) -> Chunk:
    """The bytes that hold one box (offsets, sizes) of a tensor, checked to be there. Each file is opened once."""
    offsets, sizes = box
    if (name, str(offsets)) not in storage:
        raise CheckpointError(
            f"`{folder / '.metadata'}` must say where {name!r} at {offsets} is (it does not); save the checkpoint anew."
        )
    relative_path, start, length = storage[name, str(offsets)]
    path = member(folder, relative_path)
    if not path.is_file():
        raise CheckpointError(f"`{path}` must exist (it holds part of {name!r}); copy the folder again.")
    file = files[relative_path] = files.get(relative_path) or SourceFile(path)
    available, needed = file.size, math.prod(sizes) * dtype.itemsize
    if start + length > available or length < needed:
        raise CheckpointError(
            f"`{path}` must hold {needed} bytes of {name!r} at {start} (the file has {available}); it is cut short or "
            "of another checkpoint: copy the folder again."
        )
    return Chunk(name, offsets, sizes, dtype, file, start, length)


def check_cover(path: Path, name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Chunks must lie inside the tensor, hold as many values, and none of them twice."""
    inside = all(
        len(chunk.sizes) == len(chunk.offsets) == len(shape)
        and all(o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True))
        for chunk in chunks
    )
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    twice = overlap(chunks) if inside and covered == math.prod(shape) else None
    if not inside or covered != math.prod(shape) or twice:
        found = (
            f"chunks at {twice[0].offsets} and {twice[1].offsets} overlap" if twice else f"its chunks hold {covered}"
        )
        raise CheckpointError(
            f"`{path}` must cover {name!r} of shape {shape} once ({found}, of {math.prod(shape)} values); a rank's "
            "chunks are missing or doubled: copy the folder again."
        )


def check_apart(path: Path, chunks: list[Chunk]) -> None:
    """No byte may be a part of two chunks, lest a small file become a large model."""
    for one, other in pairwise(sorted(chunks, key=lambda chunk: (chunk.path, chunk.start))):
        if one.path == other.path and one.start + one.length > other.start:
            raise CheckpointError(
                f"`{path}` must give each chunk bytes of its own (of {other.path.name} it gives those at {other.start} "
                f"to {one.name!r} and {other.name!r}); no run wrote it so: do not trust it."
            )


def overlap(chunks: list[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two boxes that share a value, if any do: a sweep along the dimension in which most of them begin apart."""
    if len(chunks) < 2:
        return None
    dims = range(len(chunks[0].sizes))
    along = max(dims, key=lambda dim: len({chunk.offsets[dim] for chunk in chunks}), default=None)
    if along is None:
        return chunks[0], chunks[1]
    reached: list[Chunk] = []
    compared = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[along]):
        compared += len(reached)
        if compared > MOST_COMPARED:
            raise ValueError("its chunks are too many that lie side by side")
        reached = [other for other in reached if other.offsets[along] + other.sizes[along] > chunk.offsets[along]]
        for other in reached:
            if all(
                max(chunk.offsets[dim], other.offsets[dim])
                < min(chunk.offsets[dim] + chunk.sizes[dim], other.offsets[dim] + other.sizes[dim])
                for dim in dims
            ):
                return other, chunk
        reached.append(chunk)
    return None


@lru_cache(maxsize=1)
def in_memory(chunk: Chunk) -> LazyTensor:
    """A chunk that is not kept row after row, read once for all rows that follow one another."""
    values = chunk.values.load()
    return LazyTensor(chunk.sizes, chunk.dtype, lambda start, stop: values[start:stop])


def join(shape: tuple[int, ...], dtype: torch.dtype, chunks: list[Chunk], start: int, stop: int) -> torch.Tensor:
    """Rows start … stop−1, of all chunks that have some of them."""
    if not shape:
        return chunks[0].values.load()
    whole = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    for chunk in chunks:
        first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
        if first < last:
            columns = (slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
            held = chunk.values if chunk.values.divisible else in_memory(chunk)
            values = held.read(first - chunk.offsets[0], last - chunk.offsets[0])
            whole[slice(first - start, last - start), *columns] = values
    return whole
