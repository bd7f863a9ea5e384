"""Archives that `torch.save` writes: a zip of a pickle and of the numbers of its tensors, read when they are asked for.

The records of an archive must not overlap, and lie in the part of the file that is the archive's, so that no byte is
the number of two tensors and a small file does not become a large model.
"""

import io
import math
import struct
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .pickles import LARGEST_PICKLE, STATE_DICT_NAMES, StoredTensor, load_storage, unpickle
from .plain import SourceFile, reading
from .tensors import LazyTensor, Span

MOST_TENSORS = 50_000  # of a state dict; the largest model that converts has a thousand
HEADER = 30  # bytes of a record's own header, before its name


class Window(io.RawIOBase):
    """Bytes start … start+length−1 of an open file, as a file."""

    def __init__(self, source: SourceFile, start: int, length: int):
        self.source, self.start, self.length, self.position = source, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError(f"there is nothing at {base + offset}")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(self.length - self.position, 0)]
        read = self.source.read_into(wanted, self.start + self.position)
        self.position += read
        return read


class Archive:
    """A zip archive of `torch.save`, alone in a file or a part of it: `value` is what it holds, tensors unread."""

    def __init__(self, source: SourceFile, start: int = 0, length: int | None = None):
        self.source, self.path, self.start = source, source.path, start
        self.spans: dict[str, Span] = {}  # of storages, by key
        length = source.size if length is None else length
        with zipfile.ZipFile(io.BufferedReader(Window(source, start, length))) as archive:
            self.records = self.index(archive)
            self.ends = self.find_ends(archive.start_dir)
            self.value = unpickle(self.pickled(), STATE_DICT_NAMES, load_storage)

    def index(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Returns the records by name, once none is compressed or there twice."""
        records: dict[str, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise CheckpointError(
                    f"`{self.path}` must be as `torch.save` writes it, not compressed (record {record.filename!r} is); "
                    "save it anew."
                )
            if record.filename in records:
                raise CheckpointError(f"`{self.path}` must hold {record.filename!r} once (got it twice); save it anew.")
            records[record.filename] = record
        return records

    def find_ends(self, directory: int) -> dict[str, int]:
        """By record, the byte that it must end before: where the next one begins, or the archive's directory."""
        ordered = sorted(self.records.values(), key=lambda record: record.header_offset)
        starts = [*(record.header_offset for record in ordered), directory]
        for record, (start, end) in zip(ordered, pairwise(starts), strict=True):
            if start < 0 or start + HEADER + record.file_size > end:
                raise CheckpointError(
                    f"`{self.path}` must give each of its records bytes of its own (of {record.filename!r} some belong "
                    "to another one, or to none); it was not written by `torch.save`: do not trust it."
                )
        return {record.filename: end for record, end in zip(ordered, starts[1:], strict=True)}

    def pickled(self) -> bytes:
        """Returns the bytes of the one pickle that the archive has."""
        names = [name for name in self.records if name.endswith("/data.pkl")]
        if len(names) != 1 or self.records[names[0]].file_size > LARGEST_PICKLE:
            raise CheckpointError(
                f"`{self.path}` must hold one data.pkl of at most {LARGEST_PICKLE} bytes, as `torch.save` writes it "
                f"(got {len(names)}); save it anew."
            )
        self.prefix = names[0].removesuffix("data.pkl")
        order = self.records.get(f"{self.prefix}byteorder")
        if order is not None and (order.file_size > 16 or self.read(order.filename) != b"little"):
            raise CheckpointError(f"`{self.path}` must hold numbers in little-endian order; save it on such a machine.")
        return self.read(names[0])

    def read(self, name: str) -> bytes:
        """The whole of a record, its checksum compared."""
        span = self.find(name)
        data = self.source.read(span.start, span.length)
        if zlib.crc32(data) != span.crc:
            raise ValueError(f"record {name!r} does not match its checksum")
        return data

    def span(self, key: str) -> Span:
        """Where the bytes of a storage are."""
        if key not in self.spans:
            self.spans[key] = self.find(f"{self.prefix}data/{key}")
        return self.spans[key]

    def find(self, record_name: str) -> Span:
        """After the record's own header, whose name and extra field may be of any length."""
        record = self.records[record_name]
        at = self.start + record.header_offset
        header = struct.unpack("<4s22xHH", self.source.read(at, HEADER))
        name = self.source.read(at + HEADER, header[1])
        if header[0] != b"PK\3\4" or name != record.orig_filename.encode():
            raise ValueError(f"record {record.filename!r} is not where the archive says")
        start = record.header_offset + HEADER + header[1] + header[2]
        if start + record.file_size > self.ends[record.filename]:
            raise ValueError(f"record {record.filename!r} is cut short, or reaches into the next one")
        return Span(self.source, self.start + start, record.file_size, record.CRC)

    def tensor(self, name: str, stored: StoredTensor) -> LazyTensor:
        """The tensor, once every number of it is known to be there."""
        record = self.records.get(f"{self.prefix}data/{stored.storage.key}")
        held = record.file_size // stored.dtype.itemsize if record else 0
        count = math.prod(stored.shape)
        steps = [(size, stride) for size, stride in zip(stored.shape, stored.stride, strict=True) if size != 1]
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
        if count and (max(count, stored.first + extent) > held or any(stride == 0 for _, stride in steps)):
            raise CheckpointError(
                f"`{self.path}` must hold every value of {name!r} (it has fewer, repeated or none at all); save "
                "`model.state_dict()` of contiguous weights."
            )
        if not count:
            nothing = torch.empty(stored.shape, dtype=stored.dtype)
            return LazyTensor.whole(stored.shape, stored.dtype, nothing.clone, frozenset((self.source,)))
        rows = all(stride == math.prod(size for size, _ in steps[i + 1 :]) for i, (_, stride) in enumerate(steps))
        span = self.span(stored.storage.key)
        return span.tensor(stored.shape, stored.dtype, stored.first, None if rows else stored.stride)


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """`model.pt`: a state dict saved by `torch.save`."""
    source = SourceFile(path)
    if source.read(0, 2) != b"PK":
        raise CheckpointError(
            f"`{path}` must be a zip archive as `torch.save` has written since torch 1.6 (it is not one: cut short "
            "at the front, another format, or older); copy it again, or load and save it once with a newer torch."
        )
    tensors = {}
    with reading(path, "it is cut short, damaged, or holds more than tensors; copy it again, or export its state dict"):
        archive = Archive(source)
        if not isinstance(archive.value, dict):
            raise CheckpointError(
                f"`{path}` must hold a state dict (got {type(archive.value).__name__}); save `model.state_dict()`."
            )
        if len(archive.value) > MOST_TENSORS:
            raise CheckpointError(
                f"`{path}` must hold at most {MOST_TENSORS} tensors (got {len(archive.value)}); save "
                "`model.state_dict()` alone."
            )
        for name, value in archive.value.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise CheckpointError(
                    f"`{path}` must hold dense tensors by name (got {type(value).__name__} under {name!r}); "
                    "save `model.state_dict()` alone."
                )
            tensors[name] = archive.tensor(name, value)
    return tensors


def pickle_mentions(path: Path, *names: str) -> bool:
    """Whether a file of `torch.save` has one of these strings among its names; nothing is unpickled for it."""
    try:
        source = SourceFile(path)
        with zipfile.ZipFile(io.BufferedReader(Window(source, 0, source.size))) as archive:
            record = next(record for record in archive.infolist() if record.filename.endswith("/data.pkl"))
            stored = record.compress_type == zipfile.ZIP_STORED and record.file_size <= LARGEST_PICKLE
            text = archive.read(record) if stored else b""
    except Exception:  # of the many that a damaged or foreign file raises, each means the same
        return False
    return any(name.encode() in text for name in names)
