# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Says which tokens a query sees, and in which slots, by pure functions of integers.

The real tokens of a row are numbered 0, 1, 2 and so on, without padding. Query i sees one list of keys: memory, then
sinks, then its window. The indices of this list are the slots. The position of a key is its slot, and the position of
the query is its own slot, so differences stay bounded however long the stream is. Memory and sinks are the prefix.

The place of token i in the stream is `num_memory + i`. It equals the token's slot until the window has lost a token.

Every function takes integers or integer tensors, which broadcast.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

from .compat_olmem import certain
from .configuration_olmem import OlmemConfig

STORE_BLOCK = 128  # the number of tokens that are stored together, before any of them retrieves
Number = Any  # an integer, or a tensor of integers


def _at_least_zero(number: Number) -> Number:
    return number.clamp(min=0) if isinstance(number, torch.Tensor) else max(number, 0)


def _at_most(number: Number, most: int) -> Number:
    return number.clamp(max=most) if isinstance(number, torch.Tensor) else min(number, most)


@dataclass(frozen=True)
class Visibility:
    """Says which keys the queries of one layer type see.

    | layer_type | window of query i |
    |---|---|
    | `full_attention` | 0 ≤ j ≤ i |
    | `sliding_attention` | i − sliding_window < j ≤ i |
    | `chunked_attention` | chunk_size · (⌊i / chunk_size⌋ − lookback) ≤ j ≤ i, and 0 ≤ j |

    The sinks are the tokens j < num_sinks. A sink that is still in the window is seen once, in the window. Memory
    tokens are not tokens of the stream and have no numbers.
    """

    layer_type: str
    sliding_window: int = 0
    chunk_size: int = 0
    lookback: int = 0
    num_sinks: int = 0
    num_memory: int = 0

    @classmethod
    def of(cls, config: OlmemConfig, layer_type: str) -> Self:
        """Returns the visibility of a layer type in a model with that configuration."""
        sizes: dict[str, int] = {"num_memory": config.num_memory_tokens}
        if layer_type != "full_attention":  # whose window holds every sink
            sizes["num_sinks"] = config.num_sink_tokens
        if layer_type == "sliding_attention":
            sizes["sliding_window"] = config.sliding_window or 0
        if layer_type == "chunked_attention":
            sizes |= {"chunk_size": config.attention_chunk_size or 0, "lookback": config.attention_chunk_lookback}
        return cls(layer_type, **sizes)

    @property
    def sizes(self) -> tuple[str, int, int, int, int, int]:
        """Returns all fields, to compare visibilities whose classes come from two copies of this module."""
        chunks = self.chunk_size, self.lookback
        return self.layer_type, self.sliding_window, *chunks, self.num_sinks, self.num_memory

    @property
    def span(self) -> int | None:
        """Returns the greatest number of tokens in a window, the query's own included, or None without a limit."""
        if self.layer_type == "full_attention":
            return None
        return self.sliding_window or self.chunk_size * (self.lookback + 1)

    @property
    def least(self) -> int:
        """Returns the fewest tokens in a window that has lost some."""
        return self.sliding_window or self.chunk_size * self.lookback + 1

    @property
    def num_prefix(self) -> int:
        """Returns the number of slots of memory and sinks together."""
        return self.num_memory + self.num_sinks

    def lets_go(self, length: int) -> bool:
        """Returns whether the last window has lost a token after that many tokens were read."""
        return self.span is not None and length > self.span

    def may_let_go(self, length: int) -> bool:
        """Tells whether a window may have let go of a token, where a graph is recorded for any length."""
        return self.span is not None and not certain(length <= self.span)

    def start(self, query: Number) -> Number:
        """Returns the first token of a query's window."""
        if self.layer_type == "full_attention":
            return query * 0
        if self.layer_type == "sliding_attention":
            return _at_least_zero(query - self.sliding_window + 1)
        return _at_least_zero(self.chunk_size * (query // self.chunk_size - self.lookback))

    def sees(self, query: Number, key: Number) -> Number:
        """Returns whether a key is in a query's window. Padding has the number −1, and no query sees it."""
        return (key >= 0) & (key >= self.start(query)) & (key <= query)

    def sinks_before(self, query: Number) -> Number:
        """Returns the number of sinks before a query's window."""
        return _at_most(self.start(query), self.num_sinks)

    def prefix_count(self, query: Number) -> Number:
        """Returns how many slots of the prefix a query sees, which are always the first ones."""
        return self.num_memory + self.sinks_before(query)

    def slot(self, query: Number) -> Number:
        """Returns the slot of a query's own token, which is the query's position."""
        return self.prefix_count(query) + query - self.start(query)

    def key_slot(self, query: Number, key: Number) -> Number:
        """Returns the slot of a key that a query sees, which is the key's position."""
        shift = self.start(query) - self.sinks_before(query)
        return self.num_memory + key - shift * (key >= self.start(query))

    def candidates(self, query: Number, key: Number, capacity: int) -> Number:
        """Returns whether a query may retrieve a key.

        It may if the key is among the last `capacity` tokens that have left its window, and is no sink.
        """
        start = self.start(query)
        return (key >= self.num_sinks) & (key >= start - capacity) & (key < start)

    def store_size(self, capacity: int) -> int:
        """Returns the number of tokens in a store: those to retrieve, those in the window, and a block of new ones."""
        return capacity + (self.span or 0) + STORE_BLOCK - 1


def ring_slot(number: Number, size: int | None) -> Number:
    """Returns the slot of a token in a ring of `size` slots, or in a row that grows without end if it is None."""
    return number if size is None else number % size


def held(slot: Number, seen: Number, size: int) -> Number:
    """Returns the number of the token in a slot of a ring after `seen` tokens were written, or a negative number."""
    return seen - 1 - (seen - 1 - slot) % size


def last_numbers(seen: torch.Tensor, before: int | None, most: int | None) -> torch.Tensor:
    """Returns the numbers (R, P) of the last tokens of rows that have read `seen` (R,) tokens, oldest first.

    Negative numbers stand for no token.

    Args:
        before: the greatest number of tokens that a row may have read, or None if only the device knows it.
        most: the greatest number P of tokens to return, or None without a limit. One of both must be given.
    """
    count = min(number for number in (before, most) if number is not None)
    return seen[:, None] - count + torch.arange(count, device=seen.device)


__all__ = ["STORE_BLOCK", "Visibility", "held", "last_numbers", "ring_slot"]
