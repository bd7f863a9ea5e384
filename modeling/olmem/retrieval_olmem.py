# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Retrieves tokens that have left the window (Memorizing Transformers, Wu et al., arXiv 2203.08913).

Each head scores the tokens that have left a query's window by their keys, without positions. It takes the k best, and
attends to their values by the softmax of their scores. A gate that each head learns mixes the result with the attention
over the window.

The candidates are the last `retrieval_capacity` tokens that have left the window, or those of the highest scores of
their own (`admission_olmem`). These join the scores of the queries, so that they learn from what is looked up.

The search is exact. It goes through the candidates part by part and keeps the best k so far. Its work is that of all
scores, but its memory is that of one part. Gradients go back to the k tokens that were chosen.

Shapes: B batch, H query heads, K key/value heads, T queries, S candidates, D head dim, k tokens retrieved; R is B, or 1
if all rows are equal.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .admission_olmem import Admitted, admit
from .compat_olmem import certain, columns_of, pieces, with_gradients_of
from .contracts_olmem import Candidates, by_key_head, by_query_head
from .visibility_olmem import Visibility

SCORES = 2**22  # the most scores of one part of the candidates, which stay in a CPU's caches
SCORES_OF_A_GPU = 2**27  # … on a GPU, which waits for no cache but for launches
SIDE_BY_SIDE = 64  # the number of scores whose greatest is looked at first
BLOCK = 128  # the number of queries at a time


@dataclass(frozen=True)
class Retrieval:
    """Retrieves the best candidates of each query.

    Args:
        visibility: says which tokens have left a query's window.
        top_k: the number of tokens that a query head retrieves.
        capacity: the number of tokens outside the window that may be retrieved.
        scaling: the factor of scores.
    """

    visibility: Visibility
    top_k: int
    capacity: int
    scaling: float

    def mix(
        self, query: torch.Tensor, candidates: Iterable[Candidates], seen: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """Returns an attention output (B, T, H, D) mixed with what its heads retrieve.

        Args:
            query: the queries (B, H, T, D) without positions.
            candidates: the keys and values that blocks or documents of the queries may retrieve.
            seen: the attention output (B, T, H, D), which stays unchanged where there is nothing to retrieve.
            gate: the share (H,) of what is retrieved, between 0 and 1.
        """
        outputs, exist = [], []
        for found in candidates:
            part = query[found.rows, :, found.columns].to(found.key.device)
            output, any_found = self.retrieve(part, found)
            outputs.append(output.to(seen).transpose(1, 2))
            exist.append(any_found.to(seen.device).expand(part.shape[0], -1))
        # The outputs are those of blocks of columns in all rows, or those of documents in the order of rows.
        output, any_found = torch.cat(outputs, dim=1).view(seen.shape), torch.cat(exist, dim=1).view(seen.shape[:2])
        gate = gate[:, None].to(seen.dtype)
        return torch.where(any_found[:, :, None, None], gate * output + (1 - gate) * seen, seen)

    def retrieve(self, query: torch.Tensor, found: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what queries (B, H, T, D) retrieve, (B, H, T, D), and which of them had a candidate, (R, T)."""
        with torch.no_grad():
            parts = pieces(query.shape[2], BLOCK, query)
            if found.scores is not None:
                admitted = admit(found, self.visibility, self.capacity, parts)
                chosen = [
                    self.search_admitted(query[:, :, part], found.key, keys)
                    for part, keys in zip(parts, admitted, strict=True)
                ]
            else:
                chosen = [
                    self.search(query[:, :, part], found.key, found.numbers, found.queries[:, part]) for part in parts
                ]
        index, is_candidate = chosen[0] if len(chosen) == 1 else join_chosen(chosen)
        exists = is_candidate.any(1).any(-1)
        inputs = query, found.key, found.value, index, is_candidate, self.scaling, found.scores
        return with_gradients_of(ReadChosen, read_in_blocks, *inputs), exists

    def search(
        self, query: torch.Tensor, key: torch.Tensor, numbers: torch.Tensor, query_numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Finds the best candidates of each query head, without gradients.

        Args:
            query: (B, H, T, D).
            key: (B, K, S, D).
            numbers: the numbers (R, S) of the first S keys.
            query_numbers: the numbers (R, T) of the queries.

        Returns:
            The indices (B, H, T, k) of the best keys, and whether each of them is a candidate.
        """
        first, stop = self.columns_to_search(numbers, query_numbers)
        key, numbers = key[:, :, first:stop], numbers[:, first:stop]

        def allowed(part: slice) -> torch.Tensor:
            return self.visibility.candidates(query_numbers[:, :, None], numbers[:, None, part], self.capacity)[:, None]

        index, is_candidate = self.find_best(query, key, allowed)
        return index + first, is_candidate

    def search_admitted(
        self, query: torch.Tensor, key: torch.Tensor, admitted: Admitted
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Finds the best candidates of queries (B, H, T, D) among admitted keys, as `search` does."""
        groups = query.shape[1] // key.shape[1]
        if admitted.columns is not None:
            key = key.gather(2, admitted.columns[..., None].expand(-1, -1, -1, key.shape[3]))

        def allowed(part: slice) -> torch.Tensor:
            return admitted.allows(part).repeat_interleave(groups, dim=1)

        scores = admitted.scores.repeat_interleave(groups, dim=1)
        index, is_candidate = self.find_best(query, key[:, :, : scores.shape[-1]], allowed, scores)
        return admitted.of_keys(index) if index.shape[-1] else index, is_candidate

    def find_best(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        allowed: Callable[[slice], torch.Tensor],
        scores: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the indices (B, H, T, k) of the best of all keys (B, K, S, D), and whether each is a candidate.

        Args:
            query: (B, H, T, D).
            allowed: returns which keys of a part are candidates, a mask that broadcasts to (B, H, T, S).
            scores: what the keys (B, H, S) have beside their products with queries.
        """
        batch, heads, length, _ = query.shape
        most = SCORES_OF_A_GPU if query.is_cuda else SCORES
        size = max(most // (batch * heads * length), 2 * self.top_k)
        grouped = by_key_head(query, key) * self.scaling
        best = query.new_empty(batch, heads, length, 0)
        index = query.new_empty(batch, heads, length, 0, dtype=torch.long)
        for part in pieces(key.shape[2], size, key):
            found = by_query_head(grouped @ key[:, :, part].transpose(2, 3), heads // key.shape[1])
            if scores is not None:
                found = found + scores[:, :, None, part]
            found.masked_fill_(~allowed(part), -torch.inf)
            if not certain(found.shape[-1] >= self.top_k):
                found = nn.functional.pad(found, (0, self.top_k), value=-torch.inf)
            some, columns = find_greatest(found, self.top_k)
            best = torch.cat((best, some), dim=-1)
            index = torch.cat((index, columns + (part.start or 0)), dim=-1)
            if best.shape[-1] > self.top_k:
                best, order = best.topk(self.top_k, dim=-1, sorted=False)
                index = index.gather(-1, order)
        is_candidate = best > -torch.inf
        return index.where(is_candidate, 0), is_candidate

    def columns_to_search(self, numbers: torch.Tensor, query_numbers: torch.Tensor) -> tuple[int, int]:
        """Returns the first column of a candidate and the one after the last, or a wider range if it is cheaper."""
        columns = numbers.shape[1]
        if not self.visibility.may_let_go(columns):
            return 0, 0
        if certain(columns <= 2 * ((self.visibility.span or 0) + self.capacity)):
            return 0, columns
        start = self.visibility.start(query_numbers.clamp(min=0))
        oldest, newest = start.amin(-1, keepdim=True) - self.capacity, start.amax(-1, keepdim=True)
        return columns_of((numbers >= oldest) & (numbers < newest))


def find_greatest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `count` greatest of scores (…, S), in any order, and their indices (…, count).

    Scores that lie side by side are a group. The greatest are in the groups of the greatest maxima, so few are sorted.
    """
    length = scores.shape[-1]
    if not certain(length >= 2 * count * SIDE_BY_SIDE):
        return scores.topk(count, dim=-1, sorted=False)
    index = torch.arange(length, device=scores.device)
    groups, rest = index[: length // SIDE_BY_SIDE * SIDE_BY_SIDE], index[length // SIDE_BY_SIDE * SIDE_BY_SIDE :]
    maxima = scores[..., : len(groups)].unflatten(-1, (-1, SIDE_BY_SIDE)).amax(-1)
    best = groups.view(-1, SIDE_BY_SIDE)[maxima.topk(count, dim=-1, sorted=False).indices].flatten(-2)
    columns = torch.cat((best, rest.expand(*best.shape[:-1], -1)), dim=-1)
    greatest, places = scores.gather(-1, columns).topk(count, dim=-1, sorted=False)
    return greatest, columns.gather(-1, places)


def join_chosen(chosen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the indices (B, H, T, k) that blocks of queries have chosen, and whether they are candidates, in one k."""
    most = max(index.shape[-1] for index, _ in chosen)
    index, is_candidate = (
        torch.cat([nn.functional.pad(each, (0, most - each.shape[-1])) for each in parts], dim=2)
        for parts in zip(*chosen, strict=True)
    )
    return index, is_candidate


def rows_of(index: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Returns, for indices (B, H, T, k) of slots, the rows of states (B · K · S, D) that they name."""
    batch, heads = index.shape[:2]
    kv_heads, slots = states.shape[1:3]
    head = torch.arange(batch * kv_heads, device=index.device).repeat_interleave(heads // kv_heads)
    return index + slots * head.view(batch, heads, 1, 1)


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the states (B, H, T, k, D) with indices (B, H, T, k) in states (B, K, S, D)."""
    return states.reshape(-1, states.shape[-1])[rows_of(index, states)]


def weigh_chosen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_candidate: torch.Tensor,
    scaling: float,
    more: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the attention output (B, H, T, D) of queries (B, H, T, D) over chosen keys and values (B, H, T, k, D).

    Keys that are no candidates are left out, and the output is zero where there is none. `more` (B, H, T, k, 1) is
    added to the scores.
    """
    scores = (key @ query[..., None])[..., 0] * scaling
    scores = scores if more is None else scores + more[..., 0]
    scores = scores.masked_fill(~is_candidate, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = torch.where(is_candidate, weights, 0).to(value.dtype)
    return (weights[..., None, :] @ value)[..., 0, :]


def read_in_blocks(query, key, value, index, is_candidate, scaling: float, scores=None) -> torch.Tensor:
    """Returns the attention output (B, H, T, D) of queries over chosen keys and values, a block of queries at a time.

    Args:
        query: (B, H, T, D).
        key: (B, K, S, D).
        value: (B, K, S, D).
        index: the indices (B, H, T, k) of the chosen keys.
        is_candidate: whether each chosen key is a candidate, (B, H, T, k).
        scores: the scores (B, K, S) of the keys, or None.
    """
    outputs = []
    for part in pieces(query.shape[2], BLOCK, query):
        chosen, some = index[:, :, part], is_candidate[:, :, part]
        more = None if scores is None else take(scores[..., None], chosen)
        outputs.append(weigh_chosen(query[:, :, part], take(key, chosen), take(value, chosen), some, scaling, more))
    return torch.cat(outputs, dim=2)


class ReadChosen(torch.autograd.Function):
    """Computes `read_in_blocks`, and its gradients block by block.

    The backward pass gathers the chosen keys and values again, and adds their gradients in one tensor.
    """

    @staticmethod
    def forward(ctx: Any, query, key, value, index, is_candidate, scaling, scores):
        """Returns the attention output (B, H, T, D)."""
        key, value = key.contiguous(), value.contiguous()
        ctx.save_for_backward(query, key, value, index, is_candidate, scores)
        ctx.scaling = scaling
        return read_in_blocks(query, key, value, index, is_candidate, scaling, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]  by its decorator
        """Returns the gradients of queries, keys, values and scores."""
        query, key, value, index, is_candidate, scores = ctx.saved_tensors
        states = [key, value] if scores is None else [key, value, scores[..., None]]
        totals = [torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in states]
        of_query = []
        parts = (each.split(BLOCK, dim=2) for each in (query, index, is_candidate, gradients[0]))
        for part, chosen, some, gradient in zip(*parts, strict=True):
            taken = [part, *(take(each, chosen) for each in states)]
            taken = [each.detach().requires_grad_() for each in taken]
            with torch.enable_grad():
                output = weigh_chosen(*taken[:3], some, ctx.scaling, *taken[3:])
            found = torch.autograd.grad(output, taken, gradient)
            of_query.append(found[0])
            rows = rows_of(chosen, key).flatten()
            for total, each in zip(totals, found[1:], strict=True):
                total.view(-1, total.shape[-1]).index_add_(0, rows, each.reshape(-1, each.shape[-1]))
        of_scores = None if scores is None else totals[2][..., 0]
        return torch.cat(of_query, dim=2), totals[0], totals[1], None, None, None, of_scores


__all__ = ["Retrieval"]
