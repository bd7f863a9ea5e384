# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What a query sees: which tokens, in which slots, and where a cache keeps them. Functions of integers, no model.

A row's real tokens, padding left out, are numbered 0, 1, 2 … Query i sees memory, then sinks, then its window, as one
list whose places are the slots 0, 1, 2 … A key's position is its slot, the query's position is its own slot:
differences stay bounded however far the stream has come. Memory and sinks are the prefix; before any window has let go
of a token, token i is in slot `num_memory + i`, its place in the stream.

Every function takes integers or integer tensors, which broadcast.
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

    The sinks are the tokens j < num_sinks. One that is still in the window counts once, in its place there. Memory
    tokens are no tokens of the stream, and have no numbers.
    """

    layer_type: str
    sliding_window: int = 0
    chunk_size: int = 0
    lookback: int = 0
    num_sinks: int = 0
    num_memory: int = 0

    @classmethod
    def of(cls, config: OlmemConfig, layer_type: str) -> Self:
        sizes: dict[str, int] = {"num_memory": config.num_memory_tokens}
        if layer_type != "full_attention":  # there every sink is in the window
            sizes["num_sinks"] = config.num_sink_tokens
        if layer_type == "sliding_attention":
            sizes["sliding_window"] = config.sliding_window or 0
        if layer_type == "chunked_attention":
            sizes |= {"chunk_size": config.attention_chunk_size or 0, "lookback": config.attention_chunk_lookback}
        return cls(layer_type, **sizes)

    @property
    def span(self) -> int | None:
        """Most tokens that a window holds, the query's own included; None where there is no limit."""
        if self.layer_type == "full_attention":
            return None
        return self.sliding_window or self.chunk_size * (self.lookback + 1)

    @property
    def num_prefix(self) -> int:
        """Slots of memory and sinks."""
        return self.num_memory + self.num_sinks

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
        return self.num_memory + self.sinks_before(query) + query - self.start(query)

    def key_slot(self, query: Number, key: Number) -> Number:
        """The position for a query of a token that it sees: a sink's own, or its place after the sinks."""
        shift = self.start(query) - self.sinks_before(query)
        return self.num_memory + key - shift * (key >= self.start(query))

    def candidates(self, query: Number, key: Number, capacity: int) -> Number:
        """Whether a token is among the last `capacity` that have left a query's window and are no sinks."""
        start = self.start(query)
        return (key >= self.num_sinks) & (key >= start - capacity) & (key < start)


def ring_slot(number: Number, size: int | None) -> Number:
    """Where a ring of that many slots keeps a token; None is a ring without end."""
    return number if size is None else number % size


def held(slot: Number, seen: Number, size: int) -> Number:
    """The token in a slot of a ring after the first `seen` tokens were written; negative where there is none yet."""
    return seen - 1 - (seen - 1 - slot) % size


@dataclass
class Sight:
    """The new tokens of one forward call and the keys they may see, by number, for the layers of one type.

    The new ones may be memory tokens, that are read or written: these see one another, both ways.

    R rows: the batch's, or one that stands for all. T new tokens, S keys, P keys from before, M memory slots, Z sinks.
    """

    context: Context
    numbers: torch.Tensor  # (R, T) of the new tokens; −1 is padding
    key_numbers: torch.Tensor  # (R, S) of the keys in the order they are attended to; negative is none
    causal: bool = False  # every key up to the query is seen, and keys and queries are the same tokens
    prefix: bool = False  # a query may have memory or sinks before its window
    padded: bool = False  # some numbers may be −1
    documents: list | None = None  # of each row, where packed documents start and stop; numbers are of the longest
    slack: int = 0  # columns of padding between two real tokens of a row, at most
    memory: str | None = None  # "read" or "write": the new tokens are memory's, numbered as if they went on
    # With a cache:
    seen: torch.Tensor | None = None  # (R,) real tokens read before
    fills_sinks: bool = False  # a new token may be a sink
    length: int | None = None  # columns that a row has read with these, padding included; None where it is not known
    chosen: torch.Tensor | None = None  # (R,) the rows of the batch that these are; None is all
    rows: torch.Tensor = field(init=False)  # (R, 1) to index a batch with `slots`
    step_mask: torch.Tensor | None = field(init=False)  # (R, 1, M + Z + S) for one in place; None where all is seen
    queries: torch.Tensor = field(init=False)  # (R, T) `numbers`, but padding, and memory, look out from a token before
    places: torch.Tensor = field(init=False)  # (R, T) the new ones' own places in the stream
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
            prefix=context.num_memory > 0 or (context.num_sinks > 0 and context.lets_go(length)),
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
        slots = torch.where(kept, context.num_prefix + ring_slot(numbers, limit), -1)
        prefix = context.num_sinks > 0 and (after_all is None or context.lets_go(after_all))
        prefix |= context.num_memory > 0
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
        past_numbers = last_numbers(seen, before or 0, context.span and context.span - 1)
        past = past_numbers.shape[1]
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
            past_slots=context.num_prefix + ring_slot(past_numbers.clamp(min=0), limit),
        )

    @classmethod
    def after(cls, earlier: Self, numbers: torch.Tensor, padded: bool, **of_cache) -> Self:
        """Of the next tokens of a call, which begin in the first column, where the keys of those before are at hand."""
        past = earlier.key_numbers[:, earlier.first_kept :]
        return cls(
            earlier.context,
            numbers,
            key_numbers=torch.cat((past.expand(len(numbers), -1), numbers.expand(len(past), -1)), dim=1),
            prefix=True,
            padded=padded,
            slack=past.shape[1] if padded or earlier.padded or earlier.slack else 0,
            **of_cache,
        )

    @classmethod
    def of_reads(cls, count: int, device: torch.device, chosen: torch.Tensor | None) -> Self:
        """Of memory tokens that are read: they see one another and nothing else, in slots 0, 1, 2 …"""
        numbers = torch.arange(count, device=device)[None]
        return cls(Context("full_attention"), numbers, numbers, memory="read", chosen=chosen)

    @classmethod
    def of_writes(
        cls,
        context: Context,
        count: int,
        past_numbers: torch.Tensor,
        seen: torch.Tensor,
        chosen: torch.Tensor | None,
        past_slots: torch.Tensor | None,
    ) -> Self:
        """Of memory tokens that are written after `seen` (R,) tokens: they see what the last of these sees, which is
        among `past_numbers` (R, P), and one another, in the slots that come next."""
        numbers = seen[:, None] + torch.arange(count, device=seen.device)
        key_numbers = torch.cat((past_numbers.expand(len(seen), -1), numbers), dim=1)
        return cls(context, numbers, key_numbers, prefix=True, memory="write", chosen=chosen, past_slots=past_slots)

    def __post_init__(self):
        self.queries = self.numbers
        if self.memory is not None:
            self.queries = (self.numbers[:, :1] - 1).expand_as(self.numbers)
        elif self.padded:
            self.queries = self.numbers.cummax(-1).values
            if self.seen is not None:
                self.queries = self.queries.maximum(self.seen[:, None] - 1)
        self.places = self.context.num_memory + (self.queries if self.memory is None else self.numbers)
        self.rows = torch.arange(len(self.numbers), device=self.numbers.device)[:, None]
        if self.chosen is not None:
            self.rows = self.chosen[:, None]
        self.step_mask = None
        if self.is_step:
            mask = self.mask(slice(None), slice(None), with_prefix=self.context.num_prefix > 0)
            on_host = mask.device.type == "cpu" and not torch.compiler.is_compiling()
            self.step_mask = None if on_host and bool(mask.all()) else mask

    @property
    def is_step(self) -> bool:
        """Whether it is of one token whose keys are read where the cache has them, prefix first."""
        return self.in_place and self.numbers.shape[1] == 1

    @property
    def query_slots(self) -> torch.Tensor:
        """(R, T) the queries' positions; memory tokens come one after another."""
        number = self.queries.clamp(min=0)
        slots = self.context.slot(number)
        return slots if self.memory is None else slots + self.places - self.context.num_memory - number

    @property
    def key_places(self) -> torch.Tensor:
        """(R, S) the keys' places in the stream."""
        return self.context.num_memory + self.key_numbers

    @property
    def step_slots(self) -> torch.Tensor:
        """(R, M + Z + S) of the prefix and keys of a step; 0 of those that are not seen."""
        seen = self.context.sees(self.queries, self.key_numbers)
        keys = torch.where(seen, self.context.key_slot(self.queries, self.key_numbers), 0)
        return torch.cat((self.prefix_slots.expand(len(keys), -1), keys), dim=-1)

    @property
    def sinks(self) -> torch.Tensor:
        """(Z,) the sinks' numbers."""
        return torch.arange(self.context.num_sinks, device=self.numbers.device)

    @property
    def prefix_slots(self) -> torch.Tensor:
        """(M + Z,)"""
        return torch.arange(self.context.num_prefix, device=self.numbers.device)

    @property
    def prefix_positions(self) -> torch.Tensor:
        """(1, M + Z) for queries at their slots; of a step (R, M + Z) for the one query of a row at its place."""
        if not self.is_step:
            return self.prefix_slots[None]
        return self.places - self.context.slot(self.queries) + self.prefix_slots

    @property
    def sink_slots(self) -> torch.Tensor:
        """(R, T) where the new tokens that are sinks go in the prefix; −1 is nowhere."""
        is_sink = (self.numbers >= 0) & (self.numbers < self.context.num_sinks)
        return torch.where(is_sink, self.context.num_memory + self.numbers, -1)

    def new_sinks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, Z) whether each sink is among the new tokens, and in which column."""
        match = self.numbers[:, None, :] == self.sinks[:, None]
        return match.any(-1), match.int().argmax(-1)

    def mask(self, queries: slice, keys: slice, with_prefix: bool = False) -> torch.Tensor:
        """(R, T, S), or (R, T, M + Z + S): what is seen. Padding before a row's first token sees all there is, for its
        softmax to be a number."""
        query = self.queries[:, queries, None]
        mask = self.context.sees(query, self.key_numbers[:, None, keys])
        if self.memory is not None:
            mask |= (self.key_numbers >= self.numbers[:, :1])[:, None, keys]
        if with_prefix:
            memory = mask.new_ones(*mask.shape[:2], self.context.num_memory)
            mask = torch.cat((memory, self.context.sees_sink(query, self.sinks), mask), dim=-1)
        return mask | ~mask.any(-1, keepdim=True) if self.padded else mask

    def reach(self, queries: slice) -> slice:
        """The columns of keys that hold all that these queries see."""
        past = self.key_numbers.shape[1] - self.numbers.shape[1]
        if self.memory is not None:
            return slice(0, self.key_numbers.shape[1])
        if self.in_place:  # a full layer's keys stand in order, padding left out
            return slice(0, past + queries.stop)
        if self.context.span is None:
            return slice(0, past + queries.stop)
        return slice(max(0, past + queries.start - self.context.span + 1 - self.slack), past + queries.stop)

    @property
    def first_kept(self) -> int:
        """The first column of keys that the last queries see, or any later ones."""
        if self.context.span is None or torch.compiler.is_compiling():
            return 0
        seen = self.key_numbers >= self.context.start(self.queries[:, -1:])
        return int(seen.any(0).int().argmax())

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


def last_numbers(seen: torch.Tensor, before: int, most: int | None) -> torch.Tensor:
    """(R, P) the numbers of the last tokens of rows that have seen so many (R,), none more than `before`."""
    count = before if most is None else min(before, most)
    return seen[:, None] - count + torch.arange(count, device=seen.device)


@dataclass(frozen=True)
class Piece:
    """New tokens of a forward call that are of one segment in each row, and begin in its first column."""

    numbers: torch.Tensor  # (R, T); −1 is padding
    columns: slice | torch.Tensor  # where they are in the call; (B, T) where rows differ
    padded: bool
    begins: bool | None = None  # whether they begin a segment; None where rows may differ


def cut_in_segments(numbers: torch.Tensor, padded: bool, phase: int | None, length: int) -> list[Piece]:
    """The pieces of new tokens (R, T) that segments of that length leave whole. `phase` is how far into a segment the
    first one is; None where rows differ."""
    columns = numbers.shape[1]
    if phase is not None:
        starts = [0, *range(length - phase, columns, length)]
        parts = [slice(start, stop) for start, stop in pairwise([*starts, columns])]
        return [Piece(numbers[:, part], part, padded, part.start > 0 or phase == 0) for part in parts]
    real = numbers >= 0
    if columns == 1 or not real.any():
        return [Piece(numbers, slice(0, columns), padded)]
    segment = torch.where(real, numbers // length, -1)
    first = segment.where(real, torch.iinfo(segment.dtype).max).amin(-1, keepdim=True)
    pieces = []
    for index in range(int((segment - first).max()) + 1):
        mine = segment == first + index
        width = int(mine.sum(-1).max())
        order = (~mine).int().argsort(dim=-1, stable=True)[:, :width]
        its_numbers = torch.where(mine, numbers, -1).gather(1, order)
        pieces.append(Piece(its_numbers, order, bool((its_numbers < 0).any())))
    return pieces


def place_in_pieces(pieces: list[Piece], columns: int) -> torch.Tensor:
    """(B, T) where each token of a call is among its pieces side by side, which are not slices; 0 of padding."""
    batch = len(pieces[0].numbers)
    places, before = pieces[0].numbers.new_zeros(batch, columns), 0
    for piece in pieces:
        columns_of = piece.columns
        assert isinstance(columns_of, torch.Tensor)
        width = piece.numbers.shape[1]
        place = before + torch.arange(width, device=places.device).expand(batch, -1)
        found = places.gather(1, columns_of).where(piece.numbers < 0, place)
        places = places.scatter(1, columns_of, found)
        before += width
    return places


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


__all__ = [
    "Context",
    "Piece",
    "Sight",
    "cut_in_segments",
    "find_documents",
    "held",
    "last_numbers",
    "place_in_pieces",
    "ring_slot",
]
