"""The unpickler: plain values come out as they went in, and no program makes it run code, fill memory or never end."""

import io
import pickle
import resource
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from convert.test_tensors import values
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem_convert import CheckpointError
from olmem_convert.reading.archives import read_pickle
from olmem_convert.reading.pickles import INSTRUCTIONS, STATE_DICT_NAMES, rebuild_tensor, unpickle
from olmem_convert.reading.tensors import LazyTensor, same_bits

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 2**32 - 1), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=300)
def test_plain_values_come_out_as_they_went_in(value, protocol):
    assert unpickle(pickle.dumps(value, protocol), {}) == value


def exponential_key() -> bytes:
    """A tuple of two of the one before, 200 times, as a key: hashing it takes 2**200 steps."""
    return b"\x80\x02}(" + b"N\x85q\x000" + b"h\x00h\x00\x86q\x000" * 200 + b"h\x00K\x01u."


def large_copies() -> bytes:
    """A list of 10,000, and a size made of it 10,000 times."""
    return b"\x80\x02]q\x00(" + b"K\x01" * 10**4 + b"e0]q\x01(" + b"ctorch\nSize\nh\x00\x85R" * 10**4 + b"e."


BOMBS = {
    "a memo of 2**31 places": b"\x80\x02Nr\xff\xff\xff\x7f0r\xfe\xff\xff\x7f.",
    "a key that takes for ever to hash": exponential_key(),
    "an ordered dictionary of arguments": b"\x80\x02ccollections\nOrderedDict\n((K\x01K\x02\x86t\x85R.",
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(9))
    + b"u.",
    "a key of a megabyte": b"\x80\x02}X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"Ns.",
    "sizes that add up": large_copies(),
    "a state for a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
    "an array of bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "a frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "a number of 10**6 digits": b"I" + b"9" * 10**6 + b"\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"(ios\nmkdir\n.",
    "an object": b"(cos\nmkdir\nVx\no.",
    "a call of what is no function": b"\x80\x02Vx\n)R.",
    "the end without a beginning": b".",
    "no end": b"\x80\x02N",
}


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS)
def test_bombs_are_errors_that_cost_nothing(program):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(pickle.UnpicklingError):
        value = unpickle(program, STATE_DICT_NAMES)
        assert value is None, "it ended after all, with nothing"
        raise pickle.UnpicklingError
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**16  # kibibytes


def test_functions_that_stand_in_are_not_changed():
    """A state given to one of them would be its defaults, for every checkpoint that comes after."""
    before = rebuild_tensor.__defaults__
    with pytest.raises(pickle.UnpicklingError, match="something is put into a function"):
        unpickle(BOMBS["a state for a function"], STATE_DICT_NAMES)
    assert rebuild_tensor.__defaults__ is before


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=50)
def test_keys_of_dictionaries_are_plain(value, protocol):
    hashable = isinstance(value, (str, int)) and not isinstance(value, bool)
    try:
        program = pickle.dumps({value: 1}, protocol)
    except TypeError:
        return
    if hashable and (isinstance(value, str) or 0 <= value < 2**32):
        assert unpickle(program, {}) == {value: 1}
    else:
        with pytest.raises(pickle.UnpicklingError, match="is a key"):
            unpickle(program, {})


@given(st.binary(max_size=60), st.integers(0, 60))
@settings(max_examples=500)
def test_any_bytes_give_a_value_or_an_error(data, at):
    program = pickle.dumps({"w": ("x", 5, [1.5])}, 4)
    for text in (data, program[:at] + data + program[at:], program[:at] + data + program[at + len(data) :]):
        try:
            unpickle(text, {})
        except pickle.UnpicklingError:
            continue


def test_instructions_that_call_or_allocate_are_not_known():
    assert {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEWOBJ_EX", "PERSID", "DUP"}.isdisjoint(INSTRUCTIONS)


# Archives


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def packed(path: Path, contents: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents:
            archive.writestr(name, content)
    return path


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.save({"w": values(4, 3)}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_archives_may_be_packed_anew(saved):
    assert torch.equal(read_pickle(packed(saved, list(records(saved).items())))["w"].load(), values(4, 3))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_other_makes_are_refused(saved):
    contents = records(saved)
    data, pickled = (next(name for name in contents if name.endswith(end)) for end in ("data/0", "data.pkl"))
    order = next(name for name in contents if name.endswith("byteorder"))
    changed = {
        "not compressed": (packed, list(contents.items()), zipfile.ZIP_DEFLATED),
        "once": (packed, [*contents.items(), (data, b"x" * 48)]),
        "one data.pkl": (packed, [*contents.items(), ("other/data.pkl", contents[pickled])]),
        "little-endian": (packed, [*(contents | {order: b"big"}).items()]),
        "every value": (packed, [*(contents | {data: contents[data][:-4]}).items()]),
        "data.pkl": (packed, [(data, contents[data])]),
    }
    for words, (make, *arguments) in changed.items():
        with pytest.raises(CheckpointError, match=words):
            read_pickle(make(saved, *arguments))


@pytest.mark.parametrize("rows", [[(0, 4)], [(0, 1), (1, 4)], [(2, 3)], [(0, 2), (3, 4)], [(0, 2), (0, 2)]], ids=str)
def test_flipped_bit_is_seen(rows, saved):
    """With the last value where they are read in order, else with the first."""
    data = bytearray(saved.read_bytes())
    at = data.index(values(4, 3).numpy().tobytes())
    data[at + 40] ^= 1
    saved.write_bytes(data)
    tensor = read_pickle(saved)["w"]
    with pytest.raises(CheckpointError, match="its own checksums"):
        for start, stop in rows:
            tensor.read(start, stop)
    with pytest.raises(CheckpointError, match="its own checksums"):
        tensor.load()


@pytest.mark.parametrize("part", [slice(0, 2), slice(1, 3), slice(3, 4)], ids=str)
def test_flipped_bit_is_seen_by_views_of_a_part(part, tmp_path):
    """Which never read to the storage's end, where its checksum would be compared."""
    path = tmp_path / "model.pt"
    torch.save({"w": values(4, 3)[part]}, path)
    assert torch.equal(read_pickle(path)["w"].load(), values(4, 3)[part])
    data = bytearray(path.read_bytes())
    data[data.index(values(4, 3).numpy().tobytes()) + 12 * part.start + 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its own checksums"):
        read_pickle(path)["w"].load()


@pytest.mark.parametrize("view", [lambda w: w[::2, 0], lambda w: w[0, ::2], lambda w: w.T, lambda w: w[:, 1]])
def test_views_with_gaps_have_the_same_bits(view, tmp_path):
    """Of one dimension, they could not be compared."""
    torch.save({"w": view(values(4, 6))}, tmp_path / "model.pt")
    tensor = read_pickle(tmp_path / "model.pt")["w"]
    same = view(values(4, 6)).contiguous()
    assert torch.equal(tensor.load(), same)
    whole = LazyTensor.whole(tuple(same.shape), same.dtype, lambda: same)
    assert same_bits(tensor, whole) and same_bits(whole, tensor)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6))
@settings(max_examples=60)
def test_checksums_hold_whatever_is_read_in_whatever_order(parts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save({"w": values(30)}, path)
        tensor = read_pickle(path)["w"]
        for start, stop in map(sorted, parts):
            assert torch.equal(tensor.read(start, stop), values(30)[start:stop])
        assert torch.equal(tensor.load(), values(30))


def test_record_that_is_not_where_the_archive_says(saved):
    data = bytearray(saved.read_bytes())
    name = next(name for name in records(saved) if name.endswith("data/0")).encode()
    at = data.index(name)
    data[at : at + 3] = b"xyz"
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="not where the archive says"):
        read_pickle(saved)["w"].load()


def rebuilt(size, stride, first=0, kind="FloatStorage", function="_rebuild_tensor_v2") -> bytes:
    """The pickle of `{"w": tensor}`, written by hand: the library would refuse to."""
    file = io.BytesIO()

    class ByHand(pickle._Pickler):
        def save_global(self, obj, name=None):
            self.write(pickle.GLOBAL + obj.text.encode() + b"\n")

        def persistent_id(self, obj):
            return ("storage", Named(f"torch\n{kind}"), "0", "cpu", 12) if obj == "the storage" else None

        dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    class Named:
        def __init__(self, text):
            self.text = text

    class Call:
        def __reduce__(self):
            return Rebuild(), ("the storage", first, size, stride, False, None)

    class Rebuild(Named):
        def __init__(self):
            super().__init__(f"torch._utils\n{function}")

        def __call__(self):
            raise AssertionError

    ByHand.dispatch[Named] = ByHand.dispatch[Rebuild] = ByHand.save_global
    ByHand(file, 2).dump({"w": Call()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "first"),
    [
        ((2**60,), (1,), 0),
        ((2**31, 2**31), (2**31, 1), 0),
        ((4, 3), (3, 1), 1),
        ((4, 3), (2**60, 1), 0),
        ((12,), (0,), 0),
        ((4, 3), (0, 1), 0),
        ((4, 3), (-3, 1), 0),
        ((4, -3), (3, 1), 0),
        ((4, 3), (3,), 0),
        ((4, 3), (3, 1), 2**63),
        ((4.0, 3), (3, 1), 0),
        ("43", (3, 1), 0),
        (5, (3, 1), 0),
    ],
    ids=str,
)
def test_tensors_that_the_archive_does_not_hold_are_refused(size, stride, first, saved):
    contents = records(saved)
    pickled = next(name for name in contents if name.endswith("data.pkl"))
    read = read_pickle(packed(saved, list((contents | {pickled: rebuilt((4, 3), (3, 1))}).items())))
    assert torch.equal(read["w"].load(), values(4, 3))
    with pytest.raises(CheckpointError):
        read_pickle(packed(saved, list((contents | {pickled: rebuilt(size, stride, first)}).items())))
