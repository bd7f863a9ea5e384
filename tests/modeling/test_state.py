"""What a layer remembers, in a cache or on a tape, against the keys and values that it was given.

No test needs a model: keys and values are random numbers, and a token that is not to be kept has none.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, SLIDING
from modeling.layer_streams import HEADS, SIZE, Stream, cuts_after_a_cache, flags, on_tape, streams
from modeling.numbering import listed
from modeling.streams import cuts
from olmem import state_olmem, visibility_olmem
from olmem.contracts_olmem import Candidates
from olmem.inputs_olmem import Tokens
from olmem.plan_olmem import Call, Earlier
from olmem.rules_olmem import POSITION_EMBEDDINGS, ROTATING
from olmem.state_olmem import OlmemTape

ALL = slice(None)


@pytest.mark.parametrize("has_memory", [False, True])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_cache_gives_each_query_the_keys_and_values_that_it_sees(has_memory, data):
    """It does however a stream is cut, also past its first room, and with memory that some rows read anew."""
    stream = data.draw(streams(memory=has_memory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_olmem, "GROWTH", data.draw(st.sampled_from([1, 3, 256])))
        for index, length in enumerate(data.draw(cuts(stream.real.shape[1]))):
            reads = has_memory and (index == 0 or data.draw(st.booleans()))
            begins = flags(data.draw, stream.batch_size) if reads and index and data.draw(st.booleans()) else None
            seen, writes = stream.seen, has_memory and data.draw(st.booleans())
            plan, parts = stream.step(length, reads=reads, begins=begins, writes=writes)
            stream.check(plan, parts, seen)
            assert stream.layer.get_seq_length() == stream.before


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("has_cache", [False, True])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_tape_gives_each_query_the_keys_and_values_that_it_sees(has_cache, has_memory, data):
    """It does alone and behind a cache, to whose buffers no gradient goes back."""
    stream = data.draw(streams(least=2, memory=has_memory))
    length = stream.real.shape[1]
    pieces, first = data.draw(cuts_after_a_cache(length)) if has_cache else (data.draw(cuts(length)), 0)
    for plan, parts in on_tape(stream, pieces, first, data.draw):
        assert all(not part.is_bare for seen in parts for part in seen)
        assert plan.tape is not None
    assert bool(stream.layer.buffers) is has_cache
    assert not any(buffer.requires_grad for buffer in stream.layer.buffers.values())


@pytest.mark.parametrize("shared", ["none", "key_value"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_tape_writes_to_a_cache_what_the_cache_would_have_written(shared, data):
    """What a forward with gradients leaves in the buffers is the same bit for bit."""
    left = data.draw(streams(least=2, memory=False, shared_projections=shared))
    right = copy.deepcopy(left)
    pieces, first = data.draw(cuts_after_a_cache(left.real.shape[1]))
    for _ in on_tape(right, pieces, first, data.draw):
        pass
    left.pad(right.real)
    for length in pieces:
        left.step(length)
    assert right.layer.get_seq_length() == left.layer.get_seq_length() == left.before
    for name in left.layer.names:
        kept = left.visibility.num_prefix + min(left.before, left.layer.limit or left.before)
        expected, found = (each.layer.buffers[name][:, :, :kept] for each in (left, right))
        assert torch.equal(found, expected)


# What a step may touch


def changed_slots(before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
    """Returns the slots of each row in which two buffers (B, K, S, D) differ, without the last one."""
    differ = (before != after).any(-1).any(1)[:, :-1]
    return [row.nonzero()[:, 0].tolist() for row in differ]


@pytest.mark.parametrize("shared", ["none", "key_value"])
@pytest.mark.parametrize("layer_type", [FULL, SLIDING, CHUNKED])
def test_a_step_writes_the_new_tokens_slots_and_no_other(layer_type, shared):
    """The prefix is written, and rotated, with its own token and never again, in which every bit shows."""
    changes = {"layer_types": layer_type, "num_sink_tokens": 3, "shared_projections": shared, "num_memory_tokens": 2}
    stream = Stream(changes | {"memory_segment_length": 50}, torch.ones(2, 40, dtype=torch.bool))
    stream.step(1, reads=True)
    prefix, limit = stream.visibility.num_prefix, stream.layer.limit
    for token in range(1, 40):
        before = {name: buffer.clone() for name, buffer in stream.layer.buffers.items()}
        stream.step(1)
        expected = [prefix + (token if limit is None else token % limit)]
        if token < stream.visibility.num_sinks:
            expected.insert(0, 2 + token)
        for name, buffer in stream.layer.buffers.items():
            assert changed_slots(before[name], buffer) == [expected] * 2


def test_a_row_of_padding_writes_nothing():
    """Numbers that are none do not come into what is kept, not even when the room grows."""
    real = torch.tensor([[True] * 12, [False] * 5 + [True] * 2 + [False] * 5])
    stream = Stream({"layer_types": FULL, "num_sink_tokens": 2}, real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_olmem, "GROWTH", 2)
        for length in (1, 3, 1, 1, 1, 5):
            before = {name: buffer.clone() for name, buffer in stream.layer.buffers.items()}
            tokens = real[1, stream.before : stream.before + length].any()
            stream.step(length)
            for name, buffer in stream.layer.buffers.items():
                assert buffer[:, :, :-1].isfinite().all()
                if not tokens and name in before:
                    size = before[name].shape[2] - 1
                    assert torch.equal(buffer[1, :, :size], before[name][1, :, :size])


# Buffers


@pytest.mark.parametrize("scheme", POSITION_EMBEDDINGS)
@pytest.mark.parametrize("layer_type", [FULL, SLIDING, CHUNKED])
def test_a_shared_tensor_is_one_buffer(layer_type, scheme):
    """It takes half the bytes, and a step reads it where it lies, prefix and window as one part."""
    changes = {"layer_types": layer_type, "num_sink_tokens": 3, "position_embedding": scheme}
    real = torch.ones(2, 30, dtype=torch.bool)
    shared, apart = (Stream(changes | {"shared_projections": name}, real) for name in ("key_value", "none"))
    for stream in (shared, apart):
        stream.step(29)
        _, stream.parts = stream.step(1)
    assert list(shared.layer.buffers) == ["keys"] and list(apart.layer.buffers) == ["keys", "values"]
    size = sum(buffer.nbytes for buffer in shared.layer.buffers.values())
    assert 2 * size == sum(buffer.nbytes for buffer in apart.layer.buffers.values())
    [[part]] = shared.parts
    assert part.is_bare and part.in_pairs is (scheme in ROTATING)
    assert part.key.data_ptr() == part.value.data_ptr() == shared.layer.buffers["keys"].data_ptr()
    window = apart.parts[0][-1]
    assert not window.is_bare
    for name, states in (("keys", window.key), ("values", window.value)):
        assert states.untyped_storage().data_ptr() == apart.layer.buffers[name].untyped_storage().data_ptr()


def capacities(layer_type: str, max_length: int | None, pieces: list[int]) -> list[int]:
    """Returns for how many tokens a layer has room after each piece, its window 37 tokens."""
    real = torch.ones(1, sum(pieces), dtype=torch.bool)
    stream = Stream({"layer_types": layer_type, "sliding_window": 37, "num_sink_tokens": 2}, real, 0, max_length)
    found = []
    for length in pieces:
        stream.step(length)
        found.append(stream.layer.capacity)
        for buffer in stream.layer.buffers.values():
            assert buffer.shape[2] == stream.visibility.num_prefix + found[-1] + 1
    return found


def test_room_doubles_up_to_the_span(monkeypatch):
    """A layer with a room that was asked for has it at once, and a window's span needs no more."""
    monkeypatch.setattr(state_olmem, "GROWTH", 4)
    steps = [1] * 45
    assert list(dict.fromkeys(capacities(SLIDING, None, steps))) == [4, 8, 16, 32, 37]
    assert list(dict.fromkeys(capacities(FULL, None, steps))) == [4, 8, 16, 32, 64]
    assert capacities(SLIDING, None, [3, 30, 200, 1]) == [4, 33, 37, 37]
    assert capacities(FULL, 50, [1, 49]) == [50, 50]
    assert capacities(SLIDING, 10, [1, 9, 1, 20]) == [10, 10, 20, 37]
    assert capacities(SLIDING, 500, [1, 40]) == [37, 37]


def test_all_room_is_made_where_only_the_device_knows_the_length():
    stream = Stream({"layer_types": SLIDING, "sliding_window": 700}, torch.ones(1, 3, dtype=torch.bool))
    stream.step(1)
    assert stream.layer.capacity == 256
    call, key, value = stream.call(1)
    call.before = None
    with torch.no_grad():
        [[part]] = stream.layer.write(key, value, stream.plan(call), ())
    assert stream.layer.capacity == part.key.shape[2] == 700


def test_another_dtype_is_refused():
    stream = Stream({"layer_types": SLIDING}, torch.ones(1, 2, dtype=torch.bool))
    stream.step(1)
    call, key, value = stream.call(1)
    with pytest.raises(ValueError, match=r"holds torch.float32 \(got torch.float16\)"):
        stream.layer.write(key.half(), value.half(), stream.plan(call), ())


# Gradients


@pytest.mark.parametrize("shared", ["none", "key_value"])
@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("layer_type", [FULL, SLIDING, CHUNKED])
def test_a_tape_keeps_gradients_and_a_cache_has_none(layer_type, has_cache, shared):
    """What a query sees of its own forward is reached by gradients; what a cache held before is a copy without any."""
    changes = {"layer_types": layer_type, "num_sink_tokens": 2, "sliding_window": 4, "shared_projections": shared}
    stream = Stream(changes, torch.ones(1, 12, dtype=torch.bool))
    if has_cache:
        stream.step(3)
    tape, first = OlmemTape(stream.layer if has_cache else None), stream.before
    key, value = (states.requires_grad_() for states in (stream.key, stream.value))
    seen_first = stream.seen if has_cache else None
    call, *states = stream.call(6, has_cache, earlier=Earlier({}, False, seen_first, first))
    tape.write(*states, stream.plan(call), ())
    stream.advance(6)
    earlier = Earlier({stream.kind: [call.numbers]}, False, seen_first, first)
    later, *new = stream.call(1, has_cache, earlier=earlier)
    plan = stream.plan(later)
    [parts] = tape.write(*new, plan, [states])
    view = plan.view()
    mask = view.mask(ALL, ALL, with_prefix=parts[0].is_prefix)[0, 0]
    joined = torch.cat([part.key * part.value for part in parts], dim=2)
    joined[:, :, mask].sum().backward()
    query = first + 6
    before, inside = listed(stream.visibility, query)
    reached = [token for token in (*before, *inside) if token >= first]
    assert reached
    for gradient in (key.grad, value.grad):
        assert gradient.abs().sum((0, 1, 3)).nonzero()[:, 0].tolist() == reached
    for buffer in stream.layer.buffers.values():
        assert not buffer.requires_grad


def test_what_a_tape_has_read_of_a_cache_stays_when_the_cache_goes_on():
    """Ring and memory are written over in place, and the backward pass of a call must still find what that call saw."""
    changes = {"layer_types": SLIDING, "num_sink_tokens": 2, "num_memory_tokens": 2, "memory_segment_length": 10}
    stream = Stream(changes, torch.ones(1, 20, dtype=torch.bool))
    stream.step(8, reads=True)
    call, key, value = stream.call(2, earlier=Earlier({}, False, stream.seen, stream.before))
    [parts] = OlmemTape(stream.layer).write(key, value, stream.plan(call), ())
    kept = [(part.key.clone(), part.value.clone()) for part in parts]
    stream.advance(2)
    for index in range(8):
        stream.step(1, reads=index == 0)
    for part, (key, value) in zip(parts, kept, strict=True):
        assert torch.equal(part.key, key) and torch.equal(part.value, value)


# Retrieval


def check_candidates(stream: Stream, found: Candidates, queries: dict[int, list[int]]) -> None:
    """Checks that each query may retrieve the last tokens before its window, by their keys without positions."""
    visibility, capacity = stream.visibility, stream.config.retrieval_capacity
    for row, looking in queries.items():
        numbers = found.numbers[row if len(found.numbers) > 1 else 0].tolist()
        for query in looking:
            allowed = [key for key in numbers if visibility.candidates(query, key, capacity)]
            start = listed(visibility, query)[1][0]
            first = max(visibility.num_sinks, start - capacity)
            assert sorted(allowed) == list(range(first, start))
            for token in allowed:
                column = numbers.index(token)
                key, value = stream.token(row, token)
                assert torch.equal(found.key[row, :, column], key)
                assert torch.equal(found.value[row, :, column], value)


RETRIEVES = {"retrieval_layers": [0], "retrieval_top_k": 1}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block=st.sampled_from([1, 3, 128]), capacity=st.integers(1, 6))
def test_candidates_of_a_cache_are_those_of_the_table(data, block, capacity):
    """New tokens enter the store block by block, past its first room, and before any of them looks something up."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (state_olmem, visibility_olmem):
            patch.setattr(module, "STORE_BLOCK", block)
        patch.setattr(state_olmem, "GROWTH", data.draw(st.sampled_from([1, 256])))
        fixed = RETRIEVES | {"layer_types": data.draw(st.sampled_from([SLIDING, CHUNKED]))}
        stream = data.draw(streams(1, 30, memory=False, **fixed, retrieval_capacity=capacity))
        for length in data.draw(cuts(stream.real.shape[1])):
            call, key, value = stream.call(length)
            plan = stream.plan(call)
            assert plan.retrieves
            with torch.no_grad():
                stream.layer.write(key, value, plan, ())
                blocks = []
                for found in stream.layer.candidates(key, value, plan, ()):
                    blocks.append(found.columns)
                    rows = enumerate(call.numbers[:, found.columns].tolist())
                    check_candidates(stream, found, {row: [each for each in own if each >= 0] for row, own in rows})
            assert [each.start for each in blocks] == list(range(0, length, block))
            assert blocks[-1].stop == length
            stream.advance(length)
        most = stream.visibility.store_size(capacity)
        for name in stream.layer.store_names:
            assert stream.layer.buffers[name].shape[2] <= most + 1


@pytest.mark.parametrize("has_cache", [False, True])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 6))
def test_candidates_of_a_tape_are_those_of_the_table(has_cache, data, capacity):
    """They are those that its cache's store held before the forward, those of earlier calls, and the new ones."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (state_olmem, visibility_olmem):
            patch.setattr(module, "STORE_BLOCK", 2)
        fixed = RETRIEVES | {"layer_types": data.draw(st.sampled_from([SLIDING, CHUNKED]))}
        stream = data.draw(streams(2, 30, memory=False, **fixed, retrieval_capacity=capacity))
        length = stream.real.shape[1]
        pieces, first = data.draw(cuts_after_a_cache(length)) if has_cache else (data.draw(cuts(length)), 0)
        for length in pieces[:first]:
            call, key, value = stream.call(length)
            plan = stream.plan(call)
            with torch.no_grad():
                stream.layer.write(key, value, plan, ())
                for _ in stream.layer.candidates(key, value, plan, ()):
                    pass
            stream.advance(length)
        tape, seen_first, before_first = OlmemTape(stream.layer if first else None), stream.seen, stream.before
        earlier, numbers = [], []
        for length in pieces[first:]:
            before = Earlier({stream.kind: list(numbers)}, True, seen_first if first else None, before_first)
            call, key, value = stream.call(length, bool(first), earlier=before)
            plan = stream.plan(call)
            tape.write(key, value, plan, earlier)
            [found] = tape.candidates(key, value, plan, earlier)
            assert range(length)[found.columns] == range(length)
            rows = enumerate(call.numbers.tolist())
            check_candidates(stream, found, {row: [each for each in own if each >= 0] for row, own in rows})
            earlier.append((key, value))
            numbers.append(call.numbers)
            stream.advance(length)


def test_candidates_of_packed_documents_are_their_own():
    stream = Stream(
        RETRIEVES | {"layer_types": SLIDING, "sliding_window": 2, "retrieval_capacity": 9},
        torch.ones(2, 7, dtype=torch.bool),
    )
    documents = [[(0, 4), (4, 7)], [(0, 7)]]
    numbers = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
    plan = stream.plan(Call(Tokens(numbers, documents=documents)))
    found = list(OlmemTape().candidates(stream.key, stream.value, plan, ()))
    assert [(each.rows, each.columns) for each in found] == [
        (slice(0, 1), slice(0, 4)),
        (slice(0, 1), slice(4, 7)),
        (slice(1, 2), slice(0, 7)),
    ]
    for each in found:
        assert torch.equal(each.key, stream.key[each.rows, :, each.columns])
        assert torch.equal(each.value, stream.value[each.rows, :, each.columns])
        assert each.numbers.tolist() == each.queries.tolist() == [list(range(each.key.shape[2]))]


# The batch


def filled_stream() -> Stream:
    """Returns a stream of three rows, with a store, that has read past its window."""
    changes = RETRIEVES | {"layer_types": SLIDING, "num_sink_tokens": 2, "retrieval_capacity": 5}
    stream = Stream(changes, torch.ones(3, 12, dtype=torch.bool))
    call, key, value = stream.call(12)
    plan = stream.plan(call)
    with torch.no_grad():
        stream.layer.write(key, value, plan, ())
        for _ in stream.layer.candidates(key, value, plan, ()):
            pass
    return stream


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2, 0], [0, 0, 1, 1, 2, 2]], ids=str)
def test_rows_are_selected_in_place_while_they_are_as_many(rows):
    layer = filled_stream().layer
    before = {name: (buffer.clone(), buffer.data_ptr()) for name, buffer in layer.buffers.items()}
    assert set(before) == {"keys", "values", "store_keys", "store_values"}
    layer.select(torch.tensor(rows))
    for name, (buffer, address) in before.items():
        assert torch.equal(layer.buffers[name], buffer[rows])
        assert (layer.buffers[name].data_ptr() == address) is (len(rows) == 3)


@pytest.mark.parametrize("rows", [None, [1], [0, 2]], ids=str)
def test_rows_are_cleared_and_their_room_is_kept(rows):
    layer = filled_stream().layer
    before = {name: (buffer.clone(), buffer.data_ptr()) for name, buffer in layer.buffers.items()}
    layer.clear(None if rows is None else torch.tensor(rows))
    cleared = list(range(3)) if rows is None else rows
    for name, (buffer, address) in before.items():
        found = layer.buffers[name]
        assert found.data_ptr() == address and found.shape == buffer.shape
        for row in range(3):
            assert not found[row].any() if row in cleared else torch.equal(found[row], buffer[row])
    assert not layer.half_written


@pytest.mark.parametrize("is_differentiable", [False, True])
@pytest.mark.parametrize("shared", ["none", "key_value"])
def test_memory_that_some_rows_write_reads_theirs_alone(shared, is_differentiable):
    """A call without tokens changes nothing that is kept."""
    changes = {"layer_types": SLIDING, "num_sink_tokens": 1, "num_memory_tokens": 2, "memory_segment_length": 5}
    stream = Stream(changes | {"shared_projections": shared}, torch.ones(3, 8, dtype=torch.bool))
    stream.step(8, reads=True)
    before = {name: buffer.clone() for name, buffer in stream.layer.buffers.items()}
    rows = torch.tensor([2, 0])
    call = Call(
        Tokens(torch.empty(2, 0, dtype=torch.long)),
        before=8,
        past=stream.past(),
        earlier=Earlier() if is_differentiable else None,
        written_after=stream.seen[rows],
        chosen=rows,
    )
    key, value = (states[rows] for states in stream.states(2))
    state = OlmemTape(stream.layer) if is_differentiable else stream.layer
    with torch.set_grad_enabled(is_differentiable):
        [[prefix, window]] = state.write(key, value, stream.plan(call), ())
    assert prefix.is_prefix and prefix.key.shape[:3] == (2, HEADS, 3)
    for index, row in enumerate(rows.tolist()):
        for slot in range(2):
            states = stream.memory[0][row, :, slot], stream.memory[1][row, :, slot]
            stream.expect(prefix, index, slot, states, slot)
        stream.expect(prefix, index, 2, stream.token(row, 0), 2)
        for column, token in enumerate(range(4, 8)):
            stream.expect(window, index, column, stream.token(row, token), 2 + token)
        for column in range(2):
            states = key[index, :, column], value[index, :, column]
            stream.expect(window, index, 4 + column, states, 2 + 8 + column)
    for name, buffer in stream.layer.buffers.items():
        assert torch.equal(buffer[:, :, :-1], before[name][:, :, :-1])
    assert stream.layer.get_seq_length() == 8


def test_a_layer_shows_what_its_window_holds():
    stream = Stream({"layer_types": SLIDING, "num_sink_tokens": 2, "sliding_window": 4}, torch.ones(1, 9) > 0)
    assert stream.layer.keys is None and stream.layer.get_seq_length() == 0
    stream.step(3)
    assert stream.layer.keys.shape == stream.layer.values.shape == (1, HEADS, 3, SIZE)
    assert torch.equal(stream.layer.values, stream.value[:, :, :3])
    stream.step(6)
    assert stream.layer.values.shape[2] == 4
    assert torch.equal(stream.layer.values, stream.value[:, :, [8, 5, 6, 7]])
    assert stream.layer.get_mask_sizes(2) == (5, 6)
    assert stream.layer.get_max_length() == 4
    with pytest.raises(ValueError, match="which serves Olmem models only"):
        stream.layer.update(stream.key, stream.value)
