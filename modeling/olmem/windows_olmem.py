# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Attends over a sliding window by two causal calls a block, which a GPU computes twice as fast as a window's mask.

Queries are cut into blocks of the window's size W. A query i of a block sees its own block's keys up to its own one,
which is a causal call. Of the block before, whose last W − 1 keys a query may see, it sees all but the first i. With
queries and keys in reverse order that is a causal call too. The log-sum-exps of both merge their outputs.

Shapes: H heads, N queries, S keys, D head dim, b blocks.
"""

import torch

from .compat_olmem import causal_forward, has_triton
from .sequences_olmem import Sequences

Result = tuple[torch.Tensor, torch.Tensor]  # an output (N, H, D) and the log-sum-exp (H, N) of its scores


def is_in_blocks(query: torch.Tensor, key: torch.Tensor, sequences: Sequences) -> bool:
    """Tells whether one sequence has whole blocks of queries, after no key at all or after as many as they see."""
    window, past = sequences.before + 1, len(key) - len(query)
    is_one = len(sequences.query_starts) == 2 and sequences.queries is None and sequences.keys is None
    is_window = sequences.is_causal and window > 1 and query.shape[1] == key.shape[1]
    return is_one and is_window and len(query) % window == 0 and past in (0, window - 1)


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float
) -> Result:
    """Attends from queries (N, H, D) to keys and values (S, H, D), for which `is_in_blocks` holds.

    Returns:
        The output (N, H, D) and the log-sum-exp of the scores (H, N).
    """
    blocks, past = len(query) // window, len(key) - len(query)

    def in_blocks(states: torch.Tensor) -> torch.Tensor:
        """Returns states (b · W, H, D) as (b, H, W, D)."""
        return states.unflatten(0, (-1, window)).transpose(1, 2)

    own = causal_forward(in_blocks(query), in_blocks(key[past:]), in_blocks(value[past:]), scaling)
    first = 0 if past else 1  # the first block that has keys before it
    if first == blocks:
        return joined(own, None, 0)
    # In reverse order, query W − 2 comes first and key W − 2 of the block before, then what both see ever fewer of. The
    # last ones, which are of no use, make the lengths whole blocks: no other query sees that key.
    start = torch.arange(first, blocks, device=query.device)[:, None] * window
    back = window - 2 - torch.arange(window, device=query.device)
    queries = (start + back).clamp(min=0).flatten()
    keys = (past + start - window + 1 + back).clamp(min=0).flatten()
    before = causal_forward(in_blocks(query[queries]), in_blocks(key[keys]), in_blocks(value[keys]), scaling)
    return joined(own, before, first)


def joined(own: Result, before: Result | None, first: int) -> Result:
    """Merges what blocks see of themselves and of the block before.

    Args:
        own: the output (b, H, W, D) and the log-sum-exp (b, H, W) of each block.
        before: the same from block `first` on for the block before, in reverse order but for the last query.
    """
    if before is None:
        return own[0].transpose(1, 2).flatten(0, 1), own[1].transpose(0, 1).flatten(1, 2)
    if own[0].is_cuda and has_triton():
        from .fused_olmem import merge_blocks  # whose kernels are imported where they run

        return merge_blocks(own, before, first)
    output, total = own[0].clone(), own[1].clone()
    other, of_other = before[0][:, :, :-1].flip(2), before[1][:, :, :-1].flip(2)
    mine = own[1][first:, :, :-1]
    total[first:, :, :-1] = torch.logaddexp(mine, of_other)
    share = (mine - total[first:, :, :-1]).exp()[..., None]
    output[first:, :, :-1] = (share * own[0][first:, :, :-1] + (1 - share) * other).to(output.dtype)
    return joined((output, total), None, 0)


__all__ = ["attend_in_blocks", "is_in_blocks"]
