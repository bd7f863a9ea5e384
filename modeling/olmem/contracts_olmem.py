# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The contracts between the steps of a forward call: plans, sections, states, parts and backends.

    query, key, value = project(hidden_states)
    parts = state.write(key, value, plan)                 returns a list of parts for each section of the plan
    output = section.attend(heads, query, parts)          computes one softmax over all parts of a section

Shapes: B batch, H query heads, K key/value heads, C columns of a call, T queries, S keys, D head dim, M memory slots,
P slots of the prefix; R is B, or 1 where one row stands for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .ops_olmem import Operations
from .positions_olmem import PositionScheme, Rotation, to_pairs
from .rules_olmem import BY_SLOT
from .view_olmem import View
from .visibility_olmem import Visibility

Output = tuple[torch.Tensor, torch.Tensor | None]  # the output (B, T, H, D), and weights (B, H, T, S) or None


class LayerKind(NamedTuple):
    """Identifies the layers that share a plan."""

    layer_type: str
    position_embedding: str
    retrieves: bool

    @property
    def can_be_listed(self) -> bool:
        """Returns whether layers can read the tokens of several rows of a cache, listed as one row."""
        return self.position_embedding not in BY_SLOT and not self.retrieves


@dataclass
class Part:
    """Holds keys and values as they are stored, and says in which form.

    A part is either the prefix or the window. A query sees the first slots of the prefix, and keys of the window by
    their numbers. Keys have their positions, or they are bare and get positions when they are read.
    """

    key: torch.Tensor  # (B, K, S, D)
    value: torch.Tensor  # (B, K, S, D)
    is_prefix: bool = False
    is_bare: bool = False
    in_pairs: bool = False  # bare keys, which are the values too, are laid out in pairs


def by_key_head(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Returns queries (B, H, T, D) as (B, K, H/K · T, D): the query heads of a key head stand as more queries."""
    if query.shape[1] == key.shape[1]:
        return query
    return query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def by_query_head(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns what `by_key_head` has joined (B, K, H/K · T, …) as (B, H, T, …) again."""
    if groups == 1:
        return states
    return states.unflatten(2, (groups, states.shape[2] // groups)).flatten(1, 2)


@dataclass
class Heads:
    """Holds the settings and weights of a layer that backends need."""

    module: nn.Module  # the attention module, an argument of Transformers' attention functions
    scheme: PositionScheme
    scaling: float
    dropout: float
    memory_gate: torch.Tensor | None = None  # (H,) the share of attention with memory, between 0 and 1
    sink_logits: torch.Tensor | None = None  # (H,) learned sinks, each one more score in a head's softmax

    def some(self, query_heads: slice) -> "Heads":
        """Returns the settings and weights of some query heads."""
        gate, sinks = (None if each is None else each[query_heads] for each in (self.memory_gate, self.sink_logits))
        return replace(self, memory_gate=gate, sink_logits=sinks)


@dataclass
class Candidates:
    """Holds the keys and values that some queries of a call may retrieve."""

    rows: slice  # the rows of the batch that the queries are in
    columns: slice  # the columns of the call that the queries are in
    key: torch.Tensor  # (B, K, S, D), without positions
    value: torch.Tensor  # (B, K, S, D)
    numbers: torch.Tensor  # (R, S) the numbers of the first S keys; a negative one is no token
    queries: torch.Tensor  # (R, T) the numbers of the queries
    # (B, K, S) the scores by which keys are admitted, or None; with them each head may have its own numbers, (B, K, S)
    scores: torch.Tensor | None = None


def moved_tensors(holder: object, device: torch.device) -> dict[str, Any]:
    """Returns copies on another device of those attributes of an object that are tensors."""
    return {name: value.to(device) for name, value in vars(holder).items() if isinstance(value, torch.Tensor)}


@dataclass
class Writes:
    """Says where a layer of an `OlmemCache` writes new keys and values, and where it finds those before them."""

    rows: torch.Tensor  # (R, 1) the rows of the batch
    slots: torch.Tensor  # (R, T) the slots of the new tokens in the ring or row; −1 for tokens that are not written
    sink_slots: torch.Tensor | None  # (R, T) the slots of new sinks in the prefix; None if no new token is a sink
    past_slots: torch.Tensor | None  # (R, P) the slots of earlier keys, oldest first; None if keys are read in place
    filled: int  # the number of slots of the ring or row that hold tokens, if keys are read in place
    length: int | None  # an upper bound of a row's tokens after this call; None if only the device knows it
    chosen: torch.Tensor | None = None  # (R,) the rows of the batch that take part; None for all
    past_rows: torch.Tensor | None = None  # (1, P) the rows of earlier keys, where rows are listed as one

    def to(self, device: torch.device) -> "Writes":
        """Returns a copy on another device."""
        return replace(self, **moved_tensors(self, device))


@dataclass
class Tape:
    """Says which keys a tape joins, so that gradients go back through them."""

    own_numbers: torch.Tensor  # (R, S) the numbers of the tokens of earlier calls of this forward and of the new ones
    sinks: tuple[torch.Tensor, torch.Tensor] | None = None  # (R, Z) whether the keys have each sink, and its column
    store_numbers: torch.Tensor | None = None  # (R, S) the numbers in the store before this forward, oldest first
    seen: torch.Tensor | None = None  # (R,) the tokens that the store's cache had read before this forward

    def to(self, device: torch.device) -> "Tape":
        """Returns a copy on another device."""
        sinks = self.sinks and (self.sinks[0].to(device), self.sinks[1].to(device))
        return replace(self, sinks=sinks, **moved_tensors(self, device))


@dataclass
class Rotations:
    """Holds the rotations of some columns C of a call."""

    place: Rotation  # (R, C) for queries and new keys, by their places in the stream
    slot: Rotation  # (R, C) for queries, by their slots, to attend to the prefix
    key: Rotation  # (R, S) for bare keys before the new ones, or for all keys of a bare window
    prefix: Rotation  # (1, P) for the bare keys of the prefix, by their slots
    step: Rotation  # (R, P + S) for all bare keys of a step, by their slots

    @classmethod
    def of(cls, place: Rotation) -> "Rotations":
        """Returns rotations that have only that of queries and new keys."""
        none = Rotation(clip=place.clip)
        return cls(place, none, none, none, none)

    def part(self, columns: slice, row: int | None = None) -> "Rotations":
        """Returns the rotations of some columns, or of one row of them if each row has its own."""
        place, slot = self.place.part(columns, row), self.slot.part(columns, row)
        return Rotations(place, slot, self.key, self.prefix, self.step)

    def to(self, device: torch.device) -> "Rotations":
        """Returns a copy on another device."""
        return Rotations(**{name: rotation.to(device) for name, rotation in vars(self).items()})


def rotate_on_read(query: torch.Tensor, part: Part, rotations: Rotations) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns queries (B, H, T, D) and the keys (B, K, S, D) of a part, both rotated."""
    query = to_pairs(query) if part.in_pairs else query
    query = (rotations.slot if part.is_prefix else rotations.place)(query)
    if not part.is_bare:
        return query, part.key
    return query, (rotations.prefix if part.is_prefix else rotations.key)(part.key)


class Needs(NamedTuple):
    """Lists what a backend must support for a section, beside its view."""

    plain: bool = False  # plain operations, which `attn_implementation="eager"` asks for
    weights: bool = False  # attention weights as a second output
    by_slot: bool = False  # keys that depend on their distance from the query
    is_bare: bool = False  # keys that get their positions when they are read
    sink_logits: bool = False  # learned sinks, which SDPA cannot express
    flash: bool = False  # nothing that torch's flash operations lack, on a device that has them


class Backend(Protocol):
    """Computes attention for the views that it supports.

    When a plan is made, each section gets the first backend of a list that supports its view.
    """

    def supports(self, view: View, needs: Needs) -> bool:
        """Returns whether this backend can attend for that view."""
        ...

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: "Section") -> Output:
        """Attends from queries (B, H, T, D) without positions to all parts, under one softmax.

        Returns the output (B, T, H, D), and the weights (B, H, T, S) or None. There are weights if they are asked for
        and the backend computes them.
        """
        ...


def choose(backends: Sequence[Backend], view: View, needs: Needs) -> Backend:
    """Returns the first backend of a list that supports a view."""
    return next(backend for backend in backends if backend.supports(view, needs))


@dataclass
class Section:
    """Holds some columns of a call whose queries attend together, and the backend that computes their attention."""

    columns: slice  # the columns of the call
    view: View
    rotations: Rotations  # those of these columns
    needs: Needs
    backend: Backend
    is_alone: bool = False  # whether the call has no other section, so that its columns are all columns

    def part(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the section's columns of states (B, heads, C, D)."""
        return states if self.is_alone else states[:, :, self.columns]

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part]) -> Output:
        """Attends from the section's columns of the queries (B, H, C, D), as `Backend.attend` does."""
        return self.backend.attend(heads, self.part(query), parts, self)

    def to(self, device: torch.device) -> "Section":
        """Returns a copy on another device."""
        return replace(self, view=self.view.to(device), rotations=self.rotations.to(device))


class Plan:
    """Holds all that the layers of one kind need to know about one call.

    This is not a dataclass on purpose. Wrappers that shard or offload a model search the dataclasses, lists and
    dictionaries among a layer's arguments, and cast the float tensors in them. Angles would lose their precision.
    """

    def __init__(
        self,
        visibility: Visibility,
        sections: Sequence[Section],
        rotations: Rotations,
        operations: Operations,
        writes: Writes | None = None,
        tape: Tape | None = None,
        begins: torch.Tensor | None = None,
        retrieves: bool = False,
        returns_weights: bool = False,
        carries: int = 0,
    ):
        self.visibility = visibility
        self.sections = sections
        self.rotations = rotations
        self.writes = writes
        self.tape = tape
        self.begins = begins  # (R,) which rows begin a segment, and so read new memory; None for all
        self.retrieves = retrieves
        self.returns_weights = returns_weights
        self.carries = carries  # how many of their new tensors layers also return: keys, values, and scores if any
        self.by_role = {section.view.role: section for section in sections}
        self.token_index = [*self.by_role].index("token") if "token" in self.by_role else 0
        self.operations = operations  # what layers compute with around attention
        self.copies: dict[torch.device, Plan] = {}  # the plan on each device, this one included
        if sections:
            self.copies[sections[0].view.numbers.device] = self

    def section(self, role: str) -> Section | None:
        """Returns the section with that role, or None if the call has no such section."""
        return self.by_role.get(role)

    def columns(self, role: str) -> slice | None:
        """Returns the columns of the section with that role, or None if the call has no such section."""
        section = self.by_role.get(role)
        return None if section is None else section.columns

    def view(self, role: str = "token") -> View:
        """Returns the view of the section with that role, which the call must have."""
        return self.by_role[role].view

    def to(self, device: torch.device, **_) -> "Plan":
        """Returns a copy on another device, which is made once."""
        if device not in self.copies:
            sections = [section.to(device) for section in self.sections]
            writes, tape = self.writes and self.writes.to(device), self.tape and self.tape.to(device)
            begins = None if self.begins is None else self.begins.to(device)
            rest = begins, self.retrieves, self.returns_weights, self.carries
            given = self.visibility, sections, self.rotations.to(device), self.operations
            moved = Plan(*given, writes, tape, *rest)
            self.copies[device], moved.copies = moved, self.copies
        return self.copies[device]


class LayerState(Protocol):
    """Remembers the keys and values of one layer between forward calls, or within one."""

    def write(
        self, key: torch.Tensor, value: torch.Tensor, plan: Plan, earlier: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[Part]]:
        """Writes new keys and values (B, K, C, D) without positions, and returns the parts that each section sees.

        `earlier` holds the keys and values of each earlier call of the same forward, where gradients are wanted, and
        the scores if the store selects.
        """
        ...

    def candidates(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        earlier: Sequence[Sequence[torch.Tensor]],
        scores: torch.Tensor | None = None,
    ) -> Iterator[Candidates]:
        """Yields what the new tokens may retrieve, block by block, and stores their keys and values (B, K, T, D).

        `scores` (B, K, T) are those of the new tokens, where the store selects by them.
        """
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
    "by_key_head",
    "by_query_head",
    "choose",
    "rotate_on_read",
]
