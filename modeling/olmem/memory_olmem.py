# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Reading by segments, with a memory that is written at the end of each (Recurrent Memory Transformer, Bulatov et al.,
arXiv 2207.06881).

Before a segment the model holds M vectors. They enter as read tokens, which see one another; their keys and values, of
every layer, are what the segment's tokens see of memory. After its last token M write tokens enter, with the same
vectors as input; they see what that token sees, and one another, and what they have become after the last layer goes
through a norm of memory's own, without which it would add up from segment to segment. These are the vectors of the next
segment. They are written when the next segment begins: nobody asks before.

Rows of a batch begin their segments at different columns. So a forward call is cut into pieces of one segment a row,
and the rows that begin one write and read together.

Where gradients are wanted, nothing that one piece has made may be written over by the next: a `Trail` stands in for the
layer of a cache then.

Shapes: B batch, K key/value heads, T new tokens, S keys, D head dim, M memory slots, Z sinks.
"""

from typing import Any

import torch
from transformers.utils.import_utils import is_tracing

from .cache_layer_olmem import STORE_BLOCK, OlmemCacheLayer, gather_sinks
from .cache_olmem import OlmemCache
from .context_olmem import Context, Piece, Sight, cut_in_segments, last_numbers, place_in_pieces, ring_slot
from .finite_olmem import refuse_nonfinite_memory

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values


class Trail:
    """Keys and values of one layer in one piece of a forward call, for gradients to go back through. Stands in for the
    layer of a cache, and writes to it if there is one.

    What a layer that is computed twice (gradient checkpointing) notes for the second time is the same again.
    """

    def __init__(self, batch_size: int, layer: OlmemCacheLayer | None, before: "Trail | None", writing: Sight | None):
        self.batch_size = batch_size
        self.layer = layer
        self.before = before
        self.counted = writing  # the piece as the cache sees it
        self.one_tensor = layer is not None and layer.one_tensor
        self.window: Pair | None = None  # (B, K, S, D), those that the piece's sight numbers
        self.candidates: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # (B, K, S, D), numbers (B, S)
        self.memory: Pair | None = None  # (B or 1, K, M, D), not rotated
        self.sinks: Pair | None = None  # (B, K, Z, D), not rotated
        if before is not None:
            self.memory, self.sinks = before.memory, before.sinks
        elif layer is not None and layer.is_initialized and layer.context.num_prefix:
            count, stored = layer.context.num_memory, [buffer.clone() for buffer in layer.prefix_buffers]
            self.memory = stored[0][:, :, :count], stored[-1][:, :, :count]
            self.sinks = stored[0][:, :, count:], stored[-1][:, :, count:]
        self.old_memory, self.old_sinks = self.memory, self.sinks

    def writing(self, device: torch.device) -> Sight | None:
        """The piece as the cache sees it, where a layer is."""
        if self.counted is not None and self.counted.numbers.device != device:
            self.counted = self.counted.to(device)
        return self.counted

    def keep_memory(self, keys: torch.Tensor, values: torch.Tensor, sight: Sight) -> None:
        """As a cache's layer."""
        self.memory = keys, values
        if sight.chosen is not None and self.old_memory is not None:
            old = [states.expand(self.batch_size, -1, -1, -1) for states in self.old_memory]
            new = [states.expand(len(sight.chosen), -1, -1, -1) for states in (keys, values)]
            self.memory = old[0].index_copy(0, sight.chosen, new[0]), old[1].index_copy(0, sight.chosen, new[1])
        if self.layer is not None:
            self.layer.keep_memory(keys, values, sight)

    def update(self, keys: torch.Tensor, values: torch.Tensor, sight: Sight) -> Pair:
        """As a cache's layer: keys and values (B, K, S, D), those that `sight` numbers."""
        past = self.window if sight.memory else self.before and self.before.window
        found = keys, values
        if self.layer is not None and sight.memory is None:
            found = self.layer.update(keys, values, self.writing(keys.device))
        if past is not None:
            count = sight.key_numbers.shape[1] - sight.numbers.shape[1]
            rows = slice(None) if sight.chosen is None else sight.chosen
            before = [states[rows, :, states.shape[2] - count :] for states in past]
            found = torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)
        if sight.memory is None:
            self.window = found
        return found

    def update_prefix(self, keys: torch.Tensor, values: torch.Tensor, sight: Sight) -> Pair:
        """As a cache's layer: keys, not rotated, and values (B, K, M + Z, D) of memory and sinks."""
        if sight.memory is None and sight.context.num_sinks:
            self.sinks = gather_sinks(keys, values, sight, self.old_sinks)
        writing = self.writing(keys.device)
        if sight.memory is None and self.layer is not None and writing is not None:
            self.layer.update_prefix(keys, values, writing)
        parts = []
        for pair in (self.memory, self.sinks):
            if pair is not None and pair[0].shape[2]:
                if sight.chosen is not None and len(pair[0]) > 1:
                    pair = pair[0][sight.chosen], pair[1][sight.chosen]
                parts.append([states.expand(len(keys), -1, -1, -1) for states in pair])
        both = [torch.cat(states, dim=2) for states in zip(*parts, strict=True)]
        return both[0], both[1]

    def recall(
        self, keys: torch.Tensor, values: torch.Tensor, sight: Sight, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, not rotated, values (B, K, S, D) and numbers (B, S) of all that may be looked up: what the pieces
        before have read, or the cache had, and the new ones."""
        numbers = sight.numbers.expand(len(keys), -1)
        past = self.before and self.before.candidates
        writing = self.writing(keys.device)
        if self.before is None and self.layer is not None and writing is not None:
            past = stored_candidates(self.layer, writing, keys.device)
        if self.layer is not None and writing is not None:
            for start in range(0, keys.shape[2], STORE_BLOCK):
                part = slice(start, min(start + STORE_BLOCK, keys.shape[2]))
                self.layer.store(keys, values, writing, part)
        self.candidates = keys, values, numbers
        if past is not None:
            first = first_candidate(past[2], numbers, sight.context, capacity)  # of those before, for these or later
            both = torch.cat((past[0][:, :, first:], keys), dim=2), torch.cat((past[1][:, :, first:], values), dim=2)
            self.candidates = *both, torch.cat((past[2][:, first:], numbers), dim=1)
        return self.candidates


def first_candidate(past: torch.Tensor, numbers: torch.Tensor, context: Context, capacity: int) -> int:
    """The first column of past tokens (B, P) that one of these numbers (B, T) may look up, or any later token."""
    if torch.compiler.is_compiling():
        return 0
    first = numbers.where(numbers >= 0, torch.iinfo(numbers.dtype).max).amin(-1, keepdim=True)
    none = first == torch.iinfo(numbers.dtype).max  # of rows that read nothing now: what they last read counts
    oldest = context.start(first.where(~none, past.amax(-1, keepdim=True).clamp(min=0))) - capacity
    wanted = (past >= 0) & (past >= oldest)
    return int(wanted.any(0).int().argmax()) if bool(wanted.any()) else past.shape[1]


def stored_candidates(
    layer: OlmemCacheLayer, sight: Sight, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Keys, values and numbers of what a cache's store held before a call, oldest first."""
    assert sight.seen is not None
    before = (sight.length or 0) - sight.numbers.shape[1]
    numbers = last_numbers(sight.seen, before, layer.store_limit)
    if not before:
        return None
    stored = [layer.buffers[name] for name in layer.store_names]
    slots = ring_slot(numbers.clamp(min=0), layer.store_limit).to(stored[0].device)
    found = [buffer[sight.rows.to(slots.device), :, slots].transpose(1, 2).to(device) for buffer in stored]
    return found[0], found[-1], numbers


NONFINITE = (
    "load the model in bfloat16 or float32, or look for NaN in its weights and input, and `reset()` the cache or go on "
    "from a copy made before."
)


class SegmentReader:
    """Reads the new tokens of one forward call.

    Args:
        model (`OlmemModel`): whose layers they pass.
        cache (`OlmemCache`, *optional*): to go on from. Without one, and without gradients, one is made for the call.
        batch_size, length (`int`): rows B and columns T of the call.
        device (`torch.device`): of the hidden states.
    """

    def __init__(self, model: Any, cache: OlmemCache | None, batch_size: int, length: int, device: torch.device):
        self.model, self.config = model, model.config
        self.batch_size, self.length, self.device = batch_size, length, device
        self.differentiable = torch.is_grad_enabled()
        if cache is None and not self.differentiable:
            cache = OlmemCache(self.config, max_length=length)
            cache.begin(batch_size, device)
        self.cache = cache
        self.before = 0 if cache is None else cache.room_for(length, self.differentiable) or 0  # columns read
        self.memory = None if cache is None else cache.memory  # (B or 1, M, hidden_size)
        if self.memory is not None and self.differentiable:
            self.memory = self.memory.clone()
        # Of the piece before, where gradients are wanted: what the layers of each type have seen, and each layer.
        self.sights: dict[str, Sight] = {}
        self.trails: list[Trail] = []

    def read(
        self, hidden_states: torch.Tensor, numbers: torch.Tensor, padded: bool, all_stages: bool = False, **kwargs
    ) -> list[torch.Tensor]:
        """Hidden states (B, T, hidden_size) of tokens of these numbers (B or 1, T) -> those after the last layer, or
        with `all_stages` those before the first and after each. `kwargs` are for the layers."""
        if self.cache is not None:
            numbers = numbers.expand(self.batch_size, -1)
        pieces = self.cut(numbers, padded)
        outputs = []
        for index, piece in enumerate(pieces):
            if isinstance(piece.columns, slice):
                states = hidden_states[:, piece.columns]
            else:
                states = hidden_states.gather(1, piece.columns[..., None].expand(-1, -1, hidden_states.shape[2]))
            sights, trails, counted = self.look(piece)
            if self.config.num_memory_tokens:
                self.begin_segments(piece, self.keeps_gradients(numbers, index), trails, **kwargs)
            self.sights, self.trails = sights, trails
            outputs.append(self.run(states, sights, trails, all_stages, **kwargs))
            self.before += states.shape[1]
            if self.cache is not None:
                self.cache.advance(next(iter(counted.values())), self.length if piece is pieces[-1] else 0)
                self.cache.half_read = piece is not pieces[-1]
        joined = [torch.cat(states, dim=1) for states in zip(*outputs, strict=True)]
        if isinstance(pieces[0].columns, slice):
            return joined
        places = place_in_pieces(pieces, self.length)[..., None]
        return [states.gather(1, places.expand(-1, -1, states.shape[2])) for states in joined]

    def cut(self, numbers: torch.Tensor, padded: bool) -> list[Piece]:
        segment, phase = self.config.memory_segment_length, None
        if not self.config.num_memory_tokens:
            return [Piece(numbers, slice(0, self.length), padded)]
        if self.cache is None and not padded:
            phase = 0
        elif not padded and self.length > 1:
            phases = numbers[:, 0] % segment
            phase = int(phases[0]) if bool((phases == phases[0]).all()) else None
        return cut_in_segments(numbers, padded, phase, segment)

    def look(self, piece: Piece) -> tuple[dict[str, Sight], list[Trail], dict[str, Sight]]:
        """What the layers of each type see in a piece, their trails if gradients are wanted, and what a cache counts,
        by layer type."""
        numbers, padded, cache, cached = piece.numbers, piece.padded, self.cache, {}
        contexts = self.model.contexts
        if cache is not None:
            cached = cache.look(contexts, numbers, padded, self.before, self.differentiable)
        if not self.differentiable:
            return cached, [], cached
        sights = cached
        if self.sights:
            sights = {kind: Sight.after(earlier, numbers, padded) for kind, earlier in self.sights.items()}
        elif cache is None:
            sights = {kind: Sight.without_cache(context, numbers, padded) for kind, context in contexts.items()}
        trails = []
        for index, layer_type in enumerate(self.config.layer_types):
            layer = None if cache is None else cache.layers[index]
            before = self.trails[index] if self.trails else None
            trails.append(Trail(self.batch_size, layer, before, cached.get(layer_type)))
        return sights, trails, cached

    def run(
        self, states: torch.Tensor, sights: dict[str, Sight], trails: list[Trail], all_stages: bool = False, **kwargs
    ) -> list[torch.Tensor]:
        """All layers, one after another."""
        arguments = self.model.tell(states, sights, self.cache)
        stages = [states]
        for index, (layer, layer_type) in enumerate(zip(self.model.layers, self.config.layer_types, strict=True)):
            trail = trails[index] if trails else None
            states = layer(states, kv_cache=self.cache, trail=trail, **arguments[layer_type], **kwargs)
            stages.append(states)
        return [each.to(self.device) for each in (stages if all_stages else stages[-1:])]

    def begin_segments(self, piece: Piece, keep: torch.Tensor | None, trails: list[Trail], **kwargs) -> None:
        """Where a piece begins a segment: its memory is written, unless it is a stream's first, and read. Gradients go
        back to what rows have written where `keep` (B or 1,) says so."""
        first, initial = piece.numbers[:, 0], self.model.memory()[None].to(self.device)
        if self.cache is None and piece.begins is not None:  # known without asking the device
            rows, writers = None, None if self.memory is None else slice(None)
        else:
            begin = (first >= 0) & (first % self.config.memory_segment_length == 0)
            if self.memory is None:  # of a batch that has read nothing
                begin = torch.ones_like(begin)
            if not bool(begin.any()):
                return
            rows = None if bool(begin.all()) else begin.nonzero()[:, 0]
            writers = (begin & (first > 0)).nonzero()[:, 0]
            if self.memory is not None and self.memory.device.type != "cpu":  # the host has waited, so this is cheap
                refuse_nonfinite_memory(self.memory, None, "when a segment begins", NONFINITE)
            writers = None if not len(writers) else slice(None) if len(writers) == len(begin) else writers
        if writers is None:
            memory = initial
        elif isinstance(writers, slice):
            memory = self.write(None, first, keep, **kwargs)
        elif rows is not None and len(rows) == len(writers):
            memory = self.write(writers, first, keep, **kwargs)
        else:
            memory = initial.expand(self.batch_size, -1, -1)
            memory = memory.index_copy(0, writers, self.write(writers, first, keep, **kwargs))
            memory = memory if rows is None else memory[rows]
        if self.cache is not None:  # which has a place for each row
            memory = memory.expand(self.batch_size if rows is None else len(rows), -1, -1)
        reads = Sight.of_reads(self.config.num_memory_tokens, self.device, rows)
        self.run(memory, dict.fromkeys(self.model.contexts, reads), trails, **kwargs)
        self.remember(memory, rows)

    def remember(self, memory: torch.Tensor, rows: torch.Tensor | None) -> None:
        if rows is not None and self.memory is not None:
            old = self.memory.expand(self.batch_size, -1, -1)
            memory, new = old.index_copy(0, rows, memory.expand(len(rows), -1, -1).to(old)), memory
        else:
            new = memory
        if self.cache is not None:
            self.cache.remember(new, rows)
        self.memory = memory if self.differentiable or self.cache is None else self.cache.memory

    def write(self, rows: torch.Tensor | None, first: torch.Tensor, keep: torch.Tensor | None, **kwargs):
        """(R, M, hidden_size) what write tokens become after the tokens before `first` (B or 1,), in these rows."""

        def of_rows(states: torch.Tensor) -> torch.Tensor:
            return states if rows is None or len(states) == 1 else states[rows]

        assert self.memory is not None
        count, seen, sights = self.config.num_memory_tokens, of_rows(first), {}
        for layer_type, context in self.model.contexts.items():
            slots = None
            if self.trails:
                earlier = self.sights[layer_type]
                past = of_rows(earlier.key_numbers)[:, earlier.first_kept :]
            else:
                past = last_numbers(seen, self.before, context.span)
                limit = None if self.cache is None else self.cache.limit(context)
                slots = context.num_prefix + ring_slot(past.clamp(min=0), limit)
            sights[layer_type] = Sight.of_writes(context, count, past, seen, rows, past_slots=slots)
        memory = of_rows(self.memory).expand(self.batch_size if rows is None else len(rows), -1, -1)
        written = self.model.memory.norm(self.run(memory, sights, self.trails, **kwargs)[0]).to(self.device)
        if written.device.type == "cpu" and not is_tracing(written):
            refuse_nonfinite_memory(written, rows, "at the end of a segment", NONFINITE)
        if keep is not None:
            written = torch.where(of_rows(keep)[:, None, None], written, written.detach())
        return written

    def keeps_gradients(self, numbers: torch.Tensor, index: int) -> torch.Tensor | None:
        """(B or 1,) whether gradients go back from a row's piece of that index through the memory that is written
        there: `memory_bptt_segments` times in a row, counted from the row's last piece. None where they always do."""
        depth, length = self.config.memory_bptt_segments, self.config.memory_segment_length
        if depth is None or not self.differentiable:
            return None
        real = numbers >= 0
        last = torch.where(real, numbers, -1).amax(-1) // length
        first = torch.where(real, numbers, last[:, None] * length).amin(-1) // length
        return (last - first + 1 - index) % (depth + 1) != 0


def read_documents(
    model: Any, hidden_states: torch.Tensor, documents: list[list[tuple[int, int]]], all_stages: bool, **kwargs
) -> list[torch.Tensor]:
    """As `SegmentReader.read`, of rows (B, T, hidden_size) that packed documents make up, `documents` telling where
    they start and stop: each is read as a row of its own, beside others of about its length."""
    device = hidden_states.device
    spans = [(row, start, stop - start) for row, parts in enumerate(documents) for start, stop in parts]
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for span in spans:
        groups.setdefault(span[2].bit_length(), []).append(span)
    found, order = [], []
    for group in groups.values():
        row, start, size = torch.tensor(group, device=device).T[:, :, None]
        longest = max(span[2] for span in group)
        column = torch.arange(longest, device=device)[None]
        real = column < size
        states = hidden_states[row, (start + column).clamp(max=hidden_states.shape[1] - 1)]
        reader = SegmentReader(model, None, len(group), longest, device)
        padded = any(span[2] < longest for span in group)
        stages = reader.read(states, torch.where(real, column, -1) if padded else column, padded, all_stages, **kwargs)
        found.append([each[real] for each in stages])
        order.append((row * hidden_states.shape[1] + start + column)[real])
    back = torch.cat(order).argsort()
    return [torch.cat(parts)[back].view(hidden_states.shape) for parts in zip(*found, strict=True)]


__all__ = ["SegmentReader", "Trail", "read_documents"]
