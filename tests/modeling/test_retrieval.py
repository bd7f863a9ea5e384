"""Retrieval by itself: when it begins, what it adds at first, and where its store may be."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modeling.helpers import (
    CHUNKED,
    CHUNKS,
    MIXED,
    SINKS,
    SLIDING,
    STREAMS,
    expected,
    judged,
    seen_by,
    span,
    tiny,
    tokens,
)
from modeling.streams import alone, blocks_of, choices, close, make, read
from olmem import OlmemCache, OlmemForCausalLM
from olmem.retrieval_olmem import find_greatest
from torch.testing import assert_close

WINDOWS: dict[str, dict[str, Any]] = {"window": STREAMS["window"], "sinks": SINKS, "chunks": CHUNKS, "mixed": MIXED}
every_window = pytest.mark.parametrize("changes", WINDOWS.values(), ids=WINDOWS)
LOOKS_UP: dict[str, Any] = {"retrieval_layers": [0, 1], "retrieval_top_k": 3, "retrieval_capacity": 9}


def without(model: OlmemForCausalLM) -> OlmemForCausalLM:
    """The same model without retrieval."""
    plain = make({**model.config.to_diff_dict(), "retrieval_layers": []})
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 1000),
    count=st.integers(1, 4),
    kinds=st.sampled_from([2, 5, 10**6]),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_greatest_scores_are_found_among_groups(length, count, kinds, hidden, seed):
    """Also where many are equal, and where many are no candidates."""
    assume(count <= length)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(kinds, (2, 3, length), generator=generator).float()
    scores.masked_fill_(torch.rand(2, 3, length, generator=generator) < hidden, -torch.inf)
    found, index = find_greatest(scores, count)
    assert torch.equal(found.sort().values, scores.topk(count).values.sort().values)
    assert torch.equal(scores.gather(-1, index), found)
    assert all(len(row.unique()) == count for row in index.flatten(0, 1))


def set_gates(model: OlmemForCausalLM, value: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("retrieval_gate.logits"):
            torch.nn.init.constant_(parameter, value)


@every_window
def test_nothing_is_retrieved_before_something_has_left_the_window(changes):
    """Sinks do not leave; and from the first token on that is there, all logits differ."""
    model = make(changes | LOOKS_UP | {"sliding_window": 3})
    plain, ids = without(model), tokens(30)
    config, first = model.config, len(ids)
    for layer in config.retrieval_layers:
        sizes = config.sliding_window or 0, config.attention_chunk_size or 0, config.attention_chunk_lookback
        windows = [seen_by(i, config.layer_types[layer], *sizes)[1] for i in range(len(ids))]
        first = min(first, next(i for i, inside in enumerate(windows) if inside[0] > config.num_sink_tokens))
    found, meant = alone(model, ids), alone(plain, ids)
    assert_close(found[:first], meant[:first], rtol=0, atol=1e-5)
    assert ((found - meant)[first:].abs().amax(-1) > 1e-4).all()


@every_window
def test_gates_as_they_begin_change_little(changes):
    """In an upper layer, at −4, logits are within 2 % of those of the model without; closed they are the same, and
    open they are not."""
    model, ids = make(changes | LOOKS_UP | {"retrieval_layers": [1]}), tokens(2, 60)
    plain = without(model)

    def differ() -> float:
        with torch.no_grad():
            found, meant = (each(ids, use_cache=False).logits for each in (model, plain))
        return float((found - meant).norm() / meant.norm())

    set_gates(model, model.config.retrieval_gate_init)
    assert 0 < differ() < 0.02
    set_gates(model, -100.0)
    assert differ() < 1e-6
    set_gates(model, 4.0)
    assert differ() > 0.05


def test_gates_begin_where_the_configuration_says():
    for value in (-4.0, 0.5):
        model = OlmemForCausalLM(make(SINKS | LOOKS_UP | {"retrieval_gate_init": value}).config)
        gates = {name: weight for name, weight in model.named_parameters() if name.endswith("retrieval_gate.logits")}
        assert list(gates) == [f"model.layers.{layer}.self_attn.retrieval_gate.logits" for layer in (0, 1)]
        for gate in gates.values():
            assert gate.tolist() == [value] * 4


def test_a_full_store_looked_up_in_full_is_one_softmax_over_all_that_left():
    """Without positions and with open gates, in plain tensors: keys and values of all tokens that have left."""
    changes = {"num_hidden_layers": 1, "layer_types": SLIDING, "position_embedding": "none", "norm_placement": "pre"}
    changes |= {"retrieval_layers": [0], "retrieval_top_k": 40, "retrieval_capacity": 40}
    model, ids = tiny(**changes), tokens(30)
    set_gates(model, 100.0)
    layer = model.model.layers[0]
    with torch.no_grad():
        embedded = model.model.embed_tokens(ids)[None]
        query, key, value = layer.self_attn.project(layer.pre_attention_layernorm(embedded))
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        number = torch.arange(30)
        left = number[None, :] <= number[:, None] - model.config.sliding_window
        left[: model.config.sliding_window] = True  # nothing has left: not compared
        scores = (query @ key.transpose(2, 3) * 8**-0.5).masked_fill(~left, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        states = embedded + layer.self_attn.o_proj(mixed)
        states = states + layer.mlp(layer.pre_feedforward_layernorm(states))
        meant = model.lm_head(model.model.norm(states))[0]
    for found in (alone(model, ids), read(model, ids[None].split([1, 9, 1, 19], dim=1))[0]):
        assert_close(found[4:], meant[4:], rtol=0, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(changes=choices(), top_k=st.integers(1, 4), more=st.integers(0, 9), data=st.data())
def test_a_store_in_host_memory_gives_the_same(changes, top_k, more, data):
    """By the configuration, and by the cache's own word."""
    kinds = data.draw(st.lists(st.sampled_from([SLIDING, CHUNKED]), min_size=1, max_size=2))
    changes |= {"layer_types": kinds, "num_hidden_layers": len(kinds), "position_embedding": "rope"}
    changes |= {"retrieval_layers": [len(kinds) - 1], "retrieval_top_k": top_k, "retrieval_capacity": top_k + more}
    placed: dict[str, Any] = {"retrieval_device": "cpu"}
    on_host = make(changes | placed)
    model, ids = make(changes), tokens(24)
    meant, clear = judged(model, ids)
    assume(clear)
    pieces = ids[None].split([7, 1, 9, 1, 6], dim=1)
    for found in (
        read(on_host, pieces),
        read(model, pieces, cache=OlmemCache(model.config, **placed)),
        alone(on_host, ids)[None],
    ):
        close(found[0], meant)


@every_window
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_store_is_a_ring_of_the_last_that_left(changes, capacity):
    """Far beyond its room, in pieces shorter and longer than it."""
    model = make(changes | {"retrieval_layers": [0, 1], "retrieval_top_k": 1, "retrieval_capacity": capacity})
    ids = tokens(6 * span(model), seed=11)
    meant = expected(model, ids)
    for size in (1, 3, 2 * capacity + 1, len(ids)):
        with blocks_of(2):
            found = read(model, ids[None].split(size, dim=1))[0]
        close(found, meant)


def test_a_token_is_known_at_64_windows_distance():
    """If it is looked up, as all are here; without retrieval it is not known at all, and once let go no more."""
    changes = {"num_hidden_layers": 1, "layer_types": SLIDING}
    changes |= {"retrieval_layers": [0], "retrieval_top_k": 250, "retrieval_capacity": 252}
    model, ids = tiny(**changes), tokens(1, 258)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 61
    plain = without(model)
    for each, last in ((model, 255), (plain, 3)):
        before, after = (read(each, text.split(100, dim=1))[0] for text in (ids, other))
        differs = (after - before).abs().amax(-1)
        assert (differs[:4] > 1e-3).all()
        assert (differs[last + 1 :] == 0).all()
        assert float(differs[4 : last + 1].amin() if last > 3 else 1) > 0
