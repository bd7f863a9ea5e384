"""What attention over a layer's window and sinks means, in plain operations and apart from every backend."""

from collections.abc import Callable

import torch
from modeling.numbering import listed
from olmem.visibility_olmem import Visibility


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Returns the softmax of scores (…, S), in which sinks (…) are one more score, whose own weight is left out."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_numbers: torch.Tensor,
    key_numbers: torch.Tensor,
    visibility: Visibility,
    rotation: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends in float32 with every pair of a query and a key rotated by the difference of its slots.

    query (B, H, T, D); key, value (B, K, S, D), none of them rotated; their numbers (T,) and (S,) in the stream;
    `rotation` gives cosines and sines (…, D) of positions (…); `sinks` (H,) join each softmax. Returns (B, T, H, D).
    Holds T × S × D numbers.
    """
    column = {number: index for index, number in enumerate(key_numbers.tolist())}
    visible = torch.zeros(len(query_numbers), len(key_numbers), dtype=torch.bool)
    distance = torch.zeros(visible.shape, dtype=torch.long)
    for row, number in enumerate(query_numbers.tolist()):
        before, inside = listed(visibility, number)
        for slot, key_number in enumerate([*before, *inside]):
            visible[row, column[key_number]] = True
            distance[row, column[key_number]] = len(before) + len(inside) - 1 - slot
    cos, sin = rotation(distance)  # (T, S, D)
    groups = query.shape[1] // key.shape[1]
    query, key, value = (state.float() for state in (query, key, value))
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    half = query.shape[-1] // 2
    rotated_half = torch.cat((-query[..., half:], query[..., :half]), dim=-1)
    scores = torch.einsum("bhtd,tsd,bhsd->bhts", query, cos, key) + torch.einsum(
        "bhtd,tsd,bhsd->bhts", rotated_half, sin, key
    )
    weights = softmax((scores * scaling).masked_fill(~visible, -torch.inf), sinks if sinks is None else sinks[:, None])
    return (weights @ value).transpose(1, 2)


def attend_listed(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot: int,
    scheme: str,
    frequencies: torch.Tensor,
    scaling: float,
    linspace_step: torch.Tensor | None = None,
    num_memory: int = 0,
    gate: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends in float64 for one query to a list of keys whose places in it are their slots.

    query (H, D) at `slot`; keys and values (S, K, D), none of them with a position; frequencies (D/2,) of RoPE. With a
    gate (H,), of which the first `num_memory` keys are memory; with sinks (H,), which join each softmax. Returns the
    output (H, D) and the weights (H, S).
    """
    groups = query.shape[0] // keys.shape[1]
    query, keys, values = query.double(), keys.double(), values.double()
    slots = torch.arange(len(keys), dtype=torch.float64)[:, None]
    half = query.shape[-1] // 2

    def placed(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotates states (S, heads, D) to positions (S, 1)."""
        angles = (positions * frequencies.double())[:, None]
        first, second = states[..., :half], states[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    position = torch.tensor([[float(slot)]], dtype=torch.float64)
    if scheme in ("rope", "xpos"):
        query, keys = placed(query[None], position)[0], placed(keys, slots)
    if scheme == "xpos":
        zeta = (2 * torch.arange(half, dtype=torch.float64) / (2 * half) + 0.4) / 1.4
        zeta = torch.cat((zeta, zeta))
        query, keys = query * zeta ** (slot / 512), keys * zeta ** (-slots[:, None] / 512)
    if scheme == "linspace":
        keys = keys + slots[:, None] * linspace_step.double()
    keys, values = (states.repeat_interleave(groups, dim=1).transpose(0, 1) for states in (keys, values))  # (H, S, D)
    scores = (keys @ query[..., None])[..., 0] * scaling
    sinks = None if sinks is None else sinks.double()
    weights = softmax(scores, sinks)
    if gate is not None:
        rest = softmax(scores[:, num_memory:], sinks)
        without = torch.cat((torch.zeros_like(scores[:, :num_memory]), rest), dim=-1)
        weights = gate.double()[:, None] * weights + (1 - gate.double()[:, None]) * without
    return (weights[:, None] @ values)[:, 0], weights
