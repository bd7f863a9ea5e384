"""Projections that are shared, and the one tensor that a cache then holds."""

import functools
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from modeling.helpers import CHUNKED, FULL, MIXED, ROPE, SLIDING, oracle, span, tiny, tokens
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM, backends_olmem
from olmem.positions_olmem import rotate, rotate_pairs, to_halves, to_pairs
from olmem.rules_olmem import POSITION_EMBEDDINGS, SHARED_PROJECTIONS
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

HEADS: dict[str, Any] = {"num_key_value_heads": 4}  # as many as query heads
every_sharing = pytest.mark.parametrize("shared", SHARED_PROJECTIONS)
one_tensor = pytest.mark.parametrize("shared", ["key_value", "query_key_value"])


@every_sharing
@pytest.mark.parametrize("qk_norm", ["full", "head", "none"])
def test_what_a_sharing_does_not_use_does_not_exist(shared, qk_norm):
    model = tiny(**HEADS, shared_projections=shared, qk_norm=qk_norm, attention_bias=True)
    kinds = {
        "none": "qkv",
        "key_value": "qk",
        "query_key": "kv",
        "query_key_value": "k",
        "value_difference": "qk",
    }[shared]
    expected = {f"{kind}_proj.{part}" for kind in (*kinds, "o") for part in ("weight", "bias")}
    if qk_norm != "none":
        expected |= {f"{kind}_norm.weight" for kind in kinds if kind != "v"}
    assert set(model.model.layers[0].self_attn.state_dict()) == expected


@pytest.mark.parametrize("shared", ["query_key", "query_key_value", "value_difference"])
def test_queries_are_shared_head_by_head_only(shared):
    with pytest.raises(StrictDataclassError, match="`shared_projections` must be 'none' or 'key_value' with `num_key"):
        OlmemConfig(num_attention_heads=4, num_key_value_heads=2, shared_projections=shared)
    with pytest.raises(StrictDataclassError, match="`shared_projections` must be one of"):
        OlmemConfig(shared_projections="keys")


@one_tensor
def test_a_tensor_that_is_not_rotated_is_not_clipped_rotated(shared):
    with pytest.raises(StrictDataclassError, match=r"`shared_projections` must keep keys and values apart with"):
        OlmemConfig(shared_projections=shared, clip_qkv=1.0, clip_qkv_stage="rotary")


ROTARY_CLIP: dict[str, Any] = {"clip_qkv": 0.3, "clip_qkv_stage": "rotary"}


@pytest.mark.parametrize(
    ("shared", "clip"),
    [
        (shared, clip)
        for shared in SHARED_PROJECTIONS
        for clip in ({}, {"clip_qkv": 0.3}, ROTARY_CLIP)
        if clip is not ROTARY_CLIP or shared not in ("key_value", "query_key_value")  # which are refused
    ],
    ids=str,
)
def test_a_sharing_is_that_of_the_design(shared, clip):
    """Beside the drawn ones of test_streams.py: with each clip, biases and LayerNorm with biases."""
    model = tiny(**HEADS, **clip, shared_projections=shared, attention_bias=True, norm_type="layer")
    ids = tokens(12)
    with torch.no_grad():
        assert_close(model(ids[None]).logits[0].double(), oracle(model, ids), rtol=1e-4, atol=2e-5)


@every_sharing
@pytest.mark.parametrize("scheme", ["rope", "none"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_caches_of_transformers_serve_every_sharing(shared, scheme, backend):
    """They hold keys and values apart, at absolute positions."""
    model = tiny(**HEADS, shared_projections=shared, position_embedding=scheme, head_dim=16)
    ids = tokens(2, 11)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex without a compiler
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation(backend)
        caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)]
        for cache in caches[: 1 if backend == "flex_attention" else 2]:  # nor is Olmo3 right with flex and the other
            found = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 4], dim=1)]
            assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-4)


@one_tensor
def test_a_cache_holds_one_tensor_exactly(shared):
    """Half of the bytes of separate projections with as many heads; of 16 heads with 4 and 1 key/value heads an eighth
    and a thirty-second."""

    def nbytes(kv_heads: int, sharing: str, **changes) -> int:
        heads = {"num_attention_heads": 16, "num_key_value_heads": kv_heads, "head_dim": 4}
        model = tiny(**heads, shared_projections=sharing, **changes)
        cache = OlmemCache(model.config)
        with torch.no_grad():
            for part in tokens(1, 40).split(7, dim=1):
                model(part, past_key_values=cache)
        assert cache.nbytes == sum(
            buffer.untyped_storage().nbytes() for layer in cache.layers for buffer in layer.buffers.values()
        )
        return cache.nbytes

    for changes in ({"layer_types": SLIDING}, {"layer_types": FULL}, {}):
        whole = nbytes(16, "none", **changes)
        assert 2 * nbytes(16, shared, **changes) == whole
        if shared == "key_value":
            assert 8 * nbytes(4, shared, **changes) == whole
            assert 32 * nbytes(1, shared, **changes) == whole


@one_tensor
def test_keys_and_values_are_the_same_memory(shared):
    model = tiny(**MIXED, **HEADS, shared_projections=shared)
    cache = OlmemCache(model.config)
    with torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
    for layer in cache.layers:
        assert set(layer.buffers) == {"keys"}
        assert layer.keys.data_ptr() == layer.values.data_ptr()


@functools.cache
def model_and_meaning(shared: str, scheme: str) -> tuple[OlmemForCausalLM, torch.Tensor, torch.Tensor]:
    """A model, ids (T,), and the oracle's logits of them, for tests that read them in several ways."""
    heads = {"num_key_value_heads": 4} if shared == "query_key_value" else {}
    model = tiny(**MIXED, **heads, shared_projections=shared, position_embedding=scheme)
    ids = tokens(4 * span(model))
    return model, ids, oracle(model, ids)


@one_tensor
@pytest.mark.parametrize("scheme", POSITION_EMBEDDINGS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("scratch", [1, 2**21])
def test_a_step_is_that_of_the_design_however_many_heads_are_rotated_at_a_time(
    shared, scheme, backend, scratch, monkeypatch
):
    """Window, sinks, chunks and a growing layer; grouped heads."""
    monkeypatch.setattr(backends_olmem, "SCRATCH", scratch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model, ids, meant = model_and_meaning(shared, scheme)
    model.set_attn_implementation(backend)
    cache = OlmemCache(model.config)
    with torch.no_grad():
        found = torch.cat([model(ids[None, [index]], past_key_values=cache).logits for index in range(len(ids))])[:, 0]
    assert_close(found.double(), meant, rtol=1e-4, atol=2e-5)


@one_tensor
def test_in_bfloat16_steps_are_as_exact_as_one_forward(shared, tmp_path):
    """Against float64. What is rotated is rounded once, whether it was kept before or not."""
    tiny(**MIXED, **HEADS, shared_projections=shared).save_pretrained(tmp_path)
    model = OlmemForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids, cache = tokens(3 * span(model)), OlmemCache(model.config)
    expected = oracle(model, ids)
    with torch.no_grad():
        steps = [model(ids[None, [index]], past_key_values=cache).logits for index in range(len(ids))]
        whole = model(ids[None], use_cache=False).logits[0]
    off, off_whole = (
        float((logits.double() - expected).square().mean().sqrt()) for logits in (torch.cat(steps)[:, 0], whole)
    )
    assert 0 < off < 1.5 * off_whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pairs_side_by_side_turn_as_halves_do(dtype):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, 8, generator=generator).to(dtype)
    angles = torch.randn(2, 5, 4, generator=generator)
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    assert torch.equal(to_halves(to_pairs(states)), states)
    expected = rotate(states, cos, sin)
    phases = torch.stack((angles.cos(), angles.sin()), dim=-1)
    assert_close(to_halves(rotate_pairs(to_pairs(states), phases)), expected)


@every_sharing
def test_training_reaches_every_weight_of_a_sharing(shared):
    """In one forward, and the same with a cache that is written meanwhile."""
    model = tiny(
        **HEADS,
        shared_projections=shared,
        layer_types=[SLIDING, CHUNKED],
        attention_chunk_size=3,
        rope_parameters=ROPE,
        num_sink_tokens=1,
    ).train()
    ids = tokens(2, 20)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.zero_grad()
    model(ids, labels=ids, past_key_values=OlmemCache(model.config)).loss.backward()
    for name, weight in model.named_parameters():
        assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@one_tensor
def test_a_window_may_be_widened_between_two_caches(shared):
    """The table of a step's slots was that of the narrower window."""
    model = tiny(**HEADS, shared_projections=shared, layer_types=SLIDING, sliding_window=3)
    ids = tokens(1, 20)
    for window in (3, 9, 5):
        model.config.sliding_window = window
        cache = OlmemCache(model.config)
        with torch.no_grad():
            steps = torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)], dim=1)
            assert_close(steps, model(ids, use_cache=False).logits, rtol=0, atol=1e-4)


def test_a_cache_says_which_sharing_it_is_of():
    model = tiny(**HEADS, shared_projections="key_value")
    cache = OlmemCache(tiny(**HEADS).config)
    with pytest.raises(ValueError, match="`shared_projections` was 'none' \\(got 'key_value'\\)"):
        model(tokens(1, 3), past_key_values=cache)


@every_sharing
def test_a_sharing_survives_a_folder(shared, tmp_path):
    model = tiny(**HEADS, shared_projections=shared)
    model.save_pretrained(tmp_path)
    loaded, info = OlmemForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
