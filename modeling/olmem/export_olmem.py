# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""A step of a model as a module whose state is in buffers, for `torch.export` and what is built on it."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from .cache_olmem import OlmemCache, is_olmem_cache
from .compat_olmem import hides_values


class OlmemStep(nn.Module):
    """Reads one token a row, and goes on from where a cache was.

    The state is in the module's buffers, which a step writes in place, so that a program exported from it goes on too.
    Both go on in the same buffers:

        step = model.as_step(cache)
        program = torch.export.export(step, (ids,))  # ids (B, 1)

    ExecuTorch keeps neither what buffers hold nor what a program asserts. Its `ExecutorchBackendConfig` needs
    `passes=[InitializedMutableBufferPass([*step.cache.state])]`. Where a state has been lost, or a token begins a
    segment of memory or finds no room, which a program cannot do, the logits are NaN from there on.

    Args:
        model: an `OlmemForCausalLM`.
        cache: what the rows of a batch have read, a token at least. It is copied, and stays as it is.
    """

    def __init__(self, model: PreTrainedModel, cache: OlmemCache):
        super().__init__()
        if not is_olmem_cache(cache):
            raise ValueError(
                f"`cache` must be an OlmemCache (got a {type(cache).__name__}); make an `OlmemCache(model.config)`, "
                "and pass it to the model with a prompt first."
            )
        cache.refuse_half_read()
        if cache.fresh:
            raise ValueError(
                "`cache` must have read a token of each row (got one that has read none); pass it to the model with a "
                "prompt first."
            )
        self.model, self.cache = model, copy.deepcopy(cache)
        self.cache.check(model.config)  # pyright: ignore[reportArgumentType]  of an Olmem model
        self.cache.reserve()
        for name, tensor in self.cache.state.items():
            self.register_buffer(name, tensor)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, 1, vocab_size) of ids (B, 1)."""
        if input_ids.shape[1] != 1:
            raise ValueError(
                f"`input_ids` must be (B, 1) (got {tuple(input_ids.shape)}); a step reads one token a row, and the "
                "model itself reads several."
            )
        self.cache.state = {name: getattr(self, name) for name in self.cache.state}
        if not hides_values(input_ids):
            return self.model(input_ids, past_key_values=self.cache).logits
        goes_on = self.goes_on()
        logits = self.model(input_ids, past_key_values=self.cache).logits
        self.cache.columns.mul_(goes_on)  # 0 is no state, so that later steps do not go on either
        return logits.where(goes_on, torch.nan)

    def goes_on(self) -> torch.Tensor:
        """Returns whether a program can read one more token, (), from what it has read."""
        cache, segment = self.cache, self.cache.config.memory_segment_length
        found = cache.columns > 0
        if cache.max_length is not None and not all(cache.is_sliding):
            found = found & (cache.columns < cache.max_length)
        if cache.config.num_memory_tokens and segment is not None:
            found = found & (cache.seen % segment != 0).all()
        return found


__all__ = ["OlmemStep"]
