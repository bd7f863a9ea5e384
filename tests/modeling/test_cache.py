"""OlmemCache: where it writes, what it holds, how its rows and its past are chosen, and what it refuses."""

import copy
import json
import os
from pathlib import Path

import olmem
import pytest
import torch
from fresh import run_fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import (
    CHUNKED,
    CHUNKS,
    FULL,
    MIXED,
    SINKS,
    SLIDING,
    STREAMS,
    TINY,
    WINDOW,
    left_padded,
    oracle,
    span,
    tiny,
    tokens,
)
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM, backends_olmem, state_olmem
from olmem.rules_olmem import POSITION_EMBEDDINGS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Olmo3Config, Olmo3ForCausalLM, StaticCache

EVERY = STREAMS | {"plain": {}, "full": {"layer_types": FULL}}
every_model = pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
bounded_models = pytest.mark.parametrize(
    "changes", [STREAMS[name] for name in ("window", "sinks", "chunks")], ids=["window", "sinks", "chunks"]
)


def read(model: OlmemForCausalLM, ids: torch.Tensor, cache: OlmemCache, mask: torch.Tensor | None = None):
    """Logits (B, T, vocab_size) of ids that go on from what a cache holds."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def alone(model: OlmemForCausalLM, *parts: torch.Tensor) -> torch.Tensor:
    """Logits of the last part (T,) of a row that is read at once."""
    with torch.no_grad():
        return model(torch.cat(parts)[None], use_cache=False).logits[0, -len(parts[-1]) :]


def after(model: OlmemForCausalLM, ids: torch.Tensor, **kwargs) -> OlmemCache:
    """A cache that has read ids."""
    cache = OlmemCache(model.config, **kwargs)
    read(model, ids, cache)
    return cache


def pointers(cache: OlmemCache) -> list[int]:
    """Where the buffers of every layer are."""
    return [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers.values()]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-5)


# In place


@every_model
def test_a_step_writes_one_slot_of_each_row_in_place(changes):
    model = tiny(**changes)
    batch = left_padded(torch.arange(5 * span(model)), torch.arange(3 * span(model) + 1))
    cache = OlmemCache(model.config)
    read(model, batch["input_ids"], cache, batch["attention_mask"])
    for step in range(2 * span(model)):
        seen = cache.seen.tolist()
        places, before = pointers(cache), [copy.deepcopy(layer.buffers) for layer in cache.layers]
        read(model, torch.tensor([[60 - step], [60 - step]]), cache)
        assert pointers(cache) == places
        for layer, old in zip(cache.layers, before, strict=True):
            sinks, size = layer.visibility.num_sinks, layer.capacity
            for name in set(layer.names):
                changed = (layer.buffers[name] != old[name]).any(-1).any(1)[:, sinks : sinks + size]
                assert changed.sum(-1).tolist() == [1, 1]
                assert changed.int().argmax(-1).tolist() == [number % size for number in seen]


class Allocations(TorchDispatchMode):
    """The most numbers that any operation returned in memory of its own."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in known:
                self.most = max(self.most, each.numel())
        return result


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(
    "window", [{"layer_types": SLIDING}, {"layer_types": CHUNKED, "attention_chunk_lookback": 1}], ids=str
)
def test_a_step_makes_nothing_of_the_size_of_the_window(window, sinks, backend):
    """Scores, which have a number for each head and key, are the largest tensors; the window's keys have 16."""
    model = tiny(**window, sliding_window=512, attention_chunk_size=256, num_sink_tokens=sinks)
    model.set_attn_implementation(backend)
    cache = after(model, tokens(1, 1500))
    size = cache.layers[0].buffers["keys"].numel()
    with Allocations() as made:
        read(model, tokens(1, 1), cache)
    assert 0 < made.most <= size * 4 / 16


def test_a_full_layer_grows_in_blocks():
    model = tiny(layer_types=FULL, num_hidden_layers=1)
    cache, rooms = OlmemCache(model.config), []
    for step in range(3 * state_olmem.GROWTH):
        read(model, tokens(1, 1, seed=step), cache)
        rooms.append(cache.layers[0].buffers["keys"].shape[2])
    assert len(set(rooms)) <= 3
    assert rooms == sorted(rooms)
    ids = torch.stack([tokens(1, seed=step) for step in range(len(rooms))], dim=1)[0]
    close(read(model, tokens(1, 3), cache)[0], alone(model, ids, tokens(3)))


def test_room_for_what_is_expected_is_made_at_once_and_is_no_limit():
    model = tiny(layer_types=FULL, num_hidden_layers=1)
    for expected, room in ((300, 300), (10**9, 100 + state_olmem.GROWTH), (3, state_olmem.GROWTH)):
        cache = OlmemCache(model.config)
        cache.expect(expected)
        read(model, tokens(1, 100), cache)
        assert cache.layers[0].capacity == room
    options = {"max_new_tokens": 200, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    assert model.generate(tokens(1, 100), **options).past_key_values.layers[0].capacity == 299


@every_model
def test_max_length_makes_room_once(changes):
    model = tiny(**changes)
    length = 4 * span(model) + 2
    ids = tokens(2, length)
    cache = OlmemCache(model.config, max_length=length)
    found = [read(model, ids[:, :1], cache)]
    places = pointers(cache)
    for layer in cache.layers:
        assert layer.buffers["keys"].shape[2] == layer.visibility.num_sinks + (layer.visibility.span or length) + 1
    found += [read(model, part, cache) for part in ids[:, 1:].split(3, dim=1)]
    assert pointers(cache) == places
    close(torch.cat(found, dim=1)[0], alone(model, ids[0]))
    assert not cache.is_compileable  # `generate()` shall not make its user wait for a compiler


@pytest.mark.parametrize("length", [1, 3])
def test_a_full_cache_says_so_and_stays_as_it_was(length):
    model = tiny()
    cache = after(model, tokens(1, 10), max_length=12 if length == 3 else 10)
    with pytest.raises(ValueError, match=rf"`max_length` must be at least {10 + length} to go on"):
        read(model, tokens(1, length), cache)
    assert cache.get_seq_length() == 10
    assert cache.seen.tolist() == [10]
    if length == 3:
        close(read(model, tokens(1, 2, seed=1), cache)[0], alone(model, tokens(10), tokens(2, seed=1)))


@bounded_models
def test_max_length_limits_full_layers_only(changes):
    model = tiny(**changes)
    cache = OlmemCache(model.config, max_length=5)
    read(model, tokens(1, 3 * span(model) + 5), cache)
    close(read(model, tokens(1, 4, seed=1), cache)[0], alone(model, tokens(3 * span(model) + 5), tokens(4, seed=1)))


@pytest.mark.parametrize("length", [0, -1])
def test_max_length_must_be_positive(length):
    with pytest.raises(ValueError, match=rf"`max_length` must be a positive integer .* \(got {length}\)"):
        OlmemCache(OlmemConfig(**TINY), max_length=length)


@every_model
def test_nbytes_is_the_sum_of_the_buffers_and_bounded_where_the_layers_are(changes):
    model = tiny(**changes)
    cache = OlmemCache(model.config)
    sizes = []
    for step in range(6 * span(model)):
        read(model, tokens(2, 1, seed=step), cache)
        tensors = [buffer for layer in cache.layers for buffer in layer.buffers.values()]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert cache.nbytes == sizes[-1]
    assert len(set(sizes[span(model) :])) == 1
    read(model, tokens(2, 1000), cache)
    assert (cache.nbytes == sizes[-1]) == (FULL not in model.config.layer_types)


# Counters and the past


@every_model
def test_reset_forgets_everything_and_keeps_the_room(changes):
    model = tiny(**changes)
    cache = after(model, tokens(2, 3 * span(model)))
    places = pointers(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(2, 2 * span(model) + 1, seed=1)
    found = torch.cat([read(model, part, cache) for part in ids.split(2, dim=1)], dim=1)
    for row, logits in zip(ids, found, strict=True):
        close(logits, alone(model, row))
    assert pointers(cache) == places


@every_model
@pytest.mark.parametrize("removed", [1, 2, 5])
def test_what_was_cropped_was_never_read(changes, removed):
    """Full layers at any time, others until their window has let go of a token; then again in pieces of any size."""
    model = tiny(**changes)
    shortest = min((layer.visibility.span or 40) for layer in OlmemCache(model.config).layers)
    length = min(shortest, 9)
    removed = min(removed, length)
    ids, others = tokens(2, length), tokens(2, 3 * span(model) + 4, seed=1)
    kept = ids[:, : length - removed]
    for tokens_to_remove in (-removed, *([length - removed] if removed < length else [])):
        for size in (1, 4, others.shape[1]):
            cache = after(model, ids)
            cache.crop(tokens_to_remove)
            assert cache.get_seq_length() == length - removed
            found = torch.cat([read(model, part, cache) for part in others.split(size, dim=1)], dim=1)
            for row in range(2):
                close(found[row], alone(model, kept[row], others[row]))


@every_model
def test_crop_counts_as_transformers_does(changes):
    model = tiny(**changes)
    length = 3
    cache = after(model, tokens(1, length))
    for nothing in (0, -0, length, length + 5):
        cache.crop(nothing)
        assert cache.get_seq_length() == length
    with pytest.raises(ValueError, match=rf"`crop` cannot take back more than was read \(got 4 of {length}\)"):
        cache.crop(-4)
    cache.crop(-length)
    assert cache.get_seq_length() == 0
    close(read(model, tokens(1, 9, seed=1), cache)[0], alone(model, tokens(9, seed=1)))


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("tokens_to_remove", [-1, 1])
def test_crop_gives_the_reason_once_a_window_has_let_go(changes, tokens_to_remove):
    model = tiny(**changes)
    cache = after(model, tokens(1, span(model) + 1))
    with pytest.raises(
        ValueError, match="`crop` cannot take tokens back once a window has lost some, as that of layer"
    ):
        cache.crop(tokens_to_remove)
    assert cache.get_seq_length() == span(model) + 1
    assert not cache.is_croppable
    assert OlmemCache(OlmemConfig(**TINY | {"layer_types": FULL})).is_croppable
    close(read(model, tokens(1, 3, seed=1), cache)[0], alone(model, tokens(span(model) + 1), tokens(3, seed=1)))


CROPPED = pytest.mark.parametrize("changes", [{"layer_types": FULL}, {"sliding_window": 20}], ids=str)


@CROPPED
@pytest.mark.parametrize("left", [1, 3, 5, 6])
def test_crop_takes_back_columns_of_a_left_padded_batch(changes, left):
    """Of padding too: a row whose every token is taken back was never read."""
    model = tiny(**changes)
    ids, cache = tokens(2, 6), OlmemCache(model.config)
    mask = torch.stack((torch.arange(6) >= left, torch.arange(6) >= 0))
    read(model, ids, cache, mask)
    cache.crop(-3)
    assert cache.seen.tolist() == [max(0, 3 - left), 3]
    others = tokens(2, 4, seed=1)
    found = read(model, others, cache)
    for row in range(2):
        close(found[row], alone(model, ids[row, :3][mask[row, :3]], others[row]))


@CROPPED
@pytest.mark.parametrize("padding", [[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], ids=str)
def test_crop_refuses_to_guess_which_columns_were_padding(changes, padding):
    """As many tokens as columns were forgotten, padding among them."""
    model = tiny(**changes)
    ids, cache = tokens(2, 6), OlmemCache(model.config)
    mask = torch.tensor([padding, [1] * 6])
    read(model, ids[:, :5], cache, mask[:, :5])
    read(model, ids[:, 5:], cache, mask[:, 5:])
    for each in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="`crop` cannot tell tokens from padding"):
            each.crop(-3)
    found = read(model, tokens(2, 1, seed=1), cache)
    for row in range(2):
        close(found[row], alone(model, ids[row][mask[row].bool()], tokens(2, 1, seed=1)[row]))
    cache.reset()
    read(model, ids, cache)
    cache.crop(-3)
    assert cache.seen.tolist() == [3, 3]


@every_model
def test_lengths_count_columns(changes):
    model = tiny(**changes)
    cache, count = OlmemCache(model.config), 0
    for length in (0, 1, 2, 4, 1, 7):
        if length:
            read(model, tokens(3, length), cache)
        count += length
        assert cache.get_seq_length() == cache.get_seq_length(1) == count
        assert cache.batch_size == (3 if length else -1)
        for query_length in (1, 5):
            for index, layer in enumerate(cache.layers):
                held = count if layer.visibility.span is None else min(count, layer.visibility.span - 1)
                assert cache.get_mask_sizes(query_length, index) == (held + query_length, count - held)


@every_model
def test_a_layer_shows_the_keys_that_it_holds(changes):
    """As caches of Transformers do, which tools read; also once some were forgotten."""
    model = tiny(**changes)
    cache = OlmemCache(model.config)
    for length in (1, 1, 3 * span(model), -1, None, 2):
        if length is None:
            cache.reset()
        elif length > 0:
            read(model, tokens(2, length), cache)
        elif cache.is_croppable:
            cache.crop(length)
        for layer in cache.layers:
            held = min(cache.get_seq_length(), layer.visibility.span or cache.get_seq_length())
            assert layer.keys.shape == layer.values.shape == (2, 2, held, 8)


def test_mask_sizes_are_those_of_a_dynamic_cache():
    model = tiny()
    for length in range(1, 3 * WINDOW):
        dynamic, cache = DynamicCache(config=model.config), OlmemCache(model.config)
        for each in (dynamic, cache):
            read(model, tokens(1, length), each)
        for index in range(2):
            for query_length in (1, 3):
                expected = dynamic.get_mask_sizes(query_length, index)
                assert cache.get_mask_sizes(query_length, index) == tuple(expected)


# Rows


@every_model
@pytest.mark.parametrize(
    "choose",
    [
        pytest.param((lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1, 2, 2, 2]), id="repeat"),
        pytest.param((lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]), id="fewer"),
        pytest.param((lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 2, 0])), [1, 1, 2, 0]), id="more"),
        pytest.param((lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]), id="mask"),
        pytest.param((lambda cache: cache.reorder_cache(torch.tensor([1, 2, 1])), [1, 2, 1]), id="reorder"),
    ],
)
def test_rows_are_chosen_with_all_that_they_hold(changes, choose):
    function, chosen = choose
    model = tiny(**changes)
    rows = [tokens(length, seed=length) for length in (4 * span(model), span(model) + 1, 2)]
    batch = left_padded(*rows)
    cache = OlmemCache(model.config)
    read(model, batch["input_ids"], cache, batch["attention_mask"])
    places = pointers(cache)
    function(cache)
    assert cache.batch_size == len(chosen)
    assert (pointers(cache) == places) == (len(chosen) == 3)
    others = tokens(len(chosen), 2 * span(model) + 2, seed=9)
    found = torch.cat([read(model, part, cache) for part in others.split([1, 1, 2 * span(model)], dim=1)], dim=1)
    for row, other, logits in zip(chosen, others, found, strict=True):
        close(logits, alone(model, rows[row], other))


def test_an_empty_cache_has_no_rows_to_choose():
    cache = OlmemCache(OlmemConfig(**TINY))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.is_initialized) == (-1, 0, False)


@every_model
@pytest.mark.parametrize("max_length", [None, 100])
def test_a_copy_is_a_branch(changes, max_length):
    model = tiny(**changes)
    ids = tokens(3 * span(model))
    cache = after(model, ids[None], max_length=max_length)
    branch = copy.deepcopy(cache)
    for seed, each in ((1, cache), (2, branch)):
        found = [read(model, part, each) for part in tokens(1, 4, seed=seed).split(1, dim=1)]
        close(torch.cat(found, dim=1)[0], alone(model, ids, tokens(4, seed=seed)))
    close(read(model, ids[None], copy.deepcopy(branch))[0], alone(model, ids, tokens(4, seed=2), ids))


@every_model
def test_a_cache_goes_from_inference_mode_to_training(changes):
    """A tensor made in inference mode cannot be written outside of it."""
    model = tiny(**changes)
    parts = [tokens(2 * span(model)), tokens(1, seed=1), tokens(3, seed=2), tokens(1, seed=3)]
    cache = OlmemCache(model.config)
    with torch.inference_mode():
        model(parts[0][None], past_key_values=cache)
        model(parts[1][None], past_key_values=cache)
    close(read(model, parts[2][None], cache)[0], alone(model, *parts[:3]))
    logits = model(parts[3][None], past_key_values=cache).logits[0]
    logits.sum().backward()
    close(logits.detach(), alone(model, *parts))
    with torch.inference_mode():
        close(model(parts[0][None], past_key_values=cache).logits[0], alone(model, *parts, parts[0]))


# On disk


@pytest.mark.slow
def test_another_process_goes_on_from_a_file(tmp_path):
    """A hundred greedy tokens, then some drawn ones, as the process that saved writes them itself: after prompts with
    and without left padding, in float32 and bfloat16."""
    cases = {name: EVERY[name] for name in ("sinks", "chunks", "mixed", "plain")} | {"mixed-half": MIXED}
    expected = {}
    for name, changes in cases.items():
        folder, dtype = tmp_path / name, torch.bfloat16 if name.endswith("-half") else torch.float32
        tiny(**changes).save_pretrained(folder)
        model = OlmemForCausalLM.from_pretrained(folder, dtype=dtype)
        rows = [tokens(length, seed=length) for length in (4 * span(model), span(model) + 1)]
        batch = left_padded(*rows)
        cache = OlmemCache(model.config)
        batch = dict(zip(batch, goes_on(model, cache, *batch.values(), 2), strict=True))
        cache.save(folder / "cache.safetensors")
        save_file(batch, folder / "batch.safetensors")
        expected[name] = written_after(model, cache, batch)
        assert len(expected[name][0].unique()) > 5
    environment = os.environ | {"PYTHONPATH": str(Path(olmem.__file__).parents[1])}
    child = run_fresh(GOES_ON, tmp_path, json.dumps(list(cases)), env=environment)
    assert child.returncode == 0, child.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert [name for name in cases if not torch.equal(found[name], expected[name])] == []


def goes_on(model, cache: OlmemCache, ids: torch.Tensor, mask: torch.Tensor, count: int, **kwargs):
    """Ids and mask with that many more tokens."""
    kwargs = {"do_sample": False, "pad_token_id": 0} | kwargs
    ids = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, **kwargs)
    return ids, torch.cat((mask, torch.ones_like(ids[:, mask.shape[1] :])), dim=1)


def written_after(model, cache: OlmemCache, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids, mask = goes_on(model, cache, batch["input_ids"], batch["attention_mask"], 100)
    torch.manual_seed(5)
    return goes_on(model, cache, ids, mask, 20, do_sample=True)[0].clone()


# argv: the folder that has a folder for each case, and their names.
GOES_ON = """
import json, sys
import torch
from olmem import OlmemCache, OlmemForCausalLM
from safetensors.torch import load_file, save_file

root, found = sys.argv[1], {}
for name in json.loads(sys.argv[2]):
    dtype = torch.bfloat16 if name.endswith("-half") else torch.float32
    model = OlmemForCausalLM.from_pretrained(f"{root}/{name}", dtype=dtype)
    cache = OlmemCache.load(f"{root}/{name}/cache.safetensors", model.config)
    batch = load_file(f"{root}/{name}/batch.safetensors")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for count, options in ((100, {"do_sample": False}), (20, {"do_sample": True})):
        if options["do_sample"]:
            torch.manual_seed(5)
        ids = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, pad_token_id=0, **options
        )
        mask = torch.cat((mask, torch.ones_like(ids[:, mask.shape[1] :])), dim=1)
    found[name] = ids.clone()
save_file(found, f"{root}/found.safetensors")
"""


@every_model
@pytest.mark.parametrize("max_length", [None, 200])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_file_holds_all_that_the_cache_does_and_no_more(changes, max_length, length, tmp_path):
    model = tiny(**changes)
    ids = tokens(2, length)
    cache = after(model, ids, max_length=max_length)
    cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"]
    loaded = OlmemCache.load(tmp_path / "cache", model.config)
    assert (loaded.max_length, loaded.get_seq_length()) == (max_length, length)
    assert loaded.seen.tolist() == [length, length]
    parts = [ids[0], tokens(3, seed=1), tokens(1, seed=2)]
    for each in (cache, loaded):
        for number in (1, 2):
            found = read(model, parts[number].expand(2, -1), each)[0]
            close(found, alone(model, *parts[: number + 1]))
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "cache").values()) <= cache.nbytes


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model = tiny()
    after(model, tokens(1, 9)).save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()

    def fail(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            after(model, tokens(1, 3)).save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before
    assert os.listdir(tmp_path) == ["cache"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        after(model, tokens(1, 3)).save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["cache", "folder"]
    after(model, tokens(1, 3)).save(str(tmp_path / "cache"))
    assert OlmemCache.load(str(tmp_path / "cache"), model.config).get_seq_length() == 3


def test_a_saved_cache_is_readable_like_any_other_file(tmp_path):
    """It was for its owner alone, whatever the umask."""
    (tmp_path / "other").touch()
    after(tiny(), tokens(1, 3)).save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other"]


def test_a_cache_that_has_read_nothing_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="needs a cache that has read tokens"):
        OlmemCache(OlmemConfig(**TINY)).save(tmp_path / "cache")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    after(tiny(**MIXED), tokens(2, 20)).save(path)
    return path


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.01, 0.2, 0.5, 0.9, 0.9999])
def test_a_file_cut_short_is_refused(part, saved, tmp_path):
    whole = saved.read_bytes()
    (tmp_path / "short").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"`path` must be a whole file of `OlmemCache.save` \(got .*short"):
        OlmemCache.load(tmp_path / "short", tiny(**MIXED).config)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=64), start=st.floats(0, 1))
def test_bytes_that_are_no_cache_are_refused(data, start, tmp_path_factory, saved):
    """Alone, or written over a part of a file's header."""
    whole, config = saved.read_bytes(), tiny(**MIXED).config
    at = int(start * int.from_bytes(whole[:8], "little"))
    path = tmp_path_factory.mktemp("bytes") / "cache"
    for content in (data, whole[:at] + data + whole[at + len(data) :]):
        path.write_bytes(content)
        try:
            loaded = OlmemCache.load(path, config)
        except ValueError as error:
            assert str(error).startswith("`pa")  # `path` or `past_key_values`, with what is wrong
        else:
            assert loaded.seen.tolist() == [20, 20]


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        OlmemCache.load(tmp_path / "nothing", OlmemConfig(**TINY))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "olmem-cache-0"}], ids=str)
def test_a_file_of_something_else_is_refused(metadata, tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "weights", metadata)
    with pytest.raises(ValueError, match=r"`path` must be a file of `OlmemCache.save` \(got .*weights, of format"):
        OlmemCache.load(tmp_path / "weights", OlmemConfig(**TINY))


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_sink_tokens", 2),
        ("sliding_window", 4),
        ("attention_chunk_size", 4),
        ("attention_chunk_lookback", 0),
        ("layer_types", [SLIDING, CHUNKED, CHUNKED]),
        ("num_hidden_layers", 4),
        ("num_key_value_heads", 4),
        ("head_dim", 6),
        ("hidden_size", 32),
        ("norm_placement", "pre"),
        ("rope_parameters", {SLIDING: {"rope_theta": 51.0}}),
    ],
)
def test_a_cache_of_another_model_is_refused_with_the_field_that_differs(name, value, saved):
    changes = MIXED | {name: value}
    if name == "num_hidden_layers":
        changes |= {"layer_types": None}
    model, cache = tiny(**changes), after(tiny(**MIXED), tokens(2, 3))
    differ = r"`past_key_values` is of another model, whose `\w+` was .* \(got .*\); use it with its own model"
    with pytest.raises(ValueError, match=differ) as in_use:
        read(model, tokens(2, 1), cache)
    with pytest.raises(ValueError, match=differ) as from_file:
        OlmemCache.load(saved, model.config)
    if name != "num_hidden_layers":
        assert f"`{name}`" in str(in_use.value)
        assert f"`{name}`" in str(from_file.value)


def test_what_changes_nothing_of_a_cache_may_differ(saved):
    config = tiny(**MIXED, attention_dropout=0.5, use_cache=False, pad_token_id=1, logits_scaling=2.0).config
    assert OlmemCache.load(saved, config).get_seq_length() == 20


TAMPERED = {
    "a row that has read less than nothing": ("seen", lambda seen: seen - 21),
    "a row that has read more than there was": ("seen", lambda seen: seen + 1),
    "a table of counters": ("seen", lambda seen: seen[None]),
    "one counter": ("seen", lambda seen: seen[0]),
    "no rows": ("seen", lambda seen: seen[:0]),
    "another row": ("seen", lambda seen: seen.repeat(2)),
    "half a token": ("seen", lambda seen: seen - 0.5),
    "columns below nothing": ("columns", lambda columns: columns - 40),
    "fewer columns": ("columns", lambda columns: columns - 17),
    "more columns": ("columns", lambda columns: columns + 1),
    "columns by row": ("columns", lambda columns: columns.repeat(2)),
    "half a column": ("columns", lambda columns: columns + 0.5),
    "gaps by row": ("gaps", lambda gaps: gaps.repeat(2)),
    "another number of heads": ("layers.0.keys", lambda keys: keys[:, :1].contiguous()),
    "another number of slots": ("layers.1.values", lambda values: values[:, :, 1:].contiguous()),
    "heads of another size": ("layers.0.values", lambda values: values[..., :4].contiguous()),
    "whole numbers": ("layers.2.keys", lambda keys: keys.long()),
}


def rewrite(path: Path, saved: Path, **changes: torch.Tensor | None) -> None:
    """A saved file with other tensors, or without those that are None."""
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


DAMAGED = r"`path` must be a whole file of `OlmemCache\.save` \(got .*\); save it anew"


@pytest.mark.parametrize("name, change", TAMPERED.values(), ids=TAMPERED)
def test_a_file_whose_parts_do_not_fit_is_refused(name, change, saved, tmp_path):
    rewrite(tmp_path / "cache", saved, **{name: change(load_file(saved)[name])})
    with pytest.raises(ValueError, match=DAMAGED):
        OlmemCache.load(tmp_path / "cache", tiny(**MIXED).config)


@pytest.mark.parametrize("name", ["seen", "columns", "gaps", "layers.0.keys", "layers.1.values", "layers.2.values"])
def test_a_file_without_a_part_is_refused(name, saved, tmp_path):
    rewrite(tmp_path / "cache", saved, **{name: None})
    with pytest.raises(ValueError, match=DAMAGED):
        OlmemCache.load(tmp_path / "cache", tiny(**MIXED).config)


@pytest.mark.parametrize("key", ["architecture", "max_length"])
@pytest.mark.parametrize("value", [None, "", "{", "[]", '"x"', "-3"], ids=str)
def test_a_file_whose_metadata_is_broken_is_refused(key, value, saved, tmp_path):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    metadata = {name: text for name, text in metadata.items() if name != key} | ({key: value} if value else {})
    save_file(load_file(saved), tmp_path / "cache", metadata)
    with pytest.raises(ValueError, match="`"):
        OlmemCache.load(tmp_path / "cache", tiny(**MIXED).config)


# What does not fit


def test_another_batch_size_is_refused():
    model = tiny()
    cache = after(model, tokens(2, 3))
    with pytest.raises(ValueError, match=r"`past_key_values` holds a batch of 2 \(got an input of 3 rows\)"):
        read(model, tokens(3, 1), cache)
    assert cache.seen.tolist() == [3, 3]


@pytest.mark.parametrize("length", [1, 3])
def test_another_model_is_told_what_the_cache_is(length):
    config = {key: value for key, value in TINY.items() if key not in ("initializer_range", "rope_parameters")}
    other = Olmo3ForCausalLM(Olmo3Config(**config, pad_token_id=None, eos_token_id=None))
    with pytest.raises(ValueError, match="`past_key_values` is an OlmemCache, which serves Olmem models only"):
        read(other, tokens(1, length), OlmemCache(tiny().config))


NEW_KINDS = [
    (SINKS, "num_sink_tokens"),
    (CHUNKS, "layer_types"),
    (MIXED, "num_sink_tokens"),
    ({"position_embedding": "xpos"}, "position_embedding"),
    ({"position_embedding": ["none", "linspace"], "layer_types": FULL}, "position_embedding"),
]
new_kinds = pytest.mark.parametrize(
    "changes, name", NEW_KINDS, ids=["sinks", "chunks", "mixed", "xpos", "linspace in a full layer"]
)


@new_kinds
def test_what_a_cache_of_transformers_cannot_hold_is_refused(changes, name):
    model = tiny(**changes)
    ids = tokens(1, 3)
    for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=20)):
        with pytest.raises(ValueError, match=rf"`{name}` must .* with a {type(cache).__name__}; leave"):
            read(model, ids, cache)
        with pytest.raises(ValueError, match=rf"`{name}` must .* with a {type(cache).__name__}; leave"):
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)
    for kind in ("static", "dynamic", "offloaded", "quantized"):
        words = rf"`{name}` must .*`cache_implementation` '{kind}'; leave it out, and generate\(\) makes an OlmemCache"
        with pytest.raises(ValueError, match=words):
            model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=kind, max_new_tokens=2)


@new_kinds
@pytest.mark.parametrize("use_cache", [False, True])
def test_what_another_backend_cannot_see_is_refused(changes, name, use_cache):
    model = tiny(**changes)
    for backend in ("flex_attention", "flash_attention_2"):
        model.config._attn_implementation = backend  # as `set_attn_implementation` does, where it is installed
        with pytest.raises(ValueError, match=rf"`{name}` must .* with `attn_implementation` '{backend}'; set 'sdpa'"):
            model(tokens(1, 3), use_cache=use_cache)


@new_kinds
def test_a_mask_of_the_callers_own_is_refused(changes, name):
    model = tiny(**changes)
    mask = torch.ones(1, 1, 3, 3).tril().bool()
    with pytest.raises(ValueError, match=rf"`{name}` must .* with an `attention_mask` that is not \(B, T\)"):
        model(tokens(1, 3), attention_mask=mask)


@every_model
def test_an_olmem_cache_takes_padding_masks_only(changes):
    model = tiny(**changes)
    cache = after(model, tokens(1, 3))
    with pytest.raises(ValueError, match="`past_key_values` is an OlmemCache, which does not work with an `attention_"):
        read(model, tokens(1, 2), cache, torch.ones(1, 1, 2, 5, dtype=torch.bool))
    for shape in ((1, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"`attention_mask` must cover the input's 1 rows of 2 tokens"):
            read(model, tokens(1, 2), cache, torch.ones(shape))
    assert cache.get_seq_length() == 3


def test_an_olmem_cache_serves_no_other_backend():
    model = tiny()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="is an OlmemCache, which does not work with `attn_implementation` 'flex_att"):
        read(model, tokens(1, 2), OlmemCache(model.config))


# Weights


def check_sums(model: OlmemForCausalLM, weights: torch.Tensor) -> None:
    """They add up to one, and to less where learned sinks have a share."""
    totals = weights.sum(-1)
    if model.config.sink_logit_init is None:
        assert_close(totals, torch.ones_like(totals))
    else:
        assert totals.min() < 0.99 and totals.max() < 1 + 1e-6


@pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
def test_attention_weights_are_those_of_the_oracle(changes):
    model = tiny(**changes)
    model.set_attn_implementation("eager")
    length = 3 * span(model) + 1
    ids, expected = tokens(length), []
    oracle(model, ids, attentions=expected)
    with torch.no_grad():
        found = model(ids[None], output_attentions=True, use_cache=False).attentions
    assert [weights.shape for weights in found] == [(1, 4, length, length)] * len(expected)
    for weights, exact in zip(found, expected, strict=True):
        check_sums(model, weights)
        assert_close(weights[0].double(), exact, rtol=0, atol=1e-5)
        assert torch.equal(weights[0] > 0, exact > 0)


@pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("size", [1, 3])
def test_attention_weights_with_a_cache_are_of_the_sinks_and_the_keys_held(changes, size):
    """Columns: the sinks, once a window may have left them, then the keys that were held, oldest first."""
    model = tiny(**changes)
    model.set_attn_implementation("eager")
    ids, expected = tokens(4 * span(model)), []
    oracle(model, ids, attentions=expected)
    cache, start = OlmemCache(model.config), 0
    for piece in ids.split(size):
        stop = start + len(piece)
        with torch.no_grad():
            attentions = model(piece[None], past_key_values=cache, output_attentions=True).attentions
        for layer, weights, exact in zip(cache.layers, attentions, expected, strict=True):
            check_sums(model, weights)
            visibility, rows = layer.visibility, exact[:, start:stop]
            sinks = visibility.num_sinks if stop > (visibility.span or stop) else 0
            first = stop - (weights.shape[-1] - sinks)
            assert first <= int(visibility.start(start))
            by_token = torch.zeros(4, len(piece), stop).double()
            by_token[:, :, max(first, 0) :] = weights[0, :, :, sinks + max(-first, 0) :].double()
            by_token[:, :, :sinks] += weights[0, :, :, :sinks].double()
            assert_close(by_token, rows[:, :, :stop], rtol=0, atol=1e-5)
        start = stop


SCHEMES_ALONE = [*POSITION_EMBEDDINGS, ["xpos", "linspace", "none"]]


@pytest.mark.parametrize("shared", ["none", "key_value"])
@pytest.mark.parametrize("scheme", SCHEMES_ALONE, ids=str)
@pytest.mark.parametrize("sinks", [0, 3])
@torch.no_grad()
def test_sdpa_has_no_attention_weights(sinks, scheme, shared):
    """Whatever is read, in one block or several, and however it is cut."""
    model = tiny(**MIXED | {"num_sink_tokens": sinks, "position_embedding": scheme, "shared_projections": shared})
    model.set_attn_implementation("sdpa")
    ids = tokens(1, 300)
    expected = model(ids, use_cache=False).logits
    for pieces in ([300], [7, 293], [260, 1, 30, *[1] * 9]):
        cache, start = OlmemCache(model.config), 0
        for piece in ids.split(pieces, dim=1):
            found = model(piece, past_key_values=cache, output_attentions=True)
            assert not found.attentions
            assert_close(found.logits, expected[:, start : start + piece.shape[1]], rtol=0, atol=1e-4)
            start += piece.shape[1]
    assert not model(ids, use_cache=False, output_attentions=True).attentions


@pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
@torch.no_grad()
def test_sdpa_has_no_attention_weights_of_packed_documents_either(changes):
    """They were all zero; eager ones are those of each document."""
    model, ids = tiny(**changes), tokens(1, 20)
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    model.set_attn_implementation("sdpa")
    assert not model(ids, position_ids=positions, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    packed = model(ids, position_ids=positions, use_cache=False, output_attentions=True).attentions
    documents = [model(each, use_cache=False, output_attentions=True).attentions for each in ids.split([12, 8], dim=1)]
    for weights, first, second in zip(packed, *documents, strict=True):
        expected = torch.zeros_like(weights)
        expected[..., :12, :12], expected[..., 12:, 12:] = first, second
        close(weights, expected)


@pytest.mark.parametrize("shared", ["none", "key_value"])
@pytest.mark.parametrize("scheme", SCHEMES_ALONE, ids=str)
@pytest.mark.parametrize("sinks", [0, 3])
@torch.no_grad()
def test_attention_weights_of_several_blocks_are_those_of_one(sinks, scheme, shared, monkeypatch):
    """At once, and in pieces with a cache."""
    model = tiny(**MIXED | {"num_sink_tokens": sinks, "position_embedding": scheme, "shared_projections": shared})
    model.set_attn_implementation("eager")
    ids = tokens(1, 3 * span(model) + 1)

    def weights() -> list[torch.Tensor]:
        cache = OlmemCache(model.config)
        found = [model(ids, use_cache=False, output_attentions=True)]
        for piece in ids.split([3, len(ids[0]) - 4, 1], dim=1):
            found.append(model(piece, past_key_values=cache, output_attentions=True))
        return [each for outputs in found for each in outputs.attentions]

    expected = weights()
    assert len(expected) == 4 * model.config.num_hidden_layers
    monkeypatch.setattr(backends_olmem, "BLOCK", {"cpu": 3})
    monkeypatch.setattr(backends_olmem, "WHOLE", 1)
    for blocks, one in zip(weights(), expected, strict=True):
        assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
        close(blocks, one)


# What must not happen unseen


def gradients(model: OlmemForCausalLM, ids: torch.Tensor, **kwargs) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_model
def test_frozen_embeddings_change_no_other_gradient(changes):
    """As in training with LoRA: keys and values of full layers, read where the cache has them, had no gradient."""
    model = tiny(**changes)
    model.get_input_embeddings().requires_grad_(False)
    ids = tokens(2, 20)
    found, expected = gradients(model, ids), gradients(model, ids, use_cache=False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@every_model
def test_no_buffer_ever_carries_a_graph(changes):
    """One-token steps of embeddings without `no_grad` kept the graph of the whole stream."""
    model, ids = tiny(**changes), tokens(1, 12)
    embedded, cache = model.get_input_embeddings()(ids).detach(), OlmemCache(model.config)
    for index in range(12):
        logits = model(inputs_embeds=embedded[:, index : index + 1], past_key_values=cache).logits
        assert logits.requires_grad
        logits.sum().backward()
        assert not any(buffer.requires_grad for layer in cache.layers for buffer in layer.buffers.values())
    close(logits[0].detach(), alone(model, ids[0, :-1], ids[0, -1:]))


@every_model
def test_a_forward_broken_off_leaves_a_cache_that_says_so(changes):
    """Read again, the same call gave other logits: some layers had written, and none had counted."""
    model, cache = tiny(**changes), OlmemCache(tiny(**changes).config)
    read(model, tokens(1, 9), cache)

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        read(model, tokens(1, 3), cache)
    handle.remove()
    with pytest.raises(ValueError, match="`past_key_values` is half written"):
        read(model, tokens(1, 3), cache)
    cache.reset()
    close(read(model, tokens(1, 3), cache)[0], alone(model, tokens(3)))


def test_positions_of_the_callers_own_are_refused_by_a_cache():
    """They were ignored, and packed documents saw each other."""
    model, ids = tiny(), tokens(2, 8)
    plain = torch.arange(8)[None]
    close(model(ids, position_ids=plain + 5).logits, model(ids, use_cache=False).logits)
    for positions in (3 * plain, torch.cat((plain[:, :5], plain[:, :3]), dim=1)):
        with pytest.raises(ValueError, match=r"`position_ids` must count .* pass use_cache=False"):
            model(ids, position_ids=positions)
        model(ids, position_ids=positions, use_cache=False)


def test_another_dtype_is_refused(tmp_path):
    model = tiny(**SINKS)
    after(model, tokens(1, 5)).save(tmp_path / "cache")
    cache = OlmemCache.load(tmp_path / "cache", model.config)
    with pytest.raises(ValueError, match=r"`past_key_values` holds torch.float32 \(got torch.float64\)"):
        read(tiny(**SINKS).double(), tokens(1, 1), cache)


def test_a_configuration_that_was_changed_is_refused():
    model = tiny()
    cache = after(model, tokens(1, 9))
    model.config.sliding_window = 2
    with pytest.raises(
        ValueError, match=r"before the configuration was changed .* make an `OlmemCache\(model.config\)`"
    ):
        read(model, tokens(1, 1), cache)
    fresh = tiny(sliding_window=2)
    close(read(model, tokens(1, 9), OlmemCache(model.config))[0], alone(fresh, tokens(9)))


def test_a_cache_is_not_gone_on_from_with_checkpointed_gradients():
    model = tiny()
    cache = after(model, tokens(1, 5))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="`past_key_values` must be empty or left out in training with gradient"):
        model.train()(tokens(1, 3), past_key_values=cache)


@every_model
def test_no_cache_is_written_or_returned_with_checkpointed_gradients(changes):
    model, ids = tiny(**changes), tokens(1, 5)
    expected = model(ids, use_cache=False).logits
    model.gradient_checkpointing_enable()
    model.train()
    cache, read_before = OlmemCache(model.config), after(tiny(**changes), ids)
    for kwargs in ({}, {"use_cache": True}, {"past_key_values": cache}):
        found = model(ids, **kwargs)
        assert found.past_key_values is None
        close(found.logits.detach(), expected.detach())
    with pytest.raises(ValueError, match="`past_key_values` must be empty or left out in training with gradient"):
        model(ids, past_key_values=read_before)
    assert cache.fresh and not cache.is_initialized
    assert cache.get_seq_length() == 0
    close(read(model.eval(), ids, cache), expected.detach())
    assert cache.get_seq_length() == read_before.get_seq_length() == 5


@every_model
def test_checkpointing_keeps_no_cache_from_layers_without_gradients(changes):
    """Such as those of `generate()` between steps of training: a token was read without what came before it."""
    model, ids = tiny(**changes), tokens(1, 9)
    expected = model(ids, use_cache=False).logits.detach()
    model.gradient_checkpointing_enable()
    model.train()
    cache = OlmemCache(model.config)
    found = [read(model, piece, cache) for piece in ids.split([5, 1, 3], dim=1)]
    close(torch.cat(found, dim=1), expected)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.eval().generate(ids, **options))


def test_nothing_of_before_comes_through_a_reset():
    """0 times what is not a number is not a number, masked or not."""
    model = tiny(**SINKS)
    cache = OlmemCache(model.config)
    model(inputs_embeds=torch.full((2, 9, 24), torch.nan), past_key_values=cache)
    with pytest.raises(ValueError, match=r"`layers\.0\.keys` of row 0 must be finite to be saved"):
        cache.save("nowhere.safetensors")
    cache.reset()
    rows = left_padded(tokens(5), tokens(2, seed=1))
    assert read(model, rows["input_ids"], cache, rows["attention_mask"])[rows["attention_mask"].bool()].isfinite().all()
    assert read(model, tokens(2, 1), cache).isfinite().all()


def test_a_call_without_a_token_and_a_config_of_another_model_are_refused():
    with pytest.raises(ValueError, match="`input_ids` must hold at least one token"):
        tiny()(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="`config` must be of an Olmem model"):
        OlmemCache(Olmo3Config())


@pytest.mark.slow
@bounded_models
@torch.no_grad()
def test_a_step_is_one_graph(changes):
    """Also on the Python that has a lock in `cached_property`; and a whole forward with the cache of its own making."""
    torch._dynamo.reset()
    model, ids = tiny(**changes), tokens(1, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(ids, use_cache=False).logits
    cache = OlmemCache(model.config, max_length=20)
    close(read(model, ids[:, :6], cache), expected[:, :6])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for index in range(6, 20):
        close(compiled(ids[:, index : index + 1], past_key_values=cache).logits, expected[:, index : index + 1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2
    close(compiled(ids).logits, expected)


@pytest.mark.slow
@torch.no_grad()
def test_max_length_holds_in_a_compiled_step():
    torch._dynamo.reset()
    model = tiny(layer_types=FULL)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = after(model, tokens(1, 6), max_length=8)
    for _ in range(2):
        compiled(tokens(1, 1), past_key_values=cache)
    with pytest.raises(RuntimeError, match="`max_length` of the OlmemCache is used up"):
        compiled(tokens(1, 1), past_key_values=cache)


def test_ids_on_another_device_are_refused():
    with pytest.raises(ValueError, match=r"`input_ids` must be on the model's device, cpu \(got meta\)"):
        tiny()(tokens(1, 3).to("meta"))


@every_model
def test_a_refused_call_leaves_the_cache_as_it_was(changes):
    """It was taken for half written, and nothing could go on from it."""
    model = tiny(**changes)
    cache, ids = after(model, tokens(1, 5)), tokens(1, 3, seed=1)
    with pytest.raises(ValueError, match="`position_ids` must count"):
        model(ids, position_ids=torch.tensor([[0, 2, 4]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"`past_key_values` holds torch.float32"):
        read(tiny(**changes).double(), ids, cache)
    close(read(model, ids, cache)[0], alone(model, tokens(5), ids[0]))


def test_what_was_taken_back_whole_is_not_saved(tmp_path):
    """A file of nothing cannot be told from a damaged one."""
    model = tiny(layer_types=FULL)
    cache = after(model, tokens(1, 5))
    cache.crop(-5)
    with pytest.raises(ValueError, match="has read tokens"):
        cache.save(tmp_path / "cache")


@every_model
def test_a_copy_made_in_inference_mode_goes_on_outside(changes):
    model, ids = tiny(**changes), tokens(1, 9)
    with torch.inference_mode():
        copied = copy.deepcopy(after(model, ids))
    close(read(model, tokens(1, 3, seed=1), copied)[0], alone(model, ids[0], tokens(3, seed=1)))


def test_a_cache_of_transformers_is_not_gone_on_from_with_checkpointed_gradients():
    """It was dropped in silence."""
    model, cache = tiny(), DynamicCache()
    read(model, tokens(1, 5), cache)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="`past_key_values` must be empty or left out in training with gradient"):
        model.train()(tokens(1, 3), past_key_values=cache)


MALFORMED = {
    "ids of one dimension": ("input_ids", lambda: {"input_ids": tokens(3)}),
    "ids that are floats": ("input_ids", lambda: {"input_ids": torch.ones(1, 3)}),
    "an empty batch": ("input_ids", lambda: {"input_ids": tokens(0, 3)}),
    "embeddings of another width": ("inputs_embeds", lambda: {"inputs_embeds": torch.ones(1, 3, 7)}),
    "a mask that is a list": ("attention_mask", lambda: {"attention_mask": [1, 1, 1]}),
    "a mask of one dimension": ("attention_mask", lambda: {"attention_mask": torch.ones(3)}),
    "a mask that is added to scores": ("attention_mask", lambda: {"attention_mask": torch.full((1, 3), -torch.inf)}),
    "positions that are floats": ("position_ids", lambda: {"position_ids": torch.full((1, 3), torch.nan)}),
    "positions of another length": ("position_ids", lambda: {"position_ids": torch.arange(7)[None]}),
    "a list for a cache": ("past_key_values", lambda: {"past_key_values": []}),
    "a class for a cache": ("past_key_values", lambda: {"past_key_values": OlmemCache}),
    "hidden states by half an index": ("output_hidden_states", lambda: {"output_hidden_states": [0.5]}),
}


@pytest.mark.parametrize("field, make", MALFORMED.values(), ids=MALFORMED)
def test_malformed_inputs_are_refused_by_name(field, make):
    """They ended in errors of torch, or computed something else in silence."""
    given = make()
    ids = {} if {"input_ids", "inputs_embeds"} & set(given) else {"input_ids": tokens(1, 3)}
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        tiny()(**ids, **given)


@pytest.mark.parametrize("rows", [1.5, [0.7], True, torch.tensor([True]), "0", 2**70], ids=str)
def test_rows_that_name_no_row_are_refused(rows):
    """Some of them were rounded to a row, which then began anew."""
    model = tiny()
    cache = after(model, tokens(2, 5))
    with pytest.raises(ValueError, match="`rows` must be among the 2 of the batch"):
        model.reset_memory(cache, rows)
    assert cache.seen.tolist() == [5, 5]


@pytest.mark.parametrize(
    "indices", [torch.tensor([2]), torch.tensor([0.5]), [0], torch.tensor([True]), torch.zeros(0).long()], ids=str
)
def test_indices_that_keep_no_rows_are_refused(indices):
    cache = after(tiny(), tokens(2, 5))
    with pytest.raises(ValueError, match="`indices` must be"):
        cache.batch_select_indices(indices)
    assert cache.batch_size == 2


@pytest.mark.parametrize("room", [0, 2.5, True, "5", 2**45, 2**70])
def test_room_is_a_number_of_tokens(room):
    with pytest.raises(ValueError, match="`max_length` must be a positive integer"):
        OlmemCache(OlmemConfig(**TINY), max_length=room)


def test_a_refused_call_fixes_no_batch_size():
    model = tiny()
    cache = OlmemCache(model.config)
    with pytest.raises(ValueError, match="`position_ids` must count"):
        model(tokens(2, 3), position_ids=torch.tensor([[0, 2, 4]]), past_key_values=cache)
    close(read(model, tokens(1, 3), cache)[0], alone(model, tokens(3)))


@pytest.mark.parametrize("name, value", [("max_length", "41"), ("began_anew", "true")])
def test_facts_of_a_file_have_its_checksum(name, value, tmp_path):
    model = tiny()
    after(model, tokens(1, 9), max_length=40).save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(tmp_path / "cache"), tmp_path / "changed", metadata | {name: value})
    with pytest.raises(ValueError, match="its content does not have its checksum"):
        OlmemCache.load(tmp_path / "changed", model.config)
