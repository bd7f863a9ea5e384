"""Every way to compute attention against the meaning of attention, on the parts that a layer's state gives."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, SLIDING, TINY
from modeling.layer_streams import SIZE, Stream, cuts_after_a_cache, on_tape, streams
from modeling.numbering import listed, number, real_tokens, visibilities
from modeling.reference import attend_listed, attend_reference
from modeling.streams import BLOCKS, blocks_of, cuts
from olmem import backends_olmem
from olmem.backends_olmem import BACKENDS, SINGLE, Blocks, Documents, Step, Whole
from olmem.contracts_olmem import Heads, Needs, Part, Plan, Section, choose
from olmem.inputs_olmem import Tokens
from olmem.plan_olmem import Call, Earlier, Frame, Past
from olmem.positions_olmem import LinspaceScheme, PositionScheme, XposScheme
from olmem.rules_olmem import POSITION_EMBEDDINGS
from olmem.state_olmem import OlmemTape
from olmem.varlen_olmem import Varlen
from olmem.view_olmem import View
from olmem.visibility_olmem import Visibility
from torch import nn
from torch.testing import assert_close

ALL = slice(None)
NUM_HEADS = TINY["num_attention_heads"]
SCALING = SIZE**-0.5
PADDING = 3.0  # of keys and values, a number as in a model: what nothing sees still comes into products


class Attention(nn.Module):
    """Has what Transformers' attention functions ask of a layer."""

    num_key_value_groups = NUM_HEADS // TINY["num_key_value_heads"]
    is_causal = True


def heads_of(stream: Stream, gate: torch.Tensor | None = None) -> Heads:
    """Returns what attention needs of a layer whose `linspace_scale` grows from 1 to 2."""
    scheme = {"xpos": XposScheme(), "linspace": linspace_of(stream)}.get(
        stream.kind.position_embedding, PositionScheme()
    )
    return Heads(Attention().eval(), scheme, SCALING, 0.0, gate, sinks_of(stream))


def sinks_of(stream: Stream) -> torch.Tensor | None:
    """Returns learned sinks (H,) from −1 to 2, if the stream's layer has any."""
    return None if stream.config.sink_logit_init is None else torch.linspace(-1, 2, NUM_HEADS)


def linspace_of(stream: Stream) -> LinspaceScheme:
    """Returns the scheme of a layer that adds a multiple of one vector to its keys."""
    span = stream.visibility.span or stream.config.max_position_embeddings
    return LinspaceScheme(torch.linspace(1, 2, SIZE), span)


def queries_of(stream: Stream, plan: Plan) -> torch.Tensor:
    """Returns random queries (B, H, C, D) of all columns of a plan."""
    length = sum(section.view.numbers.shape[1] for section in plan.sections)
    rows = max(len(section.view.numbers) for section in plan.sections)
    return torch.randn(max(rows, stream.batch_size), NUM_HEADS, length, SIZE, generator=stream.generator)


def mean(stream: Stream, row: int, role: str, index: int, query: torch.Tensor, gate: torch.Tensor | None):
    """Returns what a query (H, D) of a section means: its output (H, D), its weights (H, S), and the keys' names.

    `index` is a token's own number; that of a read token among the read ones; or for a write token, its place after
    the row's last token and how many there are.
    """
    visibility, memory = stream.visibility, stream.visibility.num_memory
    states = [(stream.memory[0][row, :, slot], stream.memory[1][row, :, slot]) for slot in range(memory)]
    names: list[Any] = ["memory"] * memory
    slot = index
    if role == "read":
        gate = None
    else:
        last, offset = (index, None) if role == "token" else index
        before, inside = listed(visibility, last)
        names += before + inside
        states += [stream.token(row, token) for token in (*before, *inside)]
        slot = len(states) - 1
        if offset is not None:
            slot += offset + 1
            states += [(stream.written[0][row, :, each], stream.written[1][row, :, each]) for each in range(memory)]
    keys, values = (torch.stack(each) for each in zip(*states, strict=True))
    scheme = stream.kind.position_embedding
    frequencies = getattr(stream.rotary, f"{stream.kind.layer_type}_inv_freq")
    step = linspace_of(stream).step
    sinks = sinks_of(stream)
    found = attend_listed(query, keys, values, slot, scheme, frequencies, SCALING, step, memory, gate, sinks)
    return *found, names


def check(
    stream: Stream, plan: Plan, section: Section, seen: list[Part], query: torch.Tensor, gate, before_call
) -> None:
    """Checks every query of a section against its meaning, by the planned backend and by all others that may."""
    view, heads = section.view, heads_of(stream, gate)
    with torch.no_grad():
        outputs = [section.attend(heads, query, seen)[0]]
        if not any(part.is_bare for part in seen):  # only a step's own backend places those of a step
            needs = section.needs._replace(flash=True)
            others = [backend for backend in (Varlen(), *SINGLE) if backend.supports(view, needs)]
            outputs += [each.attend(heads, section.part(query), seen, section)[0] for each in others]
    for row in range(stream.batch_size):
        numbers = view.numbers[row if len(view.numbers) > 1 else 0].tolist()
        if view.role == "write" and numbers[0] <= int(before_call[row]):
            continue  # a row without a token in this call writes nothing that is kept
        if view.role == "read" and plan.begins is not None and not plan.begins[row]:
            continue  # nor does it read anything
        for column, index in enumerate(numbers):
            if index < 0:
                continue
            asked = (numbers[0] - 1, column) if view.role == "write" else index
            own = section.part(query)[row, :, column]
            expected, _, _ = mean(stream, row, view.role, asked, own, gate)
            for output in outputs:
                assert_close(output[row, column].double(), expected, rtol=1e-4, atol=2e-5)
    assert all(output.isfinite().all() for output in outputs)


def gate_of(draw, stream: Stream) -> torch.Tensor | None:
    """Draws a memory gate (H,), or none."""
    if not stream.visibility.num_memory or not draw(st.booleans()):
        return None
    return torch.rand(NUM_HEADS, generator=stream.generator)


@pytest.mark.parametrize("has_memory", [False, True])
@settings(max_examples=40, deadline=None)
@given(block=BLOCKS, data=st.data())
def test_queries_of_a_cache_see_what_the_table_lists(has_memory, block, data):
    """A stream in pieces, by steps and blocks, in every scheme, with memory that is read, gated and written."""
    stream = data.draw(streams(most=24, memory=has_memory))
    stream.planner.plain, gate = data.draw(st.booleans()), gate_of(data.draw, stream)
    stream.pad(stream.real, PADDING)
    with blocks_of(block):
        for index, length in enumerate(data.draw(cuts(stream.real.shape[1]))):
            before = stream.seen
            reads = has_memory and (index == 0 or data.draw(st.booleans()))
            plan, parts = stream.step(length, reads=reads, writes=has_memory and data.draw(st.booleans()))
            query = queries_of(stream, plan)
            for section, seen in zip(plan.sections, parts, strict=True):
                check(stream, plan, section, seen, query, gate, before)


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("begins_with", ["one call", "calls", "a cache"])
@settings(max_examples=30, deadline=None)
@given(block=BLOCKS, data=st.data())
def test_queries_of_a_tape_see_what_the_table_lists(begins_with, has_memory, block, data):
    """All at once, or in the calls of one forward, after those of a cache or not."""
    stream = data.draw(streams(2, 24, memory=has_memory))
    stream.planner.plain, gate = data.draw(st.booleans()), gate_of(data.draw, stream)
    length, first = stream.real.shape[1], 0
    pieces = [length] if begins_with == "one call" else data.draw(cuts(length))
    if begins_with == "a cache":
        pieces, first = data.draw(cuts_after_a_cache(length))
    with blocks_of(block):
        for plan, parts in on_tape(stream, pieces, first, data.draw, PADDING):
            query = queries_of(stream, plan)
            for section, seen in zip(plan.sections, parts, strict=True):
                check(stream, plan, section, seen, query, gate, stream.seen)


def test_a_window_of_one_token_goes_on_from_a_cache():
    """Its call has no earlier key, and still its first token is not the stream's first one: it sees sinks."""
    changes = {"layer_types": SLIDING, "sliding_window": 1, "num_sink_tokens": 1, "num_memory_tokens": 2}
    stream = Stream(changes, torch.ones(1, 2, dtype=torch.bool))
    [(plan, [seen])] = on_tape(stream, [1, 1], 1, lambda strategy: False)
    check(stream, plan, plan.sections[0], seen, queries_of(stream, plan), None, stream.seen)


def rope_plan(visibility: Visibility, length: int, plain: bool, has_sinks: bool = False) -> tuple[Plan, Any]:
    """Returns the plan of tokens that are all there is, and a rotation of differences for the reference."""
    sinks = 0 if visibility.layer_type == FULL else visibility.num_sinks
    sizes: dict[str, Any] = {"num_sink_tokens": sinks, "sink_logit_init": 0.0 if has_sinks else None}
    if visibility.layer_type == SLIDING:
        sizes["sliding_window"] = visibility.sliding_window
    if visibility.layer_type == CHUNKED:
        sizes |= {
            "attention_chunk_size": visibility.chunk_size,
            "attention_chunk_lookback": visibility.lookback,
        }
    stream = Stream({"layer_types": visibility.layer_type} | sizes, torch.ones(1, length, dtype=torch.bool))
    stream.planner.plain = plain
    plan = stream.plan(Call(Tokens(torch.arange(length)[None]), earlier=Earlier()))
    layer_type = stream.kind.layer_type

    def rotation(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return stream.rotary(positions, positions, layer_type)

    return plan, rotation


@settings(max_examples=60, deadline=None)
@given(drawn=visibilities(), block=BLOCKS, data=st.data())
def test_backends_are_the_reference_with_its_gradients(drawn, block, data):
    """Both by the planned backend and by blocks, which add up the gradients of overlapping slices."""
    visibility = Visibility(**vars(drawn) | {"num_memory": 0})
    length, plain, has_sinks = data.draw(st.integers(1, 40)), data.draw(st.booleans()), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query, key, value, gradient = (
        torch.randn(2, count, length, SIZE, generator=generator) for count in (NUM_HEADS, 2, 2, NUM_HEADS)
    )
    numbers, sinks = torch.arange(length), torch.linspace(-1, 2, NUM_HEADS) if has_sinks else None

    def gradients(function) -> list[torch.Tensor]:
        inputs = [each for each in (query, key, value, sinks) if each is not None]
        states = [each.clone().requires_grad_() for each in inputs]
        output = function(*states)
        output.backward(gradient.transpose(1, 2))
        return [output.detach(), *(each.grad for each in states)]

    with blocks_of(block):
        plan, rotation = rope_plan(visibility, length, plain, has_sinks)
        [section] = plan.sections
        given = numbers, numbers, visibility, rotation, SCALING
        expected = gradients(lambda *states: attend_reference(*states[:3], *given, *states[3:]))
        for backend in (section.backend, Blocks(), Varlen()):

            def attend(query, key, value, *sinks, backend=backend) -> torch.Tensor:
                heads = Heads(Attention().eval(), PositionScheme(), SCALING, 0.0, None, *sinks)
                [parts] = OlmemTape().write(key, value, plan, ())
                return backend.attend(heads, query, parts, section)[0]

            names = ("output", "query", "key", "value", "sinks")[: len(expected)]
            for name, found, each in zip(names, gradients(attend), expected, strict=True):
                assert_close(found, each, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block=BLOCKS)
def test_a_packed_document_is_attended_for_as_if_it_were_alone(data, block):
    """Its sinks are its own first tokens, and its weights have a column for each token of its row."""
    layer_type = data.draw(st.sampled_from([FULL, SLIDING, CHUNKED]))
    changes = {
        "layer_types": layer_type,
        "sliding_window": data.draw(st.integers(1, 5)),
        "num_sink_tokens": 0 if layer_type == FULL else data.draw(st.integers(0, 3)),
        "position_embedding": data.draw(st.sampled_from(POSITION_EMBEDDINGS)),
    }
    length = 16
    documents = []
    for _ in range(2):
        stops = torch.tensor(data.draw(cuts(length))).cumsum(0).tolist()
        documents.append([*zip([0, *stops[:-1]], stops, strict=True)])
    numbers = torch.tensor(
        [[column - start for start, stop in row for column in range(start, stop)] for row in documents]
    )
    stream = Stream(changes, torch.ones(2, length, dtype=torch.bool))
    stream.planner.plain = plain = data.draw(st.booleans())
    stream.planner.weights = plain
    with blocks_of(block), torch.no_grad():
        plan = stream.plan(Call(Tokens(numbers, documents=documents)))
        [section] = plan.sections
        assert isinstance(section.backend, Documents)
        [parts] = OlmemTape().write(stream.key, stream.value, plan, ())
        query = queries_of(stream, plan)
        output, weights = section.attend(heads_of(stream), query, parts)
        if Varlen().supports(section.view, section.needs._replace(flash=True)):
            assert_close(Varlen().attend(heads_of(stream), query, parts, section)[0], output, rtol=1e-4, atol=2e-5)
    assert output.shape == (2, length, NUM_HEADS, SIZE)
    for row, own in enumerate(documents):
        for start, stop in own:
            stream.columns[row] = list(range(start, stop))
            for column in range(start, stop):
                expected, shares, names = mean(stream, row, "token", column - start, query[row, :, column], None)
                assert_close(output[row, column].double(), expected, rtol=1e-4, atol=2e-5)
                if plain:
                    whole = torch.zeros(NUM_HEADS, length, dtype=torch.float64)
                    whole[:, [start + name for name in names]] = shares
                    assert_close(weights[row, :, column].double(), whole, rtol=1e-4, atol=2e-5)
    assert (weights is not None) is plain


# Weights


def columns_of_tokens(view: View, row: int, num_columns: int) -> dict[Any, int]:
    """Returns in which column of weights each key of a row is; a sink before its window is named ("sink", number)."""
    keys = view.key_numbers[row if len(view.key_numbers) > 1 else 0].tolist()
    first = num_columns - len(keys)
    if view.in_place and view.visibility.span is not None:
        keys = sorted(keys)
    found: dict[Any, int] = {key: first + column for column, key in enumerate(keys) if key >= 0}
    return found | {("sink", sink): sink for sink in range(first)}


@pytest.mark.parametrize("has_cache", [False, True])
@settings(max_examples=40, deadline=None)
@given(stream=streams(most=16, memory=False), block=BLOCKS, data=st.data())
def test_weights_are_in_the_order_of_the_stream(has_cache, stream, block, data):
    """Without a cache there is a column for each token; with one, for each key, oldest first, after the sinks."""
    stream.pad(stream.real, PADDING)
    stream.planner.plain = stream.planner.weights = True
    pieces = data.draw(cuts(stream.real.shape[1]))
    if not has_cache:
        pieces = [stream.real.shape[1]]
    with blocks_of(block), torch.no_grad():
        calls = (
            (stream.step(length) for length in pieces) if has_cache else on_tape(stream, pieces, 0, data.draw, PADDING)
        )
        for plan, [parts] in calls:
            [section] = plan.sections
            view, query = section.view, queries_of(stream, plan)
            _, weights = section.attend(heads_of(stream), query, parts)
            assert has_cache or weights.shape[-1] == view.numbers.shape[1]
            for row in range(stream.batch_size):
                places = columns_of_tokens(view, row, weights.shape[-1])
                for column, index in enumerate(view.numbers[row].tolist()):
                    if index < 0:
                        continue
                    _, shares, names = mean(stream, row, "token", index, query[row, :, column], None)
                    whole = torch.zeros(NUM_HEADS, weights.shape[-1], dtype=torch.float64)
                    before = len(listed(stream.visibility, index)[0])
                    for share, name, is_before in zip(shares.T, names, [True] * before + [False] * 99, strict=False):
                        whole[:, places[("sink", name) if is_before and has_cache else name]] = share
                    assert_close(weights[row, :, column].double(), whole, rtol=1e-4, atol=2e-5)


def test_weights_are_given_where_they_are_asked_for():
    stream = Stream({"layer_types": SLIDING}, torch.ones(1, 6, dtype=torch.bool))
    for wanted in (False, True):
        stream.planner.plain = stream.planner.weights = wanted
        plan = stream.plan(Call(Tokens(torch.arange(6)[None])))
        [parts], [section] = OlmemTape().write(stream.key, stream.value, plan, ()), plan.sections
        for backend in (Whole(), Blocks()):
            _, weights = backend.attend(heads_of(stream), queries_of(stream, plan), parts, section)
            assert (weights is not None) is wanted


# The choice


def view_of(visibility, call: Call) -> View:
    """Returns the view of a call's tokens."""
    return Frame(visibility, call, [], 0).sections[-1][1]


def test_the_first_backend_that_supports_a_view_is_chosen():
    def backend(supports: bool) -> Any:
        return SimpleNamespace(supports=lambda view, needs: supports)

    backends = [backend(False), backend(True), backend(True)]
    assert choose(backends, None, Needs()) is backends[1]


@settings(max_examples=60, deadline=None)
@given(visibility=visibilities(), data=st.data())
def test_backends_are_chosen_by_what_a_view_says(visibility, data):
    """Packed documents first, then steps, then one call for all where that has the same meaning, and blocks else."""
    rows, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))
    real = data.draw(real_tokens(rows, length, data.draw(st.sampled_from(["none", "anywhere"]))))
    seen = torch.full((rows,), data.draw(st.sampled_from([0, 3])))
    padded = not bool(real.all())
    if data.draw(st.booleans()):
        call = Call(Tokens(number(real, seen), padded), int(seen[0]), Past(seen))
    else:
        call = Call(Tokens(number(real), padded))
    needs = Needs(plain=data.draw(st.booleans()), by_slot=data.draw(st.booleans()))
    view = view_of(visibility, call)
    with blocks_of(3):
        chosen = choose(BACKENDS, view, needs)
        small = length <= 3 or (view.causal and not needs.plain)
    alone = view.key_numbers.shape[1] == length and not view.prefix and not needs.by_slot
    expected = Step if view.is_step else Whole if alone and small else Blocks
    assert type(chosen) is expected
    view.documents = [[(0, length)]] * rows
    assert isinstance(choose(BACKENDS, view, needs), Documents)


@pytest.mark.parametrize("plain", [False, True])
def test_up_to_some_blocks_of_tokens_are_one_call(plain, monkeypatch):
    """Beyond, only a view that needs no mask is; a block on a CPU is small, and elsewhere large."""
    monkeypatch.setattr(backends_olmem, "BLOCK", {"cpu": 4})
    monkeypatch.setattr(backends_olmem, "WHOLE", 2)
    window = Visibility(SLIDING, sliding_window=3)
    for length, whole in ((8, True), (9, False)):
        view = view_of(window, Call(Tokens(torch.arange(length)[None])))
        assert Whole().supports(view, Needs(plain=plain)) is whole
    full = view_of(Visibility(FULL), Call(Tokens(torch.arange(100)[None])))
    assert Whole().supports(full, Needs(plain=plain)) is not plain
    assert backends_olmem.block_size(torch.device("cpu")) == 4
    assert backends_olmem.block_size(torch.device("meta")) == 1024


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_few_heads_at_a_time_are_rotated_as_all_are(heads, monkeypatch):
    """A step of a shared tensor rotates its keys in a scratch that stays in the processor's cache."""
    stream = Stream({"layer_types": FULL, "shared_projections": "key_value"}, torch.ones(2, 9, dtype=torch.bool))
    stream.step(8)
    plan, [parts] = stream.step(1)
    [section], query = plan.sections, queries_of(stream, plan)
    whole, _ = section.attend(heads_of(stream), query, parts)
    monkeypatch.setattr(backends_olmem, "SCRATCH", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: heads)
    assert_close(section.attend(heads_of(stream), query, parts)[0], whole)
