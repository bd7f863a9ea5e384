"""Safetensors files whose headers say what their bytes do not hold, and OLMo's encoded names with other pickles."""

import base64
import json
import struct
from random import Random
from typing import Any

from convert.fuzzing.pickles import mutate_pickle
from convert.fuzzing.texts import MARK, RAW_JSON, mutate_tree, unmarked

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x", "", "f32", None, 3)
LENGTHS = (0, 1, 8, 2**31, 2**32, 2**60, 2**63, 2**64 - 1, 100_000_001)
SHAPES = ([], [0], [-1], [1], [2**32, 2**32], [2**63, 2], [2**60], [0, 2**60], [1] * 1000, [1] * 65, None, "x", [0.5])
MANY = [f"x{number}" for number in range(20_000)]


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, values: bytes, length: int | None = None) -> bytes:
    text = unmarked(json.dumps(header), RAW_JSON, '"').encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    header, values = taken_apart(data)
    names = [name for name in header if name != "__metadata__"]
    length = None
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(10)
        name = rng.choice(names)
        entry = header.get(name)
        if kind == 0 or not isinstance(entry, dict) or "data_offsets" not in entry:
            header = mutate_tree(rng, header, RAW_JSON)
            if not isinstance(header, dict):
                break
        elif kind == 1:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 2:
            entry["shape"] = rng.choice((*SHAPES, entry["shape"][::-1], [*entry["shape"], 1], entry["shape"] * 2))
        elif kind == 3:
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(
                (
                    *([stop, start], [start + 4, stop + 4], [start, stop + 4], [0, stop - start], [start, 2**60]),
                    *([-4, stop], [start, start], [2**64 - 1, 2**64 - 1], [start], [], [0.5, 1], [1, stop]),
                    [start, stop, stop],
                )
            )
        elif kind == 4:
            header[name] = header.pop(rng.choice(names), {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        elif kind == 5:
            header[
                rng.choice(("", "../x", "a\0b", "x" * 5000, "\ud800", "__metadata__", MARK.format(f"again {name}")))
            ] = entry
        elif kind == 6:
            length = rng.choice((*LENGTHS, len(data), len(data) - 8, len(data) - 7))
        elif kind == 7:
            values = rng.choice((values[:-1], values + b"\0", values[:-4], b"", values * 2, values[4:]))
        elif kind == 8:
            at = rng.randrange(max(len(values) // 4, 1)) * 4
            values = values[:at] + struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38))) + values[at + 4 :]
        else:
            one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            header |= {name: one for name in MANY}
    return put_together(header, values, length)


def mutate_encoded_name(rng: Random, data: bytes) -> bytes:
    """One of the names of OLMo's safetensors files, which are pickles."""
    header, values = taken_apart(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header.pop(name)
    encoded = base64.urlsafe_b64encode(mutate_pickle(rng, base64.urlsafe_b64decode(name))).decode()
    header[rng.choice((encoded, encoded, encoded, encoded[:-1], encoded + "=", f"é{encoded}", ""))] = entry
    return put_together(header, values)
