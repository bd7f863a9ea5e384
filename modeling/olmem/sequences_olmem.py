# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Says which queries of a call attend to which keys, as sequences that lie one after another without padding.

A kernel for sequences of various lengths computes no padding and needs no mask. It reads all queries and all keys as
one list each, and where each sequence begins. The last query of a sequence belongs to its last key, so that windows and
causality follow from the order alone.

Shapes: B batch, C columns of queries, S columns of keys, N queries that are tokens, n sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .compat_olmem import sent
from .visibility_olmem import Visibility

FAR = 2**62  # above every number of a token


@dataclass(frozen=True)
class Sequences:
    """Holds sequences of queries, each with the keys that it attends to.

    Attributes:
        queries: the indices (N,) of the queries among B · C, in the order of the sequences. None stands for all.
        keys: the indices of the keys among B · S. None stands for all.
        query_starts: where each sequence begins among the queries, and their number at last, (n + 1,) in int32.
        key_starts: the same of the keys.
        most_queries: the length of the longest sequence of queries.
        most_keys: the length of the longest sequence of keys.
        is_causal: whether a query sees no key after its own.
        before: the most keys before its own that a query sees, or −1 without a limit.
        repeats: whether some keys are in more than one sequence.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    most_queries: int
    most_keys: int
    is_causal: bool = False
    before: int = -1
    repeats: bool = False

    def to(self, device: torch.device) -> "Sequences":
        """Returns a copy on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: sent(value, device) for name, value in tensors.items()})


class Span(NamedTuple):
    """Names tokens of one row that follow one another."""

    row: int
    first: int  # the number of the first one
    size: int


def starts_of(lengths: torch.Tensor) -> torch.Tensor:
    """Returns where sequences of these lengths (n,) begin, and where the last one ends, (n + 1,) in int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def even(batch: int, queries: int, keys: int, device: torch.device, is_causal: bool, before: int = -1) -> Sequences:
    """Returns a sequence for each row, whose queries and keys are all columns."""
    row = torch.arange(batch + 1, device=device, dtype=torch.int32)
    return Sequences(None, None, row * queries, row * keys, queries, keys, is_causal, before)


@dataclass(frozen=True)
class Listed:
    """Lists the queries of a call that are tokens, in the order of the rows, and what they see.

    A row here is a text: a row of the batch, or a packed document of one.

    Attributes:
        indices: the indices (N,) of the queries among B · C, or None for all.
        rows: the row (N,) of each.
        numbers: the number (N,) of the token whose keys each sees.
    """

    indices: torch.Tensor | None
    rows: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span]) -> "Listed":
        """Lists the tokens of spans on the host, those of a row in the order of the spans."""
        row, first, count = torch.tensor(spans, dtype=torch.long).view(-1, 3).unbind(1)
        rows, numbers = row.repeat_interleave(count), repeat_ranges(first, count)
        if bool((row[1:] >= row[:-1]).all()):
            return cls(None, rows, numbers)
        order = rows.argsort(stable=True)
        return cls(order, rows[order], numbers[order])

    def cut(self, marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cuts the queries where the row or a mark (N,) changes.

        Returns the lengths of the sequences (n,), and the index of each one's first query among N.
        """
        changed = (self.rows[1:] != self.rows[:-1]) | (marks[1:] != marks[:-1])
        first = torch.nn.functional.pad(changed.nonzero()[:, 0] + 1, (1, 0))
        return torch.diff(first, append=first.new_tensor([len(self.rows)])), first

    def window(
        self, visibility: Visibility, keys: "Listed", is_causal: bool = True, written: torch.Tensor | None = None
    ) -> Sequences:
        """Returns the sequences of queries and the keys in their windows.

        Args:
            keys: lists all keys, oldest first in each row. Negative numbers stand for no token.
            is_causal: whether each query is a token that sees its window up to itself. If not, all queries of a row see
                what one token sees.
            written: which keys are those of write tokens, which all queries of their row see.
        """
        in_chunks = is_causal and visibility.chunk_size > 0
        marks = self.numbers // visibility.chunk_size if in_chunks else torch.zeros_like(self.numbers)
        lengths, first = self.cut(marks)
        rows, start = self.rows[first], visibility.start(self.numbers[first])
        stop = self.numbers[first + lengths - 1] + 1
        # The keys that queries of a row see follow one another: those from the first window's start on.
        count = int(torch.maximum(self.rows[-1], keys.rows[-1])) + 1
        oldest = start.new_full((count,), FAR).scatter_reduce(0, rows, start, "amin")
        newest = start.new_zeros(count).scatter_reduce(0, rows, stop, "amax")
        seen = (keys.numbers >= oldest[keys.rows]) & (keys.numbers < newest[keys.rows]) & (keys.numbers >= 0)
        found = (seen if written is None else (seen & ~written) | written).nonzero()[:, 0]
        of_row = keys.rows[found].bincount(minlength=count)
        if in_chunks:
            key_lengths = stop - start
            before_row = of_row.cumsum(0) - of_row
            found = found[repeat_ranges(before_row[rows] + start - oldest[rows], key_lengths)]
        else:
            key_lengths = of_row[rows]
        most_queries, most_keys = torch.stack((lengths.amax(), key_lengths.amax())).tolist()
        before = visibility.sliding_window - 1 if is_causal and visibility.sliding_window else -1
        whole = not in_chunks and len(found) == len(keys.numbers) and keys.indices is None
        indices = found if keys.indices is None else keys.indices[found]
        return Sequences(
            self.indices,
            None if whole else indices,
            starts_of(lengths),
            starts_of(key_lengths),
            most_queries,
            most_keys,
            is_causal,
            before,
            in_chunks,
        )

    def leading(self, counts: torch.Tensor, first_slot: torch.Tensor) -> Sequences:
        """Returns the sequences of queries that see the first keys of a run, so many (N,) of them.

        Args:
            first_slot: the index of the run's first key among all keys, for each row.
        """
        lengths, first = self.cut(counts)
        of_sequence = counts[first]
        indices = repeat_ranges(first_slot[self.rows[first]], of_sequence)
        most_queries, most_keys = torch.stack((lengths.amax(), of_sequence.amax())).tolist()
        starts = starts_of(lengths), starts_of(of_sequence)
        return Sequences(self.indices, indices, *starts, most_queries, most_keys, repeats=True)


def repeat_ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns the ranges that begin at `starts` (n,) and have these lengths (n,), one after another."""
    stops = lengths.cumsum(0)
    place = torch.repeat_interleave(starts - stops + lengths, lengths)
    return place + torch.arange(len(place), device=place.device)
