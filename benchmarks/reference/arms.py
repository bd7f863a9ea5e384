"""What is compared: a block of one size with different memories, at the same state, and two peers.

State is counted in numbers: of keys and values in windows and stores, of memory tokens, and of the matrices of linear
attention, which are in float32. `full` has no bound and is the ceiling. Models of all arms have the same number of
parameters within 1 %, which the width of their MLPs makes up for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from torch import nn
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM
from transformers.modeling_outputs import CausalLMOutput

STORE_BLOCK = 128  # tokens that a store has room for beside those that it keeps, but one
SELECTION = 6  # numbers of 2 bytes that a slot of a store that selects takes for each key head: a score and a count


@dataclass(frozen=True)
class Shape:
    """Holds the sizes that all arms of a task share."""

    vocabulary: int
    width: int = 256
    layers: int = 3
    heads: int = 4
    window: int = 64
    length: int = 2048  # tokens, the longest that a model is trained on
    capacity: int = 640  # tokens of a store that selects
    top_k: int = 8
    retrieval_layers: tuple[int, ...] = (1,)
    memory_tokens: int = 16
    mlp: int = 512  # columns of the MLPs of `window`
    linear_heads: int = 1  # of linear attention, whose projections are the smaller the fewer there are

    @property
    def state(self) -> int:
        """The numbers of 2 bytes in the windows of all layers and in stores that select."""
        slots = len(self.retrieval_layers) * (self.capacity + self.window + STORE_BLOCK - 1)
        return 2 * self.width * (self.layers * self.window + slots) + SELECTION * self.heads * slots

    @property
    def memory_slots(self) -> int:
        """The tokens of each layer's window that memory tokens take: their keys and values, and what was written."""
        return self.memory_tokens + -(-self.memory_tokens // self.layers)

    def capacity_beside(self, tensors: int, selects: bool, memory_tokens: int = 0) -> int:
        """Returns the tokens of a store that takes what the windows leave of the state.

        Args:
            tensors: how many tensors a layer has for keys and values.
            selects: whether the store selects tokens.
            memory_tokens: how many there are.
        """
        left = self.state - tensors * self.width * self.layers * (self.window + memory_tokens)
        left -= 2 * self.width * memory_tokens
        slot = tensors * self.width + (SELECTION * self.heads if selects else 0)
        return left // (len(self.retrieval_layers) * slot) - self.window - STORE_BLOCK + 1

    @property
    def wide_window(self) -> int:
        """The window that takes the whole state."""
        return self.state // (2 * self.width * self.layers)


@dataclass(frozen=True)
class Arm:
    """Holds what sets a model apart.

    Args:
        build: makes the model from a shape and the width of its MLP.
        about: what it is, for a table.
        has_store: whether it has a store, which narrow windows train from the first steps on.
    """

    build: Callable[[Shape, int], nn.Module]
    about: str
    has_store: bool = False
    most: int = 16


def olmem(**choices: Callable[[Shape], Any]) -> Callable[[Shape, int], nn.Module]:
    """Returns what builds an Olmem model with fields that are functions of a shape."""

    def build(shape: Shape, mlp: int) -> nn.Module:
        common: dict[str, Any] = {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.width,
            "intermediate_size": mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "layer_types": "sliding_attention",
            "sliding_window": shape.window,
            "norm_placement": "pre",
            "rope_parameters": {"rope_theta": 10000.0},
            "max_position_embeddings": shape.length,
        }
        config = OlmemConfig(**common | {name: choice(shape) for name, choice in choices.items()})
        return OlmemForCausalLM(config)

    return build


def with_store(admission: str = "learned", **fields: Any) -> Callable[[Shape, int], nn.Module]:
    """Returns what builds an Olmem model with a store beside the windows, of the same state whatever is stored."""
    shared = fields.get("shared_projections", "none") == "key_value"
    memory = fields.get("num_memory_tokens", 0)

    def build(shape: Shape, mlp: int) -> nn.Module:
        own: dict[str, Any] = {
            "retrieval_layers": list(shape.retrieval_layers),
            "retrieval_top_k": shape.top_k,
            "retrieval_capacity": shape.capacity_beside(1 if shared else 2, admission == "learned", memory),
            "retrieval_admission": admission,
            "retrieval_gate_init": 0.0,
        }
        return olmem(**{name: (lambda _, value=value: value) for name, value in (own | fields).items()})(shape, mlp)

    return build


class LinearAttention(nn.Module):
    """Holds an OlmoHybrid without its last layer, the only one of full attention, which its configuration wants."""

    def __init__(self, model: OlmoHybridForCausalLM):
        super().__init__()
        self.model, self.config = model, model.config
        model.model.layers = model.model.layers[:-1]

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | int = 0, **given: Any) -> Any:
        """Returns what OlmoHybrid returns."""
        return self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **given)


def hybrid(shape: Shape, mlp: int) -> nn.Module:
    """Builds Transformers' OlmoHybrid with linear attention only, whose matrices are as large as the state."""
    size = int((shape.state / (2 * shape.layers * shape.linear_heads)) ** 0.5)
    config = OlmoHybridConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=mlp,
        num_hidden_layers=shape.layers + 1,
        num_attention_heads=shape.heads,
        layer_types=["linear_attention"] * shape.layers + ["full_attention"],
        linear_num_key_heads=shape.linear_heads,
        linear_num_value_heads=shape.linear_heads,
        linear_key_head_dim=size,
        linear_value_head_dim=size,
        max_position_embeddings=shape.length,
        pad_token_id=None,
        eos_token_id=None,
    )
    return LinearAttention(OlmoHybridForCausalLM(config))


class RecurrentMemoryTransformer(nn.Module):
    """RMT (Bulatov et al., 2022): memory tokens are read before a segment's tokens and written after them.

    Args:
        model: reads embeddings with full attention.
        count: the number M of memory tokens.
        segment: the number of tokens in a segment.
    """

    def __init__(self, model: OlmemForCausalLM, count: int, segment: int):
        super().__init__()
        self.model, self.segment = model, segment
        self.config = model.config
        self.memory = nn.Parameter(torch.randn(count, model.config.hidden_size) * model.config.initializer_range)

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, memory: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Returns the logits (B, n, vocabulary) of n columns of ids (B, T), and the last memory (B, M, width)."""
        state = self.memory.expand(len(input_ids), -1, -1) if memory is None else memory
        count, hidden = state.shape[1], []
        for ids in input_ids.split(self.segment, dim=1):
            tokens = self.model.get_input_embeddings()(ids)
            embeddings = torch.cat((state, tokens, self.memory.expand_as(state)), dim=1)
            found = self.model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            hidden.append(found[:, count:-count])
            state = found[:, -count:]
        kept = torch.cat(hidden, dim=1)[:, logits_to_keep]
        return CausalLMOutput(logits=self.model.lm_head(kept), hidden_states=(state,))


def recurrent(shape: Shape, mlp: int) -> nn.Module:
    """Builds RMT with full attention over a segment, which takes the whole state with the memory read and written."""
    model = olmem(layer_types=lambda _: "full_attention")(shape, mlp)
    assert isinstance(model, OlmemForCausalLM)
    count = 4 * shape.memory_tokens
    return RecurrentMemoryTransformer(model, count, shape.wide_window - 2 * count)


ARMS: dict[str, Arm] = {
    "full": Arm(olmem(layer_types=lambda _: "full_attention"), "full attention, without a bound"),
    "window": Arm(olmem(sliding_window=lambda shape: shape.wide_window), "sliding windows"),
    "sinks": Arm(
        olmem(sliding_window=lambda shape: shape.wide_window - 4, num_sink_tokens=lambda _: 4),
        "sliding windows and 4 sinks (StreamingLLM)",
    ),
    "memory": Arm(
        olmem(
            sliding_window=lambda shape: shape.wide_window - shape.memory_slots,
            num_memory_tokens=lambda shape: shape.memory_tokens,
            memory_segment_length=lambda shape: 4 * shape.window,
        ),
        "sliding windows and memory tokens",
    ),
    "recent": Arm(with_store("recent"), "windows and the most recent tokens, retrieved", True),
    "selected": Arm(with_store(), "windows and selected tokens, retrieved", True, 256),
    "selected, key_value": Arm(
        with_store(shared_projections="key_value"),
        "the same with one tensor for keys and values, so about twice as many tokens",
        True,
        256,
    ),
    "all": Arm(
        with_store(shared_projections="key_value", num_memory_tokens=4, memory_segment_length=256),
        "the same with memory tokens",
        True,
        256,
    ),
    "OlmoHybrid": Arm(hybrid, "Transformers' OlmoHybrid, linear attention in every layer"),
    "RMT": Arm(recurrent, "RMT: full attention over segments, memory tokens between them"),
}  # fmt: skip


def build(name: str, shape: Shape, arms: Mapping[str, Arm] = ARMS) -> nn.Module:
    """Builds an arm with as many parameters as `window` has with the shape's MLPs, as far as 8 columns go.

    OlmoHybrid may need more than that for matrices of its size, and then gets MLPs of 64 columns.
    """

    def count(mlp: int, arm: str = name) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in arms[arm].build(shape, mlp).parameters())

    small, large = count(64), count(72)
    columns = 8 * round((count(shape.mlp, "window") - small) / (large - small))
    return arms[name].build(shape, max(8, 64 + columns))


def numbers(model: nn.Module) -> int | None:
    """Returns how many numbers of 2 bytes a model carries on from token to token, or None without a bound."""
    config: Any = model.config
    if isinstance(model, LinearAttention):
        keys, values = config.linear_key_head_dim, config.linear_value_head_dim
        layer = 2 * config.linear_num_value_heads * keys * values  # in float32
        convolved = config.linear_num_key_heads * (2 * keys + values) * (config.linear_conv_kernel_dim - 1)
        return (config.num_hidden_layers - 1) * (layer + convolved)
    if isinstance(model, RecurrentMemoryTransformer):
        tokens = model.segment + 2 * len(model.memory)
        return 2 * tokens * config.hidden_size * config.num_hidden_layers
    if "full_attention" in config.layer_types:
        return None
    tensors = 1 if config.shared_projections == "key_value" else 2
    token = tensors * config.num_key_value_heads * config.head_dim
    prefix = config.num_memory_tokens + config.num_sink_tokens
    slots = len(config.retrieval_layers) * (config.retrieval_capacity + config.sliding_window + STORE_BLOCK - 1)
    selection = SELECTION * config.num_key_value_heads if config.retrieval_admission == "learned" else 0
    written = 2 * config.num_memory_tokens * config.hidden_size  # in float32
    return token * config.num_hidden_layers * (config.sliding_window + prefix) + (token + selection) * slots + written
