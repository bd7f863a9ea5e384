"""What a query sees, in which slot, and where a cache keeps it, against loops over the table of the design."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import TINY, seen_by
from olmem import OlmemConfig
from olmem.context_olmem import (
    Context,
    Sight,
    cut_in_segments,
    find_documents,
    held,
    inner_padding,
    last_numbers,
    place_in_pieces,
    ring_slot,
)

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
    return Context(layer_type, num_sinks=draw(st.integers(0, 5)), num_memory=draw(st.integers(0, 3)), **sizes)


@st.composite
def real_tokens(draw, rows: int, length: int, padding: str = "anywhere") -> torch.Tensor:
    """(rows, length) whether each column is a token rather than padding."""
    if padding == "none":
        return torch.ones(rows, length, dtype=torch.bool)
    drawn = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    return torch.tensor(drawn).view(rows, length)


def number(real: torch.Tensor, seen: torch.Tensor | int = 0) -> torch.Tensor:
    """The tokens' numbers after so many, −1 of padding."""
    return torch.where(real, real.cumsum(-1) - 1 + torch.as_tensor(seen).view(-1, 1), -1)


def listed(context: Context, query: int) -> tuple[list[int], list[int]]:
    return seen_by(
        query, context.layer_type, context.sliding_window, context.chunk_size, context.lookback, context.num_sinks
    )


@settings(max_examples=60, deadline=None)
@given(contexts(), st.integers(1, 9))
def test_a_context_is_the_table_of_the_design(context, capacity):
    longest, memory = 0, context.num_memory
    assert context.num_prefix == memory + context.num_sinks
    for query in range(LONG):
        before, inside = listed(context, query)
        everything = before + inside
        assert context.start(query) == inside[0]
        assert context.sinks_before(query) == len(before)
        assert context.slot(query) == memory + everything.index(query) == memory + len(everything) - 1
        assert [key for key in range(-2, LONG + 2) if context.sees(query, key)] == inside
        assert [key for key in range(LONG + 2) if context.sees_sink(query, key)] == before
        assert [context.key_slot(query, key) for key in everything] == [*range(memory, memory + len(everything))]
        left = [key for key in range(query + 1) if key not in inside and key >= context.num_sinks]
        found = [key for key in range(-LONG, LONG + 2) if context.candidates(query, key, capacity)]
        assert found == left[-capacity:]
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
    found = context.candidates(query, key, 5)
    assert found.tolist() == [[context.candidates(i, j, 5) for j in range(LONG)] for i in range(LONG)]


@settings(max_examples=30, deadline=None)
@given(contexts(), st.integers(10**8, 10**8 + 1000))
def test_slots_stay_small_however_long_the_stream(context, query):
    if context.layer_type == FULL:
        assert context.slot(query) == context.num_memory + query
        return
    first = context.start(query)
    slots = [context.key_slot(query, key) for key in (*range(context.num_sinks), *range(first, query + 1))]
    assert slots == list(range(context.num_memory, context.num_memory + len(slots)))
    assert context.slot(query) == slots[-1] < context.num_prefix + context.span
    if context.layer_type == SLIDING:
        assert context.slot(query) == context.num_prefix + context.sliding_window - 1


def test_a_context_is_what_the_configuration_says():
    config = OlmemConfig(
        **TINY | {"sliding_window": 7, "num_hidden_layers": 3, "layer_types": [SLIDING, CHUNKED, FULL]},
        attention_chunk_size=3,
        attention_chunk_lookback=2,
        num_sink_tokens=5,
        num_memory_tokens=6,
    )
    assert Context.of(config, SLIDING) == Context(SLIDING, sliding_window=7, num_sinks=5, num_memory=6)
    assert Context.of(config, CHUNKED) == Context(CHUNKED, chunk_size=3, lookback=2, num_sinks=5, num_memory=6)
    assert Context.of(config, FULL) == Context(FULL, num_memory=6)


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
    """A token sees all of memory and what the table lists, each key once, from its own place and slot; padding sees
    something, and nothing sees it."""
    everything = slice(None)
    memory, sinks, prefix = sight.context.num_memory, sight.context.num_sinks, sight.context.num_prefix
    mask = sight.mask(everything, everything, with_prefix=True)
    window = sight.mask(everything, everything)
    assert mask.shape[-1] == prefix + sight.key_numbers.shape[1]
    assert mask.any(-1).all() and window.any(-1).all()
    assert sight.prefix or not memory
    assert mask[:, :, :memory].all()
    assert sight.key_places.tolist() == [[memory + key for key in row] for row in sight.key_numbers.tolist()]
    places, slots = sight.places.tolist(), sight.query_slots.tolist()
    for row, numbers in enumerate(sight.numbers.tolist()):
        keys = sight.key_numbers[row if len(sight.key_numbers) > 1 else 0].tolist()
        for column, number in enumerate(numbers):
            if number < 0:
                continue
            before, inside = listed(sight.context, number)
            assert places[row][column] == memory + number
            assert slots[row][column] == memory + len(before + inside) - 1
            seen = mask[row, column].tolist()
            assert [sink for sink in range(sinks) if seen[memory + sink]] == before
            assert sorted(key for key, is_seen in zip(keys, seen[prefix:], strict=True) if is_seen) == inside
            assert window[row, column].tolist() == seen[prefix:]
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
    real = data.draw(real_tokens(rows, length, data.draw(st.sampled_from(["none", "anywhere"]))))
    sight = Sight.without_cache(context, number(real), not bool(real.all()))
    assert sight.key_numbers is sight.numbers
    assert sight.prefix_positions.tolist() == [list(range(context.num_prefix))]
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
        real = torch.arange(columns, columns + length) >= left[:, None]
        if padding != "left":
            real = data.draw(real_tokens(rows, length, padding))
        numbers = number(real, seen)
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
                places = range(context.num_prefix, context.num_prefix + len(keys))
            else:
                places = sight.past_slots[row].tolist()
                assert keys[len(places) :] == numbers[row].tolist()
            for place, key in zip(places, keys, strict=False):
                if key >= 0:
                    assert store.window[place] == key
            if not in_place:
                store.write(numbers[row].tolist(), slots[row], sink_slots[row])
            total = int(seen[row] + real[row].sum())
            assert all(place >= context.num_prefix for place in store.window)
            kept = range(max(0, total - limit), total) if limit else range(total)
            assert set(kept) <= set(store.window.values())
            assert store.sinks == {context.num_memory + sink: sink for sink in range(min(total, context.num_sinks))}
        check_mask(sight)
        check_new_sinks(sight)
        if not (in_place and length == 1):
            check_reach(sight, data.draw(st.integers(1, 4)))
        if in_place and length == 1:
            check_step(sight)
        else:
            assert sight.prefix_positions.tolist() == [list(range(context.num_prefix))]
        seen, columns = seen + real.sum(-1), columns + length


def check_step(sight: Sight) -> None:
    """A step's prefix is as far from the query's place as it is from its slot; and its keys' slots are those of what
    it sees."""
    context, slots = sight.context, sight.step_slots.tolist()
    for row, ((number,), keys) in enumerate(zip(sight.numbers.tolist(), sight.key_numbers.tolist(), strict=True)):
        assert slots[row][: context.num_prefix] == list(range(context.num_prefix))
        if number < 0:
            continue
        before, inside = listed(context, number)
        place, positions = int(sight.places[row, 0]), sight.prefix_positions[row].tolist()
        for slot in (*range(context.num_memory), *(context.num_memory + sink for sink in before)):
            assert place - positions[slot] == context.slot(number) - slot
        shown = [context.num_memory + (before + inside).index(key) if key in inside else 0 for key in keys]
        assert slots[row][context.num_prefix :] == shown


@settings(max_examples=60, deadline=None)
@given(context=contexts(), data=st.data())
def test_after_the_pieces_of_a_call_come_all_keys_that_are_still_seen(context, data):
    """Whatever the first piece began from, padding anywhere in it and at the end of the others, which begin in their
    first column; no column is kept that no row needs."""
    rows = data.draw(st.integers(1, 3))
    seen = torch.tensor(data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows)))
    padding = data.draw(st.sampled_from(["none", "anywhere"]))
    sight = None
    for length in data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 8]), min_size=1, max_size=6)):
        real = data.draw(real_tokens(rows, length, padding))
        real = real if sight is None else real.sort(dim=-1, descending=True).values
        numbers, padded = number(real, seen), not bool(real.all())
        if sight is not None:
            sight = Sight.after(sight, numbers, padded)
        elif not seen.any():
            sight = Sight.without_cache(context, numbers, padded)
        else:
            room = context.span or 100
            sight = Sight.with_cache(context, numbers, padded, seen, int(seen.max()), room, in_place=False)
        assert sight.key_numbers[:, -length:].tolist() == numbers.tolist()
        check_mask(sight)
        check_reach(sight, data.draw(st.integers(1, 4)))
        seen = seen + real.sum(-1)
        starts = [listed(context, max(query, 0))[1][0] for query in sight.queries[:, -1].tolist()]
        columns = zip(*sight.key_numbers.tolist(), strict=True)
        needed = [any(key >= start for key, start in zip(keys, starts, strict=True)) for keys in columns]
        assert sight.first_kept == (needed.index(True) if any(needed) and context.span is not None else 0)


@pytest.mark.parametrize("chosen", [None, torch.tensor([2, 0])], ids=["all", "some"])
def test_memory_that_is_read_sees_itself(chosen):
    sight = Sight.of_reads(3, torch.device("cpu"), chosen)
    everything = slice(None)
    assert sight.mask(everything, everything).tolist() == [[[True] * 3] * 3]
    assert sight.query_slots.tolist() == sight.places.tolist() == sight.key_places.tolist() == [[0, 1, 2]]
    assert sight.reach(slice(0, 1)) == slice(0, 3)
    assert not sight.prefix and not sight.context.num_prefix
    assert sight.rows.tolist() == ([[0]] if chosen is None else [[2], [0]])


@settings(max_examples=60, deadline=None)
@given(context=contexts(), count=st.integers(1, 3), data=st.data())
def test_memory_that_is_written_sees_what_the_last_token_sees_and_itself(context, count, data):
    """Both ways, in the slots that come next; as far from each key by its place as by its slot."""
    totals = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    seen = torch.tensor(totals)
    past = last_numbers(seen, max(totals), context.span)
    chosen = data.draw(st.sampled_from([None, torch.arange(len(totals)).flip(0) + 1]))
    sight = Sight.of_writes(context, count, past, seen, chosen, None)
    everything, memory = slice(None), context.num_memory
    assert sight.reach(slice(0, 1)) == slice(0, past.shape[1] + count)
    assert sight.prefix and not sight.is_step
    assert sight.prefix_positions.tolist() == [list(range(context.num_prefix))]
    assert sight.rows.tolist() == [[row] for row in (range(len(totals)) if chosen is None else chosen.tolist())]
    mask = sight.mask(everything, everything, with_prefix=True)
    for row, total in enumerate(totals):
        before, inside = listed(context, total - 1)
        keys, places = sight.key_numbers[row, :-count].tolist(), sight.key_places[row].tolist()
        for index in range(count):
            slot, place = int(sight.query_slots[row, index]), int(sight.places[row, index])
            assert slot == memory + len(before + inside) + index
            told, seen_keys = mask[row, index].tolist(), []
            assert told[: context.num_prefix] == [True] * memory + [sink in before for sink in range(context.num_sinks)]
            for key, key_place, is_seen in zip(keys, places, told[context.num_prefix : -count], strict=False):
                if is_seen:
                    seen_keys.append(key)
                    assert place - key_place == slot - memory - (before + inside).index(key)
            assert seen_keys == inside
            assert told[-count:] == [True] * count
            assert [place - each for each in places[-count:]] == [index - other for other in range(count)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_last_numbers_end_with_the_last_token(data):
    totals = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    before = max(totals) + data.draw(st.integers(0, 3))
    most = data.draw(st.none() | st.integers(0, 9))
    found = last_numbers(torch.tensor(totals), before, most).tolist()
    for total, numbers in zip(totals, found, strict=True):
        count = before if most is None else min(before, most)
        assert numbers == list(range(total - count, total))


@settings(max_examples=80, deadline=None)
@given(segment=st.integers(1, 7), data=st.data())
def test_a_call_is_cut_where_segments_begin(segment, data):
    """Every token is in one piece, none of which holds two segments of a row; and they are put back in order."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    real = data.draw(real_tokens(rows, length, data.draw(st.sampled_from(["none", "anywhere"]))))
    seen = torch.tensor(data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows)))
    padded, phase = not bool(real.all()), None
    if not padded and data.draw(st.booleans()):
        phase = int(seen[0]) % segment
        seen = seen // segment * segment + phase
    numbers = number(real, seen)
    pieces = cut_in_segments(numbers, padded, phase, segment)
    all_columns = torch.arange(length).expand(rows, -1)
    for row, mine in enumerate(numbers.tolist()):
        found = []
        for piece in pieces:
            columns = piece.columns if isinstance(piece.columns, torch.Tensor) else all_columns[:, piece.columns]
            of_row = [*zip(piece.numbers[row].tolist(), columns[row].tolist(), strict=True)]
            tokens = [(each, column) for each, column in of_row if each >= 0]
            assert tokens == of_row[: len(tokens)] or len(pieces) == 1  # from its first column on
            assert len({each // segment for each, _ in tokens}) <= 1
            assert piece.padded or len(tokens) == len(of_row)
            if piece.begins is not None:
                assert piece.begins == (tokens[0][0] % segment == 0)
            found += tokens
        assert found == [(each, column) for column, each in enumerate(mine) if each >= 0]
    touched = [len({each // segment for each in mine if each >= 0}) for mine in numbers.tolist()]
    assert len(pieces) == max(1, *touched)
    side_by_side = torch.cat([piece.numbers for piece in pieces], dim=1)
    if isinstance(pieces[0].columns, slice):
        assert torch.equal(side_by_side, numbers)
        return
    places = place_in_pieces(pieces, length)
    assert torch.equal(side_by_side.gather(1, places).where(real, -1), numbers)
    assert not places[~real].any()


@pytest.mark.parametrize("phase", range(4))
def test_cuts_by_phase_are_those_by_numbers(phase):
    """What the host knows without asking the device."""
    numbers = (torch.arange(11) + 8 + phase)[None]
    known, asked = (cut_in_segments(numbers, False, each, 4) for each in (phase, None))
    assert [piece.numbers.tolist() for piece in known] == [piece.numbers.tolist() for piece in asked]
    for index, (piece, other) in enumerate(zip(known, asked, strict=True)):
        assert torch.arange(11)[piece.columns].tolist() == other.columns[0].tolist()
        assert piece.begins == (index > 0 or phase == 0)
        assert other.begins is None and not other.padded


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
