# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Launches the Triton kernels of a step: one token a row, read by a whole model without gradients.

Shapes: B rows, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from .kernel_attention_olmem import attend_kernel, attend_pairs_kernel, join_kernel, place_kernel
from .kernel_norms_olmem import add_norm_kernel, tl, triton
from .kernel_products_olmem import gated_few_kernel, gated_one_kernel, product_few_kernel, product_one_kernel
from .kernel_retrieval_olmem import retrieve_kernel, score_kernel
from .ops_olmem import Operations
from .step_olmem import READS, WRITES, LayerShape, StepState, norm_kind

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "Elephant": 1}  # by the names of their classes, as `activate` counts
FEW = 64  # rows up to which products are bound by their weights' bytes
COMPILERS = 4  # threads; more of them wait for one another where all kernels are found in Triton's cache
MOST_QUERIES = 64  # that one program attends for

Kernel = triton.runtime.KernelInterface
Argument = torch.Tensor | int | float | bool | tl.dtype


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


def kind_of(argument: Argument) -> Hashable:
    """Returns what of an argument a kernel is compiled for: all of a number, unless it is an address."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return "address" if isinstance(argument, int) and argument >= 2**31 else argument


class KernelOperations(Operations):
    """Computes the parts of a layer by kernels, for states of one token a row, without gradients.

    Args:
        device: where they run.
        dtype: of weights and states.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.blocks, self.dtype, self.type = Blocks.of(device), dtype, TYPES[dtype]
        self.device = device
        self.compiler: ThreadPoolExecutor | None = None  # while kernels are compiled, and not launched
        self.compiling: dict[Hashable, Future[None]] = {}  # by what makes a kernel another one

    def launch(self, kernel: Kernel, grid: tuple[int, ...], *arguments: Argument, num_warps: int) -> None:
        """Launches a kernel, or has it compiled while that is what `compile` wants."""
        if self.compiler is None:
            kernel[grid](*arguments, num_warps=num_warps)
        else:
            key = kernel, num_warps, *map(kind_of, arguments)
            if key not in self.compiling:
                self.compiling[key] = self.compiler.submit(self.warm, kernel, grid, arguments, num_warps)

    def warm(self, kernel: Kernel, grid: tuple[int, ...], arguments: tuple[Argument, ...], num_warps: int) -> None:
        """Compiles a kernel for such arguments, if it is not, and makes its launcher, for which a compiler runs too."""
        with torch.cuda.device(self.device):
            _ = kernel.warmup(*arguments, grid=grid, num_warps=num_warps).run

    def compile(self, compute: Callable[[], object]) -> None:
        """Compiles all kernels that a function would launch, side by side; what it computes is of no use.

        Triton compiles most of the time outside of Python, where threads do not wait for one another.
        """
        with ThreadPoolExecutor(COMPILERS) as self.compiler:
            try:
                compute()
                for each in self.compiling.values():
                    each.result()
            finally:
                self.compiler, self.compiling = None, {}

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
        more = *more, grids[0], grids[0] + grids[1], has_bias, self.type, *sizes
        self.launch(kernel, (sum(grids),), *arguments, *more, num_warps=4)
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
        self.launch(
            add_norm_kernel, (states.numel() // width,), states if residual is None else residual, states,
            states if weight is None else weight, states if bias is None else bias, out, width, eps,
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
        arguments = states, out, gate.weight, up.weight, count, width, *more, kind, self.type, *sizes
        self.launch(kernel, (triton.cdiv(count, sizes[-3]),), *arguments, num_warps=4)
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
        self.launch(
            place_kernel, (batch, heads * (1 + has_slots) + kv_heads * (1 if shape.one_tensor else 2)),
            projected, state.seen, rows, fresh if role == WRITES else state.table,
            window_query, prefix_query, raw_query, frequencies, stride,
            *(none if each is None else each for each in (q_weight, q_bias, k_weight, k_bias)),
            *shape.eps, float(shape.clip or 0.0), shape.rotary_factor, shape.trained_length, shape.xpos_rate,
            heads, kv_heads, size, padded, q_first, k_first, v_first, width,
            triton.next_power_of_2(max(heads, kv_heads) * size), shape.qk_norm, norm,
            shape.clip is not None and not shape.clips_rotated, shape.clip is not None and shape.clips_rotated,
            shape.rotates, shape.one_tensor, shape.is_difference,
            shape.xpos_rate > 0, *seen_kind, memory, sinks, store, role, has_slots, self.type, num_warps=4,
        )  # fmt: skip
        group, gate, sink_logits = heads // kv_heads, None if role == READS else shape.memory_gate, shape.sink_logits
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
            self.launch(
                attend_pairs_kernel, (batch * heads, parts),
                window_query, state.seen, state.table, partial, maxima, frequencies, scaling,
                heads, size, padded // 2, *seen_kind, memory, sinks, splits, extra, parts,
                self.type, *sizes, num_warps=4,
            )  # fmt: skip
        else:
            self.launch(
                attend_kernel, (batch // queries * triton.cdiv(queries, together) * kv_heads, parts),
                window_query, prefix_query, state.seen, rows, state.table, fresh, partial, maxima,
                frequencies, none if shape.linspace_scale is None else shape.linspace_scale,
                scaling, shape.linspace_step, shape.xpos_rate,
                heads, kv_heads, size, padded, group, padded_group, queries, together,
                in_pairs, shape.one_tensor, shape.xpos_rate > 0, shape.linspace_scale is not None, has_slots,
                *seen_kind, memory, sinks, splits, role, extra, parts, self.type, *sizes,
                num_warps=2 if sizes[0] * padded <= 4096 and not in_pairs and padded_group == 16 else 4,
            )  # fmt: skip
        output = projected.new_empty(batch, 1, heads * size)
        self.launch(
            join_kernel, (batch * heads,),
            partial, maxima, none if gate is None else gate, none if sink_logits is None else sink_logits, output,
            heads, size, padded, parts, triton.next_power_of_2(parts), gate is not None, sink_logits is not None,
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
        sizes = self.blocks.attention(padded, 1, self.dtype.itemsize)
        size_of_block, blocks = sizes[0], triton.cdiv(capacity, sizes[0])
        scores = query.new_empty(batch, heads, blocks, size_of_block, dtype=torch.float32)
        maxima = query.new_empty(batch, heads, blocks, dtype=torch.float32)
        shares = max(1, min(8 * self.blocks.processors // (batch * kv_heads), blocks // 4))
        share = triton.cdiv(blocks, shares) * size_of_block
        seen_kind = shape.kind, shape.window, visibility.lookback, visibility.num_sinks
        self.launch(
            score_kernel, (batch * kv_heads, triton.cdiv(capacity, share)),
            query, state.seen, state.table, scores, maxima, shape.scaling,
            heads, kv_heads, size, padded, group, max(triton.next_power_of_2(group), 16),
            *seen_kind, capacity, shape.store, share, self.type, *sizes, num_warps=2,
        )  # fmt: skip
        top_k = min(shape.top_k, capacity)
        # The best are in the blocks whose greatest scores are the best.
        _, chosen = maxima.topk(min(top_k, blocks), dim=-1, sorted=False)
        some = scores.gather(2, chosen[..., None].expand(-1, -1, -1, size_of_block)).flatten(2)
        best, index = some.topk(top_k, dim=-1, sorted=False)
        places = chosen.gather(-1, index // size_of_block) * size_of_block + index % size_of_block
        self.launch(
            retrieve_kernel, (batch * heads,),
            best, places, state.seen, state.table, shape.retrieval_gate, output,
            heads, kv_heads, size, padded, top_k, triton.next_power_of_2(top_k),
            *seen_kind, capacity, shape.store, shape.one_tensor, self.type, num_warps=4,
        )  # fmt: skip


__all__ = ["FEW", "Blocks", "KernelOperations"]
