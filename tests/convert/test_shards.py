"""Safetensors written as a stream are what the library itself reads and writes."""

import errno
import json
import os
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from convert.test_tensors import values
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem_convert import CheckpointError, ConvertOptions
from olmem_convert.reading.tensors import LazyTensor
from olmem_convert.writing.shards import INDEX_NAME, WeightFiles, sha256
from safetensors import safe_open
from safetensors.torch import load_file

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor.whole(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@given(
    st.dictionaries(
        st.text("abcdef.", min_size=1, max_size=8), st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=6
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(1, 400),
)
@settings(max_examples=60)
def test_what_is_written_is_what_is_read(shapes, source, target, size):
    tensors = {name: values(*shape, dtype=source) for name, shape in shapes.items()}
    told = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = WeightFiles({key: lazy(value) for key, value in tensors.items()}, target, size)
        assert files.write(folder, told.append) == {}
        total = files.total()
        read = written(folder)
        assert set(read) == set(tensors)
        assert all(
            torch.equal(read[key], value.to(target)) and read[key].dtype == target for key, value in tensors.items()
        )
        assert total == sum(told) == sum(value.nbytes for value in read.values())
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            held = load_file(path)
            assert (
                sum(value.nbytes for value in held.values()) <= size
                or sum(value.nbytes > 0 for value in held.values()) == 1
            )
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
        index_path = folder / INDEX_NAME
        assert index_path.exists() == (len(files) > 1)
        if len(files) > 1:
            index = json.loads(index_path.read_text())
            assert index["weight_map"] == {key: path.name for path in files for key in load_file(path)}
            parameters = sum(value.numel() for value in tensors.values())
            assert index["metadata"] == {"total_size": total, "total_parameters": parameters}


@pytest.mark.parametrize("length", range(1, 9))
def test_data_are_aligned_and_views_are_written_whole(length, tmp_path):
    tensors = {"a" * length: values(3, 5).T, "b": values(40)[3:9]}
    WeightFiles({name: lazy(value) for name, value in tensors.items()}, torch.float32).write(tmp_path)
    path = tmp_path / "model.safetensors"
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive = weakref.WeakSet()

    def load():
        assert len(alive) <= 1, "more than the one just written"
        tensor = torch.ones(100)
        alive.add(tensor)
        return tensor

    tensors = {f"w{i}": LazyTensor.whole((100,), torch.float32, load) for i in range(6)}
    WeightFiles(tensors, torch.bfloat16, 900).write(tmp_path)


def test_few_pieces_of_a_large_tensor_are_in_memory(monkeypatch, tmp_path):
    alive, most = weakref.WeakSet(), []

    def read(start, stop):
        piece = torch.ones(stop - start, 16)
        alive.add(piece)
        most.append(len(alive))
        assert stop - start <= 4
        return piece

    monkeypatch.setattr("olmem_convert.writing.shards.PIECE", 4 * 16 * 4)
    WeightFiles({"w": LazyTensor((400, 16), torch.float32, read)}, torch.bfloat16).write(tmp_path)
    assert len(most) == 100 and max(most) <= 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_no_numbers_are_refused_by_name(bad, dtype, tmp_path):
    tensor = torch.ones(3, 4)
    tensor[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"`some\.weight` must be finite .*1 NaN or infinite values of 12"):
        WeightFiles({"good": lazy(torch.ones(2)), "some.weight": lazy(tensor)}, dtype).write(tmp_path)


def test_values_beyond_float16_are_refused_with_the_way_out(tmp_path):
    tensors = {"some.weight": lazy(torch.tensor([1.0, 70000.0]))}
    with pytest.raises(CheckpointError, match=r"`some\.weight`.* float16 .*--dtype bfloat16"):
        WeightFiles(tensors, torch.float16).write(tmp_path)
    (tmp_path / "again").mkdir()
    WeightFiles(tensors, torch.bfloat16).write(tmp_path / "again")


@pytest.mark.parametrize("size", ["5XB", "", "abc", "1.5.GB", "0", "0GB", "-5GB", 0, -1, "9" * 5000, "9" * 5000 + "GB"])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        ConvertOptions(max_shard_size=size)


def test_existing_files_are_not_written_over(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"here before")
    with pytest.raises(FileExistsError):
        WeightFiles({"w": lazy(torch.ones(3))}, torch.float32).write(tmp_path)


def test_sha256_is_the_commands(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_pieces_are_computed_in_one_thread_each(tmp_path):
    """Threads of torch waited for one another, and took three times the processor."""
    seen = []

    def read(start: int, stop: int) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return torch.ones(stop - start, 8)

    torch.set_num_threads(2)
    try:
        WeightFiles({"a": LazyTensor((4, 8), torch.float32, read)}, torch.bfloat16).write(tmp_path)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "pwritev"), reason="the system has no such call")
@pytest.mark.parametrize(("number", "writes"), [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_system_that_cannot_write_past_its_cache_writes_through_it(number, writes, tmp_path, monkeypatch):
    def refuse(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    tensors = {"a": values(3, 5, dtype=torch.float32)}
    monkeypatch.setattr("olmem_convert.writing.shards.DONTCACHE", 1)
    monkeypatch.setattr(os, "pwritev", refuse)
    files = WeightFiles({name: lazy(value) for name, value in tensors.items()}, torch.float32)
    if writes:
        files.write(tmp_path)
        assert torch.equal(written(tmp_path)["a"], tensors["a"])
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.write(tmp_path)


def test_what_is_written_in_part_is_written_on(tmp_path, monkeypatch):
    monkeypatch.setattr("olmem_convert.writing.shards.DONTCACHE", 1)
    monkeypatch.setattr(os, "pwritev", lambda number, data, *_: os.write(number, data[0][:7]), raising=False)
    value = values(9, 5, dtype=torch.float32)
    WeightFiles({"a": lazy(value)}, torch.float32).write(tmp_path)
    assert torch.equal(written(tmp_path)["a"], value)
