"""Learned sinks beside what Olmem's own backends do with them, which the tests of streams and memory show: where they
come from, and what of Transformers attends to them."""

import pytest
import torch
from modeling.helpers import MEMORY, SINK_LOGITS, SLIDING, TINY, oracle, tiny, tokens
from modeling.streams import write
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from olmem.backends_olmem import eager_attention_forward
from olmem.weights_olmem import place_modules
from torch import nn
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, Olmo2Config, Olmo2ForCausalLM
from transformers.generation.continuous_batching import continuous_api
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

NEW = 9


def sinks_of(model: nn.Module) -> list[torch.Tensor]:
    return [weight for name, weight in model.named_parameters() if name.endswith(".self_attn.sinks")]


def test_a_new_model_has_them_if_it_is_asked_for_and_they_begin_there():
    """Transformers' paged attention takes a module that has an attribute of their name for one that has them."""
    plain, model = OlmemForCausalLM(OlmemConfig(**TINY)), OlmemForCausalLM(OlmemConfig(**TINY | SINK_LOGITS))
    assert not any(hasattr(module, "sinks") for module in plain.modules())
    assert [sinks.tolist() for sinks in sinks_of(model)] == [[0.0] * 4] * 2
    for sinks in sinks_of(model):
        sinks.data.fill_(7.0)
        sinks._is_hf_initialized = False  # pyright: ignore[reportAttributeAccessIssue]
    model.apply(model._init_weights)
    assert [sinks.tolist() for sinks in sinks_of(model)] == [[0.0] * 4] * 2


def test_they_are_those_of_gpt_oss():
    module = nn.Module().eval()
    module.num_key_value_groups, module.sinks = 2, torch.tensor([-1.0, 0.0, 1.5, 4.0])  # pyright: ignore
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.zeros(2, 1, 5, 7).masked_fill(torch.rand(2, 1, 5, 7) < 0.4, torch.finfo(torch.float32).min)
    found = eager_attention_forward(module, query, key, value, mask, 0.3, s_aux=module.sinks)  # pyright: ignore
    for own, other in zip(found, gpt_oss_attention(module, query, key, value, mask, 0.3), strict=True):
        assert_close(own, other)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_caches_of_transformers_serve_them(implementation):
    model, ids = tiny(**SINK_LOGITS), tokens(1, 6)
    model.set_attn_implementation(implementation)
    written = write(model, ids, max_new_tokens=NEW)
    expected = oracle(model, written.sequences[0])[len(ids[0]) - 1 : -1]
    assert_close(torch.cat(written.logits).double(), expected, rtol=0, atol=1e-4)
    for options in ({"past_key_values": DynamicCache(config=model.config)}, {"cache_implementation": "static"}):
        again = write(model, ids, max_new_tokens=NEW, **options)
        assert torch.equal(again.sequences, written.sequences)
        assert_close(torch.cat(again.logits).double(), expected, rtol=0, atol=1e-4)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    given = {"full_attention": mask, "sliding_attention": mask.triu(1 - TINY["sliding_window"])}
    if implementation == "eager":
        given = {name: torch.zeros(1, 1, 6, 6).masked_fill(~each, -1e30) for name, each in given.items()}
    found = model(ids, attention_mask=given, use_cache=False).logits
    assert_close(found[:, -1].double(), expected[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batches_have_them(implementation, monkeypatch):
    """Also where flash attention is installed, to which Transformers would switch, and which would leave them out."""
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: True)
    model = tiny(**SINK_LOGITS)
    model.set_attn_implementation(implementation)
    prompts = [tokens(length, seed=length).tolist() for length in (4, 2)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=60, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)
    batch = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    found = sorted(batch.values(), key=lambda output: int(output.request_id.split("_")[-1]))
    for prompt, output in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "engine"])
def test_what_would_leave_them_out_in_silence_is_refused(name):
    model = tiny(**SINK_LOGITS)
    model.config._attn_implementation = name  # as `set_attn_implementation` does, where it is installed
    words = rf"`sink_logit_init` must be None \(got 0.0\) with `attn_implementation` '{name}'; set 'sdpa' or 'eager'"
    with pytest.raises(ValueError, match=words):
        model(tokens(1, 3))


def test_flex_attention_is_given_them():
    """It says itself that it applies them on a GPU alone."""
    model = tiny(**SINK_LOGITS)
    model.set_attn_implementation("flex_attention")
    refused = pytest.raises(ValueError, match="Attention sinks cannot be run on CPU")
    with refused, torch.compiler.set_stance("force_eager"):  # flex without a compiler
        model(tokens(1, 3))


# Weights that have none


def refused(load, *arguments, **keywords) -> None:
    words = r"`sink_logit_init` must be at most -10 beside weights that have no sinks \(got 0.0\).*; give -10, .* train"
    with pytest.raises(ValueError, match=words):
        load(*arguments, **keywords)


def test_weights_without_them_gain_some_that_change_next_to_nothing(tmp_path):
    """By every way to load weights. At 0 they would change what was trained, and that is refused."""
    model, ids = tiny(), tokens(2, 20)
    model.save_pretrained(tmp_path / "olmem")
    Olmo2ForCausalLM(Olmo2Config(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                                 intermediate_size=20)).save_pretrained(tmp_path / "olmo")  # fmt: skip
    other = OlmemConfig(**TINY | SINK_LOGITS)
    refused(OlmemForCausalLM.from_pretrained, tmp_path / "olmem", **SINK_LOGITS)
    refused(OlmemForCausalLM.from_pretrained, tmp_path / "olmem", config=other)
    refused(OlmemForCausalLM.from_olmo, tmp_path / "olmo", **SINK_LOGITS)
    refused(OlmemForCausalLM(other).load_state_dict, model.state_dict(), strict=False)
    refused(OlmemForCausalLM(other).model.load_state_dict, model.model.state_dict(), strict=False)
    few = {"sink_logit_init": -10}
    loaded = [OlmemForCausalLM.from_pretrained(tmp_path / "olmem", **few), OlmemForCausalLM(OlmemConfig(**TINY | few))]
    loaded[1].load_state_dict(model.state_dict(), strict=False)
    for each in loaded:
        assert [sinks.tolist() for sinks in sinks_of(each)] == [[-10.0] * 4] * 2
        assert_close(each.eval()(ids).logits, model(ids).logits, rtol=0, atol=2e-3)
    assert len(sinks_of(OlmemForCausalLM.from_olmo(tmp_path / "olmo", **few))) == 2


def test_weights_that_have_them_keep_them(tmp_path):
    """A part of a state dict, such as an adapter's, need not have them."""
    model = tiny(layer_types=SLIDING, **SINK_LOGITS, **MEMORY)
    model.save_pretrained(tmp_path)
    loaded = OlmemForCausalLM.from_pretrained(tmp_path)
    for own, other in zip(sinks_of(loaded), sinks_of(model), strict=True):
        assert own.abs().max() > 0 and torch.equal(own, other)
    loaded.load_state_dict({"lm_head.weight": torch.zeros(61, 24)}, strict=False)
    assert torch.equal(sinks_of(loaded)[1], sinks_of(model)[1])


def test_their_state_is_not_taken_for_that_of_a_model_without_them(tmp_path):
    """All hidden states above a layer that has them are others. The number at which they began does not matter."""
    plain, model, other = tiny(), tiny(**SINK_LOGITS), tiny(**SINK_LOGITS | {"sink_logit_init": -3.0})
    caches = {each: OlmemCache(each.config) for each in (plain, model)}
    for each, cache in caches.items():
        each(tokens(1, 5), past_key_values=cache)
        cache.save(tmp_path / f"{each is plain}.safetensors")
    for own, foreign in ((plain, model), (model, plain)):
        with pytest.raises(ValueError, match="is of another model, whose `sink_logit_init` was"):
            own(tokens(1, 1), past_key_values=caches[foreign])
        with pytest.raises(ValueError, match="`sink_logit_init` was"):
            OlmemCache.load(tmp_path / f"{foreign is plain}.safetensors", own.config)
    other(tokens(1, 1), past_key_values=OlmemCache.load(tmp_path / "False.safetensors", other.config))


def test_a_device_map_may_name_them_alone():
    """What splits modules into parts makes such maps; all of an attention goes where they go."""
    layer = "model.layers.0"
    found = place_modules({f"{layer}.self_attn.sinks": "disk", f"{layer}.self_attn.q_proj": "cpu", f"{layer}.mlp": 0})
    assert found == {f"{layer}.self_attn": "disk", f"{layer}.mlp": 0}
