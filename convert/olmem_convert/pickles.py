"""Pickles read without a line of them being run: what `torch.save` writes, OLMo's key names.

A pickle is a program of a small machine. `InertUnpickler` knows those of its instructions that such files use and the
names that its caller lists, which stand for plain values and records; of anything else it makes an error. Memory and
time stay in proportion to the file, whatever sizes it claims.
"""

import base64
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CheckpointError
from .files import reading, require_plain
from .tensors import LazyTensor, Span

LONGEST_KEY = 2**12  # characters of a key of a dictionary
LARGEST_PICKLE = 2**28  # bytes; the names and shapes of 100,000 tensors take 2**25
MOST_TENSORS = 50_000  # of a state dict; the largest model that converts has a thousand
MOST_DIMENSIONS = 64  # of a tensor, in torch too
INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)


class Record:
    """An inert stand-in for a pickled object: its state, nothing else."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__ = state  # not a copy: an index has hundreds of thousands
        else:
            self.state = state


class Names(dict):
    """In place of OrderedDict, whose attributes (`_metadata` of a state dict) do not matter."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


def plain_key(key: Any) -> Any:
    """A key of a dictionary. Others take for ever to hash, as tuples of tuples do, each twice in the next, or to find,
    as large numbers of one hash."""
    if type(key) is Record or (type(key) is str and len(key) <= LONGEST_KEY) or (type(key) is int and 0 <= key < 2**32):
        return key
    raise pickle.UnpicklingError(f"a {type(key).__name__} is a key of a dictionary")


def plain_size(values: Any) -> tuple[Any, ...]:
    """In place of torch.Size; no more dimensions than torch has, so that copies do not add up."""
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a size is no tuple of a tensor's dimensions")
    return tuple(values)


InPython: Any = pickle._Unpickler  # the one written in Python, whose instructions can be chosen


class InertUnpickler(InPython):
    """`names` is all that it may name; `load_storage` makes something of persistent ids."""

    dispatch = {  # noqa: RUF012  as in the class it derives from
        code: InPython.dispatch[code] for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS.split())
    }

    def __init__(self, file: BinaryIO, names: Mapping[str, Any], load_storage: Callable[[Any], Any] | None = None):
        super().__init__(file)
        self.names, self.load_storage = names, load_storage

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self.names:
            raise pickle.UnpicklingError(
                f"it names {name}, which no tensor needs: do not load it with other code either"
            )
        return self.names[name]

    def persistent_load(self, pid: Any) -> Any:
        if self.load_storage is None:
            raise pickle.UnpicklingError("persistent ids have no place here")
        return self.load_storage(pid)

    def set_items(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if not isinstance(held, dict):
            raise pickle.UnpicklingError(f"items are set in a {type(held).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            held[plain_key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (Record, Names):
            raise pickle.UnpicklingError(f"a {type(self.stack[-1]).__name__} is given a state")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def unpickle(data: bytes, names: Mapping[str, Any], load_storage: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle makes, or UnpicklingError."""
    try:
        return InertUnpickler(io.BytesIO(data), names, load_storage).load()
    except pickle.UnpicklingError:
        raise
    except KeyError as error:
        raise pickle.UnpicklingError(f"an instruction or a memo is unknown ({error})") from error
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def decode_pickled_key(key: str) -> str:
    """The key of OLMo's safetensors files, base64 of a pickled ((name, …), is_pickled), as a name.

    Source: allenai/OLMo docs/Safetensors.md, olmo/safetensors_util.py.
    """
    try:
        if len(key) > 4 * LONGEST_KEY:
            raise ValueError(f"it has {len(key):,} signs")
        value = unpickle(base64.urlsafe_b64decode(key), {})
    except Exception as error:  # of the many that damaged pickles raise, each means the same
        raise CheckpointError(
            f"keys must be OLMo's encoded names (got {key[:60]!r}: {error}); this is not an OLMo safetensors file."
        ) from error
    parts, is_pickled = value if isinstance(value, tuple) and len(value) == 2 else (None, True)
    if not isinstance(parts, tuple) or is_pickled is not False or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(
            f"key {key[:60]!r} must name a plain tensor (it names a pickled value); only model weights can be read."
        )
    if sum(map(len, parts)) > LONGEST_KEY:
        raise CheckpointError(
            f"key {key[:60]!r} must name a tensor in {LONGEST_KEY:,} signs (it does not); copy it again."
        )
    return ".".join(parts)


# What `torch.save` writes


@dataclass(frozen=True)
class Storage:
    """A file of the archive, and the dtype of its numbers; of untyped ones none."""

    key: str
    dtype: torch.dtype | None


@dataclass(frozen=True)
class StoredTensor:
    storage: Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def load_storage(pid: Any) -> Storage:
    kind, dtype, key, _, _ = pid
    if kind != "storage" or not isinstance(dtype, torch.dtype | None) or not isinstance(key, str):
        raise pickle.UnpicklingError("a storage is of another kind")
    return Storage(key, dtype)


def rebuild_tensor(
    storage: Any, first: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, flags: Any = None
) -> StoredTensor:
    return rebuild_typed(storage, first, shape, stride, requires_grad, hooks, storage.dtype, flags)


def rebuild_typed(
    storage: Any, first: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> StoredTensor:
    if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError(f"a tensor has more than {MOST_DIMENSIONS} dimensions, or not as many strides")
    numbers = (first, *shape, *stride)
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor is not put together as torch does it")
    if flags or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise pickle.UnpicklingError("a tensor is conjugated, negated or of impossible sizes")
    return StoredTensor(storage, first, tuple(shape), tuple(stride), dtype)


def rebuild_nothing(dtype: Any, shape: Any, stride: Any, requires_grad: Any) -> StoredTensor:
    return rebuild_tensor(Storage("of the device meta, which holds nothing", dtype), 0, shape, stride)


def rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def rebuild_subclass(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if rebuild not in (rebuild_tensor, rebuild_typed):
        raise pickle.UnpicklingError("a tensor is of a class of its own")
    return rebuild(*arguments)


DTYPES = {
    **{f"{name}Storage": getattr(torch, name.lower()) for name in ("Double", "Float", "Half", "Long", "Int", "Short")},
    **{"BFloat16Storage": torch.bfloat16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    "BoolStorage": torch.bool,
}
TORCH_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# All that a state dict of torch 1.6 and later may name; the functions become those above.
STATE_DICT_NAMES: dict[str, Any] = {
    "collections.OrderedDict": Names,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed,
    "torch._utils._rebuild_meta_tensor_no_storage": rebuild_nothing,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
    "torch.nn.parameter.Parameter": None,
    "torch.Tensor": None,
    "torch.storage.UntypedStorage": None,
    "torch.Size": plain_size,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **TORCH_DTYPES,
}


class Window(io.RawIOBase):
    """Bytes start … start+length−1 of an open file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

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
        self.file.seek(self.start + self.position)
        read = self.file.readinto(memoryview(buffer)[: max(self.length - self.position, 0)])  # type: ignore[attr-defined]
        self.position += read
        return read


class Archive:
    """A zip archive of `torch.save`, alone in a file or a part of it: `value` is what it holds, tensors unread."""

    def __init__(self, path: Path, start: int = 0, length: int | None = None):
        self.path, self.start = path, start
        self.spans: dict[str, Span] = {}
        length = path.stat().st_size if length is None else length
        with path.open("rb") as file:
            window = io.BufferedReader(Window(file, start, length))
            with zipfile.ZipFile(window) as archive:
                self.records = self.index(archive)
                self.value = unpickle(self.pickled(archive), STATE_DICT_NAMES, load_storage)

    def index(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        records: dict[str, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise CheckpointError(
                    f"`{self.path}` must be as `torch.save` writes it, not compressed (record {record.filename!r} is); "
                    "save it anew."
                )
            if record.filename in records:
                raise CheckpointError(
                    f"`{self.path}` must hold {record.filename!r} once (got it twice); copy it again."
                )
            records[record.filename] = record
        return records

    def pickled(self, archive: zipfile.ZipFile) -> bytes:
        names = [name for name in self.records if name.endswith("/data.pkl")]
        if len(names) != 1 or self.records[names[0]].file_size > LARGEST_PICKLE:
            raise CheckpointError(
                f"`{self.path}` must hold one data.pkl of at most {LARGEST_PICKLE} bytes, as `torch.save` writes it "
                f"(got {len(names)}); save it anew."
            )
        self.prefix = names[0].removesuffix("data.pkl")
        order = self.records.get(f"{self.prefix}byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise CheckpointError(f"`{self.path}` must hold numbers in little-endian order; save it on such a machine.")
        return archive.read(names[0])

    def span(self, key: str) -> Span:
        """Where the bytes of a storage are, found when they are first read."""
        if key not in self.spans:
            with reading(self.path):
                self.spans[key] = self.find(key)
        return self.spans[key]

    def find(self, key: str) -> Span:
        """After the record's own header, whose name and extra field may be of any length."""
        record = self.records[f"{self.prefix}data/{key}"]
        with self.path.open("rb") as file:
            file.seek(self.start + record.header_offset)
            header = struct.unpack("<4s22xHH", file.read(30))
            name = file.read(header[1])
        if header[0] != b"PK\3\4" or name != record.orig_filename.encode():
            raise ValueError(f"record {record.filename!r} is not where the archive says")
        start = self.start + record.header_offset + 30 + header[1] + header[2]
        if start + record.file_size > self.path.stat().st_size:
            raise ValueError(f"record {record.filename!r} is cut short")
        return Span(self.path, start, record.file_size, record.CRC)

    def tensor(self, name: str, stored: StoredTensor, *, apart: bool = False) -> LazyTensor:
        """The tensor, once every number of it is known to be there; `apart` from the archive, which it lets go."""
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
            return LazyTensor.whole(stored.shape, stored.dtype, lambda: torch.empty(stored.shape, dtype=stored.dtype))
        shape, dtype, first, stride = stored.shape, stored.dtype, stored.first, stored.stride
        span = partial(self.span, stored.storage.key)
        if apart:
            found = span()
            span = lambda: found  # noqa: E731
        if first or extent * dtype.itemsize != (record.file_size if record else 0):
            span = checked(span)
        if all(stride == math.prod(size for size, _ in steps[i + 1 :]) for i, (_, stride) in enumerate(steps)):
            return LazyTensor(shape, dtype, lambda *rows: span().rows(shape, dtype, first, *rows))
        return LazyTensor.whole(shape, dtype, lambda: span().values(first, extent, dtype).as_strided(shape, stride))


def checked(find: Callable[[], Span]) -> Callable[[], Span]:
    """For a tensor that is a part of its storage: reading it never comes to the end, where the checksum is compared."""

    def found() -> Span:
        span = find()
        span.check()
        return span

    return found


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """`model.pt`: a state dict saved by `torch.save`."""
    with require_plain(path).open("rb") as file:
        if file.read(2) != b"PK":
            raise CheckpointError(
                f"`{path}` must be a zip archive as `torch.save` has written since torch 1.6 (it is not one: cut short "
                "at the front, another format, or older); copy it again, or load and save it once with a newer torch."
            )
    tensors = {}
    with reading(path, "it is cut short, damaged, or holds more than tensors; copy it again, or export its state dict"):
        archive = Archive(path)
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
        with zipfile.ZipFile(require_plain(path)) as archive:
            record = next(record for record in archive.infolist() if record.filename.endswith("/data.pkl"))
            stored = record.compress_type == zipfile.ZIP_STORED and record.file_size <= LARGEST_PICKLE
            text = archive.read(record) if stored else b""
    except Exception:  # of the many that a damaged or foreign file raises, each means the same
        return False
    return any(name.encode() in text for name in names)
