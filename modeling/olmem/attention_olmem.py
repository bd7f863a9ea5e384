# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""How queries attend to what they see: memory, sinks and window under one softmax.

`attend_reference` is the meaning, from slots and nothing else. `attend` is the way there without a cost that grows
with the stream: blocks of queries against the keys in reach, O(T · window) work, no T × T mask.

A forward over many queries cannot give the prefix (memory and sinks) one rotation that suits them all: its distance
stops growing where its query's slot does. So a window's keys are rotated at their own places and met by the query
rotated at its place; the prefix is rotated at its slots and met by the query rotated at its slot. One query alone (a
generated token) has one distance to each: the prefix is rotated to suit it, beside the window's keys in the cache.

Keys that are values too are kept as they are, one tensor for both, and rotated whenever they are read.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head dim, M memory slots, Z sinks.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_layer_olmem import OlmemCacheLayer, gather_sinks
from .context_olmem import Context, Sight
from .memory_olmem import Trail
from .positions_olmem import (
    Rotation,
    as_complex,
    in_halves,
    rotate,
    rotate_pairs,
    rotate_side_by_side,
    side_by_side,
    xpos_powers,
    xpos_scale,
)
from .retrieval_olmem import retrieve
from .rules_olmem import BY_SLOT

# Queries at a time. Up to WHOLE blocks of a stream's beginning are one block, the very call that Transformers' models
# make: the same bits, and a mask of bounded size.
BLOCK = {"cpu": 128}
BLOCK_ELSEWHERE = 1024
WHOLE = 8
SCRATCH = 2**21  # bytes of rotated keys at a time and thread, on a CPU
LINSPACE_REACH = 0.1  # what is added to the keys goes from nothing to so many `linspace_scale`


class Rotations(NamedTuple):
    """Cosines and sines (R, …, D) for the layers of one type."""

    token: Rotation | None = None  # of the new tokens at their places, (R, T, D); None where nothing is rotated
    query: Rotation | None = None  # of the queries at their slots, (R, T, D)
    prefix: Rotation | None = None  # of memory and sinks, (R, M + Z, D)
    key: Rotation | None = None  # of all keys of a cache, (R, S, D), where these are values too
    step: torch.Tensor | None = None  # of them and the prefix for one query, side by side (R, M + Z + S, D/2, 2)

    def upto(self, length: int) -> "Rotations":
        """Those of the first tokens."""
        token, query = (
            rotation and (rotation[0][:, :length], rotation[1][:, :length]) for rotation in (self.token, self.query)
        )
        return Rotations(token, query, self.prefix)


class Prefix(NamedTuple):
    """What stands before the windows: queries rotated at their slots, keys and values of memory and sinks."""

    query: torch.Tensor  # (B, H, T, D)
    key: torch.Tensor  # (B, K, M + Z, D)
    value: torch.Tensor  # (B, K, M + Z, D)


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
    past: OlmemCacheLayer | Trail | None,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The door: query (B, H, T, D), key and value (B, K, T, D) of the new tokens, not rotated -> (B, T, H, D), and if
    asked for and `eager`, the weights (see `weights_in_order`). `past` keeps what is new."""
    if sight.documents is not None:
        return attend_documents(module, query, key, value, rotations, sight, output_attentions)
    as_they_are = query, key, value
    turn, one_tensor = rotate, past is not None and past.one_tensor
    if one_tensor and module.rotates:
        turn, query, key = rotate_side_by_side, side_by_side(query), side_by_side(key)
    value = key if one_tensor else module.clip("rotary", value)
    if past is not None and sight.memory == "read":
        past.keep_memory(key, value, sight)
        past = None

    keys = key if one_tensor else module.place(key, rotations.token)
    values, before = value, None
    if past is not None:
        keys, values = past.update(keys, values, sight)
    if one_tensor:
        keys = module.place(keys, rotations.key, turn)  # of a step none: it rotates them itself, a few heads at a time
    if past is not None and sight.context.num_prefix:
        before = past.update_prefix(key, value, sight)
    elif sight.prefix:
        before = gather_sinks(key, value, sight)

    prefix = None
    if before and sight.prefix and rotations.step is None:
        prefix_key = module.place(before[0], rotations.prefix, turn)
        if sight.is_step:  # one query: its prefix stands before the window's keys in the cache
            keys[:, :, : prefix_key.shape[2]] = prefix_key
        else:
            prefix = Prefix(module.place(query, rotations.query, turn), prefix_key, before[1])
    query = module.place(query, rotations.token, turn)
    if rotations.step is not None:
        output, weights = attend_rotating(module, query, values, rotations.step, sight)
    else:
        output, weights = attend_window(module, query, keys, values, sight, prefix, output_attentions, turn)
    if turn is rotate_side_by_side:
        output = in_halves(output)
    if module.retrieves and sight.memory is None:
        output = retrieve(module, *as_they_are, output, sight, past)
    if weights is None or not output_attentions:
        return output, None
    return output, weights_in_order(weights, sight)


def attend_documents(module, query, key, value, rotations, sight, output_attentions):
    """Documents packed into rows (B, H, T, D), each as if it were alone."""
    length = query.shape[2]
    weights_too = output_attentions and module.config._attn_implementation != "sdpa"
    outputs, weights = [], query.new_zeros(*query.shape[:3], length) if weights_too else None
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
    output_attentions: bool,
    turn: Callable,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query (B, H, T, D); key and value (B, K, S, D), those that `sight` numbers; of a step (B, K, M + Z + S, D), the
    prefix rotated for the one query. Returns (B, T, H, D), and if asked for and `eager`, weights (B, H, T, [M + Z +]
    S)."""
    length = query.shape[2]
    eager = module.config._attn_implementation != "sdpa"
    by_slot = module.position_embedding in BY_SLOT
    if sight.is_step:  # a generated token: all keys in one part, prefix first
        if by_slot:
            slot = sight.query_slots
            query, key = place_by_slot(module, query, key, slot - slot, sight.step_slots - slot, turn)
        if eager or module.gates_memory:
            output, weights = attend_parts(module, query, key, value, sight.step_mask, gate=memory_gate(module))
            return output, weights if eager else None
        return attend_sdpa(module, query, key, value, sight.step_mask), None

    block = BLOCK.get(query.device.type, BLOCK_ELSEWHERE)
    alone = prefix is None and key.shape[2] == length and not by_slot
    if alone and (length <= WHOLE * block or (sight.causal and not eager)):
        return attend_whole(module, query, key, value, sight)

    weights_too = output_attentions and eager
    queries = [slice(start, min(start + block, length)) for start in range(0, length, block)]
    reaches = [slice(0, key.shape[2]) if weights_too else sight.reach(part) for part in queries]
    if len(queries) > 1 and torch.is_grad_enabled():
        keys, values = Slices.apply(key, *reaches), Slices.apply(value, *reaches)
    else:
        keys, values = ([states[:, :, part] for part in reaches] for states in (key, value))
    outputs, weights = [], []
    for part, reach, block_key, block_value in zip(queries, reaches, keys, values, strict=True):
        block_query, bias = query[:, :, part], None
        block_prefix = prefix and Prefix(prefix.query[:, :, part], prefix.key, prefix.value)
        if by_slot:
            block_query, block_key, block_prefix, bias = place_block(
                module, block_query, block_key, block_prefix, sight, part, reach, turn
            )
        mask = sight.mask(part, reach, prefix is not None)
        if eager or prefix is not None:
            gate = None if sight.memory == "read" else memory_gate(module)
            output, shares = attend_parts(module, block_query, block_key, block_value, mask, block_prefix, bias, gate)
            weights.append(shares)
        else:
            output = attend_sdpa(module, block_query, block_key, block_value, mask)
        outputs.append(output)
    return torch.cat(outputs, dim=1), torch.cat(weights, dim=2) if weights_too else None


def attend_rotating(
    module: Any, query: torch.Tensor, stored: torch.Tensor, phases: torch.Tensor, sight: Sight
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A step where keys are values, stored (B, K, M + Z + S, D): rotated by phases (R, M + Z + S, D/2, 2) a few heads
    at a time. Returns (B, 1, H, D), and if `eager`, weights (B, H, 1, M + Z + S)."""
    if module.position_embedding == "xpos":
        distance = sight.query_slots - sight.step_slots
        phases = phases * xpos_powers(query, distance.clamp(min=0))[..., None]
    eager = module.config._attn_implementation != "sdpa"
    groups = query.shape[1] // stored.shape[1]
    outputs, weights = [], []
    for heads, key in rotated_heads(stored, phases):
        some = query[:, heads.start * groups : heads.stop * groups], key, stored[:, heads], sight.step_mask
        if eager or module.gates_memory:
            gate = memory_gate(module, slice(heads.start * groups, heads.stop * groups))
            output, shares = attend_parts(module, *some, gate=gate)
            weights.append(shares)
        else:
            output = attend_sdpa(module, *some)
        outputs.append(output)
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=1) if eager else None


def rotated_heads(states: torch.Tensor, phases: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """`rotate_pairs` of states (B, K, S, D), on a CPU a few heads at a time, to be used before the next ones: as many
    as stay in its cache until then, but no fewer than there are threads to attend to them."""
    batch, kv_heads, length, width = states.shape
    size = kv_heads
    if states.device.type == "cpu" and not torch.compiler.is_compiling():
        threads = torch.get_num_threads()
        size = min(max(threads * SCRATCH // (batch * length * width * 4), -(-threads // batch)), kv_heads)
    in_place = size < kv_heads and states.dtype == torch.float32
    scratch = states.new_empty(batch, size, length, width) if in_place else None
    for start in range(0, kv_heads, size):
        heads = slice(start, min(start + size, kv_heads))
        if scratch is None:
            yield heads, rotate_pairs(states[:, heads], phases)
            continue
        rotated = scratch[:, : heads.stop - start]
        torch.mul(as_complex(states[:, heads]), torch.view_as_complex(phases[:, None]), out=as_complex(rotated))
        yield heads, rotated


def place_block(module, query, key, prefix: Prefix | None, sight: Sight, part: slice, reach: slice, turn: Callable):
    """What xpos and linspace do to a block: its queries, keys and prefix, and a bias (B, H, T, 1) of the prefix'
    scores. Positions count from its first query, for none to grow with the stream."""
    place, bias = sight.places[:, part], None
    first = place[:, :1]
    if prefix is not None:
        slot = sight.query_slots[:, part]
        least = slot.amin(-1, keepdim=True)
        if module.position_embedding == "linspace":  # of one softmax with keys at other places
            shift = place - slot - first + least
            step = linspace_step(module)
            bias = (query.to(step.dtype) @ step[:, None] * shift[:, None, :, None] * module.scaling).to(query.dtype)
        placed = place_by_slot(module, prefix.query, prefix.key, slot - least, sight.prefix_slots - least, turn)
        prefix = Prefix(*placed, prefix.value)
    query, key = place_by_slot(module, query, key, place - first, sight.key_places[:, reach] - first, turn)
    return query, key, prefix, bias


def place_by_slot(module, query, key, query_offset: torch.Tensor, key_offset: torch.Tensor, turn: Callable):
    """query (B, H, T, D) and key (B, K, S, D) as xpos or linspace has them at positions (R, T) and (R, S) from any one
    base: neither depends on more than their differences."""
    if module.position_embedding == "xpos":
        return query * xpos_scale(query, query_offset, turn), key * xpos_scale(key, -key_offset, turn)
    return query, (key + key_offset[:, None, :, None] * linspace_step(module)).to(key.dtype)


def linspace_step(module: Any) -> torch.Tensor:
    """(D,) in float32 or better: what linspace adds to a key for each slot."""
    context = Context.of(module.config, module.layer_type)
    span = context.span or module.config.max_position_embeddings
    scale = module.linspace_scale
    return scale.to(torch.promote_types(scale.dtype, torch.float32)) * (LINSPACE_REACH / max(span - 1, 1))


def attend_whole(module, query, key, value, sight: Sight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As Transformers' models do it: one call, and one mask if causality alone will not do."""
    implementation = module.config._attn_implementation
    mask = None
    if implementation != "sdpa" or not sight.causal:
        mask = sight.mask(slice(None), slice(None))[:, None]
        if implementation != "sdpa":
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return interface(module, query, key, value, mask, dropout=module.dropout, scaling=module.scaling)


def attend_sdpa(module, query, key, value, mask: torch.Tensor | None) -> torch.Tensor:
    """One block, mask (R, T, S). The query heads of one key head stand as more queries, so that no key is copied."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        mask = mask[:, None] if groups == 1 else mask[:, None].repeat(1, 1, groups, 1)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(*key.shape[:2], -1, key.shape[-1]),
        key,
        value,
        attn_mask=mask,
        dropout_p=module.dropout,
        scale=module.scaling,
    )
    return output.reshape(query.shape).transpose(1, 2)


def attend_parts(
    module,
    query,
    key,
    value,
    mask: torch.Tensor | None,
    prefix: Prefix | None = None,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block in plain operations, mask (R, T, [M + Z +] S): the scores of both parts side by side, one softmax.
    `bias` (B, H, T, 1) is added to those of the prefix, `gate` (H, 1, 1) opens and closes memory."""

    def grouped(states: torch.Tensor) -> torch.Tensor:
        return (states * module.scaling).reshape(*key.shape[:2], -1, key.shape[-1])

    scores = grouped(query) @ key.transpose(2, 3)
    if prefix is not None:
        before = grouped(prefix.query) @ prefix.key.transpose(2, 3)
        if bias is not None:
            before = before + bias.reshape(*before.shape[:3], 1)
        scores = torch.cat((before, scores), dim=-1)
    weights = weigh(module, scores.view(*query.shape[:3], -1), mask, gate).to(query.dtype)
    shares = weights.view(*key.shape[:2], -1, weights.shape[-1])
    if prefix is None:
        output = shares @ value
    else:
        count = prefix.key.shape[2]
        output = shares[..., :count] @ prefix.value + shares[..., count:] @ value
    return output.reshape(query.shape).transpose(1, 2), weights


def memory_gate(module: Any, heads: slice = slice(None)) -> torch.Tensor | None:
    """(H, 1, 1) how far these heads open to memory, between 0 and 1; None where nothing gates it."""
    return module.memory_gate()[heads, None, None] if module.gates_memory else None


def weigh(module, scores: torch.Tensor, mask: torch.Tensor | None, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Weights of scores (B, H, T, S) where the mask (R, T, S) lets them be, softmax in float32. With a gate g (H, 1, 1)
    they are g times those, and 1 − g times those of a softmax without memory."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    if gate is not None:
        count = module.config.num_memory_tokens
        without = nn.functional.softmax(scores[..., count:], dim=-1, dtype=torch.float32)
        without = nn.functional.pad(without, (count, 0)).nan_to_num()  # of padding that sees memory alone
        weights = gate * weights + (1 - gate) * without
    weights = weights.to(scores.dtype)
    return nn.functional.dropout(weights, p=module.dropout, training=module.training)


def weights_in_order(weights: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Weights (B, H, T, [M + Z +] S) as a reader expects them. Without a cache: a column for each token (B, H, T, T).
    With one: a column for each key that was held, oldest first, after those of the sinks where these may have left."""
    sinks = weights.shape[-1] - sight.key_numbers.shape[1]  # there is no memory where weights are asked for
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


__all__ = ["Rotations", "attend", "attend_reference", "eager_attention_forward"]
