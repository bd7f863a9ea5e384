# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of attention: a new token's keys and values are written, and what it sees is read.

Shapes: B rows, H query heads, K key/value heads, D head dim, P slots of the prefix (M of memory, then the sinks), N
partial results of a row's attention.
"""

from .kernel_norms_olmem import LAYER_NORM, PLAIN_NORM, RMS_NORM, tl, triton
from .step_olmem import READS, TOKENS, WRITES

TOKEN, READ, WRITE = tl.constexpr(TOKENS), tl.constexpr(READS), tl.constexpr(WRITES)


# Positions and the state


@triton.jit
def clipped(states, clip):
    """Returns states between −clip and clip; what is NaN stays NaN."""
    return tl.where(states > clip, clip, tl.where(states < -clip, -clip, states))


@triton.jit
def head_of(
    row, mask, d, other, head, heads, first, eps, weight, bias, clip,
    QK_NORM: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr, TURNS: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Returns one head (D,) of a row's projections after clip and QK-norm, in float32 rounded to a dtype.

    QK_NORM is 0 for none, 1 for a norm over the full width, 2 for one over each head. With TURNS the numbers `other` of
    the head are returned beside its numbers `d`, without it those twice.
    """
    at = row + first + head * D
    own = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
    turned = own
    if TURNS:
        turned = tl.load(at + other, mask=mask, other=0.0).to(tl.float32)
    if CLIP:
        own, turned = clipped(own, clip), clipped(turned, clip)
    if QK_NORM == 0:
        return own, turned
    whole, is_whole, width, offset = own, mask, D, 0
    if QK_NORM == 1:
        n = tl.arange(0, WIDE)
        width, offset = heads * D, head * D
        is_whole = n < width
        whole = tl.load(row + first + n, mask=is_whole, other=0.0).to(tl.float32)
        if CLIP:
            whole = clipped(whole, clip)
    if KIND != RMS_NORM:
        mean = tl.sum(whole, 0) / width
        whole = tl.where(is_whole, whole - mean, 0.0)
        own, turned = own - mean, turned - mean
    scale = tl.rsqrt(tl.sum(whole * whole, 0) / width + eps)
    own, turned = own * scale, turned * scale
    if KIND != PLAIN_NORM:
        own *= tl.load(weight + offset + d, mask=mask, other=0.0).to(tl.float32)
        if TURNS:
            turned *= tl.load(weight + offset + other, mask=mask, other=0.0).to(tl.float32)
    if KIND == LAYER_NORM:
        own += tl.load(bias + offset + d, mask=mask, other=0.0).to(tl.float32)
        if TURNS:
            turned += tl.load(bias + offset + other, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, own, 0.0).to(DTYPE).to(tl.float32), tl.where(mask, turned, 0.0).to(DTYPE).to(tl.float32)


@triton.jit
def one_of(condition, a, b, DTYPE: tl.constexpr):
    """Returns one of two addresses."""
    return tl.where(condition, a.to(tl.int64), b.to(tl.int64)).to(tl.pointer_type(DTYPE))


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
    WIDE: tl.constexpr, QK_NORM: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, CLIP_ROTATED: tl.constexpr,
    ROTATES: tl.constexpr, ONE_TENSOR: tl.constexpr, DIFFERENCE: tl.constexpr, XPOS: tl.constexpr,
    KIND: tl.constexpr, WINDOW: tl.constexpr, LOOKBACK: tl.constexpr, RING: tl.constexpr,
    MEMORY: tl.constexpr, SINKS: tl.constexpr, STORE: tl.constexpr, ROLE: tl.constexpr, HAS_SLOTS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Norms a new token's heads, gives them positions, and writes keys and values to their slots.

    Programs are (B, H queries, then K keys, then K values unless they are the keys); with HAS_SLOTS there are H queries
    more, which are placed by their slots, for the prefix. The table of a layer holds the addresses of keys and values
    and the slots of a head, then the same of its store. Of M memory tokens a row, which stand one after the other, the
    m-th goes to slot m of its row. Queries that are turned when keys are read are turned here by m, and there by what
    is the same for all of them.
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
    queries = window_query
    if HAS_SLOTS:
        at_slot = head >= H + 2 * K
        head = tl.where(at_slot, head - H - 2 * K, head)
        place = tl.where(at_slot, slot, place)
        queries = one_of(at_slot, prefix_query, window_query, DTYPE)
    d = tl.arange(0, DP)
    mask = d < D
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    sign = tl.where(d < D // 2, -1.0, 1.0)
    is_query, is_value, kv = head < H, head >= H + K, (head - H) % K
    if is_value and not DIFFERENCE:
        own = tl.load(row + V_FIRST + kv * D + d, mask=mask, other=0.0).to(tl.float32)
        turned = own
        if CLIP:
            own = clipped(own, clip)
    else:
        own, turned = head_of(
            row, mask, d, other, tl.where(is_query, head, kv), tl.where(is_query, H, K),
            tl.where(is_query, Q_FIRST, K_FIRST), tl.where(is_query, q_eps, k_eps),
            one_of(is_query, q_weight, k_weight, DTYPE), one_of(is_query, q_bias, k_bias, DTYPE), clip,
            QK_NORM, NORM, CLIP, ROTATES, D, WIDE, DTYPE,
        )  # fmt: skip
    if DIFFERENCE:  # noqa: SIM102  a constant of the kernel, and a value
        if is_value:
            query, _ = head_of(
                row, mask, d, other, kv, H, Q_FIRST, q_eps, q_weight, q_bias, clip, QK_NORM, NORM, CLIP, False, D, WIDE,
                DTYPE,
            )  # fmt: skip
            own = (query - own).to(DTYPE).to(tl.float32)
    if CLIP_ROTATED:  # noqa: SIM102
        if is_value:
            own = clipped(own, clip)
    result = own
    if ROTATES:
        frequency = tl.load(frequencies + b * frequency_stride + d % (D // 2), mask=mask, other=0.0)
        if not ONE_TENSOR:
            angle = angle_of(place, frequency, trained)
            result = own * (tl.cos(angle) * factor) + sign * turned * (tl.sin(angle) * factor)
        elif ROLE != TOKEN:
            angle = m.to(tl.float32) * frequency
            result = own * tl.cos(angle) + sign * turned * tl.sin(angle)
    if CLIP_ROTATED:
        result = clipped(result, clip)
    if is_query:
        out = (b * H + head) * D + d
        if STORE > 0:
            tl.store(raw_query + out, own, mask=mask)
        grown = 1.0
        if XPOS and ROLE != TOKEN:
            grown = tl.exp2(m.to(tl.float32) * zeta_of(d, xpos_rate, D))
        tl.store(queries + out, result * grown, mask=mask)
    else:
        result = own if ONE_TENSOR else tl.where(is_value, own, result)
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
            begin = window_start(number, KIND, WINDOW, LOOKBACK)
            slot_of_query = MEMORY + tl.minimum(begin, SINKS) + number - begin
            if ROLE == WRITE:  # that of the first one
                slot_of_query += 1
            if ROLE == READ:
                slot_of_query = slot_of_query * 0

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
            scores += slope[:, None] * (slot_of_query - distance + j).to(tl.float32)[None, :]
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
    partial, maxima, gates, sink_logits, out,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, NP: tl.constexpr,
    GATED: tl.constexpr, SINK: tl.constexpr, IN_PAIRS: tl.constexpr,
):  # fmt: skip
    """Joins the parts of each head's attention, (B · H, N, D), into (B, H · D); a gate opens it to the first one.

    With SINK each head has a learned sink, which joins the sum of the softmax.
    """
    row = tl.program_id(0).to(tl.int64)
    n, d = tl.arange(0, NP), tl.arange(0, DP)
    is_part, mask = n < PARTS, d < D
    index = row * PARTS + n
    most = tl.load(maxima + 2 * index, mask=is_part, other=float("-inf"))
    total = tl.load(maxima + 2 * index + 1, mask=is_part, other=0.0)
    states = tl.load(partial + index[:, None] * D + d[None, :], mask=is_part[:, None] & mask[None, :], other=0.0)
    sink = float("-inf")
    if SINK:
        sink = tl.load(sink_logits + row % H).to(tl.float32) * 1.4426950408889634
    greatest = tl.maximum(tl.max(most, 0), sink)
    share = tl.exp2(most - greatest)
    result = tl.sum(states * share[:, None], 0) / (tl.sum(total * share, 0) + tl.exp2(sink - greatest))
    if GATED:
        gate = tl.sigmoid(tl.load(gates + row % H).to(tl.float32))
        most = tl.where(n == 0, float("-inf"), most)
        greatest = tl.maximum(tl.max(most, 0), sink)
        share = tl.exp2(most - greatest)
        rest = tl.sum(states * share[:, None], 0) / (tl.sum(total * share, 0) + tl.exp2(sink - greatest))
        result = gate * result + (1 - gate) * rest
    column = d
    if IN_PAIRS:
        column = tl.where(d % 2 == 0, d // 2, D // 2 + d // 2)
    tl.store(out + row * D + column, result, mask=mask)


__all__ = ["attend_kernel", "attend_pairs_kernel", "join_kernel", "place_kernel", "ring_slot_of", "window_start"]
