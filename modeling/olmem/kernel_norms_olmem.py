# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of norms, and what all kernels have in common.

Files of kernels are imported only where these run. What a kernel computes is defined by the plain operations of the
modules (ops_olmem, modeling_olmem), from which it differs by rounding alone.

Shapes: B rows.
"""

from .step_olmem import LAYER, LAYER_PLAIN, RMS

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("A step by kernels needs triton (got none installed); `pip install triton`.") from error

RMS_NORM, LAYER_NORM, PLAIN_NORM = tl.constexpr(RMS), tl.constexpr(LAYER), tl.constexpr(LAYER_PLAIN)


@triton.jit
def normed(states, weight, bias, mask, n, count, eps, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the norm of states in float32, rounded to a dtype; `count` of them are not masked."""
    if KIND == RMS_NORM:
        scale = tl.rsqrt(tl.sum(states * states, 0) / count + eps)
        return (tl.load(weight + n, mask=mask, other=0.0).to(tl.float32) * (states * scale)).to(DTYPE).to(tl.float32)
    mean = tl.sum(states, 0) / count
    centred = tl.where(mask, states - mean, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred, 0) / count + eps)
    if KIND == LAYER_NORM:
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


__all__ = ["LAYER_NORM", "PLAIN_NORM", "RMS_NORM", "add_norm_kernel", "tl", "triton"]
