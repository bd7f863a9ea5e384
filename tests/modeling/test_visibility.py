"""What a query sees and in which slot, as functions of integers, against loops over the table of the design."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, SLIDING, TINY
from modeling.numbering import listed, visibilities
from olmem import OlmemConfig
from olmem.visibility_olmem import STORE_BLOCK, Visibility, held, last_numbers, ring_slot

LONG = 40


@settings(max_examples=60, deadline=None)
@given(visibilities(), st.integers(1, 9))
def test_a_visibility_is_the_table_of_the_design(visibility, capacity):
    longest, memory = 0, visibility.num_memory
    assert visibility.num_prefix == memory + visibility.num_sinks
    for query in range(LONG):
        before, inside = listed(visibility, query)
        everything = before + inside
        assert visibility.start(query) == inside[0]
        assert visibility.sinks_before(query) == len(before)
        assert visibility.prefix_count(query) == memory + len(before)
        assert visibility.slot(query) == memory + everything.index(query) == memory + len(everything) - 1
        assert [key for key in range(-2, LONG + 2) if visibility.sees(query, key)] == inside
        assert [visibility.key_slot(query, key) for key in everything] == [*range(memory, memory + len(everything))]
        left = [key for key in range(query + 1) if key not in inside and key >= visibility.num_sinks]
        found = [key for key in range(-LONG, LONG + 2) if visibility.candidates(query, key, capacity)]
        assert found == left[-capacity:]
        longest = max(longest, len(inside))
    assert visibility.span == (None if visibility.layer_type == FULL else longest)


@settings(max_examples=60, deadline=None)
@given(visibilities())
def test_the_prefix_that_a_query_sees_is_its_first_slots(visibility):
    """Memory and the sinks before a window are a run of the prefix from its beginning, so that one count says which."""
    for query in range(LONG):
        before, _ = listed(visibility, query)
        seen = [True] * visibility.num_memory + [sink in before for sink in range(visibility.num_sinks)]
        count = visibility.prefix_count(query)
        assert seen == [slot < count for slot in range(visibility.num_prefix)]
        assert count <= visibility.num_prefix
        assert [visibility.key_slot(query, sink) for sink in before] == [*range(visibility.num_memory, count)]


@settings(max_examples=60, deadline=None)
@given(visibilities(), st.integers(1, LONG))
def test_a_window_has_let_go_once_a_token_is_out_of_it(visibility, length):
    assert visibility.lets_go(length) == (listed(visibility, length - 1)[1][0] > 0)


@settings(max_examples=30, deadline=None)
@given(visibilities())
def test_tensors_give_what_integers_give(visibility):
    numbers = torch.arange(LONG)
    query, key = numbers[:, None], numbers[None, :]
    for name in ("start", "sinks_before", "prefix_count", "slot"):
        assert getattr(visibility, name)(numbers).tolist() == [getattr(visibility, name)(i) for i in range(LONG)]
    for name in ("sees", "key_slot"):
        method = getattr(visibility, name)
        assert method(query, key).tolist() == [[method(i, j) for j in range(LONG)] for i in range(LONG)]
    found = visibility.candidates(query, key, 5)
    assert found.tolist() == [[visibility.candidates(i, j, 5) for j in range(LONG)] for i in range(LONG)]


@settings(max_examples=30, deadline=None)
@given(visibilities(), st.integers(10**8, 10**8 + 1000))
def test_slots_stay_small_however_long_the_stream(visibility, query):
    if visibility.layer_type == FULL:
        assert visibility.slot(query) == visibility.num_memory + query
        return
    first = visibility.start(query)
    slots = [visibility.key_slot(query, key) for key in (*range(visibility.num_sinks), *range(first, query + 1))]
    assert slots == list(range(visibility.num_memory, visibility.num_memory + len(slots)))
    assert visibility.slot(query) == slots[-1] < visibility.num_prefix + visibility.span
    if visibility.layer_type == SLIDING:
        assert visibility.slot(query) == visibility.num_prefix + visibility.sliding_window - 1


def test_a_visibility_is_what_the_configuration_says():
    config = OlmemConfig(
        **TINY | {"sliding_window": 7, "num_hidden_layers": 3, "layer_types": [SLIDING, CHUNKED, FULL]},
        attention_chunk_size=3,
        attention_chunk_lookback=2,
        num_sink_tokens=5,
        num_memory_tokens=6,
    )
    expected = Visibility(SLIDING, sliding_window=7, num_sinks=5, num_memory=6)
    assert Visibility.of(config, SLIDING) == expected
    expected = Visibility(CHUNKED, chunk_size=3, lookback=2, num_sinks=5, num_memory=6)
    assert Visibility.of(config, CHUNKED) == expected
    assert Visibility.of(config, FULL) == Visibility(FULL, num_memory=6)


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


@settings(max_examples=60, deadline=None)
@given(visibility=visibilities((SLIDING, CHUNKED)), capacity=st.integers(1, 9), seen=st.integers(0, 400))
def test_a_store_holds_all_candidates_of_a_block(visibility, capacity, seen):
    """A block enters before its first token looks something up, which must not write over what that token may find."""
    size = visibility.store_size(capacity)
    kept = {held(slot, seen + STORE_BLOCK, size) for slot in range(size)}
    for query in (seen, seen + STORE_BLOCK - 1):
        start = visibility.start(query)
        wanted = {key for key in range(start - capacity, start) if visibility.candidates(query, key, capacity)}
        assert {key for key in wanted if key >= 0} <= kept
    assert size == capacity + visibility.span + STORE_BLOCK - 1


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
