# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What is remembered between forward calls: one `OlmemCache` for a batch of streams.

Shapes: B batch, M memory slots. The tensors are its layers', see `cache_layer_olmem`; here are the counters, which all
layers share, and what the rows of the batch have in common.
"""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_layer_olmem import OlmemCacheLayer, allocate
from .configuration_olmem import OlmemConfig
from .context_olmem import Context, Sight
from .finite_olmem import refuse_nonfinite_memory

FORMAT = "olmem-cache-3"
# What Transformers calls a cache, as an argument and in outputs: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
# Fields of a configuration that change nothing of what is cached.
NO_MATTER = {
    "attention_dropout",
    "residual_dropout",
    "retrieval_device",
    "retrieval_gate_init",
    "retrieval_top_k",
    "memory_bptt_segments",
    "memory_gate_init",
    "initializer_range",
    "use_cache",
    "logits_scaling",
    "tie_word_embeddings",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}


def one_cache(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Keyword arguments with `cache` or `past_key_values`, which are one argument, under this name."""
    if CACHE_NAME != "cache" and not isinstance(arguments.get("cache"), Cache | None):
        return arguments  # of paged attention, which older releases tell of its own cache by that name
    given = [arguments.pop(known, None) for known in ("cache", "past_key_values")]
    if None not in given:
        raise ValueError("`cache` and `past_key_values` must not both be passed (got both); they are one argument.")
    found = [cache for cache in given if cache is not None]
    return arguments | {name: found[0]} if found else arguments


def takes_cache(forward: Callable) -> Callable:
    """Has a function with an argument `past_key_values` take it as `cache` too, in every release of Transformers."""

    @wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **one_cache(kwargs, "past_key_values"))

    return wrapped


def architecture(config: OlmemConfig) -> dict[str, Any]:
    """What two models have in common, beside their weights, that read each other's cache."""
    names = {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)} - NO_MATTER
    return {name: getattr(config, name) for name in sorted(names)}


def compare(made_for: dict[str, Any], used_for: dict[str, Any]) -> None:
    for name, value in used_for.items():
        if made_for.get(name) != value:
            raise ValueError(
                f"`past_key_values` is of another model: `{name}` was {made_for.get(name)!r} (got {value!r}); use it "
                "with its own model, or make an `OlmemCache(model.config)`."
            )


class OlmemCache(Cache):
    """The state of a batch of streams, bounded where the model's layers are.

    Args:
        config (`OlmemConfig`): of the model that it serves.
        max_length (`int`, *optional*): tokens for which full-attention layers get their room at once, and beyond which
            they have none; without it they grow. Sliding and chunked layers hold their window's span either way.
        retrieval_device (`str`, *optional*): where what retrieval looks up is kept, and looked up; by default as
            `config.retrieval_device` says.

    What it holds of memory is `memory` (B, M, hidden_size), that of each row's running segment.
    """

    layers: list[OlmemCacheLayer]  # pyright: ignore[reportIncompatibleVariableOverride]
    serves_olmem = True  # a Hub repository's code is another class of this name: no `isinstance`

    def __init__(self, config: OlmemConfig, max_length: int | None = None, retrieval_device: str | None = None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be positive (got {max_length!r}); leave it out for layers that grow.")
        if config.model_type != OlmemConfig.model_type:
            raise ValueError(
                f"`config` must be of an Olmem model (got model_type {config.model_type!r}); load an OLMo model with "
                "`OlmemForCausalLM.from_olmo`, and pass its config."
            )
        self.config = config
        self.max_length = max_length
        self.retrieval_device = retrieval_device or config.retrieval_device
        layers = []
        for index, layer_type in enumerate(config.layer_types):
            capacity = config.retrieval_capacity if index in config.retrieval_layers else 0
            context, one_tensor = Context.of(config, layer_type), config.caches_one_tensor
            layers.append(OlmemCacheLayer(context, max_length, one_tensor, capacity, self.retrieval_device))
        super().__init__(layers=layers)
        self.memory: torch.Tensor | None = None  # once something was read by a model that has some
        self.seen = allocate(0, dtype=torch.long, device="cpu")  # (B,) real tokens of each row, once there is a batch
        self.columns = allocate(dtype=torch.long, device="cpu")  # () tokens and padding
        self.fresh = True  # nothing was read yet, as far as the host knows
        self.half_read = False  # a forward call has begun and not ended
        self.began_anew = False  # some rows have: columns are no longer those of one text
        self.gaps = allocate(dtype=torch.bool, device="cpu")  # () whether a row had padding after its first token

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Makes the counters, or checks that they are of that batch, on that device."""
        if not self.is_initialized:
            self.fresh = True
            self.seen = allocate(batch_size, dtype=torch.long, device=device)
            self.columns = allocate(dtype=torch.long, device=device)
            self.gaps = allocate(dtype=torch.bool, device=device)
            if not torch.compiler.is_compiling():
                for counter in (self.seen, self.columns, self.gaps):
                    torch._dynamo.mark_static_address(counter)
        self.refuse_half_read()
        if self.seen.device != device:
            raise ValueError(
                f"`past_key_values` is on {self.seen.device}, the input on {device}; load it with "
                f"`OlmemCache.load(path, config, device={str(device)!r})`, or move the input."
            )
        if len(self.seen) != batch_size:
            raise ValueError(
                f"`past_key_values` holds a batch of {len(self.seen)} (got an input of {batch_size} rows); use a cache "
                "for each batch, or `batch_repeat_interleave` and `batch_select_indices`."
            )

    def refuse_half_read(self) -> None:
        if self.half_read:
            raise ValueError(
                "`past_key_values` is half written: a forward call with it was broken off; `reset()` it, or go on from "
                "a copy or a file made before."
            )

    def remember(self, memory: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Keeps the memory (B or 1, M, hidden_size) of segments that begin, in these rows of the batch or in all."""
        if self.memory is None:
            self.memory = allocate(len(self.seen), *memory.shape[1:], dtype=memory.dtype, device=memory.device)
        self.memory[slice(None) if rows is None else rows] = memory.detach()

    def forget(self, rows: int | list[int] | torch.Tensor | None = None) -> None:
        """Has these rows of the batch, or all, begin anew: window, sinks, memory and what retrieval keeps."""
        self.refuse_half_read()
        if not self.is_initialized:
            return
        batch = len(self.seen)
        chosen = torch.tensor(list(range(batch)) if rows is None else rows).flatten().cpu()
        chosen = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen.long()
        if bool(((chosen < -batch) | (chosen >= batch)).any()):
            raise ValueError(f"`rows` must be of the {batch} of the batch (got {rows!r}); count them from 0.")
        if not len(chosen):
            return
        self.seen[chosen.to(self.seen.device)] = 0
        if not bool(self.seen.any()):
            self.reset()
            return
        self.began_anew = True
        self.gaps.fill_(True)
        self.columns.copy_(self.seen.max())  # all that needs room
        for layer in self.layers:
            layer.length = self.get_seq_length()
            for buffer in layer.buffers.values():
                buffer[chosen.to(buffer.device)] = 0

    def limit(self, context: Context) -> int | None:
        """Tokens that a layer of that context holds at most; None where it grows."""
        return context.span or self.max_length

    def room_for(self, length: int, differentiable: bool) -> int | None:
        """How many columns were read before, for `length` more. None for a step that need not know: one token, where
        every layer is bounded, and asking would make the host wait for the device, or break a compiled graph."""
        on_host = self.seen.device.type == "cpu" and not torch.compiler.is_compiling()
        room = None if all(self.is_sliding) else self.max_length
        if length == 1 and self.is_compileable and not differentiable and not on_host:
            if room is not None:
                torch._assert_async(self.columns < room, "`max_length` of the OlmemCache is used up")
            return None
        before = 0 if self.fresh else self.get_seq_length()
        if room is not None and before + length > room:
            raise ValueError(
                f"`max_length` must be at least {before + length} to go on (got {self.max_length}): this cache's "
                "full-attention layers have room for no more; make an `OlmemCache(config)` without it, which grows."
            )
        return before

    def look(
        self,
        contexts: dict[str, Context],
        numbers: torch.Tensor,
        padded: bool,
        before: int | None,
        differentiable: bool,
    ) -> dict[str, Sight]:
        """What the layers of each type see of new tokens (B, T), `before` as `room_for` has it. Where gradients are
        wanted, no key is read where the cache has it."""
        return {
            layer_type: Sight.with_cache(
                context,
                numbers,
                padded,
                self.seen,
                before,
                limit=self.limit(context),
                in_place=not differentiable and (numbers.shape[1] == 1 or context.span is None),
            )
            for layer_type, context in contexts.items()
        }

    def open(self, layer_idx: int, dtype: torch.dtype) -> OlmemCacheLayer:
        """A layer to be written. From the first of them to `advance` the cache is half written; a refusal before that
        leaves it as it was."""
        layer = self.layers[layer_idx]
        if layer.is_initialized and layer.buffers["keys"].dtype != dtype:
            raise ValueError(
                f"`past_key_values` holds {layer.buffers['keys'].dtype} (got {dtype}); go on with the dtype, and the "
                "autocast, that it was begun with."
            )
        self.half_read = True
        return layer

    def advance(self, sight: Sight, columns: int | None = None) -> None:
        """Counts the tokens of a forward call, or of a part of it, once every layer has seen them; and its columns,
        those of `sight` or so many."""
        self.fresh = self.half_read = False
        real = sight.numbers >= 0
        self.seen.add_(real.sum(-1))
        self.columns.add_(real.shape[1] if columns is None else columns)
        if sight.padded:
            self.gaps.logical_or_((~real & (sight.queries >= 0)).any())

    def check(self, config: OlmemConfig, contexts: dict[str, Context]) -> None:
        """An error that names the field in which the model differs from the one this cache was made for."""
        if config is not self.config:
            compare(architecture(self.config), architecture(config))
            self.config = config
        for layer, layer_type in zip(self.layers, config.layer_types, strict=True):
            if layer.context != contexts[layer_type]:
                raise ValueError(
                    f"`past_key_values` was made for {layer.context} before the configuration was changed (got "
                    f"{contexts[layer_type]}); make an `OlmemCache(model.config)`."
                )

    # Lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read, padding included, as `generate` counts them."""
        return int(self.columns)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and first column of the keys that a next call of that many columns would see, in stream order."""
        columns, span = self.get_seq_length(), self.layers[layer_idx].context.span
        held = columns if span is None else min(columns, span - 1)
        return held + query_length, columns - held

    @property
    def batch_size(self) -> int:
        return len(self.seen) or -1

    @property
    def is_initialized(self) -> bool:
        return len(self.seen) > 0

    @property
    def is_croppable(self) -> bool:
        """Whether any number of tokens may be taken back, which needs layers that let nothing go, and no memory."""
        return not self.config.has_memory and all(layer.context.span is None for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, with the room that is kept for more, and of memory; the counters' few are left
        out."""
        memory = 0 if self.memory is None else self.memory.nbytes
        return memory + sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers.values())

    # The batch

    def reset(self) -> None:
        """Forgets everything and keeps the room, for a batch of as many rows."""
        for counter in (self.seen, self.columns, self.gaps):
            counter.zero_()
        self.half_read = self.began_anew = False
        self.fresh, self.memory = True, None
        for layer in self.layers:
            layer.length = 0
            for buffer in layer.buffers.values():
                buffer.zero_()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.seen), device=self.seen.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        chosen = self.seen.index_select(0, indices.to(self.seen.device))
        if len(chosen) != len(self.seen):
            self.seen = allocate(len(chosen), dtype=torch.long, device=self.seen.device)
        self.seen.copy_(chosen)
        if self.memory is not None:
            chosen, self.memory = self.memory.index_select(0, indices.to(self.memory.device)), None
            self.remember(chosen)
        for layer in self.layers:
            if layer.is_initialized:
                layer.select(indices)

    # The past

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back, `-n` or, as long as Transformers allows it, all beyond the first `n`; possible
        until a window has let go of a token."""
        columns = self.get_seq_length()
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(columns - tokens_to_remove, 0)
        if not removed:
            return
        if self.config.has_memory:
            raise ValueError(
                f"`crop` cannot take back what memory has taken in (got {removed} columns to go): "
                f"{self.config.memory_rule}; go on from a copy made before."
            )
        for index, layer in enumerate(self.layers):
            if layer.context.span is not None and columns > layer.context.span:
                raise ValueError(
                    f"`crop` cannot take tokens back once a window has let go of some: layer {index} holds "
                    f"{layer.context.span} (got {columns}, of which {removed} are to go); go on from a copy made "
                    "before, or generate with `cache_implementation='dynamic'`."
                )
        if bool(self.gaps):
            raise ValueError(
                "`crop` cannot tell tokens from padding in a batch that had padding after a row's first token, or a "
                f"row that began anew (got {removed} columns to take back); pad on the left, or go on from a copy made "
                "before."
            )
        if removed > columns:
            raise ValueError(f"`crop` cannot take back more than was read (got {removed} of {columns}).")
        self.seen.sub_(removed).clamp_(min=0)
        self.columns.sub_(removed)
        for layer in self.layers:
            layer.length = columns - removed

    # On disk

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything to one safetensors file, which appears whole or not at all."""
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError("`OlmemCache.save` needs safetensors: pip install safetensors") from error

        if not self.is_initialized or self.fresh:
            raise ValueError("`OlmemCache.save` needs a cache that has read something; pass it to the model first.")
        self.refuse_half_read()
        tensors = {"seen": self.seen, "columns": self.columns, "gaps": self.gaps}
        if self.memory is not None:
            refuse_nonfinite_memory(
                self.memory, None, "to be saved", "`reset_memory` that row, or save a copy made before."
            )
            tensors["memory"] = self.memory
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.used(self.get_seq_length()).items():
                tensors[f"layers.{index}.{name}"] = tensor
        metadata = {
            "format": FORMAT,
            "architecture": json.dumps(architecture(self.config)),
            "max_length": json.dumps(self.max_length),
            "began_anew": json.dumps(self.began_anew),
        }
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            scratch.touch()
            mode = scratch.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, scratch, metadata)
            scratch.chmod(mode)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: OlmemConfig,
        device: torch.device | str = "cpu",
        retrieval_device: str | None = None,
    ) -> Self:
        """Reads what `save` wrote, onto a device, for a model of that configuration; the weights must be the same too,
        which no file can tell."""
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError("`OlmemCache.load` needs safetensors: pip install safetensors") from error

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except SafetensorError as error:
            raise ValueError(f"`path` must be a whole file of `OlmemCache.save` (got {path}: {error}).") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"`path` must be a file of `OlmemCache.save` (got {path}, of format {metadata.get('format')!r}); this "
                f"version reads {FORMAT!r}."
            )

        def require(holds: bool, problem: str) -> None:
            if not holds:
                raise ValueError(
                    f"`path` must be a whole file of `OlmemCache.save` (got {path}: {problem}); save it anew."
                )

        saved, max_length, began_anew = (
            parse(metadata.get(name)) for name in ("architecture", "max_length", "began_anew")
        )
        require(isinstance(saved, dict), "its `architecture` is damaged")
        require(max_length is None or (type(max_length) is int and max_length > 0), "its `max_length` is damaged")
        require(isinstance(began_anew, bool), "its `began_anew` is damaged")
        compare(saved, json.loads(json.dumps(architecture(config))))
        kinds = {"seen": (1, torch.long), "columns": (0, torch.long), "gaps": (0, torch.bool)}
        for name, (dimensions, dtype) in kinds.items():
            stored = tensors.get(name)
            fits = stored is not None and (stored.dim(), stored.dtype) == (dimensions, dtype) and stored.numel() > 0
            require(fits, f"`{name}` is damaged or missing")
        batch, length = len(tensors["seen"]), int(tensors["columns"])
        least, most = int(tensors["seen"].min()), int(tensors["seen"].max())
        require(0 <= least <= most <= length, f"`seen` counts {least} to {most} tokens in {length} `columns`")

        cache = cls(config, max_length=max_length, retrieval_device=retrieval_device)
        cache.begin(batch, tensors["seen"].to(device).device)
        for name in kinds:
            getattr(cache, name).copy_(tensors[name])
        cache.fresh, cache.began_anew = False, began_anew
        if config.num_memory_tokens:
            memory, shape = tensors.get("memory"), (batch, config.num_memory_tokens, config.hidden_size)
            require(memory is not None and memory.shape == shape, "`memory` is damaged or missing")
            refuse_nonfinite_memory(tensors["memory"], None, f"to be loaded from {path}", "load a file saved before.")
            cache.remember(tensors["memory"].to(device))
        for index, layer in enumerate(cache.layers):
            prefix, window = layer.context.num_prefix, min(length, layer.limit or length)
            names = dict.fromkeys(layer.names, prefix + window)
            names |= {"prefix": prefix} if prefix and not layer.one_tensor else {}
            if layer.store_limit:
                names |= dict.fromkeys(layer.store_names, min(length, layer.store_limit))
            for name, slots in names.items():
                shape = (batch, config.num_key_value_heads, slots, config.head_dim)
                found = tensors.get(f"layers.{index}.{name}")
                fits = found is not None and found.shape == shape and found.is_floating_point()
                require(fits, f"`layers.{index}.{name}` is damaged or missing")
            stored = {name: tensors[f"layers.{index}.{name}"] for name in names}
            layer.lazy_initialization(*(stored[name][:, :, :0].to(device) for name in layer.names))
            layer.length = length
            layer.reserve(length)
            if layer.store_limit:
                layer.reserve_store(length)
            for name, place in layer.used(length).items():
                place.copy_(stored[name])
        return cache


def parse(text: str | None) -> Any:
    """What JSON says, or what no field can be where it says nothing."""
    try:
        return json.loads(text or "")
    except ValueError:
        return ...


__all__ = ["OlmemCache"]
