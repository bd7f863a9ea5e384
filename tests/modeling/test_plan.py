"""What the sections of a call see, and where a cache keeps their keys, against loops over the table of the design."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, ROPE, SLIDING, TINY
from modeling.numbering import listed, number, real_tokens, visibilities
from olmem import OlmemConfig, visibility_olmem
from olmem.backends_olmem import BACKENDS
from olmem.contracts_olmem import LayerKind, Plan, Section, Writes
from olmem.inputs_olmem import Tokens
from olmem.ops_olmem import PLAIN
from olmem.plan_olmem import Call, Earlier, Frame, Past, Planner, layer_kinds
from olmem.positions_olmem import OlmemRotaryEmbedding, Rotation
from olmem.view_olmem import View, find_sinks
from olmem.visibility_olmem import Visibility, held, last_numbers
from torch.testing import assert_close

ALL = slice(None)


def frame_of(visibility: Visibility, call: Call, earlier: list[torch.Tensor] | None = None, capacity: int = 0) -> Frame:
    """Returns what layers of one type share in a call."""
    return Frame(visibility, call, earlier or [], capacity)


def the_view(frame: Frame) -> View:
    """Returns the view of a frame that has one section."""
    [(_, view)] = frame.sections
    return view


# What every view of tokens keeps to


def check_reach(view: View, block: int) -> None:
    """Checks that a block's reach holds all that it sees, and where the window has a span, not much more."""
    length = view.numbers.shape[1]
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        reach = view.reach(queries)
        visible = view.visibility.sees(view.numbers[:, queries, None], view.key_numbers[:, None])
        visible[:, :, reach] = False
        assert not visible.any()
        if view.visibility.span is not None and not view.in_place:
            assert reach.stop - reach.start <= queries.stop - queries.start + view.visibility.span - 1 + view.slack


def check_mask(view: View) -> None:
    """Checks that a token sees all of memory and what the table lists, each key once, from its own place and slot.

    Padding sees something, and nothing sees it.
    """
    memory, sinks, prefix = view.visibility.num_memory, view.visibility.num_sinks, view.visibility.num_prefix
    mask = view.mask(ALL, ALL, with_prefix=True)
    window = view.mask(ALL, ALL)
    assert view.prefix_slots.tolist() == [list(range(prefix))]
    assert mask.shape[-1] == prefix + view.key_numbers.shape[1]
    assert mask.any(-1).all() and window.any(-1).all()
    assert view.prefix or not memory
    assert mask[:, :, :memory].all()
    assert view.key_places.tolist() == [[memory + key for key in row] for row in view.key_numbers.tolist()]
    places, slots = view.places.tolist(), view.query_slots.tolist()
    for row, numbers in enumerate(view.numbers.tolist()):
        keys = view.key_numbers[row if len(view.key_numbers) > 1 else 0].tolist()
        for column, query in enumerate(numbers):
            if query < 0:
                continue
            before, inside = listed(view.visibility, query)
            assert places[row][column] == memory + query
            assert slots[row][column] == memory + len(before + inside) - 1
            seen = mask[row, column].tolist()
            assert [sink for sink in range(sinks) if seen[memory + sink]] == before
            assert sorted(key for key, is_seen in zip(keys, seen[prefix:], strict=True) if is_seen) == inside
            assert window[row, column].tolist() == seen[prefix:]
            if before:
                assert view.prefix
            if view.causal:
                assert inside == keys[: column + 1]
        if view.causal:
            assert keys[: len(numbers)] == numbers


def check_step(view: View) -> None:
    """Checks that a step's keys have the slots of what it sees, and that its mask is None where it sees them all."""
    visibility, slots = view.visibility, view.step_slots.tolist()
    for row, ((query,), keys) in enumerate(zip(view.numbers.tolist(), view.key_numbers.tolist(), strict=True)):
        assert slots[row][: visibility.num_prefix] == list(range(visibility.num_prefix))
        if query < 0:
            continue
        before, inside = listed(visibility, query)
        shown = [visibility.num_memory + (before + inside).index(key) if key in inside else 0 for key in keys]
        assert slots[row][visibility.num_prefix :] == shown
    mask = view.mask(ALL, ALL, with_prefix=view.prefix)
    if view.step_mask is None:
        assert mask.all()
    else:
        assert torch.equal(view.step_mask, mask) and not mask.all()


def check_sinks(found: tuple[torch.Tensor, torch.Tensor], numbers: torch.Tensor, count: int) -> None:
    """Checks that exactly the sinks among the numbers (R, S) are found, each in its own column."""
    has_sink, column = found
    for row, own in enumerate(numbers.tolist()):
        for sink in range(count):
            assert bool(has_sink[row, sink]) == (sink in own)
            if sink in own:
                assert own[column[row, sink]] == sink


# Without a cache


@settings(max_examples=60, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_without_a_cache_the_new_tokens_are_all_there_is(visibility, data):
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    real = data.draw(real_tokens(rows, length, data.draw(st.sampled_from(["none", "anywhere"]))))
    earlier = data.draw(st.sampled_from([None, Earlier()]))
    frame = frame_of(visibility, Call(Tokens(number(real), not bool(real.all())), earlier=earlier))
    view = the_view(frame)
    assert view.key_numbers is view.numbers
    assert frame.writes is None
    assert frame.tape.own_numbers.tolist() == view.numbers.tolist()
    assert not view.in_place
    check_mask(view)
    check_reach(view, data.draw(st.integers(1, 7)))
    if visibility.num_sinks:
        check_sinks(frame.tape.sinks, view.numbers, visibility.num_sinks)
    else:
        assert frame.tape.sinks is None


@settings(max_examples=40, deadline=None)
@given(visibility=visibilities(), length=st.integers(1, 30))
def test_a_view_is_causal_where_every_query_sees_all_before_it(visibility, length):
    view = the_view(frame_of(visibility, Call(Tokens(torch.arange(length)[None]))))
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    assert not view.causal or torch.equal(view.mask(ALL, ALL)[0], triangle)
    assert view.causal or visibility.lets_go(length + 1)


@settings(max_examples=40, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_the_view_of_a_document_is_that_of_a_row_alone(visibility, data):
    """Memory has no part in packed documents, which are made rows of their own beside it."""
    visibility = Visibility(**vars(visibility) | {"num_memory": 0})
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=3))
    numbers = torch.cat([torch.arange(size) for size in sizes])[None]
    stops = torch.tensor(sizes).cumsum(0).tolist()
    documents = [[*zip([0, *stops[:-1]], stops, strict=True)]]
    view = the_view(frame_of(visibility, Call(Tokens(numbers, documents=documents))))
    assert view.documents == documents
    for size in sizes:
        document, alone = view.upto(size), the_view(frame_of(visibility, Call(Tokens(torch.arange(size)[None]))))
        assert document.documents is None
        assert torch.equal(document.mask(ALL, ALL, True), alone.mask(ALL, ALL, True))
        assert torch.equal(document.query_slots, alone.query_slots)
        assert (document.prefix, document.causal) == (alone.prefix, alone.causal)
        check_mask(document)


# With a cache


@dataclass
class Store:
    """Simulates the buffers of a row: which token lies in which slot."""

    window: dict[int, int] = field(default_factory=dict)
    sinks: dict[int, int] = field(default_factory=dict)

    def write(self, numbers: list[int], slots: list[int], sink_slots: list[int]) -> None:
        """Puts the last tokens of a call where their slots say, and the first ones where sinks are kept."""
        kept = numbers[len(numbers) - len(slots) :]
        assert len({slot for slot in slots if slot >= 0}) == sum(slot >= 0 for slot in slots)
        self.window |= {slot: each for slot, each in zip(slots, kept, strict=True) if slot >= 0}
        self.sinks |= {slot: each for slot, each in zip(sink_slots, numbers, strict=False) if slot >= 0}


def write_all(stores: list[Store], numbers: torch.Tensor, writes: Writes) -> None:
    """Writes the tokens of a call (B, T) to the stores of its rows."""
    sinks = numbers.new_empty(len(numbers), 0) if writes.sink_slots is None else writes.sink_slots
    for row, store in enumerate(stores):
        store.write(numbers[row].tolist(), writes.slots[row].tolist(), sinks[row].tolist())


def check_past(stores: list[Store], numbers: torch.Tensor, writes: Writes) -> None:
    """Checks that the past keys with these numbers (B, P) lie where they are read from; negative is none."""
    for row, store in enumerate(stores):
        for slot, key in zip(writes.past_slots[row].tolist(), numbers[row].tolist(), strict=True):
            if key >= 0:
                assert store.window[slot] == key


def check_stores(stores: list[Store], visibility: Visibility, limit: int | None, totals: list[int]) -> None:
    """Checks that stores hold the last tokens and all sinks of rows that have read so many, and no more slots."""
    for store, total in zip(stores, totals, strict=True):
        first = visibility.num_prefix
        assert all(slot >= first and (limit is None or slot < first + limit) for slot in store.window)
        kept = range(max(0, total - limit), total) if limit else range(total)
        assert set(kept) <= set(store.window.values())
        expected = {visibility.num_memory + sink: sink for sink in range(min(total, visibility.num_sinks))}
        assert store.sinks == expected


def pieces_with_padding(data, rows: int, kinds: tuple[str, ...], sizes: tuple[int, ...], most: int) -> list:
    """Draws the pieces of a stream, as masks (rows, T) of their real tokens."""
    lengths = data.draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=most))
    padding, columns, masks = data.draw(st.sampled_from(kinds)), 0, []
    left = torch.tensor(data.draw(st.lists(st.integers(0, sum(lengths)), min_size=rows, max_size=rows)))
    for length in lengths:
        real = torch.arange(columns, columns + length) >= left[:, None]
        masks.append(real if padding == "left" else data.draw(real_tokens(rows, length, padding)))
        columns += length
    return masks


@settings(max_examples=100, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_with_a_cache_every_key_is_where_the_writes_say(visibility, data):
    """Streams in pieces with padding anywhere are read from where they were written, and from nowhere else."""
    rows = data.draw(st.integers(1, 3))
    masks = pieces_with_padding(data, rows, ("none", "left", "anywhere"), (1, 1, 1, 2, 3, 5, 8, 14), 14)
    total = sum(mask.shape[1] for mask in masks)
    room = data.draw(st.sampled_from([None, total, total + 3]))
    limit = visibility.span or room
    stores, seen, columns = [Store() for _ in range(rows)], torch.zeros(rows, dtype=torch.long), 0
    for real in masks:
        length, numbers = real.shape[1], number(real, seen)
        copied = length == 1 and data.draw(st.booleans())  # as where memory is written after one token
        unknown = length == 1 and not copied and limit is not None and data.draw(st.booleans())
        least = data.draw(st.sampled_from([None, int(seen.min())]))
        tokens, past = Tokens(numbers, not bool(real.all())), Past(seen, least, max_length=room)
        call = Call(tokens, None if unknown else columns, past, written_after=seen + real.sum(-1) if copied else None)
        frame = frame_of(visibility, call)
        view, writes = frame.sections[0][1], frame.writes
        assert view.in_place == (not copied and (length == 1 or visibility.span is None))
        assert writes.length == (None if unknown else columns + length)
        assert writes.rows.tolist() == [[row] for row in range(rows)]
        assert frame.tape is None
        if view.in_place:
            assert writes.past_slots is None
            assert writes.filled == view.key_numbers.shape[1]
            write_all(stores, numbers, writes)
            for row, store in enumerate(stores):
                for slot, key in enumerate(view.key_numbers[row].tolist(), visibility.num_prefix):
                    if key >= 0:
                        assert store.window[slot] == key
        else:
            past = view.key_numbers.shape[1] - length
            assert view.key_numbers[:, past:].tolist() == numbers.tolist()
            assert writes.past_slots.shape[1] == past
            check_past(stores, view.key_numbers[:, :past], writes)
            write_all(stores, numbers, writes)
        check_stores(stores, visibility, limit, (seen + real.sum(-1)).tolist())
        expected = numbers.cummax(-1).values.maximum(seen[:, None] - 1)  # padding sees as a token before it
        assert torch.equal(view.queries, expected)
        check_mask(view)
        if view.is_step:
            check_step(view)
        else:
            assert view.step_mask is None
            check_reach(view, data.draw(st.integers(1, 4)))
        seen, columns = seen + real.sum(-1), columns + length


@settings(max_examples=30, deadline=None)
@given(visibility=visibilities((SLIDING, CHUNKED)), seen=st.integers(0, 40))
def test_sinks_are_written_only_while_some_are_missing(visibility, seen):
    call = Call(Tokens(torch.tensor([[seen]])), seen, Past(torch.tensor([seen]), least=seen))
    sink_slots = frame_of(visibility, call).writes.sink_slots
    if seen < visibility.num_sinks:
        assert sink_slots.tolist() == [[visibility.num_memory + seen]]
    else:
        assert sink_slots is None


def test_a_ring_is_never_larger_than_its_window():
    """However long the stream, one token reads the window, and a piece of n tokens n − 1 keys more than that."""
    visibility = Visibility(SLIDING, sliding_window=4, num_sinks=2)
    seen, numbers = torch.tensor([1000]), torch.tensor([[1000]])
    past = Past(seen, least=1000)
    step = frame_of(visibility, Call(Tokens(numbers), 1000, past))
    copied = frame_of(visibility, Call(Tokens(numbers), 1000, past, written_after=seen + 1))
    for frame, in_place in ((step, True), (copied, False)):
        view = frame.sections[0][1]
        assert view.in_place is in_place
        assert view.key_numbers.shape == (1, 4)
        assert sorted(view.key_numbers[0].tolist()) == [997, 998, 999, 1000]
        assert frame.writes.slots.tolist() == [[2 + 1000 % 4]]
    piece = frame_of(visibility, Call(Tokens(numbers + torch.arange(5)), 1000, past))
    assert the_view(piece).key_numbers.tolist() == [list(range(997, 1005))]
    assert sorted(piece.writes.slots[0].tolist()) == [2, 3, 4, 5]


def test_a_layer_with_room_at_once_keeps_each_token_in_its_own_slot():
    visibility = Visibility(FULL, num_memory=3)
    call = Call(Tokens(torch.arange(5, 9)[None]), 5, Past(torch.tensor([5]), max_length=20))
    frame = frame_of(visibility, call)
    assert frame.writes.slots.tolist() == [[8, 9, 10, 11]]
    assert frame.writes.filled == 9
    assert the_view(frame).key_numbers.tolist() == [list(range(9))]


@pytest.mark.parametrize("is_bare", [False, True])
def test_a_step_reads_the_prefix_of_a_shared_tensor_though_it_sees_none(is_bare):
    """One tensor is one part from its first slot on, so that no key is copied."""
    visibility = Visibility(SLIDING, sliding_window=4, num_sinks=2)
    call = Call(Tokens(torch.tensor([[1]])), 1, Past(torch.tensor([1]), one_tensor=is_bare))
    view = the_view(frame_of(visibility, call))
    assert view.prefix is is_bare
    shown = [False] * (2 if is_bare else 0) + [True, True]
    assert view.mask(ALL, ALL, view.prefix).tolist() == [[shown]]
    check_step(view)


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_call_that_is_longer_than_its_ring_writes_its_last_tokens_only(is_padded):
    visibility = Visibility(SLIDING, sliding_window=3, num_sinks=2)
    numbers = torch.arange(10)[None]
    if is_padded:
        numbers = torch.cat((numbers, torch.tensor([[-1]])), dim=1)
    frame = frame_of(visibility, Call(Tokens(numbers, is_padded), past=Past(torch.tensor([0]))))
    slots = [slot for slot in frame.writes.slots[0].tolist() if slot >= 0]
    assert slots == [2 + 7 % 3, 2 + 8 % 3, 2 + 9 % 3]
    assert frame.writes.sink_slots[0, :2].tolist() == [0, 1]
    assert (frame.writes.sink_slots[0, 2:] == -1).all()


# On a tape


@settings(max_examples=60, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_on_a_tape_all_keys_that_are_still_seen_are_joined(visibility, data):
    """Keys of calls before a forward come from its cache, those of its own calls from these.

    Padding stands anywhere in the first call of a forward, and at the end of the others.
    """
    rows = data.draw(st.integers(1, 3))
    masks = pieces_with_padding(data, rows, ("none", "anywhere"), (1, 2, 3, 5, 8), 7)
    first = data.draw(st.integers(0, len(masks) - 1))  # pieces that the cache has read before this forward
    has_cache = first > 0 or data.draw(st.booleans())
    stores, seen, columns = [Store() for _ in range(rows)], torch.zeros(rows, dtype=torch.long), 0
    capacity, is_bare = data.draw(st.integers(0, 5)), has_cache and data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visibility_olmem, "STORE_BLOCK", 2)
        earlier, loose, seen_first, before_first = [], False, seen, 0
        for index, real in enumerate(masks):
            real = real.sort(dim=-1, descending=True).values if index > first else real
            numbers, padded = number(real, seen), not bool(real.all())
            call = Call(Tokens(numbers, padded), columns, Past(seen, one_tensor=is_bare) if has_cache else None)
            if index < first:
                frame = frame_of(visibility, call)
                write_all(stores, numbers, frame.writes)
                seen, columns = seen + real.sum(-1), columns + real.shape[1]
                seen_first, before_first = seen, columns
                continue
            call.earlier = Earlier({}, loose, seen_first if has_cache else None, before_first)
            frame = frame_of(visibility, call, earlier, capacity)
            view, tape = the_view(frame), frame.tape
            assert not view.in_place
            assert view.key_numbers[:, -numbers.shape[1] :].tolist() == numbers.tolist()
            assert torch.equal(tape.own_numbers, torch.cat([*earlier, numbers], dim=1))
            past_numbers = view.key_numbers[:, : view.key_numbers.shape[1] - tape.own_numbers.shape[1]]
            assert torch.equal(view.key_numbers[:, past_numbers.shape[1] :], tape.own_numbers.expand(len(real), -1))
            check_mask(view)
            check_reach(view, data.draw(st.integers(1, 4)))
            if visibility.num_sinks:
                check_sinks(tape.sinks, view.key_numbers, visibility.num_sinks)
            before = view.key_numbers[:, : -numbers.shape[1]]
            own_before = tape.own_numbers[:, : -numbers.shape[1]]
            assert torch.equal(frame.bare_numbers, before if is_bare else own_before)
            if has_cache:
                check_past(stores, past_numbers, frame.writes)
                check_candidates(visibility, view, tape, capacity, seen)
                write_all(stores, numbers, frame.writes)
                check_stores(stores, visibility, visibility.span, (seen + real.sum(-1)).tolist())
            else:
                assert frame.writes is None
            earlier.append(numbers)
            loose |= padded
            seen, columns = seen + real.sum(-1), columns + real.shape[1]


def check_candidates(visibility: Visibility, view: View, tape, capacity: int, seen: torch.Tensor) -> None:
    """Checks that a store still holds what it is read for, and that with the forward's own tokens that is enough."""
    limit = visibility.store_size(capacity)
    for row, numbers in enumerate(view.numbers.tolist()):
        in_store = [key for key in tape.store_numbers[row].tolist() if key >= 0]
        stored = {int(held(slot, int(seen[row]), limit)) for slot in range(limit)}
        assert set(in_store) <= stored
        own = [key for key in tape.own_numbers[row].tolist() if key >= 0]
        assert len({*in_store, *own}) == len(in_store) + len(own)
        for query in numbers:
            wanted = {key for key in range(max(query, 0)) if visibility.candidates(query, key, capacity)}
            assert wanted <= {*in_store, *own}


@settings(max_examples=40, deadline=None)
@given(visibility=visibilities((SLIDING, CHUNKED)), data=st.data())
def test_earlier_calls_out_of_every_window_may_be_left_out(visibility, data):
    """Columns are then no longer those of numbers one after another, which a block's reach must allow for."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))
    calls = torch.arange(sum(sizes))[None].split(sizes, dim=1)
    *earlier, numbers = calls
    first_seen = listed(visibility, int(numbers[0, 0]))[1][0]
    kept = [each for each in earlier if int(each[0, -1]) >= first_seen or int(each[0, 0]) < visibility.num_sinks]
    before = int(numbers[0, 0])
    view = the_view(frame_of(visibility, Call(Tokens(numbers), before, earlier=Earlier()), kept))
    check_mask(view)
    check_reach(view, data.draw(st.integers(1, 4)))


# Memory


@pytest.mark.parametrize("chosen", [None, torch.tensor([True, False])], ids=["all", "some"])
def test_memory_that_is_read_sees_itself(chosen):
    """Read tokens come first, see one another and nothing else, and stand in the first slots."""
    visibility = Visibility(SLIDING, sliding_window=4, num_sinks=2, num_memory=3)
    tokens, past = Tokens(torch.arange(2)[None].expand(2, -1)), Past(torch.zeros(2, dtype=torch.long))
    call = Call(tokens, past=past, reads=True, begins=chosen)
    frame = frame_of(visibility, call)
    (columns, view), (token_columns, tokens) = frame.sections
    assert (columns, token_columns) == (slice(0, 3), slice(3, 5))
    assert view.role == "read" and tokens.role == "token"
    assert view.mask(ALL, ALL).tolist() == [[[True] * 3] * 3]
    assert view.query_slots.tolist() == view.places.tolist() == view.key_places.tolist() == [[0, 1, 2]]
    assert view.reach(slice(0, 1)) == ALL
    assert not view.prefix and not view.is_step
    check_mask(tokens)


@settings(max_examples=60, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_memory_that_is_written_sees_what_the_last_token_sees_and_itself(visibility, data):
    """It does so both ways, in the slots that come next, as far from each key by its place as by its slot."""
    visibility = Visibility(**vars(visibility) | {"num_memory": data.draw(st.integers(1, 3))})
    totals = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    seen = torch.tensor(totals)
    chosen = data.draw(st.sampled_from([None, torch.arange(len(totals)).flip(0)]))
    of_batch = seen if chosen is None else seen[chosen]
    call = Call(
        Tokens(torch.empty(len(totals), 0, dtype=torch.long)),
        before=max(totals),
        past=Past(of_batch, one_tensor=data.draw(st.booleans())),
        earlier=data.draw(st.sampled_from([None, Earlier()])),
        written_after=seen,
        chosen=chosen,
    )
    frame = frame_of(visibility, call)
    view, writes = the_view(frame), frame.writes
    past = view.key_numbers[:, : -visibility.num_memory]
    assert torch.equal(past, last_numbers(seen, max(totals), visibility.span))
    expected = [[row] for row in (range(len(totals)) if chosen is None else chosen.tolist())]
    assert writes.rows.tolist() == expected and writes.chosen is chosen
    assert writes.slots.shape[1] == 0 and writes.length == max(totals)
    limit = visibility.span
    for row, total in enumerate(totals):
        store = Store()
        for key in range(total):
            store.window[visibility.num_prefix + (key % limit if limit else key)] = key
        for slot, key in zip(writes.past_slots[row].tolist(), past[row].tolist(), strict=True):
            assert key < 0 or store.window[slot] == key
    if call.earlier is not None:
        assert frame.tape.own_numbers.shape[1] == 0
        assert not call.one_tensor or torch.equal(frame.bare_numbers, past)
    else:
        assert frame.tape is None
    check_written(view, totals)


@settings(max_examples=60, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_memory_written_after_tokens_sees_what_the_last_of_them_sees(visibility, data):
    """The rows of a call end with a token of their own, and its write tokens go on from there, with a cache or not."""
    visibility = Visibility(**vars(visibility) | {"num_memory": data.draw(st.integers(1, 3))})
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    before = data.draw(st.sampled_from([None, 0, 1, 5, 20]))
    real = data.draw(real_tokens(rows, length)) | (torch.arange(length) == 0)
    seen = torch.zeros(rows, dtype=torch.long)
    if before:
        seen = torch.tensor(data.draw(st.lists(st.integers(0, before), min_size=rows, max_size=rows)))
    numbers = number(real, seen)
    after = numbers.amax(-1) + 1
    call = Call(Tokens(numbers, not bool(real.all())), written_after=after)
    if before is not None:
        call.past, call.before = Past(seen), before
    frame = frame_of(visibility, call)
    (_, tokens), (columns, view) = frame.sections
    assert columns == slice(length, length + visibility.num_memory)
    assert torch.equal(view.key_numbers[:, : tokens.key_numbers.shape[1]], tokens.key_numbers)
    check_mask(tokens)
    check_written(view, after.tolist())


def check_written(view: View, totals: list[int]) -> None:
    """Checks what write tokens see after rows of so many tokens, from which places and slots."""
    visibility = view.visibility
    memory, count = visibility.num_memory, visibility.num_memory
    assert view.reach(slice(0, 1)) == ALL
    assert view.prefix and not view.is_step
    assert view.prefix_slots.tolist() == [list(range(visibility.num_prefix))]
    mask = view.mask(ALL, ALL, with_prefix=True)
    for row, total in enumerate(totals):
        before, inside = listed(visibility, total - 1)
        keys, places = view.key_numbers[row, :-count].tolist(), view.key_places[row].tolist()
        for index in range(count):
            slot, place = int(view.query_slots[row, index]), int(view.places[row, index])
            assert slot == memory + len(before + inside) + index
            shown, seen_keys = mask[row, index].tolist(), []
            sinks = [sink in before for sink in range(visibility.num_sinks)]
            assert shown[: visibility.num_prefix] == [True] * memory + sinks
            for key, key_place, is_seen in zip(keys, places, shown[visibility.num_prefix : -count], strict=False):
                if is_seen:
                    seen_keys.append(key)
                    assert place - key_place == slot - memory - (before + inside).index(key)
            assert sorted(seen_keys) == inside
            assert shown[-count:] == [True] * count
            assert [place - each for each in places[-count:]] == [index - other for other in range(count)]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_sinks_are_found_wherever_they_stand(data):
    numbers = torch.tensor(data.draw(st.permutations(range(-2, 6)))).expand(2, -1)
    count = data.draw(st.integers(1, 8))
    check_sinks(find_sinks(numbers, count), numbers, count)


# Plans


def planner_of(is_plain: bool = False, weights: bool = False, **changes: Any) -> Planner:
    """Returns a planner of a tiny configuration with these changes."""
    config = OlmemConfig(**TINY | {"rope_parameters": ROPE} | changes)
    return Planner(config, OlmemRotaryEmbedding(config), BACKENDS, PLAIN, is_plain, weights)


MANY: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, CHUNKED, FULL, SLIDING, SLIDING],
    "position_embedding": ["rope", "xpos", "linspace", "none", "rope"],
    "attention_chunk_size": 3,
    "attention_chunk_lookback": 1,
    "num_sink_tokens": 2,
    "retrieval_layers": [4],
    "retrieval_capacity": 6,
    "retrieval_top_k": 2,
}


@pytest.mark.parametrize("is_differentiable", [False, True])
def test_layers_of_one_type_share_where_keys_go(is_differentiable):
    """Kinds of layers have a plan each; a tape also tells layers that retrieve, which need more of what was before."""
    planner = planner_of(**MANY)
    numbers = torch.arange(7, 10)[None]
    earlier = Earlier(seen=torch.tensor([7]), before=7) if is_differentiable else None
    call = Call(Tokens(numbers), 7, Past(torch.tensor([7])), earlier)
    plans = planner.plans(call)
    kinds = layer_kinds(planner.config)
    assert [tuple(kind) for kind in kinds] == [
        (SLIDING, "rope", False),
        (CHUNKED, "xpos", False),
        (FULL, "linspace", False),
        (SLIDING, "none", False),
        (SLIDING, "rope", True),
    ]
    assert list(plans) == kinds
    rope, _, _, none, retrieving = (plans[kind] for kind in kinds)
    assert rope.writes is none.writes
    assert rope.view() is none.view()
    assert (retrieving.writes is rope.writes) is not is_differentiable
    assert [plan.retrieves for plan in plans.values()] == [False, False, False, False, True]
    assert {plan.visibility.layer_type for plan in plans.values()} == {SLIDING, CHUNKED, FULL}
    assert [section.needs.by_slot for plan in plans.values() for section in plan.sections] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert none.rotations.place.length == 0 and rope.rotations.place.length == 3


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_rotations_of_a_call_are_those_of_its_places_and_slots(data):
    """Each section has those of its own columns, in halves, whatever sections a call has."""
    layer_type = data.draw(st.sampled_from([SLIDING, CHUNKED, FULL]))
    memory, seen = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 9))
    sinks = 0 if layer_type == FULL else 2
    changes = {"layer_types": layer_type, "num_sink_tokens": sinks, "num_memory_tokens": memory} | {
        "attention_chunk_size": 3,
        "memory_segment_length": 20 if memory else None,
    }
    planner = planner_of(**changes)
    numbers = torch.arange(seen, seen + data.draw(st.integers(1, 6)))[None]
    call = Call(Tokens(numbers), seen, Past(torch.tensor([seen])))
    if memory:
        call.reads = seen == 0
        call.written_after = numbers[:, -1] + 1 if data.draw(st.booleans()) else None
    [plan] = planner.plans(call).values()

    def expect(rotation: Rotation, positions: torch.Tensor) -> None:
        cos, sin = planner.rotary(positions, positions, layer_type)
        assert torch.equal(rotation.cos, cos) and torch.equal(rotation.sin, sin)

    expect(plan.rotations.place, torch.cat([section.view.places for section in plan.sections], dim=1))
    for section in plan.sections:
        assert section.part(plan.rotations.place.cos[:, None]).shape[2] == section.view.numbers.shape[1]
        expect(section.rotations.place, section.view.places)
        if section.view.prefix:
            expect(section.rotations.slot, section.view.query_slots)
        assert section.rotations.prefix.length == 0 and section.rotations.step.length == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_keys_without_positions_are_given_those_of_their_slots_when_read(data):
    """What a cache of one tensor keeps is rotated by phases: the prefix, past and new keys, or a step's keys alone."""
    layer_type = data.draw(st.sampled_from([SLIDING, CHUNKED, FULL]))
    planner = planner_of(
        layer_types=layer_type,
        num_sink_tokens=0 if layer_type == FULL else 2,
        attention_chunk_size=3,
        shared_projections="key_value",
    )
    seen, length = data.draw(st.integers(0, 12)), data.draw(st.sampled_from([1, 3]))
    numbers = torch.arange(seen, seen + length)[None]
    [plan] = planner.plans(Call(Tokens(numbers), seen, Past(torch.tensor([seen]), one_tensor=True))).values()
    [section] = plan.sections

    def expect(rotation: Rotation, positions: torch.Tensor) -> None:
        assert rotation.cos is None
        assert_close(rotation.phases, planner.rotary.phases(positions, layer_type), rtol=0, atol=1e-6)

    view, rotations = section.view, section.rotations
    if length == 1:
        expect(rotations.step, view.step_slots)
        expect(rotations.slot, view.query_slots)
        assert [each.length for each in (rotations.place, rotations.prefix, rotations.key)] == [0, 0, 0]
    else:
        expect(section.rotations.place, view.places)
        if view.visibility.num_prefix:
            expect(section.rotations.prefix, view.prefix_slots)
        expect(section.rotations.key, view.key_places.clamp(min=0))
        assert section.rotations.step.length == 0


def test_positions_of_the_caller_stand_for_places():
    planner = planner_of(layer_types=FULL)
    positions = torch.tensor([[5, 9, 40]])
    [plan] = planner.plans(Call(Tokens(torch.arange(3)[None], position_ids=positions))).values()
    cos, _ = planner.rotary(positions, positions, FULL)
    assert torch.equal(plan.rotations.place.cos, cos)
    assert plan.view().places.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("stage", ["projection", "rotary"])
def test_only_a_clip_of_rotated_vectors_is_in_the_rotations(stage):
    planner = planner_of(layer_types=SLIDING, clip_qkv=0.5, clip_qkv_stage=stage)
    [plan] = planner.plans(Call(Tokens(torch.arange(3)[None]))).values()
    rotated = plan.rotations.place(torch.full((1, 2, 3, 8), 2.0))
    assert (float(rotated.abs().max()) <= 0.5) == (stage == "rotary")


@pytest.mark.parametrize("is_plain, weights, returns", [(True, True, True), (False, True, False), (True, False, False)])
def test_weights_are_returned_where_operations_are_plain(is_plain, weights, returns):
    [plan] = planner_of(is_plain, weights, layer_types=SLIDING).plans(Call(Tokens(torch.arange(3)[None]))).values()
    assert plan.returns_weights is returns
    assert plan.sections[0].needs.plain is is_plain and plan.sections[0].needs.weights is returns


def test_the_first_backend_that_supports_a_view_is_planned():
    """It is asked with the section's own view and needs; those after it are not."""
    asked = []

    def backend(name: str, supports: bool) -> Any:
        def answer(view, needs) -> bool:
            asked.append((name, view, needs))
            return supports

        return SimpleNamespace(name=name, supports=answer)

    planner = planner_of(layer_types=SLIDING)
    planner.backends = [backend("first", False), backend("second", True), backend("third", True)]
    [plan] = planner.plans(Call(Tokens(torch.arange(3)[None]))).values()
    [section] = plan.sections
    assert section.backend.name == "second"
    assert [name for name, _, _ in asked] == ["first", "second"]
    assert all(view is section.view and needs == section.needs for _, view, needs in asked)


def test_a_plan_finds_its_sections_by_role():
    visibility = Visibility(SLIDING, sliding_window=4, num_memory=2)
    begins = torch.tensor([True])
    call = Call(Tokens(torch.arange(3)[None]), reads=True, begins=begins, written_after=torch.tensor([3]))
    planner = planner_of(layer_types=SLIDING, num_memory_tokens=2)
    [plan] = planner.plans(call).values()
    assert plan.visibility == visibility and plan.begins is begins
    assert [plan.columns(role) for role in ("read", "token", "write")] == [slice(0, 2), slice(2, 5), slice(5, 7)]
    assert [plan.view(role).role for role in ("read", "token", "write")] == ["read", "token", "write"]
    [other] = planner.plans(Call(Tokens(torch.arange(3)[None]))).values()
    assert other.columns("read") is None and other.columns("write") is None


@pytest.mark.parametrize("is_differentiable", [False, True])
def test_a_plan_is_copied_to_another_device_once_and_whole(is_differentiable):
    """All of its tensors are moved, and what is no tensor stays; the meta device has shapes alone."""
    planner = planner_of(**MANY)
    earlier = Earlier(seen=torch.tensor([7]), before=7) if is_differentiable else None
    call = Call(Tokens(torch.arange(7, 10)[None]), 7, Past(torch.tensor([7])), earlier, begins=torch.tensor([True]))
    plan = planner.plans(call)[LayerKind(SLIDING, "rope", True)]
    meta = torch.device("meta")
    copied = plan.to(meta)
    assert plan.to(meta) is copied
    assert copied.retrieves and copied.visibility == plan.visibility
    assert copied.writes.length == plan.writes.length
    found = tensors_of(copied)
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        name: tuple(each.shape) for name, each in tensors_of(plan).items()
    }
    assert {each.device for each in found.values()} == {meta}
    assert len(found) >= 10


def tensors_of(found: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Returns the tensors of a plan by their names in it."""
    if isinstance(found, torch.Tensor):
        return {name: found}
    if isinstance(found, list | tuple):
        parts = {str(index): each for index, each in enumerate(found)}
    elif isinstance(found, Plan | Section | View | Rotation) or type(found).__name__ in ("Rotations", "Writes", "Tape"):
        parts = {key: each for key, each in vars(found).items() if key not in ("copies", "step_mask")}
    else:
        return {}
    return {key: each for part, inner in parts.items() for key, each in tensors_of(inner, f"{name}.{part}").items()}
