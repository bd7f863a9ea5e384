"""What only a CUDA device shows: its kernels give what the CPU gives."""

import pytest
import torch
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM

pytestmark = pytest.mark.gpu
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


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


@torch.no_grad()
def test_a_stream_object_writes_what_it_does_on_the_cpu(batch, tmp_path):
    """Its steps are captured while all rows write, and it goes on from the other device's file."""
    model, options = make_model(**STREAMS["sinks"]), {"do_sample": False, "pad_token_id": 0}
    rows = [batch[0][0].tolist(), batch[0][1, 11:].tolist()]
    written, paths = [], []
    for device in ("cpu", "cuda"):
        stream = model.to(device).stream()
        stream.read(rows)
        written.append(list(stream.write(30, **options)))
        paths.append(stream.cache.step_path)
        stream.save(tmp_path / device)
    assert written[0] == written[1] and paths[1] == "captured"
    end, more = written[0][5][1], []
    for path in ("cuda", "cpu"):
        stream = model.to("cuda").stream(path=tmp_path / path)
        stream.read([None, [7, 8]])
        more.append(list(stream.write(30, **options, eos_token_id=end)))
    assert more[0] == more[1]


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
def test_generation_writes_the_same_without_a_compiler(batch, stream):
    """A compile takes longer than most texts, so `generate()` does none with an OlmemCache."""
    model = make_model(**STREAMS[stream])
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    for mask in (torch.ones_like(batch[1]), batch[1]):
        expected = model.cpu().generate(batch[0], attention_mask=mask, **options)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = model.cuda().generate(batch[0].cuda(), attention_mask=mask.cuda(), **options)
        assert not found.past_key_values.is_compileable
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("stream", STREAMS)
@torch.no_grad()
def test_steps_that_a_user_compiles_are_the_same_and_compile_once(batch, stream):
    model = make_model(**STREAMS[stream]).cuda()
    ids = batch[0][:1].cuda()
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, cache = torch.compile(model, fullgraph=True), OlmemCache(model.config, max_length=ids.shape[1])
    model(ids[:, :20], past_key_values=cache)
    found = [compiled(ids[:, [index]], past_key_values=cache).logits for index in range(20, ids.shape[1])]
    assert_same(torch.cat(found, dim=1), expected[:, 20:], torch.float32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


MEMORY = {"num_memory_tokens": 3, "memory_segment_length": 13}
RETRIEVAL = {"retrieval_layers": [0, 2], "retrieval_top_k": 4, "retrieval_capacity": 24}
MEMORIES = {
    "memory": MEMORY,
    "retrieval": RETRIEVAL,
    "selecting": RETRIEVAL | {"retrieval_admission": "learned"},
    "both with sinks": MEMORY | RETRIEVAL | {"layer_types": "sliding_attention", "num_sink_tokens": 3},
    "both in one tensor": MEMORY | RETRIEVAL | {"shared_projections": "key_value", "num_sink_tokens": 2},
}
# Of all that a model computes: by how much what is the same may be apart. A half-precision score may choose otherwise.
APART = {torch.float32: 2e-4, torch.bfloat16: 0.1}
memories = pytest.mark.parametrize("memory", MEMORIES)
dtypes = pytest.mark.parametrize("dtype", APART, ids=["float32", "bfloat16"])


def remembering(memory: str, dtype: torch.dtype = torch.float32, **changes):
    model = make_model(**MEMORIES[memory] | changes)
    for name, parameter in model.named_parameters():
        if name.endswith("retrieval_gate.logits"):
            torch.nn.init.constant_(parameter, -1.0)
        if name.endswith("retrieval_score.weight"):
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return model.to(dtype)


def assert_same(found, expected, dtype):
    assert found.isfinite().all()
    assert (found.float() - expected.float()).norm() <= APART[dtype] * expected.float().norm()


def read_in_pieces(model, batch, **kwargs):
    """Logits of a left-padded batch, and the cache that it was read with."""
    input_ids, attention_mask = (each.to(model.device) for each in batch)
    cache, found, stop = OlmemCache(model.config, **kwargs), [], 0
    for size in (24, 1, 1, 5, 9, *[1] * 12, 15):
        start, stop = stop, stop + size
        mask = attention_mask[:, :stop]
        found.append(model(input_ids[:, start:stop], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(found, dim=1).cpu(), cache


@memories
@dtypes
@torch.no_grad()
def test_memory_is_the_same_whole_and_in_pieces(batch, memory, dtype):
    """And in float32 what it is on a CPU."""
    model, real = remembering(memory, dtype), batch[1].bool()
    on_cpu = model(batch[0], attention_mask=batch[1], use_cache=False).logits
    model.cuda()
    whole = model(batch[0].cuda(), attention_mask=batch[1].cuda(), use_cache=False).logits.cpu()
    assert_same(read_in_pieces(model, batch)[0][real], whole[real], dtype)
    if dtype == torch.float32:
        assert_same(whole[real], on_cpu[real], dtype)


@pytest.mark.parametrize("memory", [name for name in MEMORIES if name != "memory"])
@dtypes
@torch.no_grad()
def test_a_store_in_host_memory_gives_the_same(batch, memory, dtype, tmp_path):
    """Also once it has come from a file."""
    model, real = remembering(memory, dtype).cuda(), batch[1].bool()
    expected, on_gpu = read_in_pieces(model, batch)
    found, cache = read_in_pieces(model, batch, retrieval_device="cpu")
    assert_same(found[real], expected[real], dtype)
    for each, kind in ((on_gpu, "cuda"), (cache, "cpu")):
        layer = each.layers[0]
        assert {layer.buffers[name].device.type for name in layer.store_names} == {kind}
        assert layer.buffers["keys"].device.type == "cuda"
    cache.save(tmp_path / "cache")
    loaded = OlmemCache.load(tmp_path / "cache", model.config, "cuda", retrieval_device="cpu")
    last = [model(batch[0][:, :9].cuda(), past_key_values=each).logits for each in (on_gpu, cache, loaded)]
    assert loaded.layers[0].buffers["store_keys"].device.type == "cpu"
    for each in last[1:]:
        assert_same(each, last[0], dtype)


@memories
@dtypes
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_memory_goes_on_while_generating(batch, memory, dtype, padded):
    """What is written is what the whole text, read at once, has as likeliest; in float32 also a CPU's tokens."""
    model = remembering(memory, dtype)
    mask = batch[1] if padded else torch.ones_like(batch[1])
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(batch[0], attention_mask=mask, **options) if dtype == torch.float32 else None
    model.cuda()
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(batch[0].cuda(), attention_mask=mask.cuda(), **options)
    assert isinstance(found.past_key_values, OlmemCache)
    assert expected is None or found.sequences.tolist() == expected.tolist()
    mask = torch.nn.functional.pad(mask, (0, 40), value=1).cuda()
    whole = model(found.sequences, attention_mask=mask, use_cache=False).logits[:, -41:-1]
    assert_same(torch.stack(found.logits, dim=1), whole, dtype)


@memories
@dtypes
def test_memory_trains_the_same_with_layers_computed_twice(batch, memory, dtype):
    """In float32 also with the gradients of a CPU."""
    model = remembering(memory, dtype, memory_bptt_segments=3).train()

    def gradients():
        model.zero_grad()
        input_ids, attention_mask = (each.to(model.device) for each in batch)
        labels = input_ids.where(attention_mask.bool() & attention_mask.bool().roll(1, dims=1), -100)
        model(input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad.clone().cpu() for name, parameter in model.named_parameters()}

    expected = [gradients()] if dtype == torch.float32 else []
    model.cuda()
    expected.append(gradients())
    model.gradient_checkpointing_enable()
    found = gradients()
    for each in expected:
        for name, gradient in each.items():
            assert found[name].isfinite().all()
            apart = (found[name].float() - gradient.float()).norm()
            assert apart <= 10 * APART[dtype] * gradient.float().norm() + 1e-6, name


SPLIT = STREAMS | {f"memory: {name}": changes for name, changes in MEMORIES.items()}


@pytest.mark.parametrize("changes", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("first", ["cpu", pytest.param(1, marks=several)], ids=["a CPU and a GPU", "two GPUs"])
def test_layers_on_two_devices(batch, first, changes, tmp_path):
    """Layers that a device map splits, with a cache in pieces and steps, in `generate()` and with gradients."""
    input_ids, attention_mask = batch
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    names = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": 0, "lm_head": 0}
    names |= {f"model.layers.{index}": first if index < 2 else 0 for index in range(4)}
    names |= {"model.memory": first} if "num_memory_tokens" in changes else {}
    split = OlmemForCausalLM.from_pretrained(tmp_path, device_map=names).eval()
    given, real = [each.to(first) for each in batch], attention_mask.bool()
    cache = OlmemCache(split.config)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
        found, sizes = [], [30, 1, 29, *[1] * 7]
        for ids, mask in zip(*(each.split(sizes, dim=1) for each in given), strict=True):
            found.append(split(ids, attention_mask=mask, past_key_values=cache).logits.cpu())
        options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
        written = split.generate(given[0], attention_mask=given[1], **options)
        assert written.tolist() == model.generate(input_ids, attention_mask=attention_mask, **options).tolist()
    torch.testing.assert_close(torch.cat(found, dim=1)[real], expected[real], rtol=1e-3, atol=1e-3)
    for more in ({"use_cache": False}, {"past_key_values": OlmemCache(split.config)}):
        logits = split(given[0], attention_mask=given[1], **more).logits.cpu()
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-3)
        logits[real].square().mean().backward()
    on_gpu = [weight for weight in split.parameters() if weight.device.type == "cuda"]  # accelerate offloads others
    assert on_gpu and all(weight.grad is not None and weight.grad.isfinite().all() for weight in on_gpu)
    split.reset_memory(cache, torch.tensor([0]))
