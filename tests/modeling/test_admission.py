"""A store that selects: which tokens it keeps, by plain lists, without a model; and what a model makes of it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import (
    CHUNKED,
    LEARNED,
    RETRIEVAL,
    SINKS,
    SLIDING,
    STREAMS,
    expected,
    left_padded,
    tiny,
    tokens,
)
from modeling.layer_streams import HEADS, Stream, cuts_after_a_cache, streams
from modeling.numbering import listed
from modeling.streams import alone, blocks_of, close, cuts, make, read
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM, state_olmem, visibility_olmem
from olmem.admission_olmem import AGES, EMPTY, admit, beaten, damage, free_slots, priorities
from olmem.cache_file_olmem import checksum
from olmem.contracts_olmem import Candidates
from olmem.inputs_olmem import Tokens
from olmem.plan_olmem import Call, Earlier
from olmem.state_olmem import OlmemTape
from olmem.visibility_olmem import Visibility
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

SELECTS: dict[str, Any] = RETRIEVAL | LEARNED
INF = float("inf")


# By itself


@pytest.mark.parametrize(
    ("scores", "numbers", "order"),
    [
        ([0.5, -2.0, 3.0], [0, 1, 2], [2, 0, 1]),
        ([0.0, -0.0, 0.0], [4, 9, 2], [1, 0, 2]),  # equal scores: the newer token first, and −0 is 0
        ([1.0, 1.0, 1.0000001], [5, 6, 0], [2, 1, 0]),
        ([-INF, -3e38, -1e-45, 0.0, 1e-45, INF], [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]),
        ([1.0, 1.0], [2**40, 2**40 - AGES + 1], [0, 1]),  # far into a stream
    ],
)
def test_priorities_are_in_the_order_of_scores_and_then_of_numbers(scores, numbers, order):
    own, number = torch.tensor([[scores]]), torch.tensor([[numbers]])
    found = priorities(own, number, number.amax(-1)[:, 0])
    assert found[0, 0].argsort(descending=True).tolist() == order
    assert len(set(found[0, 0].tolist())) == len(scores)


def test_padding_and_sinks_have_no_priority():
    found = priorities(torch.zeros(1, 1, 4), torch.tensor([[[-1, 0, 1, 2]]]), torch.tensor([2]), num_sinks=2)
    assert (found == EMPTY).tolist() == [[[True, True, True, False]]]


def test_new_tokens_take_empty_slots_then_those_of_the_worst_that_have_left():
    numbers = torch.tensor([[[3, -1, 1, 7, 0, -1, 2]]])
    priority = priorities(torch.tensor([[[0.0, 9.0, 5.0, -9.0, 1.0, 9.0, -1.0]]]), numbers, torch.tensor([7]))
    assert free_slots(priority, numbers, torch.tensor([4]), 4).tolist() == [[[1, 5, 6, 0]]]
    assert free_slots(priority, numbers, torch.tensor([2]), 3).tolist() == [[[1, 5, 4]]]  # 2 and 3 are in the window


def test_what_is_beaten_is_said_for_each_query():
    """Capacity 2; tokens 0, 1, 2, 3 leave one after another, and 2 is the worst."""
    numbers, scores = torch.arange(6)[None, None], torch.tensor([[[1.0, 2.0, 0.0, 3.0, 9.0, 9.0]]])
    priority = priorities(scores, numbers, torch.tensor([5]))
    starts = torch.tensor([[1, 2, 3, 4, 4]])
    for most in (2, 4):
        found = beaten(priority, numbers, starts, 2, most)[0, 0].tolist()
        assert found == [EMPTY, EMPTY, priority[0, 0, 2], priority[0, 0, 0], priority[0, 0, 0]]
    assert beaten(priority, numbers, starts, 6, 0).unique().tolist() == [EMPTY]


# What a state holds


def best(stream: Stream, scores: torch.Tensor, row: int, head: int, query: int) -> list[int]:
    """The candidates of a query by a list of all tokens that have left its window."""
    visibility, capacity = stream.visibility, stream.config.retrieval_capacity
    left = range(visibility.num_sinks, listed(visibility, query)[1][0])
    order = sorted(left, key=lambda token: (float(scores[row, head, stream.columns[row][token]]), token))
    return sorted(order[-capacity:])


def check_candidates(
    stream: Stream, scores: torch.Tensor, found: Candidates, queries: dict[int, list[int]], parts: Sequence[slice]
) -> None:
    """Checks the candidates of every query and head, block by block, with their keys, values and scores."""
    blocks = list(admit(found, stream.visibility, stream.config.retrieval_capacity, parts))
    columns = torch.arange(found.key.shape[2]).expand(*found.key.shape[:2], -1)
    for part, block in zip(parts, blocks, strict=True):
        allowed = block.allows(slice(None))
        index = columns[..., : allowed.shape[-1]] if block.columns is None else block.columns
        for row, own in queries.items():
            for place, query in enumerate(own[part]):
                for head in range(HEADS if query >= 0 else 0):
                    chosen = index[row, head][allowed[row, head, place]].tolist()
                    wanted = [stream.token(row, token) for token in best(stream, scores, row, head, query)]
                    assert len(chosen) == len(wanted)
                    keys = {tuple(key[head].tolist()): value[head] for key, value in wanted}
                    for column in chosen:
                        assert torch.equal(
                            keys.pop(tuple(found.key[row, head, column].tolist())), found.value[row, head, column]
                        )


def tied(stream: Stream) -> torch.Tensor:
    """Scores (B, K, N) of a stream's tokens, many of them equal, and of nothing where there is no token."""
    scores = torch.randint(-2, 3, (stream.batch_size, HEADS, stream.real.shape[1]), generator=stream.generator) / 2
    return scores.masked_fill(~stream.real[:, None], torch.nan)


@st.composite
def selecting(draw, least: int) -> Stream:
    """Draws a stream of a layer whose store selects."""
    fixed = {"layer_types": draw(st.sampled_from([SLIDING, CHUNKED])), "retrieval_layers": [0], "retrieval_top_k": 1}
    return draw(streams(least, 30, memory=False, **fixed, **LEARNED, retrieval_capacity=draw(st.integers(1, 6))))


def pieces_of(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@settings(max_examples=60, deadline=None)
@given(block=st.sampled_from([1, 3, 128]), growth=st.sampled_from([1, 256]), data=st.data())
def test_candidates_of_a_cache_are_those_of_a_list(block, growth, data):
    """Of rows padded anywhere, with ties, past the store's first room, in a store of no more slots than it needs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (state_olmem, visibility_olmem):
            patch.setattr(module, "STORE_BLOCK", block)
        patch.setattr(state_olmem, "GROWTH", growth)
        stream = data.draw(selecting(1))
        scores = tied(stream)
        for length in data.draw(cuts(stream.real.shape[1])):
            own = scores[:, :, stream.before : stream.before + length]
            call, key, value = stream.call(length)
            plan = stream.plan(call)
            with torch.no_grad():
                stream.layer.write(key, value, plan, ())
                for found in stream.layer.candidates(key, value, plan, (), own):
                    queries = dict(enumerate(call.numbers[:, found.columns].tolist()))
                    check_candidates(stream, scores, found, queries, [slice(None)])
            stream.advance(length)
            counts = stream.layer.used(stream.before)["store_counts"]
            capacity = stream.config.retrieval_capacity
            assert damage(counts, stream.seen, stream.visibility, capacity) is None
        for name in stream.layer.all_store_names:
            assert stream.layer.buffers[name].shape[2] <= stream.visibility.store_size(capacity) + 1


@pytest.mark.parametrize("has_cache", [False, True])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 3, 128]))
def test_candidates_of_a_tape_are_those_of_a_list(has_cache, data, size):
    """Its cache's store before the forward, earlier calls and the new tokens, in blocks of queries of any size."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (state_olmem, visibility_olmem):
            patch.setattr(module, "STORE_BLOCK", 2)
        stream = data.draw(selecting(2))
        scores, length = tied(stream), stream.real.shape[1]
        pieces, first = data.draw(cuts_after_a_cache(length)) if has_cache else (data.draw(cuts(length)), 0)
        for length in pieces[:first]:
            own = scores[:, :, stream.before : stream.before + length]
            call, key, value = stream.call(length)
            plan = stream.plan(call)
            with torch.no_grad():
                stream.layer.write(key, value, plan, ())
                for _ in stream.layer.candidates(key, value, plan, (), own):
                    pass
            stream.advance(length)
        tape, seen_first, before_first = OlmemTape(stream.layer if first else None), stream.seen, stream.before
        earlier, numbers = [], []
        for length in pieces[first:]:
            before = Earlier({stream.kind: list(numbers)}, True, seen_first if first else None, before_first)
            call, key, value = stream.call(length, bool(first), earlier=before)
            plan = stream.plan(call)
            tape.write(key, value, plan, earlier)
            own = scores[:, :, stream.before : stream.before + length]
            [found] = tape.candidates(key, value, plan, earlier, own)
            check_candidates(stream, scores, found, dict(enumerate(call.numbers.tolist())), pieces_of(length, size))
            earlier.append((key, value, own))
            numbers.append(call.numbers)
            stream.advance(length)


def test_candidates_of_packed_documents_are_their_own():
    changes = {"layer_types": SLIDING, "sliding_window": 2, "retrieval_layers": [0], "retrieval_top_k": 1}
    stream = Stream(changes | LEARNED | {"retrieval_capacity": 2}, torch.ones(2, 9, dtype=torch.bool))
    documents, scores = [[(0, 6), (6, 9)], [(0, 9)]], tied(stream)
    numbers = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2], list(range(9))])
    found = list(
        OlmemTape().candidates(
            stream.key, stream.value, stream.plan(Call(Tokens(numbers, documents=documents))), (), scores
        )
    )
    assert [(each.rows.start, each.columns.start, each.columns.stop) for each in found] == [
        (0, 0, 6),
        (0, 6, 9),
        (1, 0, 9),
    ]
    for each in found:
        assert torch.equal(each.scores, scores[each.rows, :, each.columns])
        assert torch.equal(each.key, stream.key[each.rows, :, each.columns])


# What a model makes of it


def scoring(model: OlmemForCausalLM) -> list[torch.nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if name.endswith("retrieval_score.weight")]


def test_a_new_model_begins_as_the_most_recent_tokens():
    """Its scores are zero, and it has one row of them for each key head of each layer that retrieves."""
    model = OlmemForCausalLM(OlmemConfig(**make(SINKS | SELECTS).config.to_diff_dict())).eval()
    assert [tuple(weight.shape) for weight in scoring(model)] == [(2, 24), (2, 24)]
    assert not any(weight.any() for weight in scoring(model))
    recent = make(SINKS | RETRIEVAL)
    assert not scoring(recent)
    recent.load_state_dict(model.state_dict(), strict=False)
    ids = tokens(2, 40)
    for found, meant in ((alone(model, ids[0]), alone(recent, ids[0])), (read(model, [ids]), read(recent, [ids]))):
        assert_close(found, meant, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [STREAMS["window"], STREAMS["sinks"], STREAMS["chunks"]], ids=["window", "sinks", "chunks"]
)
@pytest.mark.parametrize("capacity", [2, 5])
def test_a_store_keeps_the_best_of_all_that_left(changes, capacity):
    """Far beyond its room, in pieces shorter and longer than it."""
    model = make(changes | SELECTS | {"retrieval_capacity": capacity})
    ids = tokens(48, seed=11)
    meant = expected(model, ids)
    for size in (1, 3, 2 * capacity + 1, len(ids)):
        with blocks_of(2):
            close(read(model, ids[None].split(size, dim=1))[0], meant)


def test_a_store_in_host_memory_gives_the_same():
    model, ids = make(SINKS | SELECTS), tokens(2, 40)
    pieces = ids.split([17, 1, 22], dim=1)
    assert_close(read(model, pieces, cache=OlmemCache(model.config, retrieval_device="cpu")), read(model, pieces))


@pytest.mark.parametrize("size", [1, 700])
def test_a_long_stream_is_what_one_call_makes_of_it(size):
    """5,000 tokens past a store of 64, in one layer, whose scores are the same in every cut."""
    changes = {"num_hidden_layers": 1, "layer_types": SLIDING, "retrieval_layers": [0], "retrieval_top_k": 4}
    model, ids = tiny(**changes | LEARNED | {"retrieval_capacity": 64}), tokens(1, 5000 if size > 1 else 600)
    torch.nn.init.constant_(model.model.layers[0].self_attn.retrieval_gate.logits, 0.0)
    cache = OlmemCache(model.config)
    found, whole = read(model, ids.split(size, dim=1), cache=cache)[0], alone(model, ids[0])
    assert_close(found, whole, rtol=0, atol=1e-4)
    room = Visibility.of(model.config, SLIDING).store_size(64) + 1
    assert all(cache.layers[0].buffers[name].shape[2] == room for name in cache.layers[0].all_store_names)


def spoil(counts: torch.Tensor, slot: int, value: int) -> torch.Tensor:
    changed = counts.clone()
    changed[1, 0, slot] = value
    return changed


def test_a_damaged_store_is_refused(tmp_path):
    """By what its numbers say, where the checksum fits."""
    model, path = make(STREAMS["sinks"] | SELECTS), tmp_path / "state.safetensors"
    batch, cache = left_padded(tokens(30, seed=1), tokens(21, seed=2)), OlmemCache(model.config)
    read(model, [batch["input_ids"]], [batch["attention_mask"]], cache)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "layers.1.store_counts"
    counts = tensors[name]
    places = {int(count): slot for slot, count in enumerate(counts[1, 0].tolist())}
    for changed, problem in (
        (spoil(counts, places[21], 22), "numbers tokens that it cannot hold"),
        (spoil(counts, places[21], -4), "numbers tokens that it cannot hold"),
        (spoil(counts, places[21], 2), "numbers tokens that it cannot hold"),  # a sink
        (spoil(counts, places[21], 20), "holds a token twice"),
        (spoil(counts, places[21], 0), "lacks a token of the window"),
        (counts * (counts > 15), "lacks tokens that have left the window"),
        (counts.int(), "damaged or missing"),
    ):
        others = tensors | {name: changed}
        save_file(others, path, metadata | {"checksum": checksum(others, metadata)})
        with pytest.raises(ValueError, match=problem):
            OlmemCache.load(path, model.config)
