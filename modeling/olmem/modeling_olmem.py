# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The Olmem network: the block of OLMo 2, in which each choice is a field of the configuration.

With the default choices every module computes what Transformers' Olmo2 and Olmo3 compute, bit for bit in float32. The
parameters have the same names, so their checkpoints load without renaming. The choices are:

- where the norms stand and of what kind they are (`norm_placement`, `norm_type`, `qk_norm`);
- clipped queries, keys and values (`clip_qkv`), scaled logits (`logits_scaling`), residual dropout;
- shared projections (`shared_projections`) and position embeddings (`position_embedding`);
- windows that slide or move in chunks, sinks before them, learned sinks (`sink_logit_init`), and a cache of bounded
  size (`OlmemCache`);
- memory of tokens that have left the window, by memory tokens or by retrieval.

What a window's size means is defined in one place, `Visibility` (visibility_olmem). Plans, views and states ask it.

A forward call makes logits from ids in these steps, which `Reader` takes one after another (reading_olmem):

    tokens = number_tokens(...)                 numbers the real tokens of each row (inputs_olmem)
    for call in schedule.calls():               cuts them into calls of memory, tokens and new memory (segments_olmem)
        plans = planner.plans(call)             says who sees whom, where keys go, and which backend runs (plan_olmem)
        run_layers(hidden_states, plans, ...)   is the only place that calls a decoder layer

The call that ends a segment also holds M write tokens, whose last hidden states, through the norm of memory, are the
memory that the next segment reads.

Shapes: B batch, H query heads, K key/value heads, C columns of a call, T tokens, S keys, D head dim, M memory slots.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .cache_olmem import OlmemCache, is_olmem_cache
from .captured_olmem import Captured, wanted_states
from .compat_olmem import (
    CACHE_NAME,
    can_join_heads,
    returns_tensors,
    takes_cache,
)
from .configuration_olmem import HUB_ARGUMENTS, OlmemConfig
from .contracts_olmem import Heads, LayerState, Plan
from .decode_olmem import DecodeSteps
from .export_olmem import OlmemStep
from .fallback_olmem import Fallback, Implementation, falls_back, is_padding_mask
from .generation_olmem import OlmemGenerationMixin
from .inputs_olmem import read_mask, refuse_malformed
from .ops_olmem import PLAIN, Elephant, OlmemRMSNorm, Operations
from .positions_olmem import SCHEMES, OlmemRotaryEmbedding
from .reading_olmem import Reader, refuse_beside_checkpoints
from .retrieval_olmem import Retrieval
from .rules_olmem import CLIP_STAGES, NOT_YET
from .segments_olmem import OlmemMemory
from .step_olmem import StepOperations, StepPlan, StepState, layer_shape
from .stream_olmem import OlmemStream
from .visibility_olmem import Visibility
from .weights_olmem import LoadsWeights, gate_new_memory, read_old_names, refuse_state_without_sinks


def make_norm(config: OlmemConfig, size: int) -> nn.Module:
    """Returns a norm over `size` features of the type that `norm_type` names."""
    if config.norm_type == "rms":
        return OlmemRMSNorm(size, config.rms_norm_eps)
    return nn.LayerNorm(size, config.rms_norm_eps, elementwise_affine=config.norm_type == "layer")


class OlmemGate(nn.Module):
    """Holds one logit for each head, which says how much memory or retrieval is mixed into the head's output.

    Args:
        num_heads: the number of query heads H.
        init_logit: the first value of the logits.
    """

    def __init__(self, num_heads: int, init_logit: float):
        super().__init__()
        self.init_logit = float(init_logit)
        self.logits = nn.Parameter(torch.full((num_heads,), self.init_logit))

    def forward(self) -> torch.Tensor:
        """Returns the gates (H,) between 0 and 1."""
        return self.logits.sigmoid()


class OlmemAdmission(nn.Linear):
    """Scores hidden states for each key head, by which a store selects the tokens that it keeps.

    The scores are computed in float32 at least, so that few of them are equal. They are zero at first.
    """

    def __init__(self, config: OlmemConfig):
        super().__init__(config.hidden_size, config.num_key_value_heads, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the scores (B, C, K) of hidden states (B, C, hidden_size)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            return nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))


# The projections whose heads are queries, keys and values, by `shared_projections`. A `value_difference` is no
# projection, but is made of those of queries and keys.
SHARED = {"none": "qkv", "key_value": "qkk", "query_key": "kkv", "query_key_value": "kkk", "value_difference": "qkv"}


def unchanged(states: torch.Tensor) -> torch.Tensor:
    """Returns the states, where nothing is clipped."""
    return states


class OlmemAttention(nn.Module):
    """Computes the attention of Olmo3, or one with other projections, norms, clips and positions.

    A projection, norm or gate that the configuration does not use does not exist.
    """

    def __init__(self, config: OlmemConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.qk_norms = {"q": config.qk_norm, "k": config.qk_norm, "v": "none"}
        self.clips: dict[str, Callable[[torch.Tensor], torch.Tensor]] = dict.fromkeys(CLIP_STAGES, unchanged)
        if config.clip_qkv is not None:
            self.clips[config.clip_qkv_stage] = partial(torch.clamp, min=-config.clip_qkv, max=config.clip_qkv)
        self.shared = config.shared_projections
        self.position_embedding = config.layer_position_embeddings[layer_idx]
        self.layer_type = config.layer_types[layer_idx]
        # Only attention functions of Transformers and of serving engines read this and `is_causal`. `Visibility` says
        # what Olmem's own backends see.
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        has_query = "q" in SHARED[self.shared]
        if has_query:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        if "v" in SHARED[self.shared] and self.shared != "value_difference":
            self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.letters = [letter for letter in "qkv" if hasattr(self, f"{letter}_proj")]
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "full"
            if has_query:
                self.q_norm = make_norm(config, query_size if whole else self.head_dim)
            self.k_norm = make_norm(config, key_size if whole else self.head_dim)
        self.scheme = SCHEMES[self.position_embedding]
        self.span = Visibility.of(config, self.layer_type).span or config.max_position_embeddings
        self.linspace_scale: nn.Parameter | None = None
        if self.position_embedding == "linspace":
            self.linspace_scale = nn.Parameter(torch.ones(self.head_dim))
        self.memory_gate: OlmemGate | None = None
        if config.num_memory_tokens and config.memory_gate_init is not None:
            self.memory_gate = OlmemGate(config.num_attention_heads, config.memory_gate_init)
        if config.sink_logit_init is not None:  # no attribute without them: Transformers looks for one by this name
            self.sinks = nn.Parameter(torch.full((config.num_attention_heads,), float(config.sink_logit_init)))
        self.retrieval_gate: OlmemGate | None = None
        if layer_idx in config.retrieval_layers:
            self.retrieval_gate = OlmemGate(config.num_attention_heads, config.retrieval_gate_init)
        self.retrieval_score: OlmemAdmission | None = None
        if layer_idx in config.retrieval_layers and config.selects:
            self.retrieval_score = OlmemAdmission(config)

    def add_memory_gate(self, init_logit: float) -> None:
        """Adds a gate to the memory of a layer that has none, on the device and in the dtype of its weights."""
        gate = OlmemGate(self.config.num_attention_heads, init_logit)
        self.memory_gate = gate.to(self.k_proj.weight.device, self.k_proj.weight.dtype)

    def step(self, hidden_states: torch.Tensor, plan: StepPlan, state: StepState) -> torch.Tensor:
        """Attends by kernels from one token in each row (B, 1, hidden_size), and writes it to the state."""
        linears = [getattr(self, f"{letter}_proj") for letter in self.letters]
        projected = plan.operations.joined_products(linears, hidden_states)
        shape = layer_shape(
            self.config,
            self.layer_idx,
            plan,
            self.letters,
            self.scaling,
            query_norm=getattr(self, "q_norm", None),
            key_norm=getattr(self, "k_norm", None),
            linspace_scale=self.linspace_scale,
            sink_logits=getattr(self, "sinks", None),
            memory_gate=None if self.memory_gate is None else self.memory_gate.logits,
            retrieval_gate=None if self.retrieval_gate is None else self.retrieval_gate.logits,
        )
        output = plan.operations.attend(shape, state, projected)
        return plan.operations.products([self.o_proj], output)[0]

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: Plan | StepPlan,
        state: LayerState | StepState,
        earlier: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Attends from hidden states (B, C, hidden_size) to the keys and values that the plan lets them see.

        Args:
            plan: the plan of this call for layers of this kind.
            state: the keys and values that the layer remembers. The new ones are written to it.
            earlier: the keys and values of earlier calls of the same forward, key and value in turns, where gradients
                are wanted. A score follows each value in a layer whose store selects.

        Returns:
            The output (B, C, hidden_size), the attention weights (B, H, C, S) or None, and the new keys and values
            (B, K, C, D) without positions, with scores (B, K, C) in a layer whose store selects. There are weights if
            they are wanted, which a call of several sections is not asked for, and the backend computes them. A step by
            kernels returns neither weights nor keys and values.
        """
        if isinstance(plan, StepPlan):
            assert isinstance(state, StepState)
            return self.step(hidden_states, plan, state), None, ()
        assert not isinstance(state, StepState)
        query, key, value = self.project(hidden_states, plan.operations)
        new = (key, value)
        if self.retrieval_score is not None:
            new += (self.retrieval_score(hidden_states).transpose(1, 2),)
        if plan.tape is not None and not can_join_heads(hidden_states.shape[1]):
            head = torch.arange(query.shape[1], device=query.device) // self.num_key_value_groups
            new = tuple(states.index_select(1, head) for states in new)
            key, value = new[:2]
        count = len(new)
        before = [earlier[first : first + count] for first in range(0, len(earlier), count)]
        parts, heads = state.write(key, value, plan, before), self.heads()
        outputs, weights = [], None
        for section, seen in zip(plan.sections, parts, strict=True):
            output, weights = section.attend(heads, query, seen)
            outputs.append(output)
        if plan.retrieves:
            outputs[plan.token_index] = self.retrieve(query, new, outputs[plan.token_index], plan, state, before)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights, new

    def project(
        self, hidden_states: torch.Tensor, operations: Operations = PLAIN
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries (B, H, C, D), keys and values (B, K, C, D), without positions. Some may be the same tensor.

        The order is projection, clip (`clip_qkv_stage="projection"`), QK-norm, and view as heads; a norm of each head
        comes after the view. Positions come after this method: queries get them when they attend, and keys when they
        are written or read. With `clip_qkv_stage="rotary"` values are clipped here, and queries and keys after they are
        rotated.

        With `shared_projections` of `"key_value"` and `"query_key_value"` the value is the key after its norm. A cache
        then keeps one tensor for both, without positions, and its keys are rotated whenever they are read.
        """
        heads = {letter: self.project_heads(letter, hidden_states, operations) for letter in self.letters}
        if self.shared == "value_difference":
            heads["v"] = heads["q"] - heads["k"]
        of_query, of_key, of_value = SHARED[self.shared]
        return heads[of_query], heads[of_key], self.clips["rotary"](heads[of_value])

    def project_heads(self, letter: str, hidden_states: torch.Tensor, operations: Operations) -> torch.Tensor:
        """Returns the queries ("q"), keys ("k") or values ("v") of hidden states as heads (B, heads, C, D)."""
        states, qk_norm = getattr(self, f"{letter}_proj")(hidden_states), self.qk_norms[letter]
        states = self.clips["projection"](states)
        if qk_norm == "full":
            states = operations.norm(getattr(self, f"{letter}_norm"), states)
        states = states.view(*hidden_states.shape[:-1], -1, self.head_dim)
        if qk_norm == "head":
            states = operations.norm(getattr(self, f"{letter}_norm"), states)
        return states.transpose(1, 2)

    def heads(self) -> Heads:
        """Returns the parts of this layer that backends need."""
        gate = None if self.memory_gate is None else self.memory_gate()
        dropout = self.attention_dropout if self.training else 0.0
        sinks = getattr(self, "sinks", None)
        return Heads(self, self.scheme(self.linspace_scale, self.span), self.scaling, dropout, gate, sinks)

    def retrieve(
        self,
        query: torch.Tensor,
        new: Sequence[torch.Tensor],
        seen: torch.Tensor,
        plan: Plan,
        state: LayerState,
        earlier: Sequence[Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        """Returns the attention output of the tokens (B, T, H, D), mixed with what their heads retrieve."""
        assert self.retrieval_gate is not None
        tokens = plan.by_role["token"]
        key, value, *scores = (tokens.part(states) for states in new)
        candidates = state.candidates(key, value, plan, earlier, *scores)
        top_k, capacity = self.config.retrieval_top_k, self.config.retrieval_capacity
        retrieval = Retrieval(plan.visibility, top_k, capacity, self.scaling)
        return retrieval.mix(tokens.part(query), candidates, seen, self.retrieval_gate())


class OlmemMLP(nn.Module):
    """Computes the gated MLP of Olmo2, with one more activation."""

    def __init__(self, config: OlmemConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = Elephant() if config.hidden_act == "elephant" else ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, operations: Operations | StepOperations = PLAIN) -> torch.Tensor:
        gated = operations.gated(self.act_fn, self.gate_proj, self.up_proj, hidden_states)
        return operations.products([self.down_proj], gated)[0]


class OlmemDecoderLayer(GradientCheckpointingLayer):
    """Computes x + post(f(pre(x))), first with attention as f and then with the MLP.

    A norm that `norm_placement` does not use is the identity. With `"parallel"`, attention and MLP read the same norm
    of x, and both are added to x.
    """

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

    def forward(
        self, hidden_states: torch.Tensor, *earlier: torch.Tensor, plan: Plan | StepPlan, state: LayerState | StepState
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Computes one layer.

        Tensors that gradients go through are positional arguments and outputs, so that wrappers that checkpoint, shard
        or offload a layer see all of them.

        Args:
            hidden_states: (B, C, hidden_size).
            earlier: the keys and values (B, K, T, D) of earlier calls of the same forward, key and value in turns,
                where gradients are wanted. A score (B, K, T) follows each value in a layer whose store selects.
            plan: the plan of this call for layers of this kind.
            state: the keys and values that the layer remembers. The new ones are written to it.

        Returns:
            The hidden states (B, C, hidden_size). With `plan.returns_weights` the attention weights follow, if the
            backend computed them, and with `plan.carries` the new keys and values (B, K, C, D), and the scores.
        """
        operations, dropout = plan.operations, self.residual_dropout
        if self.parallel:
            normed = operations.norm(self.input_layernorm, hidden_states)
            attended, weights, carried = self.self_attn(normed, plan, state, earlier)
            hidden_states = hidden_states + dropout(attended) + dropout(self.mlp(normed, operations))
        else:
            normed = operations.norm(self.pre_attention_layernorm, hidden_states)
            attended, weights, carried = self.self_attn(normed, plan, state, earlier)
            hidden_states = operations.add_norm(hidden_states, self.post_attention_layernorm, attended, dropout)
            transformed = self.mlp(operations.norm(self.pre_feedforward_layernorm, hidden_states), operations)
            hidden_states = operations.add_norm(hidden_states, self.post_feedforward_layernorm, transformed, dropout)
        more = (weights,) if plan.returns_weights and weights is not None else ()
        more += carried if plan.carries else ()
        return (hidden_states, *more) if more else hidden_states


class OlmemPreTrainedModel(LoadsWeights):
    """Defines what Transformers needs to know of every model of the family, and initialises its parameters."""

    config_class = OlmemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OlmemDecoderLayer", "OlmemMemory"]  # noqa: RUF012  Transformers' own attributes, here and below
    _skip_keys_device_placement = ["past_key_values", "cache", "state"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def _can_compile_fullgraph(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every call is one graph, as Transformers asks; where memory begins a segment the host looks."""
        return not self.config.num_memory_tokens

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OlmemRotaryEmbedding):
            for layer_type in module.layer_types:
                inverse_frequency, _ = module.frequencies(layer_type)
                init.copy_(getattr(module, f"{layer_type}_inv_freq"), inverse_frequency)
        if isinstance(module, OlmemAttention) and module.linspace_scale is not None:
            init.ones_(module.linspace_scale)
        if isinstance(module, OlmemAttention) and self.config.sink_logit_init is not None:
            init.constant_(module.sinks, float(self.config.sink_logit_init))
        if isinstance(module, OlmemGate):
            init.constant_(module.logits, module.init_logit)
        if isinstance(module, OlmemAdmission):
            init.zeros_(module.weight)
        if isinstance(module, OlmemMemory):
            init.normal_(module.embeddings, std=self.config.initializer_range)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Returns that `set_attn_implementation` works. Transformers would search this file's text for that."""
        return True

    @staticmethod
    def auto_map() -> dict[str, str]:
        """Returns the class in a Hub repository's code that each Auto class loads, as `file.Class`."""
        from .heads_olmem import AUTO_MAP  # that file imports this one; by this line a saved folder holds both

        return dict(AUTO_MAP)

    def save_pretrained(self, *args, **kwargs):
        """Saves the model as Transformers does, with the code that loads it in the same folder."""
        self.config.auto_map = self.auto_map()
        return super().save_pretrained(*args, **kwargs)


ALL = slice(None)


class OlmemModel(OlmemPreTrainedModel):
    """Turns token ids (B, T) into hidden states (B, T, hidden_size) after the last norm."""

    def __init__(self, config: OlmemConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([OlmemDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size)
        self.memory: OlmemMemory | None = None
        if config.num_memory_tokens:
            self.memory = OlmemMemory(config, make_norm(config, config.hidden_size))
        self.register_load_state_dict_pre_hook(read_old_names)
        self.register_load_state_dict_pre_hook(gate_new_memory)
        self.register_load_state_dict_pre_hook(refuse_state_without_sinks)
        self.rotary_emb = OlmemRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.steps = DecodeSteps()
        self.post_init()

    @takes_cache
    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        last_columns: int = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Computes the last hidden states as Olmo3Model does, and those of other layers if they are asked for.

        Args:
            last_columns: the number of last columns whose hidden states are wanted, if no more can be kept from a long
                input without a cost. 0 stands for all.
            output_hidden_states: True for the hidden states of all layers, or an index, or several. The others are None
                in their places.
            kwargs: further keywords for an attention function of Transformers or of a serving engine.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        captured = Captured(wanted_states(output_hidden_states, self.config.num_hidden_layers))
        reader = Reader(self.config, self.rotary_emb, self.memory, self.layers, self.run_layers, self.training)
        embeddings = reader.embeddings(self.embed_tokens, input_ids, inputs_embeds, later=captured.wanted == set())
        refuse_malformed(embeddings.shape, attention_mask, position_ids)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            refuse_beside_checkpoints(self.layers[0], self.memory, past_key_values)
            past_key_values, use_cache = None, False
        if use_cache and past_key_values is None and not returns_tensors():
            past_key_values = self.make_cache(attention_mask)
        if falls_back(self.config, past_key_values, attention_mask, position_ids, kwargs):
            arguments = kwargs | ({"output_attentions": output_attentions} if output_attentions else {})
            hidden_states = embeddings.some(ALL)
            given = hidden_states, attention_mask, position_ids, arguments
            fallback = Fallback(self.config, self.rotary_emb, past_key_values, *given)
            hidden_states = self.run_layers(hidden_states, fallback.plans(), fallback.states(), captured)
            stages = [each for each in captured.hidden_states if each is not None]
        else:
            wants_more = captured.wanted is None or bool(captured.wanted) or output_attentions
            if wants_more and past_key_values is not None:
                reason = "hidden states or attentions are asked for"
                past_key_values.step_path = reason  # pyright: ignore[reportAttributeAccessIssue]
            elif past_key_values is not None:
                last = self.step(embeddings.given, attention_mask, past_key_values)  # pyright: ignore[reportArgumentType]
                if last is not None:
                    output: dict[str, Any] = {CACHE_NAME: past_key_values}
                    return BaseModelOutputWithPast(last_hidden_state=last, **output)
            inputs = embeddings, attention_mask, position_ids, past_key_values, captured, bool(output_attentions)
            hidden_states, stages = reader.read(*inputs, last_columns)  # pyright: ignore[reportArgumentType]
            if captured.wanted is None or 0 in captured.wanted:  # the embeddings, those of padding included
                stages[0] = embeddings.given
        last = self.norm(hidden_states)
        returned: dict[str, Any] = {CACHE_NAME: past_key_values}
        output = BaseModelOutputWithPast(last_hidden_state=last, **returned)
        if captured.wanted is None or captured.wanted:
            output.hidden_states = captured.fill(stages, last, self.config.num_hidden_layers)
        if output_attentions:
            output.attentions = tuple(captured.attentions)
        return output

    def step(
        self, embeddings: torch.Tensor, attention_mask: torch.Tensor | None, cache: OlmemCache
    ) -> torch.Tensor | None:
        """Computes a one-token step by replaying captured layers.

        Returns:
            The last hidden states (B, 1, hidden_size) after the norm, or None where the call cannot be captured;
            `cache.step_path` then says why.
        """
        cache.step_path = self.steps.why_not(self.config, cache, embeddings, self.training)
        if cache.step_path is not None:
            return None
        cache.check(self.config)
        cache.begin(len(embeddings), embeddings.device)
        cache.columns_before(1)
        if read_mask(attention_mask, len(embeddings), 1, embeddings.device) is not None:
            cache.step_path = "a row is padded"
            return None
        layers = [*self.layers][: self.config.num_hidden_layers]

        def compute(
            hidden_states: torch.Tensor, plans: Sequence[StepPlan], states: Sequence[StepState], part: slice
        ) -> torch.Tensor:
            last = self.run_layers(hidden_states, plans, states, Captured(set()), part=part)
            return plans[0].operations.norm(self.norm, last) if part.stop is None else last

        modules = layers, self.norm, self.memory
        return self.steps.run(self.config, self.rotary_emb, modules, cache, embeddings, compute)

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        plans: Sequence[Plan] | Sequence[StepPlan],
        states: Sequence[LayerState] | Sequence[StepState],
        captured: Captured,
        earlier: Sequence[Sequence[torch.Tensor]] = (),
        part: slice = ALL,
    ) -> torch.Tensor:
        """Passes hidden states (B, C, hidden_size) through all layers, or through some.

        Args:
            plans: the plan of each layer.
            states: the state of each layer.
            captured: keeps the hidden states and attention weights that the caller wants.
            earlier: for each layer, the keys and values of earlier calls of the same forward, key and value in turns.
            part: the layers that compute.

        Returns:
            The hidden states (B, C, hidden_size) after the last of these layers.
        """
        captured.keep(hidden_states)
        count = self.config.num_hidden_layers  # fewer where a model leaves early to assist
        for index in range(count)[part]:
            given = earlier[index] if earlier else ()
            output = self.layers[index](hidden_states, *given, plan=plans[index], state=states[index])
            hidden_states, *more = output if isinstance(output, tuple) else (output,)
            if plans[index].carries:
                captured.states.append(tuple(more[-plans[index].carries :]))
                more = more[: -plans[index].carries]
            captured.attentions += more
            captured.keep(hidden_states)
        return hidden_states

    def make_cache(self, attention_mask: torch.Tensor | dict | None = None) -> Cache:
        """Returns a new OlmemCache, or one of Transformers' caches if the call cannot use an OlmemCache.

        That is so for an `attn_implementation` that Olmem has no backends for, and for a mask that is not (B, T).
        """
        own = Implementation.of(self.config).is_own and is_padding_mask(attention_mask)
        return OlmemCache(self.config) if own else DynamicCache(config=self.config)

    def reset_memory(self, cache: OlmemCache, rows: int | Sequence[int] | torch.Tensor | None = None) -> None:
        """Forgets all that a cache holds of these rows of the batch, or of all rows.

        The rows then begin a new stream. Memory, sinks, windows and retrieved tokens of the old one are gone.
        """
        if not is_olmem_cache(cache):
            raise ValueError(f"`cache` must be an OlmemCache (got a {type(cache).__name__}); make a new cache instead.")
        cache.forget(rows)


class OlmemForCausalLM(OlmemPreTrainedModel, OlmemGenerationMixin):
    """Turns token ids (B, T) into logits (B, T, vocab_size)."""

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
        """Loads a Transformers `olmo`, `olmo2` or `olmo3` folder or repository with unchanged weights.

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
        """Returns whether tokens cannot be taken back. Transformers asks before assisted and contrastive decoding."""
        return self.config.has_memory

    def make_cache(self) -> Cache:
        """Returns a new cache for a stream."""
        return self.model.make_cache()

    def reset_memory(self, cache: OlmemCache, rows: int | Sequence[int] | torch.Tensor | None = None) -> None:
        """Forgets all that a cache holds of these rows, as `OlmemModel.reset_memory` does."""
        self.model.reset_memory(cache, rows)

    def stream(
        self, tokenizer: PreTrainedTokenizerBase | None = None, path: str | os.PathLike | None = None
    ) -> OlmemStream:
        """Returns a stream to read and write with bounded memory, which goes on from a file of `OlmemStream.save`."""
        return OlmemStream(self, tokenizer, path)

    def as_step(self, cache: OlmemCache) -> OlmemStep:
        """Returns a module that reads one token a row from where a cache is, its state in buffers, to be exported."""
        return OlmemStep(self, cache)

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
        """Computes logits, and the loss if there are labels, as Olmo3ForCausalLM does.

        Args:
            labels: the token ids (B, T) to predict, each from the tokens before it. −100 is ignored.
            logits_to_keep: computes logits of the last n tokens only, or of a tensor of indices. 0 computes all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last_columns=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cache = outputs.get(CACHE_NAME)
        logits = self.model.steps.product(self.lm_head, outputs.last_hidden_state[:, columns, :], cache)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        returned: dict[str, Any] = {CACHE_NAME: cache}
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **returned
        )


__all__ = ["OlmemForCausalLM", "OlmemModel", "OlmemPreTrainedModel"]
