# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""How a forward call is planned: who sees whom, where keys go, at which positions, and by which backend.

Every decision about a call is made here, once for all layers of one kind, on the host.

Shapes: R rows, which are the batch's or one that stands for all; C columns of a call, T of its tokens; S keys; M
memory slots, P slots of the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .configuration_olmem import OlmemConfig
from .contracts_olmem import Backend, LayerKind, Needs, Plan, Rotations, Section, Tape, Writes, choose
from .positions_olmem import OlmemRotaryEmbedding, Rotation
from .rules_olmem import BY_SLOT, ROTATING
from .view_olmem import View, find_sinks, inner_padding
from .visibility_olmem import Visibility, held, last_numbers, ring_slot


@dataclass
class Call:
    """Describes one pass through the layers: memory that is read, tokens, and memory that is written."""

    numbers: torch.Tensor  # (R, T) of the tokens; −1 is padding; (R, 0) where memory is only written
    padded: bool = False
    documents: list[list[tuple[int, int]]] | None = None
    position_ids: torch.Tensor | None = None  # (R, T) the caller's own places in the stream
    reads: bool = False  # memory tokens come before the tokens
    writes: bool = False  # memory tokens come after them
    begins: torch.Tensor | None = None  # (R,) the rows for which memory is read; None is all
    written_after: torch.Tensor | None = None  # (R,) how many tokens a row has read when memory is written
    chosen: torch.Tensor | None = None  # (R,) the rows of the batch that take part; None is all
    differentiable: bool = False
    # With an `OlmemCache`:
    seen: torch.Tensor | None = None  # (B,) real tokens read before this call
    before: int | None = 0  # the most that a row may have read; None where only the device knows
    least_seen: int | None = None  # the least that a row has read, if the host knows
    max_length: int | None = None  # tokens for which layers that grow have room
    bare: bool = False  # keys are values too, and kept without positions
    # Of earlier calls of the same forward, where gradients are wanted:
    seen_first: torch.Tensor | None = None  # (B,) real tokens read before the forward, with an `OlmemCache`
    before_first: int = 0  # the most that a row may have read before the forward
    earlier: dict[LayerKind, list[torch.Tensor]] = field(default_factory=dict)  # numbers (R, T) of each
    loose: bool = False  # some of them were padded
    carries: bool = False  # a call of the same forward comes after

    @property
    def has_cache(self) -> bool:
        """Tells whether the call goes on from an `OlmemCache`."""
        return self.seen is not None

    @property
    def length_after(self) -> int | None:
        """Returns the most tokens that a row may have read after this call, None where only the device knows."""
        return None if self.before is None else self.before + self.numbers.shape[1]


def layer_kinds(config: OlmemConfig) -> list[LayerKind]:
    """Returns the kind of each layer."""
    kinds = zip(config.layer_types, config.layer_position_embeddings, strict=False)  # fewer where a model leaves early
    return [LayerKind(*kind, index in config.retrieval_layers) for index, kind in enumerate(kinds)]


class Planner:
    """Makes the plans of forward calls of one model.

    Args:
        config: the model's configuration.
        rotary: its angles.
        backends: ways to compute attention, in the order in which they are asked.
        plain: whether `attn_implementation="eager"` asks for plain operations.
        weights: whether attention weights are wanted too.
    """

    def __init__(
        self,
        config: OlmemConfig,
        rotary: OlmemRotaryEmbedding,
        backends: Sequence[Backend],
        plain: bool = False,
        weights: bool = False,
    ):
        self.config, self.rotary, self.backends = config, rotary, backends
        self.plain, self.weights = plain, weights and plain
        clips = config.clip_qkv is not None and config.clip_qkv_stage == "rotary"
        self.clip = float(config.clip_qkv) if clips and config.clip_qkv is not None else None

    def plans(self, call: Call) -> dict[LayerKind, Plan]:
        """Makes the plan of each kind of layer for one call."""
        plans: dict[LayerKind, Plan] = {}
        frames: dict[tuple[str, bool], Frame] = {}
        rotations: dict[tuple[str, bool, bool], tuple[Rotations, list[Rotations]]] = {}
        for kind in dict.fromkeys(layer_kinds(self.config)):
            # Layers that retrieve differ in what came before, which only a tape joins.
            place = kind.layer_type, kind.retrieves and call.differentiable
            if place not in frames:
                visibility = Visibility.of(self.config, kind.layer_type)
                frames[place] = Frame(visibility, call, call.earlier.get(kind, []), self.config.retrieval_capacity)
            turned = *place, kind.position_embedding in ROTATING
            if turned not in rotations:
                rotations[turned] = self.rotate(kind.layer_type, turned[-1], frames[place], call)
            plans[kind] = self.plan(kind, frames[place], call, *rotations[turned])
        return plans

    def plan(
        self, kind: LayerKind, frame: "Frame", call: Call, rotations: Rotations, of_sections: list[Rotations]
    ) -> Plan:
        """Puts a plan together."""
        needs = Needs(self.plain, self.weights, kind.position_embedding in BY_SLOT, call.bare)
        sections = [
            Section(columns, view, turned, needs, choose(self.backends, view, needs))
            for (columns, view), turned in zip(frame.sections, of_sections, strict=True)
        ]
        has_tokens = call.numbers.shape[1] > 0
        return Plan(
            frame.visibility,
            sections,
            rotations,
            frame.writes,
            frame.tape,
            retrieves=kind.retrieves and has_tokens,
            returns_weights=self.weights,
            carries=call.carries,
        )

    def rotate(self, layer_type: str, rotates: bool, frame: "Frame", call: Call) -> tuple[Rotations, list[Rotations]]:
        """Makes the rotations of a call's columns, and those of each of its sections."""
        clip = Rotation(clip=self.clip)
        if not rotates:
            whole = Rotations.of(clip)
            return whole, [whole for _ in frame.sections]
        in_pairs, visibility = call.bare and not call.differentiable, frame.visibility

        def at(positions: torch.Tensor, below: int | None = None) -> Rotation:
            if in_pairs:
                return Rotation(phases=self.rotary.phases(positions, layer_type, below), clip=self.clip)
            return Rotation(*self.rotary(positions, positions, layer_type, below), clip=self.clip)

        length = call.length_after
        below = None if length is None else length + 2 * visibility.num_memory + 1
        span = visibility.span or length
        slots_below = None if span is None else visibility.num_prefix + span + visibility.num_memory
        views = [view for _, view in frame.sections]
        places = [view.places for view in views]
        if call.position_ids is not None and not visibility.num_prefix:  # whose slots are counted from 0
            places, below = [call.position_ids], None
        rows = max(len(each) for each in places)
        joined = torch.cat([each.expand(rows, -1) for each in places], dim=1) if len(places) > 1 else places[0]
        whole = Rotations.of(at(joined.clamp(min=0), below))
        if any(view.prefix for view in views) or (in_pairs and views[-1].is_step):
            slots = [view.query_slots for view in views]
            joined = torch.cat([each.expand(rows, -1) for each in slots], dim=1) if len(slots) > 1 else slots[0]
            whole.slot = at(joined, slots_below)
        if call.bare:
            whole.prefix = at(torch.arange(visibility.num_prefix, device=joined.device)[None], visibility.num_prefix)
        if frame.bare_numbers is not None and frame.bare_numbers.shape[1]:
            whole.key = at((visibility.num_memory + frame.bare_numbers).clamp(min=0), below)
        sections = [whole.part(columns) for columns, _ in frame.sections]
        for view, rotations in zip(views, sections, strict=True):
            if in_pairs and view.is_step:
                phases = self.step_phases(view, layer_type, slots_below)
                rotations.step = Rotation(phases=phases)
            elif in_pairs:
                rotations.key = at(view.key_places.clamp(min=0), below)
        return whole, sections

    def step_phases(self, view: View, layer_type: str, below: int | None) -> torch.Tensor:
        """Returns phases (R, P + S, D/2, 2) of a step's keys at their slots, which stay small in a window."""
        if view.visibility.span is None or below is None:
            return self.rotary.phases(view.step_slots, layer_type, below)
        return self.rotary.phases_of_slots(view.step_slots, layer_type, below)


class Frame:
    """Holds what layers of one type share in a call, whatever their positions: sections, writes and tape."""

    def __init__(self, visibility: Visibility, call: Call, earlier: Sequence[torch.Tensor], capacity: int):
        self.visibility = visibility
        self.writes: Writes | None = None
        self.tape: Tape | None = None
        self.bare_numbers: torch.Tensor | None = None  # (R, S) of keys without positions before the new ones, on a tape
        self.sections: list[tuple[slice, View]] = []
        numbers, count = call.numbers, visibility.num_memory
        first = 0
        if call.reads:
            memory = torch.arange(count, device=numbers.device)[None]
            self.sections.append((slice(0, count), View(visibility, memory, memory, role="read")))
            first = count
        length = numbers.shape[1]
        if length:
            if call.differentiable or not call.has_cache:
                view = self.on_tape(call, earlier, visibility.store_size(capacity))
            else:
                view = self.in_cache(call)
            self.sections.append((slice(first, first + length), view))
            first += length
        if call.writes:
            self.sections.append((slice(first, first + count), self.write_view(call)))
        if self.writes is not None:
            self.writes.begins, self.writes.chosen = call.begins, call.chosen
        if self.tape is not None:
            self.tape.begins = call.begins

    def limit(self, call: Call) -> int | None:
        """Returns how many tokens a layer of a cache holds, None where it grows."""
        return self.visibility.span or call.max_length

    def prefix_may_show(self, call: Call) -> bool:
        """Tells whether a token of the call may see memory, or sinks before its window."""
        length = call.length_after
        return self.visibility.num_memory > 0 or (
            self.visibility.num_sinks > 0 and (length is None or self.visibility.lets_go(length))
        )

    def write_slots(self, call: Call, past_numbers: torch.Tensor | None, filled: int) -> Writes:
        """States where the tokens of a call go in a cache's layer, and where those before them lie."""
        assert call.seen is not None
        numbers, prefix, limit = call.numbers, self.visibility.num_prefix, self.limit(call)
        kept, sinks = numbers, None
        if limit is not None and not call.padded and numbers.shape[1] > limit:
            kept = numbers[:, numbers.shape[1] - limit :]
        fits = kept >= 0
        if limit is not None and call.padded:
            fits &= kept >= call.seen[:, None] + (numbers >= 0).sum(-1, keepdim=True) - limit
        if self.visibility.num_sinks and (call.least_seen is None or call.least_seen < self.visibility.num_sinks):
            some = numbers if call.padded else numbers[:, : self.visibility.num_sinks]
            is_sink = (some >= 0) & (some < self.visibility.num_sinks)
            sinks = torch.where(is_sink, self.visibility.num_memory + some, -1)
        rows = torch.arange(len(call.seen), device=numbers.device) if call.chosen is None else call.chosen
        return Writes(
            rows[:, None],
            torch.where(fits, prefix + ring_slot(kept, limit), -1),
            sinks,
            None if past_numbers is None else prefix + ring_slot(past_numbers.clamp(min=0), limit),
            filled,
            call.length_after,
        )

    def in_cache(self, call: Call) -> View:
        """Views tokens that go on from a cache without gradients, in place where keys need not be copied."""
        visibility, numbers, seen = self.visibility, call.numbers, call.seen
        assert seen is not None
        length, limit, before = numbers.shape[1], self.limit(call), call.before
        prefix = self.prefix_may_show(call)
        if (visibility.span is None and length > 1) or (length == 1 and not call.writes):
            prefix = prefix or (call.bare and length == 1 and visibility.num_prefix > 0)
            sizes = [size for size in (limit, call.length_after) if size is not None]
            filled = min(sizes)
            after = seen[:, None] + (numbers >= 0).sum(-1, keepdim=True)
            slot = torch.arange(filled, device=numbers.device)
            if limit is None or visibility.span is None:
                key_numbers = torch.where(slot < after, slot, -1)
            else:
                key_numbers = held(slot, after, limit)
            self.writes = self.write_slots(call, None, filled)
            causal = not call.padded and before == 0 and visibility.span is None
            return View(visibility, numbers, key_numbers, "token", call.padded, prefix, causal, True, seen=seen)
        past = last_numbers(seen, before, self.limit(call) if visibility.span is None else visibility.span - 1)
        self.writes = self.write_slots(call, past, 0)
        return View(
            visibility,
            numbers,
            torch.cat((past, numbers), dim=1),
            padded=call.padded,
            prefix=prefix,
            causal=not call.padded and past.shape[1] == 0 and (visibility.span is None or length < visibility.span),
            slack=inner_padding(numbers, past.shape[1] > 0) if call.padded else 0,
            seen=seen,
        )

    def on_tape(self, call: Call, earlier: Sequence[torch.Tensor], store_limit: int) -> View:
        """Views tokens whose keys are joined to those before: all there is, or with gradients."""
        visibility, numbers, length = self.visibility, call.numbers, call.numbers.shape[1]
        span, own = visibility.span, numbers
        past = numbers.new_empty(len(numbers), 0)
        store = None
        if call.seen is not None and call.seen_first is not None:
            past = last_numbers(call.seen_first, call.before_first, None if span is None else span - 1)
            if span is not None:  # what earlier calls have written over is out of every window
                past = torch.where(past > call.seen[:, None] - span, past, -1)
            store = last_numbers(call.seen_first, call.before_first, store_limit)
            store = torch.where(store >= call.seen[:, None] - store_limit, store, -1)
            self.writes = self.write_slots(call, past, 0)
        rows = max(len(past), len(own), *(len(each) for each in earlier)) if earlier else len(own)
        if earlier:
            own = torch.cat([each.expand(rows, -1) for each in (*earlier, numbers)], dim=1)
        keys = torch.cat((past.expand(rows, -1), own.expand(rows, -1)), dim=1) if past.shape[1] else own
        before = own[:, : own.shape[1] - length]
        self.bare_numbers = torch.cat((past, before), dim=1) if call.bare else before
        count = keys.shape[1] - length
        slack = inner_padding(numbers, count > 0) if call.padded else 0
        sinks = find_sinks(keys, visibility.num_sinks) if visibility.num_sinks else None
        self.tape = Tape(past, own, sinks, store)
        return View(
            visibility,
            numbers,
            keys,
            padded=call.padded,
            prefix=self.prefix_may_show(call),
            causal=not call.padded and count == 0 and (span is None or length < span),
            slack=slack + (count if earlier and (call.padded or call.loose) else 0),
            seen=call.seen,
            documents=call.documents,
        )

    def write_view(self, call: Call) -> View:
        """Views memory tokens that are written, which see what the last token sees, and one another."""
        assert call.written_after is not None
        after, visibility = call.written_after, self.visibility
        numbers = after[:, None] + torch.arange(visibility.num_memory, device=after.device)
        if self.sections and self.sections[-1][1].role == "token":
            past = self.sections[-1][1].key_numbers
        else:  # of a cache
            past = last_numbers(after, call.before, self.limit(call))
            self.writes = self.write_slots(call, past, 0)
            if call.differentiable:
                self.tape = Tape(past, call.numbers)
                self.bare_numbers = past if call.bare else None
        rows = max(len(past), len(numbers))
        keys = torch.cat((past.expand(rows, -1), numbers.expand(rows, -1)), dim=1)
        return View(visibility, numbers, keys, role="write", prefix=True, seen=call.seen)


__all__ = ["Call", "Planner", "layer_kinds"]
