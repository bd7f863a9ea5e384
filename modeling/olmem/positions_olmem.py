# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""How positions are told: rotations (RoPE), and how xpos scales them.

Two layouts of a head's D numbers: in halves, as Transformers' models have them, the pair that is rotated together being
d and d + D/2; and side by side, for a rotation to be one complex product, which keys have that are values too.

Shapes: B batch, H query heads, T queries, D head dim; R is B, or 1 where one row stands for all.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_olmem import OlmemConfig

XPOS_GAMMA, XPOS_BASE = 0.4, 512

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


def inverse_frequencies(theta: float | torch.Tensor, size: int) -> torch.Tensor:
    """theta^(−2d/D) (…, D/2) of a theta, or of thetas (…, 1), in float32, to the bit as Transformers computes them."""
    device = theta.device if isinstance(theta, torch.Tensor) else None
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float, device=device) / size)


class OlmemRotaryEmbedding(nn.Module):
    """Cosines and sines (B, T, D) in float32 of positions, by layer type."""

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
        if stored := config.rope_parameters[layer_type].get("inverse_frequencies"):
            return torch.tensor(stored, dtype=torch.float, device=device), 1.0
        return inverse_frequencies(config.rope_parameters[layer_type]["rope_theta"], config.head_dim).to(device), 1.0

    def frequencies(self, layer_type: str, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (D/2,) and the factor of cosines and sines, as Transformers defines each `rope_type`."""
        rope_functions = {**ROPE_INIT_FUNCTIONS, "default": self.compute_default_rope_parameters}
        return rope_functions[self.rope_type[layer_type]](self.config, device, layer_type=layer_type)

    def dynamic_frequencies(self, position: torch.Tensor, layer_type: str) -> torch.Tensor:
        """Inverse frequencies (…, D/2) of `rope_type` "dynamic" at positions (…, 1): those of a text that ends there.

        Transformers gives all tokens of a call those of its last one, so that they depend on how a text is cut; read
        token by token, its are these.
        """
        rope, size = self.config.rope_parameters[layer_type], self.config.head_dim
        trained = self.config.max_position_embeddings
        length = (position + 1).clamp(min=trained)
        stretch = rope["factor"] * length / trained - (rope["factor"] - 1)
        theta = rope["rope_theta"] * stretch ** (size / (size - 2))
        return inverse_frequencies(theta, size)

    def angles(self, position_ids: torch.Tensor, layer_type: str, below: int | None = None) -> torch.Tensor:
        """(B, T, D/2) in float32 of positions (B, T), of which the caller may know that they are `below` something."""
        position = position_ids[..., None]
        inverse_frequency = getattr(self, f"{layer_type}_inv_freq").to(position.device, torch.float)
        if self.rope_type[layer_type] == "dynamic":
            stretched = self.dynamic_frequencies(position, layer_type)
            inverse_frequency = torch.where(
                position < self.config.max_position_embeddings, inverse_frequency, stretched
            )
        # Where the model was trained, the very angles that it was trained with. Beyond, where a float32 product would
        # round them more and more, from the exact integer.
        angles = position.float() * inverse_frequency
        if below is None or below > self.trained_length:
            wide = "cpu" if position.device.type == "mps" else position.device  # mps has no float64
            exact = (position.to(wide).double() * inverse_frequency.to(wide).double()).remainder(2 * math.pi)
            angles = torch.where(position < self.trained_length, angles, exact.to(angles))
        return angles

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str, below: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = self.angles(position_ids.to(hidden_states.device), layer_type, below)
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    @torch.no_grad()
    def phases(self, position_ids: torch.Tensor, layer_type: str, below: int | None = None) -> torch.Tensor:
        """Cosines and sines side by side (B, T, D/2, 2)."""
        angles = self.angles(position_ids, layer_type, below)
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        return torch.stack((angles.cos() * scaling, angles.sin() * scaling), dim=-1)

    def phases_of_slots(self, slots: torch.Tensor, layer_type: str, below: int) -> torch.Tensor:
        """`phases`, from a table of all slots."""
        if torch.compiler.is_compiling():
            return self.phases(slots, layer_type, below)
        place = (layer_type, slots.device)
        if place not in self.tables or len(self.tables[place]) < below:
            self.tables[place] = self.phases(torch.arange(below, device=slots.device), layer_type, below)
        return self.tables[place][slots]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE to states (B, H, T, D), halves paired as in Transformers; the product is in float32.

    The operations and their order are Transformers', so that gradients too are the same bit for bit.
    """
    half = states.shape[-1] // 2
    straight = states * cos[:, None]
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (straight + turned * sin[:, None]).to(states.dtype)


def side_by_side(states: torch.Tensor) -> torch.Tensor:
    """States (…, D) with the two numbers of each rotation, d and d + D/2, as neighbours."""
    return states.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def in_halves(states: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def has_complex(device: torch.device) -> bool:
    """Whether complex products are there, and fast; a compiler fuses real ones."""
    return device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def as_complex(states: torch.Tensor) -> torch.Tensor:
    """States (…, D) that are `side_by_side` as (…, D/2), the same memory."""
    return torch.view_as_complex(states.unflatten(-1, (-1, 2)))


def as_phases(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Cosines and sines (R, T, D) side by side, (R, T, D/2, 2): of each pair, the two numbers of its complex factor."""
    half = cos.shape[-1] // 2
    return torch.stack((cos[..., :half], sin[..., :half]), dim=-1)


def rotate_pairs(states: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """`rotate` for states (B, H, T, D) that are `side_by_side`, by phases (R, T, D/2, 2)."""
    phases = phases[:, None]
    if has_complex(states.device):
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return torch.view_as_real(as_complex(wide) * torch.view_as_complex(phases)).flatten(-2).to(states.dtype)
    (first, second), (cos, sin) = states.unflatten(-1, (-1, 2)).unbind(-1), phases.unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(states.dtype)


def rotate_side_by_side(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` for states (B, H, T, D) that are `side_by_side`."""
    return rotate_pairs(states, as_phases(cos, sin))


def xpos_powers(like: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """ζ^(distance/512) (R, T, D/2) of distances (R, T): xpos multiplies queries by that of their position, and keys by
    its inverse (Sun et al., arXiv 2212.10554)."""
    size = like.shape[-1]
    zeta = (torch.arange(0, size, 2, device=like.device) / size + XPOS_GAMMA) / (1 + XPOS_GAMMA)
    return zeta ** (distance[..., None] / XPOS_BASE)


def xpos_scale(like: torch.Tensor, distance: torch.Tensor, turn: Callable) -> torch.Tensor:
    """The same for states (B, H, T, D), (R, 1, T, D) in the order of dimensions of `turn`."""
    scale = xpos_powers(like, distance)
    scale = scale.repeat_interleave(2, dim=-1) if turn is rotate_side_by_side else torch.cat((scale, scale), dim=-1)
    return scale[:, None].to(like.dtype)


__all__ = [
    "OlmemRotaryEmbedding",
    "Rotation",
    "as_complex",
    "as_phases",
    "has_complex",
    "in_halves",
    "inverse_frequencies",
    "rotate",
    "rotate_pairs",
    "rotate_side_by_side",
    "side_by_side",
    "xpos_powers",
    "xpos_scale",
]
