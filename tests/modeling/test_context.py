"""What a query sees, in which slot, and where a cache keeps it, against loops over the table of the design."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import TINY, seen_by
from olmem import OlmemConfig
from olmem.context_olmem import Context, Sight, find_documents, held, inner_padding, ring_slot

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LONG = 40


@st.composite
def contexts(draw) -> Context:
    """A context, whose unused fields are those of a configuration that has other layers too."""
    layer_type = draw(st.sampled_from([FULL, SLIDING, CHUNKED]))
    sizes: dict[str, Any] = {}
    if layer_type == SLIDING:
        sizes = {"sliding_window": draw(st.integers(1, 9))}
    if layer_type == CHUNKED:
        sizes = {"chunk_size": draw(st.integers(1, 6)), "lookback": draw(st.integers(0, 3))}
    return Context(layer_type, num_sinks=draw(st.integers(0, 5)), **sizes)


def listed(context: Context, query: int) -> tuple[list[int], list[int]]:
    return seen_by(
        query, context.layer_type, context.sliding_window, context.chunk_size, context.lookback, context.num_sinks
    )


@settings(max_examples=60, deadline=None)
@given(contexts())
def test_a_context_is_the_table_of_the_design(context):
    longest = 0
    for query in range(LONG):
        before, inside = listed(context, query)
        everything = before + inside
        assert context.start(query) == inside[0]
        assert context.sinks_before(query) == len(before)
        assert context.slot(query) == everything.index(query) == len(everything) - 1
        assert [key for key in range(-2, LONG + 2) if context.sees(query, key)] == inside
        assert [key for key in range(LONG + 2) if context.sees_sink(query, key)] == before
        assert [context.key_slot(query, key) for key in everything] == list(range(len(everything)))
        longest = max(longest, len(inside))
    assert context.span == (None if context.layer_type == FULL else longest)


@settings(max_examples=30, deadline=None)
@given(contexts())
def test_tensors_give_what_integers_give(context):
    numbers = torch.arange(LONG)
    query, key = numbers[:, None], numbers[None, :]
    for name in ("start", "sinks_before", "slot"):
        assert getattr(context, name)(numbers).tolist() == [getattr(context, name)(i) for i in range(LONG)]
    for name in ("sees", "sees_sink", "key_slot"):
        method = getattr(context, name)
        assert method(query, key).tolist() == [[method(i, j) for j in range(LONG)] for i in range(LONG)]


@settings(max_examples=30, deadline=None)
@given(contexts(), st.integers(10**8, 10**8 + 1000))
def test_slots_stay_small_however_long_the_stream(context, query):
    if context.layer_type == FULL:
        assert context.slot(query) == query
        return
    first = context.start(query)
    slots = [context.key_slot(query, key) for key in (*range(context.num_sinks), *range(first, query + 1))]
    assert slots == list(range(len(slots)))
    assert context.slot(query) == slots[-1] < context.num_sinks + context.span
    if context.layer_type == SLIDING:
        assert context.slot(query) == context.num_sinks + context.sliding_window - 1


def test_a_context_is_what_the_configuration_says():
    config = OlmemConfig(
        **TINY | {"sliding_window": 7, "num_hidden_layers": 3, "layer_types": [SLIDING, CHUNKED, FULL]},
        attention_chunk_size=3,
        attention_chunk_lookback=2,
        num_sink_tokens=5,
    )
    assert Context.of(config, SLIDING) == Context(SLIDING, sliding_window=7, num_sinks=5)
    assert Context.of(config, CHUNKED) == Context(CHUNKED, chunk_size=3, lookback=2, num_sinks=5)
    assert Context.of(config, FULL) == Context(FULL)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), seen=st.integers(0, LONG))
def test_a_ring_holds_the_last_tokens(size, seen):
    ring = [-1] * size
    for number in range(seen):
        ring[ring_slot(number, size)] = number
    assert sorted(ring) == sorted([*range(max(0, seen - size), seen), *[-1] * max(0, size - seen)])
    found = [held(slot, seen, size) for slot in range(size)]
    assert [max(number, -1) for number in found] == ring
    slots = torch.arange(size)
    assert held(slots, torch.tensor([[seen]]), size).tolist() == [found]
    assert ring_slot(slots + seen, size).tolist() == [ring_slot(number, size) for number in range(seen, seen + size)]
    assert ring_slot(seen, None) == seen


def check_reach(sight: Sight, block: int) -> None:
    """A block's reach holds all that it sees, and where the window has a span, not much more."""
    length = sight.numbers.shape[1]
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        reach = sight.reach(queries)
        visible = sight.context.sees(sight.numbers[:, queries, None], sight.key_numbers[:, None])
        visible[:, :, reach] = False
        assert not visible.any()
        if sight.context.span is not None and not sight.in_place:
            assert reach.stop - reach.start <= queries.stop - queries.start + sight.context.span - 1 + sight.slack


def check_mask(sight: Sight) -> None:
    """A token sees what the table lists, each key once; padding sees something, and nothing sees it."""
    everything = slice(None)
    sinks = sight.context.num_sinks
    mask = sight.mask(everything, everything, with_prefix=True)
    window = sight.mask(everything, everything)
    assert mask.shape[-1] == sinks + sight.key_numbers.shape[1]
    assert mask.any(-1).all()
    for row, numbers in enumerate(sight.numbers.tolist()):
        keys = sight.key_numbers[row if len(sight.key_numbers) > 1 else 0].tolist()
        for column, number in enumerate(numbers):
            if number < 0:
                continue
            before, inside = listed(sight.context, number)
            seen = mask[row, column].tolist()
            assert [sink for sink in range(sinks) if seen[sink]] == before
            assert sorted(key for key, is_seen in zip(keys, seen[sinks:], strict=True) if is_seen) == inside
            assert window[row, column].tolist() == seen[sinks:]
            if before:
                assert sight.prefix
            if sight.causal:
                assert inside == keys[: column + 1]
        if sight.causal:
            assert keys[: len(numbers)] == numbers


@settings(max_examples=60, deadline=None)
@given(context=contexts(), data=st.data())
def test_without_a_cache_the_new_tokens_are_all_there_is(context, data):
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
    real = real.view(rows, length) | data.draw(st.booleans())
    padded = not bool(real.all())
    numbers = torch.where(real, real.cumsum(-1) - 1, -1)
    sight = Sight.without_cache(context, numbers, padded)
    assert sight.key_numbers is sight.numbers
    check_mask(sight)
    check_reach(sight, data.draw(st.integers(1, 7)))
    check_new_sinks(sight)


def check_new_sinks(sight: Sight) -> None:
    found, column = sight.new_sinks()
    for row, numbers in enumerate(sight.numbers.tolist()):
        for sink in range(sight.context.num_sinks):
            assert bool(found[row, sink]) == (sink in numbers)
            if sink in numbers:
                assert numbers[column[row, sink]] == sink


@dataclass
class Store:
    """Buffers of a row: which token lies in which slot."""

    window: dict[int, int] = field(default_factory=dict)
    sinks: dict[int, int] = field(default_factory=dict)

    def write(self, numbers: list[int], slots: list[int], sink_slots: list[int]) -> None:
        assert len({slot for slot in slots if slot >= 0}) == sum(slot >= 0 for slot in slots)
        self.window |= {slot: number for slot, number in zip(slots, numbers, strict=True) if slot >= 0}
        self.sinks |= {slot: number for slot, number in zip(sink_slots, numbers, strict=True) if slot >= 0}


@settings(max_examples=100, deadline=None)
@given(context=contexts(), data=st.data())
def test_with_a_cache_every_key_is_where_the_sight_says(context, data):
    """Streams in pieces with padding anywhere: keys are read from where they were written, and no other."""
    rows = data.draw(st.integers(1, 3))
    pieces = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 8]), min_size=1, max_size=14))
    padding = data.draw(st.sampled_from(["none", "left", "anywhere"]))
    room = data.draw(st.sampled_from([None, sum(pieces), sum(pieces) + 3]))
    limit = context.span or room
    stores, seen, columns = [Store() for _ in range(rows)], torch.zeros(rows, dtype=torch.long), 0
    left = torch.tensor(data.draw(st.lists(st.integers(0, sum(pieces)), min_size=rows, max_size=rows)))
    for length in pieces:
        real = torch.ones(rows, length, dtype=torch.bool)
        if padding == "left":
            real = torch.arange(columns, columns + length) >= left[:, None]
        if padding == "anywhere":
            real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
            real = real.view(rows, length)
        numbers = torch.where(real, real.cumsum(-1) - 1 + seen[:, None], -1)
        in_place = (length == 1 or context.span is None) and data.draw(st.booleans())
        unknown = in_place and length == 1 and limit is not None and data.draw(st.booleans())
        before = None if unknown else columns
        sight = Sight.with_cache(context, numbers, not bool(real.all()), seen, before, limit, in_place)
        assert sight.length == (None if unknown else columns + length)
        assert sight.in_place == in_place

        slots, sink_slots = sight.slots.tolist(), sight.sink_slots.tolist()
        for row, store in enumerate(stores):
            keys = sight.key_numbers[row].tolist()
            if in_place:
                store.write(numbers[row].tolist(), slots[row], sink_slots[row])
                places = range(context.num_sinks, context.num_sinks + len(keys))
            else:
                places = sight.past_slots[row].tolist()
                assert keys[len(places) :] == numbers[row].tolist()
            for place, key in zip(places, keys, strict=False):
                if key >= 0:
                    assert store.window[place] == key
            if not in_place:
                store.write(numbers[row].tolist(), slots[row], sink_slots[row])
            total = int(seen[row] + real[row].sum())
            assert all(place >= context.num_sinks for place in store.window)
            kept = range(max(0, total - limit), total) if limit else range(total)
            assert set(kept) <= set(store.window.values())
            assert store.sinks == {sink: sink for sink in range(min(total, context.num_sinks))}
        check_mask(sight)
        check_new_sinks(sight)
        if not (in_place and length == 1):
            check_reach(sight, data.draw(st.integers(1, 4)))
        if in_place and length == 1:
            for (number,), places in zip(numbers.tolist(), sight.prefix_positions.tolist(), strict=True):
                before_window, _ = listed(context, max(number, 0))
                for sink in before_window if number >= 0 else ():
                    assert number - places[sink] == context.slot(number) - context.key_slot(number, sink)
        elif not in_place:
            assert sight.prefix_positions.tolist() == [list(range(context.num_sinks))]
        seen, columns = seen + real.sum(-1), columns + length


@pytest.mark.parametrize("in_place", [False, True])
def test_a_ring_is_never_larger_than_its_window(in_place):
    """However long the stream, one token reads the window, and a piece of n tokens n − 1 keys more than that."""
    context = Context(SLIDING, sliding_window=4, num_sinks=2)
    seen, numbers = torch.tensor([1000]), torch.tensor([[1000]])
    sight = Sight.with_cache(context, numbers, False, seen, 1000, 4, in_place)
    assert sight.key_numbers.shape == (1, 4)
    piece = Sight.with_cache(context, numbers + torch.arange(5), False, seen, 1000, 4, in_place=False)
    assert piece.key_numbers.tolist() == [list(range(997, 1005))]
    assert int(piece.slots.max()) < 2 + 4


def test_packed_documents_start_where_positions_do():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3]])
    assert find_documents(positions) == [[(0, 3), (3, 5), (5, 6)], [(0, 6)], [(0, 2), (2, 6)]]
    assert find_documents(positions[1:2]) is None
    assert find_documents(positions[1:2] + 7) is None


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_inner_padding_stands_between_real_tokens(data):
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    real = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(rows)]
    numbers = torch.where(torch.tensor(real), torch.tensor(real).cumsum(-1) - 1, -1)
    for after_others in (False, True):
        most = 0
        for row in real:
            columns = [column for column, is_real in enumerate(row) if is_real]
            if columns:
                first = 0 if after_others else columns[0]
                most = max(most, sum(not row[column] for column in range(first, columns[-1])))
        assert inner_padding(numbers, after_others) == most
