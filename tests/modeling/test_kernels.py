"""A step by kernels computes what the network computes: interpreted on a CPU here, on a GPU in test_steps."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from olmem.captured_olmem import Captured
from olmem.compat_olmem import can_capture
from olmem.decode_olmem import PARTS, CapturedMemory, CapturedStep, Watch
from olmem.modeling_olmem import OlmemGate
from torch import nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels run compiled where there is a GPU (test_steps)", allow_module_level=True)
from olmem.kernels_olmem import Blocks, KernelOperations

CPU = torch.device("cpu")
VARIANTS = {
    "grouped, sinks": {"num_key_value_heads": 2, "num_sink_tokens": 3, "qk_norm": "head", "sink_logit_init": 0.0},
    "three types": {
        "layer_types": ["sliding_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 5,
        "attention_chunk_lookback": 1,
        "num_sink_tokens": 2,
        "num_hidden_layers": 3,
    },
    "memory, gates": {
        "num_memory_tokens": 3,
        "memory_segment_length": 50,
        "memory_gate_init": 0.3,
        "num_sink_tokens": 2,
        "sink_logit_init": 0.0,
        "norm_placement": "pre",
        "norm_type": "layer",
    },
    "key_value, sinks, memory": {
        "shared_projections": "key_value",
        "num_memory_tokens": 3,
        "memory_segment_length": 50,
        "num_sink_tokens": 2,
        "attention_bias": True,
    },
    "key_value, grouped": {"shared_projections": "key_value", "num_key_value_heads": 2, "num_sink_tokens": 2},
    "query_key_value, xpos": {
        "shared_projections": "query_key_value",
        "sink_logit_init": 0.0,
        "position_embedding": ["xpos", "rope"],
        "num_sink_tokens": 2,
    },
    "query_key": {"shared_projections": "query_key", "norm_placement": "peri", "norm_type": "layer_plain"},
    "value_difference": {"shared_projections": "value_difference", "num_sink_tokens": 1, "clip_qkv": 0.5},
    "xpos, linspace": {"position_embedding": ["xpos", "linspace"], "num_sink_tokens": 2, "sink_logit_init": 0.0},
    "key_value, linspace, none": {"shared_projections": "key_value", "position_embedding": ["linspace", "none"]},
    "clip of the rotated": {"clip_qkv": 0.5, "clip_qkv_stage": "rotary", "qk_norm": "none", "head_dim": 20},
    "parallel, elephant": {"norm_placement": "parallel", "hidden_act": "elephant"},
    "retrieval": {
        "retrieval_layers": [1],
        "retrieval_top_k": 3,
        "retrieval_capacity": 12,
        "num_sink_tokens": 2,
        "retrieval_gate_init": 0.5,
        "sink_logit_init": 0.0,
        "hidden_act": "gelu",
    },
    "retrieval, key_value": {
        "retrieval_layers": [0],
        "retrieval_top_k": 3,
        "retrieval_capacity": 12,
        "shared_projections": "key_value",
        "retrieval_gate_init": 0.5,
    },
}


def make_model(**changes) -> OlmemForCausalLM:
    fields = {
        "vocab_size": 31,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "layer_types": "sliding_attention",
        "sliding_window": 9,
        "head_dim": 12,
    }
    torch.manual_seed(1)
    model = OlmemForCausalLM(OlmemConfig(**(fields | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever a kernel does not write is NaN."""

    def new_empty(like, *shape, dtype=None, **_):
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or like.dtype
        return torch.full(size, torch.nan if dtype.is_floating_point else 1, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))


def step_by_kernels(model: OlmemForCausalLM, cache: OlmemCache, captured: CapturedStep, ids: torch.Tensor):
    network = model.model

    def compute(hidden_states, plans, states, part):
        last = network.run_layers(hidden_states, plans, states, Captured(set()), part=part)
        return plans[0].operations.norm(network.norm, last) if part.stop is None else last

    cache.reserve_step()
    for part in PARTS:
        captured.table.point_at(cache, part)
    captured.embeddings.copy_(network.embed_tokens(ids))
    captured.seen.copy_(cache.seen)
    last = captured.compute(compute)
    cache.count_step()
    return captured.operations.products([model.lm_head], last)[0]


def first_is_quick(cases: list[tuple]) -> list:
    """Interpreted kernels are slow: `make slow` runs all cases but the first."""
    return [pytest.param(*case, marks=pytest.mark.slow if number else ()) for number, case in enumerate(cases)]


# A third of the variants is read in a batch too.
CASES = [(name, batch) for batch in (1, 3) for name in [*VARIANTS][::batch]]


@pytest.mark.parametrize(("name", "batch"), first_is_quick(CASES))
@torch.no_grad()
def test_a_step_by_kernels_is_a_step_of_the_network(name, batch, request):
    """Logits and caches agree beyond the windows, and where a row was padded on the left."""
    model = make_model(**VARIANTS[name])
    ids = torch.randint(31, (batch, 25), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1:2, :4] = 0
    expected = OlmemCache(model.config)
    model(ids, attention_mask=mask, past_key_values=expected)
    cache = copy.deepcopy(expected)
    request.getfixturevalue("poisoned")
    operations = KernelOperations(CPU, torch.float32)
    captured = CapturedStep(model.config, model.model.rotary_emb, operations, batch, CPU, torch.float32)
    for column in range(2):
        new = ids[:, column : column + 1]
        logits = step_by_kernels(model, cache, captured, new)
        torch.testing.assert_close(logits, model(new, past_key_values=expected).logits, rtol=1e-5, atol=2e-5)
    length = cache.get_seq_length()
    for own, other in zip(cache.layers, expected.layers, strict=True):
        for buffer, wanted in zip(own.used(length).values(), other.used(length).values(), strict=True):
            torch.testing.assert_close(buffer, wanted, rtol=1e-5, atol=2e-5)


MEMORY = {"num_memory_tokens": 3, "memory_segment_length": 13}
BOUNDARIES = {
    "sinks, gates": MEMORY
    | {"num_sink_tokens": 2, "memory_gate_init": 0.3, "num_key_value_heads": 2, "sink_logit_init": 0.0},
    "three types": MEMORY | VARIANTS["three types"] | {"norm_placement": "pre", "norm_type": "layer"},
    "gates, xpos, linspace, none": MEMORY
    | {
        "position_embedding": ["xpos", "linspace", "none"],
        "num_hidden_layers": 3,
        "memory_gate_init": -0.4,
        "sink_logit_init": 0.0,
    },
    "key_value, sinks, gates": MEMORY
    | {"shared_projections": "key_value", "num_sink_tokens": 2, "memory_gate_init": 0.3, "norm_placement": "parallel"},
    "query_key_value, xpos, linspace": MEMORY
    | {"shared_projections": "query_key_value", "position_embedding": ["xpos", "linspace"], "num_sink_tokens": 1},
    "many queries": {"num_memory_tokens": 19, "memory_segment_length": 13, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", first_is_quick([(name,) for name in BOUNDARIES]))
@torch.no_grad()
def test_a_segment_that_begins_by_kernels_is_one_of_the_network(name, poisoned):
    """One row of two has its memory written and read, the other goes on in its segment."""
    model = make_model(**BOUNDARIES[name])
    for gate in (each for each in model.modules() if isinstance(each, OlmemGate)):
        torch.nn.init.normal_(gate.logits)
    ids = torch.randint(31, (2, 26), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # so that the second row begins a segment
    expected = OlmemCache(model.config)
    model(ids, attention_mask=mask, past_key_values=expected)
    cache = copy.deepcopy(expected)
    operations = KernelOperations(CPU, torch.float32)
    assert model.model.memory is not None
    norm, rotary = model.model.memory.norm, model.model.rotary_emb
    captured = CapturedMemory(model.config, rotary, operations, norm, CPU, torch.float32)
    captured.table.point_at(cache, slice(0, None))
    captured.memory.copy_(cache.memory[1, :, None])
    captured.seen.copy_(cache.seen[1:])
    captured.row.fill_(1)

    def compute(hidden_states, plans, states, part):
        return model.model.run_layers(hidden_states, plans, states, Captured(set()), part=part)

    written = captured.compute(compute)
    cache.remember(cache.memory.index_copy(0, captured.row, written.transpose(0, 1)))
    step = CapturedStep(model.config, rotary, operations, 2, CPU, torch.float32)
    logits = step_by_kernels(model, cache, step, ids[:, :1])
    torch.testing.assert_close(logits, model(ids[:, :1], past_key_values=expected).logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(cache.memory, expected.memory, rtol=1e-5, atol=2e-5)
    length = cache.get_seq_length()
    for own, other in zip(cache.layers, expected.layers, strict=True):
        for buffer, wanted in zip(own.used(length).values(), other.used(length).values(), strict=True):
            torch.testing.assert_close(buffer, wanted, rtol=1e-5, atol=2e-5)


def test_kernels_are_compiled_side_by_side_and_not_launched(monkeypatch):
    class Kernel:
        def __init__(self):
            self.compiled, self.launched = [], []

        def warmup(self, *arguments, grid, num_warps):
            if "wrong" in arguments:
                raise RuntimeError("cannot be compiled")
            self.compiled.append((*arguments, grid, num_warps))
            return SimpleNamespace(run=None)

        def __getitem__(self, grid):
            return lambda *arguments, num_warps: self.launched.append((*arguments, grid, num_warps))

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel, operations, states = Kernel(), KernelOperations(CPU, torch.float32), torch.ones(3)
    calls = [(states, 5), (states + 1, 5), (states, 2**40), (states, 2**41), (states.half(), 5)]

    def launch():
        for arguments in calls:
            operations.launch(kernel, (2, 3), *arguments, num_warps=4)

    operations.compile(launch)
    assert len(kernel.compiled) == 3 and not kernel.launched
    calls.append(("wrong",))
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        operations.compile(launch)
    calls.pop()
    launch()
    assert len(kernel.launched) == len(calls) and kernel.launched[0][1:] == (5, (2, 3), 4)


@pytest.mark.parametrize("rows", [2, 19])
def test_few_rows_are_multiplied_in_half_precision(rows, poisoned):
    operations = KernelOperations(CPU, torch.float16)
    torch.manual_seed(0)
    first, second = nn.Linear(75, 37, bias=True).half(), nn.Linear(75, 5, bias=True).half()
    states = torch.randn(rows, 1, 75).half()
    with torch.no_grad():
        found = operations.products([first, second], states)
        gated = operations.gated(nn.SiLU(), first, first, states)
        for output, linear in zip(found, (first, second), strict=True):
            torch.testing.assert_close(output, linear(states), rtol=2e-3, atol=2e-3)
        plain = nn.functional.linear(states, first.weight)
        torch.testing.assert_close(gated, nn.functional.silu(plain) * plain, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("kib", [48, 64, 99, 227])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_a_device(kib, itemsize):
    blocks = Blocks(kib * 1024, 40)
    for width in (64, 128, 256):
        for tensors in (1, 2):
            keys, stages = blocks.attention(width, tensors, itemsize)
            assert keys >= 16 and stages >= 1
            assert stages * keys * width * itemsize * tensors <= kib * 1024
    for count, width in ((257, 96), (4096, 11008), (100278, 4096)):
        rows, columns, stages = blocks.product(count, width, itemsize)
        assert stages >= 1 and stages * rows * columns * itemsize <= kib * 1024
    for rows in (2, 16, 33, 64) if itemsize == 2 else ():  # several rows in float32 are torch's products
        for weights in (1, 2):
            padded, block, columns, stages = blocks.few(rows, weights, itemsize)
            assert padded >= max(rows, 16) and columns >= 16
            assert stages * (weights * block + padded) * columns * itemsize <= kib * 1024
    assert blocks.shares(32, 4096, 512) >= 8 and blocks.shares(1024, 4096, 2048) == 2
    assert blocks.shares(8, 64, 512) == 1 and 1 <= blocks.shares(4096, None, 512) <= blocks.shares(8, None, 512) <= 64


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 6), (9, 0)])
def test_kernels_are_for_devices_that_have_their_dtype(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert (can_capture(device, torch.bfloat16) is None) == (capability >= (8, 0))
    assert (can_capture(device, torch.float16) is None) == (capability >= (7, 0))


CHANGES = {
    "a weight replaced": lambda layer: setattr(layer.mlp.up_proj, "weight", nn.Parameter(torch.ones(44, 36))),
    "a weight's values replaced": lambda layer: setattr(layer.mlp.up_proj.weight, "data", torch.ones(44, 36)),
    "a module replaced": lambda layer: setattr(layer.mlp, "up_proj", copy.deepcopy(layer.mlp.up_proj)),
    "a bias added": lambda layer: setattr(layer.mlp.up_proj, "bias", nn.Parameter(torch.ones(44))),
    "a weight cut": lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data[:, :30]),
    "a compiled module": lambda layer: layer.mlp.compile(),
    "a hook": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "another forward": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "a hook before": lambda layer: layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: None),
    "another eps": lambda layer: setattr(layer.post_attention_layernorm, "eps", 0.1),
    "another scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.1),
    "a module taken away": lambda layer: delattr(layer, "mlp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_captured_is_watched(change):
    layer = make_model().model.layers[0]
    watch = Watch([layer])
    assert watch.holds()
    layer.mlp.up_proj.weight.data.add_(1)
    assert watch.holds(), "weights that are changed in place are read by the next replay"
    CHANGES[change](layer)
    assert not watch.holds()


class Adapter(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states) + 1


REASONS = {
    "Adapter": lambda layer: setattr(layer.mlp, "up_proj", Adapter(layer.mlp.up_proj)),
    "biases of a OlmemMLP": CHANGES["a bias added"],
    "biases of a OlmemAttention": lambda layer: setattr(layer.self_attn.k_proj, "bias", nn.Parameter(torch.ones(48))),
    "biases of a LayerNorm": lambda layer: layer.mlp.register_module("norm", nn.LayerNorm(36, bias=False)),
    "hook": CHANGES["a hook"],
    "another `forward`": CHANGES["another forward"],
    "several devices or dtypes": lambda layer: layer.mlp.half(),
    "not contiguous": lambda layer: setattr(layer.mlp.up_proj, "weight", nn.Parameter(torch.ones(36, 44).T)),
    "not on a GPU": lambda layer: None,
}


@pytest.mark.parametrize("words", REASONS)
def test_what_cannot_be_captured_says_why(words):
    layer = make_model().model.layers[0]
    REASONS[words](layer)
    assert words in (Watch([layer]).reason() or "")


@torch.no_grad()
def test_a_cache_says_which_way_a_call_went():
    model = make_model()
    cache = OlmemCache(model.config)
    model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert cache.step_path == "the model is not on a GPU"


def test_a_copy_of_a_model_has_captured_nothing():
    model = make_model()
    model.model.steps.captured["key"] = SimpleNamespace()
    assert not copy.deepcopy(model).model.steps.captured
