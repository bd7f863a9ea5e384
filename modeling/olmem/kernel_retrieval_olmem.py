# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of retrieval: all that a row may retrieve is scored, and the best is mixed in.

Shapes: B rows, H query heads, K key/value heads, D head dim.
"""

from .kernel_attention_olmem import ring_slot_of, window_start
from .kernel_norms_olmem import tl, triton


@triton.jit
def score_kernel(
    query, seen, table, scores, maxima, scaling,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, SINKS: tl.constexpr,
    CAPACITY: tl.constexpr, STORE: tl.constexpr, SHARE: tl.constexpr,
    DTYPE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores all that a row may retrieve, in blocks of BK, oldest first; −∞ where there is nothing.

    Writes the scores (B, H, blocks, BK) and the greatest of each block (B, H, blocks).
    """
    b, kv = tl.program_id(0) // K, tl.program_id(0) % K
    stop = window_start(tl.load(seen + b), KIND, WINDOW, LOOKBACK)
    oldest = tl.maximum(stop - CAPACITY, SINKS)
    count = tl.maximum(stop - oldest, 0)
    g, d, j = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, BK)
    at = (b * H + kv * GROUP + g[:, None]).to(tl.int64)
    own = tl.load(query + at * D + d[None, :], mask=(g[:, None] < GROUP) & (d[None, :] < D), other=0.0)
    keys = tl.multiple_of(tl.load(table + 3).to(tl.pointer_type(DTYPE)), 16)
    keys += (b.to(tl.int64) * K + kv) * tl.load(table + 5) * D
    begin, first = tl.program_id(1) * SHARE, oldest % STORE
    for block in tl.range(begin, tl.minimum(begin + SHARE, CAPACITY), BK, num_stages=STAGES):
        t = block + j
        ok = t < count
        slot = ring_slot_of(t, first, STORE)
        key = tl.load(keys + slot[:, None] * D + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
        found = tl.dot(own, tl.trans(key), input_precision="ieee") * scaling
        found = tl.where(ok[None, :], found, float("-inf"))
        index = at * tl.cdiv(CAPACITY, BK) + block // BK
        tl.store(scores + index * BK + j[None, :], found, mask=g[:, None] < GROUP)
        tl.store(maxima + index, tl.max(found, 1)[:, None], mask=g[:, None] < GROUP)


@triton.jit
def retrieve_kernel(
    scores, places, seen, table, gates, states,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOP: tl.constexpr, TP: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, SINKS: tl.constexpr,
    CAPACITY: tl.constexpr, STORE: tl.constexpr, ONE_TENSOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Mixes the softmax over the best tokens (B · H, TOP) into what heads have seen (B, H · D), in place."""
    row = tl.program_id(0)
    b, head = row // H, row % H
    stop = window_start(tl.load(seen + b), KIND, WINDOW, LOOKBACK)
    oldest = tl.maximum(stop - CAPACITY, SINKS)
    t, d = tl.arange(0, TP), tl.arange(0, DP)
    found = tl.load(scores + row.to(tl.int64) * TOP + t, mask=t < TOP, other=float("-inf"))
    best = tl.max(found, 0)
    if best > float("-inf"):
        weights = tl.exp(found - best)
        weights = weights / tl.sum(weights, 0)
        slot = (oldest + tl.load(places + row.to(tl.int64) * TOP + t, mask=t < TOP, other=0)) % STORE
        which = 3 if ONE_TENSOR else 4
        values = tl.load(table + which).to(tl.pointer_type(DTYPE))
        values += (b.to(tl.int64) * K + head // (H // K)) * tl.load(table + 5) * D
        mask = (found > float("-inf"))[:, None] & (d[None, :] < D)
        value = tl.load(values + slot[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        retrieved = tl.sum(weights[:, None] * value, 0)
        gate = tl.sigmoid(tl.load(gates + head).to(tl.float32))
        at = row.to(tl.int64) * D + d
        before = tl.load(states + at, mask=d < D, other=0.0).to(tl.float32)
        tl.store(states + at, gate * retrieved + (1 - gate) * before, mask=d < D)


__all__ = ["retrieve_kernel", "score_kernel"]
