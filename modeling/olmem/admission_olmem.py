# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Says which tokens a store that selects keeps, as functions of their scores and numbers.

Of the tokens that have left a query's window and are no sinks, the `capacity` ones of the highest (score, number) are
the query's candidates, so that of equal scores the newer token stays. Each key head has scores of its own.

The best of a set and a new token are among the best of the set, and the new token. So what was beaten once is beaten
for ever, and a store of bounded size holds all candidates of all later queries.

Shapes: R is the batch size, or 1 if all rows are equal; B batch, K key/value heads, T queries, S keys. Where numbers
are (R, K, S), K may be 1 if all heads have the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .compat_olmem import certain, columns_of, lowest
from .contracts_olmem import Candidates
from .visibility_olmem import Visibility

EMPTY, HIGHEST = torch.iinfo(torch.long).min, torch.iinfo(torch.long).max
AGES = 2**32  # the ages that are told from one another where scores are equal


def priorities(scores: torch.Tensor, numbers: torch.Tensor, newest: torch.Tensor, num_sinks: int = 0) -> torch.Tensor:
    """Returns integers (R, K, S) in the order of (score, number), and EMPTY for sinks and negative numbers.

    Args:
        scores: the scores (R, K, S), which are compared in float32.
        numbers: the numbers (R, K, S), none above that of the newest token.
        newest: the number (R,) of each row's newest token.
    """
    bits = torch.where(scores == 0, 0.0, scores).float().view(torch.int32)  # −0 equals 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    age = (newest[:, None, None] - numbers).clamp(0, AGES - 1)
    return torch.where(numbers >= num_sinks, order.long() * AGES + (AGES - 1 - age), EMPTY)


def beaten(
    priority: torch.Tensor, numbers: torch.Tensor, starts: torch.Tensor, capacity: int, most: int, num_sinks: int = 0
) -> torch.Tensor:
    """Returns the highest priority (R, K, T) that does not suffice to be a query's candidate, EMPTY if all do.

    All tokens from the first query's window on must be among the keys.

    Args:
        priority: the priorities (R, K, S).
        numbers: the numbers (R, K, S).
        starts: the first token (R, T) of each query's window, in ascending order.
        most: the most keys that have left a window, beside those that stay.
    """
    if certain(most <= 0):
        return priority.new_full((*priority.shape[:2], starts.shape[1]), EMPTY)
    has_left = (priority > EMPTY) & (numbers < starts[:, None, -1:])
    left = torch.where(has_left, priority, HIGHEST)
    worst, order = lowest(left, most)
    own = numbers.expand_as(left).gather(-1, order)
    present = (worst < HIGHEST)[..., None, :] & (own[..., None, :] < starts[:, None, :, None])
    before = ((priority > EMPTY) & (numbers < starts[:, None, :1])).sum(-1, keepdim=True)
    leavers = starts.clamp(min=num_sinks) - starts[:, :1].clamp(min=num_sinks)
    excess = before + leavers[:, None] - capacity
    is_beaten = present & (present.cumsum(-1) <= excess[..., None])
    return torch.where(is_beaten, worst[..., None, :], EMPTY).amax(-1)


def free_slots(priority: torch.Tensor, numbers: torch.Tensor, start: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the slots (R, K, count) of a store that new tokens may take, the empty ones first.

    Args:
        priority: the priorities (R, K, S) of what is stored, EMPTY where nothing is.
        numbers: the numbers (R, K, S).
        start: the first token (R,) of the window of the next query, from which on all tokens must stay.
        count: the number of new tokens.
    """
    slot = torch.arange(priority.shape[-1], device=priority.device)
    order = torch.where(numbers < start[:, None, None], priority, HIGHEST)
    return torch.where(priority == EMPTY, EMPTY + slot, order).topk(count, largest=False).indices


@dataclass
class Admitted:
    """Holds the keys among which a block of queries has its candidates."""

    columns: torch.Tensor | None  # (B, K, S) which of the keys they are; None if they are the first ones
    scores: torch.Tensor  # (B, K, S)
    priority: torch.Tensor  # (B, K, S)
    numbers: torch.Tensor  # (R, K, S)
    starts: torch.Tensor  # (R, T) the first token of each query's window
    beaten: torch.Tensor  # (B, K, T) the priority that a query's candidates exceed

    def allows(self, part: slice) -> torch.Tensor:
        """Returns whether each query may retrieve these keys, (B, K, T, S)."""
        has_left = self.numbers[:, :, None, part] < self.starts[:, None, :, None]
        return has_left & (self.priority[:, :, None, part] > self.beaten[..., None])

    def of_keys(self, index: torch.Tensor) -> torch.Tensor:
        """Returns the indices (B, H, T, k) among all keys of indices among these."""
        if self.columns is None:
            return index
        columns = self.columns.repeat_interleave(index.shape[1] // self.columns.shape[1], dim=1)
        return columns.gather(-1, index.flatten(2)).view_as(index)


def admit(found: Candidates, visibility: Visibility, capacity: int, parts: Sequence[slice]) -> Iterator[Admitted]:
    """Yields the keys among which each block of queries has its candidates.

    Of several blocks each gets what the one before has kept, and the tokens that have left a window since. So the work
    is that of `capacity` keys a block, however many keys there are.
    """
    assert found.scores is not None
    numbers = found.numbers if found.numbers.dim() == 3 else found.numbers[:, None]
    sinks, length = visibility.num_sinks, numbers.shape[-1] if visibility.may_let_go(numbers.shape[-1]) else 0
    numbers, scores = numbers[..., :length], found.scores[..., :length]
    kept: tuple[torch.Tensor, torch.Tensor] | None = None
    reached = torch.zeros_like(found.queries[:, 0])  # the tokens before it have left the window of the last block
    for part in parts:
        queries = found.queries[:, part]
        starts = visibility.start(queries.clamp(min=0))
        columns, own, of_own, most = None, numbers, scores, length - capacity - visibility.least
        if len(parts) > 1:
            leaves = (numbers >= reached[:, None, None]) & (numbers < starts[:, None, -1:])
            first, stop = columns_of(leaves.any(1))
            own = torch.where(leaves, numbers, -1)[..., first:stop].expand(*scores.shape[:2], -1)
            columns = torch.arange(first, stop, device=own.device).expand_as(own)
            if kept is not None:
                columns, own = torch.cat((kept[0], columns), dim=-1), torch.cat((kept[1], own), dim=-1)
            of_own, most = scores.gather(-1, columns), own.shape[-1] - capacity
        priority = priorities(of_own, own, queries[:, -1], sinks)
        yield Admitted(columns, of_own, priority, own, starts, beaten(priority, own, starts, capacity, most, sinks))
        if columns is not None:
            order = priority.topk(min(capacity, priority.shape[-1]), sorted=False).indices
            kept, reached = (columns.gather(-1, order), own.gather(-1, order)), starts[:, -1]


def damage(counts: torch.Tensor, seen: torch.Tensor, visibility: Visibility, capacity: int) -> str | None:
    """Returns why no store can hold tokens with these counts (B, K, S) after rows have read `seen` (B,), or None.

    A count is the number of a slot's token plus 1, and 0 where the slot is empty.
    """
    numbers, sinks, length = counts - 1, visibility.num_sinks, seen[:, None]
    start = visibility.start((length - 1).clamp(min=0))
    is_token = counts != 0
    if bool((is_token & ((numbers < sinks) | (counts > length[..., None]))).any()):
        return "numbers tokens that it cannot hold"
    ordered = counts.sort().values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] > 0)).any()):
        return "holds a token twice"
    in_window = (is_token & (numbers >= start[..., None])).sum(-1)
    if bool((in_window != (length - start.clamp(min=sinks)).clamp(min=0)).any()):
        return "lacks a token of the window"
    if bool((is_token.sum(-1) - in_window < (start - sinks).clamp(0, capacity)).any()):
        return "lacks tokens that have left the window"
    return None


__all__ = ["EMPTY", "Admitted", "admit", "beaten", "damage", "free_slots", "priorities"]
