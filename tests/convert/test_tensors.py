"""The readers of weight files: every way of cutting them up, one tensor at a time, and never a line of code."""

import base64
import io
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert.checkpoints import FOLDERS, golden
from convert.writers import encoded, olmo_state, write_distributed, write_flat_shards, write_olmo
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem_convert import CheckpointError
from olmem_convert.formats.detect import open_checkpoint
from olmem_convert.reading.archives import read_pickle
from olmem_convert.reading.distributed import Chunk, overlap, read_distributed
from olmem_convert.reading.tensors import LazyTensor, LoadedOnDemand, Span, same_bits
from olmem_convert.reading.weight_files import decode_pickled_key, read_flat_shards, read_safetensors
from safetensors.torch import save_file

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


def assert_same(read: dict[str, LazyTensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(read) == set(wanted)
    for name, value in wanted.items():
        loaded = read[name].load()
        assert read[name].shape == tuple(value.shape) == tuple(loaded.shape)
        assert read[name].dtype == value.dtype == loaded.dtype
        assert read[name].nbytes == value.nbytes
        assert torch.equal(loaded, value), name


# Cutting up


@st.composite
def shapes(draw):
    return tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))


def split(draw, offsets, sizes, depth=3):
    """Any partition that cuts from side to side make."""
    cuts = [dim for dim, size in enumerate(sizes) if size > 1]
    if depth == 0 or not cuts or draw(st.booleans()):
        return [(offsets, sizes)]
    dim = draw(st.sampled_from(cuts))
    at = draw(st.integers(1, sizes[dim] - 1))
    left = (*sizes[:dim], at, *sizes[dim + 1 :])
    right = (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :])
    beyond = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
    return split(draw, offsets, left, depth - 1) + split(draw, beyond, right, depth - 1)


@st.composite
def distributed(draw):
    """Tensors, each with boxes in any order, empty ones at the far end among them, as FSDP2 leaves them."""
    state, boxes = {}, {}
    for number in range(draw(st.integers(1, 3))):
        shape = draw(shapes())
        name = f"model.blocks.{number}.weight"
        state[name] = values(*shape, dtype=draw(st.sampled_from(DTYPES)))
        cut = split(draw, (0,) * len(shape), shape)
        cut += [((shape[0], *(0,) * (len(shape) - 1)), (0, *shape[1:]))] * draw(st.integers(0, 2))
        boxes[name] = draw(st.permutations(cut))
    return state, boxes, draw(st.integers(1, 4))


@given(distributed())
@settings(max_examples=60)
def test_distributed_chunks_of_any_cut_are_joined(case):
    state, boxes, num_files = case
    with tempfile.TemporaryDirectory() as folder:
        write_distributed(Path(folder), state, boxes, num_files)
        wanted = {name.removeprefix("model."): value for name, value in state.items()}
        assert_same(read_distributed(Path(folder)), wanted)


@st.composite
def flat(draw):
    """Tensors, each in flat spans dealt to ranks in any order."""
    ranks = draw(st.integers(1, 4))
    state, slices = {}, {}
    for number in range(draw(st.integers(1, 3))):
        value = values(*draw(shapes()))
        size = value.numel()
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=5))})
        held = [[] for _ in range(ranks)]
        for span in draw(st.permutations(list(pairwise(cuts)))):
            held[draw(st.integers(0, ranks - 1))].append(span)
        for spans in held:
            if not spans and draw(st.booleans()):
                spans.append((0, 0))
        state[f"w{number}"], slices[f"w{number}"] = value, held
    return state, slices


@given(flat(), st.sampled_from(["shard_spec_per_file", "flattened_offsets_per_file"]))
@settings(max_examples=60)
def test_flat_slices_of_any_cut_are_joined(case, form):
    state, slices = case
    with tempfile.TemporaryDirectory() as folder:
        write_flat_shards(Path(folder), state, slices, form)
        assert_same(read_flat_shards(Path(folder)), state)


@given(st.text(min_size=1, max_size=30), st.sampled_from(range(pickle.HIGHEST_PROTOCOL + 1)))
@settings(max_examples=100)
def test_encoded_keys_of_any_protocol_are_decoded(name, protocol):
    key = base64.urlsafe_b64encode(pickle.dumps(((name,), False), protocol)).decode()
    assert decode_pickled_key(key) == name


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_file_of_each_kind_is_read(dtype, tmp_path):
    state = {"a.weight": values(3, 4, dtype=dtype), "b.weight": values(5, dtype=dtype)}
    torch.save(state, tmp_path / "model.pt")
    save_file({encoded(name): value for name, value in state.items()}, tmp_path / "model.safetensors")
    assert_same(read_pickle(tmp_path / "model.pt"), state)
    assert_same(read_safetensors(tmp_path / "model.safetensors", decode_pickled_key), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_what_torch_itself_writes_is_read(prefix, tmp_path):
    state = {f"{prefix}{name}": value for name, value in olmo_state().items()}
    extra = {"optim.state.w": values(4), "optim.param_groups.lr": 0.1}
    dcp.save(state | extra, storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    assert_same(read_distributed(tmp_path / "saved"), olmo_state())


def test_views_in_a_state_dict_are_read_as_they_are(tmp_path):
    whole = values(6, 4)
    state = {"transposed": whole.T, "rows": whole[2:5], "same": whole}
    torch.save(state, tmp_path / "model.pt")
    assert_same(read_pickle(tmp_path / "model.pt"), state)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_said_before_loading_is_what_is_loaded(name):
    for tensor in golden(name).tensors.values():
        loaded = tensor.load()
        assert (tuple(loaded.shape), loaded.dtype, loaded.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)


def test_a_long_name_is_not_put_together():
    """300,000 signs that a pickle names 10,000 times."""
    part = "x" * 3000
    repeated = base64.urlsafe_b64encode(pickle.dumps((tuple([part] * 10_000), False))).decode()
    parts = base64.urlsafe_b64encode(pickle.dumps(((part, part), False))).decode()
    for key in (repeated, parts, encoded("x" * 20_000)):
        with pytest.raises(CheckpointError, match=r"4,096 signs|it has .* signs"):
            decode_pickled_key(key)


# One at a time


def test_rows_are_a_part_still_unread():
    reads = []

    def load():
        reads.append(1)
        return values(6, 4)

    rows = LazyTensor.whole((6, 4), torch.float32, load).rows(2, 5)
    assert (rows.shape, rows.dtype, rows.nbytes, reads) == ((3, 4), torch.float32, 48, [])
    assert torch.equal(rows.load(), values(6, 4)[2:5]) and reads == [1]
    again = rows.rows(1, 2)
    assert again.shape == (1, 4) and torch.equal(again.load(), values(6, 4)[3:4])


def test_mapping_reads_what_is_looked_up_and_rounds_it():
    reads = []

    def lazy(name):
        return LazyTensor.whole((2,), torch.float32, lambda: reads.append(name) or torch.tensor([1.0, 1 / 3]))

    mapping = LoadedOnDemand({name: lazy(name) for name in "abc"}, torch.bfloat16)
    assert (list(mapping), len(mapping), reads) == (["a", "b", "c"], 3, [])
    assert torch.equal(mapping["b"], torch.tensor([1.0, 1 / 3]).bfloat16()) and reads == ["b"]


def test_distributed_reads_no_other_tensors_bytes(tmp_path):
    """Those of the optimizer, and of every tensor not asked for, may be rubbish."""
    state = {"model.a": values(3, 4), "model.b": values(5), "optim.state.a": values(3, 4), "optim.param_groups.lr": 0.1}
    write_distributed(tmp_path, state, num_files=4)
    for number in (1, 2, 3):
        path = tmp_path / f"__{number}_0.distcp"
        path.write_bytes(b"\0" * path.stat().st_size)
    read = read_distributed(tmp_path)
    assert set(read) == {"a", "b"}
    assert torch.equal(read["a"].load(), values(3, 4))
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        read["b"].load()


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """The file and the number of bytes of every read of values."""
    made, values = [], Span.values

    def spy(span, first, count, dtype):
        made.append((span.file.path.name, count * dtype.itemsize))
        return values(span, first, count, dtype)

    monkeypatch.setattr(Span, "values", spy)
    return made


LAYOUTS = ("model.pt", "model.safetensors", "model/metadata.json", "model_and_optim/.metadata")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_bytes_are_read_than_those_of_the_rows_asked_for(layout, reads, tmp_path):
    name = "transformer.wte.weight"
    tensor = open_checkpoint(write_olmo(tmp_path, layout)).tensors[name]
    assert reads == []
    assert torch.equal(tensor.rows(3, 8).rows(1, 4).load(), olmo_state()[name][4:7])
    assert sum(nbytes for _, nbytes in reads) == 3 * 8 * 4
    reads.clear()
    assert torch.equal(tensor.load(), olmo_state()[name])
    assert sum(nbytes for _, nbytes in reads) == tensor.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
@given(nbytes=st.integers(1, 500))
@settings(max_examples=10)
def test_pieces_are_the_tensor(layout, nbytes):
    with tempfile.TemporaryDirectory() as folder:
        for name, tensor in open_checkpoint(write_olmo(Path(folder), layout)).tensors.items():
            pieces = list(tensor.pieces(nbytes))
            assert torch.equal(torch.cat(pieces), olmo_state()[name])
            row = tensor.nbytes // tensor.shape[0]
            assert all(piece.nbytes <= max(nbytes, row) for piece in pieces)


def test_pieces_of_what_is_read_whole():
    reads = []
    tensor = LazyTensor.whole((6, 4), torch.float32, lambda: reads.append(1) or values(6, 4))
    pieces = list(tensor.pieces(40))
    assert [len(piece) for piece in pieces] == [2, 2, 2] and reads == [1]
    assert torch.equal(torch.cat(pieces), values(6, 4))
    (number,) = LazyTensor.whole((), torch.float32, lambda: torch.tensor(3.0)).pieces(1)
    assert number.shape == () and number == 3
    assert list(LazyTensor.whole((0, 4), torch.float32, lambda: values(0, 4)).pieces(1)) == []


def test_pickles_are_not_given_to_torch(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    write_olmo(tmp_path / "olmo", "model.pt")
    write_distributed(tmp_path / "core", {"model.w": values(3)})
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert_same(read_pickle(tmp_path / "olmo" / "model.pt"), olmo_state())
    assert_same(read_distributed(tmp_path / "core"), {"w": values(3)})


def test_weights_of_modules_are_read(tmp_path):
    """Parameters, their own classes, tied ones, and the versions that a state dict notes of its modules."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module[1].bias = module[0].bias
    state = module.state_dict(keep_vars=True)
    state["buffer"] = torch.nn.Buffer(values(3))
    torch.save(state, tmp_path / "model.pt")
    assert_same(read_pickle(tmp_path / "model.pt"), {name: value.detach() for name, value in state.items()})


# Damage


def overlapping(metadata):
    entry = metadata.state_dict_metadata["model.w"]
    entry.chunks[1].offsets = torch.Size([1, 0])
    for index in list(metadata.storage_data):
        if index.offset == torch.Size([2, 0]):
            metadata.storage_data[type(index)("model.w", torch.Size([1, 0]))] = metadata.storage_data.pop(index)


def drop_chunk(metadata):
    metadata.state_dict_metadata["model.w"].chunks.pop()


def drop_storage(metadata):
    metadata.storage_data.popitem()


def set_path(path):
    def edit(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path

    return edit


def set_info(**changes):
    def edit(metadata):
        for info in metadata.storage_data.values():
            info.__dict__.update(changes)

    return edit


def set_entry(value):
    def edit(metadata):
        metadata.state_dict_metadata["model.w"] = value

    return edit


def rename_key(metadata):
    metadata.state_dict_metadata[7] = metadata.state_dict_metadata.pop("model.w")


def set_size(*size):
    def edit(metadata):
        metadata.state_dict_metadata["model.w"].size = torch.Size(size)

    return edit


METADATA_DAMAGE = [drop_chunk, drop_storage, rename_key]
METADATA_DAMAGE += [
    set_path(path) for path in ("../x.distcp", "/etc/passwd", "a/b", "", ".", "..", "x\0", None, 5, ["x"])
]
METADATA_DAMAGE += [set_info(**{name: value}) for name in ("offset", "length") for value in (-1, 10**15, "x", None)]
METADATA_DAMAGE += [set_entry(value) for value in (None, 5, {})]
METADATA_DAMAGE += [set_size(*size) for size in ((4, 4), (4, 2), (12,), (4, 3, 1), (10**9, 10**9))]


@pytest.mark.parametrize("edit", METADATA_DAMAGE, ids=lambda edit: edit.__qualname__)
def test_metadata_that_does_not_fit_is_refused(edit, tmp_path):
    boxes = {"model.w": [((0, 0), (2, 3)), ((2, 0), (2, 3))]}
    write_distributed(tmp_path, {"model.w": values(4, 3)}, boxes, 2)
    assert torch.equal(read_distributed(tmp_path)["w"].load(), values(4, 3))
    write_distributed(tmp_path, {"model.w": values(4, 3)}, boxes, 2, edit)
    with pytest.raises(CheckpointError):
        read_distributed(tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
def test_files_beyond_the_folder_are_not_read(absolute, tmp_path):
    """Though they are there, and hold what is looked for."""
    folder = tmp_path / "model"
    path = str(tmp_path / "__0_0.distcp") if absolute else "../__0_0.distcp"
    write_distributed(folder, {"model.w": values(4, 3)}, edit=set_info(relative_path=path))
    (folder / "__0_0.distcp").rename(tmp_path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="of its own folder only"):
        read_distributed(folder)

    path = str(tmp_path / "rank_0.safetensors") if absolute else "../rank_0.safetensors"
    write_flat_shards(folder, {"w": values(3, 4)}, {"w": [[(0, 12)]]})
    (folder / "rank_0.safetensors").rename(tmp_path / "rank_0.safetensors")
    index = json.loads((folder / "metadata.json").read_text())
    by_file = index["tensors"]["w"]["shard_spec_per_file"]
    by_file[path] = by_file.pop("rank_0.safetensors")
    (folder / "metadata.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="of its own folder only"):
        read_flat_shards(folder)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (values(4, 3), values(3, 4)),
        (values(1, 12), values(12)),
        (values(4, 3), values(4, 3, dtype=torch.int32)),
        (values(4, 3, dtype=torch.float16), values(4, 3, dtype=torch.bfloat16)),
    ],
    ids=["turned", "flat", "integers", "halves"],
)
def test_chunk_of_another_tensor_is_refused(one, other, tmp_path):
    """Of as many bytes, so that nothing before reading it can tell."""

    def swap(metadata):
        first, second = metadata.storage_data.values()
        first.__dict__, second.__dict__ = dict(second.__dict__), dict(first.__dict__)

    write_distributed(tmp_path, {"model.one": one, "model.other": other}, edit=swap)
    with pytest.raises(CheckpointError, match="two checkpoints are mixed"):
        read_distributed(tmp_path)["one"].load()


def test_chunks_that_overlap_are_refused(tmp_path):
    """They add up to the tensor's size all the same."""
    boxes = {"model.w": [((0, 0), (2, 3)), ((2, 0), (2, 3))]}
    write_distributed(tmp_path, {"model.w": values(4, 3)}, boxes, 2, overlapping)
    with pytest.raises(CheckpointError, match=r"`\S*\.metadata` must cover 'model.w' .*overlap"):
        read_distributed(tmp_path)


@given(st.data())
@settings(max_examples=200)
def test_overlap_is_found_where_two_boxes_share_a_value(data):
    dims = data.draw(st.integers(0, 3))
    numbers = st.lists(st.integers(0, 4), min_size=dims, max_size=dims)
    boxes = data.draw(st.lists(st.tuples(numbers, numbers.map(lambda sizes: [1 + size for size in sizes])), max_size=6))
    count = torch.zeros((10,) * dims, dtype=torch.int64)
    for offsets, sizes in boxes:
        count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    chunks = [Chunk("w", tuple(o), tuple(s), torch.float32, Path("x"), 0, 0) for o, s in boxes]
    assert (overlap(chunks) is not None) == bool((count > 1).any())


def test_one_range_of_bytes_is_not_two_chunks(tmp_path):
    """Each fits; together a small file would be a large model."""
    boxes = {"model.w": [((0, 0), (2, 3)), ((2, 0), (2, 3))]}

    def share(metadata):
        first, second = metadata.storage_data.values()
        second.__dict__ |= first.__dict__

    write_distributed(tmp_path, {"model.w": values(4, 3)}, boxes, edit=share)
    with pytest.raises(CheckpointError, match="bytes of its own"):
        read_distributed(tmp_path)


def test_chunks_that_lie_across_are_read_once(tmp_path, reads):
    write_distributed(tmp_path, {"model.w": values(8, 6)}, {"model.w": [((0, 0), (4, 6)), ((4, 0), (4, 6))]})
    for path in tmp_path.glob("*.distcp"):
        path.unlink()
    metadata = {}

    def keep(given):
        metadata["kept"] = given

    write_distributed(tmp_path, {"model.w": values(8, 6)}, {"model.w": [((0, 0), (8, 6))]}, edit=keep)
    blob = io.BytesIO()
    torch.save(values(8, 6).T.contiguous().T, blob)
    (tmp_path / "__0_0.distcp").write_bytes(blob.getvalue())
    for info in metadata["kept"].storage_data.values():
        info.length = len(blob.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata["kept"]))
    tensor = read_distributed(tmp_path)["w"]
    assert torch.equal(torch.cat(list(tensor.pieces(1))), values(8, 6))
    assert sum(nbytes for _, nbytes in reads) == tensor.nbytes


@pytest.mark.parametrize("block", [1, 30, 2**22])
def test_bits_are_compared_to_the_last(block, monkeypatch):
    monkeypatch.setattr("olmem_convert.reading.tensors.BLOCK", block)
    one = values(9, 5)

    def lazy(tensor):
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])

    assert same_bits(lazy(one), lazy(one.clone())) and same_bits(lazy(one), lazy(one.double()), torch.bfloat16)
    for row in (0, 4, 8):
        other = one.clone()
        other[row, 4] += 1
        assert not same_bits(lazy(one), lazy(other)) and not same_bits(lazy(other), lazy(one))
        other[row, 4] = float("nan")
        assert same_bits(lazy(other), lazy(other.clone()))


FLAT_DAMAGE = {
    "a gap": {"rank_0.safetensors": [[0, 5]], "rank_1.safetensors": [[7, 12]]},
    "an overlap": {"rank_0.safetensors": [[0, 6]], "rank_1.safetensors": [[5, 12]]},
    "beyond the end": {"rank_0.safetensors": [[0, 6]], "rank_1.safetensors": [[6, 13]]},
    "a missing rank": {"rank_0.safetensors": [[0, 6]]},
    "another file": {"rank_0.safetensors": [[0, 6]], "rank_7.safetensors": [[6, 12]]},
    "out of the folder": {"rank_0.safetensors": [[0, 6]], "../rank_1.safetensors": [[6, 12]]},
    "an absolute path": {"rank_0.safetensors": [[0, 6]], "/rank_1.safetensors": [[6, 12]]},
    "a folder": {".": [[0, 6]], "rank_1.safetensors": [[6, 12]]},
    "no spans": {},
    "numbers as text": {"rank_0.safetensors": [["a", "b"]]},
    "no list": {"rank_0.safetensors": 5},
    "negative": {"rank_0.safetensors": [[-6, 0], [0, 6]], "rank_1.safetensors": [[6, 12]]},
}


@pytest.mark.parametrize("form", ["shard_spec_per_file", "flattened_offsets_per_file"])
@pytest.mark.parametrize("spans", FLAT_DAMAGE.values(), ids=FLAT_DAMAGE)
def test_flat_index_that_does_not_fit_is_refused(spans, form, tmp_path):
    folder = tmp_path / "model"
    write_flat_shards(folder, {"w": values(3, 4)}, {"w": [[(0, 6)], [(6, 12)]]}, form)
    shutil.copy(folder / "rank_1.safetensors", tmp_path)
    assert torch.equal(read_flat_shards(folder)["w"].load(), values(3, 4))
    index = json.loads((folder / "metadata.json").read_text())
    whole = form == "shard_spec_per_file"
    index["tensors"]["w"][form] = {name: {"flattened_offsets": held} if whole else held for name, held in spans.items()}
    (folder / "metadata.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        read_flat_shards(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": {}}', '{"tensors": []}', '{"tensors": {"w": {}}}'])
@pytest.mark.parametrize("more", ["", "}"])
def test_spoilt_flat_index_is_refused(text, more, tmp_path):
    write_flat_shards(tmp_path, {"w": values(3, 4)}, {"w": [[(0, 12)]]})
    (tmp_path / "metadata.json").write_text(text + more)
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        read_flat_shards(tmp_path)


@pytest.mark.parametrize("entry", [None, 5, "x", [], {"shape": [3, 4]}, {"shape": "34"}, {"shape": [-3, -4]}], ids=str)
def test_spoilt_flat_entry_is_refused(entry, tmp_path):
    write_flat_shards(tmp_path, {"w": values(3, 4)}, {"w": [[(0, 12)]]})
    (tmp_path / "metadata.json").write_text(json.dumps({"tensors": {"w": entry}}))
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        read_flat_shards(tmp_path)


@pytest.mark.parametrize(
    "state",
    [[], values(3), {"w": 5}, {"w": {"v": values(3)}}, {5: values(3)}, {"w": torch.eye(3).to_sparse()}],
    ids=["list", "tensor", "number", "nested", "number as name", "sparse"],
)
def test_state_dict_of_other_things_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        read_pickle(tmp_path / "model.pt")


def test_old_archive_is_refused_with_the_way_out(tmp_path):
    torch.save({"w": values(3)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="newer torch"):
        read_pickle(tmp_path / "model.pt")


def test_quantised_safetensors_are_refused(tmp_path):
    save_file({encoded("w"): torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="floating-point"):
        read_safetensors(tmp_path / "model.safetensors", decode_pickled_key)


def test_two_keys_of_one_name_are_refused(tmp_path):
    keys = [base64.urlsafe_b64encode(pickle.dumps((("w",), False), protocol)).decode() for protocol in (2, 4)]
    save_file({key: torch.ones(3) for key in keys}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="twice"):
        read_safetensors(tmp_path / "model.safetensors", decode_pickled_key)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.wte.weight",
        "",
        "!!!!",
        "AAAA",
        encoded("w", is_pickled=True),
        *(
            base64.urlsafe_b64encode(pickle.dumps(value)).decode()
            for value in (5, "w", (("w",),), (5, False), ((5,), False))
        ),
        base64.urlsafe_b64encode(pickle.dumps((("w",), False))[:-3]).decode(),
    ],
)
def test_keys_of_another_kind_are_refused(key):
    with pytest.raises(CheckpointError):
        decode_pickled_key(key)


# Code


class Canary:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path, call=os.mkdir):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """A pickle that would leave a folder behind; none may be there in the end."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists(), "it would run"
    path.rmdir()
    yield Canary(path)
    assert not path.exists()


def test_code_in_a_state_dict_does_not_run(canary, tmp_path):
    torch.save({"w": values(3), "x": canary}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        read_pickle(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(pickle.dumps(canary))
    with pytest.raises(CheckpointError):
        read_pickle(tmp_path / "model.pt")


def test_code_in_a_chunk_does_not_run(canary, tmp_path):
    write_distributed(tmp_path, {"model.w": values(400)})
    length = (tmp_path / "__0_0.distcp").stat().st_size
    blob = io.BytesIO()
    torch.save(canary, blob)
    (tmp_path / "__0_0.distcp").write_bytes(blob.getvalue().ljust(length, b"\0"))
    blob = blob.getvalue()
    write_distributed(tmp_path / "more", {"model.w": values(3)}, edit=set_info(offset=0, length=len(blob)))
    (tmp_path / "more" / "__0_0.distcp").write_bytes(blob)
    for folder in (tmp_path, tmp_path / "more"):
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
            read_distributed(folder)["w"].load()


@pytest.mark.parametrize("where", ["alone", "planner", "entry", "storage"])
def test_code_in_metadata_does_not_run(where, canary, tmp_path):
    def edit(metadata):
        metadata.planner_data = canary if where == "planner" else None
        if where == "entry":
            metadata.state_dict_metadata["model.x"] = canary
        if where == "storage":
            metadata.storage_data["x"] = canary

    write_distributed(tmp_path, {"model.w": values(3)}, edit=edit)
    if where == "alone":
        (tmp_path / ".metadata").write_bytes(pickle.dumps(canary))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_distributed(tmp_path)


def test_code_in_a_key_does_not_run(canary):
    for value in (canary, ((canary,), False), (("w",), canary)):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(CheckpointError):
                decode_pickled_key(base64.urlsafe_b64encode(pickle.dumps(value, protocol)).decode())


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "os.system",
        "torch.load",
        "torch.hub.load",
        "torch.save",
        "functools.partial",
        "operator.attrgetter",
        "pickle.loads",
        "torch.distributed.checkpoint.metadata.Metadata.__init__",
        "torch.distributed.checkpoint.filesystem.FileSystemReader",
        "torch.serialization.os",
        "olmem_convert.reading.tensors.Path",
        "collections.OrderedDict.__class__",
    ],
)
def test_globals_that_metadata_has_no_need_of_are_refused_by_name(name, tmp_path):
    write_distributed(tmp_path, {"model.w": values(3)})
    module, _, function = name.rpartition(".")
    stack_global = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(function)])
    (tmp_path / ".metadata").write_bytes(stack_global + function.encode() + b"\x93.")
    with pytest.raises(CheckpointError, match=name):
        read_distributed(tmp_path)


def test_reading_metadata_imports_nothing(tmp_path):
    """A global of an absent package, as OLMo-core's, is not looked for."""
    before = set(sys.modules)
    for name in ("core300_fsdp2_4rank_empty", "olmo_core", "core180_gqa"):
        golden(name)
    assert not {name for name in set(sys.modules) - before if name.startswith(("olmo_core", "torch.distributed"))}


def test_metadata_of_python_3_13(tmp_path):
    """`pathlib.PosixPath`, which torch's writer notes, is called otherwise there."""
    folder = tmp_path / "model_and_optim"
    write_distributed(
        folder, {"model.w": values(4, 3)}, edit=lambda metadata: setattr(metadata, "storage_meta", folder)
    )
    metadata = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=2)
    assert b"cpathlib\nPosixPath" in metadata
    (folder / ".metadata").write_bytes(metadata.replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath"))
    assert torch.equal(read_distributed(folder)["w"].load(), values(4, 3))
