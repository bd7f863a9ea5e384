# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What a query sees: which tokens, in which slots, and where a cache keeps them. Functions of integers, no model.

A row's real tokens, padding left out, are numbered 0, 1, 2 … Query i sees sinks, then its window, as one list whose
places are the slots 0, 1, 2 … A key's position is its slot, the query's position is its own slot: differences stay
bounded however far the stream has come. Every function takes integers or integer tensors, which broadcast.
"""

from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Self

import torch

from .configuration_olmem import OlmemConfig

Number = Any  # an integer, or a tensor of them


def _at_least_zero(number: Number) -> Number:
    return number * (number > 0)


def _smaller(first: Number, second: Number) -> Number:
    return first - _at_least_zero(first - second)


@dataclass(frozen=True)
class Context:
    """What the queries of one type of layer see.

    | layer_type | window of query i |
    |---|---|
    | `full_attention` | 0 ≤ j ≤ i |
    | `sliding_attention` | i − sliding_window < j ≤ i |
    | `chunked_attention` | chunk_size · (⌊i / chunk_size⌋ − lookback) ≤ j ≤ i, and 0 ≤ j |

    The sinks are the tokens j < num_sinks. One that is still in the window counts once, in its place there.
    """

    layer_type: str
    sliding_window: int = 0
    chunk_size: int = 0
    lookback: int = 0
    num_sinks: int = 0

    @classmethod
    def of(cls, config: OlmemConfig, layer_type: str) -> Self:
        if layer_type == "full_attention":  # every sink is in the window
            return cls(layer_type)
        if layer_type == "sliding_attention":
            return cls(layer_type, sliding_window=config.sliding_window or 0, num_sinks=config.num_sink_tokens)
        return cls(
            layer_type,
            chunk_size=config.attention_chunk_size or 0,
            lookback=config.attention_chunk_lookback,
            num_sinks=config.num_sink_tokens,
        )

    @property
    def span(self) -> int | None:
        """Most tokens that a window holds, the query's own included; None where there is no limit."""
        if self.layer_type == "full_attention":
            return None
        return self.sliding_window or self.chunk_size * (self.lookback + 1)

    def lets_go(self, length: int) -> bool:
        """Whether a window has let go of something once that many tokens were read."""
        return self.span is not None and length > self.span

    def start(self, query: Number) -> Number:
        """The first token of a query's window."""
        if self.layer_type == "full_attention":
            return query * 0
        if self.layer_type == "sliding_attention":
            return _at_least_zero(query - self.sliding_window + 1)
        return _at_least_zero(self.chunk_size * (query // self.chunk_size - self.lookback))

    def sees(self, query: Number, key: Number) -> Number:
        """Whether a token is in a query's window. Padding has the number −1: nothing sees it."""
        return (key >= 0) & (key >= self.start(query)) & (key <= query)

    def sees_sink(self, query: Number, sink: Number) -> Number:
        """Whether a sink stands before a query's window, rather than in it or after the query."""
        return (sink < self.num_sinks) & (sink < self.start(query))

    def sinks_before(self, query: Number) -> Number:
        """How many sinks stand before a query's window."""
        return _smaller(self.start(query), self.num_sinks)

    def slot(self, query: Number) -> Number:
        """A query's position, its own slot."""
        return self.sinks_before(query) + query - self.start(query)

    def key_slot(self, query: Number, key: Number) -> Number:
        """The position for a query of a key that it sees: a sink's own number, or its place after the sinks."""
        shift = self.start(query) - self.sinks_before(query)
        return key - shift * (key >= self.start(query))


def ring_slot(number: Number, size: int | None) -> Number:
    """Where a ring of that many slots keeps a token; None is a ring without end."""
    return number if size is None else number % size


def held(slot: Number, seen: Number, size: int) -> Number:
    """The token in a slot of a ring after the first `seen` tokens were written; negative where there is none yet."""
    return seen - 1 - (seen - 1 - slot) % size


@dataclass
class Sight:
    """The new tokens of one forward call and the keys they may see, by number, for the layers of one type.

    R rows: the batch's, or one that stands for all. T new tokens, S keys, P keys from a cache, Z sinks.
    """

    context: Context
    numbers: torch.Tensor  # (R, T) of the new tokens; −1 is padding
    key_numbers: torch.Tensor  # (R, S) of the keys in the order they are attended to; negative is none
    causal: bool = False  # every key up to the query is seen, and keys and queries are the same tokens
    prefix: bool = False  # a query may have sinks before its window
    padded: bool = False  # some numbers may be −1
    documents: list | None = None  # of each row, where packed documents start and stop; numbers are of the longest
    slack: int = 0  # columns of padding between two real tokens of a row, at most
    # With a cache:
    seen: torch.Tensor | None = None  # (R,) real tokens read before
    fills_sinks: bool = False  # a new token may be a sink
    length: int | None = None  # columns that a row has read with these, padding included; None where it is not known
    rows: torch.Tensor = field(init=False)  # (R, 1) to index a batch with `slots`
    step_mask: torch.Tensor | None = field(init=False)  # (R, 1, Z + S) for one token in place; None where all is seen
    queries: torch.Tensor = field(init=False)  # (R, T) `numbers`, but padding looks out from the real token before it
    in_place: bool = False  # the keys are read where the cache has them, the new ones written before
    slots: torch.Tensor | None = None  # (R, T) where the new keys go; −1 is nowhere
    past_slots: torch.Tensor | None = None  # (R, P) where the keys before them are, oldest first; None with `in_place`

    @classmethod
    def without_cache(
        cls, context: Context, numbers: torch.Tensor, padded: bool, documents: list | None = None
    ) -> Self:
        """Of tokens that are the whole stream. Padding may stand anywhere."""
        length = numbers.shape[1]
        return cls(
            context,
            numbers,
            key_numbers=numbers,
            causal=not padded and (context.span is None or length < context.span),
            prefix=context.num_sinks > 0 and context.lets_go(length),
            padded=padded,
            documents=documents,
            slack=inner_padding(numbers) if padded else 0,
        )

    @classmethod
    def with_cache(
        cls,
        context: Context,
        numbers: torch.Tensor,
        padded: bool,
        seen: torch.Tensor,
        before: int | None,
        limit: int | None,
        in_place: bool,
    ) -> Self:
        """Of tokens that go on after `seen` (R,) real ones. `before` is the largest number that any row may have seen,
        None if only the device knows; `limit` the tokens that a layer holds, None if it grows; `in_place` that keys
        may be read where they are, which needs a full layer, or one token."""
        length = numbers.shape[1]
        after_all = None if before is None else before + length
        after = seen + (numbers >= 0).sum(-1)
        kept = numbers >= 0
        if limit is not None:
            kept &= numbers >= after[:, None] - limit
        slots = torch.where(kept, context.num_sinks + ring_slot(numbers, limit), -1)
        prefix = context.num_sinks > 0 and (after_all is None or context.lets_go(after_all))
        fills_sinks = context.num_sinks > 0
        if seen.device.type == "cpu" and not torch.compiler.is_compiling():
            fills_sinks = fills_sinks and bool((seen < context.num_sinks).any())
        if in_place:
            filled = min(number for number in (limit, after_all) if number is not None)
            slot = torch.arange(filled, device=numbers.device)
            if limit is None:
                key_numbers = torch.where(slot < after[:, None], slot, -1)
            else:
                key_numbers = held(slot, after[:, None], limit)
            return cls(
                context,
                numbers,
                key_numbers,
                causal=not padded and before == 0 and context.span is None,
                prefix=prefix,
                padded=padded,
                seen=seen,
                fills_sinks=fills_sinks,
                length=after_all,
                in_place=True,
                slots=slots,
            )
        past = before or 0
        past = past if context.span is None else min(past, context.span - 1)
        past_numbers = seen[:, None] - past + torch.arange(past, device=numbers.device)
        return cls(
            context,
            numbers,
            key_numbers=torch.cat((past_numbers.expand(len(numbers), -1), numbers), dim=1),
            causal=not padded and past == 0 and (context.span is None or length < context.span),
            prefix=prefix,
            padded=padded,
            slack=inner_padding(numbers, past > 0) if padded else 0,
            seen=seen,
            fills_sinks=fills_sinks,
            length=after_all,
            slots=slots,
            past_slots=context.num_sinks + ring_slot(past_numbers.clamp(min=0), limit),
        )

    def __post_init__(self):
        self.queries = self.numbers
        if self.padded:
            self.queries = self.numbers.cummax(-1).values
            if self.seen is not None:
                self.queries = self.queries.maximum(self.seen[:, None] - 1)
        self.rows = torch.arange(len(self.numbers), device=self.numbers.device)[:, None]
        self.step_mask = None
        if self.is_step:
            mask = self.mask(slice(None), slice(None), with_sinks=self.context.num_sinks > 0)
            on_host = mask.device.type == "cpu" and not torch.compiler.is_compiling()
            self.step_mask = None if on_host and bool(mask.all()) else mask

    @property
    def is_step(self) -> bool:
        """Whether it is of one token whose keys are read where the cache has them, sinks first."""
        return self.in_place and self.numbers.shape[1] == 1

    @property
    def step_slots(self) -> torch.Tensor:
        """(R, Z + S) of the sinks and keys of a step; 0 of those that are not seen."""
        seen = self.context.sees(self.queries, self.key_numbers)
        keys = torch.where(seen, self.context.key_slot(self.queries, self.key_numbers), 0)
        return torch.cat((self.sinks.expand(len(keys), -1), keys), dim=-1)

    @property
    def sinks(self) -> torch.Tensor:
        """(Z,) the sinks' numbers, which are their slots too."""
        return torch.arange(self.context.num_sinks, device=self.numbers.device)

    @property
    def sink_positions(self) -> torch.Tensor:
        """(1, Z) for queries at their slots; with `in_place` (R, Z) for the one query of a row at its number."""
        if not self.in_place:
            return self.sinks[None]
        return self.queries - self.context.slot(self.queries) + self.sinks

    @property
    def sink_slots(self) -> torch.Tensor:
        """(R, T) where the new tokens that are sinks go among the sinks; −1 is nowhere."""
        return torch.where(self.numbers < self.context.num_sinks, self.numbers, -1)

    def new_sinks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, Z) whether each sink is among the new tokens, and in which column."""
        match = self.numbers[:, None, :] == self.sinks[:, None]
        return match.any(-1), match.int().argmax(-1)

    def mask(self, queries: slice, keys: slice, with_sinks: bool = False) -> torch.Tensor:
        """(R, T, S), or (R, T, Z + S): what is seen. Padding before a row's first token sees all there is, for its
        softmax to be a number."""
        query = self.queries[:, queries, None]
        mask = self.context.sees(query, self.key_numbers[:, None, keys])
        if with_sinks:
            mask = torch.cat((self.context.sees_sink(query, self.sinks), mask), dim=-1)
        return mask | ~mask.any(-1, keepdim=True) if self.padded else mask

    def reach(self, queries: slice) -> slice:
        """The columns of keys that hold all that these queries see."""
        past = self.key_numbers.shape[1] - self.numbers.shape[1]
        if self.in_place:  # a full layer's keys stand in order, padding left out
            return slice(0, past + queries.stop)
        if self.context.span is None:
            return slice(0, past + queries.stop)
        return slice(max(0, past + queries.start - self.context.span + 1 - self.slack), past + queries.stop)

    def upto(self, length: int) -> Self:
        """That of the first tokens alone."""
        return type(self).without_cache(self.context, self.numbers[:, :length], padded=False)

    def to(self, device: torch.device, **kwargs) -> Self:
        """On another device, as accelerate moves what it finds among a layer's arguments."""
        moved = {
            each.name: value.to(device, **kwargs)
            for each in fields(self)
            if each.init and isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        return replace(self, **moved)


def find_documents(position_ids: torch.Tensor) -> list[list[tuple[int, int]]] | None:
    """Where positions (B, T) start anew, as Transformers marks packed documents: of each row, their (start, stop).
    None where no row holds more than one."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not starts.any():
        return None
    documents = []
    for row in starts:
        cuts = [0, *(row.nonzero()[:, 0] + 1).tolist(), position_ids.shape[1]]
        documents.append(list(pairwise(cuts)))
    return documents


def inner_padding(numbers: torch.Tensor, after_others: bool = False) -> int:
    """Most columns of padding that stand between two real tokens of a row, its earlier ones among them if any."""
    length = numbers.shape[1]
    if torch.compiler.is_compiling():
        return length
    real = numbers >= 0
    column = torch.arange(length, device=numbers.device)
    first = 0 if after_others else torch.where(real, column, length).amin(-1)
    stop = torch.where(real, column + 1, 0).amax(-1)
    return max(0, int((stop - first - real.sum(-1)).max()))


__all__ = ["Context", "Sight", "find_documents", "held", "ring_slot"]
