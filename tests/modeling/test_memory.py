"""Memory tokens and retrieval, alone and together: what they compute, for every batch and every way to read a text;
their gradients; and the state that carries them."""

import copy
import functools
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modeling.helpers import (
    BOTH,
    CHUNKED,
    FULL,
    LEARNED,
    MEMORIES,
    MEMORY,
    MIXED,
    RETRIEVAL,
    ROPE,
    SLIDING,
    STREAMS,
    TINY,
    expected,
    judged,
    left_padded,
    oracle,
    span,
    tiny,
    tokens,
    weights_of,
)
from modeling.streams import BLOCKS, alone, blocks_of, choices, close, cuts, make, paddings, read, write
from olmem import OlmemCache, OlmemForCausalLM, segments_olmem
from olmem.cache_file_olmem import checksum
from olmem.rules_olmem import NORM_PLACEMENTS
from olmem.state_olmem import OlmemTape
from olmem.visibility_olmem import STORE_BLOCK
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

every_memory = pytest.mark.parametrize("changes", MEMORIES.values(), ids=MEMORIES)
BOUNDED = {name: changes for name, changes in MEMORIES.items() if FULL not in changes.get("layer_types", [FULL])}
# One layer, so that nothing but memory goes beyond a window.
SINGLE: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": SLIDING}
LOOKED_UP: dict[str, Any] = {"retrieval_layers": [0], "retrieval_top_k": 6, "retrieval_capacity": 6}


@st.composite
def memories(draw) -> dict[str, Any]:
    """Changes of the tiny configuration with memory tokens, retrieval, or both."""
    changes = draw(choices())
    kinds = changes["layer_types"]
    bounded = [index for index in range(len(kinds)) if kinds[index] != FULL]
    layers = draw(st.lists(st.sampled_from(bounded), unique=True)) if bounded else []
    top_k = draw(st.integers(1, 4))
    if not layers or draw(st.booleans()):
        changes |= {"num_memory_tokens": draw(st.integers(1, 3)), "memory_segment_length": draw(st.integers(1, 7))}
    return changes | {
        "retrieval_admission": draw(st.sampled_from(["recent", "learned"])),
        "retrieval_layers": layers,
        "retrieval_top_k": top_k,
        "retrieval_capacity": top_k + draw(st.integers(0, 6)),
    }


# What is computed


@settings(max_examples=30, deadline=None)
@given(changes=memories(), block=BLOCKS, data=st.data())
def test_logits_are_those_of_the_design_however_a_stream_was_cut(changes, block, data):
    """Whole, and in random pieces with a cache that grows or has its room at once, in blocks of any size."""
    model = make(changes)
    ids = tokens(data.draw(st.integers(1, 28)))
    logits, clear = judged(model, ids)
    assume(clear)
    pieces = ids[None].split(data.draw(cuts(len(ids))), dim=1)
    room = data.draw(st.sampled_from([None, len(ids)]))
    with blocks_of(block):
        close(alone(model, ids), logits)
        close(read(model, pieces, cache=OlmemCache(model.config, room))[0], logits)


@settings(max_examples=25, deadline=None)
@given(changes=memories(), block=BLOCKS, data=st.data())
def test_a_row_is_what_it_is_alone_whatever_it_is_padded_with(changes, block, data):
    """Padding at the left of any piece, at its right, in holes, or a whole piece of it: rows reach the ends of their
    segments at different steps."""
    model = make(changes)
    pieces = data.draw(cuts(data.draw(st.integers(1, 20))))
    ids, masks = tokens(2, sum(pieces)), data.draw(paddings(2, pieces))
    mask = torch.cat(masks, dim=1)
    in_full = data.draw(st.booleans())  # or of the new columns only
    ends = torch.tensor(pieces).cumsum(0).tolist()
    with torch.no_grad(), blocks_of(block):
        given_masks = [mask[:, :end].long() for end in ends] if in_full else masks
        found = read(model, ids.split(pieces, dim=1), given_masks)
        whole = model(ids, attention_mask=mask.long(), use_cache=False).logits
    assert found.isfinite().all() and whole.isfinite().all()
    for row in range(2):
        if mask[row].any():
            logits, clear = judged(model, ids[row][mask[row]])
            assume(clear)
            close(found[row][mask[row]], logits)
            close(whole[row][mask[row]], logits)


@functools.cache
def meant_alone(name: str, length: int, seed: int) -> torch.Tensor:
    """The oracle's logits of some ids, for tests that read them in several ways."""
    return expected(make(MEMORIES[name]), tokens(length, seed=seed))


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("size", [1, 4, 60])
def test_a_left_padded_row_is_read_as_the_design_says(name, size):
    """Stepwise, in chunks, and at once; the mask is of all columns so far, as `generate` gives it."""
    model, rows = make(MEMORIES[name]), ((26, 3), (11, 1), (5, 2), (1, 1))
    batch = left_padded(*(tokens(length, seed=seed) for length, seed in rows))
    pieces, mask = batch["input_ids"].split(size, dim=1), batch["attention_mask"]
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0).tolist()
    found = read(model, pieces, [mask[:, :end] for end in ends])
    for row, (of, logits) in enumerate(zip(rows, found, strict=True)):
        close(logits[mask[row].bool()], meant_alone(name, *of))


@every_memory
@pytest.mark.parametrize("size", [1, 9])
def test_padding_in_holes_and_at_the_end_of_a_piece_is_nothing(changes, size):
    """Where stores are small and full, and each row ends its segments at steps of its own."""
    model, ids = make(changes), tokens(3, 54, seed=2)
    mask = torch.rand(3, 54, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 8::9] = False
    with blocks_of(4):
        cache = OlmemCache(model.config)
        found = read(model, ids.split(size, dim=1), mask.long().split(size, dim=1), cache)
    assert cache.get_seq_length() == 54
    for row in range(3):
        close(found[row][mask[row]], alone(model, ids[row][mask[row]]))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("count", [1, 3])
def test_segments_that_see_nothing_else_are_a_recurrent_memory_transformer(count, backend):
    """Windows that are segments, against a model of full attention that knows no memory: it reads each segment between
    the memory tokens of before, which see one another, and as many that see all of it, whose last hidden states are,
    once they went through memory's norm, those of the next segment."""
    size = 5
    changes = {"layer_types": CHUNKED, "attention_chunk_size": size, "rope_parameters": ROPE | {CHUNKED: ROPE[FULL]}}
    model = make(changes | {"num_memory_tokens": count, "memory_segment_length": size, "attn_implementation": backend})
    plain = tiny(layer_types=FULL, rope_parameters=ROPE)
    plain.load_state_dict(model.state_dict(), strict=False)
    mask = torch.ones(count + size + count, count + size + count).tril().bool()
    mask[:count, :count] = mask[-count:, -count:] = True
    ids, last = tokens(4 * size), []
    plain.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0][0]))
    memory, logits = model.model.memory.embeddings, []
    with torch.no_grad():
        for segment in ids.split(size):
            between = torch.cat((memory, plain.model.embed_tokens(segment), memory))[None]
            found = plain(inputs_embeds=between, attention_mask=mask[None, None], use_cache=False).logits
            logits.append(found[0, count:-count])
            memory = model.model.memory.norm(last[-1][-count:])
    close(alone(model, ids), torch.cat(logits))
    close(read(model, ids[None].split(3, dim=1))[0], torch.cat(logits))


@every_memory
@pytest.mark.parametrize("length", [1, 5, 13])
def test_generation_writes_what_the_design_says(changes, length):
    """Greedily, over ends of segments and beyond every window, from a prompt that ends a segment, or does not."""
    model = make(changes)
    written = write(model, tokens(1, length), max_new_tokens=20)
    logits = expected(model, written.sequences[0])[length - 1 : -1]
    close(torch.cat(written.logits), logits)
    assert isinstance(written.past_key_values, OlmemCache)


@every_memory
def test_beams_of_a_left_padded_row_are_those_it_has_alone(changes):
    model: Any = make(changes)
    rows = [tokens(length, seed=length) for length in (13, 6, 2)]
    batch, options = left_padded(*rows), {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9}
    width = batch["input_ids"].shape[1]
    written = model.generate(**batch, **options, do_sample=False, pad_token_id=0)[:, width:].split(2)
    for ids, found in zip(rows, written, strict=True):
        assert torch.equal(write(model, ids[None], **options, use_cache=False).sequences[:, len(ids) :], found)


@every_memory
def test_a_conversation_goes_on_from_its_cache(changes):
    """Turns of generated and given tokens, as if it had been read at once."""
    model = make(changes)
    cache = OlmemCache(model.config)
    text = tokens(1, 7, seed=4)
    for seed in (5, 6):
        text = write(model, text, past_key_values=cache, max_new_tokens=4).sequences
        text = torch.cat((text, tokens(1, 3, seed=seed)), dim=1)
    rest = text[:, cache.get_seq_length() :]
    close(read(model, [rest], cache=cache)[0], expected(model, text[0])[-rest.shape[1] :])


@settings(max_examples=15, deadline=None)
@given(changes=memories(), block=BLOCKS, data=st.data())
def test_a_packed_document_is_what_it_is_alone(changes, block, data):
    model = make(changes)
    rows = [data.draw(cuts(24)) for _ in range(2)]
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in rows])
    ids = tokens(2, 24)
    with torch.no_grad(), blocks_of(block):
        found = model(ids, position_ids=positions, use_cache=False).logits
    for row, sizes in enumerate(rows):
        for document, logits in zip(ids[row].split(sizes), found[row].split(sizes), strict=True):
            meant, clear = judged(model, document)
            assume(clear)
            close(logits, meant)


@every_memory
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_hidden_states_are_those_of_the_tokens(changes, backend):
    """Of as many columns as there are tokens, whatever memory tokens went through the layers; cut or not."""
    model = make(changes | {"attn_implementation": backend})
    ids = left_padded(tokens(17), tokens(9, seed=1))
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        whole = model(**ids, output_hidden_states=True, use_cache=False)
        cache, parts = OlmemCache(model.config), []
        for piece, mask in zip(*(each.split([4, 1, 12], dim=1) for each in ids.values()), strict=True):
            parts.append(model(piece, attention_mask=mask, past_key_values=cache, output_hidden_states=True))
        close(model.lm_head(whole.hidden_states[-1]), whole.logits)
        close(whole.hidden_states[0], model.model.embed_tokens(ids["input_ids"]))
    assert [tuple(each.shape) for each in whole.hidden_states] == [(2, 17, 24)] * (layers + 1)
    real = ids["attention_mask"].bool()
    for index, states in enumerate(whole.hidden_states):
        in_parts = torch.cat([part.hidden_states[index] for part in parts], dim=1)
        assert in_parts.shape == states.shape
        close(in_parts[real], states[real])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [MEMORIES["memory"], MEMORIES["both mixed"], MEMORIES["both in one tensor"]])
def test_a_gate_mixes_what_is_seen_with_memory_and_without(changes, backend):
    """Of queries that read and that write; closed, it leaves what the windows show, and open, all."""
    model = make(changes | {"memory_gate_init": 1, "attn_implementation": backend})
    ids = tokens(17)
    logits = expected(model, ids)
    for pieces in ([17], [3, 13, 1], [1] * 17):
        close(read(model, ids[None].split(pieces, dim=1))[0], logits)
    rows = left_padded(ids, ids[:6])
    with torch.no_grad():
        found = model(**rows, use_cache=False).logits
    close(found[0], logits)
    close(found[1, -6:], logits[:6])
    for value, name in ((-1e4, "num_memory_tokens"), (1e4, "memory_gate_init")):
        for layer in model.model.layers:
            layer.self_attn.memory_gate.logits.data.fill_(value)
        other = make(changes | {"attn_implementation": backend, name: 0 if value < 0 else None})
        other.load_state_dict(model.state_dict(), strict=False)
        close(alone(model, ids), alone(other, ids))


def test_hidden_states_may_be_asked_for_by_the_configuration():
    model, ids = make(MEMORIES["both"]), tokens(1, 7)
    with torch.no_grad():
        asked = model(ids, output_hidden_states=True).hidden_states
        assert model(ids).hidden_states is None
        model.config.output_hidden_states = True
        assert_close(model(ids).hidden_states, asked)
        assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("scheme", ["rope", "xpos"])
def test_keys_that_are_values_are_rotated_at_their_places_by_dynamic_frequencies(scheme):
    """In a cache, where they are rotated as they are read: from the first slot, which is memory's."""
    rope = {FULL: {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 5.0}}
    shared = {"shared_projections": "key_value", "num_key_value_heads": 4, "position_embedding": scheme}
    model = make(MEMORY | shared | {"layer_types": FULL, "rope_parameters": rope, "max_position_embeddings": 8})
    ids = tokens(14)
    for pieces in ([14], [3, 1, 10], [1] * 14):
        close(read(model, ids[None].split(pieces, dim=1))[0], expected(model, ids))


# No leak


@every_memory
@pytest.mark.parametrize("size", [1, 7, 28])
def test_no_logit_knows_of_a_token_after_it_or_in_another_row(changes, size):
    """Not by a bit, whether read at once or in pieces; the token itself is heard from there on."""
    model = make(changes)
    changes_at = (0, 4, 5, 6, 14, 19, 27)
    ids = tokens(28).repeat(len(changes_at) + 1, 1)
    other = ids.clone()
    for row, changed in enumerate(changes_at):
        other[row, changed] = (other[row, changed] + 1) % 61
    found = [[read(model, each.split(size, dim=1)) for each in (ids, other)]]
    if size == 28:
        found.append([model(each, use_cache=False).logits.detach() for each in (ids, other)])
    for before, after in found:
        assert torch.equal(after[-1], before[-1])
        for row, changed in enumerate(changes_at):
            assert torch.equal(after[row, :changed], before[row, :changed])
            assert (after[row, changed] - before[row, changed]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 6, 30])
def test_what_left_the_window_is_known_through_memory_only(size):
    """In one layer. Memory tells of it from the next segment on for ever, as it was in view when that was written;
    retrieval while it is among those kept; and a model with neither not at all."""
    changed, window, segment, kept = 6, TINY["sliding_window"], 9, LOOKED_UP["retrieval_capacity"]
    memory = {"num_memory_tokens": 2, "memory_segment_length": segment}
    ids = tokens(1, 30)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % 61
    number = torch.arange(30)
    in_window = (number >= changed) & (number < changed + window)
    looked_up = (number >= changed + window) & (number < changed + window + kept)
    remembered = number >= segment
    cases = (
        ({}, in_window),
        (memory, in_window | remembered),
        (LOOKED_UP, in_window | looked_up),
        (memory | LOOKED_UP, in_window | looked_up | remembered),
    )
    for changes, heard in cases:
        model = make(SINGLE | changes)
        before, after = (read(model, each.split(size, dim=1))[0] for each in (ids, other))
        differs = (after - before).abs().amax(-1)
        assert torch.equal(differs > 0, heard), changes
        assert (differs[heard] > 1e-5).all(), changes


@pytest.mark.parametrize(
    "changes", [MEMORY, RETRIEVAL, RETRIEVAL | LEARNED, BOTH], ids=["memory", "retrieval", "selecting", "both"]
)
def test_a_packed_document_knows_nothing_of_another(changes):
    model = make(MIXED | changes)
    ids, sizes = tokens(1, 26), [11, 4, 11]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % 61
    with torch.no_grad():
        before, after = (model(each, position_ids=positions, use_cache=False).logits[0] for each in (ids, other))
    assert torch.equal(after[11:], before[11:])
    assert ((after - before)[3:11].abs().amax(-1) > 0).all()


# Gradients


def gradients(model: OlmemForCausalLM, ids: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """Those of the mean square of the logits of ids (T,), by each parameter."""
    model.zero_grad()
    model(ids[None], **kwargs).logits.square().mean().backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }


def same(found: dict[str, torch.Tensor], meant: dict[str, torch.Tensor]) -> None:
    for name, gradient in meant.items():
        assert_close(
            found[name].double(),
            gradient,
            rtol=1e-3,
            atol=1e-5 + 1e-3 * float(gradient.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@every_memory
@pytest.mark.parametrize("segments", [None, 1])
def test_every_gradient_is_that_of_the_design(changes, segments):
    """Through as many segments as `memory_bptt_segments` says, whole and in blocks, with a cache, and with each layer
    computed twice."""
    model, ids = make(changes | {"memory_bptt_segments": segments}), tokens(24, seed=5)
    weights, gaps = weights_of(model), []
    oracle(model, ids, weights=weights, gaps=gaps).square().mean().backward()
    assert min(gaps, default=1.0) > 2e-5, "take other ids"
    meant = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    assert all(gradient.abs().max() > 0 for gradient in meant.values())
    assert set(meant) == set(weights)
    same(gradients(model, ids, use_cache=False), meant)
    with blocks_of(3):
        same(gradients(model, ids, use_cache=False), meant)
        same(gradients(model, ids, past_key_values=OlmemCache(model.config)), meant)
    model.train().gradient_checkpointing_enable()
    with blocks_of(3):
        same(gradients(model, ids), meant)


@contextmanager
def in_float64():
    """Softmaxes that are of float32 by choice are of float64 if their input is, for differences to be exact."""
    softmax = nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", lambda x, dim=None, **_: softmax(x, dim=dim))
        yield


@pytest.mark.parametrize("kind", ["memory", "retrieval", "both"])
@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": SLIDING, "num_sink_tokens": 1, "sliding_window": 2},
        {"layer_types": CHUNKED, "attention_chunk_size": 2, "shared_projections": "key_value"},
        {"layer_types": [CHUNKED, SLIDING], "attention_chunk_size": 2, "sliding_window": 3, "attn": "eager"},
        {"layer_types": SLIDING, "sliding_window": 2, "position_embedding": ["linspace", "xpos"]},
    ],
    ids=["sliding", "chunked", "two kinds", "schemes"],
)
def test_gradients_are_those_of_finite_differences(changes, kind):
    """In float64, of the embeddings that are read, the first memory, the gates, and what scores tokens for a store
    that selects, each along a random direction, over three ends of segments and with more candidates than are looked
    up."""
    sizes = {"hidden_size": 6, "intermediate_size": 6, "head_dim": 4, "num_attention_heads": 2, "vocab_size": 7}
    sizes |= {"num_key_value_heads": 1, "norm_type": "layer", "rope_parameters": ROPE}
    memory = {"num_memory_tokens": 2, "memory_segment_length": 3}
    retrieval = {"retrieval_layers": [0, 1], "retrieval_top_k": 2, "retrieval_capacity": 4}
    parts = {"memory": memory, "retrieval": retrieval, "both": memory | retrieval | LEARNED}[kind]
    changes = dict(changes)
    model = make(sizes | parts | {"attn_implementation": changes.pop("attn", "sdpa")} | changes).double()
    ends = "memory.embeddings", "retrieval_gate.logits", "retrieval_score.weight"
    names = [name for name, _ in model.named_parameters() if name.endswith(ends)]
    assert len(names) == {"memory": 1, "retrieval": 2, "both": 5}[kind]
    parameters = dict(model.named_parameters())
    inputs = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given_inputs = [inputs.requires_grad_(), *(parameters[name].detach().clone().requires_grad_() for name in names)]

    def logits(embeddings: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        kwargs = {"inputs_embeds": embeddings, "use_cache": False}
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), kwargs=kwargs).logits

    with in_float64():
        for block in (3, 128):
            with blocks_of(block):
                assert torch.autograd.gradcheck(logits, given_inputs, eps=1e-6, atol=1e-7, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("length", [20, 18], ids=["whole segments", "a part at the end"])
@pytest.mark.parametrize("read_before", [0, 6, 8], ids=str)
@pytest.mark.parametrize("segments", [0, 1, 2, None])
def test_no_gradient_goes_back_further_than_it_may(segments, read_before, length):
    """Where memory is all that segments share: of the last segment's loss exactly zero for what is further back, and
    not for what is nearer; of each row by its own count, also in a call that goes on from a cache."""
    size = 4
    model = make(
        {
            "layer_types": CHUNKED,
            "attention_chunk_size": size,
            "rope_parameters": ROPE,
            "num_memory_tokens": 2,
            "memory_segment_length": size,
            "memory_bptt_segments": segments,
        }
    )
    cache = OlmemCache(model.config)
    if read_before:
        read(model, [tokens(2, read_before)], cache=cache)
    embeddings = model.model.embed_tokens(tokens(2, length, seed=1)).detach().requires_grad_()
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    logits = model(inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache).logits
    logits[:, -1].square().sum().backward()
    assert embeddings.grad is not None
    heard = embeddings.grad.abs().amax(-1)
    for row in range(2):
        segment = (read_before + mask[row].cumsum(0) - 1) // size
        reached = mask[row].bool()
        if segments is not None:
            reached &= segment >= segment[-1] - segments
        # of the last segment's own tokens, and of all that were told to a memory that was read
        assert torch.equal(heard[row] > 0, reached)


@every_memory
def test_gradients_of_many_calls_with_one_cache_are_those_of_each_alone(changes):
    """Each goes back through what it read itself, as if the calls before had kept no graph, also once all are made."""
    model = make(changes).train()
    pieces = tokens(2, 24, seed=3).split([9, 4, 1, 10], dim=1)

    def taken() -> list[torch.Tensor]:
        found = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in model.parameters()
        ]
        model.zero_grad()
        return found

    one, before = OlmemCache(model.config), OlmemCache(model.config)
    losses, meant = [], []
    for piece in pieces:
        losses.append(model(piece, past_key_values=one).logits.square().mean())
        model(piece, past_key_values=copy.deepcopy(before)).logits.square().mean().backward()
        meant.append(taken())
        read(model, [piece], cache=before)
    losses[-1].backward(retain_graph=True)
    assert_close(taken(), meant[-1], rtol=1e-4, atol=1e-5)
    torch.stack(losses).sum().backward()
    assert_close(taken(), [sum(each) for each in zip(*meant, strict=True)], rtol=1e-4, atol=1e-4)


# State


def halves(changes: dict[str, Any]) -> tuple[Any, list[torch.Tensor], OlmemCache]:
    """A model, three rows of one length each at another place of a segment, and a cache that has read them."""
    model = make(changes)
    rows = [tokens(length, seed=length) for length in (17, 12, 5)]
    batch, cache = left_padded(*rows), OlmemCache(model.config)
    read(model, [batch["input_ids"]], [batch["attention_mask"]], cache)
    return model, rows, cache


@every_memory
@pytest.mark.parametrize(
    "choose, chosen",
    [
        pytest.param(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], id="repeat"),
        pytest.param(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0], id="fewer"),
        pytest.param(lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2], id="mask"),
        pytest.param(lambda cache: cache.reorder_cache(torch.tensor([1, 2, 1])), [1, 2, 1], id="reorder"),
    ],
)
def test_rows_are_chosen_with_all_that_they_remember(changes, choose, chosen):
    model, rows, cache = halves(changes)
    choose(cache)
    others = tokens(len(chosen), 9, seed=9)
    found = read(model, others.split([1, 1, 7], dim=1), cache=cache)
    for row, other, logits in zip(chosen, others, found, strict=True):
        close(logits, alone(model, torch.cat((rows[row], other)))[-9:])


@every_memory
def test_a_copy_or_a_file_goes_on_where_the_cache_stood(changes, tmp_path):
    """Each row in the midst of a segment of its own."""
    model, rows, cache = halves(changes)
    cache.save(tmp_path / "state.safetensors")
    branch, others = copy.deepcopy(cache), tokens(3, 9, seed=9)
    found = read(model, others.split([2, 7], dim=1), cache=cache)
    for row, other, logits in zip(rows, others, found, strict=True):
        close(logits, alone(model, torch.cat((row, other)))[-9:])
    stored = OlmemCache.load(tmp_path / "state.safetensors", model.config)
    assert stored.nbytes == branch.nbytes
    for each in (branch, stored):
        assert_close(read(model, others.split([2, 7], dim=1), cache=each), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_memory_tokens", 3),
        ("memory_segment_length", 6),
        ("retrieval_layers", [0]),
        ("retrieval_capacity", 8),
        ("retrieval_admission", "learned"),
    ],
)
def test_a_cache_of_another_memory_is_refused_with_the_field_that_differs(name, value, tmp_path):
    model, other = make(MEMORIES["both"]), make(MEMORIES["both"] | {name: value})
    cache = OlmemCache(model.config)
    read(model, [tokens(1, 7)], cache=cache)
    cache.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=f"`{name}`"):
        read(other, [tokens(1, 1)], cache=cache)
    with pytest.raises(ValueError, match=f"`{name}`"):
        OlmemCache.load(tmp_path / "state.safetensors", other.config)


@every_memory
def test_reset_forgets_everything_and_keeps_the_room(changes):
    model, _, cache = halves(changes)
    nbytes, others = cache.nbytes, tokens(3, 12, seed=8)
    cache.reset()
    found = read(model, others.split([5, 1, 6], dim=1), cache=cache)
    for other, logits in zip(others, found, strict=True):
        close(logits, alone(model, other))
    assert cache.nbytes == nbytes


def test_nothing_of_before_comes_through_a_reset():
    """0 times what is not a number is not a number, masked or not; of fewer tokens than make a memory."""
    for changes in MEMORIES.values():
        model: Any = make(changes)
        for forget in (OlmemCache.reset, model.reset_memory):
            cache = OlmemCache(model.config)
            with torch.no_grad():
                model(inputs_embeds=torch.full((2, 4, 24), torch.nan), past_key_values=cache)
            forget(cache)
            assert read(model, tokens(2, 19).split([8, 1, 10], dim=1), cache=cache).isfinite().all()


def test_a_call_that_is_broken_off_between_segments_leaves_no_cache_to_go_on_from():
    model = make(MEMORIES["memory"])
    cache, calls_left = OlmemCache(model.config), [0]

    def fail(*_) -> None:
        calls_left[0] -= 1
        if not calls_left[0]:
            raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(fail)
    for calls in (2, 3):  # each segment is one pass, with the memory that it reads and the one that it writes
        calls_left[0] = calls
        with pytest.raises(KeyboardInterrupt):
            read(model, [tokens(1, 12)], cache=cache)
        with pytest.raises(ValueError, match="half written"):
            read(model, [tokens(1, 12)], cache=cache)
        cache.reset()
    hook.remove()
    close(read(model, [tokens(1, 12)], cache=cache)[0], alone(model, tokens(12)))


@every_memory
@pytest.mark.parametrize(
    ("rows", "of"),
    [
        ([1], "causal model"),
        (torch.tensor([0, 2]), "base model"),
        (None, "base model"),
        ([], "causal model"),
    ],
    ids=["list, causal model", "tensor, base model", "all, base model", "none, causal model"],
)
def test_reset_memory_lets_rows_begin_anew(changes, rows, of):
    """Neither window, sinks, memory nor store of the conversation before is left in them; the others go on."""
    model, before, cache = halves(changes)
    owner = model if of == "causal model" else model.model
    owner.reset_memory(cache, rows)
    forgotten = range(3) if rows is None else [int(row) for row in rows]
    others = tokens(3, 14, seed=7)
    found = read(model, others.split([1, 6, 7], dim=1), cache=cache)
    for row, (other, logits) in enumerate(zip(others, found, strict=True)):
        text = other if row in forgotten else torch.cat((before[row], other))
        close(logits, alone(model, text)[-14:])


def test_reset_memory_is_of_an_olmem_cache_that_may_be_new():
    model: Any = make(MEMORIES["both"])
    with pytest.raises(ValueError, match="`cache`"):
        model.reset_memory(DynamicCache(config=model.config))
    cache = OlmemCache(model.config)
    model.reset_memory(cache, [0])
    close(read(model, [tokens(1, 9)], cache=cache)[0], alone(model, tokens(9)))


def test_no_token_is_taken_back_where_a_row_began_anew():
    """Nor without memory: columns are no longer those of one text."""
    model: Any = make({"layer_types": FULL})
    cache = OlmemCache(model.config)
    read(model, [tokens(2, 5)], cache=cache)
    model.reset_memory(cache, [1])
    with pytest.raises(ValueError, match="`crop`"):
        cache.crop(-1)


@every_memory
def test_a_step_is_not_compiled(changes):
    """Where memory begins, and what a store holds, is for the host to know."""
    assert not OlmemCache(make(changes).config, 20).is_compileable


@pytest.mark.parametrize("changes", BOUNDED.values(), ids=BOUNDED)
def test_the_state_is_as_large_after_any_number_of_tokens(changes):
    model = make(changes)
    cache = OlmemCache(model.config)
    read(model, [tokens(2, 1)], cache=cache)
    kept = model.config.retrieval_capacity if model.config.retrieval_layers else 0
    filled = 2 * (span(model) + kept + model.config.num_sink_tokens + STORE_BLOCK)
    read(model, [tokens(2, filled)], cache=cache)
    nbytes = cache.nbytes
    plain = make({name: value for name, value in changes.items() if name not in BOTH})
    without = OlmemCache(plain.config)
    read(plain, [tokens(2, filled)], cache=without)
    assert nbytes > without.nbytes
    for length in (1, 1, 1, 1, 1, 30, 2):
        read(model, [tokens(2, length)], cache=cache)
        assert cache.nbytes == nbytes


# What is refused

kinds = pytest.mark.parametrize(
    "changes, name",
    [
        (STREAMS["window"] | MEMORY, "num_memory_tokens"),
        ({"layer_types": FULL} | MEMORY, "num_memory_tokens"),
        (STREAMS["window"] | RETRIEVAL, "retrieval_layers"),
    ],
    ids=["memory", "memory in full layers", "retrieval"],
)


@kinds
def test_caches_of_transformers_are_refused(changes, name):
    model, ids = make(changes), tokens(1, 3)
    for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=20)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            read(model, [ids], cache=cache)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=f"`{name}`"):
            write(model, ids, past_key_values=cache, max_new_tokens=2)
    for kind in ("static", "dynamic"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            write(model, ids, cache_implementation=kind, max_new_tokens=2)


@kinds
@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_backends_that_see_no_memory_are_refused(changes, name, backend, use_cache):
    model = make(changes)
    model.config._attn_implementation = backend  # as `set_attn_implementation` does, where it is installed
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(tokens(1, 3), use_cache=use_cache)


@kinds
def test_a_mask_of_the_callers_own_is_refused(changes, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make(changes)(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3).tril().bool(), use_cache=False)


@kinds
def test_no_token_is_taken_back(changes, name):
    """Not even before a window has let go of one: memory may have been written since."""
    model = make(changes)
    cache = OlmemCache(model.config)
    read(model, [tokens(1, 3)], cache=cache)
    with pytest.raises(ValueError, match=f"`{name}`"):
        cache.crop(-1)
    assert not cache.is_croppable
    close(read(model, [tokens(1, 2)], cache=cache)[0], alone(model, torch.cat((tokens(3), tokens(2))))[-2:])


@kinds
def test_decoding_that_takes_tokens_back_is_refused(changes, name):
    """For what assists too. Transformers refuses `_is_stateful` models before we can."""
    model, plain, ids = make(changes), make({}), tokens(1, 5)
    assert model._is_stateful and not plain._is_stateful
    with pytest.raises(ValueError, match=f"`{name}`|stateful"):
        write(model, ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"`{name}`|stateful"):
        write(model, ids, assistant_model=plain, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"`{name}`|stateful"):
        write(plain, ids, assistant_model=model, max_new_tokens=3)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_weights_are_refused_with_memory_tokens(backend):
    model = make(STREAMS["window"] | MEMORY | {"attn_implementation": backend})
    with pytest.raises(ValueError, match="`num_memory_tokens`"):
        model(tokens(1, 3), output_attentions=True)
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="`num_memory_tokens`"):
        model(tokens(1, 3))
    assert model(tokens(1, 3), output_attentions=False).attentions is None


@every_memory
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient_through_memory(changes, use_reentrant):
    """Whatever gradients go through enters and leaves a layer by position, which reentrant checkpointing sees."""
    found = []
    for checkpointing in (False, True):
        model = make(changes).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ids = left_padded(tokens(23), tokens(12, seed=1))
        model(**ids, use_cache=False).logits[ids["attention_mask"].bool()].square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_first_memory_begins_as_embeddings_do():
    model = make(MEMORIES["memory"] | {"num_memory_tokens": 60, "initializer_range": 0.3})
    memory = OlmemForCausalLM(model.config).model.memory.embeddings
    assert memory.shape == (60, 24)
    assert abs(float(memory.mean())) < 0.03 and 0.27 < float(memory.std()) < 0.33


# What a review found


@torch.no_grad()
def test_generation_goes_on_after_a_reset():
    """All rows: as in a cache that has read nothing. Some rows: no ids are the whole text of all of them."""
    model, ids = make(MEMORIES["both mixed"]), tokens(2, 20)
    fresh = write(model, ids, past_key_values=OlmemCache(model.config), max_new_tokens=5).sequences
    cache = OlmemCache(model.config)
    write(model, ids[:, :4], past_key_values=cache, max_new_tokens=3)
    model.reset_memory(cache)
    assert torch.equal(write(model, ids, past_key_values=cache, max_new_tokens=5).sequences, fresh)
    model.reset_memory(cache, [1])
    with pytest.raises(ValueError, match=r"none of whose rows began anew .* `stream = model.stream\(tokenizer\)`"):
        write(model, tokens(2, 40), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("rows", [None, [0, 1], [0]], ids=str)
def test_a_reset_gives_room_back(rows):
    model = make(MEMORIES["both mixed"])
    cache, sizes = OlmemCache(model.config, max_length=24), []
    for _ in range(4):
        read(model, [tokens(2, 8)], cache=cache)
        model.reset_memory(cache, rows)
        model.reset_memory(cache, [1])
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[-1]


def test_rows_that_are_not_there_are_refused_before_anything_is_forgotten():
    model, ids = make(MEMORIES["both"]), tokens(2, 9)
    cache = OlmemCache(model.config)
    read(model, [ids[:, :8]], cache=cache)
    with pytest.raises(ValueError, match="`rows` must be among the 2 of the batch"):
        model.reset_memory(cache, [0, 5])
    model.reset_memory(cache, [])
    assert not cache.began_anew
    for row, logits in enumerate(read(model, [ids[:, 8:]], cache=cache)):
        close(logits[0], expected(model, ids[row])[8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [*MEMORIES.values(), *STREAMS.values()], ids=[*MEMORIES, *STREAMS])
@torch.no_grad()
def test_models_of_half_precision_read_whole_and_in_pieces(changes, dtype, tmp_path):
    make(changes).save_pretrained(tmp_path)
    exact = OlmemForCausalLM.from_pretrained(tmp_path).eval()
    model = OlmemForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = tokens(1, 12)
    near = exact(ids, use_cache=False).logits
    for found in (model(ids, use_cache=False).logits, read(model, ids.split([7, 1, 4], dim=1))):
        assert found.dtype == dtype
        assert (found.float() - near).norm() < 0.25 * near.norm()


def test_a_half_written_cache_is_not_saved(tmp_path):
    model, cache = make(MEMORIES["both"]), OlmemCache(make(MEMORIES["both"]).config)
    handle = model.model.layers[-1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, [tokens(1, 8)], cache=cache)
    handle.remove()
    cache.counters.fresh = False
    for forbidden in (lambda: cache.save(tmp_path / "cache"), lambda: model.reset_memory(cache)):
        with pytest.raises(ValueError, match="half written"):
            forbidden()
    cache.reset()
    with pytest.raises(ValueError, match="has read tokens"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize("name", ["memory", "retrieval", "both mixed"])
@torch.no_grad()
def test_packed_documents_beside_a_mask(name):
    """A mask without padding says nothing; beside padding, positions that start anew are refused."""
    model, ids = make(MEMORIES[name]), tokens(1, 30)
    positions = torch.cat([torch.arange(10), torch.arange(20)])[None]
    mask = torch.ones_like(ids)
    apart = model(ids, position_ids=positions, use_cache=False).logits
    assert_close(model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits, apart)
    close(apart[0, :10], alone(model, ids[0, :10]))
    mask[:, -1] = 0
    with pytest.raises(ValueError, match="`position_ids` must count a row's tokens one by one"):
        model(ids, position_ids=positions, attention_mask=mask, use_cache=False)
    left = (mask.flip(-1).cumsum(-1) - 1).clamp(min=0)  # as `generate` has them
    found = model(ids, position_ids=left, attention_mask=mask.flip(-1), use_cache=False).logits
    close(found[0, 1:], alone(model, ids[0, 1:]))


@torch.no_grad()
def test_many_short_documents_cost_no_more_than_their_tokens():
    model, seen = make(MEMORIES["memory"]), []
    model.model.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(output.shape[:2].numel()))
    sizes = [64, *[2] * 40]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    model(tokens(1, sum(sizes)), position_ids=positions, use_cache=False)
    assert sum(seen) < 4 * sum(sizes)


def test_attentions_are_the_same_where_gradients_go_through_a_store():
    model = make(MEMORIES["retrieval"] | {"attn_implementation": "eager"})
    found = model(tokens(1, 9), output_attentions=True).attentions
    with torch.no_grad():
        expected = model(tokens(1, 9), output_attentions=True).attentions
    assert len(expected) == model.config.num_hidden_layers
    for weights, exact in zip(found, expected, strict=True):
        close(weights, exact)


def test_second_derivatives_are_refused_and_anomalies_found_nowhere():
    model, ids = make(MEMORIES["both"]), tokens(1, 30)
    with torch.autograd.set_detect_anomaly(True):
        model(ids, use_cache=False).logits.square().sum().backward()
    model = make(MEMORIES["retrieval"])
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, use_cache=False).logits.square().sum()
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_what_goes_back_holds_as_much_as_may_be_looked_up(monkeypatch):
    model = make(MEMORIES["both"] | {"retrieval_capacity": 6})
    kept, original = [], OlmemTape.candidates

    def candidates(*arguments):
        for found in original(*arguments):
            kept.append(found.key.shape[2])
            yield found

    monkeypatch.setattr(OlmemTape, "candidates", candidates)
    model(tokens(1, 200), use_cache=False)
    assert max(kept) <= 6 + 2 * span(model) + model.config.memory_segment_length


# Many segments


def some_are_quick(*choices: Sequence[Any]) -> list:
    """All combinations. Of those that hundreds of segments are read for, `make test` has each choice at least once."""
    quick = [tuple(values[number % len(values)] for values in choices) for number in range(max(map(len, choices)))]
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in quick else pytest.mark.slow)
        for case in product(*choices)
    ]


def memories_of(model: OlmemForCausalLM, length: int, batch: int = 1) -> list[torch.Tensor]:
    """Every memory (B, M, hidden_size) that is written while so many tokens are read in pieces."""
    written, cache = [], OlmemCache(model.config)
    hook = model.model.memory.norm.register_forward_hook(lambda _, __, output: written.append(output.clone()))
    read(model, tokens(batch, length).split(500, dim=1), cache=cache)
    hook.remove()
    return written


@pytest.mark.parametrize(("placement", "gate"), some_are_quick(NORM_PLACEMENTS, [None, -2.0]))
@torch.inference_mode()
def test_memory_stays_of_one_size_however_many_segments_wrote_it(placement, gate):
    """Its root mean square, over 2,000 tokens of new weights: 1, as the norm has it; without a norm it was 255."""
    changes = {"norm_placement": placement, "memory_gate_init": gate, "initializer_range": 0.2}
    model = OlmemForCausalLM(make(MEMORIES["memory"] | changes).config).eval()
    written = memories_of(model, 2_001)
    assert len(written) == 400
    sizes = torch.stack(written).square().mean(-1).sqrt()
    assert_close(sizes, torch.ones_like(sizes), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("placement", "dtype", "kind"),
    some_are_quick(NORM_PLACEMENTS, [torch.float32, torch.bfloat16, torch.float16], ["memory", "both with sinks"]),
)
@torch.inference_mode()
def test_a_thousand_segments_are_finite_in_every_dtype(placement, dtype, kind):
    changes = {"num_hidden_layers": 1, "norm_placement": placement, "memory_segment_length": 2}
    changes |= {"retrieval_layers": [0]} if kind != "memory" else {}
    model = make(MEMORIES[kind] | changes).to(dtype)
    cache = OlmemCache(model.config)
    logits = read(model, tokens(1, 2_002).split(500, dim=1), cache=cache)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert logits.float().abs().amax(-1).max() < 4 * logits.float().abs().amax(-1).median()


@pytest.mark.parametrize("norm_type", ["layer", "layer_plain"])
def test_memory_is_written_through_a_norm_of_the_models_own_kind(norm_type):
    model, ids = make(MEMORIES["memory"] | {"norm_type": norm_type}), tokens(17)
    close(alone(model, ids), expected(model, ids))
    close(read(model, ids[None].split([3, 13, 1], dim=1))[0], expected(model, ids))


# A memory that is not finite


@pytest.mark.slow
def test_a_model_with_memory_is_exported_for_a_length():
    """The question whether a memory is finite is not asked while tracing, which has no answer."""
    model, ids = make(MEMORIES["memory"]), tokens(1, 12)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    close(program.module()(ids, use_cache=False).logits[0], alone(model, ids[0]))


def spoilt_rows(*rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (3, 8, 24) of which these rows hold infinity from their second token on, and a mask."""
    embeddings = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    embeddings[list(rows), 1:] = torch.inf
    return embeddings, torch.ones(3, 8, dtype=torch.long)


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("differentiable", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("shift", [0, 3], ids=["together", "apart"])
def test_a_memory_that_is_not_finite_is_an_error_with_its_row(shift, differentiable, with_cache):
    """Whether rows end their segments together or not."""
    model = make(MEMORIES["memory"])
    embeddings, mask = spoilt_rows(1)
    mask[0, :shift] = 0
    options: dict[str, Any] = {"past_key_values": OlmemCache(model.config)} if with_cache else {"use_cache": False}
    words = r"`memory` of row 1 must be finite at the end .*got 48 non-finite values of 48.*bfloat16 or float32"
    with torch.set_grad_enabled(differentiable), pytest.raises(ValueError, match=words):
        model(inputs_embeds=embeddings, attention_mask=mask, **options)


def test_a_cache_goes_on_after_a_memory_that_was_not_finite():
    """Once it is reset; until then it is half written."""
    model = make(MEMORIES["both"])
    cache = OlmemCache(model.config)
    with torch.no_grad(), pytest.raises(ValueError, match="`memory` of row 0"):
        model(inputs_embeds=spoilt_rows(0, 2)[0], past_key_values=cache)
    with pytest.raises(ValueError, match="half written"):
        read(model, [tokens(3, 9)], cache=cache)
    cache.reset()
    for row, logits in zip(tokens(3, 9), read(model, [tokens(3, 9)], cache=cache), strict=True):
        close(logits, alone(model, row))


def test_float16_that_overflows_is_an_error_and_not_a_text_of_padding():
    """Where `generate()` would go on with token 0 for ever."""
    model = make(MEMORIES["memory"] | {"norm_placement": "pre"})
    model.model.layers[-1].mlp.down_proj.weight.data *= 1e6
    assert alone(model, tokens(20)).isfinite().all()
    with pytest.raises(ValueError, match="`memory` of row 0 must be finite"):
        write(model.half(), tokens(1, 4), max_new_tokens=20)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_memory_that_is_not_finite_is_neither_saved_nor_loaded(value, tmp_path):
    model = make(MEMORIES["both"])
    cache = OlmemCache(model.config)
    read(model, [tokens(3, 12)], cache=cache)
    cache.save(tmp_path / "sound.safetensors")
    with safe_open(tmp_path / "sound.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for memory in (tensors["memory"], cache.memory):
        memory[1, 0, 3] = value
    save_file(tensors, tmp_path / "spoilt.safetensors", metadata | {"checksum": checksum(tensors, metadata)})
    with pytest.raises(ValueError, match=r"`memory` of row 1 must be finite to be loaded from .*spoilt.*\(got 1 non-"):
        OlmemCache.load(tmp_path / "spoilt.safetensors", model.config)
    with pytest.raises(ValueError, match=r"`memory` of row 1 must be finite to be saved \(got 1 non-finite"):
        cache.save(tmp_path / "again.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sound.safetensors", "spoilt.safetensors"]


def test_a_short_text_takes_little_room(monkeypatch):
    model = make(MEMORIES["memory"] | {"sliding_window": 4096, "memory_segment_length": 4096})
    made = []

    def make_cache(*arguments, **options):
        made.append(OlmemCache(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(segments_olmem, "OlmemCache", make_cache)
    alone(model, tokens(5))
    assert made[0].nbytes < 100_000


@every_memory
@pytest.mark.parametrize("differentiable", [False, True])
def test_positions_that_begin_later_change_nothing(changes, differentiable):
    """Of the pieces that segments cut a text into too."""
    model, ids = make(changes), tokens(1, 23)
    with torch.set_grad_enabled(differentiable):
        expected = model(ids, use_cache=False).logits
        for shift in (0, 100):
            close(model(ids, position_ids=torch.arange(23)[None] + shift, use_cache=False).logits, expected)
