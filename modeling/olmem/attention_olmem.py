# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""How queries attend to what they see: sinks and window under one softmax.

`attend_reference` is the meaning, from slots and nothing else. `attend` is the way there without a cost that grows
with the stream: blocks of queries against the keys in reach, O(T · window) work, no T × T mask.

A forward over many queries cannot give the sinks one rotation that suits them all: a sink's distance stops growing
where its query's slot does. So a window's keys are rotated at their own numbers and met by the query rotated at its
number; sinks are rotated at their slots and met by the query rotated at its slot. One query alone (a generated token)
has one distance to each sink: the sinks are rotated to suit it, beside the window's keys in the cache.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head dim, Z sinks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_olmem import OlmemCacheLayer, gather_sinks
from .context_olmem import Context, Sight

# Queries at a time. Up to WHOLE blocks of a stream's beginning are one block, the very call that Transformers' models
# make: the same bits, and a mask of bounded size.
BLOCK = {"cpu": 128}
BLOCK_ELSEWHERE = 1024
WHOLE = 8

Rotation = tuple[torch.Tensor, torch.Tensor]


class Rotations(NamedTuple):
    """Cosines and sines (R, …, D) for the layers of one type."""

    token: Rotation  # of the new tokens at their numbers, (R, T, D)
    query: Rotation | None = None  # of the queries at their slots, (R, T, D)
    sink: Rotation | None = None  # of the sinks, (R, Z, D)

    def upto(self, length: int) -> "Rotations":
        """Those of the first tokens."""
        cos, sin = self.token
        query = self.query and (self.query[0][:, :length], self.query[1][:, :length])
        return Rotations((cos[:, :length], sin[:, :length]), query, self.sink)


class Prefix(NamedTuple):
    """What stands before the windows: queries rotated at their slots, keys and values of the sinks."""

    query: torch.Tensor  # (B, H, T, D)
    key: torch.Tensor  # (B, K, Z, D)
    value: torch.Tensor  # (B, K, Z, D)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE to states (B, H, T, D), halves paired as in Transformers; the product is in float32.

    The operations and their order are Transformers', so that gradients too are the same bit for bit.
    """
    half = states.shape[-1] // 2
    straight = states * cos[:, None]
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (straight + turned * sin[:, None]).to(states.dtype)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations, weights returned: query (B, H, T, D), key and value (B, K, S, D) ->
    (B, T, H, D), (B, H, T, S). The mask is added to the scores. Softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (state[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for state in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_numbers: torch.Tensor,
    key_numbers: torch.Tensor,
    context: Context,
    rotation: Callable[[torch.Tensor], Rotation],
    scaling: float,
) -> torch.Tensor:
    """The meaning of attention over parts, in float32: every pair rotated by the difference of its slots.

    query (B, H, T, D); key, value (B, K, S, D), none of them rotated; their numbers (T,) and (S,) in the stream;
    `rotation` gives cosines and sines (…, D) of positions (…). Returns (B, T, H, D). Holds T × S × D numbers.
    """
    i, j = query_numbers[:, None], key_numbers[None, :]
    visible = context.sees(i, j) | context.sees_sink(i, j)
    cos, sin = rotation(context.slot(i) - context.key_slot(i, j))  # (T, S, D)
    groups = query.shape[1] // key.shape[1]
    query, key, value = (state.float() for state in (query, key, value))
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    half = query.shape[-1] // 2
    turned = torch.cat((-query[..., half:], query[..., :half]), dim=-1)
    scores = torch.einsum("bhtd,tsd,bhsd->bhts", query, cos, key) + torch.einsum(
        "bhtd,tsd,bhsd->bhts", turned, sin, key
    )
    weights = (scores * scaling).masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


class Slices(torch.autograd.Function):
    """Overlapping slices of states (B, K, S, D), gradients added up in one tensor rather than one for each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states, *ranges):
        return tuple(states[:, :, part] for part in ranges)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.ranges = inputs[0].shape, inputs[1:]

    @staticmethod
    def backward(ctx, *gradients):
        total = gradients[0].new_zeros(ctx.shape)
        for part, gradient in zip(ctx.ranges, gradients, strict=True):
            total[:, :, part] += gradient
        return total, *(None for _ in ctx.ranges)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotations: Rotations,
    sight: Sight,
    past: OlmemCacheLayer | None,
    dropout: float,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The door: query (B, H, T, D), key and value (B, K, T, D) of the new tokens, not rotated -> (B, T, H, D), and if
    asked for and `eager`, the weights (see `weights_in_order`). `past` keeps what is new."""
    if sight.documents is not None:
        return attend_documents(module, query, key, value, rotations, sight, dropout, output_attentions)
    unplaced_query, unplaced_key = query, key
    query, key, value = module.place(query, key, value, *rotations.token)
    sinks = None
    if past is not None:
        new_value = value
        key, value = past.update(key, new_value, sight)
        if sight.context.num_sinks:
            sinks = past.update_sinks(unplaced_key, new_value, sight)
    elif sight.prefix:
        sinks = gather_sinks(unplaced_key, value, sight)

    prefix = None
    if sinks and rotations.sink:
        sink_key = rotate(sinks[0], *rotations.sink)
        if rotations.query:
            prefix = Prefix(rotate(unplaced_query, *rotations.query), sink_key, sinks[1])
        else:  # one query: its sinks stand before the window's keys in the cache
            key[:, :, : sink_key.shape[2]] = sink_key
    output, weights = attend_window(module, query, key, value, sight, prefix, dropout, output_attentions)
    if weights is None or not output_attentions:
        return output, None
    return output, weights_in_order(weights, sight)


def attend_documents(module, query, key, value, rotations, sight, dropout, output_attentions):
    """Documents packed into rows (B, H, T, D), each as if it were alone."""
    length = query.shape[2]
    outputs, weights = [], query.new_zeros(*query.shape[:3], length) if output_attentions else None
    for index, documents in enumerate(sight.documents):
        row = slice(index, index + 1)
        for start, stop in documents:
            part, size = slice(start, stop), stop - start
            output, share = attend(
                module,
                query[row, :, part],
                key[row, :, part],
                value[row, :, part],
                rotations.upto(size),
                sight.upto(size),
                None,
                dropout,
                output_attentions,
            )
            outputs.append(output)
            if weights is not None and share is not None:
                weights[row, :, part, part] = share
    output = torch.cat(outputs, dim=1).view(len(query), length, *outputs[0].shape[2:])
    return output, weights


def attend_window(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight,
    prefix: Prefix | None,
    dropout: float,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query (B, H, T, D); key and value (B, K, S, D), those that `sight` numbers; with `sight.in_place` and sinks,
    (B, K, Z + S, D), the sinks rotated for the one query. Returns (B, T, H, D), weights (B, H, T, [Z +] S) or None."""
    length = query.shape[2]
    eager = module.config._attn_implementation != "sdpa"
    if sight.in_place and length == 1:  # a generated token: all keys in one part, sinks first
        if eager:
            return attend_parts(query, key, value, sight.step_mask, None, module.scaling, dropout)
        return attend_sdpa(query, key, value, sight.step_mask, module.scaling, dropout), None

    block = BLOCK.get(query.device.type, BLOCK_ELSEWHERE)
    fresh = key.shape[2] == length
    if prefix is None and fresh and (length <= WHOLE * block or (sight.causal and not eager)):
        return attend_whole(module, query, key, value, sight, dropout)
    if output_attentions and eager:
        block = length

    queries = [slice(start, min(start + block, length)) for start in range(0, length, block)]
    reaches = [sight.reach(part) for part in queries]
    if len(queries) > 1 and torch.is_grad_enabled():
        keys, values = Slices.apply(key, *reaches), Slices.apply(value, *reaches)
    else:
        keys, values = ([states[:, :, part] for part in reaches] for states in (key, value))
    outputs, weights = [], None
    for part, reach, block_key, block_value in zip(queries, reaches, keys, values, strict=True):
        mask = sight.mask(part, reach, prefix is not None)
        if eager or prefix is not None:
            block_prefix = prefix and Prefix(prefix.query[:, :, part], prefix.key, prefix.value)
            output, weights = attend_parts(
                query[:, :, part], block_key, block_value, mask, block_prefix, module.scaling, dropout
            )
        else:
            output = attend_sdpa(query[:, :, part], block_key, block_value, mask, module.scaling, dropout)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), weights


def attend_whole(module, query, key, value, sight: Sight, dropout: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As Transformers' models do it: one call, and one mask if causality alone will not do."""
    implementation = module.config._attn_implementation
    mask = None
    if implementation != "sdpa" or not sight.causal:
        mask = sight.mask(slice(None), slice(None))[:, None]
        if implementation != "sdpa":
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return interface(module, query, key, value, mask, dropout=dropout, scaling=module.scaling)


def attend_sdpa(query, key, value, mask: torch.Tensor | None, scaling: float, dropout: float) -> torch.Tensor:
    """One block, mask (R, T, S). The query heads of one key head stand as more queries, so that no key is copied."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        mask = mask[:, None] if groups == 1 else mask[:, None].repeat(1, 1, groups, 1)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(*key.shape[:2], -1, key.shape[-1]), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(query.shape).transpose(1, 2)


def attend_parts(
    query, key, value, mask: torch.Tensor | None, prefix: Prefix | None, scaling: float, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block in plain operations, mask (R, T, [Z +] S): the scores of both parts side by side, one softmax."""

    def grouped(states: torch.Tensor) -> torch.Tensor:
        return (states * scaling).reshape(*key.shape[:2], -1, key.shape[-1])

    scores = grouped(query) @ key.transpose(2, 3)
    if prefix is not None:
        scores = torch.cat((grouped(prefix.query) @ prefix.key.transpose(2, 3), scores), dim=-1)
    scores = scores.view(*query.shape[:3], -1)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    shares = weights.view(*key.shape[:2], -1, weights.shape[-1])
    if prefix is None:
        output = shares @ value
    else:
        sinks = prefix.key.shape[2]
        output = shares[..., :sinks] @ prefix.value + shares[..., sinks:] @ value
    return output.reshape(query.shape).transpose(1, 2), weights


def weights_in_order(weights: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Weights (B, H, T, [Z +] S) as a reader expects them. Without a cache: a column for each token (B, H, T, T). With
    one: a column for each key that was held, oldest first, after those of the sinks where these may have left."""
    sinks = weights.shape[-1] - sight.key_numbers.shape[1]
    before, window = (weights[..., :sinks], weights[..., sinks:]) if sinks else (weights, weights)
    if sight.in_place and sight.context.span is not None:
        order = sight.key_numbers.argsort(dim=-1, stable=True)[:, None, None]
        window = window.take_along_dim(order.expand(-1, *window.shape[1:3], -1), dim=-1)
    if not sinks:
        return window
    if sight.slots is not None:
        return torch.cat((before, window), dim=-1)
    found, column = sight.new_sinks()
    index = column[:, None, None].expand(*before.shape)
    return window.scatter_add(-1, index, before * found[:, None, None])


__all__ = ["Rotations", "attend", "attend_reference", "eager_attention_forward", "rotate"]
