# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of many tokens in half precision: what is neither a product nor attention, in one pass over memory.

This file is imported only where its kernels run. What they compute is defined by the plain operations (ops_olmem,
positions_olmem), from which they differ by rounding alone.

Shapes: R rows of any leading dimensions; B batch, H heads, T tokens, D head dim.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .decode_olmem import is_changed
from .ops_olmem import OlmemRMSNorm, Operations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Fused operations need triton (got none installed); `pip install triton`.") from error

BLOCK = 2048  # numbers that a program of an elementwise kernel computes
WIDEST = 16384  # numbers of a row that one program can hold
SILU = ("SiLU", "SiLUActivation")


# Kernels


@triton.jit
def rotate_kernel(
    states, out, cos, sin, heads, tokens, batch_stride, head_stride, token_stride, row_stride, sign,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotates the heads of one token; states lie in any order, and `out` as (B, T, H, D)."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, D // 2)[None, :]
    mask = (h < heads) & (d < D // 2)
    angle = row * row_stride + token * D + d
    c, s = tl.load(cos + angle), tl.load(sin + angle) * sign
    source = states + row * batch_stride + token * token_stride + h * head_stride + d
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2, mask=mask, other=0.0).to(tl.float32)
    target = out + (row * tokens + token) * heads * D + h * D + d
    tl.store(target, first * c - second * s, mask=mask)
    tl.store(target + D // 2, second * c + first * s, mask=mask)


@triton.jit
def norm_kernel(
    residual, states, weight, out, width, eps,
    HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the RMS norm of one row, plus a residual."""
    n = tl.arange(0, BLOCK)
    mask, row = n < width, tl.program_id(0).to(tl.int64) * width
    found = tl.load(states + row + n, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(found * found, 0) / width + eps)
    result = tl.load(weight + n, mask=mask, other=0.0).to(tl.float32) * (found * scale)
    if HAS_RESIDUAL:
        result = result.to(DTYPE).to(tl.float32) + tl.load(residual + row + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + n, result, mask=mask)


@triton.jit
def gate_kernel(gate, up, out, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes silu(gate) · up."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    g = tl.load(gate + n, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + n, (g * tl.sigmoid(g)).to(DTYPE).to(tl.float32) * u, mask=mask)


@triton.jit
def gate_gradient_kernel(gate, up, gradient, of_gate, of_up, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the gradients of silu(gate) · up."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    g = tl.load(gate + n, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + n, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(gradient + n, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(of_up + n, d * (g * share).to(DTYPE).to(tl.float32), mask=mask)
    tl.store(of_gate + n, d * u * share * (1 + g * (1 - share)), mask=mask)


@triton.jit
def join_kernel(
    buffer, rows, slots, new, out, heads, past, columns, rows_row, rows_column,
    buffer_row, buffer_head, slots_row, new_row, new_head, new_column,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Copies the heads of one column, from a slot of a buffer or from new states, to `out` as (R, P + C, K, D)."""
    column, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, D)[None, :]
    mask = (h < heads) & (d < D)
    target = out + ((row * (past + columns) + column) * heads + h) * D + d
    if column < past:
        slot = tl.load(slots + row * slots_row + column)
        place = tl.load(rows + row * rows_row + column * rows_column)
        source = buffer + place * buffer_row + slot * D + h * buffer_head + d
    else:
        source = new + row * new_row + (column - past) * new_column + h * new_head + d
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)


@triton.jit
def store_kernel(
    buffer, rows, slots, states, heads, last, rows_row, rows_column,
    buffer_row, buffer_head, slots_row, states_row, states_head, states_column,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Copies the heads of one column to a slot of a buffer; −1 stands for the last one."""
    column, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, D)[None, :]
    mask = (h < heads) & (d < D)
    slot = tl.load(slots + row * slots_row + column)
    slot = tl.where(slot < 0, last, slot)
    found = tl.load(states + row * states_row + column * states_column + h * states_head + d, mask=mask, other=0.0)
    place = tl.load(rows + row * rows_row + column * rows_column)
    tl.store(buffer + place * buffer_row + slot * D + h * buffer_head + d, found, mask=mask)


@triton.jit
def merge_kernel(
    first, second, first_total, second_total, out, total, count, heads, size,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Merges the outputs (N, H, D) of two parts for one query by the log-sum-exps (H, N) of their scores."""
    query = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, D)[None, :]
    is_head = h < heads
    place = h.to(tl.int64) * count + query
    a = tl.load(first_total + place, mask=is_head, other=0.0)
    b = tl.load(second_total + place, mask=is_head, other=0.0)
    most = tl.maximum(a, b)
    safe = tl.where(most == -float("inf"), 0.0, most)
    one, two = tl.exp(a - safe), tl.exp(b - safe)
    joined = one + two
    scale = tl.where(joined > 0, 1 / joined, 0.0)
    tl.store(total + place, tl.where(joined > 0, safe + tl.log(joined), -float("inf")), mask=is_head)
    mask = is_head[:, None] & (d < size)
    place = (query * heads + h[:, None]) * size + d
    x = tl.load(first + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(second + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, x * (one * scale)[:, None] + y * (two * scale)[:, None], mask=mask)


@triton.jit
def merge_blocks_kernel(
    own, before, own_total, before_total, out, total, count, heads, window, first, size,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Merges what one query sees of its own block and of the block before (windows_olmem)."""
    query = tl.program_id(0).to(tl.int64)
    block, place = query // window, query % window
    other = window - 2 - place  # among the reversed queries
    h, d = tl.arange(0, HEADS), tl.arange(0, D)[None, :]
    is_head = h < heads
    has_other = is_head & (h * 0 + block >= first) & (h * 0 + other >= 0)
    row = tl.maximum(block - first, 0) * window + tl.maximum(other, 0)
    a = tl.load(own_total + (block * heads + h) * window + place, mask=is_head, other=0.0)
    place_before = (row // window * heads + h) * window + row % window
    b = tl.load(before_total + place_before, mask=has_other, other=-float("inf"))
    most = tl.maximum(a, b)
    one, two = tl.exp(a - most), tl.exp(b - most)
    scale = 1 / (one + two)
    tl.store(total + h.to(tl.int64) * count + query, most + tl.log(one + two), mask=is_head)
    mask = is_head[:, None] & (d < size)
    x = tl.load(own + (query * heads + h[:, None]) * size + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(before + (row * heads + h[:, None]) * size + d, mask=mask & has_other[:, None], other=0.0).to(
        tl.float32
    )
    result = x * (one * scale)[:, None] + y * (two * scale)[:, None]
    tl.store(out + (query * heads + h[:, None]) * size + d, result, mask=mask)


# What launches them

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Returns states (B, H, T, D), whose D lie together, rotated by their angles times a sign."""
    batch, heads, tokens, size = states.shape
    out = states.new_empty(batch, tokens, heads, size)
    strides = states.stride(0), states.stride(1), states.stride(2)
    row = tokens * size if len(cos) > 1 else 0
    sizes = {"D": size, "HEADS": triton.next_power_of_2(heads)}
    rotate_kernel[(tokens, batch)](states, out, cos, sin, heads, tokens, *strides, row, sign, **sizes)
    return out.transpose(1, 2)


def current(states: torch.Tensor) -> Any:
    """Returns a context in which kernels are launched where the states are."""
    return torch.cuda.device(states.device) if states.is_cuda else nullcontext()


def steps(numbers: torch.Tensor) -> tuple[int, int]:
    """Returns how far apart rows and columns of numbers (R, T) lie, 0 where one of them stands for all."""
    (rows, columns), (row, column) = numbers.shape, numbers.stride()
    return row if rows > 1 else 0, column if columns > 1 else 0


def can_fuse(norm: nn.Module, states: torch.Tensor) -> bool:
    """Tells whether a kernel computes what a norm's own code computes of states (R, width)."""
    if type(norm) is not OlmemRMSNorm or is_changed(norm) or type(norm.weight) is not nn.Parameter:
        return False
    return type(states) is torch.Tensor and states.shape[-1] <= WIDEST and states.numel() > 0


def launch_norm(residual: torch.Tensor | None, norm: OlmemRMSNorm, states: torch.Tensor) -> torch.Tensor:
    """Returns the RMS norm of states (R, width), plus a residual (R, width) if there is one."""
    width, states = states.shape[-1], states.contiguous()
    residual, out = None if residual is None else residual.contiguous(), torch.empty_like(states)
    block = triton.next_power_of_2(width)
    sizes = {"HAS_RESIDUAL": residual is not None, "DTYPE": TYPES[states.dtype], "BLOCK": block}
    sizes["num_warps"] = min(max(block // 512, 1), 16)
    with current(states):
        given = residual, states, norm.weight, out, width, norm.eps
        norm_kernel[(states.numel() // width,)](*given, **sizes)
    return out


class Rotate(torch.autograd.Function):
    """Rotates states (B, H, T, D) by cosines and sines (R, T, D); the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, states, cos, sin):
        """Returns the rotated states."""
        ctx.save_for_backward(cos, sin)
        return launch_rotate(states, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]  by its decorator
        """Returns the gradient of the states."""
        gradient = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        return launch_rotate(gradient, *ctx.saved_tensors, -1.0), None, None


def is_square(*states: torch.Tensor) -> bool:
    """Tells whether kernels can read the heads of states (…, D): D numbers together, and a power of two of them."""
    size = states[0].shape[-1]
    return all(each.stride(-1) == 1 for each in states) and size & (size - 1) == 0


def merge_two(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the outputs (N, H, D) of two parts by the log-sum-exps (H, N) of their scores."""
    count, heads, size = first[0].shape
    out, total = first[0].new_empty(count, heads, size), first[1].new_empty(heads, count)  # in the kernel's order
    with current(out):
        outputs, totals = zip(*((out.contiguous(), total.contiguous()) for out, total in (first, second)), strict=True)
        sizes = {"D": triton.next_power_of_2(size), "HEADS": triton.next_power_of_2(heads)}
        merge_kernel[(count,)](*outputs, *totals, out, total, count, heads, size, **sizes)
    return out, total


def merge_blocks(
    own: tuple[torch.Tensor, torch.Tensor], before: tuple[torch.Tensor, torch.Tensor], first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges what blocks see of themselves and of the block before, as `joined` of windows_olmem does."""
    blocks, heads, window, size = own[0].shape
    count = blocks * window
    out, total = own[0].new_empty(count, heads, size), own[1].new_empty(heads, count)
    outputs = [each.transpose(1, 2).contiguous() for each in (own[0], before[0])]  # (b, W, H, D)
    totals = [each.contiguous() for each in (own[1], before[1])]
    sizes = {"D": triton.next_power_of_2(size), "HEADS": triton.next_power_of_2(heads)}
    with current(out):
        merge_blocks_kernel[(count,)](*outputs, *totals, out, total, count, heads, window, first, size, **sizes)
    return out, total


class Gated(torch.autograd.Function):
    """Computes silu(gate) · up (R, width)."""

    @staticmethod
    def forward(ctx: Any, gate, up):
        """Returns the product."""
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        count = gate.numel()
        gate_kernel[(triton.cdiv(count, BLOCK),)](gate, up, out, count, DTYPE=TYPES[gate.dtype], BLOCK=BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]  by its decorator
        """Returns the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        of_gate, of_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        arguments = gate, up, gradients[0].contiguous(), of_gate, of_up, count
        gate_gradient_kernel[(triton.cdiv(count, BLOCK),)](*arguments, DTYPE=TYPES[gate.dtype], BLOCK=BLOCK)
        return of_gate, of_up


class FusedOperations(Operations):
    """Computes norms, activations and rotations of many tokens in one pass each, where gradients are wanted or not."""

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if not is_square(states) or not states.numel():
            return super().rotate(states, cos, sin)
        with current(states):
            return Rotate.apply(states, cos.contiguous(), sin.contiguous())  # pyright: ignore[reportReturnType]

    def join_past(
        self, buffer: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        if not is_square(buffer, new) or buffer.stride(2) != buffer.shape[3]:
            return super().join_past(buffer, rows, slots, new)
        batch, heads, columns, size = new.shape
        past = slots.shape[1]
        out = new.new_empty(batch, past + columns, heads, size)
        strides = buffer.stride(0), buffer.stride(1), steps(slots)[0], new.stride(0), new.stride(1), new.stride(2)
        with current(new):
            given = buffer, rows, slots, new, out, heads, past, columns, *steps(rows), *strides
            join_kernel[(past + columns, batch)](*given, D=size, HEADS=triton.next_power_of_2(heads))
        return out.transpose(1, 2)

    def store(self, buffer: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
        if not is_square(buffer, states) or buffer.stride(2) != buffer.shape[3]:
            super().store(buffer, rows, slots, states)
            return
        batch, heads, columns, size = states.shape
        strides = *(buffer.stride(0), buffer.stride(1), steps(slots)[0]), *states.stride()[:3]
        with current(states):
            given = buffer, rows, slots, states, heads, buffer.shape[2] - 1, *steps(rows), *strides
            store_kernel[(columns, batch)](*given, D=size, HEADS=triton.next_power_of_2(heads))

    def norm(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        if not can_fuse(norm, states):
            return norm(states)
        if torch.is_grad_enabled():
            return nn.functional.rms_norm(states, (states.shape[-1],), norm.weight, norm.eps)
        return launch_norm(None, norm, states)

    def add_norm(
        self, residual: torch.Tensor, norm: nn.Module, states: torch.Tensor, dropout: nn.Module
    ) -> torch.Tensor:
        if torch.is_grad_enabled() or not can_fuse(norm, states) or residual.dtype != states.dtype:
            return residual + dropout(self.norm(norm, states))
        return launch_norm(residual, norm, states)

    def gated(self, activation: nn.Module, gate: nn.Module, up: nn.Module, states: torch.Tensor) -> torch.Tensor:
        gates, ups = gate(states), up(states)
        is_silu = type(activation).__name__ in SILU and not is_changed(activation)
        if not is_silu or type(gates) is not torch.Tensor or not (gates.is_contiguous() and ups.is_contiguous()):
            return activation(gates) * ups
        with current(gates):
            return Gated.apply(gates, ups)  # pyright: ignore[reportReturnType]
