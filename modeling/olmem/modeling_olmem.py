# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The Olmem network: OLMo-2's block with its choices made fields of the configuration.

With the default choices every module computes what Transformers' Olmo2 and Olmo3 compute, bit for bit in float32,
under the same parameter names, so their checkpoints load without renaming. What differs from them:

- where the norms stand, and what kind they are (`norm_placement`, `norm_type`, `qk_norm`);
- clipping of queries, keys and values (`clip_qkv`), scaled logits (`logits_scaling`), residual dropout;
- RoPE by layer type, scaled on full-attention layers only.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import fields

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
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_olmem import HUB_ARGUMENTS, NOT_YET, OlmemConfig

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


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


class OlmemRotaryEmbedding(nn.Module):
    """Cosines and sines (B, T, D) in float32 of absolute positions, by layer type."""

    def __init__(self, config: OlmemConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.layer_types = sorted(set(config.layer_types))
        self.rope_type = {name: config.rope_parameters[name]["rope_type"] for name in self.layer_types}
        for layer_type in self.layer_types:
            inverse_frequency, attention_scaling = self.frequencies(layer_type, device)
            self.register_buffer(f"{layer_type}_inv_freq", inverse_frequency, persistent=False)
            self.register_buffer(f"{layer_type}_original_inv_freq", inverse_frequency.clone(), persistent=False)
            setattr(self, f"{layer_type}_attention_scaling", attention_scaling)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, seq_len=None, layer_type=None):
        theta = config.rope_parameters[layer_type]["rope_theta"]
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return (1.0 / theta**exponent).to(device), 1.0

    def frequencies(self, layer_type: str, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (D/2,) and the factor of cosines and sines, as Transformers defines each `rope_type`."""
        rope_functions = {**ROPE_INIT_FUNCTIONS, "default": self.compute_default_rope_parameters}
        return rope_functions[self.rope_type[layer_type]](self.config, device, layer_type=layer_type)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states, position_ids, layer_type):
        inverse_frequency = getattr(self, f"{layer_type}_inv_freq").to(hidden_states.device, torch.float)
        angles = position_ids[..., None].float() * inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        return angles.cos() * scaling, angles.sin() * scaling


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE to states (B, H, T, D), halves paired as in Transformers; the product is in float32.

    The operations and their order are Transformers', so that gradients too are the same bit for bit.
    """
    half = states.shape[-1] // 2
    straight = states * cos[:, None]
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (straight + turned * sin[:, None]).to(states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations, weights returned: query (B, H, T, D), key and value (B, K, S, D) ->
    (B, T, H, D), (B, H, T, S). Softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (state[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for state in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OlmemAttention(nn.Module):
    """Olmo3Attention, with the kind of its QK-norm and a clip at one of two stages as choices."""

    def __init__(self, config: OlmemConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "full"
            self.q_norm = make_norm(config, query_size if whole else self.head_dim)
            self.k_norm = make_norm(config, key_size if whole else self.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        qk_norm, clip_stage = self.config.qk_norm, self.config.clip_qkv_stage

        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if clip_stage == "projection":
            query, key, value = self.clip(query, key, value)
        if qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.view(heads_shape), key.view(heads_shape), value.view(heads_shape)
        if qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H or K, T, D)

        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if clip_stage == "rotary":
            query, key, value = self.clip(query, key, value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def clip(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        limit = self.config.clip_qkv
        return states if limit is None else tuple(state.clamp(-limit, limit) for state in states)


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


class OlmemPreTrainedModel(PreTrainedModel):
    config: OlmemConfig
    config_class = OlmemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OlmemDecoderLayer"]  # noqa: RUF012  Transformers' own attributes, here and below
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
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
                init.copy_(getattr(module, f"{layer_type}_original_inv_freq"), inverse_frequency)

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
        self.rotary_emb = OlmemRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
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
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        slides = "sliding_attention" in self.config.layer_types
        if past_key_values is not None and slides and self.config.sliding_window == 1:
            raise ValueError(
                "`sliding_window` must be at least 2 with a cache (got 1): Transformers' caches cannot keep a window "
                "that holds nothing of the past; pass use_cache=False."
            )
        if position_ids is None:
            position_ids = self.positions(hidden_states, attention_mask, past_key_values)

        layer_types = self.config.layer_types
        if isinstance(attention_mask, dict):  # `generate` has made them already
            masks = attention_mask
        else:
            masks = {
                layer_type: MASK_FUNCTIONS[layer_type](
                    config=self.config,
                    inputs_embeds=hidden_states,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
                for layer_type in set(layer_types)
            }
        positions = {
            layer_type: self.rotary_emb(hidden_states, position_ids, layer_type) for layer_type in set(layer_types)
        }

        for layer, layer_type in zip(self.layers, layer_types, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=positions[layer_type],
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def positions(self, hidden_states, attention_mask, past_key_values) -> torch.Tensor:
        """Each token's index (1 or B, T). RoPE knows differences only, so left padding may count; not so where
        rotated values are clipped, which are of a row's real tokens."""
        length = hidden_states.shape[1]
        clips_rotated = self.config.clip_qkv is not None and self.config.clip_qkv_stage == "rotary"
        if clips_rotated and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(length, device=hidden_states.device) + seen).unsqueeze(0)


class OlmemForCausalLM(OlmemPreTrainedModel, GenerationMixin):
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
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
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
