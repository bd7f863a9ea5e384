# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What a layer computes around attention: norms, activations, products, and how they are put together.

`Operations` holds the plain forms, which are the definitions. `kernels_olmem` has a fused form of each for a GPU that
reads one token a row; a plan says which of the two a call uses.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .positions_olmem import rotate


class OlmemRMSNorm(nn.Module):
    """Divides by the root mean square and multiplies by a weight, in float32, then returns to the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return (self.weight * hidden_states).to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Elephant(nn.Module):
    """Computes 1 / (1 + |x|⁸), which is one near zero and nothing elsewhere (Lan and Mahmood, arXiv 2310.01365)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + hidden_states.pow(8))


class Operations:
    """Computes the parts of a layer in plain operations, by calling the modules that hold their weights.

    Shapes: R stands for any leading dimensions of rows.
    """

    def products(self, linears: Sequence[nn.Module], states: torch.Tensor) -> list[torch.Tensor]:
        """Returns the products of states (R, in) with several weights, (R, out) each."""
        return [linear(states) for linear in linears]

    def norm(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Returns the norm of states (R, width)."""
        return states if type(norm) is nn.Identity else norm(states)

    def add_norm(
        self, residual: torch.Tensor, norm: nn.Module, states: torch.Tensor, dropout: nn.Module
    ) -> torch.Tensor:
        """Returns a residual stream (R, width) with the norm of a sublayer's output (R, width) added to it."""
        normed = self.norm(norm, states)
        return residual + (dropout(normed) if dropout.training else normed)

    def gated(self, activation: nn.Module, gate: nn.Module, up: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Returns activation(gate(x)) · up(x) of states x (R, in), which is (R, out)."""
        return activation(gate(states)) * up(states)

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Returns states (B, H, T, D) rotated by cosines and sines (R, T, D)."""
        return rotate(states, cos, sin)

    def join_past(
        self, buffer: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        """Returns states in slots (R, P) of rows (R, 1) of a buffer (B, K, slots, D), then new ones (R, K, C, D)."""
        return torch.cat((buffer[rows, :, slots].transpose(1, 2), new), dim=2)

    def store(self, buffer: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Writes states (R, K, T, D) to slots (R, T) of rows (R, 1) of a buffer (B, K, slots, D); −1 is the last."""
        buffer[rows, :, slots] = states.transpose(1, 2)


PLAIN = Operations()

__all__ = ["PLAIN", "Elephant", "OlmemRMSNorm", "Operations"]
