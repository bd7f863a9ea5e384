"""Native weight files read one tensor at a time, and never a line of code run from them.

Every reader returns a dictionary of `LazyTensor`: names, shapes and dtypes at once, data when asked. Pickles are read
by torch's `weights_only` unpickler, or, where that cannot read them (`.metadata`, key names), by one that knows the
names it may meet and builds inert records from them.
"""

import base64
import binascii
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from .errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """A tensor still on disk; `load()` reads it whole, in the dtype of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """Rows start … stop−1 of the first dimension."""
        return LazyTensor((stop - start, *self.shape[1:]), self.dtype, lambda: self.load()[start:stop])

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LazyTensor":
        """What `change`, which keeps shape and dtype, makes of it."""
        return LazyTensor(self.shape, self.dtype, lambda: change(self.load()))


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


@contextmanager
def reading(path: Path, remedy: str = "copy it again from its source") -> Iterator[None]:
    """Turns whatever a library raises over a damaged file into one error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"`{path.name}` must exist ({path} does not); {remedy}.") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"`{path}` must be readable (got: {reason}); {remedy}.") from error


def read_json(path: Path) -> dict[str, Any]:
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` must hold a JSON object (got {type(value).__name__}); copy it again.")
    return value


def member(folder: Path, name: Any) -> Path:
    """The file `name` inside `folder`, or an error when the name would lead elsewhere."""
    path = folder / str(name)
    if not isinstance(name, str) or path.parent != folder or name in ("", ".", ".."):
        raise CheckpointError(f"`{folder}` must name files of its own folder only (got {name!r}); do not trust it.")
    return path


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """`model.pt`: a state dict saved by `torch.save`, memory-mapped."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise CheckpointError(
                f"`{path}` must be a zip archive as `torch.save` has written since torch 1.6 (it is not one: cut short "
                "at the front, another format, or older); copy it again, or load and save it once with a newer torch."
            )
    with reading(path, "it is cut short, damaged, or holds more than tensors; copy it again, or export its state dict"):
        with path.open("rb") as file:
            check_sums(path, file)
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"`{path}` must hold a state dict (got {type(state).__name__}); save `model.state_dict()`."
        )
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"`{path}` must hold dense tensors by name (got {type(value).__name__} under {name!r}); "
                "save `model.state_dict()` alone."
            )
        if value.device.type != "cpu" or value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"`{path}` must hold every value of {name!r} (it has fewer, repeated or none at all); save "
                "`model.state_dict()` of contiguous weights."
            )
        tensors[name] = LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value.resolve_neg())
    return tensors


LARGEST_PICKLE = 2**26  # bytes that are looked at, of the names and shapes of a state dict


def pickle_mentions(path: Path, *names: str) -> bool:
    """Whether a file of `torch.save` has one of these strings among its names; nothing is unpickled for it."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(record for record in archive.namelist() if record.endswith("/data.pkl"))
            with archive.open(pickled) as file:
                text = file.read(LARGEST_PICKLE)
    except Exception:  # of the many that a damaged or foreign file raises, each means the same
        return False
    return any(name.encode() in text for name in names)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def check_sums(path: Path, file: BinaryIO) -> None:
    """The checksum of every record that `torch.save` wrote, which `torch.load` does not look at."""
    archive = zipfile.ZipFile(file)
    packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"`{path}` must be as `torch.save` writes it, not compressed (record {packed[0]!r} is); save it anew."
        )
    record = archive.testzip()
    file.seek(0)
    if record is not None:
        raise CheckpointError(f"`{path}` must match its own checksums (record {record!r} does not); copy it again.")


def read_safetensors(path: Path, decode: Callable[[str], str] = str) -> dict[str, LazyTensor]:
    """A safetensors file; `decode` turns its keys into tensor names."""
    tensors: dict[str, LazyTensor] = {}
    with reading(path, "it is cut short or damaged; copy it again"):
        file = safe_open(path, framework="pt")  # open for as long as a tensor refers to it
        for key in file.keys():  # noqa: SIM118  safe_open is not a mapping
            name, stored = decode(key), file.get_slice(key)
            dtype = SAFETENSORS_DTYPES.get(stored.get_dtype())
            if name in tensors:
                raise CheckpointError(f"`{path}` must hold {name!r} once (got it twice); copy it again.")
            if dtype is None:
                raise CheckpointError(
                    f"`{path}` must hold floating-point weights (got {stored.get_dtype()} in {name!r}); export them."
                )
            tensors[name] = LazyTensor(tuple(stored.get_shape()), dtype, lambda key=key: file.get_tensor(key))
    return tensors


# As Transformers names them, in the order in which it looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_weights(folder: Path) -> Path | None:
    """The weights of a Transformers folder, or their index; safetensors before pickles."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def read_weights(folder: Path) -> dict[str, LazyTensor]:
    """The weights of a Transformers folder, in one file or in the shards of an index."""
    path = find_weights(folder)
    if path is None:
        raise CheckpointError(f"`{folder}` must hold weights ({', '.join(WEIGHTS)}); copy them too.")
    index = path.with_name(f"{path.name}.index.json")
    if index.is_file():
        raise CheckpointError(f"`{folder}` must hold {path.name} or {index.name} (it holds both); move one set away.")
    read = read_safetensors if path.name.startswith("model") else read_pickle
    return read_indexed(path, read) if path.suffix == ".json" else read(path)


def read_indexed(path: Path, read: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The shards of an index `{"weight_map": {tensor: file}}`, each holding what the index says and no more."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`weight_map` of {path} must list tensors (it lists none); copy it again.")
    places = {name: member(path.parent, file_name) for name, file_name in weight_map.items()}
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(places.values())):
        if not shard.is_file():
            raise CheckpointError(f"`{shard}` must exist ({path.name} lists it); copy the folder again.")
        held = read(shard)
        astray = {name for name, place in places.items() if place == shard} ^ set(held)
        if astray:
            raise CheckpointError(
                f"`{shard}` must hold the tensors that {path.name} lists in it ({len(astray)} differ, as "
                f"{min(astray)!r}); files of two checkpoints are mixed: copy the folder again."
            )
        tensors |= held
    stem, suffix = path.name.removesuffix(".index.json").rsplit(".", 1)
    refuse_strays(path.parent, f"{stem}-*-of-*.{suffix}", {place.name for place in places.values()}, path.name)
    return tensors


class NoGlobals(pickle.Unpickler):
    """An unpickler for values that need no class: anything else in the stream is an error."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed")


def decode_pickled_key(key: str) -> str:
    """The key of OLMo's safetensors files, base64 of a pickled ((name, …), is_pickled), as a name.

    Source: allenai/OLMo docs/Safetensors.md, olmo/safetensors_util.py.
    """
    try:
        parts, is_pickled = NoGlobals(io.BytesIO(base64.urlsafe_b64decode(key))).load()
        valid = isinstance(parts, tuple) and all(isinstance(part, str) for part in parts)
    except (pickle.UnpicklingError, binascii.Error, ValueError, TypeError, EOFError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"keys must be OLMo's encoded names (got {key[:60]!r}: {error}); this is not an OLMo safetensors file."
        ) from error
    if not valid or is_pickled:
        raise CheckpointError(
            f"key {key[:60]!r} must name a plain tensor (it names a pickled value); only model weights can be read."
        )
    return ".".join(parts)


def read_flat_shards(folder: Path) -> dict[str, LazyTensor]:
    """The shards of ai2-olmo-core 0.1: `metadata.json` and `rank_R.safetensors`, holding flat slices of tensors."""
    index_path = folder / "metadata.json"
    entries = read_json(index_path).get("tensors")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"`{index_path}` must list `tensors` (it lists none); copy it again.")
    with reading(index_path):
        shapes = {name: tuple(int(size) for size in entry["shape"]) for name, entry in entries.items()}
        spans = {name: flat_spans(entry) for name, entry in entries.items()}
    file_names = sorted({file_name for by_file in spans.values() for file_name in by_file})
    shards = {file_name: read_safetensors(member(folder, file_name)) for file_name in file_names}
    refuse_strays(folder, "*.safetensors", shards, index_path.name)

    tensors = {}
    for name, shape in shapes.items():
        pieces = []
        for file_name, held in spans[name].items():
            length = sum(stop - start for start, stop in held)
            piece = shards[file_name].get(name)
            if length == 0:
                continue
            if piece is None or math.prod(piece.shape) != length:
                got = "nothing" if piece is None else f"{math.prod(piece.shape)} values"
                raise CheckpointError(
                    f"`{folder / file_name}` must hold {length} values of {name!r} (got {got}); its shards are cut "
                    "short or of another checkpoint: copy them again together."
                )
            pieces.append((held, piece))
        ordered = sorted(span for held, _ in pieces for span in held)
        if [0, *(stop for _, stop in ordered)] != [*(start for start, _ in ordered), math.prod(shape)]:
            raise CheckpointError(
                f"`{index_path}` must cover {name!r} of shape {shape} once (its slices are {ordered[:4]} …); a rank is "
                "missing, or the index is of another checkpoint: copy them again together."
            )
        if len({piece.dtype for _, piece in pieces}) != 1:
            raise CheckpointError(f"`{folder}` must hold {name!r} in one dtype; copy its shards again together.")
        tensors[name] = LazyTensor(
            shape, pieces[0][1].dtype, lambda shape=shape, pieces=pieces: join_flat(shape, pieces)
        )
    return tensors


def flat_spans(entry: Mapping[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """[(start, stop), …] by file, of one entry of `metadata.json`, in either form that ai2-olmo-core 0.1 writes."""
    by_file = entry.get("shard_spec_per_file")
    if by_file is not None:
        offsets = {name: spec["flattened_offsets"] for name, spec in by_file.items()}
    else:
        offsets = entry["flattened_offsets_per_file"]
    by_name = {}
    for name, spans in offsets.items():
        spans = [spans] if spans and isinstance(spans[0], int) else spans
        by_name[name] = [(int(start), int(stop)) for start, stop in spans if stop > start]
    return by_name


def join_flat(shape: tuple[int, ...], pieces: list[tuple[list[tuple[int, int]], LazyTensor]]) -> torch.Tensor:
    whole = torch.empty(math.prod(shape), dtype=pieces[0][1].dtype)
    for spans, piece in pieces:
        values, taken = piece.load().reshape(-1), 0
        for start, stop in spans:
            whole[start:stop] = values[taken : taken + stop - start]
            taken += stop - start
    return whole.view(shape)


def refuse_strays(folder: Path, pattern: str, known: Mapping[str, Any] | set[str], index_name: str) -> None:
    strays = sorted({path.name for path in folder.glob(pattern)} - set(known))
    if strays:
        raise CheckpointError(
            f"`{folder / strays[0]}` must be listed in `{index_name}` (it is not); files of two checkpoints are "
            "mixed: move what does not belong here away."
        )


class Record:
    """An inert stand-in for a pickled object: its state, nothing else."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def first_argument(*arguments: Any) -> Any:
    return arguments[0] if arguments else None


# All that a `.metadata` of torch.distributed.checkpoint may name, by OLMo-core 1.8 to 3.0 and torch 2.x; the classes
# become records, so that not even their own unpickling code runs.
METADATA_GLOBALS: dict[str, Any] = {
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
    "torch.Size": tuple,
    "collections.OrderedDict": dict,
    "pathlib.PosixPath": first_argument,  # the folder that it was written to
    "pathlib.WindowsPath": first_argument,
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
}


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in METADATA_GLOBALS:
            raise CheckpointError(
                f"`.metadata` must name classes of torch.distributed.checkpoint only (got {name}); the file is not a "
                "checkpoint's, do not load it with the native code either."
            )
        return METADATA_GLOBALS[name]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it starts, its sizes, and the bytes of one file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


def read_distributed(folder: Path, prefix: str = "model.") -> dict[str, LazyTensor]:
    """The model weights of a torch.distributed.checkpoint folder: `.metadata` and `__R_I.distcp`.

    Keys that start with `prefix` are taken, without it; a folder written from a bare state dict has no prefix.
    """
    path = folder / ".metadata"
    with reading(path), path.open("rb") as file:
        metadata = MetadataUnpickler(file).load()
        entries = {str(name): entry for name, entry in metadata.state_dict_metadata.items()}
        storage = {
            (index.fqn, tuple(getattr(index, "offset", None) or ())): (
                str(info.relative_path),
                int(info.offset),
                int(info.length),
            )
            for index, info in metadata.storage_data.items()
        }
    refuse_strays(folder, "*.distcp", {relative for relative, _, _ in storage.values()}, path.name)
    names = [name for name in entries if name.startswith(prefix)]
    if not names:
        prefix, names = "", [name for name in entries if not name.startswith("optim.")]
    tensors = {}
    for name in names:
        if not hasattr(entries[name], "chunks"):
            raise CheckpointError(f"`{path}` must hold tensors only (got a pickled value {name!r}); re-save the model.")
        with reading(path):
            shape = tuple(int(size) for size in entries[name].size)
            dtype = metadata_dtype(entries[name].properties)
            boxes = [(tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))) for chunk in entries[name].chunks]
            chunks = [locate(folder, name, box, dtype, storage) for box in boxes if math.prod(box[1]) > 0]
            check_cover(path, name, shape, chunks)
        tensors[name.removeprefix(prefix)] = LazyTensor(
            shape,
            dtype,
            lambda name=name, shape=shape, dtype=dtype, chunks=chunks: join_chunks(name, shape, dtype, chunks),
        )
    if not tensors:
        raise CheckpointError(f"`{path}` must list the model's tensors (it lists none); copy the folder again.")
    return tensors


def locate(
    folder: Path,
    name: str,
    box: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    storage: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]],
) -> Chunk:
    """The bytes that hold one box (offsets, sizes) of a tensor, checked to be there."""
    offsets, sizes = box
    if (name, offsets) not in storage:
        raise CheckpointError(f"`{folder / '.metadata'}` must locate {name!r} at {offsets}; copy the folder again.")
    relative_path, start, length = storage[name, offsets]
    path = member(folder, relative_path)
    if not path.is_file():
        raise CheckpointError(f"`{path}` must exist (it holds part of {name!r}); copy the folder again.")
    available, needed = path.stat().st_size, math.prod(sizes) * dtype.itemsize
    if start < 0 or start + length > available or length < needed:
        raise CheckpointError(
            f"`{path}` must hold {needed} bytes of {name!r} at {start} (the file has {available}); it is cut short or "
            "of another checkpoint: copy the folder again."
        )
    return Chunk(offsets, sizes, path, start, length)


def metadata_dtype(properties: Any) -> torch.dtype:
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}")
    return dtype


def check_cover(path: Path, name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Chunks must lie inside the tensor, be of its dimensions, and add up to it. Two that overlap leave a gap, which
    `join_chunks` finds."""
    inside = all(
        len(chunk.sizes) == len(chunk.offsets) == len(shape)
        and all(o >= 0 and o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True))
        for chunk in chunks
    )
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not inside or covered != math.prod(shape):
        raise CheckpointError(
            f"`{path}` must cover {name!r} of shape {shape} once (its chunks hold {covered} values of "
            f"{math.prod(shape)}); a rank's chunks are missing or doubled: copy the folder again."
        )


def join_chunks(name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[Chunk]) -> torch.Tensor:
    whole = torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.empty(shape, dtype=dtype)
    for chunk in chunks:
        with reading(chunk.path, "it is damaged; copy the folder again"):
            with chunk.path.open("rb") as file:
                file.seek(chunk.start)
                blob = io.BytesIO(file.read(chunk.length))
            check_sums(chunk.path, blob)
            values = torch.load(blob, map_location="cpu", weights_only=True)
            if not isinstance(values, torch.Tensor) or tuple(values.shape) != chunk.sizes or values.dtype != dtype:
                got = (
                    f"{values.dtype} {tuple(values.shape)}"
                    if isinstance(values, torch.Tensor)
                    else type(values).__name__
                )
                raise CheckpointError(
                    f"`{chunk.path}` must hold {dtype} {chunk.sizes} of {name!r} (got {got}); files of two "
                    "checkpoints are mixed: copy the folder again."
                )
        whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] = values
    return whole
