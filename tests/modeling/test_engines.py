"""What vLLM's and SGLang's backends for Transformers' models do to a model, step by step, and to Olmo3 beside it.

They make the base model on the meta device, with an attention function of their own name. They put their own linear
layers and norms in the place of the model's, and load weights by name. Each call is one row of the tokens of many
requests, with their positions; what a request has said is kept by attention instances of the engine, one a layer, that
the model hands down to its layers. A window is that of the configuration, by the layer's type.
"""

import re
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from modeling.helpers import CHUNKS, MEMORIES, SINK_LOGITS, SINKS, SLIDING, TINY, WINDOW, shake, tiny, tokens
from olmem import OlmemConfig, OlmemForCausalLM
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, Olmo3Config, Olmo3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CALLS = 16
ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
ROPE["full_attention"] = ROPE["sliding_attention"]
SAME: dict[str, Any] = {name: value for name, value in TINY.items() if name != "initializer_range"}
SAME |= {"rope_parameters": ROPE, "rms_norm_eps": 1e-5, "pad_token_id": None, "eos_token_id": None}


class Attention:
    """An engine's attention of one layer, which keeps the keys and values of all requests."""

    def __init__(self, config: Any, index: int):
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.window = config.sliding_window if config.layer_types[index] == SLIDING else None
        self.kept: dict[int, list[torch.Tensor]] = {}

    def __call__(self, query, key, value, requests: Iterable[tuple[int, int]]) -> torch.Tensor:
        """Returns the output (N, H · D) of the tokens of requests, each given as its name and how many it has."""
        outputs, start = [], 0
        for name, count in requests:
            part = slice(start, start + count)
            new = [states[part].view(count, self.kv_heads, self.size).transpose(0, 1) for states in (key, value)]
            if name in self.kept:
                new = [torch.cat(each, dim=1) for each in zip(self.kept[name], new, strict=True)]
            self.kept[name] = new
            length = new[0].shape[1]
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            if self.window:
                seen = seen.triu(1 - self.window)
            own = query[part].view(count, self.heads, self.size).transpose(0, 1)
            output = nn.functional.scaled_dot_product_attention(own, *new, seen[-count:], enable_gqa=True)
            outputs.append(output.transpose(0, 1).reshape(count, -1))
            start += count
        return torch.cat(outputs)


class EngineLinear(nn.Module):
    """An engine's own layer, which has the parameters of a linear layer by name."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, states):
        return nn.functional.linear(states, self.weight, self.bias)


class EngineNorm(nn.Module):
    """An engine's own RMS norm."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, getattr(norm, "eps", None) or norm.variance_epsilon

    def forward(self, states):
        return self.weight * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps))


@contextmanager
def on_meta_without_buffers():
    """Parameters are made on the meta device, and buffers where they are computed."""
    register = nn.Module.register_parameter

    def register_empty(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_empty)
        yield


class Engine:
    """An engine that serves a model.

    Args:
        model: whose weights are loaded by their names, as a checkpoint's.
        name: of the attention function, "vllm" or "sglang".
    """

    def __init__(self, model: Any, name: str):
        config = type(model.config)(**{**model.config.to_dict(), "attn_implementation": name})
        config._attn_implementation = name
        with on_meta_without_buffers():
            self.model = AutoModel.from_config(config)
        assert self.model.is_backend_compatible()
        assert all(getattr(module, "is_causal", True) for module in self.model.modules())
        self.replace(self.model)
        for parameter_name, weight in model.state_dict().items():
            *path, last = parameter_name.removeprefix("model.").split(".")
            if parameter_name.startswith("model."):
                setattr(self.model.get_submodule(".".join(path)), last, nn.Parameter(weight))
        assert not any(parameter.is_meta for parameter in self.model.parameters())
        self.head, self.name = model.lm_head, name
        self.instances = {index: Attention(config, index) for index in range(config.num_hidden_layers)}
        self.lengths: dict[int, int] = {}

    def replace(self, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, child_name, EngineLinear(child))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(module, child_name, EngineNorm(child))
            else:
                self.replace(child)

    @torch.no_grad()
    def read(self, requests: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Logits (vocab_size,) of the last token of each request, all read as one row."""
        counts = [(name, len(ids)) for name, ids in requests.items()]
        positions = [torch.arange(count) + self.lengths.get(name, 0) for name, count in counts]
        self.lengths |= {name: self.lengths.get(name, 0) + count for name, count in counts}
        hidden = self.model(
            input_ids=torch.cat([*requests.values()])[None],
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            attention_instances=self.instances,
            forward_batch=counts,
            return_dict=False,
        )[0][0]
        ends = torch.tensor([count for _, count in counts]).cumsum(0) - 1
        return [*self.head(hidden[ends])]


def engine_attention(
    module, query, key, value, attention_mask, scaling=None, attention_instances=None, forward_batch=None, **_
):
    """The engines' attention function, but for what vLLM knows without a keyword."""
    assert attention_mask is None and scaling == module.head_dim**-0.5
    count = query.shape[-2]
    flat = [states.transpose(1, 2).reshape(count, -1) for states in (query, key, value)]
    return attention_instances[module.layer_idx](*flat, forward_batch), None


@pytest.fixture(params=["vllm", "sglang"])
def name(request, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, request.param, engine_attention)
    return request.param


def served(engine: Engine, *prompts: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Texts of requests, each of which comes a call later than the one before, and the logits of all calls.

    A prompt is read in pieces of 5 tokens, beside those that others write.
    """
    texts, found = [*prompts], []
    for call in range(CALLS):
        pieces = {index: texts[index][engine.lengths.get(index, 0) :][:5] for index in range(min(call + 1, len(texts)))}
        for index, logits in zip(pieces, engine.read(pieces), strict=True):
            found.append(logits)
            if engine.lengths[index] == len(texts[index]):
                texts[index] = torch.cat((texts[index], logits.argmax()[None]))
    return texts, found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}], ids=str)
def test_an_engine_serves_olmem_as_it_serves_olmo3(name, changes):
    """With the same bits, and with what the model itself writes, beyond the window."""
    prompts = tokens(3 * WINDOW), tokens(WINDOW, seed=1), tokens(1, seed=2)
    model, olmo3 = (
        shake(OlmemForCausalLM(OlmemConfig(**SAME | changes))),
        shake(Olmo3ForCausalLM(Olmo3Config(**SAME | changes))),
    )
    texts, found = served(Engine(model, name), *prompts)
    for own, other in zip(found, served(Engine(olmo3, name), *prompts)[1], strict=True):
        assert torch.equal(own, other)
    for prompt, text in zip(prompts, texts, strict=True):
        ids, new = prompt[None], len(text) - len(prompt)
        assert new > 2 * WINDOW
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[0]
        assert torch.equal(text, alone)


SERVED = {
    "one tensor": {"shared_projections": "key_value"},
    "clipped": {"clip_qkv": 0.5, "clip_qkv_stage": "rotary", "norm_placement": "pre", "norm_type": "layer"},
    "no positions": {"position_embedding": "none", "qk_norm": "head", "norm_placement": "parallel"},
}


@pytest.mark.parametrize("changes", SERVED.values(), ids=SERVED)
def test_an_engine_serves_other_blocks_too(name, changes):
    """An engine keeps two tensors where an OlmemCache keeps one."""
    model, prompt = tiny(**changes), tokens(2 * WINDOW + 1)
    [text], found = served(Engine(model, name), prompt)
    with torch.no_grad():
        expected = model(text[None]).logits[0]
    for logits, end in zip(found, [4, *range(len(prompt) - 1, len(text) - 1)], strict=True):
        assert_close(logits, expected[end], rtol=0, atol=1e-4)


NOT_SERVED = {
    "sinks": (SINKS, "num_sink_tokens"),
    "learned sinks": (SINK_LOGITS, "sink_logit_init"),
    "chunks": (CHUNKS, "layer_types"),
    "memory": (MEMORIES["memory"], "num_memory_tokens"),
    "retrieval": (MEMORIES["retrieval"], "retrieval_layers"),
    "linspace": ({"position_embedding": "linspace"}, "position_embedding"),
}


@pytest.mark.parametrize(("changes", "field"), NOT_SERVED.values(), ids=NOT_SERVED)
def test_a_model_that_an_engine_would_serve_wrongly_is_refused(name, changes, field):
    """At the engine's first call, which is one of its own to try the model, in words that say what serves the model."""
    engine = Engine(tiny(**changes), name)
    words = f"`{field}` must .* with an engine's `attention_instances`, .* serve the model by `olmem serve FOLDER`"
    with pytest.raises(ValueError, match=words):
        engine.read({0: tokens(3)})


@pytest.mark.parametrize("implementation", ["sdpa", "paged|eager"])
def test_an_engine_whose_attention_would_not_be_asked_is_refused(name, implementation):
    engine = Engine(tiny(), name)
    engine.model.set_attn_implementation(implementation)
    words = re.escape(f"must be the engine's (got {implementation!r}) with `attention_instances`")
    with pytest.raises(ValueError, match=f"`attn_implementation` {words}"):
        engine.read({0: tokens(3)})


def test_no_engine_is_none():
    model = tiny()
    assert_close(model(tokens(1, 5), attention_instances=None).logits, model(tokens(1, 5)).logits)


@pytest.mark.slow
def test_an_engine_compiles_a_call_to_one_graph(monkeypatch):
    """For any number of tokens, as vLLM does by default."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", engine_attention)
    model = tiny(num_hidden_layers=1, layer_types=SLIDING)
    expected = Engine(model, "vllm").read({0: tokens(7), 1: tokens(4, seed=1)})
    engine = Engine(model, "vllm")
    engine.model.forward = torch.compile(engine.model.forward, backend="eager", fullgraph=True, dynamic=True)
    found = engine.read({0: tokens(7), 1: tokens(4, seed=1)})
    for own, other in zip(found, expected, strict=True):
        assert_close(own, other)


def test_plans_are_those_of_olmo3():
    """By which engines share a model out; one of the modules that they name is a list."""
    for plan in ("base_model_tp_plan", "base_model_pp_plan"):
        assert getattr(OlmemConfig, plan) == getattr(Olmo3Config, plan)
    for plan in ("_tp_plan", "_pp_plan"):
        assert getattr(OlmemForCausalLM, plan) == getattr(Olmo3ForCausalLM, plan)
    model = tiny().model
    assert [name for name in OlmemConfig.base_model_pp_plan if isinstance(getattr(model, name), nn.ModuleList)] == [
        "layers"
    ]
