# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""`generate()` with an `OlmemCache`: made unless the caller has another, gone on from, and never told of masks."""

from typing import TYPE_CHECKING, Any

from transformers.generation import GenerationMixin, GenerationMode
from transformers.masking_utils import create_masks_for_generate

from .cache_olmem import CACHE_NAME, one_cache, takes_cache
from .rules_olmem import BY_SLOT


def is_olmem_cache(cache: Any) -> bool:
    """By a mark: the code of a Hub repository has another class of that name."""
    return getattr(cache, "serves_olmem", False)


class OlmemGenerationMixin(GenerationMixin):
    """What of Transformers' `generate()` an OlmemCache needs otherwise."""

    if TYPE_CHECKING:
        config: Any
        model: Any
        __call__: Any

    def generate(self, *args, **kwargs):
        """As in Transformers; a cache is given as `past_key_values` or as `cache`, whatever the release."""
        return super().generate(*args, **one_cache(kwargs, CACHE_NAME))  # pyright: ignore[reportAttributeAccessIssue]

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  nor does it return a bool
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """An OlmemCache, unless the caller has one or asks for a kind of Transformers'. Assisted decoding takes tokens
        back, which a bounded cache cannot once a window has let go: it keeps the one of Transformers, on both sides."""
        rolls_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        wants_own = generation_config.use_cache and generation_config.cache_implementation is None
        if model_kwargs.get(CACHE_NAME) is None and wants_own:
            if not rolls_back:
                model_kwargs[CACHE_NAME] = self.model.make_cache()
                return None
            if self.config.has_memory:
                raise ValueError(
                    f"{self.config.memory_rule} to assist or be assisted, which takes tokens back; use no assistant "
                    "and no `prompt_lookup_num_tokens`."
                )
            by_slot = set(BY_SLOT) & set(self.config.layer_position_embeddings)
            if by_slot:
                raise ValueError(
                    f"`position_embedding` must be made of rope and none (got {min(by_slot)!r}) to assist or be "
                    "assisted, which needs a cache of Transformers; use no assistant and no `prompt_lookup_num_tokens`."
                )
            if any(context.num_sinks or context.chunk_size for context in self.model.contexts.values()):
                raise ValueError(
                    f"`num_sink_tokens` must be 0 (got {self.config.num_sink_tokens}) and no layer chunked to assist "
                    "or be assisted, which takes tokens back; use no assistant and no `prompt_lookup_num_tokens`."
                )
        return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]  a mixin's `self`
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """As in Transformers, where `input_ids` are the whole text, what the cache has read included, unless the mask
        covers more columns than they are. One id alone is a new one, as nobody keeps the whole of a stream. What goes
        on from an OlmemCache is read in pieces too, where some releases read the whole text again."""
        cache, embeddings = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        read = cache.get_seq_length() if cache is not None and is_olmem_cache(cache) else 0
        given = (input_ids if embeddings is None else embeddings).shape[1]
        mask = model_kwargs.get("attention_mask")
        columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        are_new = embeddings is None and (columns != given or given == 1)
        if read and not are_new and embeddings is None and getattr(cache, "began_anew", False):
            raise ValueError(
                f"`input_ids` must be new ones, one a row (got {given}), where rows of `past_key_values` began anew: "
                "read all but the last by `model(input_ids[:, :-1], past_key_values=past_key_values)`, then generate "
                "from the last."
            )
        if read and not are_new and given <= read:
            raise ValueError(
                f"`input_ids` must be the whole text, of more than the {read} columns that `past_key_values` has read "
                f"(got {given}); where they are new ones, read all but the last by `model(input_ids[:, :-1], "
                "past_key_values=past_key_values)`, then generate from the last."
            )
        if not read or embeddings is not None:
            return super()._prefill(  # pyright: ignore[reportAttributeAccessIssue]  a mixin's `self`
                input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration
            )
        new_ids = input_ids if are_new else input_ids[:, read:]
        size = generation_config.prefill_chunk_size or new_ids.shape[1]
        rest = {name: value for name, value in model_kwargs.items() if name not in ("attention_mask", "position_ids")}
        outputs = None
        for start in range(0, new_ids.shape[1], size):
            piece = slice(start, start + size)
            new_mask = None if mask is None else mask[:, mask.shape[1] - new_ids.shape[1] :][:, piece]
            outputs = self(new_ids[:, piece], attention_mask=new_mask, return_dict=True, **rest)
        return outputs

    @staticmethod
    @takes_cache
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """With an OlmemCache no mask is made ahead: of the columns, those of the new tokens are all it needs."""
        if is_olmem_cache(past_key_values):
            return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
        if "chunked_attention" in config.layer_types:  # the forward refuses the cache, in our words
            return attention_mask
        given = {CACHE_NAME: past_key_values}
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **given, **kwargs)


__all__ = ["OlmemGenerationMixin", "is_olmem_cache"]
