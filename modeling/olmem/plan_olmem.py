# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Plans the calls of the layers: who sees whom, where keys are written, at which positions, and which backend runs.

All decisions about a call are made here on the host, once for all layers of one kind.

Shapes: R is the batch size, or 1 if all rows are equal; C columns of a call, of which T are tokens; S keys; M memory
slots; P slots of the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .compat_olmem import sent
from .configuration_olmem import OlmemConfig
from .contracts_olmem import Backend, LayerKind, Needs, Plan, Rotations, Section, Tape, Writes, choose
from .inputs_olmem import Tokens
from .ops_olmem import Operations
from .positions_olmem import OlmemRotaryEmbedding, Rotation, rotary_clip
from .rules_olmem import BY_SLOT, ROTATING
from .sequences_olmem import FAR, Listed, Span
from .view_olmem import View, find_sinks, inner_padding
from .visibility_olmem import Visibility, held, last_numbers, ring_slot


@dataclass
class Past:
    """Says what an `OlmemCache` has read before a call."""

    seen: torch.Tensor  # (B,) the real tokens that each row has read
    least: int | None = None  # the fewest real tokens of a row; None if the host does not know it
    max_length: int | None = None  # the number of tokens for which full layers have room; None if they grow
    one_tensor: bool = False  # whether keys are the values too, and are stored without positions


@dataclass
class Earlier:
    """Says what came before a call in the same forward, if gradients go back through it."""

    # The numbers (R, T) of the tokens of those earlier calls that layers of each kind need.
    numbers: dict[LayerKind, list[torch.Tensor]] = field(default_factory=dict)
    padded: bool = False  # whether any earlier call had padding
    seen: torch.Tensor | None = None  # (B,) the real tokens that an `OlmemCache` had read before the forward
    before: int = 0  # an upper bound of the tokens that a row had read before the forward


@dataclass
class Call:
    """Describes one call of the layers, whose columns are [memory to read | tokens | memory to write].

    A call that goes on from an `OlmemCache` has `past`, and a call with gradients has `earlier`.
    """

    tokens: Tokens  # without columns, (R, 0), in a call that only writes memory
    before: int | None = 0  # an upper bound of the tokens that a row has read; None if only the device knows it
    past: Past | None = None
    earlier: Earlier | None = None
    reads: bool = False  # whether memory tokens to read come before the tokens
    begins: torch.Tensor | None = None  # (R,) which rows begin a segment, and so read new memory; None for all
    written_after: torch.Tensor | None = None  # (R,) the tokens that a row has read when its memory is written
    chosen: torch.Tensor | None = None  # (R,) the rows of the batch that take part; None for all
    carries: bool = False  # whether a later call of the same forward needs the new keys and values
    inner: int | None = field(init=False, default=None)  # made by `inner_padding`

    @property
    def numbers(self) -> torch.Tensor:
        """Returns the numbers (R, T) of the tokens, of which −1 is padding."""
        return self.tokens.numbers

    @property
    def writes(self) -> bool:
        """Returns whether memory tokens to write come after the tokens."""
        return self.written_after is not None

    @property
    def one_tensor(self) -> bool:
        """Returns whether the call goes on from a cache whose keys are the values too, without positions."""
        return self.past is not None and self.past.one_tensor

    @property
    def length_after(self) -> int | None:
        """Returns an upper bound of a row's tokens after this call, or None if only the device knows it."""
        if self.tokens.spans is not None:
            return max(first + count for _, first, count in self.tokens.spans)
        return None if self.before is None else self.before + self.numbers.shape[1]

    def inner_padding(self) -> int:
        """Returns the greatest number of padding columns between two real tokens of a row.

        The host waits for it once a call.
        """
        if self.inner is None:
            self.inner = inner_padding(self.numbers, self.before != 0) if self.tokens.padded else 0
        return self.inner


def layer_kinds(config: OlmemConfig) -> list[LayerKind]:
    """Returns the kind of each layer."""
    kinds = zip(config.layer_types, config.layer_position_embeddings, strict=False)  # fewer where a model leaves early
    retrieval_layers = config.retrieval_layers
    return [LayerKind(*kind, index in retrieval_layers) for index, kind in enumerate(kinds)]


class Planner:
    """Makes the plans of the calls of one forward.

    Args:
        config: the model's configuration.
        rotary: the model's rotary embedding.
        backends: the backends, of which the first that supports a section computes its attention.
        operations: what layers compute with around attention.
        plain: whether `attn_implementation="eager"` asks for plain operations.
        weights: whether attention weights are wanted. Only plain operations return them.
        flash: whether torch's flash operations can attend for the layers.
    """

    def __init__(
        self,
        config: OlmemConfig,
        rotary: OlmemRotaryEmbedding,
        backends: Sequence[Backend],
        operations: Operations,
        plain: bool = False,
        weights: bool = False,
        flash: bool = False,
    ):
        self.config, self.rotary, self.backends = config, rotary, backends
        self.plain, self.weights, self.flash, self.operations = plain, weights and plain, flash, operations
        self.kinds = layer_kinds(config)
        self.clip = rotary_clip(config)

    def plans(self, call: Call) -> dict[LayerKind, Plan]:
        """Makes the plan of each kind of layer for one call."""
        plans: dict[LayerKind, Plan] = {}
        frames: dict[tuple[str, bool], Frame] = {}
        rotations: dict[tuple[str, bool, bool], tuple[Rotations, list[Rotations]]] = {}
        for kind in dict.fromkeys(self.kinds):
            # With gradients, layers that retrieve need more of the earlier calls.
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
        """Makes the plan of one kind of layer from a frame and its rotations."""
        by_slot, sink_logits = kind.position_embedding in BY_SLOT, self.config.sink_logit_init is not None
        needs = Needs(self.plain, self.weights, by_slot, call.one_tensor, sink_logits, self.flash)
        is_alone = len(frame.sections) == 1
        sections = [
            Section(columns, view, own_rotations, needs, choose(self.backends, view, needs), is_alone)
            for (columns, view), own_rotations in zip(frame.sections, of_sections, strict=True)
        ]
        has_tokens = call.numbers.shape[1] > 0
        return Plan(
            frame.visibility,
            sections,
            rotations,
            self.operations,
            frame.writes,
            frame.tape,
            begins=call.begins,
            retrieves=kind.retrieves and has_tokens,
            returns_weights=self.weights,
            carries=call.carries * (3 if kind.retrieves and self.config.selects else 2),
        )

    def rotate(self, layer_type: str, rotates: bool, frame: "Frame", call: Call) -> tuple[Rotations, list[Rotations]]:
        """Makes the rotations of all columns of a call, and those of each of its sections."""
        clip = Rotation(clip=self.clip)
        if not rotates:
            whole = Rotations.of(clip)
            return whole, [whole for _ in frame.sections]
        in_pairs, visibility = call.one_tensor and call.earlier is None, frame.visibility

        def at(positions: torch.Tensor, below: int | None = None) -> Rotation:
            if in_pairs:
                return Rotation(phases=self.rotary.phases(positions, layer_type, below), clip=self.clip)
            cos, sin = self.rotary(positions, positions, layer_type, below)
            return Rotation(cos, sin, clip=self.clip, turn=self.operations.rotate)

        length = call.length_after
        below = None if length is None else length + 2 * visibility.num_memory + 1
        span = visibility.span or length
        slots_below = None if span is None else visibility.num_prefix + span + visibility.num_memory
        views = [view for _, view in frame.sections]
        places = [view.places for view in views]
        if call.tokens.position_ids is not None and not visibility.num_prefix:  # slots of a prefix begin at 0
            places, below = [call.tokens.position_ids], None
        if in_pairs and views[0].is_step:  # keys and their query have slots alone
            phases = self.step_phases(views[0], layer_type, slots_below)
            slot = at(views[0].query_slots, slots_below)
            whole = replace(Rotations.of(Rotation(clip=self.clip)), slot=slot, step=Rotation(phases=phases))
            return whole, [whole]
        whole = Rotations.of(at(side_by_side(places).clamp(min=0), below))
        if any(view.prefix for view in views):
            whole.slot = at(side_by_side([view.query_slots for view in views]), slots_below)
        if call.one_tensor and visibility.num_prefix:
            whole.prefix = at(views[0].prefix_slots, visibility.num_prefix)
        if frame.bare_numbers is not None and frame.bare_numbers.shape[1]:
            whole.key = at((visibility.num_memory + frame.bare_numbers).clamp(min=0), below)
        sections = [replace(whole)] if len(views) == 1 else [whole.part(columns) for columns, _ in frame.sections]
        for view, rotations in zip(views, sections, strict=True):
            if in_pairs and view.is_step:
                phases = self.step_phases(view, layer_type, slots_below)
                rotations.step = Rotation(phases=phases)
            elif in_pairs:
                rotations.key = at(view.key_places.clamp(min=0), below)
        return whole, sections

    def step_phases(self, view: View, layer_type: str, below: int | None) -> torch.Tensor:
        """Returns the phases (R, P + S, D/2, 2) of a step's keys at their slots, from a table if there is a span."""
        if view.visibility.span is None or below is None:
            return self.rotary.phases(view.step_slots, layer_type, below)
        return self.rotary.phases_of_slots(view.step_slots, layer_type, below)


def side_by_side(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the concatenation of numbers (R, T), after those with one row are expanded to as many as the others."""
    if len(numbers) == 1:
        return numbers[0]
    rows = max(each.shape[0] for each in numbers)
    return torch.cat([each.expand(rows, -1) for each in numbers], dim=1)


class Frame:
    """Holds the sections, writes and tape of a call, which layers of one type share whatever their positions are."""

    def __init__(self, visibility: Visibility, call: Call, earlier: Sequence[torch.Tensor], capacity: int):
        self.visibility = visibility
        self.writes: Writes | None = None
        self.tape: Tape | None = None
        self.bare_numbers: torch.Tensor | None = None  # (R, S) the keys that a tape rotates when it reads them
        self.sections: list[tuple[slice, View]] = []
        numbers, count = call.numbers, visibility.num_memory
        first = 0
        if call.reads:
            memory = torch.arange(count, device=numbers.device)[None]
            self.sections.append((slice(0, count), View(visibility, memory, memory, role="read")))
            first = count
        length = numbers.shape[1]
        if length:
            if call.past is not None and call.tokens.spans is not None:
                view = self.in_spans(call, call.past, call.tokens.spans)
            elif call.past is not None and call.earlier is None:
                view = self.in_cache(call, call.past)
            else:
                view = self.on_tape(call, earlier, visibility.store_size(capacity))
            self.sections.append((slice(first, first + length), view))
            first += length
        if call.written_after is not None:
            self.sections.append((slice(first, first + count), self.write_view(call, call.written_after)))
        if len(self.sections) == 1:  # and is all columns, of which a program may have any number
            self.sections = [(slice(None), view) for _, view in self.sections]

    def limit(self, past: Past) -> int | None:
        """Returns the greatest number of tokens in a cache's layer, or None if it grows."""
        return self.visibility.span or past.max_length

    def prefix_may_show(self, call: Call) -> bool:
        """Returns whether a token of the call may see memory, or sinks before its window."""
        length = call.length_after
        return self.visibility.num_memory > 0 or (
            self.visibility.num_sinks > 0 and (length is None or self.visibility.may_let_go(length))
        )

    def write_slots(self, call: Call, past: Past, past_numbers: torch.Tensor | None, filled: int) -> Writes:
        """Says where a cache's layer writes the tokens of a call, and where it finds those before them."""
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
        rows = torch.arange(past.seen.shape[0], device=numbers.device) if call.chosen is None else call.chosen
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
        """Returns the view of tokens that go on from a cache without gradients, and sets the writes."""
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
            solid = not padded and past.least == before
            first = past.least if solid else None
            kind = "token", padded, prefix, causal, True, solid, first
            return View(visibility, numbers, key_numbers, *kind, seen=past.seen)
        past_numbers = last_numbers(past.seen, before, limit if visibility.span is None else visibility.span - 1)
        self.writes = self.write_slots(call, past, past_numbers, 0)
        return View(
            visibility,
            numbers,
            torch.cat((past_numbers, numbers), dim=1),
            padded=padded,
            prefix=prefix,
            causal=self.is_causal(call, past_numbers.shape[1]),
            solid=not padded and past.least is not None and past.least >= past_numbers.shape[1],
            first=None if padded or past.least != before else past.least,
            slack=call.inner_padding(),
            seen=past.seen,
        )

    def in_spans(self, call: Call, past: Past, spans: Sequence[Span]) -> View:
        """Returns the view of tokens of several rows, listed as one row, that go on from a cache; sets the writes."""
        visibility, limit, device = self.visibility, self.limit(past), call.numbers.device
        prefix = visibility.num_prefix
        most = FAR if visibility.span is None else visibility.span - 1
        before = [Span(row, first - min(first, most), min(first, most)) for row, first, _ in spans]
        old, new, sinks = Listed.of(before), Listed.of(spans), None
        slots = prefix + ring_slot(new.numbers, limit)
        if limit is not None:  # of more tokens than there is room for, the last ones are written
            stops = torch.tensor([first + count for _, first, count in spans])
            is_last = new.numbers >= stops.repeat_interleave(torch.tensor([span.size for span in spans])) - limit
            slots = torch.where(is_last, slots, -1)
        if any(span.first < visibility.num_sinks for span in spans):
            is_sink = new.numbers < visibility.num_sinks
            sinks = sent(torch.where(is_sink, visibility.num_memory + new.numbers, -1)[None], device)
        past_slots = prefix + ring_slot(old.numbers, limit)
        listed = [sent(each[None], device) for each in (new.rows, slots, past_slots, old.rows, old.numbers)]
        rows, slots, past_slots, past_rows, past_numbers = listed
        self.writes = Writes(rows, slots, sinks, past_slots, 0, call.length_after, None, past_rows)
        return View(
            visibility,
            call.numbers,
            torch.cat((past_numbers, call.numbers), dim=1),
            prefix=self.prefix_may_show(call),
            spans=spans,
            key_spans=[*before, *spans],
        )

    def is_causal(self, call: Call, columns_before: int) -> bool:
        """Returns whether the keys are those of the call's tokens alone, and each token sees all keys up to its own."""
        may_let_go = self.visibility.may_let_go(call.numbers.shape[1] + 1)
        return not call.tokens.padded and columns_before == 0 and not may_let_go

    def on_tape(self, call: Call, earlier_numbers: Sequence[torch.Tensor], store_limit: int) -> View:
        """Returns the view of tokens of a call with gradients or without a cache, and sets tape and writes."""
        visibility, numbers, past, earlier = self.visibility, call.numbers, call.past, call.earlier or Earlier()
        span, own = visibility.span, numbers
        past_numbers = numbers.new_empty(numbers.shape[0], 0)
        store = None
        if past is not None and earlier.seen is not None:
            past_numbers = last_numbers(earlier.seen, earlier.before, None if span is None else span - 1)
            if span is not None:  # earlier calls have overwritten keys that are out of every window
                past_numbers = torch.where(past_numbers > past.seen[:, None] - span, past_numbers, -1)
            store = last_numbers(earlier.seen, earlier.before, store_limit)
            store = torch.where(store >= past.seen[:, None] - store_limit, store, -1)
            self.writes = self.write_slots(call, past, past_numbers, 0)
        if earlier_numbers:
            own = side_by_side([*earlier_numbers, numbers])
        keys = side_by_side([past_numbers, own]) if past_numbers.shape[1] else own
        columns_before = keys.shape[1] - numbers.shape[1]
        self.bare_numbers = keys[:, :columns_before]
        if not call.one_tensor:  # the cache's keys have their positions
            self.bare_numbers = self.bare_numbers[:, past_numbers.shape[1] :]
        sinks = find_sinks(keys, visibility.num_sinks) if visibility.num_sinks else None
        self.tape = Tape(own, sinks, store, earlier.seen)
        is_first = not call.tokens.padded and call.tokens.documents is None and columns_before == 0
        has_gaps = len(earlier_numbers) > 0 and (call.tokens.padded or earlier.padded)
        return View(
            visibility,
            numbers,
            keys,
            padded=call.tokens.padded,
            prefix=self.prefix_may_show(call),
            causal=self.is_causal(call, columns_before),
            solid=is_first,
            first=0 if is_first and call.before == 0 else None,  # a window of one token has no key before it
            slack=call.inner_padding() + (columns_before if has_gaps else 0),
            seen=None if past is None else past.seen,
            documents=call.tokens.documents,
        )

    def write_view(self, call: Call, after: torch.Tensor) -> View:
        """Returns the view of memory tokens to write after `after` (R,) tokens of each row.

        In a call without tokens it also sets the writes and the tape.
        """
        visibility, past = self.visibility, call.past
        numbers = after[:, None] + torch.arange(visibility.num_memory, device=after.device)
        first = None
        if self.sections and self.sections[-1][1].role == "token":
            view = self.sections[-1][1]
            before = view.key_numbers
            if view.first is not None:
                first = view.first + view.numbers.shape[1]
        else:
            assert past is not None
            first = past.least if past.least == call.before and call.chosen is None else None
            before = last_numbers(after, call.before, self.limit(past))
            self.writes = self.write_slots(call, past, before, 0)
            if call.earlier is not None:
                self.tape = Tape(call.numbers)
                self.bare_numbers = before if past.one_tensor else None
        keys = side_by_side([before, numbers])
        seen = None if past is None else past.seen
        return View(visibility, numbers, keys, role="write", prefix=True, first=first, seen=seen)


__all__ = ["Call", "Earlier", "Past", "Planner", "layer_kinds"]
