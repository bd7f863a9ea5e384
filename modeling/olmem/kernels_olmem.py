# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of a step: one token a row, read by a whole model without gradients.

This file is imported only where its kernels run. Each kernel is launched by a function of the same name; what it
computes is defined by the plain operations of the modules (ops_olmem, modeling_olmem), from which it differs by
rounding alone.

Shapes: B rows, H query heads, K key/value heads, D head dim, P slots of the prefix (M of memory, then the sinks), N
partial results of a row's attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .ops_olmem import Operations
from .step_olmem import READS, TOKENS, WRITES, LayerShape, StepState, norm_kind

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("A step by kernels needs triton (got none installed); `pip install triton`.") from error

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "Elephant": 1}  # by the names of their classes, as `activate` counts
TOKEN, READ, WRITE = tl.constexpr(TOKENS), tl.constexpr(READS), tl.constexpr(WRITES)
MOST_QUERIES = 64  # that one program attends for
FEW = 64  # rows up to which products are bound by their weights' bytes


# Products


@triton.jit
def pick(pid, first: tl.constexpr, second: tl.constexpr, a, b, c):
    """Returns the one of three values that a program of a launch over three weights works on."""
    return tl.where(pid < first, a, tl.where(pid < second, b, c))


@triton.jit
def product_one_kernel(
    x, out, w0, w1, w2, b0, b1, b2, n0, n1, n2, width,
    G0: tl.constexpr, G1: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiplies one row x (width) by up to three weights (n, width), whose addresses are integers."""
    pid = tl.program_id(0)
    count = pick(pid, G0, G1, n0, n1, n2)
    block = pid - pick(pid, G0, G1, 0, G0, G1)
    before = pick(pid, G0, G1, 0, n0, n0 + n1)
    weight = tl.multiple_of(pick(pid, G0, G1, w0, w1, w2).to(tl.pointer_type(DTYPE)), 16)
    n = block * BN + tl.arange(0, BN)
    is_row = n < count
    row = weight + n[:, None].to(tl.int64) * width
    total = tl.zeros((BN, BK), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        is_column = k < width
        values = tl.load(row + k[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        states = tl.load(x + k, mask=is_column, other=0.0)
        total += values.to(tl.float32) * states[None, :].to(tl.float32)
    result = tl.sum(total, 1)
    if HAS_BIAS:
        bias = pick(pid, G0, G1, b0, b1, b2).to(tl.pointer_type(DTYPE))
        result += tl.load(bias + n, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + before + n, result, mask=is_row)


@triton.jit
def product_few_kernel(
    x, out, w0, w1, w2, b0, b1, b2, n0, n1, n2, width, rows, out_width,
    G0: tl.constexpr, G1: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiplies up to ROWS rows x (rows, width) by up to three weights (n, width), whose addresses are integers."""
    pid = tl.program_id(0)
    count = pick(pid, G0, G1, n0, n1, n2)
    block = pid - pick(pid, G0, G1, 0, G0, G1)
    before = pick(pid, G0, G1, 0, n0, n0 + n1)
    weight = tl.multiple_of(pick(pid, G0, G1, w0, w1, w2).to(tl.pointer_type(DTYPE)), 16)
    n, r = block * BN + tl.arange(0, BN), tl.arange(0, ROWS)
    is_row, is_state = n < count, r < rows
    row = weight + n[:, None].to(tl.int64) * width
    total = tl.zeros((BN, ROWS), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        is_column = k < width
        values = tl.load(row + k[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        states = tl.load(x + r[None, :] * width + k[:, None], mask=is_column[:, None] & is_state[None, :], other=0.0)
        total += tl.dot(values, states, input_precision="ieee")
    if HAS_BIAS:
        bias = pick(pid, G0, G1, b0, b1, b2).to(tl.pointer_type(DTYPE))
        total += tl.load(bias + n, mask=is_row, other=0.0).to(tl.float32)[:, None]
    tl.store(out + r[None, :] * out_width + (before + n)[:, None], total, mask=is_row[:, None] & is_state[None, :])


@triton.jit
def activate(gate, KIND: tl.constexpr):
    """Returns the activation of a gate in float32."""
    if KIND == 0:
        return gate * tl.sigmoid(gate)
    fourth = gate * gate * gate * gate
    return 1.0 / (1.0 + fourth * fourth)


@triton.jit
def gated_one_kernel(
    x, out, gate, up, count, width,
    KIND: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes activation(gate x) · (up x) of one row x (width), with weights (count, width)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_row = n < count
    offset = n[:, None].to(tl.int64) * width
    gates, ups = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        is_column = k < width
        mask = is_row[:, None] & is_column[None, :]
        states = tl.load(x + k, mask=is_column, other=0.0)[None, :].to(tl.float32)
        gates += tl.load(gate + offset + k[None, :], mask=mask, other=0.0).to(tl.float32) * states
        ups += tl.load(up + offset + k[None, :], mask=mask, other=0.0).to(tl.float32) * states
    first, second = tl.sum(gates, 1).to(DTYPE).to(tl.float32), tl.sum(ups, 1).to(DTYPE).to(tl.float32)
    tl.store(out + n, activate(first, KIND).to(DTYPE).to(tl.float32) * second, mask=is_row)


@triton.jit
def gated_few_kernel(
    x, out, gate, up, count, width, rows,
    KIND: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes activation(gate x) · (up x) of up to ROWS rows x (rows, width), with weights (count, width)."""
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, ROWS)
    is_row, is_state = n < count, r < rows
    offset = n[:, None].to(tl.int64) * width
    gates, ups = tl.zeros((BN, ROWS), tl.float32), tl.zeros((BN, ROWS), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        is_column = k < width
        mask = is_row[:, None] & is_column[None, :]
        states = tl.load(x + r[None, :] * width + k[:, None], mask=is_column[:, None] & is_state[None, :], other=0.0)
        gates += tl.dot(tl.load(gate + offset + k[None, :], mask=mask, other=0.0), states, input_precision="ieee")
        ups += tl.dot(tl.load(up + offset + k[None, :], mask=mask, other=0.0), states, input_precision="ieee")
    first, second = gates.to(DTYPE).to(tl.float32), ups.to(DTYPE).to(tl.float32)
    result = activate(first, KIND).to(DTYPE).to(tl.float32) * second
    tl.store(out + r[None, :] * count + n[:, None], result, mask=is_row[:, None] & is_state[None, :])


# Norms


@triton.jit
def normed(states, weight, bias, mask, n, count, eps, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the norm of states in float32, rounded to a dtype; `count` of them are not masked."""
    if KIND == 0:
        scale = tl.rsqrt(tl.sum(states * states, 0) / count + eps)
        return (tl.load(weight + n, mask=mask, other=0.0).to(tl.float32) * (states * scale)).to(DTYPE).to(tl.float32)
    mean = tl.sum(states, 0) / count
    centred = tl.where(mask, states - mean, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred, 0) / count + eps)
    if KIND == 1:
        result *= tl.load(weight + n, mask=mask, other=0.0).to(tl.float32)
        result += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    return result.to(DTYPE).to(tl.float32)


@triton.jit
def add_norm_kernel(
    residual, states, weight, bias, out, width, eps,
    HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes residual + norm(states), or the norm alone, of rows (B, width)."""
    n = tl.arange(0, BLOCK)
    mask, row = n < width, tl.program_id(0) * width
    found = tl.load(states + row + n, mask=mask, other=0.0).to(tl.float32)
    result = normed(found, weight, bias, mask, n, width, eps, KIND, DTYPE)
    if HAS_RESIDUAL:
        result += tl.load(residual + row + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + n, result, mask=mask)


# Positions and the state


@triton.jit
def clipped(states, clip):
    """Returns states between −clip and clip; what is NaN stays NaN."""
    return tl.where(states > clip, clip, tl.where(states < -clip, -clip, states))


@triton.jit
def head_of(
    row, mask, d, head, heads, first, eps, weight, bias, clip,
    QK_NORM: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Returns one head (D,) of a row's projections after clip and QK-norm, in float32 rounded to a dtype.

    QK_NORM is 0 for none, 1 for a norm over the full width, 2 for one over each head. `d` are the numbers of the head,
    in any order.
    """
    own = tl.load(row + first + head * D + d, mask=mask, other=0.0).to(tl.float32)
    if CLIP:
        own = clipped(own, clip)
    if QK_NORM == 0:
        return own
    if QK_NORM == 2:
        return normed(own, weight, bias, mask, d, D, eps, KIND, DTYPE)
    n = tl.arange(0, WIDE)
    width = heads * D
    whole = tl.load(row + first + n, mask=n < width, other=0.0).to(tl.float32)
    if CLIP:
        whole = clipped(whole, clip)
    if KIND == 0:
        result = own * tl.rsqrt(tl.sum(whole * whole, 0) / width + eps)
    else:
        mean = tl.sum(whole, 0) / width
        centred = tl.where(n < width, whole - mean, 0.0)
        result = (own - mean) * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    if KIND != 2:
        result *= tl.load(weight + head * D + d, mask=mask, other=0.0).to(tl.float32)
    if KIND == 1:
        result += tl.load(bias + head * D + d, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, result, 0.0).to(DTYPE).to(tl.float32)


@triton.jit
def angle_of(position, frequency, trained):
    """Returns angles in float32 of positions (int64): Transformers' own up to a trained length, exact ones beyond."""
    exact = position.to(tl.float64) * frequency.to(tl.float64)
    exact = exact - 6.283185307179586 * tl.floor(exact * 0.15915494309189535)
    return tl.where(position < trained, position.to(tl.float32) * frequency, exact.to(tl.float32))


@triton.jit
def window_start(number, KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr):
    """Returns the first token of the window of a query; KIND is 0 for full, 1 for sliding, 2 for chunked layers."""
    if KIND == 0:
        return number * 0
    if KIND == 1:
        return tl.maximum(number - WINDOW + 1, 0)
    return tl.maximum((number // WINDOW - LOOKBACK) * WINDOW, 0)


@triton.jit
def ring_slot_of(t, start, RING: tl.constexpr):
    """Returns the slot of the t-th token after one that lies in slot `start`, all of which lie within one round."""
    slot = t + start
    if RING > 0:
        slot = tl.where(slot >= RING, slot - RING, slot)
    return slot


@triton.jit
def slot_offset(slot, D: tl.constexpr):
    """Returns where a slot's head begins among those of a head."""
    return slot.to(tl.int64) * D


@triton.jit
def zeta_of(d, xpos_rate, D: tl.constexpr):
    """Returns the logarithm to base 2 of xpos' scale of one position for the numbers d of a head in halves."""
    return tl.log2(((d % (D // 2)).to(tl.float32) * 2 / D + 0.4) / 1.4) * xpos_rate


@triton.jit
def place_kernel(
    projected, seen, rows, table, window_query, prefix_query, raw_query, frequencies, frequency_stride,
    q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, clip, factor, trained, xpos_rate,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    Q_FIRST: tl.constexpr, K_FIRST: tl.constexpr, V_FIRST: tl.constexpr, WIDTH: tl.constexpr,
    Q_WIDE: tl.constexpr, K_WIDE: tl.constexpr,
    QK_NORM: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, CLIP_ROTATED: tl.constexpr,
    ROTATES: tl.constexpr, ONE_TENSOR: tl.constexpr, DIFFERENCE: tl.constexpr, XPOS: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, RING: tl.constexpr,
    MEMORY: tl.constexpr, SINKS: tl.constexpr, STORE: tl.constexpr, ROLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Norms a new token's heads, gives them positions, and writes keys and values to their slots.

    Programs are (B, H queries, then K keys, then K values unless they are the keys). The table of a layer holds the
    addresses of keys and values and the slots of a head, then the same of its store. Of M memory tokens a row, which
    stand one after the other, the m-th goes to slot m of its row. Queries that are turned when keys are read are turned
    here by m, and there by what is the same for all of them.
    """
    b, head = tl.program_id(0), tl.program_id(1)
    row = projected + b.to(tl.int64) * WIDTH
    m, index = b * 0, b
    if ROLE != TOKEN:
        m, index = b % MEMORY, b // MEMORY
    number = tl.load(seen + index)
    if ROLE == WRITE:
        number -= 1  # memory is written by what the last token sees
    start = window_start(number, KIND, WINDOW, LOOKBACK)
    place = MEMORY + number
    slot = MEMORY + tl.minimum(start, SINKS) + number - start
    if ROLE == WRITE:
        place += 1 + m
        slot += 1 + m
    if ROLE == READ:
        place = m.to(tl.int64)
    d = tl.arange(0, DP)
    mask = d < D
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    sign = tl.where(d < D // 2, -1.0, 1.0)
    if head < H:
        own = head_of(
            row, mask, d, head, H, Q_FIRST, q_eps, q_weight, q_bias, clip, QK_NORM, NORM, CLIP, D, Q_WIDE, DTYPE
        )
        out = (b * H + head) * D + d
        if STORE > 0:
            tl.store(raw_query + out, own, mask=mask)
        grown = 1.0
        if XPOS and ROLE != TOKEN:
            grown = tl.exp2(m.to(tl.float32) * zeta_of(d, xpos_rate, D))
        if ROTATES and (ROLE != TOKEN or not ONE_TENSOR):
            turned = head_of(
                row, mask, other, head, H, Q_FIRST, q_eps, q_weight, q_bias, clip, QK_NORM, NORM, CLIP, D, Q_WIDE, DTYPE
            )
            frequency = tl.load(frequencies + b * frequency_stride + d % (D // 2), mask=mask, other=0.0)
            if ONE_TENSOR:
                angle = m.to(tl.float32) * frequency
                result = own * tl.cos(angle) + sign * turned * tl.sin(angle)
            else:
                angle = angle_of(place, frequency, trained)
                result = own * (tl.cos(angle) * factor) + sign * turned * (tl.sin(angle) * factor)
            if CLIP_ROTATED:
                result = clipped(result, clip)
            tl.store(window_query + out, result * grown, mask=mask)
            if MEMORY + SINKS > 0 and ROLE != READ and not ONE_TENSOR:
                angle = angle_of(slot, frequency, trained)
                result = own * (tl.cos(angle) * factor) + sign * turned * (tl.sin(angle) * factor)
                tl.store(prefix_query + out, result * grown, mask=mask)
        else:
            if CLIP_ROTATED:
                own = clipped(own, clip)
            tl.store(window_query + out, own, mask=mask)
    else:
        is_value = head >= H + K
        kv = (head - H) % K
        if is_value and not DIFFERENCE:
            own = tl.load(row + V_FIRST + kv * D + d, mask=mask, other=0.0).to(tl.float32)
            if CLIP or CLIP_ROTATED:
                own = clipped(own, clip)
        else:
            own = head_of(
                row, mask, d, kv, K, K_FIRST, k_eps, k_weight, k_bias, clip, QK_NORM, NORM, CLIP, D, K_WIDE, DTYPE
            )
        result = own
        if is_value:
            if DIFFERENCE:
                query = head_of(
                    row, mask, d, kv, H, Q_FIRST, q_eps, q_weight, q_bias, clip, QK_NORM, NORM, CLIP, D, Q_WIDE, DTYPE
                )
                result = (query - own).to(DTYPE).to(tl.float32)
                if CLIP_ROTATED:
                    result = clipped(result, clip)
                own = result
        elif not ONE_TENSOR:
            if ROTATES:
                turned = head_of(
                    row, mask, other, kv, K, K_FIRST, k_eps, k_weight, k_bias, clip, QK_NORM, NORM, CLIP, D, K_WIDE,
                    DTYPE,
                )  # fmt: skip
                frequency = tl.load(frequencies + b * frequency_stride + d % (D // 2), mask=mask, other=0.0)
                angle = angle_of(place, frequency, trained)
                result = own * (tl.cos(angle) * factor) + sign * turned * (tl.sin(angle) * factor)
            if CLIP_ROTATED:
                result = clipped(result, clip)
        which = is_value.to(tl.int32)
        target = tl.load(table + which).to(tl.pointer_type(DTYPE))
        slots = tl.load(table + 2)
        if ROLE == READ:
            index = tl.load(rows + index).to(tl.int32)
        target += (index.to(tl.int64) * K + kv) * slots * D
        column = d
        if ONE_TENSOR and ROTATES:  # in pairs
            column = tl.where(d < D // 2, 2 * d, 2 * d - D + 1)
        if ROLE != TOKEN:
            tl.store(target + slot_offset(m, D) + column, result, mask=mask)
        else:
            ring_slot = number
            if RING > 0:
                ring_slot = number % RING
            tl.store(target + slot_offset(MEMORY + SINKS + ring_slot, D) + column, result, mask=mask)
            if SINKS > 0:  # noqa: SIM102  a constant of the kernel, and a value
                if number < SINKS:
                    tl.store(target + slot_offset(MEMORY + number, D) + column, result, mask=mask)
        if STORE > 0:
            stored = tl.load(table + 3 + which).to(tl.pointer_type(DTYPE))
            stored += (b.to(tl.int64) * K + kv) * tl.load(table + 5) * D
            tl.store(stored + slot_offset(number % STORE, D) + d, own, mask=mask)


# Attention


@triton.jit
def part_of(
    part, number,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, RING: tl.constexpr,
    MEMORY: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, ROLE: tl.constexpr,
    EXTRA: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Returns which keys one of the parts of what a row sees holds.

    The parts are the prefix (memory and sinks apart with SPLIT), the M tokens that are written together, and equal
    shares of the window; where memory is read there is the prefix' memory alone. Returned are the first key and the one
    after the last, the distance of key 0 from the query, whether keys are those of the prefix, whether they are those
    that are written together, and the slot in the ring of the window's first token, from which its keys count. Other
    keys count by slots.
    """
    start = window_start(number, KIND, WINDOW, LOOKBACK)
    count = (number - start + 1).to(tl.int32)
    sinks = tl.minimum(start, SINKS).to(tl.int32)
    is_fresh = part == (EXTRA - 1 if ROLE == WRITE else -1)
    is_prefix = part < (EXTRA - 1 if ROLE == WRITE else EXTRA)
    first, stop, reach = part * 0, part * 0 + MEMORY, part * 0
    if ROLE != READ:
        share = tl.cdiv(tl.cdiv(count, PARTS - EXTRA), BK) * BK
        first = tl.where(is_prefix | is_fresh, 0, (part - EXTRA) * share)
        stop = tl.where(is_fresh, MEMORY, tl.where(is_prefix, MEMORY + sinks, tl.minimum(first + share, count)))
        if SPLIT:
            first = tl.where(part == 1, MEMORY, first)
            stop = tl.where(part == 0, MEMORY, stop)
        ahead = 1 if ROLE == WRITE else 0  # of the last token that is seen
        reach = tl.where(is_fresh, 0, tl.where(is_prefix, MEMORY + sinks, 0) + count - 1 + ahead)
    if RING > 0:
        start = start % RING
    return first, stop, reach, is_prefix, is_fresh, start


@triton.jit
def attend_kernel(
    window_query, prefix_query, seen, rows, table, fresh, partial, maxima, frequencies, scale_vector,
    scaling, linspace_step, xpos_rate,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    QUERIES: tl.constexpr, QB: tl.constexpr,
    IN_PAIRS: tl.constexpr, ONE_TENSOR: tl.constexpr, XPOS: tl.constexpr, LINSPACE: tl.constexpr,
    SLOT_QUERY: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, RING: tl.constexpr,
    MEMORY: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, ROLE: tl.constexpr,
    EXTRA: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attends for the queries of one key head to one part of what a row sees, with a softmax of its own.

    Programs are (B · blocks of QB of a row's queries · K, N). Partial outputs (B · QUERIES · H, N, D) and maximum and
    sum of each softmax (B · QUERIES · H, N, 2) are joined afterwards. Keys that are values too are kept in pairs
    without positions, and are rotated here by their distance to the query. The last programs have the short parts.
    """
    pid, part = tl.program_id(0), PARTS - 1 - tl.program_id(1)
    kv, block_of_queries = pid % K, pid // K
    b = block_of_queries // tl.cdiv(QUERIES, QB)
    number = tl.load(seen + b)
    if ROLE == WRITE:
        number -= 1
    first, stop, reach, is_prefix, is_fresh, start = part_of(
        part, number, KIND, WINDOW, LOOKBACK, RING, MEMORY, SINKS, SPLIT, ROLE, EXTRA, PARTS, BK
    )
    g, d, j = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, BK)
    m = (block_of_queries % tl.cdiv(QUERIES, QB)) * QB + g // GROUP
    is_own = (g < QB * GROUP) & (m < QUERIES)
    is_query = is_own[:, None] & (d[None, :] < D)
    index = ((b * QUERIES + m) * H + kv * GROUP + g % GROUP).to(tl.int64)
    at = index[:, None] * D
    source = window_query
    if SLOT_QUERY:
        source = tl.where(is_prefix, prefix_query.to(tl.int64), window_query.to(tl.int64)).to(tl.pointer_type(DTYPE))
    row = b
    if ROLE != TOKEN:
        row = tl.load(rows + b).to(tl.int32)
    if ROLE == WRITE:
        row = tl.where(is_fresh, b, row)
        table = tl.where(is_fresh, fresh.to(tl.int64), table.to(tl.int64)).to(tl.pointer_type(tl.int64))
    slots = tl.load(table + 2)
    head = (row.to(tl.int64) * K + kv) * slots * D
    keys = tl.multiple_of(tl.load(table).to(tl.pointer_type(DTYPE)), 16) + head
    values = keys
    if not ONE_TENSOR:
        values = tl.multiple_of(tl.load(table + 1).to(tl.pointer_type(DTYPE)), 16) + head

    HALF: tl.constexpr = DP // 2
    h = tl.arange(0, HALF)
    is_half = h < D // 2
    if IN_PAIRS:
        frequency = tl.load(frequencies + h, mask=is_half, other=0.0)
        inner = j[:, None].to(tl.float32) * frequency[None, :]
        cos_key, sin_key = tl.cos(inner), tl.sin(inner)
        if XPOS:
            zeta = zeta_of(h, xpos_rate, D)
            decay = tl.exp2(-j[:, None].to(tl.float32) * zeta[None, :])
            cos_key *= decay
            sin_key *= decay
        is_half_query = is_own[:, None] & is_half[None, :]
        low = tl.load(source + at + h[None, :], mask=is_half_query, other=0.0).to(tl.float32)
        high = tl.load(source + at + D // 2 + h[None, :], mask=is_half_query, other=0.0).to(tl.float32)
        # The query is turned by the distance of a block's first key, which shrinks by a block at a time.
        angle = angle_of((reach - first).to(tl.int64), frequency, 0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        back = frequency * BK
        cos_back, sin_back = tl.cos(back), tl.sin(back)
    else:
        query = tl.load(source + at + d[None, :], mask=is_query, other=0.0)
        if XPOS:
            zeta = zeta_of(d, xpos_rate, D)
            decay = tl.exp2(-j[:, None].to(tl.float32) * zeta[None, :])
        if LINSPACE:
            step = tl.load(scale_vector + d, mask=d < D, other=0.0).to(tl.float32) * linspace_step
            slope = tl.sum(query.to(tl.float32) * step[None, :], 1)

    most = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    output = tl.zeros((GP, DP), tl.float32)
    for block in tl.range(first, stop, BK, num_stages=STAGES):
        t = block + j
        ok = t < stop
        slot = ring_slot_of(t, start, RING)
        slot = tl.where(is_prefix | is_fresh, t, MEMORY + SINKS + slot)
        offset = slot[:, None] * D + d[None, :]
        mask = ok[:, None] & (d[None, :] < D)
        key = tl.load(keys + offset, mask=mask, other=0.0)
        value = key
        if not ONE_TENSOR:
            value = tl.load(values + offset, mask=mask, other=0.0)
        distance = reach - block
        if IN_PAIRS:
            even, odd = tl.split(tl.reshape(key.to(tl.float32), (BK, HALF, 2)))
            turned_even = (even * cos_key - odd * sin_key).to(DTYPE)
            turned_odd = (odd * cos_key + even * sin_key).to(DTYPE)
            query_low = low * cos[None, :] - high * sin[None, :]
            query_high = high * cos[None, :] + low * sin[None, :]
            if XPOS:
                fade = tl.exp2(distance.to(tl.float32) * zeta)[None, :]
                query_low *= fade
                query_high *= fade
            query_low, query_high = query_low.to(DTYPE), query_high.to(DTYPE)
            cos, sin = cos * cos_back + sin * sin_back, sin * cos_back - cos * sin_back
            scores = tl.dot(query_low, tl.trans(turned_even), input_precision="ieee")
            scores += tl.dot(query_high, tl.trans(turned_odd), input_precision="ieee")
        elif XPOS:
            faded = query.to(tl.float32) * tl.exp2(distance.to(tl.float32) * zeta)[None, :]
            scores = tl.dot(faded.to(DTYPE), tl.trans((key.to(tl.float32) * decay).to(DTYPE)), input_precision="ieee")
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if LINSPACE:
            scores -= slope[:, None] * (distance - j).to(tl.float32)[None, :]
        scores = tl.where(ok[None, :], scores * (scaling * 1.4426950408889634), float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        shrink, weights = tl.exp2(most - new), tl.exp2(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        output = output * shrink[:, None] + tl.dot(weights.to(DTYPE), value, input_precision="ieee")
        most = new
    index = index * PARTS + part
    tl.store(partial + index[:, None] * D + d[None, :], output, mask=is_query)
    tl.store(maxima + 2 * index, most, mask=is_own)
    tl.store(maxima + 2 * index + 1, total, mask=is_own)


@triton.jit
def attend_pairs_kernel(
    query, seen, table, partial, maxima, frequencies, scaling,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, RING: tl.constexpr,
    MEMORY: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr,
    EXTRA: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Does what `attend_kernel` does for keys in pairs that serve one query head each, and writes halves.

    Each of the BK lanes has its query, turned by its key's distance, and a softmax of its own. From block to block all
    distances shrink alike, so the queries are turned on by one rotation; lanes are joined when the part is read.
    """
    b, head, part = tl.program_id(0) // H, tl.program_id(0) % H, PARTS - 1 - tl.program_id(1)
    first, stop, reach, is_prefix, _, start = part_of(
        part, tl.load(seen + b), KIND, WINDOW, LOOKBACK, RING, MEMORY, SINKS, SPLIT, TOKEN, EXTRA, PARTS, BK
    )
    d, h, j = tl.arange(0, 2 * HALF), tl.arange(0, HALF), tl.arange(0, BK)
    is_half = h < D // 2
    at = (b * H + head).to(tl.int64)
    keys = tl.multiple_of(tl.load(table).to(tl.pointer_type(DTYPE)), 16) + at * tl.load(table + 2) * D
    frequency = tl.load(frequencies + h, mask=is_half, other=0.0)
    low = tl.load(query + at * D + h, mask=is_half, other=0.0).to(tl.float32)
    high = tl.load(query + at * D + D // 2 + h, mask=is_half, other=0.0).to(tl.float32)
    angle = angle_of((reach - first).to(tl.int64), frequency, 0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    low, high = low * cos - high * sin, high * cos + low * sin
    inner = j[:, None].to(tl.float32) * frequency[None, :]
    cos_lane, sin_lane = tl.cos(inner), tl.sin(inner)
    even_query = low[None, :] * cos_lane + high[None, :] * sin_lane
    odd_query = high[None, :] * cos_lane - low[None, :] * sin_lane
    cos_block, sin_block = tl.cos(frequency * BK)[None, :], tl.sin(frequency * BK)[None, :]

    most = tl.full((BK,), float("-inf"), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    even_output, odd_output = tl.zeros((BK, HALF), tl.float32), tl.zeros((BK, HALF), tl.float32)
    for block in tl.range(first, stop, BK, num_stages=STAGES):
        t = block + j
        ok = t < stop
        slot = ring_slot_of(t, start, RING)
        slot = tl.where(is_prefix, t, MEMORY + SINKS + slot)
        key = tl.load(keys + slot[:, None] * D + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
        even, odd = tl.split(tl.reshape(key, (BK, HALF, 2)))
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        scores = tl.sum(even * even_query + odd * odd_query, 1) * (scaling * 1.4426950408889634)
        scores = tl.where(ok, scores, float("-inf"))
        new = tl.where(ok, tl.maximum(most, scores), most)
        shrink = tl.where(most == new, 1.0, tl.exp2(most - new))
        weights = tl.where(ok, tl.exp2(scores - new), 0.0)
        total = total * shrink + weights
        even_output = even_output * shrink[:, None] + even * weights[:, None]
        odd_output = odd_output * shrink[:, None] + odd * weights[:, None]
        most = new
        turned = even_query * cos_block + odd_query * sin_block
        odd_query = odd_query * cos_block - even_query * sin_block
        even_query = turned
    best = tl.max(most, 0)
    share_of = tl.where(most > float("-inf"), tl.exp2(most - best), 0.0)
    index = at * PARTS + part
    tl.store(partial + index * D + h, tl.sum(even_output * share_of[:, None], 0), mask=is_half)
    tl.store(partial + index * D + D // 2 + h, tl.sum(odd_output * share_of[:, None], 0), mask=is_half)
    tl.store(maxima + 2 * index, best)
    tl.store(maxima + 2 * index + 1, tl.sum(total * share_of, 0))


@triton.jit
def join_kernel(
    partial, maxima, gates, out,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, NP: tl.constexpr,
    GATED: tl.constexpr, IN_PAIRS: tl.constexpr,
):  # fmt: skip
    """Joins the parts of each head's attention, (B · H, N, D), into (B, H · D); a gate opens it to the first one."""
    row = tl.program_id(0).to(tl.int64)
    n, d = tl.arange(0, NP), tl.arange(0, DP)
    is_part, mask = n < PARTS, d < D
    index = row * PARTS + n
    most = tl.load(maxima + 2 * index, mask=is_part, other=float("-inf"))
    total = tl.load(maxima + 2 * index + 1, mask=is_part, other=0.0)
    states = tl.load(partial + index[:, None] * D + d[None, :], mask=is_part[:, None] & mask[None, :], other=0.0)
    share = tl.exp2(most - tl.max(most, 0))
    result = tl.sum(states * share[:, None], 0) / tl.sum(total * share, 0)
    if GATED:
        gate = tl.sigmoid(tl.load(gates + row % H).to(tl.float32))
        most = tl.where(n == 0, float("-inf"), most)
        share = tl.exp2(most - tl.max(most, 0))
        rest = tl.sum(states * share[:, None], 0) / tl.sum(total * share, 0)
        result = gate * result + (1 - gate) * rest
    column = d
    if IN_PAIRS:
        column = tl.where(d % 2 == 0, d // 2, D // 2 + d // 2)
    tl.store(out + row * D + column, result, mask=mask)


# Retrieval


@triton.jit
def score_kernel(
    query, seen, table, scores, scaling,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, SINKS: tl.constexpr,
    CAPACITY: tl.constexpr, STORE: tl.constexpr, SHARE: tl.constexpr,
    DTYPE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores all that a row may retrieve, (B, H, CAPACITY), oldest first; −∞ where there is nothing."""
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
        tl.store(scores + at * CAPACITY + t[None, :], found, mask=(g[:, None] < GROUP) & (t[None, :] < CAPACITY))


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


# Launches


@dataclass(frozen=True)
class Blocks:
    """Chooses the sizes of blocks for a device.

    Args:
        shared_memory: bytes of it that one program may use.
        processors: how many programs run at least at a time.
    """

    shared_memory: int
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> "Blocks":
        """Returns the choice for a device; a CPU, where kernels are interpreted, has little of everything."""
        if device.type != "cuda":
            return cls(48 * 1024, 1)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.shared_memory_per_block_optin, properties.multi_processor_count)

    def product(self, count: int, width: int, itemsize: int) -> tuple[int, int, int]:
        """Returns rows and columns of a weight's block, and the stages of their pipeline, for one row of states.

        Args:
            count: rows of the weights, of which many keep all processors busy in longer blocks.
            width: their columns.
        """
        rows, columns = (2, 2048) if count >= 8192 else (4, 512)
        columns = min(columns, triton.next_power_of_2(width))
        return rows, columns, self.stages(rows * columns * itemsize, 3)

    def few(self, rows: int, weights: int, itemsize: int) -> tuple[int, int, int, int]:
        """Returns rows of states, padded, and as `product` does, for several rows and so many weights at a time."""
        padded = max(16, triton.next_power_of_2(rows))
        columns = 256 // max(weights, padded // 16 if padded < 64 else 2)
        return padded, 32, columns, self.stages((weights * 32 + padded) * columns * itemsize, 4)

    def attention(self, width: int, tensors: int, itemsize: int, queries: int = 16) -> tuple[int, int]:
        """Returns the keys of a block and the stages of their pipeline, for so many queries of a program."""
        keys = 32 if width * itemsize <= 256 else 16
        return keys, self.stages(keys * width * itemsize * tensors, 3, (queries - 16) * width * itemsize)

    def stages(self, size: int, most: int, taken: int = 0) -> int:
        """Returns how many blocks of so many bytes fit at a time beside others, at most `most` and at least one."""
        return max(1, min(most, (self.shared_memory - 8192 - taken) // size))

    def shares(self, heads: int, span: int | None, keys: int) -> int:
        """Returns into how many parts a window is cut.

        Args:
            heads: the key heads of all rows.
            span: the most tokens of a window, None for a row that grows.
            keys: the fewest keys that a part should hold where there are enough programs without more parts.
        """
        wanted = -(-2 * self.processors // heads)
        if span is None:
            return min(max(wanted, 32 * self.processors // (4 * heads), 1), 64)
        return max(1, min(max(wanted, span // keys), -(-span // 128), 64))


def addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    """Returns the addresses of up to three tensors as integers, 0 where there is none."""
    return [0 if each is None else each.data_ptr() for each in (*tensors, None, None, None)[:3]]


class KernelOperations(Operations):
    """Computes the parts of a layer by kernels, for states of one token a row, without gradients.

    Args:
        device: where they run.
        dtype: of weights and states.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.blocks, self.dtype, self.type = Blocks.of(device), dtype, TYPES[dtype]

    def products(self, linears: Sequence[nn.Module], states: torch.Tensor) -> list[torch.Tensor]:
        joined = self.joined_products(linears, states)
        return list(joined.split([linear.weight.shape[0] for linear in linears], dim=-1))

    def joined_products(self, linears: Sequence[nn.Module], states: torch.Tensor) -> torch.Tensor:
        """Returns the products of states (…, in) with up to three weights side by side, in one launch."""
        rows, width = states.numel() // states.shape[-1], states.shape[-1]
        if rows > FEW or (rows > 1 and self.dtype == torch.float32):
            return self.many_products(linears, states)
        counts = [linear.weight.shape[0] for linear in linears] + [0, 0]
        out = states.new_empty(*states.shape[:-1], sum(counts))
        itemsize = self.dtype.itemsize
        sizes = self.blocks.product(sum(counts), width, itemsize) if rows == 1 else self.blocks.few(rows, 1, itemsize)
        grids = [triton.cdiv(count, sizes[-3]) for count in counts[:3]]
        has_bias = linears[0].bias is not None
        given = addresses([linear.weight for linear in linears]), addresses([linear.bias for linear in linears])
        arguments = (states.contiguous(), out, *given[0], *given[1], *counts[:3], width)
        kernel = product_one_kernel if rows == 1 else product_few_kernel
        more = () if rows == 1 else (rows, sum(counts))
        kernel[(sum(grids),)](
            *arguments, *more, grids[0], grids[0] + grids[1], has_bias, self.type, *sizes, num_warps=4
        )
        return out

    def many_products(self, linears: Sequence[nn.Module], states: torch.Tensor) -> torch.Tensor:
        """Returns what `joined_products` does, by torch's own products, which many rows are for."""
        rows = states.view(-1, states.shape[-1])
        out = rows.new_empty(len(rows), sum(linear.weight.shape[0] for linear in linears))
        first = 0
        for linear in linears:
            part = out[:, first : first + linear.weight.shape[0]]
            if linear.bias is None:
                torch.mm(rows, linear.weight.T, out=part)
            else:
                torch.addmm(linear.bias, rows, linear.weight.T, out=part)
            first += linear.weight.shape[0]
        return out.view(*states.shape[:-1], -1)

    def norm(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return self.launch_norm(None, norm, states)

    def add_norm(
        self, residual: torch.Tensor, norm: nn.Module, states: torch.Tensor, dropout: nn.Module
    ) -> torch.Tensor:
        return self.launch_norm(residual, norm, states)

    def launch_norm(self, residual: torch.Tensor | None, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Returns the norm of states (…, width), added to a residual if there is one."""
        if isinstance(norm, nn.Identity):
            return states if residual is None else residual + states
        kind, weight, bias, eps = norm_kind(norm)
        width, states = states.shape[-1], states.contiguous()
        out = torch.empty_like(states)
        block = triton.next_power_of_2(width)
        add_norm_kernel[(states.numel() // width,)](
            states if residual is None else residual, states, states if weight is None else weight,
            states if bias is None else bias, out, width, eps,
            residual is not None, kind, self.type, block, num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip
        return out

    def gated(self, activation: nn.Module, gate: nn.Module, up: nn.Module, states: torch.Tensor) -> torch.Tensor:
        kind = ACTIVATIONS.get(type(activation).__name__)
        rows, width = states.numel() // states.shape[-1], states.shape[-1]
        if kind is None or rows > FEW or (rows > 1 and self.dtype == torch.float32):
            gates, ups = self.products([gate, up], states)
            return activation(gates) * ups
        count = gate.weight.shape[0]
        out = states.new_empty(*states.shape[:-1], count)
        itemsize, states = self.dtype.itemsize, states.contiguous()
        sizes = self.blocks.product(2 * count, width, itemsize) if rows == 1 else self.blocks.few(rows, 2, itemsize)
        kernel = gated_one_kernel if rows == 1 else gated_few_kernel
        more = () if rows == 1 else (rows,)
        kernel[(triton.cdiv(count, sizes[-3]),)](
            states, out, gate.weight, up.weight, count, width, *more, kind, self.type, *sizes, num_warps=4
        )
        return out

    def attend(self, shape: LayerShape, state: StepState, projected: torch.Tensor) -> torch.Tensor:
        """Writes a new token's keys and values to a layer's state and attends from it.

        `projected` (B, 1, …) holds its projections side by side. Returns (B, 1, H · D).
        """
        batch, size, visibility = len(projected), shape.head_dim, shape.visibility
        heads, kv_heads, role = shape.num_heads, shape.num_key_value_heads, state.role
        memory, sinks, store = visibility.num_memory, visibility.num_sinks, 0 if role else shape.store
        rows = state.seen if state.rows is None else state.rows
        fresh = state.table if state.fresh is None else state.fresh
        window_query = projected.new_empty(batch, heads, size)
        has_slots = visibility.num_prefix > 0 and shape.rotates and not shape.one_tensor and role != READS
        prefix_query = torch.empty_like(window_query) if has_slots else window_query
        raw_query = torch.empty_like(window_query) if store else window_query
        padded = max(triton.next_power_of_2(size), 32)  # halves of 16 for products
        none, (norm, q_weight, q_bias, k_weight, k_bias) = projected, shape.norm
        q_first, k_first, v_first, width = shape.offsets
        frequencies = none if state.frequencies is None else state.frequencies
        stride = frequencies.stride(0) if state.frequencies is not None and len(frequencies) > 1 else 0
        seen_kind = shape.kind, shape.window, visibility.lookback, visibility.span or 0
        place_kernel[(batch, heads + kv_heads * (1 if shape.one_tensor else 2))](
            projected, state.seen, rows, fresh if role == WRITES else state.table,
            window_query, prefix_query, raw_query, frequencies, stride,
            *(none if each is None else each for each in (q_weight, q_bias, k_weight, k_bias)),
            *shape.eps, float(shape.clip or 0.0), shape.rotary_factor, shape.trained_length, shape.xpos_rate,
            heads, kv_heads, size, padded, q_first, k_first, v_first, width,
            triton.next_power_of_2(heads * size), triton.next_power_of_2(kv_heads * size),
            shape.qk_norm, norm, shape.clip is not None and not shape.clips_rotated,
            shape.clip is not None and shape.clips_rotated, shape.rotates, shape.one_tensor, shape.is_difference,
            shape.xpos_rate > 0, *seen_kind, memory, sinks, store, role, self.type, num_warps=4,
        )  # fmt: skip
        group, gate = heads // kv_heads, None if role == READS else shape.memory_gate
        queries = memory if role else 1
        together = min(queries, max(MOST_QUERIES // group, 1))
        splits = gate is not None and memory > 0 and sinks > 0
        extra = (visibility.num_prefix > 0) + splits + (role == WRITES)
        parts = extra
        if role != READS:
            programs = batch // queries * triton.cdiv(queries, together) * kv_heads
            parts += self.blocks.shares(programs, visibility.span, 2048 if shape.one_tensor else 512)
        partial = projected.new_empty(batch * heads, parts, size, dtype=torch.float32)
        maxima = projected.new_empty(batch * heads, parts, 2, dtype=torch.float32)
        padded_group = max(triton.next_power_of_2(together * group), 16)
        sizes = self.blocks.attention(padded, 1 if shape.one_tensor else 2, self.dtype.itemsize, padded_group)
        in_pairs = shape.one_tensor and shape.rotates
        scaling = shape.scaling * (shape.rotary_factor**2 if in_pairs else 1.0)
        is_alone = in_pairs and group == 1 and not shape.xpos_rate and not role
        if is_alone:
            attend_pairs_kernel[(batch * heads, parts)](
                window_query, state.seen, state.table, partial, maxima, frequencies, scaling,
                heads, size, padded // 2, *seen_kind, memory, sinks, splits, extra, parts,
                self.type, *sizes, num_warps=4,
            )  # fmt: skip
        else:
            attend_kernel[(batch // queries * triton.cdiv(queries, together) * kv_heads, parts)](
                window_query, prefix_query, state.seen, rows, state.table, fresh, partial, maxima,
                frequencies, none if shape.linspace_scale is None else shape.linspace_scale,
                scaling, shape.linspace_step, shape.xpos_rate,
                heads, kv_heads, size, padded, group, padded_group, queries, together,
                in_pairs, shape.one_tensor, shape.xpos_rate > 0, shape.linspace_scale is not None, has_slots,
                *seen_kind, memory, sinks, splits, role, extra, parts, self.type, *sizes,
                num_warps=2 if sizes[0] * padded <= 4096 and not in_pairs and padded_group == 16 else 4,
            )  # fmt: skip
        output = projected.new_empty(batch, 1, heads * size)
        join_kernel[(batch * heads,)](
            partial, maxima, none if gate is None else gate, output,
            heads, size, padded, parts, triton.next_power_of_2(parts), gate is not None,
            in_pairs and not is_alone, num_warps=1,
        )  # fmt: skip
        if store:
            self.retrieve(shape, state, raw_query, output)
        return output

    def retrieve(self, shape: LayerShape, state: StepState, query: torch.Tensor, output: torch.Tensor) -> None:
        """Mixes what queries (B, H, D) retrieve into what they have seen, (B, 1, H · D), in place."""
        batch, heads, size = query.shape
        kv_heads, visibility, capacity = shape.num_key_value_heads, shape.visibility, shape.capacity
        padded, group = max(triton.next_power_of_2(size), 32), heads // kv_heads
        scores = query.new_empty(batch, heads, capacity, dtype=torch.float32)
        sizes = self.blocks.attention(padded, 1, self.dtype.itemsize)
        shares = max(1, min(8 * self.blocks.processors // (batch * kv_heads), capacity // (4 * sizes[0])))
        share = triton.cdiv(triton.cdiv(capacity, shares), sizes[0]) * sizes[0]
        seen_kind = shape.kind, shape.window, visibility.lookback, visibility.num_sinks
        score_kernel[(batch * kv_heads, triton.cdiv(capacity, share))](
            query, state.seen, state.table, scores, shape.scaling,
            heads, kv_heads, size, padded, group, max(triton.next_power_of_2(group), 16),
            *seen_kind, capacity, shape.store, share, self.type, *sizes, num_warps=2,
        )  # fmt: skip
        top_k = min(shape.top_k, capacity)
        best, places = scores.topk(top_k, dim=-1, sorted=False)
        retrieve_kernel[(batch * heads,)](
            best, places, state.seen, state.table, shape.retrieval_gate, output,
            heads, kv_heads, size, padded, top_k, triton.next_power_of_2(top_k),
            *seen_kind, capacity, shape.store, shape.one_tensor, self.type, num_warps=4,
        )  # fmt: skip


__all__ = ["FEW", "Blocks", "KernelOperations"]
