"""Pickles with other opcodes in them: code to run, sizes that nobody has, nests, loops, and sharing without end."""

import io
import pickle
import pickletools
import struct
from functools import lru_cache
from random import Random

CANARY = "CANARY"  # what a pickle that runs would make, in the folder where its reader stands
HUGE = 2**60


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def short(value: str) -> bytes:
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def called(module: str, name: str, *arguments: bytes, form: int = 0) -> bytes:
    """A call of a global, in one of the ways in which pickles call."""
    packed, path, held = b"".join(arguments), f"{module}\n{name}\n".encode(), short(module) + short(name) + b"\x93"
    return (
        b"c" + path + b"(" + packed + b"tR",
        held + b"(" + packed + b"tR",
        b"(" + packed + b"i" + path,
        b"(c" + path + packed + b"o",
        held + b"(" + packed + b"t\x81",
        held + b"(" + packed + b"t}\x92",
        b"c" + path + b"(" + packed + b"t\x81}b",
    )[form % 7]


MADE = text(CANARY)
CODE = text(f"open({CANARY!r}, 'w')")
SHELL = text(f"touch {CANARY}")
# Each would make the canary, were its call made.
CALLS: tuple[tuple[str, str, tuple[bytes, ...]], ...] = (
    ("os", "mkdir", (MADE,)),
    ("posix", "mkdir", (MADE,)),
    ("os", "system", (SHELL,)),
    ("posix", "system", (SHELL,)),
    ("builtins", "open", (MADE, text("w"))),
    ("io", "open", (MADE, text("w"))),
    ("__builtin__", "open", (MADE, text("w"))),
    ("builtins", "eval", (CODE,)),
    ("builtins", "exec", (CODE,)),
    ("subprocess", "Popen", (b"]" + text("mkdir") + b"a" + MADE + b"a",)),
    ("subprocess", "check_output", (b"]" + text("mkdir") + b"a" + MADE + b"a",)),
    ("pathlib", "Path.mkdir", (called("pathlib", "PosixPath", MADE),)),
    ("torch", "save", (b"K\x01", MADE)),
    ("torch", "serialization.os.mkdir", (MADE,)),
    ("torch.serialization", "os.mkdir", (MADE,)),
    ("torch._utils", "torch.serialization.os.mkdir", (MADE,)),
    (
        "torch.storage",
        "_load_from_bytes",
        (b"C" + bytes([40]) + b"cos\nmkdir\n(X\x06\x00\x00\x00CANARYtR." + b" " * 7,),
    ),
    ("torch.hub", "download_url_to_file", (text("file:///etc/hosts"), MADE)),
    ("torch.utils.cpp_extension", "load_inline", (text("x"), CODE)),
    ("numpy", "save", (MADE, b"K\x01")),
    ("numpy", "memmap", (MADE, text("float32"), text("w+"), b"K\x00", b"K\x04")),
    ("numpy.core.multiarray", "_reconstruct", (b"cos\nmkdir\n", MADE)),
    ("numpy.lib.npyio", "_savez", (MADE, b")", b"}", b"\x89")),
    ("shutil", "copy", (text("/etc/hosts"), MADE)),
    ("shelve", "open", (MADE,)),
    ("runpy", "run_path", (MADE,)),
    ("importlib", "import_module", (text("antigravity"),)),
    ("operator", "methodcaller", (text("mkdir"),)),
    ("functools", "partial", (b"cos\nmkdir\n", MADE)),
    ("copyreg", "_reconstructor", (b"cos\nmkdir\n", b"cbuiltins\nobject\n", b"N")),
    ("olmem_convert.writing.shards", "sha256", (MADE,)),
    ("torch.distributed.checkpoint.filesystem", "FileSystemWriter", (MADE,)),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", (MADE, b"N", b"N", b"N")),
)
# Names that readers of weights know, given what they do not expect.
KNOWN = (
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "Size"),
    ("torch", "FloatStorage"),
    ("torch", "device"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("torch.nn.parameter", "Parameter"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("torch", "bfloat16"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
)
SMALL = (b"N", b"K\x00", b")", b"]", b"}", b"\x88", b"G\x7f\xf8" + bytes(6), text("x"), b"C\x01x", b"J\xff\xff\xff\xff")
NUMBERS = (
    b"\x8a\x08" + struct.pack("<q", HUGE),
    b"\x8a\x08" + struct.pack("<q", -HUGE),
    b"\x8a\x09" + bytes(8) + b"\x01",
    b"J\xff\xff\xff\xff",
    b"K\x00",
    b"K\x01",
    b"M\xff\xff",
    b"J\x00\x00\x00\x7f",
    b"G" + struct.pack(">d", float("nan")),
    b"G" + struct.pack(">d", float("inf")),
    b"G" + struct.pack(">d", 1e300),
    b"I" + b"9" * 100_000 + b"\n",
    b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000,
    b"I01\n",
    b"N",
)


def snippet(rng: Random) -> bytes:
    """Opcodes that push one value, or try something that no checkpoint does."""
    kind = rng.randrange(10)
    if kind <= 2:
        module, name, arguments = rng.choice(CALLS)
        return called(module, name, *arguments, form=rng.randrange(7))
    if kind <= 4:
        arguments = [rng.choice((*SMALL, *NUMBERS)) for _ in range(rng.randrange(8))]
        return called(*rng.choice(KNOWN), *arguments, form=rng.randrange(7))
    if kind == 5:
        return rng.choice(NUMBERS)
    return rng.choice(ODD)(rng)


def nested(opening: bytes, closing: bytes, rng: Random) -> bytes:
    depth = rng.choice((50, 900, 20_000, 100_000))
    return opening * depth + closing * depth


def shared(rng: Random) -> bytes:
    """A tuple of two of a tuple of two …, which is hashed, compared or shown in exponential time."""
    return b")" + b"2\x86" * rng.choice((10, 30, 60, 2000))


def loop(rng: Random) -> bytes:
    return rng.choice((b"]q\xf0h\xf0a", b"}q\xf0" + text("x") + b"h\xf0s", b"]q\xf0h\xf0\x85a", b"(h\xf0tq\xf0"))


ODD = (
    lambda rng: b"\x95" + struct.pack("<Q", rng.choice((HUGE, 2**63, 2**64 - 1, 3, 2**40))),  # FRAME
    lambda rng: b"\x8e" + struct.pack("<Q", rng.choice((HUGE, 2**36, 2**64 - 1))),  # BINBYTES8
    lambda rng: b"\x96" + struct.pack("<Q", rng.choice((HUGE, 2**36, 2**64 - 1))),  # BYTEARRAY8
    lambda rng: b"\x8d" + struct.pack("<Q", rng.choice((HUGE, 2**36, 2**64 - 1))),  # BINUNICODE8
    lambda rng: b"B" + struct.pack("<I", 2**32 - 1),
    lambda rng: b"X" + struct.pack("<I", 2**32 - 1),
    lambda rng: b"T" + struct.pack("<i", -1),
    lambda rng: b"\x8b" + struct.pack("<i", rng.choice((-1, 2**31 - 1))),
    lambda rng: b"r" + struct.pack("<I", rng.choice((2**31 - 1, 2**32 - 1, 10**7))),  # LONG_BINPUT
    lambda rng: b"p" + rng.choice((b"9" * 30, b"-1", b"2147483647", b"x")) + b"\n",
    lambda rng: b"j" + struct.pack("<I", rng.choice((2**31 - 1, 0, 77))),
    lambda rng: rng.choice((b"h\xff", b"g99\n", b"g-1\n", b"g\n")),
    lambda rng: rng.choice((b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x84\xff\xff\xff\xff")),  # EXT
    lambda rng: rng.choice((b"Q", b"Pid\n", b"NQ", text("x") + b"Q", b"(tQ", b"(" + text("storage") + b"tQ")),
    lambda rng: rng.choice(
        (b"\x97", b"\x98", b"\x94", b"2", b"0", b"1", b"(", b"t", b"e", b"u", b"s", b"b", b"R", b".")
    ),
    lambda rng: nested(b"(", b"t", rng),
    lambda rng: nested(b"]", b"a", rng),
    lambda rng: b")" + b"\x85" * rng.choice((50, 900, 100_000)),
    lambda rng: b"N" + text("k") * 0 + b"".join(b"}" + text("k") for _ in range(rng.choice((5, 2000)))),
    shared,
    lambda rng: b"}" + shared(rng) + b"Ns",
    lambda rng: b"}" + shared(rng) + b"N(tRs",
    lambda rng: b"\x8f(" + shared(rng) + b"\x90",  # a set of it
    loop,
    lambda rng: rng.choice(
        (text("../x"), text("/etc/passwd"), text("a\0b"), text("x" * 5000), text("\ud800"), text(""))
    ),
    lambda rng: rng.choice(
        (b"V\\ud800\n", b"S'x\n", b"S'\\x'\n", b"Inope\n", b"L9L\n", b"F1e999\n", b"Fx\n", b"c\n\n", b"cos\n")
    ),
    lambda rng: b"\x80" + bytes([rng.choice((0, 5, 6, 255))]),
)


@lru_cache(64)
def operations(data: bytes) -> tuple[tuple[int, int, str], ...]:
    """(start, stop, name) of each opcode, as far as they can be told."""
    starts: list[tuple[int, str]] = []
    try:
        for opcode, _, position in pickletools.genops(data):
            starts.append((position or 0, opcode.name))
    except ValueError:
        pass
    stops = [start for start, _ in starts[1:]] + [len(data)]
    return tuple((start, stop, name) for (start, name), stop in zip(starts, stops, strict=True))


def mutate_pickle(rng: Random, data: bytes) -> bytes:
    found = operations(data)
    if not found or rng.random() < 0.1:
        return b"\x80" + bytes([rng.choice((2, 4))]) + snippet(rng) + b"."
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, stop, _ = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:start] + snippet(rng) + data[start:]
        elif kind == 1:
            data = data[:start] + snippet(rng) + b"0" + data[start:]  # pushed and popped: all else stays
        elif kind == 2:
            data = data[:start] + snippet(rng) + data[stop:]
        elif kind == 3:
            data = data[:start] + data[stop:]
        elif kind == 4:
            data = data[:stop] + data[start:stop] * rng.choice((1, 2, 1000)) + data[stop:]
        elif kind == 5:
            other, end, _ = rng.choice(found)
            data = data[:start] + data[other:end] + data[stop:]
        else:
            data = replaced(rng, data, found)
        found = operations(data)
        if not found:
            break
    return data


def replaced(rng: Random, data: bytes, found: tuple[tuple[int, int, str], ...]) -> bytes:
    """A number or a text of the pickle becomes another one."""
    if rng.random() < 0.6:
        numbers = [
            entry for entry in found if entry[2] in ("BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE")
        ]
        if not numbers:
            return data
        start, stop, _ = rng.choice(numbers)
        return data[:start] + rng.choice((*NUMBERS, b"K" + bytes([rng.randrange(256)]))) + data[stop:]
    texts = [entry for entry in found if entry[2] in ("BINUNICODE", "SHORT_BINUNICODE", "GLOBAL")]
    if not texts:
        return data
    start, stop, name = rng.choice(texts)
    if name == "GLOBAL":
        module, attribute = rng.choice((*KNOWN, *((m, n) for m, n, _ in CALLS)))
        return data[:start] + f"c{module}\n{attribute}\n".encode() + data[stop:]
    old = data[start:stop]
    words = (
        "cuda:0",
        "meta",
        "cpu",
        "../x",
        "/etc/passwd",
        "0",
        "",
        "a\0b",
        "x" * 300,
        "data.pkl",
        "\ud800",
        "lm_head.weight",
    )
    other, end, _ = rng.choice(texts)
    return data[:start] + rng.choice((text(rng.choice(words)), data[other:end], old + b"0" + old)) + data[stop:]


def dumped(value: object, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    pickle.Pickler(file, protocol).dump(value)
    return file.getvalue()
