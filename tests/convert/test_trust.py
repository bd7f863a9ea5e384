"""What is checked is what is used: no input costs more than its size, and nothing is another one when it is read."""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.checkpoints import copy_source, load_weights, options
from convert.writers import olmo_state, write_olmo, write_olmo_core
from olmem_convert import CheckpointError, convert
from olmem_convert.reading import plain
from olmem_convert.reading.archives import STATE_DICT_NAMES, read_pickle
from olmem_convert.reading.distributed import METADATA_NAMES
from olmem_convert.reading.pickles import unpickle
from olmem_convert.reading.plain import SourceFile
from olmem_convert.reading.texts import read_json, read_yaml
from olmem_convert.reading.weight_files import read_flat_shards, read_safetensors
from safetensors.torch import save_file


def cost(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the processor and bytes that it takes, in a process of its own, to be refused."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            run()
            said = "accepted"
        except CheckpointError:
            said = "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:500]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, json.dumps([said, time.process_time() - started, (after - before) * 1024]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said, seconds, nbytes = json.loads(os.read(reader, 2**16))
    os.close(reader)
    os.close(writer)
    assert said == "refused", said
    return seconds, nbytes


# Objects


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


SIZES = b"\x80\x02(" + b"K\x01" * 64 + b"t\x85q\x000ctorch\nSize\nq\x010("


def unpickled(data: bytes) -> None:
    try:
        unpickle(data, STATE_DICT_NAMES | METADATA_NAMES)
    except pickle.UnpicklingError as error:
        raise CheckpointError(str(error)) from None


COSTLY: dict[str, Callable[[Path], object]] = {
    "4 MB of sizes of 64 numbers": lambda path: unpickled(SIZES + b"h\x01h\x00R" * 800_000 + b"t."),
    "the same in lists": lambda path: unpickled(SIZES + b"]" + b"h\x01h\x00Ra" * 650_000 + b"t."),
    "32 MB of empty dictionaries": lambda path: unpickled(b"\x80\x02(" + b"}" * 2**25 + b"t."),
    "32 MB of empty dictionaries in a list": lambda path: unpickled(b"\x80\x02]" + (b"(" + b"}" * 1000 + b"e") * 2**15),
    "32 MB of marks": lambda path: unpickled(b"\x80\x02" + b"(" * 2**25 + b"."),
    "32 MB of None": lambda path: unpickled(b"\x80\x02" + b"N" * 2**25 + b"."),
    "48 MB of empty objects in metadata.json": lambda path: read_flat_shards(
        write(path / "metadata.json", '{"tensors": {"w": [' + "{}," * 2**24 + "{}]}}").parent
    ),
    "16 MB of empty objects in config.json": lambda path: read_json(
        write(path / "config.json", '{"a": [' + "{}," * 5_000_000 + "{}]}")
    ),
    "a name of 15 MB in config.json": lambda path: read_json(
        write(path / "config.json", json.dumps({"x" * 15_000_000: 1}))
    ),
    "100,000 directives in config.yaml": lambda path: read_yaml(
        write(path / "config.yaml", "".join(f"%TAG !{i}! x\n" for i in range(100_000)) + "---\na: 1\n")
    ),
    "a header of 50 MB": lambda path: read_safetensors(
        write(path / "model.safetensors", struct.pack("<Q", 5 * 10**7) + b"{" + b" " * 5 * 10**7)
    ),
    "a header of 300,000 tensors": lambda path: read_safetensors(
        write(path / "model.safetensors", headed({f"{i}": [0, 0] for i in range(300_000)}))
    ),
}


def headed(offsets: dict[str, list[int]]) -> bytes:
    entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": held} for name, held in offsets.items()}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("what", COSTLY)
def test_what_costs_far_more_than_its_size_is_refused(what, tmp_path):
    """These took up to 2.9 GB and 72 s."""
    seconds, nbytes = cost(lambda: COSTLY[what](tmp_path))
    print(what, round(seconds, 2), nbytes >> 20)
    assert seconds < 10 and nbytes < 2**30, (seconds, nbytes)


def test_indexes_of_thousands_of_ranks_are_read():
    """Their pickles take fifteen times their size, by the count."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    held = {MetadataIndex("w", torch.Size((i, 0)), i): _StorageInfo(f"__{i}_0.distcp", i, 9) for i in range(20_000)}
    assert len(unpickle(pickle.dumps(held), METADATA_NAMES)) == 20_000


@pytest.mark.parametrize("name", ["a", "x" * 5000])
def test_keys_twice_or_too_long_in_json(name, tmp_path):
    """The last one counted here, and the first one elsewhere."""
    text = f'{{"{name}": 1, "{name}": 2}}' if len(name) == 1 else json.dumps({name: 1})
    with pytest.raises(CheckpointError, match="twice" if len(name) == 1 else "a name of more than 4,096 signs"):
        read_json(write(tmp_path / "config.json", text))


# Records


def zipped(records: list[tuple[str, int, int, int]], data: bytes) -> bytes:
    """An archive whose directory says of each record its name, its first byte, its length and its checksum."""
    directory = b""
    for name, offset, length, crc in records:
        fields = (20, 20, 0, 0, 0, 0, crc, length, length, len(name), 0, 0, 0, 0, 0, offset)
        directory += b"PK\1\2" + struct.pack("<6H3I5H2I", *fields) + name.encode()
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(data), 0)
    return data + directory + end


def record(name: str, content: bytes) -> bytes:
    crc = zlib.crc32(content)
    fields = (20, 0, 0, 0, 0, crc, len(content), len(content), len(name), 0)
    return b"PK\3\4" + struct.pack("<5H3I2H", *fields) + name.encode() + content


def nested(number: int, size: int) -> tuple[list[tuple[str, int, int, int]], bytes]:
    """Records of which each contains all later ones, with valid checksums."""
    content = bytes(size)
    found: list[tuple[str, int, int, int]] = []
    for index in reversed(range(number)):
        name = f"archive/data/{index}"
        made = record(name, content)
        found = [(other, offset + 30 + len(name), length, crc) for other, offset, length, crc in found]
        found.insert(0, (name, 0, len(content), zlib.crc32(content)))
        content = made
    return found, content


def test_records_that_contain_one_another_are_refused(tmp_path):
    """336 KB were read as 60 MB."""
    places, data = nested(20, 4096)
    state = pickle.dumps({}, 2)
    first = record("archive/data.pkl", state)
    places = [(name, offset + len(first), length, crc) for name, offset, length, crc in places]
    places.insert(0, ("archive/data.pkl", 0, len(state), zlib.crc32(state)))
    path = write(tmp_path / "model.pt", zipped(places, first + data))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 21
    with pytest.raises(CheckpointError, match="bytes of its own"):
        read_pickle(path)


def test_records_whose_extra_fields_reach_into_the_next_are_refused(tmp_path):
    torch.save({"a": torch.arange(64.0), "b": torch.arange(64.0)}, tmp_path / "model.pt")
    data = bytearray((tmp_path / "model.pt").read_bytes())
    at = data.index(b"data/0") - len("model/") - 30
    data[at + 28 : at + 30] = struct.pack("<H", struct.unpack("<H", data[at + 28 : at + 30])[0] + 128)
    with pytest.raises(CheckpointError, match="reaches into the next one"):
        read_pickle(write(tmp_path / "model.pt", bytes(data)))["a"].load()


def test_records_outside_the_part_of_a_file_that_is_theirs(tmp_path):
    """A chunk's archive lies between others in its file, whose bytes are not its own."""
    source_folder = write_olmo_core(tmp_path / "source")
    path = source_folder / "model_and_optim" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    length = struct.unpack("<I", data[at + 24 : at + 28])[0]
    data[at + 20 : at + 28] = struct.pack("<II", length + 10**4, length + 10**4)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        convert(source_folder, tmp_path / "out", verify=False)


def sharing(tmp_path: Path) -> Path:
    """A state dict whose layers all share the numbers of the first one."""
    state, layers = olmo_state(), 30
    shared = {
        name.replace("blocks.0.", f"blocks.{layer}."): value for name, value in state.items() for layer in range(layers)
    }
    return write_olmo(tmp_path / "source", "model.pt", shared, n_layers=layers)


def test_tensors_that_share_their_numbers_must_be_asked_for(tmp_path):
    """526 MB were written from 3 MB without a word."""
    folder, lines = sharing(tmp_path), []
    with pytest.raises(CheckpointError, match=r"at most 2 times what its files hold .*--allow-growth"):
        convert(folder, tmp_path / "out", verify=False, say=lines.append)
    assert sorted(os.listdir(tmp_path)) == ["source"]
    convert(folder, tmp_path / "out", verify=False, allow_growth=True, say=lines.append)
    written = sum(value.numel() * 4 for value in load_weights(tmp_path / "out").values())
    assert f"writing {written:,} bytes of weights in 1 file, as float32" in lines


# Files that are swapped


@pytest.mark.parametrize(
    "name", ["olmo", "olmo_safetensors", "olmo_core", "legacy_sharded_olmo_core_2rank", "baka_pristine"]
)
@pytest.mark.parametrize("how", ["a link", "a copy", "a change", "a removal"])
def test_a_weight_file_that_is_swapped_after_it_was_checked(how, name, tmp_path):
    """What was converted was the other file, which nobody had checked; `--no-verify` said nothing."""
    folder = copy_source(name, tmp_path / "source")
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    other = write(tmp_path / "other", bytes(path.stat().st_size))

    def swap(line: str) -> None:
        if not line.startswith("writing"):
            return
        if how == "a change":
            with path.open("r+b") as file:
                file.seek(-1, io.SEEK_END)
                file.write(b"\1")
            return
        path.unlink()
        if how == "a link":
            path.symlink_to(other)
        elif how == "a copy":
            shutil.copy(other, path)

    with pytest.raises(CheckpointError, match=r"must stay as it is while it is read|its own checksums"):
        convert(folder, tmp_path / "out", verify=False, say=swap, **options(name))
    assert not (tmp_path / "out").exists()


def test_a_name_that_becomes_a_link_is_not_followed(monkeypatch, tmp_path):
    path, other = write(tmp_path / "a", b"own"), write(tmp_path / "b", b"other")
    checked = plain.require_plain

    def swapped(*arguments):
        checked(*arguments)
        path.unlink()
        path.symlink_to(other)
        return path

    monkeypatch.setattr(plain, "require_plain", swapped)
    monkeypatch.setattr(os.path, "realpath", lambda path, strict=False: str(path))
    with pytest.raises(CheckpointError, match="must be readable"):
        SourceFile(path)


def test_more_files_than_may_be_open(monkeypatch, tmp_path):
    monkeypatch.setattr(plain, "MOST_OPEN", 3)
    files = [SourceFile(write(tmp_path / str(i), bytes([i]) * 9)) for i in range(8)]
    before = len(os.listdir("/proc/self/fd"))
    assert [file.read(4, 2) for file in files] == [bytes([i, i]) for i in range(8)]
    assert len(os.listdir("/proc/self/fd")) <= before
    (tmp_path / "0").unlink()
    write(tmp_path / "0", b"replaced!")
    with pytest.raises(CheckpointError, match="must stay as it is"):
        files[0].read(0, 1)


def test_values_are_read_from_the_file_that_was_opened(tmp_path):
    save_file({"w": torch.arange(8.0)}, tmp_path / "w.safetensors")
    tensor = read_safetensors(tmp_path / "w.safetensors")["w"]
    (tmp_path / "w.safetensors").rename(tmp_path / "kept")
    save_file({"w": torch.zeros(8)}, tmp_path / "w.safetensors")
    assert torch.equal(tensor.load(), torch.arange(8.0))
    [file] = tensor.sources
    with pytest.raises(CheckpointError, match="was changed or replaced"):
        file.require_same()
