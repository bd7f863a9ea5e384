# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Looking up what has left the window (Memorizing Transformers, Wu et al., arXiv 2203.08913).

Of the tokens that its window has let go, each query head takes the k whose keys fit best, none of them rotated, and
gives their values the softmax of these k scores. A gate that each head learns mixes that with what the window gives.

The search is exact. It goes through the candidates part by part and keeps the best k so far: the work is that of all
scores, the memory that of one part. Gradients go back to the k that were chosen.

Shapes: B batch, H query heads, K key/value heads, T queries, S candidates, D head dim, k looked up.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .cache_layer_olmem import STORE_BLOCK, OlmemCacheLayer
from .context_olmem import Context, Sight

SCORES = 2**22  # of one part of the candidates, at most


def retrieve(module: Any, query, key, value, of_window: torch.Tensor, sight: Sight, past: Any) -> torch.Tensor:
    """What a layer's heads make of their windows (B, T, H, D), mixed with what they look up. query (B, H, T, D), key
    and value (B, K, T, D) of the new tokens, not rotated; `past` takes them in."""
    if isinstance(past, OlmemCacheLayer):
        found, any_found = look_up_in_store(module, query, key, value, sight, past)
    else:
        numbers = sight.numbers
        if past is not None:
            key, value, numbers = past.recall(key, value, sight, module.config.retrieval_capacity)
        found, any_found = look_up_in(module, query, key, value, sight, numbers)
    gate = module.retrieval_gate()[:, None].to(of_window.dtype)
    mixed = gate * found.to(of_window).transpose(1, 2) + (1 - gate) * of_window
    return torch.where(any_found.to(of_window.device)[:, :, None, None], mixed, of_window)


def look_up_in_store(
    module: Any, query, key, value, sight: Sight, past: OlmemCacheLayer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through a cache's store, which the new tokens enter a block at a time. Returns (B, H, T, D), and (R, T) whether
    there was anything to look up."""
    config, length = module.config, query.shape[2]
    outputs, any_found = [], []
    for start in range(0, length, STORE_BLOCK):
        part = slice(start, min(start + STORE_BLOCK, length))
        numbers = past.store(key, value, sight, part)
        stored = [past.buffers[name] for name in past.store_names]
        block = query[:, :, part].to(stored[0].device)
        looks_from = sight.queries[:, part].to(numbers.device)
        index, chosen = search(block, stored[0], numbers, looks_from, sight.context, config, module.scaling)
        outputs.append(read_chosen(block, stored[0], stored[-1], index, chosen, module.scaling))
        any_found.append(chosen.any(1).any(-1))
    return torch.cat(outputs, dim=2), torch.cat(any_found, dim=1)


def look_up_in(
    module: Any, query, key, value, sight: Sight, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through keys and values (B, K, S, D) of these numbers (R, S), gradients and all. Returns (B, H, T, D), and
    (R, T) whether there was anything to look up."""
    config, length = module.config, query.shape[2]
    indices, choices = [], []
    for start in range(0, length, STORE_BLOCK):
        part = slice(start, min(start + STORE_BLOCK, length))
        looks_from = sight.queries[:, part]
        index, chosen = search(query[:, :, part], key, numbers, looks_from, sight.context, config, module.scaling)
        indices.append(index)
        choices.append(chosen)
    most = max(index.shape[-1] for index in indices)
    index, chosen = (
        torch.cat([nn.functional.pad(each, (0, most - each.shape[-1])) for each in parts], dim=2)
        for parts in (indices, choices)
    )
    found = ReadChosen.apply(query, key.contiguous(), value.contiguous(), index, chosen, module.scaling)
    return found, chosen.any(1).any(-1)


@torch.no_grad()
def search(
    query: torch.Tensor,
    keys: torch.Tensor,
    numbers: torch.Tensor,
    looks_from: torch.Tensor,
    context: Context,
    config: Any,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best candidates of each query head: query (B, H, T, D) of tokens (R, T); keys (B, K, S, D), of which
    `numbers` (R, S) tells the first ones. Returns their indices (B, H, T, k), and whether each is a candidate."""
    batch, heads, length, _ = query.shape
    first, stop = candidate_columns(numbers, looks_from, context, config.retrieval_capacity)
    size = max(SCORES // (batch * heads * length), 2 * config.retrieval_top_k)
    grouped = query.reshape(batch, keys.shape[1], -1, query.shape[-1]) * scaling
    best, index = query.new_empty(batch, heads, length, 0), looks_from.new_empty(batch, heads, length, 0)
    for start in range(first, stop, size):
        part = slice(start, min(start + size, stop))
        scores = (grouped @ keys[:, :, part].transpose(2, 3)).view(batch, heads, length, -1)
        allowed = context.candidates(looks_from[:, :, None], numbers[:, None, part], config.retrieval_capacity)
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        some, places = scores.topk(min(config.retrieval_top_k, scores.shape[-1]), dim=-1, sorted=False)
        best, index = torch.cat((best, some), dim=-1), torch.cat((index, places + start), dim=-1)
        if best.shape[-1] > config.retrieval_top_k:
            best, places = best.topk(config.retrieval_top_k, dim=-1, sorted=False)
            index = index.gather(-1, places)
    return index, best > -torch.inf


def candidate_columns(
    numbers: torch.Tensor, looks_from: torch.Tensor, context: Context, capacity: int
) -> tuple[int, int]:
    """The first and the last column, plus one, of candidates, or more than that where asking costs more."""
    columns = numbers.shape[1]
    if not context.lets_go(columns):
        return 0, 0
    if columns <= 2 * ((context.span or 0) + capacity) or torch.compiler.is_compiling():
        return 0, columns
    start = context.start(looks_from.clamp(min=0))
    oldest, newest = start.amin(-1, keepdim=True) - capacity, start.amax(-1, keepdim=True)
    columns_of = ((numbers >= oldest) & (numbers < newest)).any(0).nonzero()[:, 0]
    return (int(columns_of[0]), int(columns_of[-1]) + 1) if len(columns_of) else (0, 0)


def read_chosen(query, keys, values, index, chosen, scaling: float) -> torch.Tensor:
    """query (B, H, T, D), keys and values (B, K, S, D), indices (B, H, T, k) and which of them count -> (B, H, T, D),
    zeros where none does."""
    return weigh_chosen(query, take(keys, index), take(values, index), chosen, scaling)


def rows_of(index: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Indices (B, H, T, k) into the slots of states (B, K, S, D) as rows of these, (B · K · S, D)."""
    batch, heads = index.shape[:2]
    kv_heads, slots = states.shape[1:3]
    head = torch.arange(batch * kv_heads, device=index.device).repeat_interleave(heads // kv_heads)
    return index + slots * head.view(batch, heads, 1, 1)


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of states (B, K, S, D) those of the indices (B, H, T, k), (B, H, T, k, D)."""
    return states.reshape(-1, states.shape[-1])[rows_of(index, states)]


def weigh_chosen(query, keys, values, chosen, scaling: float) -> torch.Tensor:
    """query (B, H, T, D), keys and values (B, H, T, k, D) -> (B, H, T, D), softmax in float32 or better."""
    scores = (keys @ query[..., None])[..., 0] * scaling
    scores = scores.masked_fill(~chosen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = torch.where(chosen, weights, 0).to(values.dtype)
    return (weights[..., None, :] @ values)[..., 0, :]


class ReadChosen(torch.autograd.Function):
    """`read_chosen`, block by block, there and back: what was taken is taken again for the gradients, and these are
    added up in one tensor."""

    @staticmethod
    def forward(ctx: Any, query, keys, values, index, chosen, scaling):
        ctx.save_for_backward(query, keys, values, index, chosen)
        ctx.scaling = scaling
        blocks = zip(*(each.split(STORE_BLOCK, dim=2) for each in (query, index, chosen)), strict=True)
        outputs = [read_chosen(part, keys, values, places, counts, scaling) for part, places, counts in blocks]
        return torch.cat(outputs, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]  by its decorator
        query, keys, values, index, chosen = ctx.saved_tensors
        totals = [torch.zeros_like(keys), torch.zeros_like(values)]
        of_query = []
        blocks = (each.split(STORE_BLOCK, dim=2) for each in (query, index, chosen, gradients[0]))
        for block, places, counts, gradient in zip(*blocks, strict=True):
            taken = [each.detach().requires_grad_() for each in (block, take(keys, places), take(values, places))]
            with torch.enable_grad():
                output = weigh_chosen(taken[0], taken[1], taken[2], counts, ctx.scaling)
            found = torch.autograd.grad(output, taken, gradient)
            of_query.append(found[0])
            rows = rows_of(places, keys).flatten()
            for total, each in zip(totals, found[1:], strict=True):
                total.view(-1, total.shape[-1]).index_add_(0, rows, each.reshape(-1, each.shape[-1]))
        return torch.cat(of_query, dim=2), *totals, None, None, None


__all__ = ["retrieve"]
