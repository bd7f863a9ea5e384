# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What a step by kernels needs to know of a layer: its sizes and choices, its weights, and where its state lies.

Shapes: B rows, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .configuration_olmem import OlmemConfig
from .ops_olmem import OlmemRMSNorm
from .positions_olmem import LINSPACE_REACH, XPOS_BASE
from .rules_olmem import ROTATING
from .visibility_olmem import Visibility

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
QK_NORMS = ("none", "full", "head")
RMS, LAYER, LAYER_PLAIN = range(3)
TOKENS, READS, WRITES = range(3)  # the roles of a step's rows: new tokens, memory that is read, memory to write


def norm_kind(norm: nn.Module) -> tuple[int, torch.Tensor | None, torch.Tensor | None, float]:
    """Returns the kind of a norm, its weight, its bias, and what is added to the mean of squares."""
    if isinstance(norm, OlmemRMSNorm):
        return RMS, norm.weight, None, norm.eps
    assert isinstance(norm, nn.LayerNorm)
    return (LAYER_PLAIN if norm.weight is None else LAYER), norm.weight, norm.bias, norm.eps


@dataclass(frozen=True)
class LayerShape:
    """Holds the sizes, choices and small weights of one layer's attention."""

    visibility: Visibility
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scaling: float
    offsets: tuple[int, int, int, int]  # where queries, keys and values begin among the projections, and their width
    qk_norm: int  # an index of QK_NORMS
    norm: tuple[int, *tuple[torch.Tensor | None, ...]]  # its kind, weight and bias for queries, the same for keys
    eps: tuple[float, float]  # of the norms of queries and of keys
    clip: float | None
    clips_rotated: bool
    one_tensor: bool  # values are the keys, kept once and without positions
    is_difference: bool  # values are queries minus keys
    rotates: bool
    rotary_factor: float  # of cosines and sines
    trained_length: int  # positions below have Transformers' float32 angles
    xpos_rate: float  # 1/512 with xpos, else 0
    linspace_scale: torch.Tensor | None  # (D,)
    linspace_step: float
    sink_logits: torch.Tensor | None  # (H,)
    memory_gate: torch.Tensor | None  # (H,) logits
    retrieval_gate: torch.Tensor | None  # (H,) logits
    top_k: int
    capacity: int  # tokens that may be retrieved
    store: int  # slots of the store's ring; 0 without retrieval

    @property
    def kind(self) -> int:
        """Returns the layer type as an index of KINDS."""
        return KINDS.index(self.visibility.layer_type)

    @property
    def window(self) -> int:
        """Returns the size of a sliding window or of a chunk."""
        return self.visibility.sliding_window or self.visibility.chunk_size


@dataclass(frozen=True)
class StepState:
    """Says where one layer's state lies for a step, or for the memory of R rows of a cache, M tokens each."""

    table: torch.Tensor  # (6,) addresses of keys and values and the slots of a head, then the same of the store
    seen: torch.Tensor  # (B,) the numbers of the new tokens; (R,) those of the tokens that come after memory
    frequencies: torch.Tensor | None  # (B, R · M or 1, D/2) inverse frequencies
    role: int = TOKENS
    rows: torch.Tensor | None = None  # (R,) the rows of the cache whose memory it is
    fresh: torch.Tensor | None = None  # (6,) as the table, of buffers for the keys and values of memory to write


class StepOperations(Protocol):
    """Computes a step's parts by kernels: what `Operations` computes, and attention with all that is around it."""

    def products(self, linears: Sequence[nn.Module], states: torch.Tensor) -> list[torch.Tensor]: ...

    def joined_products(self, linears: Sequence[nn.Module], states: torch.Tensor) -> torch.Tensor:
        """Returns the products of states (B, 1, in) with up to three weights side by side."""
        ...

    def norm(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor: ...

    def add_norm(
        self, residual: torch.Tensor, norm: nn.Module, states: torch.Tensor, dropout: nn.Module
    ) -> torch.Tensor: ...

    def gated(self, activation: nn.Module, gate: nn.Module, up: nn.Module, states: torch.Tensor) -> torch.Tensor: ...

    def compile(self, compute: Callable[[], object]) -> None:
        """Compiles all kernels that a function would launch, without launching them."""
        ...

    def attend(self, shape: LayerShape, state: StepState, projected: torch.Tensor) -> torch.Tensor:
        """Writes a new token's keys and values to a layer's state and attends from it, (B, 1, H · D)."""
        ...


@dataclass(frozen=True)
class StepPlan:
    """Holds all that layers of one kind need to know about a step by kernels."""

    visibility: Visibility
    operations: StepOperations
    rotary_factor: float  # of cosines and sines
    trained_length: int  # positions below have Transformers' float32 angles
    returns_weights: bool = False
    carries: int = 0


def layer_shape(
    config: OlmemConfig,
    layer_idx: int,
    plan: StepPlan,
    letters: Sequence[str],
    scaling: float,
    *,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    linspace_scale: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    memory_gate: torch.Tensor | None,
    retrieval_gate: torch.Tensor | None,
) -> LayerShape:
    """Returns what the kernels of a step need of a layer's attention.

    Args:
        letters: the projections that there are, of "q", "k" and "v", in the order in which they stand side by side.
        scaling: what scores are multiplied by.
        query_norm: the norm of queries, None where it is that of keys.
        sink_logits: the learned sinks (H,).
        memory_gate: the logits (H,) of the gate, as `retrieval_gate`.
    """
    visibility, position = plan.visibility, config.layer_position_embeddings[layer_idx]
    query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes, offsets, width = {"q": query_size, "k": key_size, "v": key_size}, {}, 0
    for letter in letters:
        offsets[letter], width = width, width + sizes[letter]
    kind, q_weight, q_bias, k_weight, k_bias, eps = 0, None, None, None, None, (0.0, 0.0)
    if key_norm is not None:
        kind, k_weight, k_bias, k_eps = norm_kind(key_norm)
        _, q_weight, q_bias, q_eps = norm_kind(query_norm or key_norm)
        eps = q_eps, k_eps
    capacity = config.retrieval_capacity if retrieval_gate is not None else 0
    return LayerShape(
        visibility=visibility,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scaling=scaling,
        offsets=(offsets.get("q", offsets["k"]), offsets["k"], offsets.get("v", offsets["k"]), width),
        qk_norm=QK_NORMS.index(config.qk_norm),
        norm=(kind, q_weight, q_bias, k_weight, k_bias),
        eps=eps,
        clip=config.clip_qkv,
        clips_rotated=config.clip_qkv_stage == "rotary",
        one_tensor=config.caches_one_tensor,
        is_difference=config.shared_projections == "value_difference",
        rotates=position in ROTATING,
        rotary_factor=plan.rotary_factor,
        trained_length=plan.trained_length,
        xpos_rate=1 / XPOS_BASE if position == "xpos" else 0.0,
        linspace_scale=linspace_scale,
        linspace_step=LINSPACE_REACH / max((visibility.span or config.max_position_embeddings) - 1, 1),
        sink_logits=sink_logits,
        memory_gate=memory_gate,
        retrieval_gate=retrieval_gate,
        top_k=config.retrieval_top_k,
        capacity=capacity,
        store=visibility.store_size(capacity) if capacity else 0,
    )


__all__ = [
    "KINDS",
    "LAYER",
    "LAYER_PLAIN",
    "QK_NORMS",
    "READS",
    "RMS",
    "TOKENS",
    "WRITES",
    "LayerShape",
    "StepOperations",
    "StepPlan",
    "StepState",
    "layer_shape",
    "norm_kind",
]
