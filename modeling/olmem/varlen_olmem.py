# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Attends in half precision on a GPU over sequences without padding, by torch's flash operations.

A window, which is a part of its own, is one call of the operation. So is the prefix (memory and sinks), whose scores
need a query with another rotation. Each call returns the log-sum-exp of its scores beside its output, and by these the
outputs are merged into that of one softmax. All of it is one autograd function: no gradient goes through a part's
log-sum-exp, since each part's backward takes the merged output and the merged log-sum-exp.

With a memory gate g the output is g · A + (1 − g) · R, where R is the attention over all but memory, and A that over
all. With a the share of memory in A, this is g · a · (memory alone) + c · R with c = g · (1 − a) + 1 − g, so the
backward pass needs each part once.

Learned sinks are scores without a key or a value. They join the window's part, after its operation.

Shapes: B batch, H query heads, K key/value heads, C columns of queries, S keys, D head dim; N queries that are tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .compat_olmem import can_attend_in_blocks, flash_backward, flash_forward, has_triton
from .contracts_olmem import Heads, Needs, Output, Part, Section, rotate_on_read
from .positions_olmem import to_halves
from .sequences_olmem import Sequences
from .view_olmem import View
from .windows_olmem import attend_in_blocks, is_in_blocks

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries (N, H, D), keys and values (S, K, D)
Result = tuple[torch.Tensor, torch.Tensor]  # an output (N, H, D) and the log-sum-exp (H, N) of its scores

# The definition of attention over sequences, in plain operations


def scores_of(query: torch.Tensor, key: torch.Tensor, sequences: Sequences, scaling: float) -> torch.Tensor:
    """Returns the scores (H, T, S) of one sequence's queries (T, H, D) and keys (S, K, D)."""
    length, count = len(query), len(key)
    scores = query.transpose(0, 1) @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).permute(1, 2, 0)
    place = torch.arange(length, device=query.device)[:, None] + count - length
    index = torch.arange(count, device=query.device)
    hidden = (index > place) & sequences.is_causal
    if sequences.before >= 0:
        hidden = hidden | (index < place - sequences.before)
    return (scores * scaling).masked_fill(hidden, -torch.inf)


def spans(sequences: Sequences) -> list[tuple[slice, slice]]:
    """Returns the queries and the keys of each sequence."""
    queries, keys = sequences.query_starts.tolist(), sequences.key_starts.tolist()
    bounds = zip(queries, queries[1:], keys, keys[1:], strict=False)
    return [(slice(*bound[:2]), slice(*bound[2:])) for bound in bounds]


def plain_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences, scaling: float
) -> Result:
    """Attends from queries (N, H, D) to keys and values (S, K, D) of the same sequence.

    Returns:
        The output (N, H, D), which is zero for a query without keys, and the log-sum-exp of its scores (H, N), then −∞.
    """
    output, total = torch.zeros_like(query), query.new_full((query.shape[1], len(query)), -torch.inf)
    groups = query.shape[1] // key.shape[1]
    for own, seen in spans(sequences):
        if seen.start == seen.stop:
            continue
        scores = scores_of(query[own], key[seen], sequences, scaling)
        values = value[seen].repeat_interleave(groups, dim=1).transpose(0, 1)
        output[own] = (scores.softmax(-1) @ values).transpose(0, 1)
        total[:, own] = scores.logsumexp(-1)
    return output, total


def plain_backward(
    gradient: torch.Tensor,
    inputs: Triple,
    output: torch.Tensor,
    total: torch.Tensor,
    sequences: Sequences,
    scaling: float,
) -> Triple:
    """Returns the gradients of queries, keys and values (see `attend_backward`)."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    of_query, of_key, of_value = (torch.zeros_like(each) for each in inputs)
    for own, seen in spans(sequences):
        if seen.start == seen.stop:
            continue
        weights = (scores_of(query[own], key[seen], sequences, scaling) - total[:, own, None]).exp()
        of_output = gradient[own].transpose(0, 1)
        keys, values = (each[seen].repeat_interleave(groups, dim=1).transpose(0, 1) for each in (key, value))
        shift = (gradient[own] * output[own]).sum(-1).T[..., None]
        of_scores = weights * (of_output @ values.transpose(1, 2) - shift) * scaling
        of_query[own] = (of_scores @ keys).transpose(0, 1)
        for total_of, each in ((of_key, of_scores.transpose(1, 2) @ query[own].transpose(0, 1)), (of_value, None)):
            found = weights.transpose(1, 2) @ of_output if each is None else each
            total_of[seen] += found.transpose(0, 1).unflatten(1, (-1, groups)).sum(2)
    return of_query, of_key, of_value


# Attention over sequences, by an operation where there is one


def attend_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences, scaling: float, trains: bool
) -> Result:
    """Computes `plain_forward`, on a GPU by its operation, whose log-sum-exp is in float32.

    Args:
        trains: whether the backward pass of the operation follows.
    """
    window = sequences.before + 1
    if not trains and can_attend_in_blocks(query, window) and is_in_blocks(query, key, sequences):
        return attend_in_blocks(query, key, value, window, scaling)
    if query.device.type != "cuda":
        return plain_forward(query, key, value, sequences, scaling)
    output, total = flash_forward(query, key, value, *arguments(sequences), scaling)
    return output, total.masked_fill(total == torch.inf, -torch.inf)  # the operation's number for "no keys"


def attend_backward(
    gradient: torch.Tensor,
    inputs: Triple,
    output: torch.Tensor,
    total: torch.Tensor,
    sequences: Sequences,
    scaling: float,
) -> Triple:
    """Returns the gradients of queries, keys and values of one part of attention.

    Args:
        gradient: that of the output (N, H, D).
        inputs: queries (N, H, D), keys and values (S, K, D).
        output: (N, H, D), of all parts that share a softmax.
        total: the log-sum-exp (H, N) of the scores of all these parts.
    """
    if gradient.device.type != "cuda":
        return plain_backward(gradient, inputs, output, total, sequences, scaling)
    return flash_backward(gradient, *inputs, output, total, *arguments(sequences), scaling)


def arguments(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, int, int, bool, int]:
    """Returns what an operation must know of sequences."""
    starts = sequences.query_starts, sequences.key_starts
    return *starts, sequences.most_queries, sequences.most_keys, sequences.is_causal, sequences.before


# Several parts under one softmax


def merge(
    results: Sequence[Result],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Merges the outputs (N, H, D) of parts by the log-sum-exps (H, N) of their scores.

    Returns:
        The output over all parts in float32 or better, the log-sum-exp of all scores, and the share (N, H, 1) of each
        part, which is zero where there is no key at all.
    """
    joined = torch.stack([total for _, total in results]).logsumexp(0)
    shares = [(total - joined).exp().nan_to_num(0.0).T[..., None] for _, total in results]
    wide = torch.promote_types(results[0][0].dtype, torch.float32)
    output = shares[0] * results[0][0].to(wide)
    for share, (each, _) in zip(shares[1:], results[1:], strict=True):
        output = output + share * each
    return output, joined, shares


def with_sinks(result: Result, sink_logits: torch.Tensor) -> Result:
    """Returns the output (N, H, D), in float32 or better, and the log-sum-exp (H, N) of a part with sinks (H,)."""
    output, total = result
    joined = torch.logaddexp(total, sink_logits[:, None].to(total.dtype))
    return output * (total - joined).exp().T[..., None].to(torch.promote_types(output.dtype, torch.float32)), joined


def gradient_of_sinks(
    gradient: torch.Tensor, output: torch.Tensor, total: torch.Tensor, sink_logits: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of sinks (H,), from what `attend_backward` takes for the part that they are in."""
    weights = (sink_logits[:, None].to(total.dtype) - total).exp()
    shift = (gradient.to(total.dtype) * output.to(total.dtype)).sum(-1).T
    return -(weights * shift).sum(1).to(sink_logits.dtype)


def merge_results(results: Sequence[Result]) -> Result:
    """Returns the output over all parts in the dtype of theirs, and the log-sum-exp of all scores."""
    if results[0][0].is_cuda and len(results) == 2 and has_triton():
        from .fused_olmem import merge_two  # whose kernels are imported where they run

        return merge_two(*results)
    output, total, _ = merge(results)
    return output.to(results[0][0].dtype), total


class AttendParts(torch.autograd.Function):
    """Attends to one part after another, under one softmax, or with a memory gate."""

    @staticmethod
    def forward(
        ctx: Any,
        scaling: float,
        sequences: Sequence[Sequences],
        gate: torch.Tensor | None,
        sink_logits: torch.Tensor | None,
        *states,
    ):
        """Returns the output (N, H, D).

        Args:
            sequences: those of each part.
            gate: the share (H,) of attention with the first part, which is memory then; or None.
            sink_logits: learned sinks (H,), or None.
            states: queries, keys and values of each part in turns, as `attend_forward` takes them.
        """
        triples = zip(states[0::3], states[1::3], states[2::3], strict=True)
        trains = any(ctx.needs_input_grad)
        results = [attend_forward(*each, some, scaling, trains) for each, some in zip(triples, sequences, strict=True)]
        if sink_logits is not None:
            results[-1] = with_sinks(results[-1], sink_logits)
        kept: tuple[torch.Tensor, ...]
        if len(results) == 1:
            output, total = results[0][0].to(states[0].dtype), results[0][1]
            kept = output, total
        elif gate is None:
            kept = output, total = merge_results(results)
        else:
            memory, rest = results[0], results[1]
            if len(results) > 2:
                rest = merge_results(results[1:])
            whole, _, (share, others) = merge((memory, rest))
            part = gate[:, None].to(whole.dtype)
            output = (part * whole + (1 - part) * rest[0]).to(states[0].dtype)
            kept = memory[0], memory[1], rest[0], rest[1], whole, share, others, gate
        ctx.save_for_backward(*states, sink_logits, *kept)
        ctx.scaling, ctx.sequences, ctx.gated = scaling, sequences, gate is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]  by its decorator
        """Returns the gradients of the gate, of the sinks and of all states."""
        count, (gradient,), saved = (
            3 * len(ctx.sequences),
            gradients,
            ctx.saved_tensors,
        )  # checkpoints allow one reading
        states, sink_logits, kept = saved[:count], saved[count], saved[count + 1 :]
        triples = [*zip(states[0::3], states[1::3], states[2::3], strict=True)]
        of_gate, of_sinks, dtype = None, None, states[0].dtype
        if not ctx.gated:
            asked = [(gradient, *kept)] * len(triples)
        else:
            memory, of_memory, rest, of_rest, whole, share, others, gate = kept
            part = gate[:, None].to(whole.dtype)
            of_gate = (gradient * (whole - rest)).sum((0, 2)).to(gate.dtype)
            factor = part * others + 1 - part
            # What the backward of the rest takes for its output, so that its shift of the scores is right.
            bent = rest - (part * share * others / factor.clamp(min=torch.finfo(factor.dtype).tiny)) * (rest - memory)
            asked = [((part * share * gradient).to(dtype), whole.to(dtype), of_memory)]
            asked += [((factor * gradient).to(dtype), bent.to(dtype), of_rest)] * (len(triples) - 1)
        if sink_logits is not None:
            of_sinks = gradient_of_sinks(asked[-1][0], asked[-1][1], asked[-1][2], sink_logits)
        found = []
        for each, triple, sequences in zip(asked, triples, ctx.sequences, strict=True):
            found += attend_backward(each[0], triple, each[1], each[2], sequences, ctx.scaling)
        return None, None, of_gate, of_sinks, *found


class Repeated(torch.autograd.Function):
    """Takes states by indices that repeat some of them, and adds up their gradients in float32 or better."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, indices: torch.Tensor):
        """Returns the states (M, heads, D) that the indices (M,) of states (S, heads, D) name."""
        ctx.save_for_backward(indices)
        ctx.count = len(states)
        return states.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]  by its decorator
        """Returns the gradient of the states."""
        (gradient,), (indices,) = gradients, ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = wide.new_zeros(ctx.count, *gradient.shape[1:]).index_add_(0, indices, wide)
        return total.to(gradient.dtype), None


# The backend


def in_rows(states: torch.Tensor) -> torch.Tensor:
    """Returns states (B, heads, T, D) as one list (B · T, heads, D)."""
    return states.transpose(1, 2).flatten(0, 1)


def packed(states: torch.Tensor, indices: torch.Tensor | None, repeats: bool = False) -> torch.Tensor:
    """Returns those of the states (B, heads, T, D) that indices (M,) among B · T name, as a list (M, heads, D)."""
    listed = in_rows(states)
    if indices is None:
        return listed
    return Repeated.apply(listed, indices) if repeats else listed.index_select(0, indices)  # pyright: ignore


class Varlen:
    """Attends over sequences without padding, in half precision on a GPU."""

    def supports(self, view: View, needs: Needs) -> bool:
        """Supports all but steps, where the plan found that a flash operation can attend.

        What one causal call of torch's attention covers is left to it, since that is faster. With learned sinks that
        call cannot be used.
        """
        if not needs.flash or needs.plain or needs.by_slot or view.is_step or view.role == "read":
            return False
        return view.prefix or not view.causal or view.documents is not None or needs.sink_logits

    def attend(self, heads: Heads, query: torch.Tensor, parts: Sequence[Part], section: Section) -> Output:
        """Attends as `Backend.attend` does."""
        view, window = section.view, parts[-1]
        batch, num_heads, length, size = query.shape
        layout = view.layout(batch)
        indices = layout.queries.indices
        whole = None if indices is None else query.new_zeros(batch * length, num_heads, size)
        if whole is not None and indices is not None and not len(indices):
            return whole.view(batch, length, num_heads, size), None
        seen = [(window, layout.window())]
        gate = heads.memory_gate if view.prefix else None
        if view.prefix:
            prefix, memory = parts[0], view.visibility.num_memory
            if view.documents is not None:
                prefix = replace(window, is_prefix=True)
            cuts = [0, view.visibility.num_prefix] if gate is None else [0, memory, view.visibility.num_prefix]
            slots = [bounds for bounds in pairwise(cuts) if bounds[0] < bounds[1]]
            seen = [*((prefix, layout.prefix(some)) for some in slots), *seen]
        states: list[torch.Tensor] = []
        for part, sequences in seen:
            turned, key = rotate_on_read(query, part, section.rotations)
            states.append(packed(turned, indices))
            states += [packed(each, sequences.keys, sequences.repeats) for each in (key, part.value)]
        sink_logits = heads.sink_logits
        if sink_logits is not None and not torch.is_grad_enabled():
            sink_logits = sink_logits.detach()  # a parameter asks for gradients also where nothing is recorded
        given = heads.scaling, [some for _, some in seen], gate, sink_logits
        output: torch.Tensor = AttendParts.apply(*given, *states)  # type: ignore
        if whole is not None and indices is not None:
            output = whole.index_copy(0, indices, output)
        output = output.view(batch, length, num_heads, size)
        return to_halves(output) if window.in_pairs else output, None


__all__ = ["AttendParts", "Varlen", "attend_backward", "attend_forward", "merge", "plain_backward", "plain_forward"]
