# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What the queries of one section of a forward call see, as masks, slots and places of whole tensors.

Shapes: R rows, which are the batch's or one that stands for all; T queries; S keys of the window part; P slots of the
prefix, which are M of memory and then those of the sinks.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch

from .compat_olmem import known, known_here
from .visibility_olmem import Visibility


@dataclass
class View:
    """States by number which keys the queries of one section see, and at which positions.

    A section holds tokens of the stream, or memory tokens that are read or written. Read tokens see one another and
    nothing else. Write tokens see what the last token of their segment sees, and one another; they are numbered as if
    they went on after it.
    """

    visibility: Visibility
    numbers: torch.Tensor  # (R, T) of the queries' own tokens; −1 is padding
    key_numbers: torch.Tensor  # (R, S) of the keys of the window part, in their order there; negative is none
    role: str = "token"  # or "read", or "write"
    padded: bool = False  # some numbers may be −1
    prefix: bool = False  # a query may see memory, or sinks before its window
    causal: bool = False  # each query sees every key up to itself, and keys and queries are the same tokens
    in_place: bool = False  # the keys of the window part lie where a cache has them
    slack: int = 0  # columns of padding between two real tokens of a row, at most
    seen: torch.Tensor | None = None  # (R,) real tokens read before this call
    documents: list[list[tuple[int, int]]] | None = None  # (start, stop) of each packed document of each row
    queries: torch.Tensor = field(init=False)  # (R, T) the tokens from which the queries look out
    places: torch.Tensor = field(init=False)  # (R, T) the places of the queries' tokens in the stream
    step_mask: torch.Tensor | None = field(init=False)  # (R, 1, [P +] S) which keys a step sees; None is all
    masks: dict[torch.dtype | None, torch.Tensor] = field(init=False, default_factory=dict)  # of `whole_mask`
    offsets: torch.Tensor | None = field(init=False, default=None)  # of `step_offsets`

    def __post_init__(self):
        self.queries = self.numbers
        if self.role == "write":
            self.queries = (self.numbers[:, :1] - 1).expand_as(self.numbers)
        elif self.padded:  # padding looks out from a token before it
            self.queries = self.numbers.cummax(-1).values
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
        """Tells whether this is one token a row whose keys are read where a cache has them."""
        return self.in_place and self.numbers.shape[1] == 1

    @property
    def query_slots(self) -> torch.Tensor:
        """Returns the queries' positions (R, T) in what they see; write tokens follow the last token one by one."""
        if self.role == "read":
            return self.places
        number = self.queries.clamp(min=0)
        slots = self.visibility.slot(number)
        return slots if self.role == "token" else slots + self.numbers - number

    @property
    def key_places(self) -> torch.Tensor:
        """Returns the places (R, S) in the stream of the window part's keys."""
        return (0 if self.role == "read" else self.visibility.num_memory) + self.key_numbers

    @property
    def prefix_slots(self) -> torch.Tensor:
        """Returns the slots (1, P) of memory and sinks."""
        return torch.arange(self.visibility.num_prefix, device=self.numbers.device)[None]

    @property
    def step_slots(self) -> torch.Tensor:
        """Returns the slots (R, P + S) of a step's prefix and keys; a key that is not seen has slot 0."""
        seen = self.visibility.sees(self.queries, self.key_numbers)
        keys = torch.where(seen, self.visibility.key_slot(self.queries, self.key_numbers), 0)
        return torch.cat((self.prefix_slots.expand(len(keys), -1), keys), dim=-1)

    def step_offsets(self) -> torch.Tensor:
        """Returns how far the slots (R, P + S) of a step's prefix and keys lie from the query's; never more than 0.

        They are computed once for all layers that share the view.
        """
        if self.offsets is None:
            self.offsets = self.step_slots - self.query_slots
        return self.offsets

    def mask(self, queries: slice, keys: slice, with_prefix: bool = False) -> torch.Tensor:
        """Returns which keys are seen, (R, T, S) or with the prefix in front (R, T, P + S).

        Padding that sees nothing sees everything instead, so that its softmax is a number.
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
        """Returns which keys all queries see, (R, 1, T, S), or of a dtype what is added to their scores.

        It is made once for all layers that share the view, and is asked for only where it is small.
        """
        if dtype not in self.masks:
            mask = self.mask(slice(None), slice(None))[:, None]
            if dtype is not None:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            self.masks[dtype] = mask
        return self.masks[dtype]

    def reach(self, queries: slice) -> slice:
        """Returns the columns of the window part that hold all the keys which these queries see."""
        if self.role != "token" or queries.stop is None:
            return slice(None)
        past = self.key_numbers.shape[1] - self.numbers.shape[1]
        if self.in_place or self.visibility.span is None:  # keys in the order of their numbers, from 0
            return slice(0, past + queries.stop)
        return slice(max(0, past + queries.start - self.visibility.span + 1 - self.slack), past + queries.stop)

    def upto(self, length: int) -> Self:
        """Returns the view of a document of that length, as if it were alone."""
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
        """Returns the same view on another device."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)


def find_sinks(numbers: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whether each of the first tokens is among the numbers (R, S), and in which column, (R, count) each."""
    match = numbers[:, None, :] == torch.arange(count, device=numbers.device)[:, None]
    return match.any(-1), match.int().argmax(-1)


def inner_padding(numbers: torch.Tensor, after_others: bool = False) -> int:
    """Returns the most columns of padding that stand between two real tokens of a row.

    With `after_others`, real tokens stand before the first column too.
    """
    length = numbers.shape[1]
    real = numbers >= 0
    column = torch.arange(length, device=numbers.device)
    first = 0 if after_others else torch.where(real, column, length).amin(-1)
    stop = torch.where(real, column + 1, 0).amax(-1)
    return known((stop - first - real.sum(-1)).max().clamp(min=0), length)


__all__ = ["View", "find_sinks", "inner_padding"]
