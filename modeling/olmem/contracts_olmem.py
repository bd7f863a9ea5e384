# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What the parts of a forward call promise one another: plans, parts, states, sections and backends.

    query, key, value = project(hidden_states)
    parts = state.write(key, value, plan)                 one list of parts for each section of the plan
    output = section.attend(heads, query, parts)          one softmax over all parts of a section

Shapes: B batch, H query heads, K key/value heads, C columns of a call, T queries, S keys, D head dim, M memory slots,
P slots of the prefix; R is B, or 1 where one row stands for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .positions_olmem import PositionScheme, Rotation
from .view_olmem import View
from .visibility_olmem import Visibility

Output = tuple[torch.Tensor, torch.Tensor | None]  # (B, T, H, D), and weights (B, H, T, S) if any


class LayerKind(NamedTuple):
    """Names what tells the layers of a model apart for a plan."""

    layer_type: str
    position_embedding: str
    retrieves: bool


@dataclass
class Part:
    """Holds keys and values as they lie in memory, their form, and the rule by which queries see them.

    A part is the prefix, of which a query sees its first slots, or the window, which is seen by number. Its keys have
    their positions, or they are bare and get them on read.
    """

    key: torch.Tensor  # (B, K, S, D)
    value: torch.Tensor  # (B, K, S, D)
    is_prefix: bool = False
    is_bare: bool = False
    in_pairs: bool = False  # the layout of bare keys and of the values that they are


@dataclass
class Heads:
    """Holds what attention needs of a layer's own weights and choices."""

    module: nn.Module  # for Transformers' attention functions
    scheme: PositionScheme
    scaling: float
    dropout: float
    memory_gate: torch.Tensor | None = None  # (H,) how far each head opens to memory, between 0 and 1


@dataclass
class Candidates:
    """Holds what some queries of a call may retrieve."""

    rows: slice  # of the batch
    columns: slice  # of the call
    key: torch.Tensor  # (B, K, S, D), without positions
    value: torch.Tensor  # (B, K, S, D)
    numbers: torch.Tensor  # (R, S) of the first keys; negative is none
    queries: torch.Tensor  # (R, T) the tokens from which the queries look out


def moved_tensors(holder: object, device: torch.device) -> dict[str, Any]:
    """Returns the attributes of an object that are tensors, on another device."""
    return {name: value.to(device) for name, value in vars(holder).items() if isinstance(value, torch.Tensor)}


@dataclass
class Writes:
    """States where the new keys and values of a call go in an `OlmemCache`, and where those before them lie."""

    rows: torch.Tensor  # (R, 1) the rows of the batch
    slots: torch.Tensor  # (R, T) of the ring or row for the new tokens; −1 is nowhere
    sink_slots: torch.Tensor | None  # (R, T) of the prefix for new tokens that are sinks; None if none can be
    past_slots: torch.Tensor | None  # (R, P) of the keys before, oldest first; None where keys are read in place
    filled: int  # slots of the ring or row that hold a token, where keys are read in place
    length: int | None  # columns read after this call, padding included; None where only the device knows
    chosen: torch.Tensor | None = None  # (R,) the rows of the batch that take part; None is all

    def to(self, device: torch.device) -> "Writes":
        """Returns the same on another device."""
        return replace(self, **moved_tensors(self, device))


@dataclass
class Tape:
    """States what came before the new tokens, where keys are joined so that gradients go back through them."""

    own_numbers: torch.Tensor  # (R, S) of the tokens of earlier calls of this forward, then of the new ones
    sinks: tuple[torch.Tensor, torch.Tensor] | None = None  # (R, Z) whether each is among all these, and its column
    store_numbers: torch.Tensor | None = None  # (R, S) of what a store held before this forward, oldest first

    def to(self, device: torch.device) -> "Tape":
        """Returns the same on another device."""
        sinks = self.sinks and (self.sinks[0].to(device), self.sinks[1].to(device))
        return replace(self, sinks=sinks, **moved_tensors(self, device))


@dataclass
class Rotations:
    """Holds the rotations that some columns C of a call need."""

    place: Rotation  # (R, C) of queries and new keys at their places in the stream
    slot: Rotation  # (R, C) of queries at their slots, for the prefix
    key: Rotation  # (R, S) of bare keys before the new ones, or of a whole window
    prefix: Rotation  # (1, P) of the prefix at its slots, where its keys are bare
    step: Rotation  # (R, P + S) of all keys of a step at their slots, where bare

    @classmethod
    def of(cls, place: Rotation) -> "Rotations":
        """Returns rotations of queries and new keys, where no others are needed."""
        none = Rotation(clip=place.clip)
        return cls(place, none, none, none, none)

    def part(self, columns: slice, row: int | None = None) -> "Rotations":
        """Returns the rotations of queries of some columns of the call, of one row if each has its own."""
        place, slot = self.place.part(columns, row), self.slot.part(columns, row)
        return Rotations(place, slot, self.key, self.prefix, self.step)

    def to(self, device: torch.device) -> "Rotations":
        """Returns the same on another device."""
        return Rotations(**{name: rotation.to(device) for name, rotation in vars(self).items()})


class Needs(NamedTuple):
    """Says what a backend must be able to do for a section, beside what its view says."""

    plain: bool = False  # plain operations, as `attn_implementation="eager"` asks for
    weights: bool = False  # the weights too
    by_slot: bool = False  # keys that are changed on read by their distance
    is_bare: bool = False  # keys that get their positions on read


class Backend(Protocol):
    """A way to compute attention. The first one in a list that supports a section is taken when a plan is made."""

    def supports(self, view: View, needs: Needs) -> bool:
        """Tells whether this backend can attend for that view."""
        ...

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: "Section") -> Output:
        """Attends for queries (B, H, T, D) without positions to all parts under one softmax.

        Returns the output (B, T, H, D), and the weights (B, H, T, S) if they were asked for and the backend has them.
        """
        ...


def choose(backends: Sequence[Backend], view: View, needs: Needs) -> Backend:
    """Returns the first backend of a list that supports a view."""
    return next(backend for backend in backends if backend.supports(view, needs))


@dataclass
class Section:
    """Some queries of a call that are attended for together, and the backend that does it."""

    columns: slice  # of the call
    view: View
    rotations: Rotations  # of these columns
    needs: Needs
    backend: Backend

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part]) -> Output:
        """Attends for the section's queries among those of the call (B, H, C, D), as `Backend.attend` does."""
        return self.backend.attend(heads, query[:, :, self.columns], parts, self)

    def to(self, device: torch.device) -> "Section":
        """Returns the same on another device."""
        return replace(self, view=self.view.to(device), rotations=self.rotations.to(device))


class Plan:
    """Holds all that layers of one kind need to know about one forward call.

    This is an ordinary class on purpose. Wrappers that shard or offload a model look into the dataclasses, lists and
    dictionaries that a layer is given, and cast the float tensors that they find: angles would lose their precision.
    """

    def __init__(
        self,
        visibility: Visibility,
        sections: Sequence[Section],
        rotations: Rotations,
        writes: Writes | None = None,
        tape: Tape | None = None,
        begins: torch.Tensor | None = None,
        retrieves: bool = False,
        returns_weights: bool = False,
        carries: bool = False,
    ):
        self.visibility = visibility
        self.sections = sections
        self.rotations = rotations
        self.writes = writes
        self.tape = tape
        self.begins = begins  # (R,) which rows begin a segment, and so read memory; None is all
        self.retrieves = retrieves
        self.returns_weights = returns_weights
        self.carries = carries  # layers return their new keys and values too
        self.copies: dict[torch.device, Plan] = {}  # on other devices
        if sections:
            self.copies[sections[0].view.numbers.device] = self

    def columns(self, role: str) -> slice | None:
        """Returns the columns of the section of that role, or None where the call has none."""
        return next((section.columns for section in self.sections if section.view.role == role), None)

    def view(self, role: str = "token") -> View:
        """Returns the view of the section of that role, which the call must have."""
        return next(section.view for section in self.sections if section.view.role == role)

    def to(self, device: torch.device, **_) -> "Plan":
        """Returns the same on another device; it is copied there once."""
        if device not in self.copies:
            sections = [section.to(device) for section in self.sections]
            writes, tape = self.writes and self.writes.to(device), self.tape and self.tape.to(device)
            begins = None if self.begins is None else self.begins.to(device)
            rest = begins, self.retrieves, self.returns_weights, self.carries
            moved = Plan(self.visibility, sections, self.rotations.to(device), writes, tape, *rest)
            self.copies[device], moved.copies = moved, self.copies
        return self.copies[device]


class LayerState(Protocol):
    """What one layer remembers between forward calls, or within one."""

    def write(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, earlier: Sequence[torch.Tensor]
    ) -> list[list[Part]]:
        """Keeps new keys and values (B, K, C, D), without positions, and returns the parts that each section sees.

        `earlier` holds the keys and values of earlier calls of the same forward, in turns, where gradients are wanted.
        """
        ...

    def candidates(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, earlier: Sequence[torch.Tensor]
    ) -> Iterator[Candidates]:
        """Yields what the new tokens (B, K, C, D) may retrieve, block by block, and keeps them to be retrieved."""
        ...


__all__ = [
    "Backend",
    "Candidates",
    "Heads",
    "LayerKind",
    "LayerState",
    "Needs",
    "Output",
    "Part",
    "Plan",
    "Rotations",
    "Section",
    "Tape",
    "Writes",
    "choose",
]
