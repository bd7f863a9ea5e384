"""Visibilities and rows of numbered tokens of any kind, for tests that need no model."""

from typing import Any

import torch
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, SLIDING, seen_by
from olmem.visibility_olmem import Visibility


@st.composite
def visibilities(draw, layer_types: tuple[str, ...] = (FULL, SLIDING, CHUNKED)) -> Visibility:
    """Draws what layers of any of these types may see; a full layer has no sinks, as in a configuration."""
    layer_type = draw(st.sampled_from(layer_types))
    sizes: dict[str, Any] = {}
    if layer_type != FULL:
        sizes = {"num_sinks": draw(st.integers(0, 5))}
    if layer_type == SLIDING:
        sizes |= {"sliding_window": draw(st.integers(1, 9))}
    if layer_type == CHUNKED:
        sizes |= {"chunk_size": draw(st.integers(1, 6)), "lookback": draw(st.integers(0, 3))}
    return Visibility(layer_type, num_memory=draw(st.integers(0, 3)), **sizes)


@st.composite
def real_tokens(draw, rows: int, length: int, padding: str = "anywhere") -> torch.Tensor:
    """Draws whether each of (rows, length) columns is a token rather than padding."""
    if padding == "none":
        return torch.ones(rows, length, dtype=torch.bool)
    drawn = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    return torch.tensor(drawn).view(rows, length)


def number(real: torch.Tensor, seen: torch.Tensor | int = 0) -> torch.Tensor:
    """Returns the tokens' numbers after so many were seen, −1 for padding."""
    return torch.where(real, real.cumsum(-1) - 1 + torch.as_tensor(seen).view(-1, 1), -1)


def listed(visibility: Visibility, query: int) -> tuple[list[int], list[int]]:
    """Returns the sinks before a query's window, and its window, by the table of the design."""
    sizes = visibility.sliding_window, visibility.chunk_size, visibility.lookback, visibility.num_sinks
    return seen_by(query, visibility.layer_type, *sizes)
