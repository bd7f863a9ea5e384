"""How a forward call is cut into passes of one segment a row, and how its results are put back in order."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, ROPE, SLIDING, TINY
from modeling.numbering import listed, number, real_tokens
from olmem import OlmemCache, OlmemConfig
from olmem.backends_olmem import BACKENDS
from olmem.inputs_olmem import Embeddings, Tokens, find_documents
from olmem.ops_olmem import PLAIN
from olmem.plan_olmem import Call, Planner, layer_kinds
from olmem.positions_olmem import OlmemRotaryEmbedding
from olmem.segments_olmem import (
    OlmemMemory,
    Schedule,
    cut_in_segments,
    find_in_pieces,
    pack_documents,
    unpack_documents,
)
from olmem.state_olmem import OlmemCacheLayer, OlmemTape
from olmem.visibility_olmem import Visibility
from torch import nn

HIDDEN = 4


# Cuts


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
            found += tokens
        assert found == [(each, column) for column, each in enumerate(mine) if each >= 0]
    touched = [len({each // segment for each in mine if each >= 0}) for mine in numbers.tolist()]
    assert len(pieces) == max(1, *touched)
    side_by_side = torch.cat([piece.numbers for piece in pieces], dim=1)
    if isinstance(pieces[0].columns, slice):
        assert torch.equal(side_by_side, numbers)
        return
    places = find_in_pieces(pieces, length)
    assert torch.equal(side_by_side.gather(1, places).where(real, -1), numbers)
    assert not places[~real].any()


@pytest.mark.parametrize("phase", range(4))
def test_cuts_by_phase_are_those_by_numbers(phase):
    """What the host knows without asking the device cuts where what the device knows does."""
    numbers = (torch.arange(11) + 8 + phase)[None]
    known, asked = (cut_in_segments(numbers, False, each, 4) for each in (phase, None))
    assert [piece.numbers.tolist() for piece in known] == [piece.numbers.tolist() for piece in asked]
    for index, (piece, other) in enumerate(zip(known, asked, strict=True)):
        assert torch.arange(11)[piece.columns].tolist() == other.columns[0].tolist()
        assert (index > 0 or phase == 0) == (int(piece.numbers[0, 0]) % 4 == 0)
        assert not piece.padded and not other.padded


@pytest.mark.parametrize("numbers", [[[7], [12]], [[-1], [3]]], ids=str)
def test_one_column_is_one_piece(numbers):
    """A step is never cut, whatever its rows' segments are, so that its shape stays."""
    [piece] = cut_in_segments(torch.tensor(numbers), True, None, 5)
    assert piece.numbers.tolist() == numbers
    assert piece.columns == slice(0, 1)


# Documents


@st.composite
def documents_of_rows(draw, rows: int, length: int) -> list[list[tuple[int, int]]]:
    """Draws how rows of that length are cut into documents."""
    found = []
    for _ in range(rows):
        stops = sorted(draw(st.sets(st.integers(1, length - 1), max_size=5))) if length > 1 else []
        found.append([*zip([0, *stops], [*stops, length], strict=True)])
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_documents_are_unpacked_into_rows_and_packed_again(data):
    """Each is a row of its own whose tokens stand first, beside others of about its length."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    documents = data.draw(documents_of_rows(rows, length))
    embeddings = torch.arange(rows * length * HIDDEN, dtype=torch.float).view(rows, length, HIDDEN)
    packed = unpack_documents(Tokens(torch.zeros(rows, length), False, documents), embeddings)
    expected = [embeddings[row, start:stop] for row, own in enumerate(documents) for start, stop in own]
    found = []
    for each in packed:
        widths = each.real.sum(-1)
        assert int(widths.max()) == each.embeddings.shape[1] < 2 * int(widths.min()) + 1
        assert each.tokens.padded or bool(each.real.all())
        assert each.tokens.documents is None
        for row, width in enumerate(widths.tolist()):
            assert each.real[row].tolist() == [True] * width + [False] * (each.real.shape[1] - width)
            numbers = each.tokens.numbers[row if len(each.tokens.numbers) > 1 else 0]
            assert numbers[:width].tolist() == list(range(width))
            assert (numbers[width:] == -1).all()
            found.append(each.embeddings[row, :width])
    assert sorted(states.tolist() for states in found) == sorted(states.tolist() for states in expected)
    results = [[each.embeddings, -each.embeddings] for each in packed]
    first, second = pack_documents(packed, results, embeddings)
    assert torch.equal(first, embeddings) and torch.equal(second, -embeddings)


def test_documents_of_one_length_are_unpacked_without_padding():
    """Rows of one length need no mask of their own, and one row of numbers stands for all."""
    embeddings = torch.randn(2, 6, HIDDEN)
    documents = find_documents(torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]]))
    [packed] = unpack_documents(Tokens(torch.zeros(2, 6), False, documents), embeddings)
    assert not packed.tokens.padded
    assert packed.tokens.numbers.tolist() == [[0, 1, 2]]
    assert torch.equal(packed.embeddings, embeddings.view(4, 3, HIDDEN))


# A schedule


class Counting(nn.Module):
    """Stands for memory's norm, and counts up, so that each memory tells how often it was written."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1


def config_of(**changes: Any) -> OlmemConfig:
    """Returns a tiny configuration with a memory of segments of five tokens."""
    memory = {"num_memory_tokens": 2, "memory_segment_length": 5}
    return OlmemConfig(**TINY | {"hidden_size": HIDDEN, "rope_parameters": ROPE} | memory | changes)


def memory_of(config: OlmemConfig) -> OlmemMemory:
    """Returns a memory whose first vectors are zeros."""
    memory = OlmemMemory(config, Counting())
    nn.init.zeros_(memory.embeddings)
    return memory


def schedule_of(config: OlmemConfig, memory, cache, tokens: Tokens, embeddings: torch.Tensor, **more: Any) -> Schedule:
    """Returns the schedule of a forward call of such a model."""
    return Schedule(config, layer_kinds(config), memory, cache, tokens, Embeddings(embeddings), **more)


def run(schedule: Schedule, config: OlmemConfig) -> tuple[torch.Tensor, list[Call], list[torch.Tensor]]:
    """Runs a schedule through layers that change nothing.

    Returns the last hidden states, the calls, and what entered for each.
    """
    planner, calls, entered = Planner(config, OlmemRotaryEmbedding(config), BACKENDS, PLAIN), [], []
    for call in schedule.calls():
        states = schedule.enter(call)
        plan = next(iter(planner.plans(call).values()))
        new = torch.zeros(len(states), 2, states.shape[1], TINY["head_dim"])
        calls.append(call)
        entered.append(states.detach())
        schedule.leave(call, plan, [states], [(new, new)] * config.num_hidden_layers)
    return schedule.result()[0], calls, entered


def begun(config: OlmemConfig, rows: int) -> OlmemCache:
    """Returns a cache of rows that have read nothing."""
    cache = OlmemCache(config)
    cache.begin(rows, torch.device("cpu"))
    return cache


def written_before(number: int, segment: int = 5) -> int:
    """Returns how often memory is written before a token of that number."""
    return number // segment


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_pass_reads_the_memory_of_its_rows_segments(data):
    """A memory is written at the end of each segment and read at the beginning of the next, whatever is padded.

    A row that begins anew reads the first memory again.
    """
    config = config_of()
    rows, lengths = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=5))
    cache, memory = begun(config, rows), memory_of(config)
    padding = data.draw(st.sampled_from(["none", "anywhere"]))
    for length in lengths:
        if data.draw(st.booleans()):
            cache.forget([data.draw(st.integers(0, rows - 1))])
        real, seen = data.draw(real_tokens(rows, length, padding)), cache.seen.clone()
        numbers, embeddings = number(real, seen), torch.randn(rows, length, HIDDEN)
        has_gradients = data.draw(st.booleans())
        with torch.set_grad_enabled(has_gradients):
            tokens = Tokens(numbers, not bool(real.all()))
            found, calls, entered = run(schedule_of(config, memory, cache, tokens, embeddings), config)
        assert torch.equal(found[real], embeddings[real])
        assert not cache.half_read
        assert torch.equal(cache.seen, seen + real.sum(-1))
        passed = [0] * rows
        for call, states in zip(calls, entered, strict=True):
            assert (call.earlier is not None) is has_gradients
            for index, own in enumerate(call.numbers.tolist()):
                row = index if call.chosen is None else int(call.chosen[index])
                tokens_of_row = [each for each in own if each >= 0]
                passed[row] += len(tokens_of_row)
                assert len({each // 5 for each in tokens_of_row}) <= 1
                if call.reads and tokens_of_row and (call.begins is None or bool(call.begins[index])):
                    assert tokens_of_row[0] % 5 == 0
                    expected = float(written_before(tokens_of_row[0]))
                    assert states[index, :2].tolist() == [[expected] * HIDDEN] * 2
                if tokens_of_row and tokens_of_row[0] % 5 == 0:
                    assert call.reads
                if call.writes and not own:
                    assert int(call.written_after[index]) % 5 == 0
        assert passed == real.sum(-1).tolist()
        assert len(calls) <= 1 + max(1, -(-(length + 4) // 5))
    for row, total in enumerate(cache.seen.tolist()):
        if total:
            expected = float(written_before(total - 1))
            assert cache.memory[row].tolist() == [[expected] * HIDDEN] * 2


def test_memory_is_written_with_the_last_token_or_when_the_next_segment_begins():
    """A boundary costs at most one more pass, and none where the next segment begins in the same forward."""
    config = config_of()
    cache, memory = begun(config, 1), memory_of(config)

    def shapes(*columns: int) -> list[tuple[int, bool, bool]]:
        numbers = torch.arange(*columns)[None]
        with torch.no_grad():
            embeddings = torch.randn(1, numbers.shape[1], HIDDEN)
            _, calls, entered = run(schedule_of(config, memory, cache, Tokens(numbers, False), embeddings), config)
        for call, states in zip(calls, entered, strict=True):
            assert states.shape[1] == call.numbers.shape[1] + 2 * call.reads + 2 * call.writes
        return [(call.numbers.shape[1], call.reads, call.writes) for call in calls]

    assert shapes(0, 12) == [(5, True, True), (5, True, True), (2, True, False)]
    assert shapes(12, 15) == [(3, False, False)]
    assert shapes(15, 16) == [(0, False, True), (1, True, False)]
    assert shapes(16, 21) == [(4, False, True), (1, True, False)]


def test_without_memory_a_call_is_one_pass():
    config = config_of(num_memory_tokens=0, memory_segment_length=None)
    embeddings = torch.randn(2, 30, HIDDEN)
    found, [call], _ = run(schedule_of(config, None, None, Tokens(torch.arange(30)[None], False), embeddings), config)
    assert torch.equal(found, embeddings)
    assert not (call.reads or call.writes or call.carries or call.past)


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_states_of_a_forward_are_tapes_where_gradients_are_wanted(has_gradients, has_cache):
    """Memory goes on from pass to pass without gradients too, for which a call without a cache gets one."""
    config = config_of()
    cache = begun(config, 1) if has_cache else None
    with torch.set_grad_enabled(has_gradients):
        schedule = Schedule(
            config,
            layer_kinds(config),
            memory_of(config),
            cache,
            Tokens(torch.arange(3)[None], False),
            Embeddings(torch.zeros(1, 3, 4)),
        )
    for index, state in enumerate(schedule.states):
        if not has_gradients:
            assert isinstance(state, OlmemCacheLayer)
            continue
        assert isinstance(state, OlmemTape)
        assert state.layer is (cache.layers[index] if has_cache else None)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_earlier_calls_that_a_layer_needs_are_those_that_it_may_see(data):
    """Passes out of every window and store are left out, those with sinks are not."""
    layer_type = data.draw(st.sampled_from([FULL, SLIDING, CHUNKED]))
    config = config_of(
        layer_types=layer_type,
        sliding_window=data.draw(st.integers(1, 8)),
        attention_chunk_size=data.draw(st.integers(1, 5)),
        attention_chunk_lookback=data.draw(st.integers(0, 2)),
        num_sink_tokens=0 if layer_type == FULL else data.draw(st.integers(0, 6)),
    )
    length = data.draw(st.integers(6, 30))
    visibility = Visibility.of(config, layer_type)
    schedule = Schedule(
        config,
        layer_kinds(config),
        memory_of(config),
        None,
        Tokens(torch.arange(length)[None], False),
        Embeddings(torch.zeros(1, length, 4)),
    )
    _, calls, _ = run(schedule, config)
    kind = schedule.kinds[0]
    most = 1 if visibility.span is None else visibility.span // 5 + 2 + visibility.num_sinks // 5 + 1
    for call in calls[1:]:
        kept = {each for numbers in call.earlier.numbers[kind] for each in numbers[0].tolist()}
        for query in call.numbers[0].tolist():
            before, inside = listed(visibility, query)
            assert {key for key in (*before, *inside) if key < int(call.numbers[0, 0])} <= kept
        assert visibility.span is None or len(call.earlier.numbers[kind]) <= most


@pytest.mark.parametrize("depth, expected", [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2])])
def test_gradients_go_back_through_so_many_memories(depth, expected):
    """Counted from the last segment, each memory is cut off from those before it after so many in a row."""
    config = config_of(memory_bptt_segments=depth)
    embeddings = torch.zeros(1, 20, HIDDEN, requires_grad=True)
    schedule = schedule_of(config, memory_of(config), None, Tokens(torch.arange(20)[None], False), embeddings)
    planner = Planner(config, OlmemRotaryEmbedding(config), BACKENDS, PLAIN)
    for call in schedule.calls():
        states = schedule.enter(call)
        if call.writes:  # memory takes in what its segment's tokens are
            tokens = states[:, 2 * call.reads : -2].sum(1, keepdim=True)
            states = torch.cat((states[:, :-2], states[:, -2:] + tokens), dim=1)
        last = states
        plan = next(iter(planner.plans(call).values()))
        new = torch.zeros(1, 2, states.shape[1], TINY["head_dim"])
        schedule.leave(call, plan, [states], [(new, new)] * config.num_hidden_layers)
    last[:, :2].sum().backward(retain_graph=True)  # of the memory that the last segment has read
    reached = embeddings.grad[0].abs().sum(-1).view(4, 5).any(-1).nonzero()[:, 0].tolist()
    assert reached == expected
