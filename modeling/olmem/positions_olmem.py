# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Gives queries and keys their positions, by the angles of RoPE, rotations, and position schemes.

The D numbers of a head are laid out in one of two ways. In halves, as in Transformers' models, the numbers d and
d + D/2 are rotated together. In pairs, neighbours are rotated together, so that a rotation is one complex product.
Cached keys that are the values too are laid out in pairs, because they are rotated whenever they are read.

Shapes: B batch, H heads, T tokens, D head dim; R is B, or 1 where one row stands for all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compat_olmem import certain, has_complex, refuse_longer, table_of
from .configuration_olmem import OlmemConfig

XPOS_GAMMA, XPOS_BASE = 0.4, 512
LINSPACE_REACH = (
    0.1  # linspace adds 0 to a key at the beginning of its span, and this multiple of `linspace_scale` at the end
)


def inverse_frequencies(theta: float | torch.Tensor, size: int) -> torch.Tensor:
    """Returns theta^(−2d/D) (…, D/2) for a theta, or for thetas (…, 1), in float32 with the bits of Transformers."""
    device = theta.device if isinstance(theta, torch.Tensor) else None
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float, device=device) / size)


class OlmemRotaryEmbedding(nn.Module):
    """Computes the cosines and sines of positions in float32, for each layer type."""

    def __init__(self, config: OlmemConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.trained_length = max(config.max_position_embeddings, 1024)
        self.layer_types = sorted(set(config.layer_types))
        self.tables: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.rope_type = {name: config.rope_parameters[name]["rope_type"] for name in self.layer_types}
        for layer_type in self.layer_types:
            inverse_frequency, attention_scaling = self.frequencies(layer_type, device)
            self.register_buffer(f"{layer_type}_inv_freq", inverse_frequency, persistent=False)
            setattr(self, f"{layer_type}_attention_scaling", attention_scaling)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, seq_len=None, layer_type=None):
        """Returns inverse frequencies and scaling for the `rope_type` "default", as Transformers' RoPE functions do."""
        if stored := config.rope_parameters[layer_type].get("inverse_frequencies"):
            return torch.tensor(stored, dtype=torch.float, device=device), 1.0
        return inverse_frequencies(config.rope_parameters[layer_type]["rope_theta"], config.head_dim).to(device), 1.0

    def frequencies(self, layer_type: str, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies (D/2,) and the factor of cosines and sines, as Transformers defines them."""
        rope_functions = {**ROPE_INIT_FUNCTIONS, "default": self.compute_default_rope_parameters}
        return rope_functions[self.rope_type[layer_type]](self.config, device, layer_type=layer_type)

    def dynamic_frequencies(self, position: torch.Tensor, layer_type: str) -> torch.Tensor:
        """Returns the inverse frequencies (…, D/2) of the `rope_type` "dynamic" for positions (…, 1).

        They are those of a text that ends at the position. In Transformers all tokens of a call have the frequencies of
        its last token, so they depend on how a text is cut. Read token by token, they are the same as here.
        """
        rope, size = self.config.rope_parameters[layer_type], self.config.head_dim
        trained = self.config.max_position_embeddings
        length = (position + 1).clamp(min=trained)
        stretch = rope["factor"] * length / trained - (rope["factor"] - 1)
        theta = rope["rope_theta"] * stretch ** (size / (size - 2))
        return inverse_frequencies(theta, size)

    def frequencies_at(self, position: torch.Tensor, layer_type: str) -> torch.Tensor:
        """Returns the inverse frequencies (…, D/2) that positions (…, 1) are rotated by."""
        inverse_frequency = getattr(self, f"{layer_type}_inv_freq").to(position.device, torch.float)
        if self.rope_type[layer_type] != "dynamic":
            return inverse_frequency
        stretched = self.dynamic_frequencies(position, layer_type)
        return torch.where(position < self.config.max_position_embeddings, inverse_frequency, stretched)

    def factor(self, layer_type: str) -> float:
        """Returns what cosines and sines are multiplied by."""
        return getattr(self, f"{layer_type}_attention_scaling")

    def scaled(self, states: torch.Tensor, layer_type: str) -> torch.Tensor:
        """Returns cosines or sines multiplied by their factor."""
        factor = self.factor(layer_type)
        return states if factor == 1.0 else states * factor

    def angles(self, position_ids: torch.Tensor, layer_type: str, below: int | None = None) -> torch.Tensor:
        """Returns the angles (R, T, D/2) of positions (R, T) in float32.

        Up to the trained length they are the float32 products that the model was trained with. Beyond it, where such
        products would lose precision, they are computed from the exact integer in float64.

        Args:
            below: a number that all positions are below, if the caller knows one.
        """
        position = position_ids[..., None]
        inverse_frequency = self.frequencies_at(position, layer_type)
        angles = position.float() * inverse_frequency
        if below is None or not certain(below <= self.trained_length):
            wide = "cpu" if position.device.type == "mps" else position.device  # mps has no float64
            exact = (position.to(wide).double() * inverse_frequency.to(wide).double()).remainder(2 * math.pi)
            angles = torch.where(position < self.trained_length, angles, exact.to(angles))
        return angles

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str, below: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cosines and sines (R, T, D) of positions (R, T), on the device of `hidden_states`."""
        angles = self.angles(position_ids.to(hidden_states.device), layer_type, below)
        cos, sin = self.scaled(angles.cos(), layer_type), self.scaled(angles.sin(), layer_type)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    @torch.no_grad()
    def phases(self, position_ids: torch.Tensor, layer_type: str, below: int | None = None) -> torch.Tensor:
        """Returns the phases (R, T, D/2, 2) of positions (R, T), which are pairs of cosine and sine."""
        angles = self.angles(position_ids, layer_type, below)
        cos, sin = self.scaled(angles.cos(), layer_type), self.scaled(angles.sin(), layer_type)
        return torch.stack((cos, sin), dim=-1)

    def phases_of_slots(self, slots: torch.Tensor, layer_type: str, below: int) -> torch.Tensor:
        """Returns the phases (R, T, D/2, 2) of slots (R, T), which are below `below`, from a table that is kept."""

        def make() -> torch.Tensor:
            return self.phases(torch.arange(below, device=slots.device), layer_type, below)

        table = table_of(self.tables, (layer_type, slots.device), below, make)
        return self.phases(slots, layer_type, below) if table is None else table[slots]


# Rotations

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # rotates as `rotate` does


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE in float32 to states (B, H, T, D) in halves, by cosines and sines (R, T, D).

    The operations have the order of Transformers, so that results and gradients are the same bit for bit.
    """
    half = states.shape[-1] // 2
    straight = states * cos[:, None]
    rotated_half = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (straight + rotated_half * sin[:, None]).to(states.dtype)


def to_pairs(states: torch.Tensor) -> torch.Tensor:
    """Returns states (…, D), which are in halves, in pairs."""
    return states.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def to_halves(states: torch.Tensor) -> torch.Tensor:
    """Returns states (…, D), which are in pairs, in halves."""
    return states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def as_complex(states: torch.Tensor) -> torch.Tensor:
    """Views states (…, D) in pairs as complex numbers (…, D/2) in the same memory."""
    return torch.view_as_complex(states.unflatten(-1, (-1, 2)))


def rotate_pairs(states: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """Applies RoPE in float32 to states (B, H, T, D) in pairs, by phases (R, T, D/2, 2)."""
    phases = phases[:, None]
    if has_complex(states.device):
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return torch.view_as_real(as_complex(wide) * torch.view_as_complex(phases)).flatten(-2).to(states.dtype)
    (first, second), (cos, sin) = states.unflatten(-1, (-1, 2)).unbind(-1), phases.unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(states.dtype)


def rotary_clip(config: OlmemConfig) -> float | None:
    """Returns the number that rotated queries, keys and values are clipped to, or None where they are not clipped."""
    if config.clip_qkv is None or config.clip_qkv_stage != "rotary":
        return None
    return float(config.clip_qkv)


@dataclass
class Rotation:
    """Rotates states (B, H, T, D) by their positions, and then clips them.

    States in halves are rotated by cosines and sines, and states in pairs by phases. Without any of these they are not
    rotated.
    """

    cos: torch.Tensor | None = None  # (R, T, D)
    sin: torch.Tensor | None = None  # (R, T, D)
    phases: torch.Tensor | None = None  # (R, T, D/2, 2)
    clip: float | None = None  # the greatest absolute value; None clips nothing
    turn: Turn = rotate  # computes rotations of states in halves

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.phases is not None:
            states = rotate_pairs(states, self.phases)
        elif self.cos is not None and self.sin is not None:
            states = self.turn(states, self.cos, self.sin)
        return states if self.clip is None else states.clamp(-self.clip, self.clip)

    @property
    def length(self) -> int:
        """Returns the number of tokens T, or 0 if nothing is rotated."""
        states = self.phases if self.cos is None else self.cos
        return 0 if states is None else states.shape[1]

    def part(self, columns: slice, row: int | None = None) -> "Rotation":
        """Returns the rotation of some of the T tokens, or of one row of them if each row has its own."""
        states = [each if each is None else each[:, columns] for each in (self.cos, self.sin, self.phases)]
        if row is not None:
            states = [each[row : row + 1] if each is not None and len(each) > 1 else each for each in states]
        return replace(self, cos=states[0], sin=states[1], phases=states[2])

    def to(self, device: torch.device) -> "Rotation":
        """Returns a copy on another device."""
        states = [each if each is None else each.to(device) for each in (self.cos, self.sin, self.phases)]
        return replace(self, cos=states[0], sin=states[1], phases=states[2])


# Schemes, which change queries, keys and scores beside the rotation


class PositionScheme:
    """Changes nothing beside the rotation, as for RoPE and for no positions. It is the base of the other schemes.

    Args:
        scale: the layer's `linspace_scale` (D,), or None in a layer that has none.
        span: the number of tokens in the layer's window, or those that a full layer was trained with.
    """

    def __init__(self, scale: torch.Tensor | None = None, span: int = 1):
        self.scale, self.span = scale, span

    def refuse_far(self, length: int, dtype: torch.dtype) -> None:
        """Raises an error for so many queries at once that states of a dtype cannot have one base for all of them."""

    def place_query(self, query: torch.Tensor, offset: torch.Tensor, in_pairs: bool) -> torch.Tensor:
        """Returns queries (B, H, T, D) changed for their positions, as offsets (R, T) from any common base."""
        return query

    def place_key(self, key: torch.Tensor, offset: torch.Tensor, in_pairs: bool) -> torch.Tensor:
        """Returns keys (B, K, S, D) changed for their positions, as offsets (R, S) from the base of the queries."""
        return key

    def score_bias(self, query: torch.Tensor, shift: torch.Tensor, scaling: float) -> torch.Tensor | None:
        """Returns what to add to the scores (B, H, T, 1) of keys whose base is shifted by `shift` (R, T), or None."""
        return None


class XposScheme(PositionScheme):
    """Scales queries and keys so that scores decay with the distance (Sun et al., arXiv 2212.10554)."""

    def refuse_far(self, length, dtype):
        """Raises an error where the greatest scale, times states of a hundred, would leave the range of the dtype."""
        steepest = math.log((1 + XPOS_GAMMA) / XPOS_GAMMA)
        most = int(2 * XPOS_BASE * math.log(torch.finfo(dtype).max / 100) / steepest)
        refuse_longer(
            length,
            most,
            f"`input_ids` must hold at most {most} tokens for `position_embedding` 'xpos' in {dtype} in a graph of all "
            "tokens at once",
            "read longer texts in pieces with an OlmemCache, or without a graph.",
        )

    @staticmethod
    def powers(like: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Returns ζ^(distance/512) (R, T, D/2) of distances (R, T)."""
        size = like.shape[-1]
        zeta = (torch.arange(0, size, 2, device=like.device) / size + XPOS_GAMMA) / (1 + XPOS_GAMMA)
        return zeta ** (distance[..., None] / XPOS_BASE)

    def scaled(self, states: torch.Tensor, distance: torch.Tensor, in_pairs: bool) -> torch.Tensor:
        """Returns states (B, H, T, D) multiplied by the powers of distances (R, T)."""
        scale = self.powers(states, distance)
        scale = scale.repeat_interleave(2, dim=-1) if in_pairs else torch.cat((scale, scale), dim=-1)
        return states * scale[:, None].to(states.dtype)

    def place_query(self, query, offset, in_pairs):
        return self.scaled(query, offset, in_pairs)

    def place_key(self, key, offset, in_pairs):
        return self.scaled(key, -offset, in_pairs)


class LinspaceScheme(PositionScheme):
    """Adds a multiple of a learned vector to each key. The multiple grows evenly from 0 to 0.1 over the span."""

    def __init__(self, scale: torch.Tensor | None = None, span: int = 1):
        super().__init__(scale, span)
        assert scale is not None
        wide = scale.to(torch.promote_types(scale.dtype, torch.float32))
        self.step = wide * (LINSPACE_REACH / max(span - 1, 1))

    def place_key(self, key, offset, in_pairs):
        return (key + offset[:, None, :, None] * self.step).to(key.dtype)

    def score_bias(self, query, shift, scaling):
        bias = query.to(self.step.dtype) @ self.step[:, None] * shift[:, None, :, None] * scaling
        return bias.to(query.dtype)


# The scheme of each value of `position_embedding`, made for a layer when it attends.
SCHEMES: dict[str, Callable[[torch.Tensor | None, int], PositionScheme]] = {
    "rope": PositionScheme,
    "none": PositionScheme,
    "xpos": XposScheme,
    "linspace": LinspaceScheme,
}

__all__ = [
    "LINSPACE_REACH",
    "SCHEMES",
    "XPOS_BASE",
    "LinspaceScheme",
    "OlmemRotaryEmbedding",
    "PositionScheme",
    "Rotation",
    "XposScheme",
    "as_complex",
    "inverse_frequencies",
    "rotary_clip",
    "rotate",
    "rotate_pairs",
    "to_halves",
    "to_pairs",
]
