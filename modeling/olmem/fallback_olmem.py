# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Computes plain Olmo2 and Olmo3, for caches, masks and attention functions of Transformers or of a serving engine.

Keys have absolute positions here, and Transformers' masks say what a query sees. A model with a feature that needs an
`OlmemCache` is refused.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head dim.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backends_olmem import eager_attention_forward
from .cache_olmem import is_olmem_cache
from .compat_olmem import CACHE_NAME, PAGED, hides_values, refuse, returns_tensors
from .configuration_olmem import OlmemConfig
from .contracts_olmem import Candidates, Heads, LayerKind, Needs, Output, Part, Plan, Rotations, Section
from .ops_olmem import PLAIN
from .plan_olmem import layer_kinds
from .positions_olmem import OlmemRotaryEmbedding, Rotation, rotary_clip
from .rules_olmem import BY_SLOT, ROTATING
from .view_olmem import View
from .visibility_olmem import Visibility

OWN_IMPLEMENTATIONS = ("sdpa", "eager")  # those that Olmem has backends of its own for
# Those that attend to learned sinks too. Some of the others take them and leave them out without a word.
WITH_SINKS = (*OWN_IMPLEMENTATIONS, *PAGED, "flex_attention")
OF_TRANSFORMERS = ("sdpa", "eager", "flex_attention", "flash_attention", "paged|")  # how its own names begin
ENGINE = "attention_instances"  # the keyword by which vLLM and SGLang hand their own attention down to each layer
MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class EngineCache(Protocol):
    """A cache of paged attention, which belongs to a serving engine and is passed on by Transformers."""

    def get_seq_length(self) -> int:
        """Returns the number of columns that were read."""
        ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the keys and values of a layer, adds to its keywords, and returns the keys and values to attend to."""
        ...


ForeignCache = Cache | EngineCache


class Implementation(NamedTuple):
    """Describes an `attn_implementation`."""

    name: str
    is_own: bool  # whether Olmem has backends of its own for it
    is_plain: bool  # whether it asks for plain operations, which return attention weights

    @classmethod
    def of(cls, config: OlmemConfig) -> "Implementation":
        """Returns the implementation that a model's configuration asks for."""
        name = config._attn_implementation or "eager"
        return cls(name, name in OWN_IMPLEMENTATIONS, name == "eager")


def is_padding_mask(attention_mask: object) -> bool:
    """Returns whether a mask is (B, T), or None for no padding."""
    return attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)


def falls_back(
    config: OlmemConfig,
    cache: ForeignCache | None,
    attention_mask: object,
    position_ids: torch.Tensor | None,
    arguments: Mapping[str, object],
) -> bool:
    """Decides whether a call is computed as plain Olmo2 or Olmo3.

    `arguments` are the caller's further keywords.

    Raises:
        ValueError: if it must be, but the model has a feature that needs an `OlmemCache`, or the cache is one.
    """
    own_cache = is_olmem_cache(cache)
    if cache is not None and (isinstance(cache, type) or not hasattr(cache, "update")):
        raise ValueError(
            f"`past_key_values` must be a cache (got {cache if isinstance(cache, type) else type(cache)}); pass an "
            "`OlmemCache(model.config)`, or leave it out."
        )
    reason = reason_to_fall_back(config, cache, attention_mask, position_ids)
    has_engine = arguments.get(ENGINE) is not None
    if has_engine:
        reason = f"an engine's `{ENGINE}`, which keep keys and values alone; serve the model by `olmem serve FOLDER`"
    if reason is None:
        return False
    if own_cache:
        raise ValueError(f"`past_key_values` is an OlmemCache, which does not work with {reason}.")
    refuse_own_features(config, f"with {reason}")
    implementation = Implementation.of(config)
    if has_engine and implementation.name.startswith(OF_TRANSFORMERS):
        raise ValueError(
            f"`attn_implementation` must be the engine's (got {implementation.name!r}) with `{ENGINE}`, which would "
            "not be asked; set it before the model is made."
        )
    if cache is not None and "sliding_attention" in config.layer_types and config.sliding_window == 1:
        raise ValueError(
            "`sliding_window` must be at least 2 (got 1) with a cache of Transformers, which cannot keep a window that "
            "holds nothing of the past; leave `past_key_values` and `cache_implementation` out."
        )
    return True


def reason_to_fall_back(
    config: OlmemConfig, cache: ForeignCache | None, attention_mask: object, position_ids: torch.Tensor | None
) -> str | None:
    """Returns which argument makes a call plain Olmo2 or Olmo3, with the way out, or None if no argument does."""
    implementation = Implementation.of(config)
    if not implementation.is_own:
        return f"`attn_implementation` {implementation.name!r}; set 'sdpa' or 'eager'"
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2:
        return "an `attention_mask` that is not (B, T); pass one, zeros for padding"
    if cache is not None and not is_olmem_cache(cache):
        remedy = "leave `past_key_values` and `cache_implementation` out, and tune prompts where PEFT tunes a prefix"
        if returns_tensors():
            remedy = "export `model.as_step(cache)`, with an OlmemCache that has read a prompt"
        return f"a {type(cache).__name__}; {remedy}"
    if isinstance(attention_mask, dict):
        return "masks made ahead; pass an `attention_mask` (B, T)"
    if cache is None and position_ids is not None and hides_values(position_ids):
        return "`position_ids` while tracing without a cache; leave them out"
    return None


def refuse_own_features(config: OlmemConfig, context: str) -> None:
    """Raises an error for the first feature of a model that plain Olmo2 and Olmo3 do not have.

    Args:
        context: where such a feature does not work and what to do about it, as the end of a sentence.
    """
    types = set(config.layer_types)
    if config.num_sink_tokens and types != {"full_attention"}:
        refuse(f"`num_sink_tokens` must be 0 (got {config.num_sink_tokens}) {context}.")
    if config.has_memory:
        refuse(f"{config.memory_rule}, which only an OlmemCache holds, {context}.")
    by_slot = set(BY_SLOT) & set(config.layer_position_embeddings)
    if by_slot:
        refuse(
            f"`position_embedding` must be made of rope and none (got {min(by_slot)!r}, which goes by what a query "
            f"sees) {context}."
        )
    if "chunked_attention" in types:
        refuse(f"`layer_types` must not have 'chunked_attention' {context}.")
    if config.sink_logit_init is not None and Implementation.of(config).name not in WITH_SINKS:
        refuse(f"`sink_logit_init` must be None (got {config.sink_logit_init}) {context}.")


@dataclass
class ForeignPart(Part):
    """Holds keys and values from a foreign cache, and the keywords of the attention function for them."""

    arguments: dict[str, Any] = field(default_factory=dict)


def attend_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> Output:
    """Attends to learned sinks by plain operations, as `eager_attention_forward` does, under a mask for SDPA.

    Such a mask is of numbers, or says which keys are seen, or is None where queries see all keys up to their own.
    """
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, least)
    return eager_attention_forward(module, query, key, value, attention_mask, **arguments)[0], None


class InterfaceBackend:
    """Attends by one of Transformers' attention functions, or by plain operations where there are learned sinks.

    Args:
        implementation: the name of the function.
        attention_mask: the mask that Transformers makes for this function.
        sliding_window: the size of the window in sliding layers, or None.
    """

    def __init__(self, implementation: str, attention_mask: Any, sliding_window: int | None):
        self.interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        self.with_sinks: Callable = attend_with_sinks
        if implementation != "sdpa":
            name = PAGED.get(implementation, implementation)
            self.with_sinks = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        self.attention_mask, self.sliding_window = attention_mask, sliding_window

    def supports(self, view: View, needs: Needs) -> bool:
        """Supports every call of plain Olmo2 or Olmo3."""
        return True

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: Section) -> Output:
        """Attends as `Backend.attend` does."""
        part = parts[0]
        assert isinstance(part, ForeignPart)
        interface, arguments = self.interface, part.arguments
        if heads.sink_logits is not None:
            interface, arguments = self.with_sinks, {"s_aux": heads.sink_logits, **arguments}
        return interface(
            heads.module,
            section.rotations.place(query),
            part.key,
            part.value,
            self.attention_mask,
            dropout=heads.dropout,
            scaling=heads.scaling,
            sliding_window=self.sliding_window,
            **arguments,
        )


class ForeignState:
    """Remembers the keys and values of one layer in a foreign cache, or remembers nothing.

    Args:
        cache: the cache of Transformers or of an engine, or None.
        layer_index: the layer's index in the cache.
        arguments: the caller's further keywords for the attention function, to which paged attention adds.
    """

    def __init__(self, cache: ForeignCache | None, layer_index: int, arguments: dict[str, Any]):
        self.cache, self.layer_index, self.arguments = cache, layer_index, arguments

    def write(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, earlier: Sequence[Sequence[torch.Tensor]] = ()
    ) -> list[list[Part]]:
        """Rotates new keys, and writes them with the values (B, K, T, D) as `LayerState.write` does."""
        key, arguments = plan.rotations.place(key), dict(self.arguments)
        if isinstance(self.cache, Cache):
            key, value = self.cache.update(key, value, self.layer_index)
        elif self.cache is not None:  # paged attention
            key, value = self.cache.update(key, value, self.layer_index, kwargs=arguments)
        return [[ForeignPart(key, value, arguments=arguments)]]

    def candidates(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        earlier: Sequence[Sequence[torch.Tensor]] = (),
        scores: torch.Tensor | None = None,
    ) -> Iterator[Candidates]:
        """Yields nothing, because a model that retrieves is refused."""
        return iter(())


class Fallback:
    """Plans a call of plain Olmo2 or Olmo3.

    Args:
        config: the model's configuration.
        rotary: the model's rotary embedding.
        cache: a cache of Transformers or of an engine, or None.
        hidden_states: the embeddings (B, T, hidden_size).
        attention_mask: the caller's mask, which is None, (B, T), of four dimensions, or one for each layer type.
        position_ids: the caller's positions (1 or B, T), or None for the tokens' indices.
        arguments: the caller's further keywords for the attention function.
    """

    def __init__(
        self,
        config: OlmemConfig,
        rotary: OlmemRotaryEmbedding,
        cache: ForeignCache | None,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        arguments: dict[str, Any],
    ):
        self.config, self.rotary, self.cache = config, rotary, cache
        self.hidden_states, self.attention_mask = hidden_states, attention_mask
        self.clip = rotary_clip(config)
        self.position_ids = self.positions() if position_ids is None else position_ids
        self.arguments = {"position_ids": self.position_ids, **arguments}

    def positions(self) -> torch.Tensor:
        """Returns the index (1 or B, T) of each token.

        RoPE depends on differences of indices only, so padding on the left may be counted. Where rotated vectors are
        clipped, only a row's real tokens are counted.
        """
        length, mask = self.hidden_states.shape[1], self.attention_mask
        if self.clip is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = self.cache.get_seq_length() if self.cache is not None else 0
        return (torch.arange(length, device=self.hidden_states.device) + seen).unsqueeze(0)

    def states(self) -> list[ForeignState]:
        """Returns the state of each layer."""
        return [ForeignState(self.cache, index, self.arguments) for index in range(self.config.num_hidden_layers)]

    def plans(self) -> list[Plan]:
        """Returns the plan of each layer. Layers of one kind share a plan."""
        kinds = layer_kinds(self.config)
        masks: dict[str, Any] = {}
        plans: dict[LayerKind, Plan] = {}
        for kind in dict.fromkeys(kinds):
            if kind.layer_type not in masks:
                masks[kind.layer_type] = self.mask(kind.layer_type)
            rotation = Rotation(clip=self.clip)
            if kind.position_embedding in ROTATING:
                angles = self.rotary(self.hidden_states, self.position_ids, kind.layer_type)
                rotation = Rotation(*angles, clip=self.clip)
            window = self.config.sliding_window if kind.layer_type == "sliding_attention" else None
            backend = InterfaceBackend(Implementation.of(self.config).name, masks[kind.layer_type], window)
            visibility, rotations = Visibility.of(self.config, kind.layer_type), Rotations.of(rotation)
            view = View(visibility, self.position_ids, self.position_ids)
            section = Section(slice(None), view, rotations, Needs(), backend)
            plans[kind] = Plan(visibility, [section], rotations, PLAIN, returns_weights=True)
        return [plans[kind] for kind in kinds]

    def mask(self, layer_type: str) -> Any:
        """Returns the mask of one layer type, in the form that `attn_implementation` needs."""
        if isinstance(self.attention_mask, dict):  # `generate()` has made them already
            return self.attention_mask[layer_type]
        given: dict[str, Any] = {CACHE_NAME: self.cache}
        return MASK_FUNCTIONS[layer_type](
            config=self.config,
            inputs_embeds=self.hidden_states,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            **given,
        )


__all__ = ["Fallback", "Implementation", "falls_back", "is_padding_mask"]
