# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Collects the hidden states and attention weights that a caller asks for beside the last hidden states.

Shapes: B batch, H query heads, K key/value heads, C columns of a call, S keys, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Captured:
    """Keeps the hidden states and attention weights that a caller wants of one call.

    Attributes:
        wanted: the indices of the hidden states to keep, where 0 is the embeddings. None keeps all of them.
        hidden_states: the hidden states (B, C, hidden_size) so far, None for those that are not wanted.
        attentions: the attention weights (B, H, C, S) of each layer, if its backend computes them.
        states: the new keys and values (B, K, C, D) of each layer, and its scores (B, K, C) if it has any, where later
            calls need them.
    """

    wanted: set[int] | None
    hidden_states: list[torch.Tensor | None] = field(default_factory=list)
    attentions: list[torch.Tensor] = field(default_factory=list)
    states: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def keep(self, hidden_states: torch.Tensor) -> None:
        """Keeps hidden states (B, C, hidden_size), the next ones in order, if they are wanted."""
        is_wanted = self.wanted is None or len(self.hidden_states) in self.wanted
        self.hidden_states.append(hidden_states if is_wanted else None)

    def fill(self, stages: Sequence[torch.Tensor], last: torch.Tensor, num_layers: int) -> tuple[Any, ...]:
        """Returns a tuple of `num_layers` + 1 hidden states, None for those that are not wanted.

        Args:
            stages: the wanted hidden states in order.
            last: the hidden states after the model's last norm, which replace those after its last layer.
        """
        found = iter([*stages[:-1], last] if self.wanted is None or num_layers in self.wanted else stages)
        return tuple(
            next(found) if self.wanted is None or index in self.wanted else None for index in range(num_layers + 1)
        )


def wanted_states(output_hidden_states: bool | int | Sequence[int] | None, num_hidden_layers: int) -> set[int] | None:
    """Returns the indices of the hidden states that `output_hidden_states` asks for, None for all of them."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return None if output_hidden_states else set()
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    if not isinstance(indices, Sequence | set) or not all(isinstance(index, int) for index in indices):
        raise ValueError(
            f"`output_hidden_states` must be True, an index, or several indices (got {output_hidden_states!r}); pass a "
            "list of integers."
        )
    count = num_hidden_layers + 1
    outside = [index for index in indices if not -count <= index < count]
    if outside:
        raise ValueError(
            f"`output_hidden_states` must be indices below {count}, the embeddings and {num_hidden_layers} layers (got "
            f"{outside[0]}); leave that one out, or pass True for all."
        )
    return {index % count for index in indices}


__all__ = ["Captured", "wanted_states"]
