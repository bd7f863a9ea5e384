"""Generation: whatever is remembered between steps, the tokens and logits are those of one forward over everything."""

import itertools
import threading

import pytest
import torch
from modeling.helpers import CHUNKS, MEMORIES, MIXED, SINKS, WINDOW, left_padded, named, tiny, tokens
from olmem import OlmemCache, OlmemForCausalLM
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache, TextStreamer

PLAIN = [
    {},
    {"layer_types": "sliding_attention"},
    {"layer_types": "full_attention"},
    {"norm_placement": "parallel", "norm_type": "layer", "qk_norm": "head", "logits_scaling": 3.0},
    {"norm_placement": "pre", "qk_norm": "none", "clip_qkv": 0.5, "clip_qkv_stage": "rotary"},
]
MODELS = [*PLAIN, SINKS, CHUNKS, MIXED]
STATIC = {"cache_implementation": "static"}
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW]
NEW = 2 * WINDOW + 1
CACHES = [{}, {"cache_implementation": "dynamic"}, STATIC]
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def write(model, ids, **kwargs):
    """What `generate` adds to a batch, greedily unless told otherwise."""
    kwargs = GREEDY | {"attention_mask": torch.ones_like(ids)} | kwargs
    return model.generate(ids, **kwargs)[:, ids.shape[1] :]


def write_by_hand(model, ids: torch.Tensor) -> torch.Tensor:
    """Greedy decoding of one row with a whole forward at every step."""
    row = ids
    for _ in range(NEW):
        with torch.no_grad():
            row = torch.cat((row, model(row[None], use_cache=False).logits[0, -1:].argmax(-1)))
    return row[len(ids) :]


@pytest.mark.parametrize("first", LENGTHS)
@pytest.mark.parametrize("changes", MODELS, ids=named)
def test_a_cache_changes_no_logit(changes, first):
    """A first chunk, then chunks of one to five tokens, over more than twice the window."""
    model = tiny(**changes)
    ids = tokens(2, 4 * WINDOW)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for size in (1, 3, 5):
            cache, chunks = None, [ids[:, :first], *ids[:, first:].split(size, dim=1)]
            found = []
            for chunk in chunks:
                outputs = model(chunk, past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                found.append(outputs.logits)
            assert cache.get_seq_length() == ids.shape[1]
            assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)


def test_a_sliding_layer_keeps_its_window_only():
    model = tiny()
    with torch.no_grad():
        for length in (4 * WINDOW, 400 * WINDOW):
            cache = model(tokens(1, length), use_cache=True).past_key_values
            assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW, length]


def test_the_cache_is_there_by_default_and_only_then():
    model = tiny()
    assert isinstance(model(tokens(1, 3)).past_key_values, OlmemCache)
    assert model(tokens(1, 3), use_cache=False).past_key_values is None
    assert tiny(use_cache=False)(tokens(1, 3)).past_key_values is None


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("make", [OlmemCache, DynamicCache], ids=["own", "dynamic"])
@pytest.mark.parametrize("changes", PLAIN[:2], ids=named)
def test_a_cache_has_two_names_in_every_release(changes, make):
    """Transformers calls `past_key_values` `cache` from 5.24 on, and warns of the name that it had."""
    model, ids = tiny(**changes), tokens(1, 2 * WINDOW)
    expected = write(model, ids)
    for name in ("past_key_values", "cache"):
        cache = make(config=model.config)
        with torch.no_grad():
            logits = model(ids[:, :3], **{name: cache}).logits
            hidden = model.model(ids[:, 3:-1], **{name: cache}).last_hidden_state
        assert cache.get_seq_length() == 2 * WINDOW - 1
        assert_close(torch.cat((logits, model.lm_head(hidden)), 1), model(ids[:, :-1]).logits, rtol=0, atol=1e-5)
        assert torch.equal(write(model, ids, **{name: cache}), expected)
        assert torch.equal(write(model, ids, **{name: make(config=model.config)}), expected)
        assert torch.equal(write(model, ids, **{name: None}), expected)


@pytest.mark.parametrize("changes", [{}, {"shared_projections": "key_value"}], ids=named)
def test_requests_are_batched_continuously(changes):
    """By a paged cache of Transformers, which is no `Cache`, and is told where it writes. Prompts fit into the window:
    of longer ones Olmo3's own tokens differ there."""
    model = tiny(**changes)
    prompts = [tokens(length, seed=length).tolist() for length in (WINDOW, 2, 1)]
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=model.config.vocab_size - 1, pad_token_id=0
    )
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)
    batch = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    found = sorted(batch.values(), key=lambda output: int(output.request_id.split("_")[-1]))
    assert [output.error for output in found] == [None] * len(prompts)
    for prompt, output in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


@pytest.mark.parametrize("changes", [SINKS, CHUNKS, MEMORIES["memory"], MEMORIES["retrieval"]], ids=named)
def test_continuous_batches_are_refused_before_any_worker_starts(changes):
    """Transformers' worker failed for a mask that the caller had not given, and an empty result came back."""
    model, before = tiny(**changes), threading.active_count()
    words = "` must .* in continuous batching, which pages .*; pass the prompts to `generate\\(\\)` as a padded batch"
    for start in (lambda: model.generate_batch([[1, 2, 3]]), model.init_continuous_batching):
        with pytest.raises(ValueError, match=words):
            start()
    assert threading.active_count() == before
    assert model.config._attn_implementation == "sdpa"


class Prompted(OlmemForCausalLM):
    """Tunes a prompt as PEFT does, whose `prepare_inputs_for_generation` looks for the cache by its older name."""

    prompts = 0

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            self.prompts += 1
            embedded = self.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat((prompt(len(embedded)), embedded), dim=1)
            if (mask := inputs.get("attention_mask")) is not None:
                inputs["attention_mask"] = torch.cat((mask.new_ones(len(mask), 2), mask), dim=1)
            inputs.pop("position_ids", None)
        return inputs


def prompt(rows: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 48).view(1, 2, 24).expand(rows, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, SINKS, MEMORIES["both mixed"]], ids=named)
def test_a_tuned_prompt_begins_a_text_once(changes):
    """Steps got it too, with a cache that PEFT did not find; that of Transformers' own models still do."""
    model = tiny(Prompted, **changes)
    rows = [tokens(2 * WINDOW), tokens(WINDOW - 1, seed=1)]
    batch = left_padded(*rows)
    written = write(model, batch.pop("input_ids"), **batch)
    assert model.prompts == 1
    embed = model.get_input_embeddings()
    for row, found in zip(rows, written, strict=True):
        for token in found:
            embedded = torch.cat((prompt(1), embed(row[None])), dim=1)
            assert model(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax() == token
            row = torch.cat((row, token[None]))


def test_a_cache_is_given_by_one_of_its_names():
    model, ids = tiny(), tokens(1, 3)
    both = {"past_key_values": OlmemCache(model.config), "cache": OlmemCache(model.config)}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="`cache` and `past_key_values` must not both be passed"):
            call(ids, **both)


@pytest.mark.parametrize("changes", MODELS, ids=named)
@pytest.mark.parametrize("length", LENGTHS)
def test_generation_is_greedy_decoding(length, changes):
    model = tiny(**changes)
    ids = tokens(length)
    expected = write_by_hand(model, ids)
    assert len(set(expected.tolist())) > 1
    assert torch.equal(write(model, ids[None])[0], expected)
    assert torch.equal(write(model, ids[None], use_cache=False)[0], expected)


@pytest.mark.parametrize(
    "changes, options",
    [*itertools.product(MODELS, [{}, {"use_cache": False}]), *itertools.product(PLAIN, [STATIC])],
    ids=named,
)
def test_a_left_padded_row_is_written_as_it_is_alone(changes, options):
    model = tiny(**changes)
    rows = [tokens(length, seed=length) for length in (2 * WINDOW + 1, WINDOW, 1)]
    batch = left_padded(*rows)
    written = write(model, batch.pop("input_ids"), **batch, **options)
    assert torch.equal(written, torch.stack([write_by_hand(model, row) for row in rows]))


CHUNK_SIZES = [{"prefill_chunk_size": size} for size in (1, 3, WINDOW, WINDOW + 1)]


@pytest.mark.parametrize(
    "changes, options", [*itertools.product(MODELS, CHUNK_SIZES), *itertools.product(PLAIN, [STATIC])], ids=str
)
def test_every_way_to_cache_writes_the_same(changes, options):
    model = tiny(**changes)
    ids = tokens(2, 2 * WINDOW + 3)
    assert torch.equal(write(model, ids, **options), write(model, ids, use_cache=False))


@pytest.mark.parametrize("changes", PLAIN, ids=named)
def test_a_cache_of_the_caller_goes_on(changes):
    """Two turns with one cache, dynamic or static, write what one prompt of both turns writes."""
    model = tiny(**changes)
    ids = tokens(1, WINDOW + 2)
    longest = ids.shape[1] + 2 * NEW + 3
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=longest)):
        second = torch.cat((ids, write(model, ids, past_key_values=cache), tokens(1, 3, seed=1)), dim=1)
        assert torch.equal(write(model, second, past_key_values=cache), write(model, second, use_cache=False))


@pytest.mark.parametrize("changes", PLAIN, ids=named)
def test_a_standard_cache_stays_standard(changes):
    """As a cache of Transformers has it: absolute positions, the keys of every token, or of the window."""
    model = tiny(**changes)
    ids = tokens(1, 2 * WINDOW)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        with torch.no_grad():
            outputs = model(ids, past_key_values=cache)
        assert outputs.past_key_values is cache
        assert_close(outputs.logits, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)
    kinds = [(options, model.generate(ids, return_dict_in_generate=True, **GREEDY, **options)) for options in CACHES]
    assert [type(written.past_key_values) for _, written in kinds] == [OlmemCache, DynamicCache, StaticCache]


@pytest.mark.parametrize("changes", MODELS, ids=named)
@pytest.mark.parametrize("length", [WINDOW - 1, 3 * WINDOW])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=str)
def test_a_returned_cache_goes_on(options, length, changes):
    """Two more turns, given the whole text."""
    model = tiny(**changes)
    rows = left_padded(tokens(length), tokens(length - 2, seed=1))
    first = model.generate(**rows, **GREEDY, return_dict_in_generate=True)
    cache, whole, mask = first.past_key_values, first.sequences, rows["attention_mask"]
    for seed in (2, 3):
        whole = torch.cat((whole, tokens(2, 3, seed=seed)), dim=1)
        mask = torch.cat((mask, torch.ones(2, whole.shape[1] - mask.shape[1], dtype=torch.long)), dim=1)
        found = write(model, whole, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(found, write(model, whole, attention_mask=mask, use_cache=False))
        whole = torch.cat((whole, found), dim=1)
        assert cache.get_seq_length() == whole.shape[1] - 1


class Numbers:
    """A tokenizer whose words are the ids."""

    def decode(self, ids, **kwargs) -> str:
        return "".join(f"{int(token)} " for token in ids)


@pytest.mark.parametrize("changes", MODELS, ids=named)
def test_text_is_streamed_as_it_is_written(changes, capsys):
    model = tiny(**changes)
    ids = tokens(1, 2 * WINDOW)
    written = write(model, ids, streamer=TextStreamer(Numbers(), skip_prompt=True))[0]
    assert capsys.readouterr().out.split() == [str(token) for token in written.tolist()]


def test_a_window_of_one_key_is_refused_a_cache_of_transformers():
    """Transformers' DynamicCache keeps every key of a window of one (`keys[-window + 1:]`): other tokens were
    written, without an error."""
    model = tiny(sliding_window=1)
    with pytest.raises(ValueError, match=r"`sliding_window` must be at least 2 \(got 1\) with a cache of Transformers"):
        write(model, tokens(1, 5), cache_implementation="dynamic")
    for options in ({}, {"use_cache": False}):
        assert torch.equal(write(model, tokens(1, 5), **options)[0], write_by_hand(model, tokens(5)))
    full = tiny(sliding_window=1, layer_types="full_attention")
    assert torch.equal(write(full, tokens(1, 5))[0], write_by_hand(full, tokens(5)))


@pytest.mark.parametrize("changes", MODELS, ids=named)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"do_sample": True, "num_beams": 2, "temperature": 0.7},
    ],
    ids=named,
)
def test_beams_and_samples_do_not_depend_on_the_cache(options, changes):
    model = tiny(**changes)
    batch = left_padded(tokens(2 * WINDOW), tokens(WINDOW, seed=1))
    ids = batch.pop("input_ids")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(write(model, ids, **batch, **options, use_cache=use_cache))
    assert found[0].shape == (2 * options.get("num_return_sequences", 1), NEW)
    assert torch.equal(found[0], found[1])
    if options.get("do_sample"):
        torch.manual_seed(1)
        assert not torch.equal(write(model, ids, **batch, **options), found[0])


def test_beams_are_the_likeliest_continuations():
    """With as many beams as tokens, two steps of beam search are exhaustive."""
    model = tiny(logits_scaling=4.0)
    ids = tokens(WINDOW + 1)
    with torch.no_grad():
        first = model(ids[None]).logits[0, -1].log_softmax(-1)
        rows = torch.cat((ids.expand(61, -1), torch.arange(61)[:, None]), dim=1)
        scores = first[:, None] + model(rows).logits[:, -1].log_softmax(-1)
    best = divmod(int(scores.argmax()), 61)
    assert tuple(write(model, ids[None], num_beams=61, max_new_tokens=2)[0].tolist()) == best


@pytest.mark.parametrize(
    "changes, options",
    [*itertools.product([{}, SINKS, CHUNKS, MIXED], [{}, {"use_cache": False}]), ({}, STATIC)],
    ids=named,
)
def test_embeddings_are_continued_like_their_ids(changes, options):
    model = tiny(**changes)
    ids = tokens(2, WINDOW + 2)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY, **options), write(model, ids))


def test_generation_stops_at_the_end_of_the_text():
    model = tiny()
    ids = tokens(1, WINDOW)
    expected = write(model, ids)[0].tolist()
    stop = expected[3]
    assert write(model, ids, eos_token_id=stop)[0].tolist() == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_every_backend_writes_the_same(backend):
    batch = left_padded(tokens(2 * WINDOW), tokens(WINDOW - 1, seed=1))
    ids = batch.pop("input_ids")
    expected = write(tiny(), ids, **batch)
    model = tiny()
    model.set_attn_implementation(backend)
    with torch.compiler.set_stance("force_eager"):  # flex without a compiler
        assert torch.equal(write(model, ids, **batch), expected)


@pytest.mark.parametrize("more", [1, 2, 10], ids=str)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=str)
def test_new_ids_are_not_taken_for_the_whole_text(more, options):
    """Ids were taken for new ones by their shape, or cut by what the cache had read, or read twice."""
    model = tiny(**SINKS)
    cache = OlmemCache(model.config)
    with torch.no_grad():
        model(tokens(1, 10), past_key_values=cache)
    ids = tokens(1, more)
    given: list[dict[str, torch.Tensor]] = [{"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}]
    longer = {"input_ids": tokens(1, 11), "attention_mask": torch.ones(1, 21, dtype=torch.long)}
    for each in (*given, given[0] | {"attention_mask": torch.ones(1, more + 10, dtype=torch.long)}, longer):
        with pytest.raises(ValueError, match=r"more than the 10 columns .*`stream = model.stream\(tokenizer\)`"):
            model.generate(**each, **GREEDY, **options, past_key_values=cache)
    assert cache.get_seq_length() == 10


def test_a_model_assists_another_beyond_its_window():
    """Its own `generate` made a cache that takes no token back."""
    model, assistant = tiny(layer_types="full_attention"), tiny(layer_types="sliding_attention")
    ids = tokens(1, 3 * WINDOW)
    expected = write(model, ids, use_cache=False)
    assert torch.equal(write(model, ids, assistant_model=assistant), expected)
    assert torch.equal(write(model, ids, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize(
    ("changes", "rule"), [(SINKS, "`num_sink_tokens` must be 0"), (CHUNKS, "`layer_types` must not")]
)
def test_what_cannot_be_taken_back_is_not_assisted(changes, rule):
    with pytest.raises(ValueError, match=rf"{rule} .* assisted, which takes tokens back"):
        write(tiny(**changes), tokens(1, 5), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("scheme", ["xpos", "linspace", ["rope", "linspace"]], ids=str)
def test_positions_that_go_by_what_is_seen_are_not_assisted(scheme):
    model, ids = tiny(layer_types="full_attention", position_embedding=scheme), tokens(1, 5)
    by_slot = scheme if isinstance(scheme, str) else "linspace"
    expected = rf"`position_embedding` must be made of rope and none \(got '{by_slot}', .*\) to assist or be assisted"
    with pytest.raises(ValueError, match=expected):
        write(model, ids, prompt_lookup_num_tokens=2)
    plain = tiny(layer_types="full_attention")
    for helped, assistant in ((model, plain), (plain, model)):
        with pytest.raises(ValueError, match=expected):
            write(helped, ids, assistant_model=assistant)


def test_a_model_without_positions_is_assisted():
    model, ids = tiny(position_embedding="none"), tokens(1, 3 * WINDOW)
    assert torch.equal(write(model, ids, prompt_lookup_num_tokens=2), write(model, ids, use_cache=False))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_padding_in_a_piece_of_a_prompt_is_not_read(size):
    """A piece of one column may be padding, unlike a token that was written."""
    model = tiny(layer_types="sliding_attention")
    rows = [tokens(7), tokens(3, seed=1)]
    batch, options = left_padded(*rows), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**batch, **options, prefill_chunk_size=size)
    for ids, written in zip(rows, found, strict=True):
        alone = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **options)
        assert torch.equal(written[7:], alone[0, len(ids) :])
