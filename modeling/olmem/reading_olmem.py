# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Reads the embeddings of one forward call as the next tokens of a stream, whose past is in a cache.

The tokens are numbered, and cut into calls of the layers: the segments of memory, or the pieces of a long input. The
real tokens of all rows are listed as one row where the backends can attend to that. Each call is planned before the
layers run.

Shapes: B batch, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from .backends_olmem import BACKENDS
from .cache_olmem import OlmemCache
from .captured_olmem import Captured
from .compat_olmem import (
    can_flash,
    can_fuse_operations,
    is_cut,
    is_sharded,
    moves_inputs,
    recomputes_hooks,
    refuse_uneven,
    warn_once,
    without_graph,
)
from .configuration_olmem import OlmemConfig
from .contracts_olmem import LayerState, Plan
from .fallback_olmem import Implementation
from .inputs_olmem import (
    Embeddings,
    Packing,
    Tokens,
    number_tokens,
    refuse_malformed_embeddings,
    refuse_malformed_ids,
)
from .ops_olmem import PLAIN, Operations
from .plan_olmem import Planner
from .positions_olmem import OlmemRotaryEmbedding
from .segments_olmem import OlmemMemory, Schedule, pack_documents, unpack_documents
from .varlen_olmem import Varlen

ALL = slice(None)
PIECE = 8192  # the most tokens of a row that the layers read at once where no gradients are wanted
WAYS = [Varlen(), *BACKENDS]  # to attend, in the order in which they are asked

Read = tuple[torch.Tensor, list[torch.Tensor]]  # the last hidden states (B, T, hidden_size), and those that are wanted


def fused_operations() -> Operations:
    """Returns what computes in half precision on a GPU, whose kernels are imported where they run."""
    from .fused_olmem import FusedOperations

    return FusedOperations()


class RunLayers(Protocol):
    """Passes hidden states through all layers of a model, as `OlmemModel.run_layers` does."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        plans: Sequence[Plan],
        states: Sequence[LayerState],
        captured: Captured,
        earlier: Sequence[Sequence[torch.Tensor]] = (),
    ) -> torch.Tensor:
        """Returns the hidden states (B, C, hidden_size) after the last layer."""
        ...


@dataclass
class Reader:
    """Reads the input of one forward call.

    Attributes:
        config: the model's configuration.
        rotary: the model's rotary embedding.
        memory: the model's memory, or None.
        layers: the model's layers, whose wrappers decide how often they may be called. `run_layers` calls them.
        run_layers: passes hidden states through all layers.
        training: whether the model is in training.
    """

    config: OlmemConfig
    rotary: OlmemRotaryEmbedding
    memory: OlmemMemory | None
    layers: nn.ModuleList
    run_layers: RunLayers
    training: bool

    @without_graph(
        "for a step to be a whole graph, `num_memory_tokens` must be 0, and `max_length` given to the OlmemCache of a "
        "model with full attention; leave fullgraph out.",
        when=lambda self, embeddings, mask, position_ids, cache, *_: self.host_counts(cache),
    )
    def read(
        self,
        embeddings: Embeddings,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: OlmemCache | None,
        captured: Captured,
        output_attentions: bool,
        last_columns: int,
    ) -> Read:
        """Reads embeddings (B, T, hidden_size).

        Returns the last hidden states (B, T, hidden_size), and the list of those that `captured` wants. Both may hold
        the last columns alone, if no more than `last_columns` are wanted; 0 stands for all.
        """
        if output_attentions and self.memory is not None:
            raise ValueError(
                f"{self.config.memory_rule} to return attentions, whose columns stand for tokens; leave "
                "`output_attentions` out."
            )
        if cache is not None:
            cache.check(self.config)
            cache.begin(embeddings.shape[0], embeddings.device)
        counters = None if cache is None else cache.counters
        has_prefix = self.memory is not None or self.config.num_sink_tokens > 0
        inputs = embeddings, attention_mask, position_ids, counters
        tokens = number_tokens(*inputs, has_memory=self.config.has_memory, has_prefix=has_prefix)
        planner = self.planner(embeddings, output_attentions)
        if tokens.documents is None or self.memory is None:
            return self.read_tokens(tokens, embeddings, cache, planner, captured, last_columns)
        packed, found = unpack_documents(tokens, embeddings.some(ALL)), []
        for each in packed:
            given = Embeddings(each.embeddings)
            last, stages = self.run(self.schedule(each.tokens, given, None, planner), planner, captured)
            found.append([last, *stages])
        last, *stages = pack_documents(packed, found, embeddings.some(ALL))
        return last, stages

    def host_counts(self, cache: OlmemCache | None) -> bool:
        """Tells whether a call that goes on from a cache needs the host to count, for memory or for more room."""
        return cache is not None and not cache.fresh and (self.memory is not None or cache.grows)

    def planner(self, embeddings: Embeddings, weights: bool) -> Planner:
        """Returns what plans the calls for embeddings of this kind, with attention weights if they are wanted."""
        implementation, device, dtype = Implementation.of(self.config), embeddings.device, embeddings.dtype
        is_plain = implementation.is_plain
        if weights and not is_plain:
            warn_once(
                f"`output_attentions` gives no attentions with `attn_implementation` {implementation.name!r}, which "
                'computes none; call `model.set_attn_implementation("eager")` for them.'
            )
        on_gpu = can_flash(device, dtype, self.config.head_dim)
        flash = on_gpu and not (self.training and self.config.attention_dropout)
        is_fused = on_gpu and not is_plain and can_fuse_operations(device, dtype)
        operations = fused_operations() if is_fused else PLAIN
        return Planner(self.config, self.rotary, WAYS, operations, is_plain, weights, flash)

    def read_tokens(
        self,
        tokens: Tokens,
        embeddings: Embeddings,
        cache: OlmemCache | None,
        planner: Planner,
        captured: Captured,
        last_columns: int,
    ) -> Read:
        """Reads tokens that are numbered, in pieces if they are many, and without their padding where that can be.

        Where no gradients are wanted, pieces go on from one another by a cache, which is made if there is none.
        """
        (batch, length), piece, packing, kept = embeddings.shape, None, None, None
        may_pack = planner.flash and not planner.plain and self.memory is None and tokens.documents is None
        may_pack = may_pack and length > 1
        if self.reads_in_pieces(embeddings, may_pack) and tokens.position_ids is None and not planner.weights:
            piece = PIECE
            kept = range(max(length - last_columns, 0), length) if last_columns else None
            if cache is None:
                cache = OlmemCache(self.config)
                cache.begin(batch, embeddings.device)
        if may_pack and (tokens.padded or (batch > 1 and piece is not None)):
            if cache is None:
                packing = Packing(tokens, embeddings.shape, None, last_columns)
            elif not torch.is_grad_enabled() and all(kind.can_be_listed for kind in planner.kinds):
                packing = Packing(tokens, embeddings.shape, cache.counters.read_seen(), last_columns)
        if packing is None or not packing.length:
            schedule = self.schedule(tokens, embeddings, cache, planner, piece, kept)
            return self.run(schedule, planner, captured)
        tokens, embeddings, kept = packing.tokens, embeddings.packed(packing), packing.kept()
        schedule = self.schedule(tokens, embeddings, cache, planner, piece, kept, length)
        last, stages = self.run(schedule, planner, captured)
        if cache is not None:
            cache.counters.note_gaps(packing.gaps)
        return packing.unpack(last), [packing.unpack(stage) for stage in stages]

    def reads_in_pieces(self, embeddings: Embeddings | torch.Tensor, is_packed: bool = False) -> bool:
        """Tells whether an input is so long that the layers read it in pieces, without gradients.

        On a CPU a full layer reads a whole input faster, and with the bits of Transformers. Ranks that share sharded
        layers must call them equally often.
        """
        batch, length = embeddings.shape
        if torch.is_grad_enabled() or not is_cut(batch * length if is_packed else length, PIECE):
            return False
        if is_sharded(self.layers[0]):
            return False
        return is_packed or embeddings.device.type != "cpu" or "full_attention" not in self.config.layer_types

    def schedule(
        self,
        tokens: Tokens,
        embeddings: Embeddings,
        cache: OlmemCache | None,
        planner: Planner,
        piece: int | None = None,
        kept: Sequence[int] | None = None,
        columns: int | None = None,
    ) -> Schedule:
        """Returns the schedule of a forward call."""
        given = tokens, embeddings, piece, kept, columns
        return Schedule(self.config, planner.kinds, self.memory, cache, *given)

    def run(self, schedule: Schedule, planner: Planner, captured: Captured) -> Read:
        """Runs all calls of a schedule.

        At the end of a segment its call also holds M write tokens. `leave` takes their last hidden states, through the
        norm of memory, as the memory that the next call reads. If a segment ends with the forward, its memory is
        written when the next segment begins.
        """
        if self.memory is not None:
            refuse_uneven(self.layers[0], len(schedule.pieces), schedule.device)
        for call in schedule.calls():
            plans, of_call = planner.plans(call), Captured(captured.wanted)
            of_layers = [plans[kind] for kind in planner.kinds]
            earlier = [schedule.inputs(index, call) for index in range(len(of_layers))] if schedule.carried else ()
            last = self.run_layers(schedule.enter(call), of_layers, schedule.states, of_call, earlier)
            schedule.leave(call, of_layers[0], [*of_call.hidden_states, last], of_call.states)
            captured.attentions += of_call.attentions
        *stages, last = schedule.result()
        return schedule.tie_norm(last), stages

    def embeddings(
        self, embed: nn.Embedding, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, later: bool
    ) -> Embeddings:
        """Returns the embeddings of ids (B, T), or those that are given.

        Args:
            embed: the model's embeddings.
            later: whether a long input may be embedded a piece at a time, while it is read.
        """
        if (input_ids is None) == (inputs_embeds is None):  # in the words of Transformers
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is not None:
            refuse_malformed_embeddings(inputs_embeds, self.config.hidden_size)
            return Embeddings(inputs_embeds)
        refuse_malformed_ids(input_ids, embed.weight.device, moves_inputs(embed))
        assert input_ids is not None
        if later and input_ids.dim() == 2 and self.reads_in_pieces(input_ids, is_packed=True):
            return Embeddings(input_ids, embed)
        return Embeddings(embed(input_ids))


def refuse_beside_checkpoints(layer: nn.Module, memory: OlmemMemory | None, cache: Cache | None) -> None:
    """Raises an error for what gradient checkpointing cannot do, because it computes a layer twice."""
    if memory is not None and recomputes_hooks(layer):
        raise ValueError(
            "`use_reentrant` must be False with `fully_shard` and memory tokens in this release of Transformers "
            '(got True); pass `gradient_checkpointing_kwargs={"use_reentrant": False}`, or take a newer release.'
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "`past_key_values` must be empty or left out in training with gradient checkpointing, which computes a "
            f"layer twice (got a cache of {cache.get_seq_length()} columns); turn it off, or leave the cache out."
        )


__all__ = ["Reader", "refuse_beside_checkpoints"]
