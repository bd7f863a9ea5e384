# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Holds the state of a batch of streams between forward calls, as an `OlmemCache` of the layers in `state_olmem`.

Shapes: B batch, M memory slots.
"""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .admission_olmem import damage
from .cache_file_olmem import MOST_ROOM, read_state, write_state
from .compat_olmem import allocate, assert_on_device, known_here, known_on_host
from .configuration_olmem import OlmemConfig
from .counters_olmem import Counters
from .finite_olmem import refuse_nonfinite
from .rules_olmem import ROTATING
from .state_olmem import SELECTING, OlmemCacheLayer
from .view_olmem import View
from .visibility_olmem import Visibility

# Fields of a configuration whose values do not change the content of a cache.
NO_MATTER = {
    "attention_dropout",
    "residual_dropout",
    "retrieval_device",
    "retrieval_gate_init",
    "retrieval_top_k",
    "memory_bptt_segments",
    "memory_gate_init",
    "sink_logit_init",
    "initializer_range",
    "use_cache",
    "logits_scaling",
    "tie_word_embeddings",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}

# The fields that must be equal in two models, beside their weights, for them to share a cache.
ARCHITECTURE = sorted(
    {field.name for field in fields(OlmemConfig)} - {field.name for field in fields(PreTrainedConfig)} - NO_MATTER
)


def refuse_no_device(name: str, device: torch.device | str) -> None:
    """Raises an error for a device that cannot hold values on this machine."""
    try:
        torch.empty(0, device=device)
        holds_values = torch.device(device).type != "meta"
    except (AssertionError, RuntimeError, TypeError):  # torch may be built without the device
        holds_values = False
    if not holds_values:
        raise ValueError(f"`{name}` must be a device of this machine (got {device!r}); give 'cpu', which always works.")


def architecture(config: OlmemConfig) -> dict[str, Any]:
    """Returns the fields that must be equal in two models, beside their weights, for them to share a cache.

    Of learned sinks it has that there are any, since their first value is soon forgotten.
    """
    found = {name: getattr(config, name) for name in ARCHITECTURE}
    return found if config.sink_logit_init is None else found | {"sink_logit_init": "a number"}


def refuse_other_model(made_for: dict[str, Any], used_for: dict[str, Any]) -> None:
    """Raises an error that names the first field in which two architectures differ."""
    for name in sorted({*used_for, *made_for}):
        value = used_for.get(name, "nothing of it")
        if made_for.get(name, "nothing of it") != value:
            raise ValueError(
                f"`past_key_values` is of another model, whose `{name}` was {made_for.get(name)!r} (got {value!r}); "
                "use it with its own model, or make an `OlmemCache(model.config)`."
            )


def is_olmem_cache(cache: object) -> bool:
    """Returns whether a cache is an OlmemCache, be it the class of this package or of a Hub repository's code."""
    return getattr(cache, "serves_olmem", False) and not isinstance(cache, type)


class OlmemCache(Cache):
    """Holds the state of a batch of streams. Only full-attention layers grow with the length of the streams.

    Args:
        config (`OlmemConfig`): The configuration of the model that uses the cache.
        max_length (`int`, *optional*): The number of tokens for which full-attention layers have room. It is allocated
            at once. Without it these layers grow. Sliding and chunked layers hold their window's span in either case.
        retrieval_device (`str`, *optional*): The device that stores and searches the tokens to retrieve. Defaults to
            `config.retrieval_device`.

    Attributes:
        memory (`torch.Tensor`): The memory (B, M, hidden_size) of each row's current segment, or None before the first
            call.
        counters (`Counters`): The counters of the tokens that were read, on the device and on the host.
        notes (*optional*): What a stream keeps in the file of its cache, as JSON has it.
        step_path (`str`, *optional*): How the last call was computed: "captured" for a replay of a captured step, or
            else the reason why it ran as it is.
    """

    layers: list[OlmemCacheLayer]  # pyright: ignore[reportIncompatibleVariableOverride]
    serves_olmem = True

    def __init__(self, config: OlmemConfig, max_length: int | None = None, retrieval_device: str | None = None):
        if max_length is not None and not (type(max_length) is int and 0 < max_length < MOST_ROOM):
            raise ValueError(
                f"`max_length` must be a positive integer below {MOST_ROOM} (got {max_length!r}); leave it out for "
                "layers that grow."
            )
        model_type = getattr(config, "model_type", type(config).__name__)
        if model_type != OlmemConfig.model_type:
            raise ValueError(
                f"`config` must be of an Olmem model (got model_type {model_type!r}); load an OLMo model with "
                "`OlmemForCausalLM.from_olmo`, and pass its config."
            )
        if retrieval_device is not None:
            refuse_no_device("retrieval_device", retrieval_device)
        self.config = config
        self.max_length = max_length
        self.retrieval_device = retrieval_device or config.retrieval_device
        counters, layers = Counters(), []
        for index, layer_type in enumerate(config.layer_types):
            layers.append(
                OlmemCacheLayer(
                    Visibility.of(config, layer_type),
                    counters,
                    max_length,
                    one_tensor=config.caches_one_tensor,
                    rotates=config.layer_position_embeddings[index] in ROTATING,
                    store_capacity=config.retrieval_capacity if index in config.retrieval_layers else 0,
                    store_device=self.retrieval_device,
                    store_selects=config.selects and index in config.retrieval_layers,
                )
            )
        super().__init__(layers=layers)
        self.counters = counters
        self.sizes = tuple(layer.visibility.sizes for layer in layers)  # of what each layer sees
        self.memory: torch.Tensor | None = None
        self.unfinished = False  # whether a forward call has read some of its segments, but not all
        self.began_anew = False  # whether some rows have begun anew, so that columns are no longer those of one text
        self.notes: object = None
        self.step_path: str | None = None  # "captured", or why the last call ran as it is

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a copy that can be used inside and outside of `torch.inference_mode`."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        with torch.inference_mode(False):
            for name, value in vars(self).items():
                setattr(copied, name, copy.deepcopy(value, memo))
        return copied

    # Between calls

    @property
    def seen(self) -> torch.Tensor:
        """Returns the number of real tokens (B,) that each row has read, on the device."""
        return self.counters.seen

    @property
    def columns(self) -> torch.Tensor:
        """Returns the number of columns () that were read, padding included, on the device."""
        return self.counters.columns

    @property
    def fresh(self) -> bool:
        """Returns whether nothing was read yet."""
        return self.counters.fresh

    @property
    def half_read(self) -> bool:
        """Returns whether a forward call has begun, but not ended."""
        return self.unfinished or any(layer.half_written for layer in self.layers)

    def refuse_half_read(self) -> None:
        """Raises an error if a forward call has begun, but not ended."""
        if self.half_read:
            raise ValueError(
                "`past_key_values` is half written, because a forward call with it was broken off; `reset()` it, or go "
                "on from an earlier copy or file of it."
            )

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Makes the counters of a new batch, or checks that the cache has this batch size and device."""
        if not self.is_initialized or (self.fresh and not any(layer.is_initialized for layer in self.layers)):
            self.counters.begin(batch_size, device)  # also after a refused call
        self.refuse_half_read()
        if self.seen.device != device:
            raise ValueError(
                f"`past_key_values` must be on the device of the input, {device} (got {self.seen.device}); load it "
                f"with `OlmemCache.load(path, config, device={str(device)!r})`, or move the input."
            )
        if len(self.seen) != batch_size:
            raise ValueError(
                f"`past_key_values` holds a batch of {len(self.seen)} (got an input of {batch_size} rows); use a cache "
                "for each batch, or change it by `batch_repeat_interleave` or `batch_select_indices`."
            )

    def check(self, config: OlmemConfig) -> None:
        """Raises an error that names the first field in which a model differs from the model of this cache."""
        if config is not self.config:
            refuse_other_model(architecture(self.config), architecture(config))
            self.config = config
        for layer_type, layer in dict(zip(config.layer_types, self.layers, strict=True)).items():  # one of each type
            visibility = Visibility.of(config, layer_type)
            if layer.visibility.sizes != visibility.sizes:
                raise ValueError(
                    f"`past_key_values` was made for {layer.visibility} before the configuration was changed (got "
                    f"{visibility}); make an `OlmemCache(model.config)`."
                )

    def columns_before(self, length: int) -> int | None:
        """Returns the number of columns that were read, and checks that there is room for `length` more.

        For a step in a recorded graph it returns None, because only the device counts there.
        """
        room = None if self.max_length is None or all(self.is_sliding) else self.max_length
        before = 0 if self.fresh else known_on_host(self.counters.read_columns)
        if before is None and length > 1:
            before = int(self.columns)
        if before is None:
            self.refuse_to_grow()
            if room is not None:
                assert_on_device(self.columns < room, "`max_length` of the OlmemCache is used up")
        elif room is not None and before + length > room:
            raise ValueError(
                f"`max_length` must be at least {before + length} to go on (got {self.max_length}), because "
                "full-attention layers have no more room; make an `OlmemCache(config)` without it, which grows."
            )
        return before

    @property
    def grows(self) -> bool:
        """Tells whether some layer makes more room the more is read."""
        return self.max_length is None and not all(self.is_sliding)

    def refuse_to_grow(self) -> None:
        """Raises an error if a layer has no end, whose room would change with each step of a graph."""
        if self.grows:
            raise ValueError(
                "`max_length` must be given to an OlmemCache whose step is recorded as a graph, so that "
                "full-attention layers have room (got None); make an `OlmemCache(config, max_length=…)`."
            )

    def remember(self, memory: torch.Tensor) -> None:
        """Keeps the memory (B or 1, M, hidden_size) of each row's current segment."""
        if self.memory is None:
            shape = (len(self.seen), *memory.shape[1:])
            self.memory = allocate(*shape, dtype=memory.dtype, device=memory.device)
        self.memory.copy_(memory.detach())

    def advance(self, view: View, columns: int) -> None:
        """Counts the tokens of a call that all layers have read, and this number of columns."""
        for layer in self.layers:
            layer.half_written = False
        self.counters.advance(view, columns)

    def expect(self, length: int) -> None:
        """Says how many tokens may be read in all, so that layers make room for the next of them at once.

        Unlike `max_length`, this is no limit.
        """
        for layer in self.layers:
            layer.expected = length

    def reserve_step(self) -> None:
        """Makes room for one more token in every layer."""
        length = self.counters.read_columns() + 1
        for layer in self.layers:
            layer.reserve(length)
            if layer.store_limit:
                layer.reserve_store(length)

    def count_step(self) -> None:
        """Counts one token of each row that every layer has seen."""
        self.counters.count_step()

    def forget(self, rows: int | Sequence[int] | torch.Tensor | None = None) -> None:
        """Forgets windows, sinks, memory and stored tokens of these rows of the batch, or of all rows."""
        self.refuse_half_read()
        if not self.is_initialized:
            return
        batch = len(self.seen)
        rule = (
            f"`rows` must be among the {batch} of the batch (got {rows!r}); count them from 0, or give a flag for each."
        )
        try:
            chosen = torch.as_tensor(list(range(batch)) if rows is None else rows).flatten().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(rule) from None
        is_mask = chosen.dtype == torch.bool and len(chosen) == batch
        is_index = len(chosen) == 0 or chosen.dtype in (torch.int32, torch.int64)
        chosen = chosen.nonzero()[:, 0] if is_mask else chosen.long()
        if not (is_mask or is_index) or bool(((chosen < -batch) | (chosen >= batch)).any()):
            raise ValueError(rule)
        if not len(chosen):
            return
        self.counters.forget(chosen)
        if not any(self.counters.read_seen()):
            self.reset()
            return
        self.began_anew = True
        for layer in self.layers:
            layer.clear(chosen)

    # Lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of columns that were read, padding included, as `generate()` counts them."""
        return self.counters.read_columns() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the number of keys that the next call of `query_length` columns sees, and the first one's column."""
        return self.layers[layer_idx].get_mask_sizes(query_length)

    @property
    def batch_size(self) -> int:
        """Returns the number of rows, or −1 before the first call."""
        return len(self.seen) or -1

    @property
    def is_initialized(self) -> bool:
        """Returns whether there is a batch."""
        return len(self.seen) > 0

    @property
    def is_croppable(self) -> bool:
        """Returns whether any token can be taken back. It can if all layers have full attention, and without memory."""
        return not self.config.has_memory and not any(self.is_sliding)

    @property
    def max_cache_len(self) -> int:
        """Returns `max_length`, or −1 without one. PEFT asks for it by this name when it tunes a prefix."""
        return -1 if self.max_length is None else self.max_length

    @property
    def nbytes(self) -> int:
        """Returns the bytes of memory and of all buffers of keys and values, with their room for more tokens."""
        memory = 0 if self.memory is None else self.memory.nbytes
        return memory + sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers.values())

    # As tensors

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Returns all tensors of the cache by name, which a step writes in place."""
        tensors = dict(self.counters.tensors)
        if self.memory is not None:
            tensors["memory"] = self.memory
        for index, layer in enumerate(self.layers):
            tensors |= {f"layers_{index}_{name}": buffer for name, buffer in layer.buffers.items()}
        return tensors

    @state.setter
    def state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over other tensors of the same shapes, without a copy."""
        self.counters.hold(tensors)
        if self.memory is not None:
            self.memory = tensors["memory"]
        for index, layer in enumerate(self.layers):
            layer.buffers = {name: tensors[f"layers_{index}_{name}"] for name in layer.buffers}

    def reserve(self) -> None:
        """Makes all the room that the layers will ever need, so that the shapes of their tensors stay."""
        self.refuse_to_grow()
        for layer in self.layers:
            layer.reserve(None)
            if layer.store_limit:
                layer.reserve_store(None)

    # The batch

    def reset(self) -> None:
        """Forgets everything, and keeps the buffers and the number of rows."""
        self.counters.reset()
        self.unfinished = self.began_anew = False
        self.memory = self.notes = None
        for layer in self.layers:
            layer.clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keeps the rows of these beams in this order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(
                f"`repeats` must be a positive integer (got {repeats!r}); use `reset()` to empty the cache."
            )
        rows = torch.arange(len(self.seen), device=self.seen.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows with these indices in this order, or the rows where a mask of the batch is true."""
        if not self.is_initialized:
            return
        batch = len(self.seen)
        rule = (
            f"`indices` must be a tensor of rows among the {batch} of the batch, or of flags (got {indices!r}); "
            "count rows from 0."
        )
        if not isinstance(indices, torch.Tensor) or indices.dim() != 1:
            raise ValueError(rule)
        if indices.dtype == torch.bool:
            if len(indices) != batch:
                raise ValueError(rule)
            indices = indices.nonzero()[:, 0]
        in_range = known_here(((indices >= 0) & (indices < batch)).all(), True)  # on another device torch checks it
        if not len(indices) or indices.dtype not in (torch.int32, torch.int64) or not in_range:
            raise ValueError(rule)
        self.counters.select(indices)
        if self.memory is not None:
            chosen, self.memory = self.memory.index_select(0, indices.to(self.memory.device)), None
            self.remember(chosen)
        for layer in self.layers:
            layer.select(indices)

    # The past

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, which is possible until a window has lost a token.

        With −n it takes back the last n tokens. With n it takes back all but the first n, as older releases.
        """
        if not isinstance(tokens_to_remove, int):
            raise ValueError(
                f"`tokens_to_remove` must be an integer (got {tokens_to_remove!r}); give -n to remove the "
                "last n tokens."
            )
        columns = self.get_seq_length()
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(columns - tokens_to_remove, 0)
        if not removed:
            return
        if self.config.has_memory:
            raise ValueError(
                f"{self.config.memory_rule} to `crop`, because memory cannot take tokens back ({removed} columns are "
                "to go); go on from an earlier copy of the cache."
            )
        for index, layer in enumerate(self.layers):
            if layer.visibility.lets_go(columns):
                raise ValueError(
                    f"`crop` cannot take tokens back once a window has lost some, as that of layer {index} with "
                    f"{layer.visibility.span} tokens has (got {columns} columns, of which {removed} are to go); go on "
                    "from an earlier copy of the cache, or generate with `cache_implementation='dynamic'`."
                )
        if self.counters.has_gaps:
            raise ValueError(
                "`crop` cannot tell tokens from padding in a batch that had padding after a row's first token, or a "
                f"row that began anew (got {removed} columns to take back); pad on the left, or go on from an earlier "
                "copy of the cache."
            )
        if removed > columns:
            raise ValueError(f"`crop` cannot take back more than was read (got {removed} of {columns}); remove fewer.")
        self.counters.crop(removed)

    # On disk

    def save(self, path: str | os.PathLike) -> None:
        """Writes the whole state to a safetensors file, which appears complete or not at all."""
        if not self.is_initialized or self.fresh:
            raise ValueError("`OlmemCache.save` needs a cache that has read tokens; pass it to the model first.")
        self.refuse_half_read()
        tensors = dict(self.counters.tensors)
        if self.memory is not None:
            tensors["memory"] = self.memory
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.used(self.get_seq_length()).items():
                tensors[f"layers.{index}.{name}"] = tensor
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                refuse_nonfinite(
                    f"`{name}`", tensor, "to be saved", "`reset_memory` that row, or save an earlier copy."
                )
        facts = {
            "architecture": architecture(self.config),
            "max_length": self.max_length,
            "began_anew": self.began_anew,
        } | ({} if self.notes is None else {"notes": self.notes})
        write_state(path, tensors, facts)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: OlmemConfig,
        device: torch.device | str = "cpu",
        retrieval_device: str | None = None,
    ) -> Self:
        """Reads a file of `save` onto a device, for a model with that configuration.

        The model must also have the same weights as the one that filled the cache. No file can tell whether it has.
        """
        refuse_no_device("device", device)
        with read_state(path) as file:
            refuse_other_model(file.facts["architecture"], json.loads(json.dumps(architecture(config))))
            cache = cls(config, max_length=file.facts["max_length"], retrieval_device=retrieval_device)
            batch, length = file.batch_size, file.columns
            cache.begin(batch, torch.empty(0, device=device).device)
            wanted = {}
            if config.num_memory_tokens:
                wanted["memory"] = (batch, config.num_memory_tokens, config.hidden_size)
            for index, layer in enumerate(cache.layers):
                for name, size in layer.slots(length).items():
                    states = () if name in SELECTING else (config.head_dim,)
                    wanted[f"layers.{index}.{name}"] = (batch, config.num_key_value_heads, size, *states)
            tensors = file.read(wanted)
            for index, layer in enumerate(cache.layers):
                name = f"layers.{index}.store_counts"
                if name in tensors:
                    found = damage(tensors[name], tensors["seen"], layer.visibility, config.retrieval_capacity)
                    file.require(found is None, f"`{name}` {found}")
            cache.counters.set(**{name: tensors[name] for name in cache.counters.tensors})
            cache.began_anew, cache.notes = file.facts["began_anew"], file.facts["notes"]
            if config.num_memory_tokens:
                refuse_nonfinite("`memory`", tensors["memory"], f"to be loaded from {path}", "load an earlier file.")
                cache.remember(tensors["memory"].to(device))
            for index, layer in enumerate(cache.layers):
                own = [tensors[f"layers.{index}.{name}"] for name in layer.names]
                layer.lazy_initialization(*(each[:, :, :0].to(device) for each in (own[0], own[-1])))
                layer.room = None  # what the file says is made as tokens need it: a small file may say gigabytes
                layer.reserve(length)
                if layer.store_limit:
                    layer.reserve_store(length)
                for name, buffer in layer.used(length).items():
                    buffer.copy_(tensors[f"layers.{index}.{name}"])
        return cache


__all__ = ["OlmemCache", "is_olmem_cache"]
