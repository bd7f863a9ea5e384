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
from .inputs_olmem import Tokens
from .positions_olmem import OlmemRotaryEmbedding, Rotation, rotary_clip
from .rules_olmem import BY_SLOT, ROTATING
from .view_olmem import View, find_sinks, inner_padding
from .visibility_olmem import Visibility, held, last_numbers, ring_slot


@dataclass
class Past:
    """States what an `OlmemCache` has read before a call."""

    seen: torch.Tensor  # (B,) real tokens of each row
    least: int | None = None  # the fewest real tokens of a row; None where the host does not know
    max_length: int | None = None  # tokens for which layers that grow have room
    one_tensor: bool = False  # keys are the values too, and are kept without positions


@dataclass
class Earlier:
    """States what came before a call of a forward through which gradients go back."""

    numbers: dict[LayerKind, list[torch.Tensor]] = field(default_factory=dict)  # (R, T) of the forward's earlier calls
    padded: bool = False  # some of these calls had padding
    seen: torch.Tensor | None = None  # (B,) real tokens that an `OlmemCache` had read before the forward
    before: int = 0  # the most tokens, padding included, that a row had read before the forward


@dataclass
class Call:
    """Describes one pass through the layers: memory that is read, tokens, and memory that is written.

    A call with gradients has `earlier`, and a call that goes on from an `OlmemCache` has `past`.
    """

    tokens: Tokens  # none of them, (R, 0), where memory is only written
    before: int | None = 0  # the most tokens, padding included, that a row has read; None where only the device knows
    past: Past | None = None
    earlier: Earlier | None = None
    reads: bool = False  # memory tokens come before the tokens
    begins: torch.Tensor | None = None  # (R,) which rows begin a segment, and so read memory; None is all
    written_after: torch.Tensor | None = None  # (R,) tokens that a row has read when its memory is written, if it is
    chosen: torch.Tensor | None = None  # (R,) the rows of the batch that take part; None is all
    carries: bool = False  # a later call of the same forward needs the new keys and values
    inner: int | None = field(init=False, default=None)  # of `inner_padding`

    @property
    def numbers(self) -> torch.Tensor:
        """Returns the numbers (R, T) of the tokens; −1 is padding."""
        return self.tokens.numbers

    @property
    def writes(self) -> bool:
        """Tells whether memory tokens come after the tokens."""
        return self.written_after is not None

    @property
    def one_tensor(self) -> bool:
        """Tells whether the call goes on from a cache whose keys are the values too, and have no positions."""
        return self.past is not None and self.past.one_tensor

    @property
    def length_after(self) -> int | None:
        """Returns the most tokens that a row may have read after this call, None where only the device knows."""
        return None if self.before is None else self.before + self.numbers.shape[1]

    def inner_padding(self) -> int:
        """Returns the most columns of padding between two real tokens of a row, for which the host waits once."""
        if self.inner is None:
            self.inner = inner_padding(self.numbers, self.before != 0) if self.tokens.padded else 0
        return self.inner


def layer_kinds(config: OlmemConfig) -> list[LayerKind]:
    """Returns the kind of each layer."""
    kinds = zip(config.layer_types, config.layer_position_embeddings, strict=False)  # fewer where a model leaves early
    retrieval_layers = config.retrieval_layers
    return [LayerKind(*kind, index in retrieval_layers) for index, kind in enumerate(kinds)]


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
        self.kinds = layer_kinds(config)
        self.clip = rotary_clip(config)

    def plans(self, call: Call) -> dict[LayerKind, Plan]:
        """Makes the plan of each kind of layer for one call."""
        plans: dict[LayerKind, Plan] = {}
        frames: dict[tuple[str, bool], Frame] = {}
        rotations: dict[tuple[str, bool, bool], tuple[Rotations, list[Rotations]]] = {}
        for kind in dict.fromkeys(self.kinds):
            # Layers that retrieve need more of what came before, where a tape joins it.
            frame_key = kind.layer_type, kind.retrieves and call.earlier is not None
            if frame_key not in frames:
                visibility = Visibility.of(self.config, kind.layer_type)
                earlier = call.earlier.numbers.get(kind, []) if call.earlier is not None else []
                frames[frame_key] = Frame(visibility, call, earlier, self.config.retrieval_capacity)
            rotates = kind.position_embedding in ROTATING
            if (*frame_key, rotates) not in rotations:
                rotations[*frame_key, rotates] = self.rotate(kind.layer_type, rotates, frames[frame_key], call)
            plans[kind] = self.plan(kind, frames[frame_key], call, *rotations[*frame_key, rotates])
        return plans

    def plan(
        self, kind: LayerKind, frame: "Frame", call: Call, rotations: Rotations, of_sections: list[Rotations]
    ) -> Plan:
        """Puts a plan together."""
        needs = Needs(self.plain, self.weights, kind.position_embedding in BY_SLOT, call.one_tensor)
        sections = [
            Section(columns, view, own_rotations, needs, choose(self.backends, view, needs))
            for (columns, view), own_rotations in zip(frame.sections, of_sections, strict=True)
        ]
        has_tokens = call.numbers.shape[1] > 0
        return Plan(
            frame.visibility,
            sections,
            rotations,
            frame.writes,
            frame.tape,
            begins=call.begins,
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
        in_pairs, visibility = call.one_tensor and call.earlier is None, frame.visibility

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
        if call.tokens.position_ids is not None and not visibility.num_prefix:  # whose slots are counted from 0
            places, below = [call.tokens.position_ids], None
        whole = Rotations.of(at(side_by_side(places).clamp(min=0), below))
        if any(view.prefix for view in views) or (in_pairs and views[-1].is_step):
            whole.slot = at(side_by_side([view.query_slots for view in views]), slots_below)
        if call.one_tensor:
            whole.prefix = at(views[0].prefix_slots, visibility.num_prefix)
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


def side_by_side(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns numbers (R, T) of several sections in one tensor, of as many rows as the largest has."""
    if len(numbers) == 1:
        return numbers[0]
    rows = max(len(each) for each in numbers)
    return torch.cat([each.expand(rows, -1) for each in numbers], dim=1)


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
            if call.past is not None and call.earlier is None:
                view = self.in_cache(call, call.past)
            else:
                view = self.on_tape(call, earlier, visibility.store_size(capacity))
            self.sections.append((slice(first, first + length), view))
            first += length
        if call.written_after is not None:
            self.sections.append((slice(first, first + count), self.write_view(call, call.written_after)))

    def limit(self, past: Past) -> int | None:
        """Returns how many tokens a layer of a cache holds, None where it grows."""
        return self.visibility.span or past.max_length

    def prefix_may_show(self, call: Call) -> bool:
        """Tells whether a token of the call may see memory, or sinks before its window."""
        length = call.length_after
        return self.visibility.num_memory > 0 or (
            self.visibility.num_sinks > 0 and (length is None or self.visibility.lets_go(length))
        )

    def write_slots(self, call: Call, past: Past, past_numbers: torch.Tensor | None, filled: int) -> Writes:
        """States where the tokens of a call go in a cache's layer, and where those before them lie."""
        numbers, padded, num_sinks = call.numbers, call.tokens.padded, self.visibility.num_sinks
        prefix, limit = self.visibility.num_prefix, self.limit(past)
        written, sinks = numbers, None
        if limit is not None and not padded and numbers.shape[1] > limit:
            written = numbers[:, numbers.shape[1] - limit :]
        slots = prefix + ring_slot(written, limit)
        if padded:
            fits = written >= 0
            if limit is not None:
                fits &= written >= past.seen[:, None] + (numbers >= 0).sum(-1, keepdim=True) - limit
            slots = torch.where(fits, slots, -1)
        if num_sinks and (past.least is None or past.least < num_sinks):
            first = numbers if padded else numbers[:, :num_sinks]
            is_sink = (first >= 0) & (first < num_sinks)
            sinks = torch.where(is_sink, self.visibility.num_memory + first, -1)
        rows = torch.arange(len(past.seen), device=numbers.device) if call.chosen is None else call.chosen
        return Writes(
            rows[:, None],
            slots,
            sinks,
            None if past_numbers is None else prefix + ring_slot(past_numbers.clamp(min=0), limit),
            filled,
            call.length_after,
            call.chosen,
        )

    def in_cache(self, call: Call, past: Past) -> View:
        """Views tokens that go on from a cache without gradients, in place where keys need not be copied."""
        visibility, numbers, padded = self.visibility, call.numbers, call.tokens.padded
        length, limit, before = numbers.shape[1], self.limit(past), call.before
        prefix = self.prefix_may_show(call)
        if (visibility.span is None and length > 1) or (length == 1 and not call.writes):
            prefix = prefix or (past.one_tensor and length == 1 and visibility.num_prefix > 0)
            sizes = [size for size in (limit, call.length_after) if size is not None]
            filled = min(sizes)
            after = past.seen[:, None] + ((numbers >= 0).sum(-1, keepdim=True) if padded else length)
            slot = torch.arange(filled, device=numbers.device)
            if limit is None or visibility.span is None:
                key_numbers = torch.where(slot < after, slot, -1)
            else:
                key_numbers = held(slot, after, limit)
            self.writes = self.write_slots(call, past, None, filled)
            causal = not padded and before == 0 and visibility.span is None
            return View(visibility, numbers, key_numbers, "token", padded, prefix, causal, True, seen=past.seen)
        past_numbers = last_numbers(past.seen, before, limit if visibility.span is None else visibility.span - 1)
        self.writes = self.write_slots(call, past, past_numbers, 0)
        return View(
            visibility,
            numbers,
            torch.cat((past_numbers, numbers), dim=1),
            padded=padded,
            prefix=prefix,
            causal=self.is_causal(call, past_numbers.shape[1]),
            slack=call.inner_padding(),
            seen=past.seen,
        )

    def is_causal(self, call: Call, columns_before: int) -> bool:
        """Tells whether each token sees every key up to itself, of keys that are those of the tokens alone."""
        span = self.visibility.span
        return not call.tokens.padded and columns_before == 0 and (span is None or call.numbers.shape[1] < span)

    def on_tape(self, call: Call, earlier_numbers: Sequence[torch.Tensor], store_limit: int) -> View:
        """Views tokens whose keys are joined to those before: all there is, or with gradients."""
        visibility, numbers, past, earlier = self.visibility, call.numbers, call.past, call.earlier or Earlier()
        span, own = visibility.span, numbers
        past_numbers = numbers.new_empty(len(numbers), 0)
        store = None
        if past is not None and earlier.seen is not None:
            past_numbers = last_numbers(earlier.seen, earlier.before, None if span is None else span - 1)
            if span is not None:  # what earlier calls have written over is out of every window
                past_numbers = torch.where(past_numbers > past.seen[:, None] - span, past_numbers, -1)
            store = last_numbers(earlier.seen, earlier.before, store_limit)
            store = torch.where(store >= past.seen[:, None] - store_limit, store, -1)
            self.writes = self.write_slots(call, past, past_numbers, 0)
        if earlier_numbers:
            own = side_by_side([*earlier_numbers, numbers])
        keys = side_by_side([past_numbers, own]) if past_numbers.shape[1] else own
        columns_before = keys.shape[1] - numbers.shape[1]
        self.bare_numbers = keys[:, :columns_before]
        if not call.one_tensor:  # a cache has given its own keys their positions
            self.bare_numbers = self.bare_numbers[:, past_numbers.shape[1] :]
        sinks = find_sinks(keys, visibility.num_sinks) if visibility.num_sinks else None
        self.tape = Tape(own, sinks, store)
        has_gaps = bool(earlier_numbers) and (call.tokens.padded or earlier.padded)
        return View(
            visibility,
            numbers,
            keys,
            padded=call.tokens.padded,
            prefix=self.prefix_may_show(call),
            causal=self.is_causal(call, columns_before),
            slack=call.inner_padding() + (columns_before if has_gaps else 0),
            seen=None if past is None else past.seen,
            documents=call.tokens.documents,
        )

    def write_view(self, call: Call, after: torch.Tensor) -> View:
        """Views memory tokens that are written after so many tokens (R,).

        They see what the last token sees, and one another.
        """
        visibility, past = self.visibility, call.past
        numbers = after[:, None] + torch.arange(visibility.num_memory, device=after.device)
        if self.sections and self.sections[-1][1].role == "token":
            before = self.sections[-1][1].key_numbers
        else:
            assert past is not None
            before = last_numbers(after, call.before, self.limit(past))
            self.writes = self.write_slots(call, past, before, 0)
            if call.earlier is not None:
                self.tape = Tape(call.numbers)
                self.bare_numbers = before if past.one_tensor else None
        keys = side_by_side([before, numbers])
        return View(visibility, numbers, keys, role="write", prefix=True, seen=None if past is None else past.seen)


__all__ = ["Call", "Earlier", "Past", "Planner", "layer_kinds"]
