"""Safetensors written as a stream: a few pieces of a tensor in memory, whatever its size and the model's; each file and
its sha256 in one pass, in which reading, rounding and writing overlap."""

import errno
import hashlib
import io
import json
import math
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CheckpointError
from ..reading.tensors import LazyTensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
INDEX_NAME = "model.safetensors.index.json"
WIDER = (torch.bfloat16, torch.float32)  # that float16, narrower first
DONTCACHE = 0x80 if sys.platform == "linux" else 0  # RWF_DONTCACHE, of Linux 6.14 and later
PIECE = 2**22  # bytes that are read at a time: what is done with them is done in the processor's cache
END: Any = object()
Item = TypeVar("Item")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold `tensors` in `dtype`, none larger than `max_shard_size` unless for one tensor."""

    tensors: Mapping[str, LazyTensor]
    dtype: torch.dtype
    max_shard_size: int | str = "5GB"
    names: dict[str, list[str]] = field(init=False)  # of the tensors in each

    def __post_init__(self) -> None:
        size = self.max_shard_size
        plan = split_state_dict_into_shards_factory(
            dict(self.tensors),
            get_storage_size=self.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=int(size) if str(size).isdigit() else size,
        )
        object.__setattr__(self, "names", plan.filename_to_tensors)

    def nbytes(self, tensor: LazyTensor) -> int:
        """Returns the bytes of a tensor in the dtype that is written."""
        return math.prod(tensor.shape) * self.dtype.itemsize

    def total(self, files: Iterable[str] | None = None) -> int:
        """The bytes of the weights in these files, or in all."""
        files = self.names if files is None else files
        return sum(self.nbytes(self.tensors[name]) for file in files for name in self.names[file])

    def described(self) -> str:
        """Says how many bytes will be written, to how many files, in which dtype."""
        plural = "" if len(self.names) == 1 else "s"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.total():,} bytes of weights in {len(self.names)} file{plural}, as {dtype}"

    def write(
        self,
        folder: Path,
        advance: Callable[[int], object] = lambda nbytes: None,
        *,
        finished: Mapping[str, dict[str, int]] | None = None,
        finish: Callable[[str, str, dict[str, int]], object] = lambda name, digest, nonfinite: None,
        allow_nonfinite: bool = False,
    ) -> dict[str, int]:
        """Writes the files that are not `finished`, and the index where they are several.

        `advance` is told of bytes, `finish` of each file that is on the disk, with its sha256. Returns how many numbers
        are NaN or infinite, by tensor; without `allow_nonfinite` they are an error.
        """
        counts = dict(finished or {})
        for name, names in self.names.items():
            if name not in counts:
                tensors, bad = {key: self.tensors[key] for key in names}, {}
                digest = write_file(folder / name, tensors, self.dtype, advance, bad if allow_nonfinite else None)
                finish(name, digest, bad)
                counts[name] = bad
        if len(self.names) > 1:
            (folder / INDEX_NAME).write_text(json.dumps(self.index(), indent=2) + "\n", encoding="utf-8")
        return {name: count for bad in counts.values() for name, count in bad.items()}

    def index(self) -> dict[str, Any]:
        """Returns what the index says: which tensor is in which file, and how much all of them take."""
        places = {name: file for file, names in self.names.items() for name in names}
        parameters = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        metadata = {"total_size": self.total(), "total_parameters": parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(places.items()))}


def write_file(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    advance: Callable[[int], object],
    bad: dict[str, int] | None,
) -> str:
    """One safetensors file (github.com/huggingface/safetensors, "Format"): header length, header, bytes. Returns its
    sha256 once it is on the disk."""
    text = header(tensors, dtype)
    digest = hashlib.sha256(text)
    with open(path, "xb", buffering=0) as file, one_thread():
        write_through(file, text)
        for data in ahead(hashed(rounded(ahead(pieces(tensors)), tensors, dtype, bad), digest)):
            write_through(file, data)
            advance(data.nbytes)
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_through(file: io.FileIO, data: bytes | memoryview) -> None:
    """Writes all of the data and, where the system can, sends them to the disk at once and past its cache.

    A cache that takes a whole model lets go of what others have in it, and finding so much room takes longer than all
    else that is done with a piece. What is compared later is then what is on the disk.
    """
    data = memoryview(data)
    while data:
        try:
            done = os.pwritev(file.fileno(), [data], -1, DONTCACHE) if DONTCACHE else file.write(data)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            done = file.write(data)  # an older system, or another file system
        data = data[done:]


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch compute in one thread: of a piece, several spend far longer waiting for one another than computing, and
    take the processor from those that read, hash and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def header(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> bytes:
    """Returns the length and the header of a safetensors file with these tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return struct.pack("<Q", len(text)) + text


def ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, of which a thread makes so many ahead of the one that is in use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, iterator, END) for _ in range(depth))
        while (item := coming.popleft().result()) is not END:
            coming.append(thread.submit(next, iterator, END))
            yield item


def pieces(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all pieces of the tensors in order, each with the name of its tensor."""
    return ((name, piece) for name, tensor in tensors.items() for piece in tensor.pieces(PIECE))


def rounded(
    pieces: Iterable[tuple[str, torch.Tensor]],
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    bad: dict[str, int] | None,
) -> Iterator[torch.Tensor]:
    """Yields the pieces in the dtype that is written, and sees to it that they are finite."""
    for name, piece in pieces:
        made = piece.to(dtype)
        if not is_finite(made):
            before, after = count_nonfinite(piece), count_nonfinite(made)
            if after > before:
                refuse_nonfinite(name, tensors[name], dtype)
            elif bad is None:
                refuse_nonfinite(name, tensors[name])
            else:
                bad[name] = bad.get(name, 0) + after
        yield made


def hashed(pieces: Iterable[torch.Tensor], digest: "hashlib._Hash") -> Iterator[memoryview]:
    """The bytes of each piece, once the digest has them too, which takes as long as writing them."""
    for piece in pieces:
        data = piece.contiguous().flatten().view(torch.uint8).numpy().data
        digest.update(data)
        yield data


def is_finite(tensor: torch.Tensor) -> bool:
    """Many times as fast as asking of each number."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Returns how many numbers are NaN or infinite."""
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def refuse_nonfinite(name: str, tensor: LazyTensor, dtype: torch.dtype | None = None) -> NoReturn:
    """The error that says how many of its numbers are none, or, with `dtype`, would be none once rounded to it."""
    of_all, stored = math.prod(tensor.shape), tensor.dtype
    bad = count_rounded(tensor, dtype or stored)
    when, remedy = "", "the file is damaged or the run diverged: convert another step, or add --allow-nonfinite"
    if dtype is not None:
        when, own = f" as {str(dtype).removeprefix('torch.')}", count_rounded(tensor, stored)
        wider = [other for other in WIDER if other != dtype and count_rounded(tensor, other) == own]
        remedy = "no dtype that can be chosen holds it, so the run diverged: convert another step"
        if wider:
            remedy = f"it needs a wider range: choose --dtype {str(wider[0]).removeprefix('torch.')}"
    raise CheckpointError(f"`{name}` must be finite{when} (got {bad} NaN or infinite values of {of_all}); {remedy}.")


def count_rounded(tensor: LazyTensor, dtype: torch.dtype) -> int:
    """Returns how many numbers of a tensor are NaN or infinite once they are rounded to a dtype."""
    return sum(count_nonfinite(piece.to(dtype)) for piece in tensor.pieces(PIECE))


def sha256(path: Path) -> str:
    """Returns the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
