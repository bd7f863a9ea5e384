"""Weights that are still on disk: names, shapes and dtypes at once, values when asked, and no more than was asked for.

Every reader returns a dictionary of `LazyTensor`. None maps a file into memory or takes a size on trust: a span of a
file is checked to be there when the checkpoint is opened, and its values are read into memory that it fills.
"""

import math
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError
from .plain import SourceFile

BLOCK = 2**20  # bytes that are checked or compared at a time, while they are in the processor's cache


@dataclass(frozen=True)
class LazyTensor:
    """A tensor still on disk. `read(start, stop)` gives rows start … stop−1 of its first dimension, in the dtype of the
    file; of a number (no dimensions), `read(0, 1)` gives it. One that is not `divisible` is read whole for any of them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]
    divisible: bool = True
    sources: frozenset[SourceFile] = frozenset()  # the files that its values are in

    @classmethod
    def whole(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        load: Callable[[], torch.Tensor],
        sources: frozenset[SourceFile] = frozenset(),
    ) -> "LazyTensor":
        """One that `load` can only make all at once."""
        return cls(shape, dtype, lambda start, stop: load()[start:stop] if shape else load(), False, sources)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the values in the dtype of the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """Reads all of it."""
        return self.read(0, self.shape[0] if self.shape else 1)

    def pieces(self, nbytes: int) -> Iterator[torch.Tensor]:
        """All of it in order, in pieces of about so many bytes, or of one row if that is more."""
        if not self.shape:
            yield self.load()
            return
        rows = self.shape[0]
        step = max(nbytes * rows // max(self.nbytes, 1), 1)
        whole = None if self.divisible else self.load()
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield self.read(start, stop) if whole is None else whole[start:stop].clone()

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """Rows start … stop−1 of the first dimension."""
        shape = (stop - start, *self.shape[1:])
        return LazyTensor(shape, self.dtype, lambda a, b: self.read(start + a, start + b), self.divisible, self.sources)

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LazyTensor":
        """What `change`, which keeps shape and dtype, makes of it."""
        return LazyTensor.whole(self.shape, self.dtype, lambda: change(self.load()), self.sources)


def same_bits(one: LazyTensor, other: LazyTensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors of one shape hold the same, once both are of `dtype` if given; a few rows in memory."""
    rows = one.shape[0] if one.shape else 1
    step = max(BLOCK * rows // max(one.nbytes, 1), 1) if one.divisible and other.divisible else max(rows, 1)

    def bits(tensor: LazyTensor, start: int) -> torch.Tensor:
        values = tensor.read(start, min(start + step, rows)).to(dtype or tensor.dtype)
        return values.contiguous().flatten().view(torch.uint8)

    return all(torch.equal(bits(one, start), bits(other, start)) for start in range(0, rows, step))


class LoadedOnDemand(Mapping[str, torch.Tensor]):
    """Lazy tensors as a mapping of plain ones: each look-up reads one tensor, optionally rounded to `dtype`, but for
    the names in `as_stored`."""

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        dtype: torch.dtype | None = None,
        as_stored: Container[str | None] = (),
    ):
        self.tensors, self.dtype, self.as_stored = tensors, dtype, as_stored

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name].load()
        return tensor if self.dtype is None or name in self.as_stored else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass
class Span:
    """Bytes start … start+length−1 of a file, with their CRC-32 if the file states it.

    It is computed as they are read from the first to the last, and is an error with the last of them. Who begins
    elsewhere has all of it checked first.
    """

    file: SourceFile
    start: int
    length: int
    crc: int | None = None
    passed: int = field(default=0, compare=False)  # bytes, of which `running` is the CRC-32
    running: int = field(default=0, compare=False)

    def values(self, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` numbers from the one at `first`, (count,)."""
        values, offset = torch.empty(count, dtype=dtype), first * dtype.itemsize
        if offset != self.passed:
            self.check()
        self.fill(values.view(torch.uint8).numpy().data, offset)
        return values

    def tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, first: int = 0, stride: tuple[int, ...] | None = None
    ) -> LazyTensor:
        """The tensor that begins at the number `first`, and is kept row after row unless there is a `stride`."""
        extent = (
            math.prod(shape) if stride is None else 1 + sum((n - 1) * by for n, by in zip(shape, stride, strict=True))
        )
        # Reading a part of the span never comes to its end, where the checksum is compared.
        is_part = first > 0 or extent * dtype.itemsize != self.length

        def read(start: int, stop: int) -> torch.Tensor:
            if is_part:
                self.check()
            size = math.prod(shape[1:])
            values = self.values(first + start * size, (stop - start) * size, dtype)
            return values.view(stop - start, *shape[1:]) if shape else values.view(())

        def load() -> torch.Tensor:
            if is_part:
                self.check()
            return self.values(first, extent, dtype).as_strided(shape, stride or ())

        sources = frozenset((self.file,))
        if stride is None:
            return LazyTensor(shape, dtype, read, sources=sources)
        return LazyTensor.whole(shape, dtype, load, sources)

    def check(self) -> None:
        """Reads what no one has, for its checksum alone."""
        if self.crc is None or self.passed == self.length:
            return
        buffer = memoryview(bytearray(min(BLOCK, self.length)))
        while self.passed < self.length:
            self.fill(buffer[: self.length - self.passed], self.passed)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """The bytes at `offset` of the span."""
        done = 0
        while done < len(buffer):
            read = self.file.read_into(buffer[done : done + BLOCK], self.start + offset + done)
            if not read:
                raise self.file.changed()  # it became shorter
            if self.crc is not None and offset + done == self.passed:
                self.running = zlib.crc32(buffer[done : done + read], self.running)
                self.passed += read
            done += read
        if self.crc is not None and self.passed == self.length and self.running != self.crc:
            self.passed = self.running = 0
            raise CheckpointError(
                f"`{self.file.path}` must match its own checksums (at byte {self.start} it does not); copy it again."
            )


def files_of(tensors: Mapping[str, LazyTensor]) -> set[SourceFile]:
    """Returns the files that the values of these tensors are in."""
    return {file for tensor in tensors.values() for file in tensor.sources}


def require_same(tensors: Mapping[str, LazyTensor]) -> None:
    """Raises CheckpointError if a file that these tensors are in was changed or replaced since it was opened."""
    for file in files_of(tensors):
        file.require_same()
