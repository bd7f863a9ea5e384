# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The Olmem network: OLMo-2's block with its choices made fields of the configuration.

With the default choices every module computes what Transformers' Olmo2 and Olmo3 compute, bit for bit in float32,
under the same parameter names, so their checkpoints load without renaming. What differs from them:

- where the norms stand, and what kind they are (`norm_placement`, `norm_type`, `qk_norm`);
- clipping of queries, keys and values (`clip_qkv`), scaled logits (`logits_scaling`), residual dropout;
- RoPE by layer type, scaled on full-attention layers only;
- windows that slide or step, sinks before them, and a cache that holds no more than they need (`OlmemCache`);
- memory of what has left them, by memory tokens or by retrieval.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention_olmem import Rotations, attend, eager_attention_forward
from .cache_olmem import CACHE_NAME, OlmemCache, takes_cache
from .configuration_olmem import HUB_ARGUMENTS, OlmemConfig
from .context_olmem import Context, Sight, find_documents
from .generation_olmem import OlmemGenerationMixin, is_olmem_cache
from .memory_olmem import SegmentReader, Trail, read_documents
from .positions_olmem import OlmemRotaryEmbedding, Rotation, rotate
from .rules_olmem import BY_SLOT, NOT_YET, ROTATING
from .weights_olmem import LoadsWeights, read_old_names

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


CONTEXT_BACKENDS = ("sdpa", "eager")


def is_padding_mask(attention_mask) -> bool:
    """Whether it is (B, T), or no mask, which pads nothing."""
    return attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)


class OlmemRMSNorm(nn.Module):
    """Root-mean-square norm, weight included, in float32; then back to the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return (self.weight * hidden_states).to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def make_norm(config: OlmemConfig, size: int) -> nn.Module:
    if config.norm_type == "rms":
        return OlmemRMSNorm(size, config.rms_norm_eps)
    return nn.LayerNorm(size, config.rms_norm_eps, elementwise_affine=config.norm_type == "layer")


class Elephant(nn.Module):
    """1 / (1 + |x|⁸): an activation that is one near zero and nothing elsewhere (Lan and Mahmood, arXiv 2310.01365)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + hidden_states.pow(8))


class OlmemGate(nn.Module):
    """One gate a head: it returns numbers (H,) between 0 and 1, the sigmoids of learned logits."""

    def __init__(self, num_heads: int, initial: float):
        super().__init__()
        self.initial = initial
        self.logits = nn.Parameter(torch.full((num_heads,), initial))

    def forward(self) -> torch.Tensor:
        return self.logits.sigmoid()


class OlmemMemory(nn.Module):
    """The parameters of recurrent memory: it returns what a stream's first segment reads (M, hidden_size), and its
    norm is applied to what is written at a segment's end."""

    def __init__(self, config: OlmemConfig):
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.norm = make_norm(config, config.hidden_size)

    def forward(self) -> torch.Tensor:
        return self.embeddings


class OlmemAttention(nn.Module):
    """Olmo3Attention, with choices: which projections are one, the kind of QK-norm, a clip at one of two stages, and
    how positions are told. What a choice does not use does not exist."""

    def __init__(self, config: OlmemConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.qk_norm = config.qk_norm
        self.clip_qkv, self.clip_qkv_stage = config.clip_qkv, config.clip_qkv_stage
        self.position_embedding = config.layer_position_embeddings[layer_idx]
        self.rotates = self.position_embedding in ROTATING
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        has_query = config.shared_projections not in ("query_key", "query_key_value")
        if has_query:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        if config.shared_projections in ("none", "query_key"):
            self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "full"
            if has_query:
                self.q_norm = make_norm(config, query_size if whole else self.head_dim)
            self.k_norm = make_norm(config, key_size if whole else self.head_dim)
        if self.position_embedding == "linspace":
            self.linspace_scale = nn.Parameter(torch.ones(self.head_dim))
        self.gates_memory = config.num_memory_tokens > 0 and config.memory_gate_init is not None
        if self.gates_memory:
            self.memory_gate = OlmemGate(config.num_attention_heads, float(config.memory_gate_init or 0))
        self.retrieves = layer_idx in config.retrieval_layers
        if self.retrieves:
            self.retrieval_gate = OlmemGate(config.num_attention_heads, float(config.retrieval_gate_init))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotations,
        attention_mask: torch.Tensor | None = None,
        kv_cache: Any = None,
        sight: Sight | None = None,
        trail: Trail | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With a `sight`, attention over what it says is seen, in a cache or on a `trail`; without, the attention of
        Transformers' models."""
        query, key, value = self.project(hidden_states)
        rotations = position_embeddings if self.rotates else Rotations()
        if sight is not None:
            past = None if kv_cache is None else kv_cache.open(self.layer_idx, key.dtype)
            output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
            output, weights = attend(self, query, key, value, rotations, sight, trail or past, output_attentions)
            return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

        query, key = self.place(query, rotations.token), self.place(key, rotations.token)
        value = self.clip("rotary", value)
        if isinstance(kv_cache, Cache):
            key, value = kv_cache.update(key, value, self.layer_idx)
        elif kv_cache is not None:  # of paged attention, which is told where it writes
            key, value = kv_cache.update(key, value, self.layer_idx, kwargs=kwargs)
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    @property
    def dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D), without positions; some may be the same tensor."""

        def heads(name: str) -> torch.Tensor:
            states = self.clip("projection", getattr(self, f"{name}_proj")(hidden_states))
            qk_norm = "none" if name == "v" else self.qk_norm
            if qk_norm == "full":
                states = getattr(self, f"{name}_norm")(states)
            states = states.view(*hidden_states.shape[:-1], -1, self.head_dim)
            if qk_norm == "head":
                states = getattr(self, f"{name}_norm")(states)
            return states.transpose(1, 2)

        shared = self.config.shared_projections
        if shared == "none":
            return heads("q"), heads("k"), heads("v")
        if shared == "query_key":
            key = heads("k")
            return key, key, heads("v")
        if shared == "query_key_value":
            key = heads("k")
            return key, key, key
        query, key = heads("q"), heads("k")
        return query, key, key if shared == "key_value" else query - key

    def place(self, states: torch.Tensor, rotation: Rotation | None, turn: Callable = rotate) -> torch.Tensor:
        """Gives queries or keys their positions, where these are rotations."""
        if rotation is not None:
            states = turn(states, *rotation)
        return self.clip("rotary", states)

    def clip(self, stage: str, states: torch.Tensor) -> torch.Tensor:
        limit = self.clip_qkv
        if limit is None or self.clip_qkv_stage != stage:
            return states
        return states.clamp(-limit, limit)


class OlmemMLP(nn.Module):
    """Olmo2MLP, and one more activation."""

    def __init__(self, config: OlmemConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = Elephant() if config.hidden_act == "elephant" else ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class OlmemDecoderLayer(GradientCheckpointingLayer):
    """x + post(f(pre(x))) for attention, then for the MLP; a norm that `norm_placement` does not name is the identity.
    `parallel` adds both sublayers of one norm at once."""

    def __init__(self, config: OlmemConfig, layer_idx: int):
        super().__init__()
        placement = config.norm_placement
        self.parallel = placement == "parallel"
        self.self_attn = OlmemAttention(config, layer_idx)
        self.mlp = OlmemMLP(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)
        if self.parallel:
            self.input_layernorm = make_norm(config, config.hidden_size)
            return

        def norm_if(used: bool) -> nn.Module:
            return make_norm(config, config.hidden_size) if used else nn.Identity()

        self.pre_attention_layernorm = norm_if(placement in ("pre", "peri"))
        self.post_attention_layernorm = norm_if(placement in ("post", "peri"))
        self.pre_feedforward_layernorm = norm_if(placement in ("pre", "peri"))
        self.post_feedforward_layernorm = norm_if(placement in ("post", "peri"))

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.parallel:
            normed = self.input_layernorm(hidden_states)
            attended = self.residual_dropout(self.self_attn(normed, **kwargs)[0])
            return hidden_states + attended + self.residual_dropout(self.mlp(normed))

        attended, _ = self.self_attn(self.pre_attention_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.residual_dropout(self.post_attention_layernorm(attended))
        transformed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.residual_dropout(self.post_feedforward_layernorm(transformed))


class OlmemPreTrainedModel(LoadsWeights):
    config: OlmemConfig
    config_class = OlmemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OlmemDecoderLayer"]  # noqa: RUF012  Transformers' own attributes, here and below
    _skip_keys_device_placement = ["past_key_values", "cache", "kv_cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": OlmemDecoderLayer, "attentions": OlmemAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OlmemRotaryEmbedding):
            for layer_type in module.layer_types:
                inverse_frequency, _ = module.frequencies(layer_type)
                init.copy_(getattr(module, f"{layer_type}_inv_freq"), inverse_frequency)
        if isinstance(module, OlmemAttention) and module.position_embedding == "linspace":
            init.ones_(module.linspace_scale)
        if isinstance(module, OlmemGate):
            init.constant_(module.logits, module.initial)
        if isinstance(module, OlmemMemory):
            init.normal_(module.embeddings, std=self.config.initializer_range)

    @staticmethod
    def auto_map() -> dict[str, str]:
        """Where a Hub repository has the code of every Auto class that can load it."""
        return {"AutoConfig": "configuration_olmem.OlmemConfig"} | {
            auto_class.__name__: f"modeling_olmem.{model_class.__name__}" for auto_class, model_class in AUTO_CLASSES
        }

    def save_pretrained(self, *args, **kwargs):
        """As in Transformers; the folder also holds this code, whatever the class of the model that is saved."""
        self.config.auto_map = self.auto_map()
        return super().save_pretrained(*args, **kwargs)


class OlmemModel(OlmemPreTrainedModel):
    """Token ids (B, T) to hidden states (B, T, hidden_size) after the last norm."""

    def __init__(self, config: OlmemConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([OlmemDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size)
        if config.num_memory_tokens:
            self.memory = OlmemMemory(config)
        self.register_load_state_dict_pre_hook(read_old_names)
        self.rotary_emb = OlmemRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        home = self.embed_tokens.weight.device
        dispatched = home.type == "meta" or hasattr(self.embed_tokens, "_hf_hook")  # accelerate moves what it is given
        if input_ids is not None and input_ids.device != home and not dispatched:
            raise ValueError(
                f"`input_ids` must be on the model's device, {home} (got {input_ids.device}); pass "
                "`input_ids.to(model.device)`."
            )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        if self.computes_twice:
            # Transformers gives no cache to a layer that is computed twice: neither is one counted on, nor returned.
            if is_olmem_cache(past_key_values) and not past_key_values.fresh:  # pyright: ignore
                raise ValueError(
                    "`past_key_values` cannot be gone on from in training with gradient checkpointing, which computes "
                    "a layer twice; turn it off, or leave the cache out."
                )
            past_key_values, use_cache = None, False
        if use_cache and past_key_values is None:
            past_key_values = self.make_cache(attention_mask)
        inputs = hidden_states, attention_mask, position_ids, past_key_values
        if not self.reads_in_context(past_key_values, attention_mask, position_ids):
            return self.pass_layers(hidden_states, past_key_values, self.look_as_transformers(*inputs), **kwargs)
        goes_back = self.config.retrieval_layers and past_key_values is not None and torch.is_grad_enabled()
        if self.config.num_memory_tokens or goes_back:
            return self.read_by_segments(*inputs, **kwargs)
        return self.pass_layers(hidden_states, past_key_values, self.look(*inputs), **kwargs)

    @capture_outputs
    def pass_layers(
        self, hidden_states: torch.Tensor, past_key_values: Cache | None, arguments: dict[str, dict], **kwargs
    ) -> BaseModelOutputWithPast:
        """All layers at once, told what `arguments` has for their type. Their cache is not called `past_key_values`,
        which some releases of Transformers keep from layers that can be checkpointed, also while nothing is."""
        layers = self.layers[: self.config.num_hidden_layers]  # fewer in one that assists and leaves early
        for layer, layer_type in zip(layers, self.config.layer_types, strict=False):
            hidden_states = layer(hidden_states, kv_cache=past_key_values, **arguments[layer_type], **kwargs)
        if is_olmem_cache(past_key_values):
            sight = arguments[self.config.layer_types[0]]["sight"]
            past_key_values.advance(sight)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        returned: dict[str, Any] = {CACHE_NAME: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **returned)

    @can_return_tuple
    def read_by_segments(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Segments one after another, each with the memory that the one before has written."""
        if kwargs.get("output_attentions", self.config.output_attentions):
            remedy = ", whose columns are tokens; leave `output_attentions` out."
            if not self.config.num_memory_tokens:
                remedy = " with a cache and gradients; read under `torch.no_grad()`, or pass use_cache=False."
            raise ValueError(f"{self.config.memory_rule} to return attentions{remedy}")
        for layer in self.layers if self.computes_twice else ():
            if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False) is True:
                raise ValueError(
                    "`use_reentrant` must be False (got True) for gradients through memory; call "
                    "`gradient_checkpointing_enable({'use_reentrant': False})`."
                )
        all_stages = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        numbers, padded, documents = self.count(hidden_states, attention_mask, position_ids, past_key_values)
        if documents is not None:
            stages = read_documents(self, hidden_states, documents, all_stages, **kwargs)
        else:
            batch, length = hidden_states.shape[:2]
            reader = SegmentReader(self, past_key_values, batch, length, hidden_states.device)
            stages = reader.read(hidden_states, numbers, padded, all_stages, **kwargs)
        last = self.norm(stages[-1])
        returned: dict[str, Any] = {CACHE_NAME: past_key_values}
        output = BaseModelOutputWithPast(last_hidden_state=last, **returned)
        if all_stages:
            output.hidden_states = (hidden_states, *stages[1:-1], last)
        return output

    def reset_memory(self, cache: OlmemCache, rows: int | list[int] | torch.Tensor | None = None) -> None:
        """Has these rows of a batch, or all, begin anew in a cache, as a conversation that has ended makes room for
        another: memory, sinks, window, and what retrieval keeps."""
        if not is_olmem_cache(cache):
            raise ValueError(f"`cache` must be an OlmemCache (got a {type(cache).__name__}); make another cache anew.")
        cache.forget(rows)

    @property
    def computes_twice(self) -> bool:
        """Whether layers are checkpointed: not without gradients, as in `generate()` between steps of training."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @property
    def contexts(self) -> dict[str, Context]:
        """What the layers of each type see."""
        return {layer_type: Context.of(self.config, layer_type) for layer_type in sorted(set(self.config.layer_types))}

    def make_cache(self, attention_mask: torch.Tensor | dict | None = None) -> Cache:
        """An OlmemCache, or where another backend or a mask of the caller's own attends, Transformers' cache."""
        own = self.config._attn_implementation in CONTEXT_BACKENDS and is_padding_mask(attention_mask)
        return OlmemCache(self.config) if own else DynamicCache(config=self.config)

    def reads_in_context(self, past_key_values, attention_mask, position_ids) -> bool:
        """Whether attention goes by what a `Sight` says is seen. If not, the model is Olmo3: keys of absolute
        positions, masks and backends of Transformers, and what that cannot do is an error."""
        implementation = self.config._attn_implementation
        own_cache = is_olmem_cache(past_key_values)
        reasons = {
            f"`attn_implementation` {implementation!r}; set 'sdpa' or 'eager'": implementation not in CONTEXT_BACKENDS,
            "an `attention_mask` that is not (B, T); pass one, zeros for padding": (
                isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2
            ),
            f"a {type(past_key_values).__name__}; leave `past_key_values` and `cache_implementation` out": (
                past_key_values is not None and not own_cache
            ),
            "masks made ahead; pass an `attention_mask` (B, T)": isinstance(attention_mask, dict),
            "`position_ids` while tracing without a cache; leave them out": (
                past_key_values is None and position_ids is not None and is_tracing(position_ids)
            ),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is None:
            return True
        if own_cache:
            raise ValueError(f"`past_key_values` is an OlmemCache, which does not work with {reason}.")
        types = set(self.config.layer_types)
        if self.config.num_sink_tokens and types != {"full_attention"}:
            raise ValueError(f"`num_sink_tokens` must be 0 (got {self.config.num_sink_tokens}) with {reason}.")
        if self.config.has_memory:
            raise ValueError(f"{self.config.memory_rule}, as memory is an OlmemCache's, with {reason}.")
        by_slot = set(BY_SLOT) & set(self.config.layer_position_embeddings)
        if by_slot:
            raise ValueError(
                f"`position_embedding` must be made of rope and none (got {min(by_slot)!r}, which goes by what a "
                f"query sees) with {reason}."
            )
        if "chunked_attention" in types:
            raise ValueError(f"`layer_types` must not have 'chunked_attention' with {reason}.")
        if past_key_values is not None and "sliding_attention" in types and self.config.sliding_window == 1:
            raise ValueError(
                "`sliding_window` must be at least 2 (got 1) with a cache of Transformers, which cannot keep a window "
                "that holds nothing of the past; leave `past_key_values` and `cache_implementation` out."
            )
        return False

    def count(self, hidden_states, attention_mask, position_ids, past_key_values):
        """Numbers (B or 1, T) of the new tokens, −1 of padding; whether there is some; and packed documents, which are
        numbered (1, T of the longest). An OlmemCache is checked, and begun."""
        batch, length = hidden_states.shape[:2]
        if not length:
            raise ValueError("`input_ids` must hold a token at least (got none); leave a call without any out.")
        device = hidden_states.device
        column = torch.arange(length, device=device)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
                raise ValueError(
                    f"`attention_mask` must cover the input's {batch} rows of {length} tokens, and may cover those "
                    f"before (got {tuple(attention_mask.shape)}); give a column for each token."
                )
            mask = attention_mask[:, -length:].to(device) != 0
            if (length > 1 or device.type == "cpu") and not is_tracing(mask) and bool(mask.all()):
                mask = None
        numbers = column[None] if mask is None else mask.cumsum(-1) - 1
        position_ids = None if position_ids is None else position_ids.to(device)
        documents = None
        if past_key_values is None:
            whole = attention_mask is None or (mask is None and self.config.has_memory)
            if position_ids is not None and whole:
                documents = find_documents(position_ids.expand(batch, -1))
            elif position_ids is not None and self.config.has_memory and mask is not None and length > 1:
                self.refuse_packed_padding(position_ids, mask)
            if documents is not None:
                longest = max(stop - start for row in documents for start, stop in row)
                numbers = column[None, :longest]
        else:
            past_key_values.check(self.config, self.contexts)
            past_key_values.begin(batch, device)
            numbers = numbers + past_key_values.seen[:, None]
        numbers = numbers if mask is None else torch.where(mask, numbers, -1)
        if past_key_values is not None and position_ids is not None and length > 1 and not is_tracing(position_ids):
            shift = (position_ids - numbers).masked_fill(numbers < 0, 0)
            one = shift.amax(-1) == torch.where(numbers < 0, shift.amax(-1, keepdim=True), shift).amin(-1)
            if not one.all():
                raise ValueError(
                    "`position_ids` must count a row's tokens one by one with an OlmemCache (got others); for "
                    "packed documents or positions of your own pass use_cache=False."
                )
        return numbers, mask is not None, documents

    @staticmethod
    def refuse_packed_padding(position_ids: torch.Tensor, mask: torch.Tensor) -> None:
        follow = position_ids[:, 1:] == position_ids[:, :-1] + 1
        if not bool((follow | ~mask[:, 1:] | ~mask[:, :-1]).all()):
            raise ValueError(
                "`position_ids` must count a row's tokens one by one beside an `attention_mask` with padding (got "
                "others); pass packed documents without a mask, and without padding."
            )

    def look(self, hidden_states, attention_mask, position_ids, past_key_values) -> dict[str, dict]:
        """What the layers of each type are told: the `Sight` and the rotations that go with it."""
        numbers, padded, documents = self.count(hidden_states, attention_mask, position_ids, past_key_values)
        if past_key_values is None:
            position_ids = None if documents else position_ids
            sights = {
                layer_type: Sight.without_cache(context, numbers, padded, documents)
                for layer_type, context in self.contexts.items()
            }
        else:
            position_ids = None  # the cache has counted
            differentiable = torch.is_grad_enabled()  # of any layer's weights, whatever the input
            before = past_key_values.room_for(hidden_states.shape[1], differentiable)
            sights = past_key_values.look(self.contexts, numbers, padded, before, differentiable)
        return self.tell(hidden_states, sights, past_key_values, position_ids)

    def tell(self, hidden_states, sights: dict[str, Sight], cache: Cache | None, position_ids=None) -> dict[str, dict]:
        """The same, of what the layers of each type see."""
        one_tensor = self.config.caches_one_tensor and cache is not None
        return {
            layer_type: {
                "sight": sight,
                "position_embeddings": self.rotations(hidden_states, layer_type, sight, position_ids, one_tensor),
            }
            for layer_type, sight in sights.items()
        }

    def rotations(
        self, hidden_states, layer_type: str, sight: Sight, position_ids: torch.Tensor | None, one_tensor: bool
    ) -> Rotations:
        """Those that the layers of one type need for what they see; `position_ids` may stand in for numbers. With
        `one_tensor` a cache's keys are not rotated."""

        def at(positions: torch.Tensor, below: int | None = None) -> Rotation:
            return self.rotary_emb(hidden_states, positions, layer_type, below)

        context = sight.context
        most = context.span or sight.length
        slots_below = most and context.num_prefix + most + (sight.numbers.shape[1] if sight.memory else 0)
        if one_tensor and sight.is_step:  # all keys are rotated now, by slots, which stay small
            if context.span is None or slots_below is None:
                step = self.rotary_emb.phases(sight.step_slots, layer_type, slots_below)
            else:
                step = self.rotary_emb.phases_of_slots(sight.step_slots, layer_type, slots_below)
            return Rotations(at(sight.query_slots, slots_below), step=step)
        key = prefix = query = None
        if one_tensor:  # so are these, in a window from its first key on
            first = 0 if context.span is None else sight.key_places[:, :1].clamp(min=0)
            token, key = at((sight.places - first).clamp(min=0)), at((sight.key_places - first).clamp(min=0))
        else:
            token = at(sight.places.clamp(min=0) if position_ids is None else position_ids)
        if sight.prefix:
            prefix = at(sight.prefix_positions.clamp(min=0))
            query = None if sight.is_step else at(sight.query_slots, slots_below)
        return Rotations(token, query, prefix, key)

    def look_as_transformers(self, hidden_states, attention_mask, position_ids, past_key_values) -> dict[str, dict]:
        """What the layers of each type are told: masks as `attn_implementation` wants them, absolute positions."""
        if position_ids is None:
            position_ids = self.positions(hidden_states, attention_mask, past_key_values)
        arguments = {}
        for layer_type in set(self.config.layer_types):
            if isinstance(attention_mask, dict):  # `generate` has made them already
                mask = attention_mask[layer_type]
            else:
                mask = MASK_FUNCTIONS[layer_type](
                    config=self.config,
                    inputs_embeds=hidden_states,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **{CACHE_NAME: past_key_values},
                )
            rotations = Rotations(self.rotary_emb(hidden_states, position_ids, layer_type))
            arguments[layer_type] = {
                "attention_mask": mask,
                "position_ids": position_ids,
                "position_embeddings": rotations,
            }
        return arguments

    def positions(self, hidden_states, attention_mask, past_key_values) -> torch.Tensor:
        """Each token's index (1 or B, T). RoPE knows differences only, so left padding may count; not so where
        rotated values are clipped, which are of a row's real tokens."""
        length = hidden_states.shape[1]
        clips_rotated = self.config.clip_qkv is not None and self.config.clip_qkv_stage == "rotary"
        if clips_rotated and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(length, device=hidden_states.device) + seen).unsqueeze(0)


class OlmemForCausalLM(OlmemPreTrainedModel, OlmemGenerationMixin):
    """Token ids (B, T) to logits (B, T, vocab_size)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: OlmemConfig):
        super().__init__(config)
        self.model = OlmemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_olmo(cls, path_or_repo, **overrides):
        """Loads a Transformers `olmo`, `olmo2` or `olmo3` folder or repository, its weights as they are.

        Overrides are fields of `OlmemConfig` (`layer_types="sliding_attention", sliding_window=4096`) or arguments of
        `from_pretrained` (`dtype`, `device_map`, `revision`, …).
        """
        OlmemConfig.refuse_parts_of_rope(overrides)
        names = {field.name for field in fields(OlmemConfig)} - {"dtype"} | set(NOT_YET)
        config_overrides = {name: overrides.pop(name) for name in list(overrides) if name in names}
        OlmemConfig.refuse_misspelled(overrides)
        hub_kwargs = {name: overrides[name] for name in HUB_ARGUMENTS if name in overrides}
        config = OlmemConfig.from_olmo(path_or_repo, **config_overrides, **hub_kwargs)
        return cls.from_pretrained(path_or_repo, config=config, **overrides)

    @property
    def _is_stateful(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether tokens cannot be taken back, as Transformers asks before it assists or searches contrastively."""
        return self.config.has_memory

    def reset_memory(self, cache: OlmemCache, rows: int | list[int] | torch.Tensor | None = None) -> None:
        """See `OlmemModel.reset_memory`."""
        self.model.reset_memory(cache, rows)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As Olmo3ForCausalLM: `labels` (B, T), -100 ignored, give the loss of the next token; `logits_to_keep` keeps
        the last n positions, or those of a tensor of indices; 0 keeps all."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        returned: dict[str, Any] = {CACHE_NAME: outputs.get(CACHE_NAME)}
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **returned
        )


# The heads are Transformers' generic ones but for making the model themselves: those ask `AutoModel` for it, which in
# a Hub repository's code would ask whether to trust that code, once more.


class OlmemForSequenceClassification(GenericForSequenceClassification, OlmemPreTrainedModel):
    """One row of scores (B, num_labels) from the last real token of each row."""

    def __init__(self, config: OlmemConfig):
        OlmemPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0  # None is for the type checker: a config always has some
        self.model = OlmemModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class OlmemForTokenClassification(GenericForTokenClassification, OlmemPreTrainedModel):
    """Scores (B, T, num_labels) for each token; `classifier_dropout` of the config, or 0.1, before them in training."""

    def __init__(self, config: OlmemConfig):
        OlmemPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0  # None is for the type checker: a config always has some
        self.model = OlmemModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


AUTO_CLASSES = (
    (AutoModel, OlmemModel),
    (AutoModelForCausalLM, OlmemForCausalLM),
    (AutoModelForSequenceClassification, OlmemForSequenceClassification),
    (AutoModelForTokenClassification, OlmemForTokenClassification),
)
for _auto_class, _model_class in AUTO_CLASSES:
    _auto_class.register(OlmemConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "OlmemForCausalLM",
    "OlmemForSequenceClassification",
    "OlmemForTokenClassification",
    "OlmemModel",
    "OlmemPreTrainedModel",
]
