# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What one layer of an `OlmemCache` remembers: its buffers, and how they are written and read.

Shapes: B batch, K key/value heads, T new tokens, S keys, D head dim, M memory slots, Z sinks. Buffers are
(B, K, slots, D):

    | M + Z slots of memory and sinks | a ring of a window's span, or a row that grows | one slot for what is not kept |

Where values are the keys (`shared_projections`), one buffer holds both, never rotated, the prefix as any other.

A window's key lies rotated at its own place: RoPE knows differences only, so neither the size of the number nor the
order in the ring matters. The distance of memory and sinks stops growing: they are also kept as they were before.

What retrieval looks up is a ring of its own, of keys without positions and values. A token enters it as it is read, and
is looked up once its window has let go of it.
"""

import torch
from transformers.cache_utils import CacheLayerMixin

from .context_olmem import Context, Sight, held, ring_slot

GROWTH = 256  # tokens at a time
STORE_BLOCK = 128  # tokens that may enter a store before the first of them looks something up
STORE = ("store_keys", "store_values")


def allocate(*shape: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros that may be written in place in and out of `torch.inference_mode`."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class OlmemCacheLayer(CacheLayerMixin):
    """Keys and values of one layer of an `OlmemCache`, and of no other cache: the counters are there, and which token
    goes where, and which are read, is the `Sight`'s to say."""

    def __init__(
        self,
        context: Context,
        max_length: int | None,
        one_tensor: bool = False,
        store_capacity: int = 0,
        store_device: str | None = None,
    ):
        self.context = context
        self.one_tensor = one_tensor  # values are the keys
        self.is_sliding = context.span is not None
        self.limit = context.span or max_length  # tokens held at most; None grows
        self.at_once = max_length is not None
        self.room = min(self.limit, max_length or self.limit) if self.limit else None  # tokens that ever find a place
        # Tokens in the store: those to look up, those still in the window, and a block that may enter at a time.
        self.store_limit = store_capacity and store_capacity + (context.span or 0) + STORE_BLOCK - 1
        self.store_device = store_device
        # Where a memory or a store is read is for the host to know.
        self.is_compileable = self.limit is not None and not self.store_limit and not context.num_memory
        self.is_initialized = False
        # "keys", "values", and "prefix" if there is one: keys, not rotated; of one tensor, "keys" alone. And "store_…".
        self.buffers: dict[str, torch.Tensor] = {}
        self.capacity = 0
        self.length: int | None = 0  # columns read; None where only the device knows

    @property
    def names(self) -> tuple[str, str]:
        """The buffers of keys and values."""
        return "keys", "keys" if self.one_tensor else "values"

    def held(self, name: str) -> torch.Tensor:
        """(B, K, S, D): what a buffer holds of the window; without padding, all that is read of it."""
        first, length = self.context.num_prefix, self.capacity if self.length is None else self.length
        return self.buffers[name][:, :, first : first + min(length, self.limit or length)]

    @property
    def keys(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys of the window, rotated at their places, or as they are if they are values too; once it is full, the
        newest over the oldest."""
        return self.held("keys") if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values of the window, in the order of `keys`."""
        return self.held(self.names[1]) if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        prefix = self.context.num_prefix
        states = {"keys": key_states}
        if not self.one_tensor:
            states |= {"values": value_states} | ({"prefix": key_states} if prefix else {})
        if self.store_limit:
            states |= dict(zip(STORE[: 1 if self.one_tensor else 2], (key_states, value_states), strict=False))
        for name, like in states.items():
            shape = (*like.shape[:2], 1 if name in STORE else prefix + 1, like.shape[3])
            device = self.store_device if name in STORE and self.store_device else like.device
            self.buffers[name] = allocate(*shape, dtype=like.dtype, device=device)
        self.is_initialized = True

    def reserve(self, length: int | None) -> None:
        """Makes room for that many tokens, at most for those that the layer ever holds. Where a step may be compiled
        (`length` is None then) all room is made at once, for its shapes to stay; on a CPU a short text takes little."""
        if length is None or self.at_once or self.buffers["keys"].device.type != "cpu":
            length = self.room or length or 0
        elif self.limit is not None:
            length = min(length, self.limit)
        if length <= self.capacity:
            return
        length = min(-(-length // GROWTH) * GROWTH, self.limit or length + GROWTH)
        for name in set(self.names):
            self.buffers[name] = grown(self.buffers[name], self.context.num_prefix + length + 1)
        self.capacity = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sight: Sight | None = None, **_
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps new keys (B, K, T, D), rotated unless they are the values, and values, and returns those that `sight`
        numbers, (B, K, [M + Z +] S, D): with `sight.in_place` a part of the buffers, of a step the prefix included."""
        if sight is None:
            raise ValueError(
                "`past_key_values` is an OlmemCache, which serves Olmem models only (got an update of another model); "
                "leave it out, or pass a cache of Transformers."
            )
        self.prepare(key_states, value_states)
        if sight.memory is None:
            self.reserve(sight.length)
            self.length = sight.length
        states = {"keys": key_states} if self.one_tensor else {"keys": key_states, "values": value_states}
        found = {}
        for name, new in states.items():
            buffer = self.buffers[name]
            if sight.past_slots is not None and sight.past_slots.shape[1]:
                past = buffer[sight.rows, :, sight.past_slots].transpose(1, 2)
                found[name] = torch.cat((past, new), dim=2)
            if sight.slots is not None:
                buffer[sight.rows, :, sight.slots] = new.detach().transpose(1, 2)
            if sight.in_place:
                prefix = self.context.num_prefix
                found[name] = buffer[:, :, 0 if sight.is_step else prefix : prefix + sight.key_numbers.shape[1]]
        keys, values = (found.get(name, states[name]) for name in self.names)
        return keys, values

    def prepare(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Has buffers for such keys (B, K, T, D) and values, where they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        device = key_states.device
        if self.buffers["keys"].device != device:  # a cache from a file, a model on several devices
            for name, buffer in self.buffers.items():
                self.buffers[name] = buffer.to(self.store_device or device if name in STORE else device)

    @property
    def prefix_names(self) -> tuple[str, ...]:
        """The buffers of the prefix: of keys, not rotated, and of values; of one tensor, it alone."""
        return ("keys",) if self.one_tensor else ("prefix", "values")

    @property
    def prefix_buffers(self) -> tuple[torch.Tensor, ...]:
        """What they hold of it, (B, K, M + Z, D)."""
        return tuple(self.buffers[name][:, :, : self.context.num_prefix] for name in self.prefix_names)

    def keep_memory(self, key_states: torch.Tensor, value_states: torch.Tensor, sight: Sight) -> None:
        """Puts keys and values (B, K, M, D) of memory tokens, not rotated, in their slots, of the rows of `sight`."""
        self.prepare(key_states, value_states)
        for place, states in zip(self.prefix_buffers, (key_states, value_states), strict=False):
            rows = slice(None) if sight.chosen is None else sight.chosen
            place[rows, :, : self.context.num_memory] = states.detach()

    def update_prefix(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sight: Sight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps those of new keys, not rotated, and values that are sinks, and returns all memory's and sinks', keys
        and values (B, K, M + Z, D)."""
        stored = self.prefix_buffers
        if sight.chosen is not None:
            stored = tuple(place[sight.chosen] for place in stored)
        if sight.fills_sinks and sight.in_place:
            for name, states in zip(self.prefix_names, (key_states, value_states), strict=False):
                self.buffers[name][sight.rows, :, sight.sink_slots] = states.transpose(1, 2)
        elif sight.fills_sinks:
            memory = self.context.num_memory
            sinks = stored[0][:, :, memory:], stored[-1][:, :, memory:]
            new = gather_sinks(key_states, value_states, sight, sinks)
            before = [place[:, :, :memory] for place in stored]
            for place, states in zip(sinks, new, strict=False):
                place.copy_(states.detach())
            return torch.cat((before[0], new[0]), dim=2), torch.cat((before[-1], new[1]), dim=2)
        if torch.is_grad_enabled():  # what gradients go back through must not be written again
            stored = [place.clone() for place in stored]
        return stored[0], stored[-1]

    # What retrieval looks up

    def store(self, key_states: torch.Tensor, value_states: torch.Tensor, sight: Sight, new: slice) -> torch.Tensor:
        """Takes in some of the new tokens, a block at most, their keys (B, K, T, D) not rotated. Returns the numbers
        (R, S) of the store's first S tokens."""
        numbers = sight.numbers[:, new].to(self.buffers[STORE[0]].device)
        length = (sight.length or 0) - sight.numbers.shape[1] + new.stop
        self.reserve_store(length)
        slots = torch.where(numbers >= 0, ring_slot(numbers, self.store_limit), -1)
        rows = torch.arange(len(numbers), device=slots.device)[:, None]
        for name, states in zip(self.store_names, (key_states, value_states), strict=False):
            part = states[:, :, new].detach().transpose(1, 2)
            self.buffers[name][rows, :, slots] = part.to(slots.device)
        slot = torch.arange(min(length, self.store_limit), device=slots.device)
        after = sight.queries[:, new.stop - 1 : new.stop].to(slots.device) + 1
        return held(slot, after, self.store_limit)

    @property
    def store_names(self) -> tuple[str, ...]:
        return STORE[:1] if self.one_tensor else STORE

    def reserve_store(self, length: int) -> None:
        """Makes room for that many tokens, twice as many as there was, so that a long stream is seldom copied."""
        room = self.buffers[STORE[0]].shape[2] - 1
        if room < min(length, self.store_limit):
            room = min(max(2 * room, length, GROWTH), self.store_limit)
            for name in self.store_names:
                self.buffers[name] = grown(self.buffers[name], room + 1)

    def used(self, length: int) -> dict[str, torch.Tensor]:
        """What the buffers hold after `length` columns: keys and values (B, K, M + Z + S, D), the prefix (B, K, M + Z,
        D), and the store (B, K, S, D)."""
        prefix, window = self.context.num_prefix, min(length, self.limit or length)
        slots = {"prefix": prefix} | dict.fromkeys(STORE, min(length, self.store_limit))
        return {name: buffer[:, :, : slots.get(name, prefix + window)] for name, buffer in self.buffers.items()}

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch, in their order; in place while there are as many as before."""
        for name, buffer in self.buffers.items():
            chosen = buffer.index_select(0, rows.to(buffer.device))
            if chosen.shape != buffer.shape:
                self.buffers[name] = allocate(*chosen.shape, dtype=buffer.dtype, device=buffer.device)
            self.buffers[name].copy_(chosen)

    # What Transformers asks of a layer; the counters are the cache's.

    def get_seq_length(self) -> int:
        raise NotImplementedError("an OlmemCache counts, not its layers")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("an OlmemCache counts, not its layers")

    def get_max_length(self) -> int:
        return -1 if self.limit is None else self.limit


def grown(old: torch.Tensor, slots: int) -> torch.Tensor:
    """A buffer (B, K, slots, D) of more slots, the last of which is for what is not kept."""
    new = allocate(*old.shape[:2], slots, old.shape[3], dtype=old.dtype, device=old.device)
    new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(new)
    return new


def gather_sinks(
    keys: torch.Tensor,
    values: torch.Tensor,
    sight: Sight,
    stored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, K, Z, D) of the sinks, taken from new ones (B, K, T, D), or else from those stored."""
    found, column = sight.new_sinks()
    index = column[:, None, :, None].expand(*keys.shape[:2], -1, keys.shape[3])
    new = keys.gather(2, index), values.gather(2, index)
    if stored is None:
        return new
    found = found[:, None, :, None]
    return torch.where(found, new[0], stored[0]), torch.where(found, new[1], stored[1])


__all__ = ["OlmemCacheLayer"]
