# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of products with weights, for one row of states and for few."""

from .kernel_norms_olmem import tl, triton


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


__all__ = ["gated_few_kernel", "gated_one_kernel", "product_few_kernel", "product_one_kernel"]
