"""Streams: how a text was cut into forward calls, and what it shares a batch with, changes nothing."""

import copy
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import (
    CHUNKED,
    FULL,
    MIXED,
    ROPE,
    SLIDING,
    STREAMS,
    TINY,
    left_padded,
    oracle,
    seen_by,
    shake,
    span,
    tiny,
    tokens,
)
from modeling.reference import attend_reference
from modeling.streams import BLOCKS, alone, blocks_of, choices, cuts, dynamic, make, paddings, read, write
from olmem import OlmemCache, OlmemForCausalLM
from olmem.backends_olmem import BACKENDS
from olmem.fallback_olmem import Implementation
from olmem.inputs_olmem import Embeddings, Tokens, number_tokens
from olmem.ops_olmem import PLAIN
from olmem.plan_olmem import Call, Frame, Past, Planner
from olmem.rules_olmem import POSITION_EMBEDDINGS
from olmem.segments_olmem import Schedule
from olmem.visibility_olmem import Visibility
from torch.testing import assert_close
from transformers import DynamicCache, Olmo2Config, Olmo2ForCausalLM, Olmo3Config, Olmo3ForCausalLM


@settings(max_examples=40, deadline=None)
@given(changes=choices(), block=BLOCKS, data=st.data())
def test_logits_do_not_depend_on_how_a_stream_was_cut(changes, block, data):
    """Over six windows, and all at once they are those of the design's loops."""
    model = make(changes)
    ids = tokens(6 * span(model))
    whole = alone(model, ids)
    pieces = ids[None].split(data.draw(cuts(len(ids))), dim=1)
    room = data.draw(st.sampled_from([None, len(ids)]))
    with blocks_of(block):
        assert_close(read(model, pieces, cache=OlmemCache(model.config, room))[0], whole, rtol=0, atol=1e-4)
        assert_close(alone(model, ids), whole, rtol=0, atol=1e-4)
    assert_close(whole.double(), oracle(model, ids), rtol=1e-4, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(changes=choices(), block=BLOCKS, data=st.data())
def test_a_row_is_what_it_is_alone_whatever_it_is_padded_with(changes, block, data):
    """Padding at the left of any piece, at its right, in holes, or a whole piece of it."""
    model = make(changes)
    rows = data.draw(st.integers(2, 3))
    pieces = data.draw(cuts(data.draw(st.integers(1, 4 * span(model)))))
    ids = tokens(rows, sum(pieces))
    masks = data.draw(paddings(rows, pieces))
    mask = torch.cat(masks, dim=1)
    in_full = data.draw(st.booleans())  # or of the new columns only
    ends = torch.tensor(pieces).cumsum(0).tolist()
    given_masks = [mask[:, :end].long() for end in ends] if in_full else masks
    with torch.no_grad(), blocks_of(block):
        found = read(model, ids.split(pieces, dim=1), given_masks)
        whole = model(ids, attention_mask=mask.long(), use_cache=False).logits
    for row in range(rows):
        if mask[row].any():
            expected = alone(model, ids[row][mask[row]])
            assert_close(found[row][mask[row]], expected, rtol=0, atol=1e-4)
            assert_close(whole[row][mask[row]], expected, rtol=0, atol=1e-4)
    assert found.isfinite().all() and whole.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(changes=choices(), block=BLOCKS, data=st.data())
def test_a_packed_document_is_what_it_is_alone(changes, block, data):
    model = make(changes)
    length = 4 * span(model)
    rows = [data.draw(cuts(length)) for _ in range(2)]
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in rows])
    ids = tokens(2, length)
    with torch.no_grad(), blocks_of(block):
        found = model(ids, position_ids=positions, use_cache=False).logits
    for row, sizes in enumerate(rows):
        documents = zip(ids[row].split(sizes), found[row].split(sizes), strict=True)
        for document, logits in documents:
            assert_close(logits, alone(model, document), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("size", [1, 4, 60])
def test_a_left_padded_row_is_read_as_it_is_alone(changes, size):
    """Stepwise, in chunks, and at once; the mask is of all columns so far, as `generate` gives it."""
    model = make(changes)
    rows = [tokens(length, seed=length) for length in (6 * span(model), 2 * span(model) + 1, 1)]
    batch = left_padded(*rows)
    pieces, mask = batch["input_ids"].split(size, dim=1), batch["attention_mask"]
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0).tolist()
    found = read(model, pieces, [mask[:, :end] for end in ends])
    for row, (ids, logits) in enumerate(zip(rows, found, strict=True)):
        assert_close(logits[mask[row].bool()], alone(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}],
    ids=str,
)
def test_beams_of_a_left_padded_row_are_those_it_has_alone(changes, options):
    model = make(changes)
    rows = [tokens(length, seed=length) for length in (3 * span(model), span(model) + 1, 2)]
    batch = left_padded(*rows)
    options = options | {"max_new_tokens": 2 * span(model)}
    width, returned = batch["input_ids"].shape[1], options.get("num_return_sequences", 1)
    written = model.generate(**batch, **options, do_sample=False, pad_token_id=0)[:, width:].split(returned)
    for ids, found in zip(rows, written, strict=True):
        assert torch.equal(write(model, ids[None], **options, use_cache=False).sequences[:, len(ids) :], found)
        assert len({tuple(each) for each in found.tolist()}) == returned


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_a_window_without_sinks_is_olmo3(window, tmp_path):
    """Prompts shorter and longer than the window, and three windows of greedy tokens, each with its own cache."""
    config = {key: value for key, value in TINY.items() if key != "initializer_range"}
    layer_types = [SLIDING, FULL, SLIDING]
    rope = {key: {"rope_type": "default", "rope_theta": 30.0} for key in (SLIDING, FULL)}
    config |= {"num_hidden_layers": 3, "layer_types": layer_types, "sliding_window": window, "rope_parameters": rope}
    reference = shake(Olmo3ForCausalLM(Olmo3Config(**config, pad_token_id=None, eos_token_id=None)))
    reference.save_pretrained(tmp_path)
    model = OlmemForCausalLM.from_olmo(tmp_path).eval()
    for length in (1, window - 1, window, window + 1, 4 * window):
        ids = tokens(2, length)
        with torch.no_grad():
            prefill = model(ids, past_key_values=OlmemCache(model.config)).logits
            expected = reference(ids, past_key_values=DynamicCache(config=reference.config)).logits
        assert_close(prefill, expected, rtol=0, atol=1e-4)
        found, expected = (write(each, ids, max_new_tokens=3 * window) for each in (model, reference))
        assert isinstance(found.past_key_values, OlmemCache)
        assert isinstance(expected.past_key_values, DynamicCache)
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
        assert len(found.sequences[0, length:].unique()) > 1


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize("length", [7, 8, 9, 30])
def test_dynamic_rope_is_that_of_transformers_token_by_token(factor, length, tmp_path):
    """Trained on 8 tokens. The reference is made anew for each text: it keeps the frequencies of the longest."""
    config = {key: value for key, value in TINY.items() if key not in ("initializer_range", "layer_types")}
    config |= {"max_position_embeddings": 8, "rope_parameters": dynamic(factor)}
    del config["head_dim"], config["sliding_window"]
    reference = shake(Olmo2ForCausalLM(Olmo2Config(**config, pad_token_id=None, eos_token_id=None)))
    reference.save_pretrained(tmp_path)
    model = OlmemForCausalLM.from_olmo(tmp_path).eval()
    ids, cache = tokens(2, length), DynamicCache(config=reference.config)
    with torch.no_grad():
        expected = torch.cat([reference(each, past_key_values=cache).logits for each in ids.split(1, dim=1)], dim=1)
        assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
        for size in (1, 3, length):
            assert_close(read(model, ids.split(size, dim=1)), expected, rtol=0, atol=1e-4)
        own = DynamicCache(config=model.config)
        found = torch.cat([model(each, past_key_values=own).logits for each in ids.split(5, dim=1)], dim=1)
        assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("layer_types", [SLIDING, CHUNKED, [SLIDING, FULL, CHUNKED]], ids=str)
@pytest.mark.parametrize("sinks", [1, 4])
def test_sinks_are_those_of_streaming_llm(sinks, layer_types, backend):
    """A prompt and three windows of written tokens against loops that gather each query's keys, number them by their
    places, and only then rotate them."""
    changes = MIXED | {"layer_types": layer_types, "num_sink_tokens": sinks, "attn_implementation": backend}
    model = make(changes)
    for length in (1, sinks, span(model) + sinks, 3 * span(model)):
        ids = tokens(1, length)
        written = write(model, ids, max_new_tokens=3 * span(model))
        expected = oracle(model, written.sequences[0])
        steps = torch.cat(written.logits).double()
        assert_close(steps, expected[length - 1 : -1], rtol=0, atol=1e-4)
        assert torch.equal(expected[length - 1 : -1].argmax(-1), written.sequences[0, length:])
        assert_close(read(model, [ids])[0].double(), expected[:length], rtol=0, atol=1e-4)


@st.composite
def attention_inputs(draw) -> dict[str, Any]:
    """One layer and random queries, keys and values of any size for it, a gradient of its output."""
    changes = draw(choices()) | {"num_hidden_layers": 1, "layer_types": draw(st.sampled_from([SLIDING, CHUNKED, FULL]))}
    changes |= {"head_dim": draw(st.sampled_from([2, 6, 8]))}
    if changes["layer_types"] == FULL:  # in whose windows every sink stays
        changes |= {"num_sink_tokens": 0}
    # As the reference, whose angles are products of differences and frequencies.
    changes |= {"shared_projections": "none", "position_embedding": "rope", "rope_parameters": ROPE}
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def states(heads: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, changes["head_dim"], generator=generator)

    query, gradient = (states(changes["num_attention_heads"]) for _ in range(2))
    key, value = (states(changes["num_key_value_heads"]) for _ in range(2))
    return {"changes": changes, "states": (query, key, value), "gradient": gradient.transpose(1, 2)}


def attend_in(model: OlmemForCausalLM, states, cache: OlmemCache | None = None) -> torch.Tensor:
    """Returns what the first layer's attention makes of queries, keys and values without positions."""
    query, key, value = states
    embeddings = query.new_zeros(len(query), query.shape[2], 1)
    if cache is not None:
        cache.begin(len(query), query.device)
    tokens = number_tokens(embeddings, None, None, None if cache is None else cache.counters, False, False)
    is_plain = Implementation.of(model.config).is_plain
    planner = Planner(model.config, model.model.rotary_emb, BACKENDS, PLAIN, is_plain)
    schedule = Schedule(model.config, planner.kinds, None, cache, tokens, Embeddings(embeddings))
    [call] = schedule.calls()
    plan = planner.plans(call)[planner.kinds[0]]
    [section], [parts] = plan.sections, schedule.states[0].write(key, value, plan, ())
    output, _ = section.attend(model.model.layers[0].self_attn.heads(), query, parts)
    schedule.leave(call, plan, [output], [])
    return output


def with_gradients(function, states, gradient: torch.Tensor) -> list[torch.Tensor]:
    states = [each.clone().requires_grad_() for each in states]
    output = function(*states)
    output.backward(gradient)
    return [output.detach(), *(each.grad for each in states)]


@settings(max_examples=60, deadline=None)
@given(inputs=attention_inputs(), block=BLOCKS, data=st.data())
def test_attention_is_the_reference_with_its_gradients(inputs, block, data):
    """Whole and in many blocks; outputs also in pieces with a cache."""
    model = make(inputs["changes"])
    layer_type = model.config.layer_types[0]
    numbers, attention = torch.arange(inputs["states"][0].shape[2]), model.model.layers[0].self_attn

    def meaning(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_reference(
            query,
            key,
            value,
            numbers,
            numbers,
            Visibility.of(model.config, layer_type),
            lambda positions: model.model.rotary_emb(query, positions, layer_type),
            attention.scaling,
            getattr(attention, "sinks", None),
        )

    expected = with_gradients(meaning, inputs["states"], inputs["gradient"])
    whole = with_gradients(lambda *states: attend_in(model, states), inputs["states"], inputs["gradient"])
    with blocks_of(block):
        found = with_gradients(lambda *states: attend_in(model, states), inputs["states"], inputs["gradient"])
        cache, pieces = OlmemCache(model.config), data.draw(cuts(len(numbers)))
        split = zip(*(each.split(pieces, dim=2) for each in inputs["states"]), strict=True)
        with torch.no_grad():
            in_pieces = torch.cat([attend_in(model, states, cache) for states in split], dim=1)
    for name, *results in zip(("output", "query", "key", "value"), expected, whole, found, strict=True):
        for result in results[1:]:
            assert_close(result, results[0], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(in_pieces, expected[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
def test_every_gradient_of_a_model_is_that_of_its_parts_in_one_block(changes):
    """Of the loss of a left-padded batch, by way of blocks and without them, without a cache and with one."""
    model = make(changes)
    batch = left_padded(tokens(7 * span(model)), tokens(5 * span(model) + 1, seed=1))
    real = batch["attention_mask"].bool()
    labels = batch["input_ids"].where(real & real.roll(1, dims=1), -100)  # nothing that padding predicts

    def gradients(**kwargs) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels, **kwargs).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(use_cache=False)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for kwargs in ({"use_cache": False}, {"past_key_values": OlmemCache(model.config)}):
        with blocks_of(3):
            found = gradients(**kwargs)
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shared", ["none", "key_value"])
@pytest.mark.parametrize("scheme", POSITION_EMBEDDINGS)
@pytest.mark.parametrize("layer_types", [SLIDING, CHUNKED, [SLIDING, CHUNKED, FULL]], ids=str)
def test_gradients_of_many_calls_with_one_cache_are_those_of_each_alone(layer_types, scheme, shared):
    """Of calls that read past full sinks, one token among them: each goes back through what it read itself, as if
    the calls before had kept no graph, also once all have been made."""
    model = make(
        MIXED | {"layer_types": layer_types, "position_embedding": scheme, "shared_projections": shared}
    ).train()
    pieces = tokens(2, 2 * span(model) + 12).split([2 * span(model), 4, 1, 7], dim=1)

    def gradients() -> list[torch.Tensor]:
        found = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        return found

    one, before = OlmemCache(model.config), OlmemCache(model.config)
    losses, expected = [], []
    for piece in pieces:
        losses.append(model(piece, past_key_values=one).logits.square().mean())
        model(piece, past_key_values=copy.deepcopy(before)).logits.square().mean().backward()
        expected.append(gradients())
        read(model, [piece], cache=before)
    losses[-1].backward(retain_graph=True)
    assert_close(gradients(), expected[-1], rtol=1e-4, atol=1e-5)
    torch.stack(losses).sum().backward()
    assert_close(gradients(), [sum(each) for each in zip(*expected, strict=True)], rtol=1e-4, atol=1e-5)


def read_from(model: OlmemForCausalLM, first: int) -> torch.Tensor:
    """Logits of a stream whose counters jumped to `first` after a prompt, once all layers' windows have been read
    anew: its sinks are the prompt's, its other keys lie rotated at numbers beyond `first`."""
    cache = OlmemCache(model.config)
    read(model, [tokens(1, 7)], cache=cache)
    cache.seen.fill_(first)
    cache.columns.fill_(first)
    cache.counters.host_seen = cache.counters.host_columns = None
    renewed = tokens(1, model.config.num_hidden_layers * span(model), seed=1)
    rest = tokens(1, 3 * span(model), seed=2)
    read(model, renewed.split(4, dim=1), cache=cache)
    return read(model, [rest[:, :1], rest[:, 1:2], *rest[:, 2:].split(5, dim=1)], cache=cache)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("layer_types", [SLIDING, CHUNKED, [SLIDING, CHUNKED, SLIDING]], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_stream_is_as_exact_after_a_hundred_million_tokens(backend, layer_types, sinks):
    """A float32 cannot count there: products with it are off by up to four radians."""
    changes = STREAMS["mixed"] | {"layer_types": layer_types, "num_sink_tokens": sinks, "attention_chunk_size": 4}
    model = make(changes | {"attn_implementation": backend})
    expected = read_from(model, 1000)
    assert_close(read_from(model, 100_000_000), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("shared", ["none", "key_value"])
@pytest.mark.parametrize("scheme", [*POSITION_EMBEDDINGS, ["linspace", "xpos", "none"]], ids=str)
@pytest.mark.parametrize("layer_types", [SLIDING, CHUNKED])
@pytest.mark.parametrize("sinks", [0, 3])
def test_no_position_grows_with_the_stream(sinks, layer_types, scheme, shared):
    """What a position multiplies or adds would be no number, or not the same one."""
    changes = {"layer_types": layer_types, "num_sink_tokens": sinks, "attention_chunk_size": 4}
    changes |= {"position_embedding": scheme, "shared_projections": shared}
    model = make(STREAMS["mixed"] | changes)
    expected = read_from(model, 2000)  # beyond the length up to which angles are float32 products
    assert_close(read_from(model, 100_000_000), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slots_of_a_step_are_bounded_however_long_the_stream(data):
    """Of keys that are seen they are places in what the query sees; no key of a ring, padding or not, has a larger
    one."""
    layer_type, sinks = data.draw(st.sampled_from([SLIDING, CHUNKED])), data.draw(st.integers(0, 5))
    sizes = {name: data.draw(st.integers(least, 6)) for name, least in (("window", 1), ("chunk", 1), ("lookback", 0))}
    visibility = Visibility(layer_type, num_sinks=sinks, sliding_window=sizes["window"])
    if layer_type == CHUNKED:
        visibility = Visibility(layer_type, num_sinks=sinks, chunk_size=sizes["chunk"], lookback=sizes["lookback"])
    counts = st.integers(0, 40) | st.integers(10**8, 10**8 + 40)
    seen = torch.tensor(data.draw(st.lists(counts, min_size=1, max_size=3)))
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(seen), max_size=len(seen))))
    before = data.draw(st.sampled_from([int(seen.max()), None]))
    numbers = torch.where(real, seen, -1)[:, None]
    frame = Frame(visibility, Call(Tokens(numbers, not bool(real.all())), before, Past(seen)), [], 0)
    [(_, view)] = frame.sections
    slots = view.step_slots
    assert view.is_step
    assert slots.shape == (len(seen), sinks + view.key_numbers.shape[1])
    assert set(slots.flatten().tolist()) <= set(range(visibility.span + sinks))
    for row, number in enumerate(numbers[:, 0].tolist()):
        assert slots[row, :sinks].tolist() == list(range(sinks))
        if 0 <= number <= 40:
            before_window, inside = seen_by(number, layer_type, **sizes, sinks=sinks)
            listed, keys = before_window + inside, view.key_numbers[row].tolist()
            for slot, key in zip(slots[row, sinks:].tolist(), keys, strict=True):
                assert slot == (listed.index(key) if key in inside else 0)


PI = Fraction("3.14159265358979323846264338327950288419716939937510")


@pytest.mark.parametrize("theta", [50.0, 10000.0, 500000.0])
def test_angles_are_exact_however_large_the_position(theta):
    """Against rational numbers, to 1e-6; below the trained length they are the float32 products of Transformers."""
    model = tiny(rope_parameters={kind: {"rope_theta": theta} for kind in (SLIDING, FULL)})
    rotary = model.model.rotary_emb
    trained = rotary.trained_length
    frequencies = rotary.sliding_attention_inv_freq
    positions = torch.arange(trained)[None]
    product = positions[..., None].float() * frequencies
    for found, function in zip(rotary(torch.ones(1), positions, SLIDING), (torch.cos, torch.sin), strict=True):
        assert torch.equal(found, function(torch.cat((product, product), dim=-1)))
    far = [trained, trained + 1, 10**6 + 7, 10**8 - 1, 10**8, 10**8 + 12345]
    cos, sin = rotary(torch.ones(1), torch.tensor([far]), SLIDING)
    for row, position in enumerate(far):
        angles = [float(position * Fraction(frequency) % (2 * PI)) for frequency in frequencies.tolist()] * 2
        for found, function in ((cos, math.cos), (sin, math.sin)):
            assert_close(found[0, row], torch.tensor([function(angle) for angle in angles]), rtol=0, atol=1e-6)


def test_blocks_work_under_function_transforms():
    """The slices of a block's keys had no `setup_context`."""
    model, ids = tiny(**STREAMS["sinks"]), tokens(1, 300)
    names = [name for name, _ in model.named_parameters()]

    def loss(*weights):
        parameters = dict(zip(names, weights, strict=True))
        outputs = torch.func.functional_call(model, parameters, (ids,), {"use_cache": False})
        return outputs.logits.square().mean()

    weights = [parameter.detach() for parameter in model.parameters()]
    found = torch.func.grad(loss, argnums=tuple(range(len(names))))(*weights)
    model(ids, use_cache=False).logits.square().mean().backward()
    for name, gradient in zip(names, found, strict=True):
        assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("differentiable", [False, True])
def test_positions_that_begin_later_change_nothing(changes, differentiable):
    """Without a cache, where only their differences may count; others are refused where slots are counted."""
    model = make(changes)
    ids, positions = tokens(1, 4 * span(model)), torch.arange(4 * span(model))[None]
    with torch.set_grad_enabled(differentiable):
        expected = model(ids, use_cache=False).logits
        for shift in (0, 100):
            found = model(ids, position_ids=positions + shift, use_cache=False).logits
            assert_close(found, expected, rtol=0, atol=1e-4)
        if model.config.num_sink_tokens:
            with pytest.raises(ValueError, match="`position_ids` must count a row's tokens one by one with sinks"):
                model(ids, attention_mask=torch.ones_like(ids), position_ids=3 * positions, use_cache=False)
