# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Computes attention over all parts that a section sees, under one softmax.

One rotation of the prefix (memory and sinks) cannot suit all queries of a call, because the distance from a query to
the prefix stops growing when its window moves. So each query is rotated twice. Keys of the window are rotated by their
places, and scored by the query rotated by its place. Keys of the prefix are rotated by their slots, and scored by the
query rotated by its slot.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys of the window, D head dim, P slots of the prefix; R
is B, or 1 if all rows are equal.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat_olmem import can_join_heads, pieces
from .contracts_olmem import (
    Backend,
    Heads,
    Needs,
    Output,
    Part,
    Section,
    by_key_head,
    by_query_head,
    choose,
    rotate_on_read,
)
from .positions_olmem import XposScheme, as_complex, rotate_pairs, to_halves, to_pairs
from .view_olmem import View, find_sinks

# The number of queries in a block. The first tokens of a stream, up to WHOLE blocks, are computed in one call. That is
# the call of Transformers' models, so it has the same bits, and its mask has a bounded size.
BLOCK = {"cpu": 128}
BLOCK_ELSEWHERE = 1024
WHOLE = 8
SCRATCH = 2**21  # the bytes of rotated keys at a time for each CPU thread
ALL = slice(None)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends by plain operations with a softmax in float32, as one of Transformers' attention functions.

    Args:
        query: (B, H, T, D).
        key: (B, K, S, D).
        value: (B, K, S, D).
        attention_mask: numbers that are added to the scores.
        s_aux: learned sinks (H,) under the name that they have there, or None.

    Returns:
        The output (B, T, H, D) and the weights (B, H, T, S).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (state[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for state in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = softmax(weights, None if s_aux is None else s_aux[:, None]).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def block_size(device: torch.device) -> int:
    """Returns the number of queries in a block on a device."""
    return BLOCK.get(device.type, BLOCK_ELSEWHERE)


class Documents:
    """Attends within each packed document as if it were alone in its row.

    Args:
        backends: the backends for one document, in the order in which they are asked.
    """

    def __init__(self, backends: Sequence[Backend]):
        self.backends = backends

    def supports(self, view: View, needs: Needs) -> bool:
        """Supports views of packed documents."""
        return view.documents is not None

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: Section) -> Output:
        """Attends as `Backend.attend` does. The sinks of a document are its own first tokens."""
        window, length = parts[-1], query.shape[2]
        outputs, weights = [], None
        for row, documents in enumerate(section.view.documents or ()):
            rows = slice(row, row + 1)
            for start, stop in documents:
                part, view = slice(start, stop), section.view.upto(stop - start)
                own = [Part(window.key[rows, :, part], window.value[rows, :, part])]
                if view.prefix:
                    sinks = torch.arange(view.visibility.num_sinks, device=query.device).clamp(max=stop - start - 1)
                    own.insert(0, Part(own[0].key[:, :, sinks], own[0].value[:, :, sinks], is_prefix=True))
                rotations, backend = section.rotations.part(part, row), choose(self.backends, view, section.needs)
                alone = Section(ALL, view, rotations, section.needs, backend)
                output, share = alone.attend(heads, query[rows, :, part], own)
                outputs.append(output)
                if share is not None:
                    weights = query.new_zeros(*query.shape[:3], length) if weights is None else weights
                    weights[rows, :, part, part] = share
        return torch.cat(outputs, dim=1).view(len(query), length, *outputs[0].shape[2:]), weights


class Step:
    """Attends from one query in each row to keys in a cache's buffer, without a copy."""

    def supports(self, view: View, needs: Needs) -> bool:
        """Supports steps."""
        return view.is_step

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: Section) -> Output:
        """Attends as `Backend.attend` does."""
        view, rotations, needs = section.view, section.rotations, section.needs
        if rotations.step.phases is not None:
            output, weights = self.attend_bare(heads, query, parts[0], section)
        else:
            queries = [(rotations.slot if part.is_prefix else rotations.place)(query) for part in parts]
            keys, sink_bias = [part.key for part in parts], None
            if needs.by_slot:
                if needs.sink_logits:
                    sink_bias = heads.scheme.score_bias(queries[-1], -view.query_slots, heads.scaling)
                offsets = view.step_offsets()
                sizes = [key.shape[2] for key in keys]
                offsets = offsets[:, offsets.shape[1] - sum(sizes) :].split(sizes, dim=1)
                keys = [heads.scheme.place_key(key, each, False) for key, each in zip(keys, offsets, strict=True)]
            values = [part.value for part in parts]
            if len(parts) == 1 and not needs.plain and heads.memory_gate is None and not needs.sink_logits:
                output, weights = attend_sdpa(heads, queries[0], keys[0], values[0], view.step_mask), None
            else:
                num_memory = None if heads.memory_gate is None else view.visibility.num_memory
                given = heads, queries, keys, values, view.step_mask, num_memory
                output, weights = attend_side_by_side(*given, sink_bias=sink_bias)
        return output, in_order(weights, view) if needs.weights and weights is not None else None

    def attend_bare(self, heads: Heads, query: torch.Tensor, part: Part, section: Section) -> Output:
        """Attends to keys that are the values too, and rotates them by their slots, a few heads at a time."""
        view, phases = section.view, section.rotations.step.phases
        assert phases is not None
        query = section.rotations.slot(to_pairs(query))
        if isinstance(heads.scheme, XposScheme):
            distance = -view.step_offsets()
            phases = phases * heads.scheme.powers(query, distance.clamp(min=0))[..., None]
        groups = query.shape[1] // part.key.shape[1]
        outputs, weights = [], []
        for kv_heads, key in rotated_heads(part.key, phases):
            some = ALL if kv_heads == ALL else slice(kv_heads.start * groups, kv_heads.stop * groups)
            own, value, share = query[:, some], part.value[:, kv_heads], None
            if section.needs.plain or section.needs.sink_logits or heads.memory_gate is not None:
                num_memory = None if heads.memory_gate is None else view.visibility.num_memory
                given = heads.some(some), [own], [key], [value], view.step_mask, num_memory
                output, share = attend_side_by_side(*given)
            else:
                output = attend_sdpa(heads, own, key, value, view.step_mask)
            outputs.append(output)
            weights.append(share)
        return to_halves(torch.cat(outputs, dim=2)), torch.cat(weights, dim=1) if section.needs.weights else None


class Whole:
    """Attends to one part in one call, which is the call that Transformers' models make and has the same bits."""

    def supports(self, view: View, needs: Needs) -> bool:
        """Supports the first tokens of a stream without a prefix, as long as one mask for all of them is small."""
        if view.prefix or view.key_numbers.shape[1] != view.numbers.shape[1] or needs.by_slot or needs.sink_logits:
            return False
        if not can_join_heads(view.numbers.shape[1]):
            return False  # Transformers' function joins them
        blocks = pieces(view.numbers.shape[1], WHOLE * block_size(view.numbers.device), view.numbers)
        return len(blocks) == 1 or (view.causal and not needs.plain)

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: Section) -> Output:
        """Attends as `Backend.attend` does."""
        view, plain, part = section.view, section.needs.plain, parts[-1]
        query, key = rotate_on_read(query, part, section.rotations)
        mask = view.whole_mask(query.dtype if plain else None) if plain or not view.causal else None
        interface = ALL_ATTENTION_FUNCTIONS.get_interface("eager" if plain else "sdpa", eager_attention_forward)
        dropout, scaling = heads.dropout, heads.scaling
        output, weights = interface(heads.module, query, key, part.value, mask, dropout=dropout, scaling=scaling)
        return to_halves(output) if part.in_pairs else output, weights if section.needs.weights else None


class Blocks:
    """Attends from a block of queries at a time, so that work and memory for a query depend on its window only."""

    def supports(self, view: View, needs: Needs) -> bool:
        """Supports everything except a step whose keys have no positions yet."""
        return not (view.is_step and needs.is_bare)

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: Section) -> Output:
        """Attends as `Backend.attend` does."""
        view, needs, window = section.view, section.needs, parts[-1]
        in_pairs = window.in_pairs
        queries, key = rotate_on_read(query, window, section.rotations)
        before = parts[0] if parts[0].is_prefix else None
        if before is not None:
            before = Prefix(*rotate_on_read(query, before, section.rotations), before.value)
        blocks = pieces(query.shape[2], block_size(query.device), query)
        reaches = [ALL if needs.weights else view.reach(block) for block in blocks]
        keys, values = slices(key, reaches), slices(window.value, reaches)
        outputs, weights = [], []
        for block, reach, block_key, block_value in zip(blocks, reaches, keys, values, strict=True):
            block_query, bias, sink_bias = queries[:, :, block], None, None
            prefix = before and before.some(block)
            if needs.by_slot:
                block_query, block_key, prefix, bias, sink_bias = apply_scheme(
                    heads, block_query, block_key, prefix, view, block, reach, in_pairs
                )
            mask = view.mask(block, reach, prefix is not None)
            if prefix is not None:
                some = [prefix.query, block_query], [prefix.key, block_key], [prefix.value, block_value]
                num_memory = None if heads.memory_gate is None else view.visibility.num_memory
                output, share = attend_side_by_side(heads, *some, mask, num_memory, bias, sink_bias)
            elif needs.plain or needs.sink_logits:
                given = heads, [block_query], [block_key], [block_value], mask
                output, share = attend_side_by_side(*given, sink_bias=sink_bias)
            else:
                output, share = attend_sdpa(heads, block_query, block_key, block_value, mask), None
            outputs.append(output)
            weights.append(share)
        output = torch.cat(outputs, dim=1)
        output = to_halves(output) if in_pairs else output
        return output, in_order(torch.cat(weights, dim=2), view) if needs.weights else None


# The backends for one document or stream, and for any call, in the order in which they are asked.
SINGLE: list[Backend] = [Step(), Whole(), Blocks()]
BACKENDS: list[Backend] = [Documents(SINGLE), *SINGLE]


# Parts of the backends


class Prefix(NamedTuple):
    """Holds queries (B, H, T, D) rotated by their slots, and keys and values (B, K, P, D) of memory and sinks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def some(self, queries: slice) -> "Prefix":
        """Returns the prefix with some of the queries."""
        return self._replace(query=self.query[:, :, queries])


def apply_scheme(
    heads: Heads,
    query: torch.Tensor,
    key: torch.Tensor,
    prefix: Prefix | None,
    view: View,
    block: slice,
    reach: slice,
    in_pairs: bool,
) -> tuple[torch.Tensor, torch.Tensor, Prefix | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns a block's queries, keys and prefix, changed by xpos or linspace, and biases of the prefix and of sinks.

    Positions are offsets from the middle of the block, so that none grows with the stream.
    """
    scheme, place, bias = heads.scheme, view.places[:, block], None
    heads.scheme.refuse_far(query.shape[2], query.dtype)
    middle = (place[:, :1] + place[:, -1:]) // 2
    slot = view.query_slots[:, block]
    shift = place - slot - middle  # of the block's positions from slots
    sink_bias = None if heads.sink_logits is None else scheme.score_bias(query, shift, heads.scaling)
    if prefix is not None:
        least = slot.amin(-1, keepdim=True)
        bias = scheme.score_bias(prefix.query, shift + least, heads.scaling)
        prefix = Prefix(
            scheme.place_query(prefix.query, slot - least, in_pairs),
            scheme.place_key(prefix.key, view.prefix_slots - least, in_pairs),
            prefix.value,
        )
    query = scheme.place_query(query, place - middle, in_pairs)
    return query, scheme.place_key(key, view.key_places[:, reach] - middle, in_pairs), prefix, bias, sink_bias


class Slices(torch.autograd.Function):
    """Takes overlapping slices of states (B, K, S, D), and adds their gradients in one tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states, *ranges):
        """Returns one slice for each range of S."""
        return tuple(states[:, :, part] for part in ranges)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the shape and the ranges for the backward pass."""
        ctx.shape, ctx.ranges = inputs[0].shape, inputs[1:]

    @staticmethod
    def backward(ctx, *gradients):
        """Returns the gradient of the states."""
        total = gradients[0].new_zeros(ctx.shape)
        for part, gradient in zip(ctx.ranges, gradients, strict=True):
            total[:, :, part] += gradient
        return total, *(None for _ in ctx.ranges)


def slices(states: torch.Tensor, ranges: Sequence[slice]) -> Sequence[torch.Tensor]:
    """Returns slices (B, K, …, D) of states (B, K, S, D), one for each range of S."""
    if len(ranges) > 1 and torch.is_grad_enabled():
        return Slices.apply(states, *ranges)
    return [states[:, :, part] for part in ranges]


def rotated_heads(states: torch.Tensor, phases: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields heads of states (B, K, S, D) rotated by phases (R, S, D/2, 2), on a CPU a few heads at a time.

    Each result must be used before the next one is asked for, because they share memory on a CPU. There are as many
    heads as fit into the processor's cache, and at least one for each thread.
    """
    batch, kv_heads, length, width = states.shape
    size = kv_heads
    if states.device.type == "cpu":
        threads = torch.get_num_threads()
        size = min(max(threads * SCRATCH // (batch * length * width * 4), -(-threads // batch)), kv_heads)
    blocks = pieces(kv_heads, size, states)
    in_place = len(blocks) > 1 and states.dtype == torch.float32
    scratch = states.new_empty(batch, size, length, width) if in_place else None
    for block in blocks:
        if scratch is None:
            yield block, rotate_pairs(states[:, block], phases)
            continue
        rotated = scratch[:, : block.stop - block.start]
        torch.mul(as_complex(states[:, block]), torch.view_as_complex(phases[:, None]), out=as_complex(rotated))
        yield block, rotated


def attend_sdpa(
    heads: Heads, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attends by SDPA from queries (B, H, T, D) to keys (B, K, S, D) under a mask (R, T, S). Returns (B, T, H, D).

    The query heads of one key head are laid out as further queries, so that no key is copied.
    """
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        mask = mask[:, None] if groups == 1 else mask[:, None].repeat(1, 1, groups, 1)
    output = nn.functional.scaled_dot_product_attention(
        by_key_head(query, key),
        key,
        value,
        attn_mask=mask,
        dropout_p=heads.dropout,
        scale=heads.scaling,
    )
    return by_query_head(output, groups).transpose(1, 2)


def attend_side_by_side(
    heads: Heads,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    num_memory: int | None = None,
    bias: torch.Tensor | None = None,
    sink_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends by plain operations to several parts, whose scores are concatenated under one softmax.

    Args:
        queries: the queries (B, H, T, D) for each part.
        keys: the keys (B, K, S, D) of each part.
        values: the values (B, K, S, D) of each part.
        mask: which keys of all parts are seen, (R, T, S), or None for all.
        num_memory: the number of first keys that are memory, for the memory gate of the heads; None for no gate.
        bias: numbers (B, H, T, 1) that are added to the scores of the first part.
        sink_bias: numbers (B, H, T, 1) that are added to learned sinks.

    Returns:
        The output (B, T, H, D) and the weights (B, H, T, S).
    """
    groups, sizes = queries[0].shape[1] // keys[0].shape[1], [key.shape[2] for key in keys]
    scores = [
        by_key_head(query * heads.scaling, key) @ key.transpose(2, 3) for query, key in zip(queries, keys, strict=True)
    ]
    if bias is not None:
        scores[0] = scores[0] + by_key_head(bias, keys[0])
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    if mask is not None and groups > 1:
        mask = mask.repeat(1, groups, 1)
    sink_bias = None if sink_bias is None else by_key_head(sink_bias, keys[0])[..., 0]
    weights = weigh(heads, joined, mask, groups, num_memory, sink_bias).to(queries[0].dtype)
    shares = weights.split(sizes, dim=-1)
    output = shares[0] @ values[0]
    for share, value in zip(shares[1:], values[1:], strict=True):
        output = output + share @ value
    return by_query_head(output, groups).transpose(1, 2), by_query_head(weights, groups)


def softmax(scores: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Returns the softmax in float32 of scores (…, T, S), among which are sinks (…, T or 1) that get no weight."""
    if sink_logits is None:
        return nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    column = sink_logits[..., None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return nn.functional.softmax(torch.cat((scores, column), dim=-1), dim=-1, dtype=torch.float32)[..., :-1]


def weigh(
    heads: Heads,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    groups: int,
    num_memory: int | None,
    sink_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the softmax in float32 of scores (B, K, G · T, S) of G query heads a key head, where the mask is true.

    With a memory gate g it returns g times this softmax, plus 1 − g times the softmax over all but the first
    `num_memory` keys. The mask is (R, G · T, S). Learned sinks, with a bias (B, K, G · T), join either softmax.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)

    def for_queries(of_heads: torch.Tensor | None) -> torch.Tensor | None:
        """Returns what heads (H,) have as what their queries have, (K, G · T)."""
        if of_heads is None:
            return None
        return of_heads.view(-1, groups, 1).expand(-1, -1, scores.shape[2] // groups).flatten(1)

    sink_logits, gate = for_queries(heads.sink_logits), for_queries(heads.memory_gate)
    if sink_logits is not None and sink_bias is not None:
        sink_logits = sink_logits + sink_bias
    weights = softmax(scores, sink_logits)
    if num_memory is not None and gate is not None:
        gate = gate[..., None]
        without = softmax(scores[..., num_memory:], sink_logits)
        without = nn.functional.pad(without, (num_memory, 0)).nan_to_num()  # padding may see memory alone
        weights = gate * weights + (1 - gate) * without
    weights = weights.to(scores.dtype)
    return nn.functional.dropout(weights, heads.dropout) if heads.dropout else weights


def in_order(weights: torch.Tensor, view: View) -> torch.Tensor:
    """Returns weights (B, H, T, [P +] S) with their keys in the order of the stream.

    Without a cache there is a column for each token. With a cache there is a column for each key in it, oldest first,
    after the columns of sinks if these may have left the window.
    """
    sinks = weights.shape[-1] - view.key_numbers.shape[1]  # there is no memory where weights are asked for
    before, window = (weights[..., :sinks], weights[..., sinks:]) if sinks else (weights, weights)
    if view.in_place and view.visibility.span is not None:
        order = view.key_numbers.argsort(dim=-1, stable=True)[:, None, None]
        window = window.take_along_dim(order.expand(-1, *window.shape[1:3], -1), dim=-1)
    if not sinks:
        return window
    if view.seen is not None:
        return torch.cat((before, window), dim=-1)
    found, column = find_sinks(view.numbers, sinks)
    return window.scatter_add(-1, column[:, None, None].expand(*before.shape), before * found[:, None, None])


__all__ = ["BACKENDS", "eager_attention_forward"]
