# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Remembers the keys and values of one layer, in an `OlmemCache` or on a tape that keeps gradients within one forward.

Shapes: B batch, K key/value heads, C columns of a call, S keys, D head dim, P slots of the prefix (M of memory, then
the sinks). The buffers of a cache's layer are (B, K, slots, D):

    | P slots of memory and sinks | a ring of a window's span, or a row that grows | a slot for unwanted tokens |

| layer | key of the window | key of the prefix |
|---|---|---|
| separate values, RoPE | rotated once by its place, since only differences count | rotated by its slot |
| … xpos; linspace; no positions | rotated, not scaled; as projected; as projected | the same |
| shared tensor | as projected, rotated on read; one buffer is key and value | the same |

The place of a sink equals its slot, and so does that of a memory token, so one rotation serves window and prefix. The
tokens to retrieve are in a ring of their own, which holds keys without positions, and values. A store that selects is
no ring: a new token takes an empty slot, or that of a token that was beaten (`admission_olmem`). It also has scores and
counts (B, K, slots). A count is the number of the slot's token plus 1, and 0 where the slot is empty.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from transformers.cache_utils import CacheLayerMixin

from .admission_olmem import free_slots, priorities
from .compat_olmem import allocate, known_on_host
from .contracts_olmem import Candidates, Part, Plan, Tape, Writes
from .counters_olmem import Counters
from .positions_olmem import to_halves, to_pairs
from .visibility_olmem import STORE_BLOCK, Visibility, held, ring_slot

GROWTH = 256  # the tokens for which a layer has room at first, and the most for which it makes room before they come
ALL = slice(None)
SELECTING = ("store_scores", "store_counts")  # the buffers of a store that selects, beside those of keys and values

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values (B, K, S, D)
Held = TypeVar("Held")


class OlmemCacheLayer(CacheLayerMixin):
    """Remembers the keys and values of one layer in an `OlmemCache`, in place and without gradients.

    Args:
        visibility: says what the layer's queries see.
        counters: the cache's counters of what its layers have read.
        max_length: the number of tokens for which a full layer has room at once, or None for a layer that grows.
        one_tensor: whether the keys are the values, and are stored once, without positions.
        rotates: whether the layer's keys are rotated.
        store_capacity: the number of tokens that can be retrieved after they have left the window; 0 for no store.
        store_device: the device of the store, or None for that of the layer.
        store_selects: whether the tokens of the highest scores stay in the store, rather than the last ones.
    """

    def __init__(
        self,
        visibility: Visibility,
        counters: Counters,
        max_length: int | None,
        one_tensor: bool = False,
        rotates: bool = True,
        store_capacity: int = 0,
        store_device: str | None = None,
        store_selects: bool = False,
    ):
        self.visibility, self.counters = visibility, counters
        self.one_tensor = one_tensor
        self.in_pairs = one_tensor and rotates
        self.is_sliding = visibility.span is not None
        self.is_compileable = False  # so that `generate()` does not compile, which delays its first token
        self.limit = visibility.span or max_length  # the most tokens in the window's buffer; None if it grows
        self.room = min(self.limit, max_length) if self.limit and max_length else None  # allocated at once
        self.store_limit = store_capacity and visibility.store_size(store_capacity)
        self.store_device, self.store_selects = store_device, store_selects
        self.is_initialized = False
        self.buffers: dict[str, torch.Tensor] = {}  # by name: "keys", "values", and those of the store, "store_…"
        self.capacity = 0
        self.expected = 0  # how many tokens may be read in all, as far as somebody knows
        self.half_written = False  # whether a forward call has written here and has not ended

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the buffers of prefix and window."""
        return ("keys",) if self.one_tensor else ("keys", "values")

    @property
    def store_names(self) -> tuple[str, ...]:
        """Returns the names of the buffers of the store."""
        return tuple(f"store_{name}" for name in self.names)

    @property
    def all_store_names(self) -> tuple[str, ...]:
        """Returns the names of the buffers of the store, of scores and counts too if it selects."""
        return (*self.store_names, *SELECTING) if self.store_selects else self.store_names

    # The interface of Transformers' cache layers

    def held(self, name: str) -> torch.Tensor | None:
        """Returns the window's tokens in a buffer, (B, K, S, D), or None before the first call."""
        if not self.is_initialized:
            return None
        first, columns = self.visibility.num_prefix, known_on_host(self.counters.read_columns)
        length = self.capacity if columns is None else min(columns, self.capacity)
        return self.buffers[name][:, :, first : first + length]

    @property
    def keys(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the window's keys in stored order. Once the ring is full, new keys replace the oldest ones."""
        return self.held("keys")

    @property
    def values(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the window's values, in the order of `keys`."""
        return self.held(self.names[-1])

    def get_seq_length(self) -> int:
        """Returns the columns that were read, padding included."""
        return self.counters.read_columns() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that the next call of `query_length` columns sees, and the first one's column."""
        columns, span = self.get_seq_length(), self.visibility.span
        before = columns if span is None else min(columns, span - 1)
        return before + query_length, columns - before

    def get_max_length(self) -> int:
        """Returns the most tokens that the window's buffer holds, or −1 without a limit."""
        return -1 if self.limit is None else self.limit

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> Pair:
        """Refuses the update of another family's model, which makes no plan of where to write keys.

        Transformers' abstract class demands this method. It is also the only one that every foreign model calls, so it
        is the place to refuse one.
        """
        raise ValueError(
            "`past_key_values` is an OlmemCache, which serves Olmem models only (got an update of another model); "
            "leave it out, or pass one of Transformers' caches."
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates buffers for keys and values of this type and shape (B, K, S, D), yet without room for tokens.

        The counters know the number of rows, which the states may list as one.
        """
        states = dict(zip(self.names, (key_states, value_states), strict=False))
        rows = len(self.counters.seen)
        for name, like in states.items():
            shape = (rows or len(like), like.shape[1], self.visibility.num_prefix + 1, like.shape[3])
            self.buffers[name] = allocate(*shape, dtype=like.dtype, device=like.device)
        if self.store_limit:
            for name, like in zip(self.store_names, states.values(), strict=True):
                shape = (rows or len(like), like.shape[1], 1, like.shape[3])
                self.buffers[name] = allocate(*shape, dtype=like.dtype, device=self.store_device or like.device)
            kinds = torch.promote_types(key_states.dtype, torch.float32), torch.long
            for name, dtype in zip(SELECTING, kinds, strict=True) if self.store_selects else ():
                device = self.store_device or key_states.device
                self.buffers[name] = allocate(*key_states.shape[:2], 1, dtype=dtype, device=device)
        self.is_initialized = True

    # Room

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Makes sure that there are buffers for keys and values (B, K, S, D) of this type, on their device."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if self.buffers["keys"].dtype != key.dtype:
            raise ValueError(
                f"`past_key_values` holds {self.buffers['keys'].dtype} (got {key.dtype}); use the dtype and the "
                "autocast of the first call with this cache."
            )
        self.half_written = True
        if self.buffers["keys"].device != key.device:  # as with a cache from a file, or a model on several devices
            for name, buffer in self.buffers.items():
                device = self.store_device if name in self.all_store_names and self.store_device else key.device
                self.buffers[name] = allocate(*buffer.shape, dtype=buffer.dtype, device=device).copy_(buffer)

    def reserve(self, length: int | None) -> None:
        """Makes room for `length` tokens and some that are expected, at least twice the present room, up to the limit.

        If only the device knows the length (None), all room is made at once, so that shapes do not change.
        """
        if length is None:
            length = self.limit or self.capacity
        elif self.limit is not None:
            length = min(length, self.limit)
        if length <= self.capacity:
            return
        room = max(self.room or 0, length, min(self.expected, length + GROWTH), GROWTH, 2 * self.capacity)
        room = room if self.limit is None else min(room, self.limit)
        try:
            buffers = {name: grown(self.buffers[name], self.visibility.num_prefix + room + 1) for name in self.names}
        except RuntimeError as error:
            if self.room is None:
                raise
            raise ValueError(
                f"`max_length` must fit into the device's memory (got room for {room} tokens: {error}); give a smaller "
                "one, or leave it out for layers that grow."
            ) from error
        self.buffers |= buffers
        self.capacity = room

    def reserve_store(self, length: int | None) -> None:
        """Makes room in the store for `length` tokens, at least twice the present room."""
        room = self.buffers[self.store_names[0]].shape[2] - 1
        wanted = self.store_limit if length is None else min(length, self.store_limit)
        if room < wanted:
            room = min(max(2 * room, wanted, GROWTH), self.store_limit)
            self.buffers |= {name: grown(self.buffers[name], room + 1) for name in self.all_store_names}  # all, or none

    def addresses(self) -> list[int]:
        """Returns where keys and values lie, and the slots of a head, then the same of the store, for a step."""
        found = []
        for names in (self.names, self.store_names if self.store_limit else ()):
            buffers = [self.buffers[name] for name in names]
            found += (
                [*(each.data_ptr() for each in (*buffers, *buffers)[:2]), buffers[0].shape[2]] if buffers else [0] * 3
            )
        return found

    # Writing and reading

    def stored_form(self, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> Pair:
        """Returns new keys and values (B, K, C, D) in the form in which the buffers store them."""
        if self.one_tensor:
            key = to_pairs(key) if self.in_pairs else key
            return key, key
        return plan.rotations.place(key), value

    def past(self, writes: Writes) -> Pair | None:
        """Returns copies (B, K, S, D) of the keys and values before a call, oldest first, or None if there are none."""
        if writes.past_slots is None or not writes.past_slots.shape[1]:
            return None
        rows = writes.rows if writes.past_rows is None else writes.past_rows
        copies = [self.buffers[name][rows, :, writes.past_slots].transpose(1, 2) for name in self.names]
        return copies[0], copies[-1]

    def join_past(self, new: Pair | None, writes: Writes, plan: Plan) -> Pair | None:
        """Returns new keys and values (B, K, C, D) after those before the call, oldest first."""
        slots = writes.past_slots
        if new is None or slots is None or not slots.shape[1]:
            return new
        rows, given = writes.rows if writes.past_rows is None else writes.past_rows, zip(self.names, new, strict=False)
        joined = [plan.operations.join_past(self.buffers[name], rows, slots, states) for name, states in given]
        return joined[0], joined[-1]

    def prefix(self, writes: Writes) -> Pair | None:
        """Returns the keys and values (B, K, P, D) of memory and sinks, for the rows that take part in a call."""
        if not self.visibility.num_prefix:
            return None
        states = [self.buffers[name][:, :, : self.visibility.num_prefix] for name in self.names]
        if writes.chosen is not None:
            states = [each[writes.chosen] for each in states]
        return states[0], states[-1]

    def open(self, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> Pair:
        """Makes room for new keys and values (B, K, C, D), and returns them in their stored form for `keep`."""
        writes = require(plan.writes)
        new = self.stored_form(key, value, plan)
        self.prepare(*new)
        if plan.section("token") is not None:
            self.reserve(writes.length)
        return new

    def keep(self, new: Pair, plan: Plan) -> None:
        """Writes new keys and values (B, K, C, D) in their stored form to their slots."""
        writes, read, tokens = require(plan.writes), plan.section("read"), plan.section("token")
        for name, states in zip(self.names, new, strict=False):
            buffer = self.buffers[name]
            if read is not None:
                memory = buffer[:, :, : self.visibility.num_memory]
                new_memory = read.part(states)
                if plan.begins is not None:
                    new_memory = torch.where(plan.begins[:, None, None, None], new_memory, memory)
                memory.copy_(new_memory)
            if tokens is not None:
                of_tokens = tokens.part(states)
                last = last_columns(of_tokens, writes.slots.shape[1])
                plan.operations.store(buffer, writes.rows, writes.slots, last)
                if writes.sink_slots is not None:
                    first = of_tokens[:, :, : writes.sink_slots.shape[1]]
                    buffer[writes.rows, :, writes.sink_slots] = first.transpose(1, 2)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, earlier: Sequence[Sequence[torch.Tensor]] = ()
    ) -> list[list[Part]]:
        """Writes new keys and values as `LayerState.write` does, without gradients."""
        writes, window = require(plan.writes), None
        new = self.open(key, value, plan)
        if writes.past_slots is not None:
            window = self.join_past(new_window(plan, new), writes, plan)
        self.keep(new, plan)
        prefix = self.prefix(writes)
        if writes.past_slots is None:
            first, stop = self.visibility.num_prefix, self.visibility.num_prefix + writes.filled
            if self.one_tensor and plan.view().is_step:  # one part, of which each key has its slot
                first, prefix = 0, None
            states = [self.buffers[name][:, :, first:stop] for name in self.names]
            window = states[0], states[-1]
            write = plan.section("write")
            if write is not None:
                window = require(join([window, (write.part(new[0]), write.part(new[1]))]))
        return parts_of_sections(plan, window, new, prefix, self.one_tensor, self.in_pairs)

    # The store of tokens to retrieve

    def store(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, block: slice, scores: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Stores a block of the new tokens' keys and values (B, K, T, D), which have no positions.

        Args:
            scores: the scores (B, K, T) by which a store that selects admits tokens.

        Returns:
            The numbers (R, S) of the tokens in the first S slots of the store, or (B, K, S) of one that selects.
        """
        view, length = plan.view(), require(plan.writes).length
        device = self.buffers[self.store_names[0]].device
        numbers = view.numbers[:, block].to(device)
        length = None if length is None else length - view.numbers.shape[1] + block.stop
        self.reserve_store(length)
        filled = self.store_limit if length is None else min(length, self.store_limit)
        if scores is not None:
            self.admit(key[:, :, block], value[:, :, block], scores[:, :, block], numbers, view.queries[:, block.start])
            return self.buffers["store_counts"][:, :, :filled] - 1
        slots = torch.where(numbers >= 0, ring_slot(numbers, self.store_limit), -1)
        rows = torch.arange(numbers.shape[0], device=device)[:, None]
        for name, states in zip(self.store_names, (key, value), strict=False):
            self.buffers[name][rows, :, slots] = states[:, :, block].transpose(1, 2).to(device)
        after = view.queries[:, block.stop - 1 : block.stop].to(device) + 1
        return held(torch.arange(filled, device=device), after, self.store_limit)

    def admit(
        self, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor, numbers: torch.Tensor, query: torch.Tensor
    ) -> None:
        """Writes tokens to a store that selects, in place of what no query from now on may retrieve.

        Args:
            key: (B, K, T, D).
            value: (B, K, T, D).
            scores: (B, K, T).
            numbers: the numbers (B, T) of the tokens; −1 is padding.
            query: the number (B,) of the first query from now on.
        """
        buffers = [self.buffers[name] for name in self.all_store_names]
        device, sinks = numbers.device, self.visibility.num_sinks
        stored = buffers[-1][:, :, :-1] - 1
        newest, start = numbers.amax(-1).maximum(query.to(device)), self.visibility.start(query.clamp(min=0)).to(device)
        priority = priorities(buffers[-2][:, :, :-1], stored, newest)
        free = free_slots(priority, stored, start, numbers.shape[1])
        is_kept = numbers >= sinks
        place = (is_kept.cumsum(-1) - 1).clamp(min=0)[:, None].expand_as(free)
        slots = torch.where(is_kept[:, None], free.gather(-1, place), -1)
        rows = torch.arange(numbers.shape[0], device=device)[:, None, None]
        heads = torch.arange(free.shape[1], device=device)[:, None]
        counts = (numbers + 1)[:, None].expand_as(slots)
        states = (key, counts) if self.one_tensor else (key, value)
        states = (*states[: len(self.store_names)], scores, counts)
        for buffer, new in zip(buffers, states, strict=True):
            buffer[rows, heads, slots] = new.to(device)

    def candidates(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        earlier: Sequence[Sequence[torch.Tensor]] = (),
        scores: torch.Tensor | None = None,
    ) -> Iterator[Candidates]:
        """Stores the new tokens block by block, and yields what each block may retrieve."""
        view = plan.view()
        for block in blocks(view.numbers.shape[1]):
            numbers = self.store(key, value, plan, block, scores)
            stored = [self.buffers[name] for name in self.store_names]
            queries = view.queries[:, block].to(numbers.device)
            admission = None if scores is None else self.buffers["store_scores"]
            yield Candidates(ALL, block, stored[0], stored[-1], numbers, queries, admission)

    def stored(self, numbers: torch.Tensor) -> Pair:
        """Returns copies of the keys and values (B, K, S, D) of the tokens with these numbers (B, S) in the store."""
        buffers = [self.buffers[name] for name in self.store_names]
        slots = ring_slot(numbers.clamp(min=0), self.store_limit).to(buffers[0].device)
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        copies = [buffer[rows, :, slots].transpose(1, 2).to(numbers.device) for buffer in buffers]
        return copies[0], copies[-1]

    def recall(self, tape: Tape) -> tuple[Pair, torch.Tensor, torch.Tensor | None]:
        """Returns copies of what the store held before a forward, which the tape of a call describes.

        They are keys and values (B, K, S, D), their numbers (B, S), and no scores; or numbers and scores (B, K, S) if
        the store selects. A negative number is no token.
        """
        before = require(tape.store_numbers)
        if not self.store_selects:
            return self.stored(before), before, None
        seen = require(tape.seen)
        *states, scores, counts = (
            self.buffers[name][:, :, :-1].to(seen.device, copy=True) for name in self.all_store_names
        )
        return (states[0], states[-1]), torch.where(counts <= seen[:, None, None], counts - 1, -1), scores

    # The batch, and files

    def slots(self, length: int) -> dict[str, int]:
        """Returns the number of used slots of each buffer by name after `length` columns were read."""
        window = self.visibility.num_prefix + min(length, self.limit or length)
        stored = dict.fromkeys(self.all_store_names if self.store_limit else (), min(length, self.store_limit))
        return dict.fromkeys(self.names, window) | stored

    def used(self, length: int) -> dict[str, torch.Tensor]:
        """Returns the used part of each buffer by name, (B, K, slots, …), after `length` columns were read."""
        return {name: self.buffers[name][:, :, :size] for name, size in self.slots(length).items()}

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch in this order, in the same buffers if their number does not change."""
        for name, buffer in self.buffers.items():
            chosen = buffer.index_select(0, rows.to(buffer.device))
            if chosen.shape != buffer.shape:
                self.buffers[name] = allocate(*chosen.shape, dtype=buffer.dtype, device=buffer.device)
            self.buffers[name].copy_(chosen)

    def clear(self, rows: torch.Tensor | None = None) -> None:
        """Sets the buffers of these rows of the batch, or of all rows, to zero, and keeps the room."""
        self.half_written = False
        for buffer in self.buffers.values():
            buffer[ALL if rows is None else rows.to(buffer.device)] = 0


class OlmemTape:
    """Joins the keys and values of all calls of one forward, so that gradients go back through them.

    The keys and values of earlier calls are arguments. If the forward goes on from a cache, the tape also reads copies
    of the keys and values in the cache's layer, and writes the new ones to it without gradients.

    Args:
        layer: the layer of the `OlmemCache` that the forward goes on from, or None.
    """

    def __init__(self, layer: OlmemCacheLayer | None = None):
        self.layer = layer

    def write(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, earlier: Sequence[Sequence[torch.Tensor]] = ()
    ) -> list[list[Part]]:
        """Joins new keys and values to those before them, as `LayerState.write` does."""
        rotations, new, prefix = plan.rotations, (plan.rotations.place(key), value), None
        before = [states_of(earlier)] if earlier else []
        if self.layer is not None and plan.writes is not None:
            past, prefix = self.read_layer(self.layer, key, value, plan)
            if past is not None:
                before.insert(0, past)
        joined = join(before)
        if joined is not None and rotations.key.length:  # the last keys have no positions yet
            first = joined[0].shape[2] - rotations.key.length
            rotated = rotations.key(joined[0][:, :, first:])
            joined = torch.cat((joined[0][:, :, :first], rotated), dim=2), joined[1]
        if prefix is not None and self.layer is not None and self.layer.one_tensor:
            prefix = rotations.prefix(prefix[0]), prefix[1]
        after_read = new_window(plan, new)
        window = join([each for each in (joined, after_read) if each is not None])
        return parts_of_sections(plan, window, new, self.prefix(plan, joined, new, prefix))

    @torch.no_grad()
    def read_layer(
        self, layer: OlmemCacheLayer, key: torch.Tensor, value: torch.Tensor, plan: Plan
    ) -> tuple[Pair | None, Pair | None]:
        """Returns copies of a layer's past and prefix in halves, and writes the new keys and values to the layer."""
        new = layer.open(key.detach(), value.detach(), plan)
        past, prefix = layer.past(require(plan.writes)), layer.prefix(require(plan.writes))
        if prefix is not None:
            prefix = prefix[0].clone(), prefix[1].clone()
        layer.keep(new, plan)
        if layer.in_pairs:
            past, prefix = (pair and (to_halves(pair[0]), to_halves(pair[1])) for pair in (past, prefix))
        return past, prefix

    def prefix(self, plan: Plan, joined: Pair | None, new: Pair, stored: Pair | None) -> Pair | None:
        """Returns the keys and values (B, K, P, D) of memory and sinks, or None if there are none.

        Args:
            joined: the keys and values before the call.
            new: those of the call, which may hold new memory and sinks.
            stored: the prefix in the cache.
        """
        visibility, tape = plan.visibility, require(plan.tape)
        count, read, tokens = visibility.num_memory, plan.section("read"), plan.section("token")
        found = []
        for index in range(2):
            memory = None if stored is None else stored[index][:, :, :count]
            sinks = None if stored is None else stored[index][:, :, count:]
            if read is not None:
                new_memory = read.part(new[index])
                if memory is None or plan.begins is None:
                    memory = new_memory
                else:
                    memory = torch.where(plan.begins[:, None, None, None], new_memory, memory)
            if tape.sinks is not None and tokens is not None:
                own = tokens.part(new[index])
                own = own if joined is None else torch.cat((joined[index], own), dim=2)
                has_sink, column = tape.sinks
                gathered = own.gather(2, column[:, None, :, None].expand(*own.shape[:2], -1, own.shape[3]))
                sinks = gathered if sinks is None else torch.where(has_sink[:, None, :, None], gathered, sinks)
            found.append([states for states in (memory, sinks) if states is not None and states.shape[2]])
        if not found[0]:
            return None
        return torch.cat(found[0], dim=2), torch.cat(found[1], dim=2)

    def candidates(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        earlier: Sequence[Sequence[torch.Tensor]] = (),
        scores: torch.Tensor | None = None,
    ) -> Iterator[Candidates]:
        """Yields what the new tokens may retrieve, as one block, or as one for each packed document."""
        view, tape = plan.view(), require(plan.tape)
        if view.documents is not None:
            for row, documents in enumerate(view.documents):
                for start, stop in documents:
                    rows, part = slice(row, row + 1), slice(start, stop)
                    numbers = view.numbers[rows, part]
                    own = None if scores is None else scores[rows, :, part]
                    yield Candidates(rows, part, key[rows, :, part], value[rows, :, part], numbers, numbers, own)
            return
        pairs = [(key, value)]
        if earlier:
            pairs.insert(0, states_of(earlier))
        numbers = tape.own_numbers
        all_scores = [] if scores is None else [*(each[2] for each in earlier), scores]
        if self.layer is not None and plan.writes is not None:
            with torch.no_grad():
                if tape.store_numbers is not None and tape.store_numbers.shape[1]:
                    pair, old, old_scores = self.layer.recall(tape)
                    pairs.insert(0, pair)
                    own = numbers.expand(old.shape[0], -1)
                    own = own if old.dim() == 2 else own[:, None].expand(*old.shape[:2], -1)
                    numbers = torch.cat((old, own), dim=-1)
                    all_scores[:0] = [] if old_scores is None else [old_scores]
                new_scores = None if scores is None else scores.detach()
                for block in blocks(key.shape[2]):
                    self.layer.store(key.detach(), value.detach(), plan, block, new_scores)
        keys, values = require(join(pairs))
        scores = torch.cat(all_scores, dim=-1) if all_scores else None
        yield Candidates(ALL, ALL, keys, values, numbers, view.queries, scores)


def parts_of_sections(
    plan: Plan, window: Pair | None, new: Pair, prefix: Pair | None, is_bare: bool = False, in_pairs: bool = False
) -> list[list[Part]]:
    """Returns the parts that each section of a plan sees, which are the window, and before it the prefix if it is seen.

    Args:
        window: the keys and values (B, K, S, D) of tokens, those before the call first, and of write tokens at last.
        new: the new keys and values (B, K, C, D).
        prefix: the keys and values (B, K, P, D) of memory and sinks.
        is_bare: whether all these keys have no positions yet.
        in_pairs: whether they are laid out in pairs.
    """
    sections = []
    for section in plan.sections:
        if section.view.role == "read":
            seen = section.part(new[0]), section.part(new[1])
        else:  # tokens do not see the write tokens after them
            seen, count = require(window), section.view.key_numbers.shape[1]
            if seen[0].shape[2] > count and not section.view.is_step:
                seen = seen[0][:, :, :count], seen[1][:, :, :count]
        parts = [Part(seen[0], seen[1], False, is_bare, in_pairs)]
        if section.view.prefix and prefix is not None:
            parts.insert(0, Part(prefix[0], prefix[1], True, is_bare, in_pairs))
        sections.append(parts)
    return sections


def new_window(plan: Plan, new: Pair) -> Pair | None:
    """Returns those of the new keys and values (B, K, C, D) that are not of read tokens, or None if there are none."""
    first = 0 if plan.section("read") is None else plan.visibility.num_memory
    if first == new[0].shape[2]:
        return None
    return (new[0][:, :, first:], new[1][:, :, first:]) if first else new


def require(value: Held | None) -> Held:
    """Returns a value that is not None in the plan of such a call."""
    assert value is not None
    return value


def last_columns(states: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the last columns of states (B, K, C, D)."""
    return states if states.shape[2] == count else states[:, :, states.shape[2] - count :]


def states_of(earlier: Sequence[Sequence[torch.Tensor]]) -> Pair:
    """Returns the keys and values (B, K, S, D) of earlier calls as one tensor each."""
    return torch.cat([each[0] for each in earlier], dim=2), torch.cat([each[1] for each in earlier], dim=2)


def join(pairs: Sequence[Pair]) -> Pair | None:
    """Returns the concatenation of keys and values (B, K, S, D), or None if there are none."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return torch.cat([pair[0] for pair in pairs], dim=2), torch.cat([pair[1] for pair in pairs], dim=2)


def blocks(length: int) -> list[slice]:
    """Returns the blocks in which that many tokens are stored."""
    return [slice(start, min(start + STORE_BLOCK, length)) for start in range(0, length, STORE_BLOCK)]


def grown(old: torch.Tensor, slots: int) -> torch.Tensor:
    """Returns a larger buffer (B, K, slots, …) with the content of an old one, except its slot for unwanted tokens."""
    new = allocate(*old.shape[:2], slots, *old.shape[3:], dtype=old.dtype, device=old.device)
    new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
    return new


__all__ = ["OlmemCacheLayer", "OlmemTape"]
