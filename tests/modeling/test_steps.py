"""Captured steps on a GPU give what the same network gives as it is, whatever happens between two of them."""

import copy
import gc
import threading

import pytest
import torch
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from torch import nn

pytestmark = pytest.mark.gpu

VARIANTS = {
    "windows": {},
    "3:1 layers, grouped": {"layer_types": None, "num_key_value_heads": 2, "num_hidden_layers": 4},
    "chunks, sinks": {
        "layer_types": "chunked_attention",
        "attention_chunk_size": 7,
        "attention_chunk_lookback": 1,
        "num_sink_tokens": 2,
    },
    "memory, gates, learned sinks": {
        "num_memory_tokens": 4,
        "memory_segment_length": 11,
        "memory_gate_init": 0.3,
        "sink_logit_init": 0.0,
    },
    "key_value, memory": {
        "shared_projections": "key_value",
        "num_memory_tokens": 4,
        "memory_segment_length": 11,
        "num_sink_tokens": 2,
    },
    "memory, schemes": {
        "num_memory_tokens": 4,
        "memory_segment_length": 11,
        "position_embedding": ["xpos", "linspace", "rope"],
        "norm_placement": "peri",
        "num_key_value_heads": 2,
    },
    "memory, 3:1 layers, retrieval": {
        "layer_types": None,
        "num_hidden_layers": 6,
        "num_memory_tokens": 3,
        "memory_segment_length": 11,
        "num_sink_tokens": 2,
        "memory_gate_init": 0.3,
        "retrieval_layers": [2],
        "retrieval_top_k": 4,
        "retrieval_capacity": 40,
    },
    "key_value, grouped": {"shared_projections": "key_value", "num_key_value_heads": 2},
    "xpos, linspace, none, learned sinks": {
        "position_embedding": ["xpos", "linspace", "none"],
        "num_sink_tokens": 2,
        "sink_logit_init": 0.0,
    },
    "retrieval": {"retrieval_layers": [1], "retrieval_top_k": 4, "retrieval_capacity": 40, "num_sink_tokens": 1},
    "dynamic": {
        "layer_types": "full_attention",
        "max_position_embeddings": 32,
        "rope_parameters": {
            "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    },
}


def make_model(dtype: torch.dtype = torch.float32, **changes) -> OlmemForCausalLM:
    fields = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "layer_types": "sliding_attention",
        "sliding_window": 19,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    model = OlmemForCausalLM(OlmemConfig(**(fields | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.to("cuda", dtype)


def prompt(batch: int = 2, length: int = 30) -> dict[str, torch.Tensor]:
    """Rows of tokens, the second of which is padded on the left."""
    ids = torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:2, :11] = 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def begun(model: OlmemForCausalLM, **inputs) -> OlmemCache:
    cache = OlmemCache(model.config)
    model(**(inputs or prompt()), past_key_values=cache)
    return cache


class Twin:
    """Reads the same steps with a captured cache and, with a copy, as the network is."""

    def __init__(self, model: OlmemForCausalLM, cache: OlmemCache | None = None):
        self.model, self.cache = model, cache or begun(model)
        self.plain = copy.deepcopy(self.cache)
        self.generator = torch.Generator().manual_seed(2)

    def read(self, count: int = 1, columns: int = 1, **arguments) -> str:
        path = ""
        for _ in range(count):
            ids = torch.randint(257, (len(self.cache.seen), columns), generator=self.generator).cuda()
            found = self.model(ids, past_key_values=self.cache, **arguments).logits
            path = self.cache.step_path or ""
            self.model.model.steps.enabled = False
            expected = self.model(ids, past_key_values=self.plain, **arguments).logits
            self.model.model.steps.enabled = True
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert self.cache.get_seq_length() == self.plain.get_seq_length()
        return path


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_captured_steps_are_the_network(name, batch):
    model = make_model(**VARIANTS[name])
    twin = Twin(model, begun(model, **prompt(batch)))
    assert {twin.read() for _ in range(45)} == {"captured"}
    assert len(model.model.steps.captured) == 1
    assert len(model.model.steps.memories) == ("memory" in name)
    if "memory" in name:
        torch.testing.assert_close(twin.cache.memory, twin.plain.memory, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_right_after_everything(tmp_path):
    model = make_model(num_sink_tokens=2, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    twin = Twin(model)
    assert twin.read(3) == "captured"
    twin.read(columns=5)  # a call of many tokens between steps
    twin.read(2)
    for cache in (twin.cache, twin.plain):
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
    assert twin.read(2) == "captured"
    for cache in (twin.cache, twin.plain):
        cache.batch_repeat_interleave(2)
    twin.read(2)
    for cache in (twin.cache, twin.plain):
        cache.batch_select_indices(torch.tensor([3, 0], device="cuda"))
    twin.read(2)
    twin.cache.save(tmp_path / "state.safetensors")
    twin.cache = OlmemCache.load(tmp_path / "state.safetensors", model.config, device="cuda")
    assert twin.read(2) == "captured"
    twin.read(output_hidden_states=True)
    assert twin.read(1, attention_mask=torch.ones(2, 1, device="cuda", dtype=torch.long)) == "captured"
    assert twin.read(1, attention_mask=torch.tensor([[1], [0]], device="cuda")) == "a row is padded"
    for cache in (twin.cache, twin.plain):
        model.reset_memory(cache, rows=[0])
    twin.read(2)
    for cache in (twin.cache, twin.plain):
        cache.reset()
        model(**prompt(), past_key_values=cache)
    twin.read(2)
    twin.read(300)  # rooms double, full layers too
    assert set(key[0] for key in model.model.steps.captured) == {2, 4}


@torch.no_grad()
def test_rows_begin_segments_when_each_of_them_ends_one(monkeypatch):
    """Few at a time are captured, many are not, nor are rows that begin a stream; a memory of NaN is refused."""
    model = make_model(**VARIANTS["key_value, memory"])
    assert model.model.memory is not None
    ids = prompt(9)["input_ids"]
    padding = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7], device="cuda")
    mask = (torch.arange(30, device="cuda") >= padding[:, None]).long()
    twin = Twin(model, begun(model, input_ids=ids, attention_mask=mask))
    assert {twin.read() for _ in range(40)} == {"captured"}
    twin = Twin(model, begun(model, input_ids=ids, attention_mask=torch.ones_like(mask)))
    assert [twin.read() for _ in range(4)] == ["captured"] * 3 + ["9 rows begin segments, and their memory is written"]
    for cache in (twin.cache, twin.plain):
        model.reset_memory(cache, rows=[0])
    assert twin.read() == "a row begins a stream"
    assert {twin.read() for _ in range(9)} == {"captured"}
    model.model.memory.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="`memory` of row 1 must be finite at the end of a segment"):
        twin.read(2)
    model.model.memory.norm.weight.fill_(1)
    model.model.steps.forget()
    twin = Twin(model)
    twin.read()
    monkeypatch.setattr("olmem.decode_olmem.capture", fail)
    with pytest.warns(UserWarning, match="out of memory"):
        twin.read(22)  # of which two begin segments
    assert twin.read() == "captured"


def fail(compute, pool, device):
    raise RuntimeError("out of memory")


@torch.no_grad()
def test_weights_that_change_are_noticed():
    model = make_model()
    twin = Twin(model)
    twin.read(2)
    layer = model.model.layers[1]
    layer.mlp.up_proj.weight.mul_(2)  # in place
    assert twin.read(2) == "captured"
    layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight + 0.1)
    assert twin.read(2) == "captured"
    handle = layer.mlp.register_forward_hook(lambda module, inputs, output: output + 1)
    assert "hook" in twin.read(2)
    handle.remove()
    assert twin.read(2) == "captured"
    kept = layer.mlp.down_proj
    layer.mlp.down_proj = nn.Sequential(kept)
    assert "Sequential" in twin.read(2)
    layer.mlp.down_proj = kept
    assert twin.read(2) == "captured"
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)
    assert twin.read(2) == "captured"
    handle.remove()
    model.half()
    twin = Twin(model)
    twin.read(0)
    model(torch.ones(2, 1, dtype=torch.long, device="cuda"), past_key_values=twin.cache)
    assert twin.cache.step_path == "captured"


@torch.no_grad()
def test_caches_and_models_do_not_disturb_each_other():
    first, second = make_model(), make_model(sliding_window=11)
    twins = [Twin(first), Twin(first), Twin(second)]
    for _ in range(4):
        for twin in twins:
            assert twin.read() == "captured"
    assert len(first.model.steps.captured) == len(second.model.steps.captured) == 1


def test_threads_take_turns():
    model, errors = make_model(), []
    with torch.no_grad():
        caches = [begun(model, **prompt(2, 20 + index)) for index in range(4)]
        expected = []
        model.model.steps.enabled = False
        for cache in map(copy.deepcopy, caches):
            ids = torch.ones(2, 1, dtype=torch.long, device="cuda")
            for _ in range(20):
                ids = model(ids, past_key_values=cache).logits.argmax(-1)
            expected.append(ids)
        model.model.steps.enabled = True

    def write(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            ids = torch.ones(2, 1, dtype=torch.long, device="cuda")
            for _ in range(20):
                ids = model(ids, past_key_values=caches[index]).logits.argmax(-1)
            torch.cuda.current_stream().synchronize()
            if not torch.equal(ids, expected[index]):
                errors.append(index)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    "name", ["windows", "3:1 layers, grouped", "memory, gates, learned sinks", "key_value, memory"]
)
def test_generate_writes_what_the_network_writes(name):
    model = make_model(**VARIANTS[name])
    for arguments in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 9, "temperature": 0.7}):
        found = []
        for enabled in (True, False):
            model.model.steps.enabled = enabled
            torch.manual_seed(3)
            found.append(model.generate(**prompt(), max_new_tokens=40, pad_token_id=0, **arguments))
        assert torch.equal(*found), arguments


@torch.no_grad()
def test_an_error_in_a_capture_leaves_a_right_cache(monkeypatch):
    model = make_model()
    twin = Twin(model)
    monkeypatch.setattr("olmem.decode_olmem.capture", fail)
    with pytest.warns(UserWarning, match="out of memory"):
        assert "out of memory" in twin.read(3)


@torch.no_grad()
def test_a_new_cache_costs_neither_a_capture_nor_memory():
    model = make_model()
    ids = torch.ones(1, 40, dtype=torch.long, device="cuda")

    def write() -> None:
        model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)

    write()
    write()
    gc.collect()
    before, graphs = torch.cuda.memory_allocated(), next(iter(model.model.steps.captured.values())).graphs
    for _ in range(20):
        write()
    gc.collect()
    assert next(iter(model.model.steps.captured.values())).graphs is graphs
    assert torch.cuda.memory_allocated() <= before


@torch.no_grad()
def test_room_that_is_used_up_is_an_error():
    model = make_model(layer_types="full_attention")
    cache = OlmemCache(model.config, max_length=33)
    model(**prompt(), past_key_values=cache)
    ids = torch.ones(2, 1, dtype=torch.long, device="cuda")
    for _ in range(3):
        model(ids, past_key_values=cache)
    assert cache.step_path == "captured"
    with pytest.raises(ValueError, match="`max_length` must be at least 34"):
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_dropout_is_not_captured():
    model = make_model(residual_dropout=0.5).train()
    cache = begun(model)
    model(torch.ones(2, 1, dtype=torch.long, device="cuda"), past_key_values=cache)
    assert "dropout" in cache.step_path


def test_gradients_are_not_captured():
    model = make_model()
    with torch.no_grad():
        cache = begun(model)
    logits = model(torch.ones(2, 1, dtype=torch.long, device="cuda"), past_key_values=cache).logits
    assert "gradients" in cache.step_path and logits.requires_grad


@torch.no_grad()
def test_a_store_that_selects_is_not_captured():
    model = make_model(**VARIANTS["retrieval"], retrieval_admission="learned")
    cache = begun(model)
    model(torch.ones(2, 1, dtype=torch.long, device="cuda"), past_key_values=cache)
    assert cache.step_path == "a store that selects is not captured, because `retrieval_admission` is 'learned'"
