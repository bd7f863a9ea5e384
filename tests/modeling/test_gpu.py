"""What only a CUDA device shows: its kernels give what the CPU gives."""

import pytest
import torch
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM

pytestmark = pytest.mark.gpu


def make_model(**changes):
    torch.manual_seed(0)
    config = OlmemConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        sliding_window=19,
        **({"num_key_value_heads": 4} | changes),  # torch 2.11 cannot compile flex attention for 2, nor for Olmo3
    )
    model = OlmemForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.fixture
def model():
    return make_model()


STREAMS = {
    "sinks": {"layer_types": "sliding_attention", "num_sink_tokens": 3},
    "chunks": {"layer_types": "chunked_attention", "attention_chunk_size": 7, "attention_chunk_lookback": 1},
    "mixed": {"num_sink_tokens": 2},
    "grouped": {"num_key_value_heads": 2},
    "one tensor": {"shared_projections": "key_value", "num_sink_tokens": 2},
    "schemes": {"position_embedding": ["xpos", "linspace", "none", "xpos"], "num_sink_tokens": 2},
    "one tensor, schemes": {
        "shared_projections": "query_key_value",
        "position_embedding": ["xpos", "linspace", "none", "rope"],
    },
}


@pytest.fixture
def batch():
    """Two rows of 67 tokens, longer than the window; the second has 11 of left padding."""
    input_ids = torch.randint(257, (2, 67), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :11] = 0
    return input_ids, attention_mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_logits_are_those_of_the_cpu(model, batch, implementation):
    input_ids, attention_mask = batch
    expected = model(input_ids, attention_mask=attention_mask).logits
    model = model.cuda()
    model.set_attn_implementation(implementation)
    logits = model(input_ids.cuda(), attention_mask=attention_mask.cuda()).logits.cpu()
    real = attention_mask.bool()
    assert (logits - expected)[real].abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_cpu(model, batch):
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(batch[0], **options)
    assert model.cuda().generate(batch[0].cuda(), **options).cpu().tolist() == expected.tolist()


def test_half_precision_trains(model, batch):
    model = model.cuda().train()
    model.gradient_checkpointing_enable()
    input_ids = batch[0].cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_a_compiled_forward_is_the_same(model, batch):
    model = model.cuda()
    input_ids = batch[0].cuda()
    expected = model(input_ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    assert (compiled(input_ids, use_cache=False).logits - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("stream", STREAMS)
@torch.no_grad()
def test_a_stream_is_that_of_the_cpu(batch, stream, tmp_path):
    """In pieces, left-padded; half of it after the state went through a file from one device to the other."""
    model = make_model(**STREAMS[stream])
    input_ids, attention_mask = batch
    expected = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
    found, device = [], "cuda"
    cache = OlmemCache(model.config)
    model.to(device)
    for start, stop in ((0, 24), (24, 25), (25, 26), (26, 31), (31, 40), *((i, i + 1) for i in range(40, 67))):
        if start == 40:
            cache.save(tmp_path / "cache")
            device = "cpu"
            model.to(device)
            cache = OlmemCache.load(tmp_path / "cache", model.config, device)
        part, mask = input_ids[:, start:stop].to(device), attention_mask[:, :stop].to(device)
        found.append(model(part, attention_mask=mask, past_key_values=cache).logits.cpu())
    real = attention_mask.bool()
    assert (torch.cat(found, dim=1) - expected)[real].abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("stream", STREAMS)
@torch.no_grad()
def test_compiled_steps_write_the_same_and_compile_once(batch, stream):
    """`generate` compiles a step on its own where every layer is bounded."""
    model = make_model(**STREAMS[stream]).cuda()
    bounded = "full_attention" not in model.config.layer_types
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    for mask in (torch.ones_like(batch[1]), batch[1]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        inputs = {"input_ids": batch[0].cuda(), "attention_mask": mask.cuda()}
        expected = model.generate(**inputs, **options, disable_compile=True)
        assert expected.past_key_values.is_compileable is bounded
        found = model.generate(**inputs, **options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        if bounded:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
