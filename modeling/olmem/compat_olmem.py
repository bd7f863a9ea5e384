# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Hides what differs between releases of Transformers and torch, and what may not be read while a graph is recorded."""

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, NoReturn

import torch
import torch.nn.modules.module as _module
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

logger = logging.get_logger(__name__)

# The name of a cache in the arguments and outputs of Transformers' models. It is `cache` from release 5.24 on.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Whether an export can join heads of a length that stands for any (see `can_join_heads`).
JOINS_HEADS = torch.__version__ >= "2.13"
# Paged attention functions, with the one that attends to learned sinks in their place. `paged|sdpa` is in some releases
# only, and leaves learned sinks out.
PAGED = {"paged|eager": "paged|eager", "paged|sdpa": "paged|eager"}


def rename_cache(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns keyword arguments in which the cache has this name, whether it came as `cache` or `past_key_values`."""
    if CACHE_NAME != "cache" and not isinstance(arguments.get("cache"), Cache | None):
        return arguments  # older releases pass the cache of paged attention by that name
    given = [arguments.pop(known, None) for known in ("cache", "past_key_values")]
    if None not in given:
        raise ValueError(
            "`cache` and `past_key_values` must not both be passed (got both); pass one, since they are one argument."
        )
    found = [cache for cache in given if cache is not None]
    return arguments | {name: found[0]} if found else arguments


def takes_cache(forward: Callable) -> Callable:
    """Lets a function take its argument `past_key_values` as `cache` too, in every release of Transformers."""

    @wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **rename_cache(kwargs, "past_key_values"))

    return wrapped


def is_recorded(tensor: torch.Tensor | None = None) -> bool:
    """Returns whether a graph is being recorded, so that the code must not depend on the values of tensors."""
    return is_tracing(tensor) or (tensor is not None and tensor.device.type == "meta")


def is_exported() -> bool:
    """Tells whether a program is being exported.

    The compiler of torch 2.11 takes `torch.compiler.is_exporting()` for true whatever it traces, so its flag is read.
    """
    return torch.compiler._is_exporting_flag


def returns_tensors() -> bool:
    """Tells whether a call returns tensors alone, as a program that is being exported must."""
    return is_exported()


@torch.compiler.assume_constant_result
def _refuse_here(message: str) -> NoReturn:
    raise ValueError(message)


def refuse(message: str) -> NoReturn:
    """Raises a `ValueError`, also out of an export, which would report nothing but an exception that it observed."""
    if is_exported():
        _refuse_here(message)
    raise ValueError(message)


def warn_once(message: str) -> None:
    """Warns once in a process, and never from a recorded graph, which would break there."""
    if not is_recorded():
        logger.warning_once(message)


def without_graph(reason: str, when: Callable[..., bool]) -> Callable[[Callable], Callable]:
    """Leaves a function to Python where a compiler meets it with arguments of which `when` is true.

    The reason is what a compiler for whole graphs alone reports. An export can leave nothing to Python.
    """

    def decorate(function: Callable) -> Callable:
        left = torch.compiler.disable(function, reason=reason)

        @wraps(function)
        def wrapped(*args):
            is_compiled = torch.compiler.is_compiling() and not is_exported()
            return left(*args) if is_compiled and when(*args) else function(*args)

        return wrapped

    return decorate


def certain(condition: bool) -> bool:
    """Tells whether a condition on lengths holds: of a length that stands for any, whether it holds for all of them."""
    return statically_known_true(condition)


def can_join_heads(length: int) -> bool:
    """Tells whether heads of states (B, heads, length, …) can be joined, as those of query heads that share a key are.

    An export by torch before 2.13 takes the lower one of two strides for that of what is joined. It cannot tell which
    one that is where the length stands for any, and refuses it.
    """
    return JOINS_HEADS or not (is_exported() and isinstance(length, torch.SymInt))


def refuse_any(length: int, message: str) -> None:
    """Raises an error for a length that stands for any, in a program that is being exported."""
    if is_exported() and isinstance(length, torch.SymInt):
        raise ValueError(message)


def refuse_longer(length: int, most: int, rule: str, remedy: str) -> None:
    """Raises an error for too great a length; where it stands for any, what is recorded does when it runs."""
    if certain(length > most):
        raise ValueError(f"{rule} (got {length}); {remedy}")
    if not certain(length <= most):
        assert_on_device(torch.scalar_tensor(length) <= most, f"{rule}; {remedy}")


def known(tensor: torch.Tensor, otherwise: Any) -> Any:
    """Returns the value of a tensor of one element, for which the host waits, or a default in a recorded graph."""
    return otherwise if is_recorded(tensor) else tensor.item()


def known_here(tensor: torch.Tensor, otherwise: Any) -> Any:
    """Returns the value of a tensor of one element if it is on the CPU, and a default if the host would wait for it."""
    return known(tensor, otherwise) if tensor.device.type == "cpu" else otherwise


def known_on_host(read: Callable[[], Any]) -> Any:
    """Returns what a function reads on the host, or None in a recorded graph, which must not depend on it."""
    return None if is_recorded() else read()


def surely(condition: torch.Tensor) -> bool:
    """Tells whether a condition of one element is known to hold, for which the host waits.

    In a recorded graph it is not known. On the meta device, where there are no values, it holds.
    """
    return condition.is_meta or known(condition, False)


def hides_values(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor has values that cannot be read, as in a recorded graph. On the meta device it has none."""
    return is_recorded(tensor) and not tensor.is_meta


def refuse_unless(condition: torch.Tensor, message: str, explain: Callable[[], str]) -> None:
    """Raises an error, in the words of `explain`, unless a condition of one element holds. The host waits for it.

    What is recorded checks the condition where it runs, with a message that depends on no value. On the meta device,
    where there are no values, it holds.
    """
    if hides_values(condition):
        assert_on_device(condition, message)
    elif not condition.is_meta and not bool(condition):
        raise ValueError(explain())


def with_gradients_of(function: type[torch.autograd.Function], plain: Callable, *inputs: Any) -> Any:
    """Returns what a plain function computes, whose gradients an autograd function computes in less memory.

    A recorded graph holds the plain function, of which whoever runs the graph makes the gradients.
    """
    return function.apply(*inputs) if torch.is_grad_enabled() and not is_recorded(inputs[0]) else plain(*inputs)


def pieces(length: int, size: int, like: torch.Tensor) -> list[slice]:
    """Cuts a length into slices of at most that size, or into one slice of any length in a recorded graph."""
    if is_recorded(like):
        return [slice(None)]
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def is_cut(length: int, size: int) -> bool:
    """Tells whether `pieces` cuts a length into several slices of at most a size."""
    return not certain(length <= size) and not is_recorded()


def lowest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `count` lowest values (…, S) in ascending order with their indices, or all in a recorded graph."""
    return values.sort() if is_recorded(values) else values.topk(count, largest=False)


def columns_of(mask: torch.Tensor) -> tuple[int, int]:
    """Returns the first column of a mask (R, S) that is true in any row, and the column after the last one.

    They are (0, 0) if the mask is true nowhere. In a recorded graph, or a CUDA graph that is captured, they span all
    columns.
    """
    if is_recorded(mask) or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 0, mask.shape[1]
    found = mask.any(0).nonzero()[:, 0]
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def table_of(tables: dict[Any, torch.Tensor], key: Any, size: int, make: Callable[[], torch.Tensor]) -> Any:
    """Returns the table of a key, made anew if it has fewer than `size` rows, or None in a recorded graph."""
    if is_recorded():
        return None
    if key not in tables or len(tables[key]) < size:
        tables[key] = make()
    return tables[key]


def has_complex(device: torch.device) -> bool:
    """Returns whether a device has fast complex products. Recorded graphs use real ones, which a compiler fuses."""
    return device.type in ("cpu", "cuda") and not is_recorded()


def keep_address(*tensors: torch.Tensor) -> None:
    """Marks tensors that are written in place, so that a compiled step does not copy them."""
    if not is_recorded():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Checks a condition on the tensor's device, without waiting for it."""
    torch._assert_async(condition, message)


def has_global_hooks() -> bool:
    """Tells whether hooks were registered that run for every module."""
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


def why_not_replayed(device: torch.device) -> str | None:
    """Returns why no captured graph can run in place of a call on a device, or None."""
    if is_recorded():
        return "the call is traced"
    return None if device.type == "cuda" else "the model is not on a GPU"


def can_capture(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why no step can be captured on a device for weights of a dtype, or None."""
    if device.type != "cuda":
        return "the model is not on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton, whose kernels a step runs, is not installed; `pip install triton`"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7 or (dtype == torch.bfloat16 and major < 8):
        return f"kernels for {dtype} do not run on compute capability {major}.{minor}"
    return None


def has_triton() -> bool:
    """Tells whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def can_fuse_operations(device: torch.device, dtype: torch.dtype) -> bool:
    """Tells whether Triton's kernels may compute for embeddings of a dtype what modules compute, without their hooks.

    Autocast decides for each operation of a module, so it leaves the modules as they are.
    """
    if not has_triton() or torch.is_autocast_enabled(device.type):
        return False
    return dtype in (torch.bfloat16, torch.float16) and not has_global_hooks()


CAPTURING = threading.Lock()  # a process captures one graph at a time


def capture(
    compute: Callable[[], torch.Tensor], pool: tuple[int, int], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Records what a function launches as a graph, with memory from a pool, and returns it with its output."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    recording = torch.cuda.graph(
        graph,
        pool=pool,  # pyright: ignore[reportArgumentType]  whose type torch keeps to itself
        stream=stream,
        capture_error_mode="thread_local",
    )
    with CAPTURING, recording:
        output = compute()
    return graph, output


def recomputes_hooks(layer: torch.nn.Module) -> bool:
    """Returns whether reentrant checkpointing computes a layer's FSDP2 hooks again, as older Transformers lets it.

    The gradients of keys and values that a later call of the layer reads are wrong then.
    """
    keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    is_inside = "__call__" in vars(GradientCheckpointingLayer) and keywords.get("use_reentrant", False)
    return is_inside and isinstance(layer, FSDPModule)


def is_sharded(layer: torch.nn.Module) -> bool:
    """Tells whether ranks gather a layer's weights from one another whenever they call it."""
    return isinstance(layer, FSDPModule | FullyShardedDataParallel)


def refuse_uneven(layer: torch.nn.Module, calls: int, device: torch.device) -> None:
    """Raises an error where ranks call a sharded layer different numbers of times, which would wait for one another."""
    if not is_sharded(layer):
        return
    numbers = torch.tensor([calls, -calls], device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    most, least = int(numbers[0]), -int(numbers[1])
    if most != least:
        raise ValueError(
            f"`input_ids` must hold as many segments of memory on each rank where layers are sharded (got {least} to "
            f"{most}); give all ranks texts of one length, or shard the model as a whole."
        )


def can_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tells whether torch's flash operations for sequences run on a device, for embeddings of a dtype and a head dim.

    Autocast changes the dtype of what is projected.
    """
    if device.type != "cuda" or head_dim % 8 or head_dim > 256:
        return False
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    is_there = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return is_there and torch.cuda.get_device_capability(device) >= (8, 0) and not is_recorded()


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    most_queries: int,
    most_keys: int,
    is_causal: bool,
    before: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends over sequences on a GPU (see varlen_olmem); the log-sum-exp (H, N) of a query without keys is +∞.

    This is the operation under `torch.nn.attention.varlen`, whose signature differs between releases, and which lets no
    backward pass take another output and log-sum-exp than its own.
    """
    limits = {"window_size_left": before, "window_size_right": 0 if is_causal else -1}
    found = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        0.0,
        is_causal and before < 0,
        False,
        scale=scaling,
        **limits,
    )
    return found[0], found[1]


def can_attend_in_blocks(query: torch.Tensor, window: int) -> bool:
    """Tells whether a causal operation is faster than that for windows, for queries (N, H, D) and this window.

    It is cuDNN's on Hopper. Its calls are worth their launches from a tile of queries on, and it takes heads of up to
    128 features in every release that torch comes with.
    """
    if query.device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    is_allowed = torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(query.device)[0] == 9
    return is_allowed and window >= 128 and query.shape[2] <= 128 and query.shape[2] % 8 == 0


def causal_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends causally from queries (B, H, T, D) to as many keys and values.

    Returns:
        The output (B, H, T, D) and the log-sum-exp of the scores (B, H, T).
    """
    if query.device.type == "cuda":
        given = query, key, value, None, True, 0.0, True, False
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(*given, scale=scaling)
        return found[0], found[1].view(query.shape[:3])
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    total: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    most_queries: int,
    most_keys: int,
    is_causal: bool,
    before: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of queries, keys and values of `flash_forward`, for any output and log-sum-exp."""
    limits = {"window_size_left": before, "window_size_right": 0 if is_causal else -1}
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that there is not
    return torch.ops.aten._flash_attention_backward(
        gradient.contiguous(),
        query,
        key,
        value,
        output.contiguous(),
        total.contiguous(),
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        0.0,
        is_causal and before < 0,
        random_state,
        torch.empty(0, device=query.device),
        scale=scaling,
        **limits,
    )


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a copy of a tensor on a device, to which the host sends it without waiting."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def moves_inputs(module: torch.nn.Module) -> bool:
    """Returns whether a module takes inputs from any device.

    It does if accelerate moves them, or if its weights are on the meta device, where nothing is computed.
    """
    return hasattr(module, "_hf_hook") or any(weight.device.type == "meta" for weight in module.parameters())


def allocate(*shape: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Returns zeros that may be written in place inside and outside of `torch.inference_mode`."""
    with torch.inference_mode(False):
        new = torch.zeros(shape, dtype=dtype, device=device)
    keep_address(new)
    return new


__all__ = [
    "CACHE_NAME",
    "PAGED",
    "allocate",
    "assert_on_device",
    "can_attend_in_blocks",
    "can_capture",
    "can_flash",
    "can_fuse_operations",
    "can_join_heads",
    "capture",
    "causal_forward",
    "certain",
    "columns_of",
    "flash_backward",
    "flash_forward",
    "has_complex",
    "has_global_hooks",
    "has_triton",
    "hides_values",
    "is_cut",
    "is_sharded",
    "known",
    "known_here",
    "known_on_host",
    "lowest",
    "moves_inputs",
    "pieces",
    "recomputes_hooks",
    "refuse",
    "refuse_any",
    "refuse_longer",
    "refuse_uneven",
    "refuse_unless",
    "rename_cache",
    "returns_tensors",
    "sent",
    "surely",
    "table_of",
    "takes_cache",
    "warn_once",
    "why_not_replayed",
    "with_gradients_of",
    "without_graph",
]
