"""The parts that the forward passes of native models are made of, read anew in plain torch: the oracle of the
converter's verification.

Each family has a file of its own: `olmo_forward`, `olmo_core_forward` and `baka_forward`. Nothing is shared with the
converter, so that a mistake on either side shows. Every config field is computed, known to leave the logits alone, or
refused: none is skipped.

A forward pass yields ('embeddings', [B, T, E]), ('block 0', [B, T, E]), ..., ('final norm', [B, T, E]) and
('logits', [B, T, V]). Its config is checked at once, before any weight is read. Tensors are indexed by native name, one
at a time, each once: only tied embeddings are read again for the head, since holding them would cost more than a block.

Shapes: B batch, T queries, E model width, H query heads, K key-value heads, D head width, V vocabulary rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError

Stages = Iterator[tuple[str, Tensor]]


class Forward(Protocol):
    """The forward pass of a checkpoint, whose config it knows."""

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        input_ids: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        trained_length: int = 0,
    ) -> Stages:
        """Yields the stages, computed in `dtype`.

        Native code rounds the angle of every position to float32, by up to 5e-4 at position 16,384. That error is no
        part of a model, so angles are exact from `trained_length` on, and the native ones, bit for bit, before it and
        before position 1024.
        """
        ...


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the last dimension; no bias without weight."""

    rms: bool
    eps: float
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Weights:
    """Reads one tensor at a time, in the precision of the forward pass, and keeps none; says where angles are exact."""

    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    exact_from: int  # the first position whose angles are not rounded

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], input_ids: Tensor, dtype: torch.dtype, trained_length: int) -> "Weights":
        """The tensors, for the forward pass of these ids."""
        return cls(tensors, input_ids.device, dtype, max(trained_length, 1024))

    def read(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have this shape."""
        try:
            tensor = self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"`{name}` must be in the checkpoint (got no such tensor); check the config"
            ) from None
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"`{name}` must have shape {shape} (got {tuple(tensor.shape)}); check the config")
        return tensor.to(self.device, self.dtype)

    def linear(self, name: str, x: Tensor, width: int, bias: bool) -> Tensor:
        """[..., input width] to [..., width]."""
        weight = self.read(f"{name}.weight", width, x.shape[-1])
        return F.linear(x, weight, self.read(f"{name}.bias", width) if bias else None)

    def norm(self, name: str, x: Tensor, norm: Norm) -> Tensor:
        """[..., width] to the same shape."""
        width = x.shape[-1]
        weight = self.read(f"{name}.weight", width) if norm.weight else None
        bias = self.read(f"{name}.bias", width) if norm.weight and norm.bias else None
        if not norm.rms:
            return F.layer_norm(x, (width,), weight, bias, norm.eps)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        x = x if weight is None else weight * x
        return x if bias is None else x + bias


def inverse_frequencies(theta: float, head_dim: int, like: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): theta^(-2i/D) for i < D/2, in the precision of `like`; returns [D/2]."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=like.dtype) / head_dim
    return 1.0 / theta**exponents


def cosines_and_sines(length: int, frequencies: Tensor, exact_from: int) -> tuple[Tensor, Tensor]:
    """Of positions 0 to T-1 and frequencies [D], both [T, 1, D]; from float64 angles at positions from `exact_from`."""
    positions = torch.arange(length, device=frequencies.device)
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    if length > exact_from:
        angles = torch.outer(positions[exact_from:].double(), frequencies.double())[:, None, :]
        cos[exact_from:], sin[exact_from:] = angles.cos(), angles.sin()
    return cos, sin


def rotate(x: Tensor, frequencies: Tensor, exact_from: int, factor: float = 1.0) -> Tensor:
    """RoPE on x [B, T, H or K, D]: dimension i turns with i + D/2; `factor` scales cos and sin (YaRN)."""
    cos, sin = cosines_and_sines(x.shape[1], frequencies.repeat(2), exact_from)
    first, second = x.chunk(2, dim=-1)
    return x * (cos * factor) + torch.cat((-second, first), dim=-1) * (sin * factor)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """q [B, T, H, D] over k and v [B, T, K, D], scale 1/sqrt(D); returns [B, T, H * D].

    With a window W, query i sees the keys i-W+1 to i. For grouped queries native code too repeats k and v.
    """
    batch, length, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1) for x in (q, k, v))
    mask = None
    if window is not None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).reshape(batch, length, -1)


REQUIRED, IGNORED = object(), object()


def read_fields(where: str, given: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config dict `given`, found at `where`, with absent and null ones replaced by native defaults.

    `schema` maps a field to its default, to a tuple of the values that this file computes (the default first), to
    REQUIRED, or to IGNORED where the logits do not depend on it. Any other field switches something on: it must be off.
    """
    if not isinstance(given, Mapping):
        raise CheckpointError(f"`{where}` must be a dict (got {given!r}); pass the checkpoint's own config")
    defaults = {name: rule[0] if isinstance(rule, tuple) else rule for name, rule in schema.items()}
    fields = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    for name, value in fields.items():
        if value is REQUIRED:
            raise CheckpointError(f"`{where}.{name}` must be set (got nothing); pass the checkpoint's own config")
        rule = IGNORED if name.startswith("_") else schema.get(name, (None, False))  # such as `_CLASS_`
        if isinstance(rule, tuple) and value not in rule:
            allowed = " or ".join(map(repr, rule))
            raise CheckpointError(
                f"`{where}.{name}` must be {allowed} (got {value!r}); compare with the native package"
            )
    return fields
