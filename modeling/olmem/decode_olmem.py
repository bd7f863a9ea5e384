# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""A decode step as a replay: one token a row on a GPU, captured once as a CUDA graph and replayed.

What is captured are the layers themselves, with the kernels of `kernels_olmem` in place of their plain operations. The
kernels find an `OlmemCache` through a table of addresses on the device, so that a new, loaded or reordered cache costs
no capture: another table is written. Counters, room and segments stay the host's, which does not wait for the device.

Where a row begins a segment, its memory is written and read by graphs of their own, a row at a time, before the step.

A call that cannot be captured runs as it is, and `OlmemCache.step_path` says why.
"""

import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import is_
from typing import Self

import torch
from torch import nn

from .cache_olmem import OlmemCache
from .compat_olmem import can_capture, capture, has_global_hooks, why_not_replayed
from .configuration_olmem import OlmemConfig
from .finite_olmem import refuse_nonfinite
from .plan_olmem import layer_kinds
from .positions_olmem import OlmemRotaryEmbedding
from .rules_olmem import ROTATING
from .segments_olmem import REMEDY, OlmemMemory
from .step_olmem import READS, TOKENS, WRITES, StepOperations, StepPlan, StepState
from .visibility_olmem import Visibility

PACKAGE = __name__.rpartition(".")[0]
PLAIN_MODULES = (nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout, nn.ModuleList)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CONSTANTS = ("eps", "scaling", "trained_length")  # ends of the names of what kernels take over from modules
FIELDS = 6  # of a layer in the table of addresses
CAPTURED = "captured"
MOST_CAPTURED = 16  # batch sizes of a model; the oldest is dropped for another
MOST_BEGINNING = 8  # rows that begin segments at a step; more of them are faster side by side, as the network is

FIRST_LAYERS = 4  # of a step, in a graph of their own: the device computes them while the others are made ready
PARTS = slice(0, FIRST_LAYERS), slice(FIRST_LAYERS, None)

Pool = tuple[int, int]  # names the memory that graphs share

# Passes hidden states (B, 1, hidden_size) through some layers by their plans and states, and after the last one through
# the norm.
Compute = Callable[[torch.Tensor, Sequence[StepPlan], Sequence[StepState], slice], torch.Tensor]


class Watch:
    """Notices that weights or modules of a model are not those that were captured.

    Args:
        modules: the modules that a step runs.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.roots = list(modules)
        self.modules = [each for module in modules for each in module.modules()]
        children = [(each._modules, name, child) for each in self.modules for name, child in each.named_children()]
        self.places = [(siblings, name) for siblings, name, _ in children]
        self.children = [child for _, _, child in children]
        self.hooks = [hooks for each in self.modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self.attributes = [vars(each) for each in self.modules]  # a `forward` among them would be called instead
        self.counts = list(map(len, self.attributes))
        holders = [holder for each in self.modules for holder in (each._parameters, each._buffers)]
        self.holders: list[tuple[Mapping[str, torch.Tensor | None], str]] = [
            (holder, name) for holder in holders for name in holder
        ]
        self.tensors = [holder[name] for holder, name in self.holders]
        self.layout = self.read_layout()
        self.constants = [(own, name) for own in self.attributes for name in own if name.endswith(CONSTANTS)]
        self.values = [own[name] for own, name in self.constants]
        self.kind: tuple[torch.device, torch.dtype] | None = None  # of the weights, as `reason` finds it

    def read_layout(self) -> list[tuple[int, int] | None]:
        """Returns the address and the number of elements of each weight and buffer."""
        found = [holder[name] for holder, name in self.holders]
        return [None if each is None else (each.data_ptr(), each.numel()) for each in found]

    def reason(self) -> str | None:
        """Returns why these modules cannot be captured, or None."""
        if has_global_hooks():
            return "hooks are registered for every module"
        found: set[tuple[torch.device, torch.dtype]] = set()
        for module in self.modules:
            kind = type(module)
            is_known = kind in PLAIN_MODULES or kind.__module__.startswith(
                (f"{PACKAGE}.", "torch.nn.modules.activation", "transformers.activations")
            )
            if not is_known:
                return f"a layer holds a {kind.__name__}, whose own code must run"
            if is_changed(module):
                return f"a {kind.__name__} has a hook or another `forward`"
            if has_other_form(module):
                return f"the biases of a {kind.__name__} are not those that the kernels add"
            for weight in module.parameters(recurse=False):
                if type(weight) is not nn.Parameter:
                    return f"a weight is a {type(weight).__name__}"
                if not is_plain(weight):
                    return "a weight is not contiguous, or not aligned to 16 bytes"
                found.add((weight.device, weight.dtype))
        if len(found) > 1:
            return f"weights are of several devices or dtypes ({', '.join(sorted(map(str, found)))})"
        if not found:
            return None
        device, dtype = self.kind = found.pop()
        if dtype not in DTYPES:
            return f"weights are {dtype}"
        return can_capture(device, dtype)

    def holds(self) -> bool:
        """Tells whether modules and weights are those that were captured."""
        if has_global_hooks() or any(self.hooks) or list(map(len, self.attributes)) != self.counts:
            return False
        try:
            children = [siblings[name] for siblings, name in self.places]
            tensors = [holder[name] for holder, name in self.holders]
            is_same = children == self.children and all(map(is_, tensors, self.tensors))
            is_same = is_same and [own[name] for own, name in self.constants] == self.values
            return is_same and self.read_layout() == self.layout
        except (KeyError, RuntimeError):  # a part is gone, or has no address any more
            return False


def has_other_form(module: nn.Module) -> bool:
    """Tells whether a module has biases in a way that the kernels do not know."""
    if type(module) is nn.LayerNorm:
        return (module.weight is None) != (module.bias is None)
    biased = {name: child.bias is not None for name, child in module.named_children() if type(child) is nn.Linear}
    attention = {biased[name] for name in ("q_proj", "k_proj", "v_proj") if name in biased}
    return len(attention) > 1 or biased.get("gate_proj", False) or biased.get("up_proj", False)


def is_changed(module: nn.Module) -> bool:
    """Tells whether a module has hooks or a `forward` of its own, as accelerate and tensor parallelism give it one."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or "forward" in module.__dict__ or module._compiled_call_impl is not None)


def is_plain(weight: torch.Tensor) -> bool:
    """Tells whether a weight lies in memory as kernels read it."""
    return weight.is_contiguous() and weight.data_ptr() % 16 == 0


class Table:
    """Holds the addresses of a cache's buffers on the device, where captured kernels find them.

    Args:
        num_layers: the number of layers.
        device: where the kernels run.
    """

    def __init__(self, num_layers: int, device: torch.device):
        with torch.inference_mode(False):
            self.tensor = torch.zeros(num_layers, FIELDS, device=device, dtype=torch.long)
        self.addresses: dict[int | None, list[int]] = {}  # by the first layer of a part

    def point_at(self, cache: OlmemCache, part: slice) -> None:
        """Writes the addresses of some layers of a cache, if they are not there."""
        layers = cache.layers[part]
        buffers = [buffer for layer in layers for buffer in layer.buffers.values()]
        addresses = [buffer.data_ptr() for buffer in buffers] + [buffer.stride(1) for buffer in buffers]
        if addresses != self.addresses.get(part.start):
            if layers:
                self.tensor[part].copy_(torch.tensor([layer.addresses() for layer in layers], dtype=torch.long))
            self.addresses[part.start] = addresses


class Planned:
    """Makes the plans and states of a model's layers for what is captured.

    Args:
        config: the model's configuration.
        rotary: its angles.
        operations: what the layers compute with.
        device: where the model is.
    """

    def __init__(
        self, config: OlmemConfig, rotary: OlmemRotaryEmbedding, operations: StepOperations, device: torch.device
    ):
        self.config, self.rotary, self.operations = config, rotary, operations
        self.kinds = layer_kinds(config)
        self.table = Table(len(config.layer_types), device)
        self.failure: str | None = None  # why there is no graph

    def plans(self) -> list[StepPlan]:
        """Returns the plan of each layer."""
        return [
            StepPlan(
                Visibility.of(self.config, kind.layer_type),
                self.operations,
                self.rotary.factor(kind.layer_type),
                self.rotary.trained_length,
            )
            for kind in self.kinds
        ]

    def states(
        self,
        seen: torch.Tensor,
        place: torch.Tensor,
        role: int = TOKENS,
        rows: torch.Tensor | None = None,
        fresh: torch.Tensor | None = None,
    ) -> list[StepState]:
        """Returns the state of each layer for tokens at places (B,); the others are those of `StepState`."""
        rotating = {kind.layer_type for kind in self.kinds if kind.position_embedding in ROTATING}
        frequencies = {
            layer_type: self.rotary.frequencies_at(place[:, None], layer_type).view(-1, self.config.head_dim // 2)
            for layer_type in sorted(rotating)
        }
        return [
            StepState(self.table.tensor[index], seen, frequencies.get(kind.layer_type), role, rows, fresh)
            for index, kind in enumerate(self.kinds)
        ]

    def first_layers(self) -> list[slice]:
        """Returns the first layer of each kind, whose kernels are those of all layers of the kind."""
        return [slice(index, index + 1) for index in sorted(map(self.kinds.index, set(self.kinds)))]


class CapturedStep(Planned):
    """Holds one step of a batch size, captured as graphs, with the tensors that it reads and writes.

    Args:
        config: the model's configuration.
        rotary: its angles.
        operations: what the layers compute with.
        batch_size: rows.
        device: where the model is.
        dtype: of its weights.
    """

    def __init__(
        self,
        config: OlmemConfig,
        rotary: OlmemRotaryEmbedding,
        operations: StepOperations,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__(config, rotary, operations, device)
        with torch.inference_mode(False):
            self.embeddings = torch.zeros(batch_size, 1, config.hidden_size, device=device, dtype=dtype)
            self.seen = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.graphs: list[torch.cuda.CUDAGraph] = []  # of each of PARTS
        self.outputs: list[torch.Tensor] = []  # of each graph

    def describe(self) -> tuple[list[StepPlan], list[StepState]]:
        """Returns the plan and the state of each layer for the step that the tensors of this object describe."""
        return self.plans(), self.states(self.seen, self.config.num_memory_tokens + self.seen)

    def compute(self, compute: Compute) -> torch.Tensor:
        """Computes the step that the tensors of this object describe, and writes it to the cache in the table."""
        plans, states = self.describe()
        hidden_states = self.embeddings
        for part in PARTS:
            hidden_states = compute(hidden_states, plans, states, part)
        return hidden_states

    def compile(self, compute: Compute) -> None:
        """Compiles the kernels of a step side by side."""
        given, parts = self.describe(), [*self.first_layers(), slice(len(self.kinds), None)]
        self.operations.compile(lambda: [compute(self.embeddings, *given, part) for part in parts])

    def record(self, compute: Compute, pool: Pool) -> None:
        """Records the step as graphs, the first of which also finds positions."""
        given = None
        hidden_states, graphs, outputs = self.embeddings, [], []
        for part in PARTS:

            def some(part: slice = part, hidden_states: torch.Tensor = hidden_states) -> torch.Tensor:
                nonlocal given
                given = given or self.describe()
                return compute(hidden_states, *given, part)

            graph, hidden_states = capture(some, pool, self.embeddings.device)
            graphs.append(graph)
            outputs.append(hidden_states)
        self.graphs, self.outputs = graphs, outputs

    def first(self, embeddings: torch.Tensor, cache: OlmemCache, compute: Compute, pool: Pool) -> torch.Tensor | None:
        """Computes a step of embeddings (B, 1, hidden_size) kernel by kernel, which compiles them, and records it.

        Returns None where kernels or capture fail, and remembers why. What was written to the cache is written again by
        the step as it is.
        """
        self.enter(embeddings, cache)
        for part in PARTS:
            self.table.point_at(cache, part)
        try:
            self.compile(compute)
            output = self.compute(compute).clone()
            self.record(compute, pool)
        except Exception as error:  # of a compiler, of a driver, of memory that is short
            self.failure = f"its capture failed ({error})"
            warnings.warn(f"A step runs as it is: {self.failure}.", stacklevel=2)
            return None
        return output

    def enter(self, embeddings: torch.Tensor, cache: OlmemCache) -> None:
        """Takes over embeddings (B, 1, hidden_size) and the numbers of the new tokens."""
        self.embeddings.copy_(embeddings)
        self.seen.copy_(cache.seen)

    def replay(
        self, embeddings: torch.Tensor, cache: OlmemCache, holds: Sequence[Callable[[], bool]]
    ) -> torch.Tensor | None:
        """Replays a step of embeddings (B, 1, hidden_size), each graph once its layers are seen to be those captured.

        Returns None if they are not. Layers that were replayed before have then written to the cache what any step of
        the same token writes again.
        """
        for part, graph, is_same in zip(PARTS, self.graphs, holds, strict=True):
            if not is_same():
                return None
            self.table.point_at(cache, part)
            if not part.start:
                self.enter(embeddings, cache)
            graph.replay()
        return self.outputs[-1].clone()


class CapturedMemory(Planned):
    """Holds what ends a segment of one row, captured as a graph: its memory is written, and read for the next segment.

    Args:
        config: the model's configuration.
        rotary: its angles.
        operations: what the layers compute with.
        norm: the norm of written memory.
        device: where the model is.
        dtype: of its weights.
    """

    def __init__(
        self,
        config: OlmemConfig,
        rotary: OlmemRotaryEmbedding,
        operations: StepOperations,
        norm: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__(config, rotary, operations, device)
        self.norm = norm
        count, heads = config.num_memory_tokens, config.num_key_value_heads
        with torch.inference_mode(False):
            self.memory = torch.zeros(count, 1, config.hidden_size, device=device, dtype=dtype)
            self.seen = torch.zeros(1, device=device, dtype=torch.long)
            self.row = torch.zeros(1, device=device, dtype=torch.long)
            self.numbers = torch.arange(count, device=device)
            self.scratch = torch.zeros(2, heads, count, config.head_dim, device=device, dtype=dtype)
            fields = [*(each.data_ptr() for each in self.scratch), count, 0, 0, 0]
            self.fresh = torch.tensor(fields, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.written = self.memory

    def compute(self, compute: Compute) -> torch.Tensor:
        """Writes the memory (M, 1, hidden_size) that the tensors of this object describe, and lets layers read it."""
        plans, layers = self.plans(), slice(0, len(self.kinds))
        place = self.config.num_memory_tokens + self.seen + self.numbers
        states = self.states(self.seen, place, WRITES, self.row, self.fresh)
        written = self.operations.norm(self.norm, compute(self.memory, plans, states, layers))
        compute(written, plans, self.states(self.seen, self.numbers, READS, self.row), layers)
        return written

    def compile(self, compute: Compute) -> None:
        """Compiles the kernels of `compute` side by side."""
        plans, place = self.plans(), self.numbers
        states = [
            self.states(self.seen, place, WRITES, self.row, self.fresh),
            self.states(self.seen, place, READS, self.row),
        ]
        self.operations.compile(
            lambda: [compute(self.memory, plans, each, layers) for each in states for layers in self.first_layers()]
        )

    def run(self, row: int, cache: OlmemCache, compute: Compute, pool: Pool) -> torch.Tensor | None:
        """Writes and reads the memory of a row of a cache, and returns it, (1, M, hidden_size).

        The first time it runs kernel by kernel and is recorded, as `CapturedStep.first` is. Where that fails it returns
        None, remembers why, and leaves the cache as it was.
        """
        assert cache.memory is not None
        self.table.point_at(cache, slice(0, None))
        self.memory.copy_(cache.memory[row, :, None])
        self.seen.copy_(cache.seen[row : row + 1])
        self.row.fill_(row)
        if self.graph is None:
            read = [
                buffer[row, :, : self.config.num_memory_tokens]
                for layer in cache.layers
                for name, buffer in layer.buffers.items()
                if name in layer.names
            ]
            kept = [each.clone() for each in read]
            try:
                self.compile(compute)
                written = self.compute(compute).clone()
                self.graph, self.written = capture(lambda: self.compute(compute), pool, self.memory.device)
            except Exception as error:  # of a compiler, of a driver, of memory that is short
                for each, before in zip(read, kept, strict=True):
                    each.copy_(before)
                self.failure = f"its capture failed ({error})"
                warnings.warn(f"Memory is written as it is: {self.failure}.", stacklevel=2)
                return None
            return written.transpose(0, 1)
        self.graph.replay()
        return self.written.transpose(0, 1)

    def begin_segments(self, rows: Sequence[int], cache: OlmemCache, compute: Compute, pool: Pool) -> str | None:
        """Lets rows of a cache begin a segment with their next token, or returns why they cannot in this way."""
        memory = cache.memory
        for row in rows:
            written = None if self.failure else self.run(row, cache, compute, pool)
            if written is None or memory is None:
                return self.failure
            cache.unfinished = True  # until the step is done
            memory = memory.index_copy(0, self.row, written.to(memory.dtype))
        if memory is not None:
            refuse_nonfinite("`memory`", memory, "at the end of a segment", REMEDY)
            cache.remember(memory)
        return None


class DecodeSteps:
    """Finds, captures and replays the steps of one model.

    Attributes:
        enabled (`bool`): whether steps may be captured at all.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None  # of the last step
        self.forget()

    def forget(self) -> None:
        """Drops all that was captured, once the device has done with it."""
        if self.stream is not None:
            self.stream.synchronize()
        self.watches: list[Watch] = []  # of the modules of each of PARTS
        self.reason: str | None = None
        self.operations: StepOperations | None = None
        self.captured: dict[Hashable, CapturedStep] = {}
        self.memories: dict[Hashable, CapturedMemory] = {}
        self.pool: Pool | None = None
        self.stream = None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Returns an object that has captured nothing, for the copy of a model."""
        return self.__class__()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Pickles an object that has captured nothing."""
        return self.__class__, ()

    def why_not(self, config: OlmemConfig, cache: OlmemCache, embeddings: torch.Tensor, training: bool) -> str | None:
        """Returns why a call of these embeddings (B, T, hidden_size) runs as it is, or None if nothing speaks for it.

        Whether the model's modules can be captured is not asked here.
        """
        reason = why_not_replayed(embeddings.device)
        if reason is not None:
            return reason
        if not self.enabled:
            return "steps are not captured, because `model.steps.enabled` is False"
        if cache.fresh:
            return "the call reads a prompt"
        if embeddings.shape[1] != 1:
            return f"the call reads {embeddings.shape[1]} tokens a row"
        if torch.is_grad_enabled():
            return "gradients are enabled; use `torch.no_grad()`"
        if training and (config.attention_dropout or config.residual_dropout):
            return "dropout is active; call `model.eval()`"
        if torch.is_autocast_enabled(embeddings.device.type):
            return "the call casts by `torch.autocast`"
        if not all(layer.is_initialized for layer in cache.layers):
            return "the cache has more layers than were run"
        if config.selects and config.retrieval_layers:
            return "a store that selects is not captured, because `retrieval_admission` is 'learned'"
        buffers = [buffer for layer in cache.layers for buffer in layer.buffers.values()]
        is_same = {buffer.dtype for buffer in buffers} == {embeddings.dtype}
        if not is_same or {buffer.get_device() for buffer in buffers} != {embeddings.get_device()}:
            return "the cache is of another dtype than the model, or not on its device alone"
        rows = rows_that_begin(config, cache)
        if any(cache.counters.read_seen()[row] == 0 for row in rows):
            return "a row begins a stream"
        if len(rows) > MOST_BEGINNING:
            return f"{len(rows)} rows begin segments, and their memory is written"
        return None

    def ready(self, parts: Sequence[Sequence[nn.Module]], embeddings: torch.Tensor, wholly: bool) -> str | None:
        """Returns why these modules cannot be captured, or None; forgets what was captured of others.

        Args:
            parts: the modules of each of PARTS.
            wholly: whether all of them are looked at, or those of the first part alone.
        """
        watches = self.watches
        is_same = [watch.roots for watch in watches] == [list(part) for part in parts]
        looked_at = watches if wholly else watches[:1]
        if not is_same or self.reason is not None or not all(watch.holds() for watch in looked_at):
            self.forget()
            self.watches = watches = [Watch(part) for part in parts]
            found = [reason for watch in watches if (reason := watch.reason()) is not None]
            self.reason = found[0] if found else None
        kinds = {watch.kind for watch in watches} - {None}
        if self.reason is None and kinds != {(embeddings.device, embeddings.dtype)}:
            return "embeddings and layers are of several devices or dtypes"
        return self.reason

    def run(
        self,
        config: OlmemConfig,
        rotary: OlmemRotaryEmbedding,
        modules: tuple[Sequence[nn.Module], nn.Module, OlmemMemory | None],
        cache: OlmemCache,
        embeddings: torch.Tensor,
        compute: Compute,
    ) -> torch.Tensor | None:
        """Computes a step of embeddings (B, 1, hidden_size), or returns None where it cannot be captured.

        Args:
            modules: what `compute` runs, which are the layers and the norm after them, and the model's memory.
            compute: passes embeddings through the layers by these plans and states.
        """
        layers, norm, memory = modules
        device, dtype, batch = embeddings.device, embeddings.dtype, len(embeddings)
        parts = [rotary, norm, *([] if memory is None else [memory]), *layers[PARTS[0]]], layers[PARTS[1]]
        with self.lock, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            rows = rows_that_begin(config, cache)
            key = batch, config.retrieval_top_k, cache.sizes
            reason = self.ready(parts, embeddings, wholly=bool(rows) or key not in self.captured)
            step = self.captured.get(key)
            if config.caches_one_tensor and "dynamic" in rotary.rope_type.values():
                reason = "keys that are values too cannot be turned by frequencies of their own"
            if reason is None and step is not None:
                reason = step.failure
            if reason is None and rows and step is None:
                reason = "a row begins a segment with the first step"
            if reason is not None:
                cache.step_path = reason
                return None
            cache.reserve_step()
            if self.operations is None or self.pool is None:
                self.operations = make_operations(device, dtype)
                self.pool = torch.cuda.graph_pool_handle()
            stream, before = torch.cuda.current_stream(device), self.stream
            if before is not None and before != stream:
                stream.wait_stream(before)
            self.stream = stream
            if rows and memory is not None:
                if cache.sizes not in self.memories:
                    made_of = config, rotary, self.operations, memory.norm, device, dtype
                    self.memories[cache.sizes] = CapturedMemory(*made_of)
                cache.step_path = self.memories[cache.sizes].begin_segments(rows, cache, compute, self.pool)
                if cache.step_path is not None:
                    return None
            if step is None:
                if len(self.captured) == MOST_CAPTURED:
                    torch.cuda.synchronize(device)
                    del self.captured[next(iter(self.captured))]
                step = self.captured[key] = CapturedStep(config, rotary, self.operations, batch, device, dtype)
                output = step.first(embeddings, cache, compute, self.pool)
            else:
                output = step.replay(embeddings, cache, [lambda: True, *(watch.holds for watch in self.watches[1:])])
            if output is None and step.failure is None:  # layers of the second part have changed
                self.forget()
                return self.run(config, rotary, modules, cache, embeddings, compute)
            cache.step_path = step.failure or CAPTURED
            if output is not None:
                cache.unfinished = False
                cache.count_step()
            return output

    def product(self, linear: nn.Module, states: torch.Tensor, cache: object) -> torch.Tensor:
        """Returns a product of states (B, T, in), by a kernel where they come from a captured step."""
        if (
            getattr(cache, "step_path", None) == CAPTURED
            and type(linear) is nn.Linear
            and type(linear.weight) is nn.Parameter
            and not is_changed(linear)
            and not torch.is_grad_enabled()
            and (linear.weight.device, linear.weight.dtype) == (states.device, states.dtype)
            and is_plain(linear.weight)
            and states.shape[1] == 1
            and self.operations is not None
        ):
            with torch.cuda.device(states.device):
                return self.operations.products([linear], states)[0]
        return linear(states)


def rows_that_begin(config: OlmemConfig, cache: OlmemCache) -> list[int]:
    """Returns the rows of a cache that begin a segment with their next token."""
    if not config.num_memory_tokens:
        return []
    segment = config.memory_segment_length or 1
    return [row for row, seen in enumerate(cache.counters.read_seen()) if seen % segment == 0]


def make_operations(device: torch.device, dtype: torch.dtype) -> StepOperations:
    """Returns the kernels for a device and a dtype."""
    from .kernels_olmem import KernelOperations

    return KernelOperations(device, dtype)


__all__ = ["CAPTURED", "DecodeSteps"]
