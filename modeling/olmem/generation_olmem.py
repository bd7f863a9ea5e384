# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Adapts Transformers' `generate()` to an `OlmemCache`, which it makes unless the caller passes another cache."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria, StopStringCriteria
from transformers.masking_utils import create_masks_for_generate

from .cache_olmem import is_olmem_cache
from .compat_olmem import CACHE_NAME, rename_cache, takes_cache
from .configuration_olmem import OlmemConfig
from .fallback_olmem import refuse_own_features

NOT_AT_A_STEP = {"next_sequence_length", "attention_mask", "position_ids"}
# What `generate()` usually gives to a step.
STEP_ARGUMENTS = NOT_AT_A_STEP | {"cache", "past_key_values", "use_cache", "logits_to_keep"}


class OlmemGenerationMixin(GenerationMixin):
    """Overrides the steps of Transformers' `generate()` that work differently with an OlmemCache."""

    if TYPE_CHECKING:
        config: OlmemConfig
        generation_config: GenerationConfig
        make_cache: Callable[[], Cache]
        __call__: Any

        @property
        def device(self) -> torch.device: ...

    def generate(self, *args, **kwargs):
        """Generates as Transformers does, with a cache as `past_key_values` or `cache` in every release."""
        return super().generate(*args, **rename_cache(kwargs, CACHE_NAME))  # pyright: ignore[reportAttributeAccessIssue]

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  nor does it return a bool
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Makes an OlmemCache, unless the caller passes a cache or a `cache_implementation`.

        Assisted decoding uses Transformers' caches for both models, because it takes tokens back. An OlmemCache cannot
        do that once a window has lost a token.
        """
        wanted = generation_config.cache_implementation
        if generation_config.use_cache and wanted is not None:
            refuse_own_features(
                self.config,
                f"with `cache_implementation` {wanted!r}; leave it out, and generate() makes an OlmemCache, which is "
                "of bounded size where layers have windows",
            )
        rolls_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        wants_own = generation_config.use_cache and generation_config.cache_implementation is None
        if model_kwargs.get(CACHE_NAME) is None and wants_own:
            if not rolls_back:
                model_kwargs[CACHE_NAME] = cache = self.make_cache()
                if is_olmem_cache(cache):
                    cache.expect(max_cache_length)  # pyright: ignore[reportAttributeAccessIssue]
                return None
            refuse_own_features(
                self.config,
                "to assist or be assisted, which takes tokens back from a cache of Transformers; use no assistant and "
                "no `prompt_lookup_num_tokens`",
            )
        return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]  a mixin's `self`
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Makes the manager of continuous batching, unless the model needs more than paged keys and values."""
        refuse_own_features(
            self.config,
            "in continuous batching, which pages keys and values alone; pass the prompts to `generate()` as a padded "
            "batch",
        )
        if self.config.sink_logit_init is not None:
            self._supports_flash_attn = False  # Transformers would switch to it, and it leaves learned sinks out
        return super().init_continuous_batching(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore  whose arguments Transformers looks at
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):  # pyright: ignore
        """Prepares the inputs of a call as Transformers does, but without a mask for a step with an OlmemCache.

        Tokens that `generate()` has written are never padding, and the host need not wait for a mask that is not there.
        The cache is `past_key_values` in every release, where PEFT looks for it: it begins a text with its prompt if
        it finds no cache, or an empty one.
        """
        is_prompt = kwargs.pop("reads_prompt", False)  # columns of a prompt may be padding
        if kwargs.get("next_sequence_length") == 1 and not is_prompt and not args and STEP_ARGUMENTS.issuperset(kwargs):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            if cache is not None and is_olmem_cache(cache) and not cache.fresh:  # as below, but faster
                given = {name: value for name, value in kwargs.items() if name not in NOT_AT_A_STEP}
                return rename_cache({"input_ids": input_ids[:, -1:].clone(), **given}, "past_key_values")
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, **kwargs
        )
        inputs = rename_cache(inputs, "past_key_values")
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        is_step = ids is not None and ids.shape[1] == 1 and not is_prompt
        if is_step and cache is not None and is_olmem_cache(cache) and not cache.fresh:
            inputs.pop("attention_mask", None)
            inputs.pop("position_ids", None)
        return inputs

    def _get_stopping_criteria(self, *args, **kwargs):
        """Returns Transformers' criteria, without a warning of a maximum length if all layers have windows."""
        given, config = kwargs.get("stopping_criteria"), kwargs.get("generation_config")
        if config is not None and any(isinstance(each, StopStringCriteria) for each in given or []):
            config.stop_strings = None  # a stream brings their criterion, because `generate()` drops its tokenizer
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if "full_attention" not in self.config.layer_types:
            for each in criteria:
                if isinstance(each, MaxLengthCriteria):
                    each.max_position_embeddings = None
        return criteria

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Reads a prompt as Transformers does, also in pieces with an OlmemCache that has read tokens.

        `input_ids` are the whole text, with the tokens that such a cache has read.
        """
        cache, embeddings = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        read = cache.get_seq_length() if cache is not None and is_olmem_cache(cache) else 0
        given = (input_ids if embeddings is None else embeddings).shape[1]
        mask = model_kwargs.get("attention_mask")
        columns = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
        if read and (given <= read or columns > given or cache.began_anew):  # pyright: ignore
            raise ValueError(
                f"`input_ids` must be the whole text, of more than the {read} columns that `past_key_values` has read, "
                f"none of whose rows began anew (got {given} columns, and a mask of {columns}); to go on with what is "
                "new alone, read and write by `stream = model.stream(tokenizer)`."
            )
        if not read or embeddings is not None:
            model_kwargs["reads_prompt"] = True
            try:
                return super()._prefill(  # pyright: ignore[reportAttributeAccessIssue]  a mixin's `self`
                    input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration
                )
            finally:
                del model_kwargs["reads_prompt"]
        new_ids = input_ids[:, read:]
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
        """Makes masks as Transformers does, except for an OlmemCache, which needs only the columns of new tokens."""
        if is_olmem_cache(past_key_values):
            return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
        if "chunked_attention" in config.layer_types:  # the forward call refuses the cache
            return attention_mask
        given = {CACHE_NAME: past_key_values}
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **given, **kwargs)


__all__ = ["OlmemGenerationMixin"]
