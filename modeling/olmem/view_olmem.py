# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Says what the queries of one section of a call see, as tensors of masks, slots and places.

Shapes: R is the batch size, or 1 if all rows are equal; T queries; S keys of the window; P slots of the prefix, which
are M of memory and then those of the sinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch

from .compat_olmem import known, known_here
from .sequences_olmem import Listed, Sequences, Span, even
from .visibility_olmem import Visibility


@dataclass
class View:
    """Says which keys the queries of one section see, and the positions of both.

    A section holds tokens of the stream, read tokens or write tokens of memory. Read tokens see one another and nothing
    else. Write tokens see what the last token of their segment sees, and one another. Their numbers follow its number.
    """

    visibility: Visibility
    numbers: torch.Tensor  # (R, T) the numbers of the section's tokens; −1 is padding
    key_numbers: torch.Tensor  # (R, S) the numbers of the window's keys, in stored order; a negative one is no token
    role: str = "token"  # "token", "read" or "write"
    padded: bool = False  # whether some numbers may be −1
    prefix: bool = False  # whether a query may see memory, or sinks before its window
    causal: bool = False  # whether keys and queries are the same tokens, and each query sees all keys up to its own
    in_place: bool = False  # whether the window's keys are read from a cache's buffer, without a copy
    solid: bool = False  # whether all keys are tokens, those of all rows in the same columns, as the host knows
    first: int | None = None  # the first one of the section's numbers, where the host knows that all rows are alike
    spans: Sequence[Span] | None = None  # the tokens, where those of several rows are listed as one row
    key_spans: Sequence[Span] | None = None  # the keys then
    slack: int = 0  # the most columns of padding between two real tokens of a row
    seen: torch.Tensor | None = None  # (R,) the number of real tokens read before this call
    documents: list[list[tuple[int, int]]] | None = None  # (start, stop) of each packed document of each row
    queries: torch.Tensor = field(init=False)  # (R, T) the number of the token whose keys each query sees
    places: torch.Tensor = field(init=False)  # (R, T) the places of the section's tokens in the stream
    step_mask: torch.Tensor | None = field(init=False)  # (R, 1, [P +] S) which keys a step sees; None for all
    masks: dict[torch.dtype | None, torch.Tensor] = field(init=False, default_factory=dict)  # made by `whole_mask`
    offsets: torch.Tensor | None = field(init=False, default=None)  # made by `step_offsets`
    layouts: dict[int, "Layout"] = field(init=False, default_factory=dict)  # made by `layout`, one for each batch size

    def __post_init__(self):
        self.queries = self.numbers
        if self.role == "write":
            self.queries = (self.numbers[:, :1] - 1).expand_as(self.numbers)
        elif self.padded:  # padding sees what the last token before it sees
            self.queries = last_real(self.numbers)
            if self.seen is not None:
                self.queries = self.queries.maximum(self.seen[:, None] - 1)
        first = 0 if self.role == "read" else self.visibility.num_memory
        self.places = first + (self.queries if self.role == "token" else self.numbers)
        self.step_mask = None
        if self.is_step:
            mask = self.mask(slice(None), slice(None), with_prefix=self.prefix)
            self.step_mask = None if known_here(mask.all(), False) else mask

    @property
    def is_step(self) -> bool:
        """Returns whether the section is one token a row that reads its keys from a cache's buffer, without a copy."""
        return self.in_place and self.numbers.shape[1] == 1

    @property
    def query_slots(self) -> torch.Tensor:
        """Returns the slots (R, T) of the queries. Those of write tokens follow that of their segment's last token."""
        if self.role == "read":
            return self.places
        number = self.queries.clamp(min=0)
        slots = self.visibility.slot(number)
        return slots if self.role == "token" else slots + self.numbers - number

    @property
    def key_places(self) -> torch.Tensor:
        """Returns the places (R, S) of the window's keys in the stream."""
        return (0 if self.role == "read" else self.visibility.num_memory) + self.key_numbers

    @property
    def prefix_slots(self) -> torch.Tensor:
        """Returns the slots (1, P) of memory and sinks."""
        return torch.arange(self.visibility.num_prefix, device=self.numbers.device)[None]

    @property
    def step_slots(self) -> torch.Tensor:
        """Returns the slots (R, P + S) of a step's keys in prefix and window. A key that is not seen has slot 0."""
        seen = self.visibility.sees(self.queries, self.key_numbers)
        keys = torch.where(seen, self.visibility.key_slot(self.queries, self.key_numbers), 0)
        return torch.cat((self.prefix_slots.expand(keys.shape[0], -1), keys), dim=-1)

    def step_offsets(self) -> torch.Tensor:
        """Returns the slots (R, P + S) of a step's keys minus that of its query, which are never above 0.

        They are computed once for all layers that share the view.
        """
        if self.offsets is None:
            self.offsets = self.step_slots - self.query_slots
        return self.offsets

    def mask(self, queries: slice, keys: slice, with_prefix: bool = False) -> torch.Tensor:
        """Returns which keys some queries see, (R, T, S), or (R, T, P + S) with the prefix first.

        Padding that would see no key sees all keys instead, so that its softmax is finite.
        """
        query = self.queries[:, queries, None]
        if self.role == "read":
            mask = (self.key_numbers[:, None, keys] >= 0) & (query >= 0)
        else:
            mask = self.visibility.sees(query, self.key_numbers[:, None, keys])
        if self.role == "write":
            mask |= (self.key_numbers >= self.numbers[:, :1])[:, None, keys]
        if with_prefix:
            mask = torch.cat((self.prefix_slots < self.visibility.prefix_count(query), mask), dim=-1)
        return mask | ~mask.any(-1, keepdim=True) if self.padded else mask

    def whole_mask(self, dtype: torch.dtype | None) -> torch.Tensor:
        """Returns the mask (R, 1, T, S) of all queries, as booleans, or as numbers of a dtype to add to the scores.

        It is made once for all layers that share the view. Only calls that are short enough ask for it.
        """
        if dtype not in self.masks:
            mask = self.mask(slice(None), slice(None))[:, None]
            if dtype is not None:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            self.masks[dtype] = mask
        return self.masks[dtype]

    def reach(self, queries: slice) -> slice:
        """Returns a range of the window's keys that holds all keys which these queries see."""
        if self.role != "token" or queries.stop is None:
            return slice(None)
        past = self.key_numbers.shape[1] - self.numbers.shape[1]
        if self.in_place or self.visibility.span is None:  # the keys lie in the order of their numbers, from 0
            return slice(0, past + queries.stop)
        return slice(max(0, past + queries.start - self.visibility.span + 1 - self.slack), past + queries.stop)

    def layout(self, batch: int) -> "Layout":
        """Returns what the queries of `batch` rows see as sequences without padding, made once for all layers."""
        if batch not in self.layouts:
            self.layouts[batch] = Layout(self, batch)
        return self.layouts[batch]

    def upto(self, length: int) -> Self:
        """Returns the view of a document of that length that is alone in its row."""
        numbers = torch.arange(length, device=self.numbers.device)[None]
        visibility = self.visibility
        return type(self)(
            visibility,
            numbers,
            numbers,
            prefix=visibility.num_sinks > 0 and visibility.lets_go(length),
            causal=visibility.span is None or length < visibility.span,
        )

    def to(self, device: torch.device) -> Self:
        """Returns a copy of the view on another device."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)


class Layout:
    """Lists the queries of a view that are tokens, and says which keys they see, made once for all layers.

    A row here is a row of the batch, or one of the packed documents in it. Where the host knows which tokens there are,
    it makes the lists without waiting for the device.

    Args:
        view: the view.
        batch: the number B of rows of the batch.
    """

    def __init__(self, view: View, batch: int):
        self.view, self.device = view, view.numbers.device
        self.made: dict[tuple[int, int] | None, Sequences] = {}
        self.first_keys: torch.Tensor | None = None  # the column of B · T in which each document begins
        length, size = view.numbers.shape[1], view.key_numbers.shape[1]
        is_write = view.role == "write"
        if view.documents is not None:
            columns = [
                (row * length + start, stop - start) for row, of in enumerate(view.documents) for start, stop in of
            ]
            self.first_keys = torch.tensor([start for start, _ in columns])
            self.queries = self.keys = Listed.of([Span(row, 0, count) for row, (_, count) in enumerate(columns)])
        elif view.spans is not None and view.key_spans is not None:
            self.queries, self.keys = Listed.of(view.spans), Listed.of(view.key_spans)
        elif view.first is not None:
            stop = view.first + length
            self.queries = Listed.of([Span(row, view.first, length) for row in range(batch)])
            if is_write:  # which see what the last token before them sees
                self.queries = replace(self.queries, numbers=torch.full_like(self.queries.numbers, view.first - 1))
            self.keys = Listed.of([Span(row, stop - size, size) for row in range(batch)])
        else:
            row = torch.arange(batch, device=self.device)[:, None]
            numbers, rows = view.queries.expand(batch, -1).flatten(), row.expand(-1, length).flatten()
            indices = (view.numbers.expand(batch, -1) >= 0).flatten().nonzero()[:, 0] if view.padded else None
            self.queries = Listed(indices, chosen(rows, indices), chosen(numbers, indices))
            self.keys = Listed(None, row.expand(-1, size).flatten(), view.key_numbers.expand(batch, -1).flatten())
        self.batch, self.written = batch, None
        if is_write:
            is_last = torch.arange(size, device=self.keys.rows.device) >= size - length
            self.written = is_last.expand(batch, -1).flatten()

    def window(self) -> Sequences:
        """Returns the sequences of the queries and the keys in their windows."""
        if None not in self.made:
            view, visibility, is_token = self.view, self.view.visibility, self.view.role == "token"
            if view.solid and is_token and not visibility.chunk_size:
                before = visibility.sliding_window - 1 if visibility.sliding_window else -1
                sizes = view.numbers.shape[1], view.key_numbers.shape[1]
                self.made[None] = even(self.batch, *sizes, self.device, True, before)
            else:
                found = self.queries.window(visibility, self.keys, is_token, self.written)
                self.made[None] = found.to(self.device)
        return self.made[None]

    def prefix(self, slots: tuple[int, int]) -> Sequences:
        """Returns the sequences of the queries and the keys that they see from a slot of the prefix up to another one.

        The prefix of a document are its own first tokens, which are keys of the window.
        """
        if slots not in self.made:
            visibility, (start, stop), rows = self.view.visibility, slots, self.queries.rows
            counts = (visibility.prefix_count(self.queries.numbers) - start).clamp(0, stop - start)
            first = self.first_keys
            if first is None:
                first = torch.arange(int(rows[-1]) + 1, device=rows.device) * visibility.num_prefix + start
            self.made[slots] = self.queries.leading(counts, first).to(self.device)
        return self.made[slots]


def chosen(states: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """Returns the states (N, …) that indices (N,) name, or all of them."""
    return states if indices is None else states[indices]


def last_real(numbers: torch.Tensor) -> torch.Tensor:
    """Returns the number (R, T) of the last token up to each column, or −1 before the first token."""
    count = (numbers >= 0).cumsum(-1)
    first = numbers.where(numbers >= 0, torch.iinfo(numbers.dtype).max).amin(-1, keepdim=True)
    return torch.where(count > 0, first + count - 1, -1)


def find_sinks(numbers: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whether each of the first `count` tokens is among the numbers (R, S), and its column, (R, count) each."""
    match = numbers[:, None, :] == torch.arange(count, device=numbers.device)[:, None]
    return match.any(-1), match.int().argmax(-1)


def inner_padding(numbers: torch.Tensor, after_others: bool = False) -> int:
    """Returns the greatest number of padding columns between two real tokens of a row.

    With `after_others`, the row has real tokens before the first column too.
    """
    length = numbers.shape[1]
    real = numbers >= 0
    column = torch.arange(length, device=numbers.device)
    first = 0 if after_others else torch.where(real, column, length).amin(-1)
    stop = torch.where(real, column + 1, 0).amax(-1)
    return known((stop - first - real.sum(-1)).max().clamp(min=0), length)


__all__ = ["Layout", "View", "find_sinks", "inner_padding"]
