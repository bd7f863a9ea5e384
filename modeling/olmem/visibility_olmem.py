# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Which tokens a query sees, and in which slots, as pure functions of integers.

The real tokens of a row, padding left out, are numbered 0, 1, 2 and so on. Query i sees memory, then sinks, then its
window, as one list whose places are the slots 0, 1, 2 and so on. The position of a key is its slot, and the position
of the query is its own slot, so differences stay bounded however long the stream is. Memory and sinks together are
the prefix. As long as no window has let go of a token, token i is in slot `num_memory + i`, its place in the stream.

Every function takes integers or integer tensors, which broadcast.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

from .configuration_olmem import OlmemConfig

STORE_BLOCK = 128  # tokens that may enter a store before the first of them looks something up
Number = Any  # an integer, or a tensor of integers


def _at_least_zero(number: Number) -> Number:
    return number.clamp(min=0) if isinstance(number, torch.Tensor) else max(number, 0)


def _at_most(number: Number, most: int) -> Number:
    return number.clamp(max=most) if isinstance(number, torch.Tensor) else min(number, most)


@dataclass(frozen=True)
class Visibility:
    """States which keys the queries of one type of layer see.

    | layer_type | window of query i |
    |---|---|
    | `full_attention` | 0 ≤ j ≤ i |
    | `sliding_attention` | i − sliding_window < j ≤ i |
    | `chunked_attention` | chunk_size · (⌊i / chunk_size⌋ − lookback) ≤ j ≤ i, and 0 ≤ j |

    The sinks are the tokens j < num_sinks. A sink that is still in the window counts once, in its place there. Memory
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
        """Returns what the layers of that type see in a model of that configuration."""
        sizes: dict[str, int] = {"num_memory": config.num_memory_tokens}
        if layer_type != "full_attention":  # there every sink is in the window
            sizes["num_sinks"] = config.num_sink_tokens
        if layer_type == "sliding_attention":
            sizes["sliding_window"] = config.sliding_window or 0
        if layer_type == "chunked_attention":
            sizes |= {"chunk_size": config.attention_chunk_size or 0, "lookback": config.attention_chunk_lookback}
        return cls(layer_type, **sizes)

    @property
    def sizes(self) -> tuple[str, int, int, int, int, int]:
        """Returns all that tells one visibility from another, whatever module their classes come from."""
        chunks = self.chunk_size, self.lookback
        return self.layer_type, self.sliding_window, *chunks, self.num_sinks, self.num_memory

    @property
    def span(self) -> int | None:
        """Returns the most tokens that a window holds, the query's own included, or None where there is no limit."""
        if self.layer_type == "full_attention":
            return None
        return self.sliding_window or self.chunk_size * (self.lookback + 1)

    @property
    def num_prefix(self) -> int:
        """Returns how many slots memory and sinks take together."""
        return self.num_memory + self.num_sinks

    def lets_go(self, length: int) -> bool:
        """Tells whether a window has let go of a token once that many tokens were read."""
        return self.span is not None and length > self.span

    def start(self, query: Number) -> Number:
        """Returns the first token of a query's window."""
        if self.layer_type == "full_attention":
            return query * 0
        if self.layer_type == "sliding_attention":
            return _at_least_zero(query - self.sliding_window + 1)
        return _at_least_zero(self.chunk_size * (query // self.chunk_size - self.lookback))

    def sees(self, query: Number, key: Number) -> Number:
        """Tells whether a token is in a query's window. Padding has the number −1, and nothing sees it."""
        return (key >= 0) & (key >= self.start(query)) & (key <= query)

    def sinks_before(self, query: Number) -> Number:
        """Returns how many sinks stand before a query's window."""
        return _at_most(self.start(query), self.num_sinks)

    def prefix_count(self, query: Number) -> Number:
        """Returns how many slots of the prefix a query sees; they are always its first ones."""
        return self.num_memory + self.sinks_before(query)

    def slot(self, query: Number) -> Number:
        """Returns a query's position, which is its own slot."""
        return self.prefix_count(query) + query - self.start(query)

    def key_slot(self, query: Number, key: Number) -> Number:
        """Returns the position of a token that a query sees: a sink's own slot, or the token's place after them."""
        shift = self.start(query) - self.sinks_before(query)
        return self.num_memory + key - shift * (key >= self.start(query))

    def candidates(self, query: Number, key: Number, capacity: int) -> Number:
        """Tells whether a token is among the last `capacity` that have left a query's window and are no sinks."""
        start = self.start(query)
        return (key >= self.num_sinks) & (key >= start - capacity) & (key < start)

    def store_size(self, capacity: int) -> int:
        """Returns how many tokens a store holds: those to retrieve, those still in the window, and a block."""
        return capacity + (self.span or 0) + STORE_BLOCK - 1


def ring_slot(number: Number, size: int | None) -> Number:
    """Returns where a ring of that many slots keeps a token. A `size` of None is a row that grows without end."""
    return number if size is None else number % size


def held(slot: Number, seen: Number, size: int) -> Number:
    """Returns the token in a slot of a ring after `seen` tokens were written, negative where there is none."""
    return seen - 1 - (seen - 1 - slot) % size


def last_numbers(seen: torch.Tensor, before: int | None, most: int | None) -> torch.Tensor:
    """Returns the numbers (R, P) of the last tokens of rows that have read `seen` (R,), at most `most` of them.

    `before` is the largest number of tokens that a row may have read; None where only the device knows, and there is a
    `most`. Numbers below 0 stand for no token.
    """
    count = min(number for number in (before, most) if number is not None)
    return seen[:, None] - count + torch.arange(count, device=seen.device)


__all__ = ["STORE_BLOCK", "Visibility", "held", "last_numbers", "ring_slot"]
