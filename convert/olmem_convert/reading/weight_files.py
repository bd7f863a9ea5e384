"""Safetensors files, single, in the shards of an index, or holding slices of tensors; and Transformers' folders.

The library checks a file's header, sizes and offsets; its bytes are then read without mapping the file, so that what
has been read does not stay in memory.
"""

import base64
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import CheckpointError
from .archives import MOST_TENSORS, read_pickle
from .pickles import LONGEST_KEY, unpickle
from .plain import SourceFile, member, reading, refuse_strays
from .tensors import LazyTensor, Span
from .texts import parse_json, read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_safetensors(path: Path, decode: Callable[[str], str] = str) -> dict[str, LazyTensor]:
    """A safetensors file; `decode` turns its keys into tensor names."""
    tensors: dict[str, LazyTensor] = {}
    with reading(path, "it is cut short, damaged, or no file of weights: copy it again, or save it anew"):
        source = SourceFile(path)
        for key, entry in read_header(source).items():
            name, dtype, shape = decode(key), DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if name in tensors:
                raise CheckpointError(
                    f"`{path}` must hold {name!r} once (got it twice, encoded in two ways); save it anew."
                )
            if dtype is None:
                raise CheckpointError(
                    f"`{path}` must hold floating-point weights (got {entry['dtype']} in {name!r}); export them."
                )
            tensors[name] = Span(source, entry["start"], math.prod(shape) * dtype.itemsize).tensor(shape, dtype)
    return tensors


LARGEST_HEADER = 2**24  # bytes; a hundred thousand tensors take as many
MOST_HEADER_VALUES = 2**20


def read_header(source: SourceFile) -> dict[str, dict[str, Any]]:
    """What the header says of each tensor, with `start`, its first byte in the file.

    The library checks the file that now has this name, the code below what was opened, which is what is read.
    """
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > LARGEST_HEADER:
        raise ValueError(f"its header has more than {LARGEST_HEADER:,} bytes")
    text = source.read(8, length)
    header = parse_json(text.decode("utf-8"), source.path, MOST_HEADER_VALUES)
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it names more than {MOST_TENSORS:,} tensors")
    with safe_open(source.path, framework="pt") as file:
        if set(header) != set(file.keys()):
            raise ValueError("its header can be read in two ways")
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        width = DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else None
        if start != end or (width is not None and stop - start != math.prod(entry["shape"]) * width):
            raise ValueError("its tensors do not lie one after another, or are not of their sizes")
        end = stop
    if 8 + length + end != source.size:
        raise ValueError(f"its header tells of {8 + length + end:,} bytes, and it has {source.size:,}")
    return {key: entry | {"start": 8 + length + entry["data_offsets"][0]} for key, entry in header.items()}


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
            f"key {key[:60]!r} must name a tensor in {LONGEST_KEY:,} signs (it does not); save it with shorter ones."
        )
    return ".".join(parts)


MOST_SPANS = 2**14  # of a tensor in a file; FSDP has one


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
        raise CheckpointError(f"`weight_map` of {path} must list tensors (it lists none); save the model anew.")
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


# Of metadata.json, which lists each slice of each rank: bytes, and values.
LARGEST_INDEX, MOST_INDEX_VALUES = 2**26, 2**21


def read_flat_shards(folder: Path) -> dict[str, LazyTensor]:
    """The shards of ai2-olmo-core 0.1: `metadata.json` and `rank_R.safetensors`, holding flat slices of tensors."""
    index_path = folder / "metadata.json"
    entries = read_json(index_path, LARGEST_INDEX, MOST_INDEX_VALUES).get("tensors")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"`{index_path}` must list `tensors` (it lists none); name a checkpoint that is whole.")
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
            raise CheckpointError(
                f"`{folder}` must hold {name!r} in one dtype (its shards have several); save it in one."
            )
        tensors[name] = LazyTensor(
            shape,
            pieces[0][1].dtype,
            lambda start, stop, shape=shape, pieces=pieces: join_flat(shape, pieces, start, stop),
            sources=frozenset[SourceFile]().union(*(piece.sources for _, piece in pieces)),
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
        if len(spans) > MOST_SPANS:
            raise ValueError(f"a file has more than {MOST_SPANS:,} pieces of a tensor")
        by_name[name] = [(int(start), int(stop)) for start, stop in spans if stop > start]
    return by_name


def join_flat(
    shape: tuple[int, ...], pieces: list[tuple[list[tuple[int, int]], LazyTensor]], start: int, stop: int
) -> torch.Tensor:
    """Rows start … stop−1, of all slices that have some of their values."""
    size = math.prod(shape[1:])
    begin, end = start * size, stop * size
    whole = torch.empty(end - begin, dtype=pieces[0][1].dtype)
    for spans, piece in pieces:
        passed = 0
        for lower, upper in spans:
            first, last = max(lower, begin), min(upper, end)
            if first < last:
                whole[first - begin : last - begin] = flat_values(piece, passed + first - lower, passed + last - lower)
            passed += upper - lower
    return whole.view(stop - start, *shape[1:]) if shape else whole.view(())


def flat_values(tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """Values start … stop−1 of a tensor of any shape, row after row."""
    size = math.prod(tensor.shape[1:])
    first = start // size
    return tensor.read(first, -(-stop // size)).reshape(-1)[start - first * size : stop - first * size]
