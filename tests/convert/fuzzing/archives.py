"""Zip archives as `torch.save` writes them, taken apart and put together wrongly, with checksums that fit."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import torch
from convert.fuzzing.pickles import HUGE, mutate_pickle
from convert.fuzzing.seeds import saved

ALIGNMENT = 64
BOMBS = (2**24, 2**28)  # bytes, once unpacked


@dataclass(frozen=True)
class Record:
    """One file of an archive; what is not None stands in its headers in place of the truth."""

    name: bytes
    data: bytes
    method: int = 0
    packed: bytes | None = None  # as stored, when `method` packs
    size: int | None = None
    packed_size: int | None = None
    offset: int | None = None
    crc: int | None = None
    flags: int = 0
    local_name: bytes | None = None
    zip64: bool = False


def records_of(data: bytes) -> list[Record]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Record(entry.filename.encode(), archive.read(entry)) for entry in archive.infolist()]


def zipped(
    records: list[Record],
    count: int | None = None,
    directory_shift: int = 0,
    comment: bytes = b"",
    prefix: bytes = b"",
    zip64_end: int | None = None,
) -> bytes:
    out, directory = bytearray(prefix), bytearray()
    for record in records:
        stored = record.data if record.packed is None else record.packed
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        size = len(record.data) if record.size is None else record.size
        packed_size = len(stored) if record.packed_size is None else record.packed_size
        offset = len(out) if record.offset is None else record.offset
        wide = record.zip64 or max(size, packed_size, offset) >= 2**32
        shown = (0xFFFFFFFF,) * 3 if wide else (packed_size & 0xFFFFFFFF, size & 0xFFFFFFFF, offset & 0xFFFFFFFF)
        extra = struct.pack("<HHQQQ", 1, 24, size % 2**64, packed_size % 2**64, offset % 2**64) if wide else b""
        local_name = record.name if record.local_name is None else record.local_name
        padding = -(len(out) + 30 + len(local_name) + 4) % ALIGNMENT
        aligned = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        head = (20, record.flags, record.method, 0, 0, crc & 0xFFFFFFFF)
        out += struct.pack("<IHHHHHIIIHH", 0x04034B50, *head, *shown[:2], len(local_name), len(aligned))
        out += local_name + aligned + stored
        directory += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, *head, *shown[:2], len(record.name), len(extra), 0, 0, 0, 0, shown[2]
        )
        directory += record.name + extra
    start = len(out)
    out += directory
    number = len(records) if count is None else count
    if zip64_end is not None:
        end = len(out)
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 20, 20, 0, 0, number, number, len(directory), zip64_end)
        out += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    shown_start = 0xFFFFFFFF if zip64_end is not None else (start + directory_shift) & 0xFFFFFFFF
    out += struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, *(2 * (number & 0xFFFF,)), len(directory), shown_start, len(comment)
    )
    return bytes(out + comment)


@cache
def bomb(nbytes: int) -> bytes:
    """So many zeros, deflated a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = bytes(2**20)
    return b"".join([*(packer.compress(piece) for _ in range(nbytes // len(piece))), packer.flush()])


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def other_pickle(rng: Random, record: Record) -> Record:
    return replace(record, data=mutate_pickle(rng, record.data))


def packed(rng: Random, record: Record) -> Record:
    return replace(record, method=8, packed=deflated(record.data))


def bombed(rng: Random, record: Record) -> Record:
    nbytes = rng.choice(BOMBS)
    zeros = Record(record.name, b"", 8, bomb(nbytes), size=nbytes, crc=0)
    return zeros if rng.random() < 0.5 else replace(zeros, size=len(record.data))


def other_name(rng: Random, record: Record) -> Record:
    folder, _, leaf = record.name.rpartition(b"/")
    names = (
        b"../" + leaf,
        b"/tmp/" + leaf,
        b"archive\\" + leaf,
        folder + b"/../" + leaf,
        folder + b"/data/0",
        folder + b"/data.pkl",
        folder + b"/data/" + b"9" * 30,
        b"",
        b"/",
        record.name + b"\0x",
        b"\xff\xfe",
        b"n" * 60_000,
        b"other/" + leaf,
        leaf,
        folder + b"/code/x.py",
        folder + b"/constants.pkl",
        folder + b"/.data/serialization_id",
    )
    name = rng.choice(names)
    if rng.random() < 0.3:
        return replace(record, local_name=name)
    return replace(record, name=name)


def other_sizes(rng: Random, record: Record) -> Record:
    true = len(record.data)
    sizes = (HUGE, 2**63, 2**64 - 1, 2**40, 0xFFFFFFFF, 0xFFFFFFFE, true + 1, true - 1, true * 2, 0, 4)
    fields = rng.choice((("size",), ("packed_size",), ("size", "packed_size"), ("offset",)))
    value = rng.choice(sizes)
    return replace(record, **dict.fromkeys(fields, max(value, 0)), zip64=rng.random() < 0.5)


def other_numbers(rng: Random, record: Record) -> Record:
    kind = rng.randrange(5)
    if kind == 0:
        return replace(record, flags=rng.choice((1, 8, 9, 0x40, 0x800, 0x2000, 0xFFFF)))
    if kind == 1:
        return replace(record, method=rng.choice((1, 6, 8, 9, 12, 14, 93, 95, 99, 0xFFFF)))
    if kind == 2:
        return replace(record, crc=rng.getrandbits(32))
    if kind == 3:
        return replace(record, method=rng.choice((12, 14)), packed=zlib.compress(record.data))
    return replace(record, offset=rng.choice((0, 1, 64, 2**31, 2**32 - 2)))


SPECIALS = [float("nan"), float("inf"), float("-inf"), 3e38, 1e-45]


def other_data(rng: Random, record: Record) -> Record:
    data = bytearray(record.data)
    kind = rng.randrange(5)
    if kind == 0 and len(data) >= 4:
        at = rng.randrange(len(data) // 4) * 4
        data[at : at + 4] = struct.pack("<f", rng.choice(SPECIALS))
    elif kind == 1:
        del data[rng.randrange(len(data) + 1) :]
    elif kind == 2:
        data += bytes(rng.choice((1, 4, 64, 4096)))
    elif kind == 3:
        data = bytearray(rng.randbytes(len(data)))
    elif record.name.endswith((b"version", b"byteorder")):
        data = bytearray(rng.choice((b"", b"big", b"little\n", b"99999999999999999999", b"-1", b"\xff", b"2", b"0x10")))
    else:
        data = bytearray(len(data))
    return replace(record, data=bytes(data))


CHANGES: tuple[Callable[[Random, Record], Record], ...] = (
    *(packed, bombed, other_name, other_sizes, other_sizes, other_numbers, other_data, other_data),
)


def mutate_archive(rng: Random, data: bytes) -> bytes:
    records = records_of(data)
    if not records:
        return data
    options: dict = {}
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(10)
        index = rng.randrange(len(records))
        pickled = [number for number, record in enumerate(records) if record.name.endswith(b"data.pkl")]
        if kind <= 4 and pickled:
            records[pickled[0]] = other_pickle(rng, records[pickled[0]])
        elif kind <= 6:
            records[index] = rng.choice(CHANGES)(rng, records[index])
        elif kind == 7:
            options = rng.choice(
                (
                    {"count": rng.choice((0, 1, len(records) + 1, 65535))},
                    {"directory_shift": rng.choice((-1, 1, -46, 64, 2**20, -(2**20)))},
                    {"comment": rng.choice((b"PK\x05\x06" + bytes(18), b"x" * 65535, data[-2000:]))},
                    {"prefix": rng.choice((b"PK\x03\x04", b"x", bytes(100), data))},
                    {"zip64_end": rng.choice((0, 1, HUGE, 2**63, 2**64 - 1, len(data)))},
                )
            )
        elif kind == 8:
            del records[index]
            if not records:
                break
        else:
            copies = rng.choice((1, 1, 1, 5000))
            start = 0 if rng.random() < 0.5 else None
            twin = replace(records[index], offset=start) if copies > 1 else rng.choice(CHANGES)(rng, records[index])
            records[index:index] = [twin] * copies
    return zipped(records, **options)


def one_changed(change: Callable[[torch.Tensor], object], **options) -> Callable[[Random, dict], bytes]:
    def make(rng: Random, state: dict) -> bytes:
        name = rng.choice(sorted(state))
        return saved(state | {name: change(state[name])}, **options)

    return make


def renamed(name: object) -> Callable[[Random, dict], bytes]:
    def make(rng: Random, state: dict) -> bytes:
        old = rng.choice(sorted(state))
        return saved({(name if key == old else key): value for key, value in state.items()})

    return make


def sharing(rng: Random, state: dict) -> bytes:
    """All weights are views of one storage, which overlap."""
    pool = torch.zeros(max(value.numel() for value in state.values()))
    return saved({name: pool[: value.numel()].view(value.shape) for name, value in state.items()})


def numerous(rng: Random, state: dict) -> bytes:
    """A name for each of very many layers, all of one tensor."""
    number, one = rng.choice((3000, 100_000)), torch.zeros(1)
    names = [name for name in state if ".0." in name] or sorted(state)
    made = {name.replace(".0.", f".{layer}."): one for layer in range(number // len(names)) for name in names}
    return saved(made | state)


ODD_STATES: tuple[Callable[[Random, dict], bytes], ...] = (
    *(one_changed(lambda value, dtype=dtype: value.to(dtype)) for dtype in (torch.int8, torch.bool, torch.float64)),
    *(one_changed(lambda value, dtype=dtype: value.to(dtype)) for dtype in (torch.complex64, torch.float8_e4m3fn)),
    one_changed(lambda value: value.bfloat16()),
    one_changed(lambda value: value.to_sparse()),
    one_changed(lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)),
    one_changed(lambda value: value.to("meta")),
    one_changed(lambda value: torch.zeros(1).expand(value.shape)),
    one_changed(lambda value: torch.zeros(1).expand(2**40)),
    one_changed(lambda value: value.t() if value.ndim == 2 else value.flip(0)),
    one_changed(lambda value: torch.zeros(())),
    one_changed(lambda value: value[:0]),
    one_changed(lambda value: value.reshape(-1)),
    one_changed(lambda value: value.unsqueeze(0)),
    one_changed(lambda value: torch.zeros(10**5)[5 : 5 + value.numel()].view(value.shape)),
    one_changed(lambda value: torch.nn.Parameter(value)),
    one_changed(lambda value: value * float("nan")),
    one_changed(lambda value: value / 0),
    one_changed(lambda value: torch.view_as_complex(torch.zeros(*value.shape, 2)).imag),
    one_changed(lambda value: torch._neg_view(value)),
    one_changed(lambda value: value.numpy()),
    one_changed(lambda value: None),
    one_changed(lambda value: {"x": value}),
    one_changed(lambda value: value, _use_new_zipfile_serialization=False),
    one_changed(lambda value: value, pickle_protocol=4),
    *(renamed(name) for name in (0, None, ("a", "b"), "", "a\0b", "../x", "x" * 5000, "\ud800", b"x", 1.5)),
    lambda rng, state: saved(list(state.values())),
    lambda rng, state: saved(next(iter(state.values()))),
    lambda rng, state: saved({}),
    lambda rng, state: saved({"model": state, "epoch": 3}),
    lambda rng, state: saved(dict(list(state.items())[:-1])),
    sharing,
    numerous,
)


def mutate_state(rng: Random, data: bytes) -> bytes:
    return rng.choice(ODD_STATES)(rng, torch.load(io.BytesIO(data), weights_only=True))
