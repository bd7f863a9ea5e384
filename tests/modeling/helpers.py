"""Tiny models whose weights tell every part from the others, and the block of the design computed with plain loops."""

import math
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from torch import nn

WINDOW = 4
# Two kinds of layers with a theta each, grouped heads, and heads that are wider together than the residual stream.
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "rope_parameters": {"sliding_attention": {"rope_theta": 50.0}, "full_attention": {"rope_theta": 1000.0}},
    "initializer_range": 0.1,
}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
ROPE = {FULL: {"rope_theta": 1000.0}, SLIDING: {"rope_theta": 50.0}, CHUNKED: {"rope_theta": 20.0}}
# What no cache of Transformers serves: sinks before windows, windows that step, and both with everything else.
SINKS: dict[str, Any] = {"layer_types": SLIDING, "num_sink_tokens": 2, "rope_parameters": ROPE}
CHUNKS: dict[str, Any] = {
    "layer_types": CHUNKED,
    "attention_chunk_size": 3,
    "attention_chunk_lookback": 1,
    "rope_parameters": ROPE,
}
MIXED: dict[str, Any] = CHUNKS | {
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, CHUNKED, FULL],
    "num_sink_tokens": 3,
    "sliding_window": 3,
}
# Values that are the keys, in one cached tensor; and positions that are no rotations, or not only.
ONE_TENSOR: dict[str, Any] = MIXED | {"shared_projections": "key_value"}
SCHEMES: dict[str, Any] = MIXED | {"position_embedding": ["xpos", "linspace", "none"]}
STREAMS = {
    "window": {"layer_types": SLIDING},
    "sinks": SINKS,
    "chunks": CHUNKS,
    "mixed": MIXED,
    "one tensor": ONE_TENSOR,
    "schemes": SCHEMES,
}


def named(value: Any) -> str:
    """A parameter's name in a test's."""
    return next((name for name, changes in STREAMS.items() if changes is value), str(value))


def tiny(model_class: Any = OlmemForCausalLM, **changes) -> Any:
    """A tiny model of that class, in evaluation mode, its weights a function of its parameters' shapes."""
    return shake(model_class(OlmemConfig(**(TINY | changes))))


def shake(model: nn.Module) -> Any:
    """Draws every weight and bias anew, norms too: as long as these are ones, two swapped norms look the same."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        centre = 1.0 if parameter.ndim == 1 and (parameter == 1).all() else 0.0
        nn.init.normal_(parameter, centre, 0.25, generator=generator)
    return model.eval()


def tokens(*shape: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def span(model: OlmemForCausalLM) -> int:
    """Tokens of the widest window that has an end."""
    return max(context.span or 1 for context in model.model.contexts.values())


def left_padded(*rows: torch.Tensor, pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of ids as one batch with its attention mask."""
    width = max(len(row) for row in rows)
    ids = [nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows]
    masks = [nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}


def seen_by(
    query: int, layer_type: str, window: int = 0, chunk: int = 0, lookback: int = 0, sinks: int = 0
) -> tuple[list[int], list[int]]:
    """The sinks before a query's window, and its window, token by token from the table of section 1 of the design.
    Both together are the list whose places are the slots."""
    before, inside = [], []
    for key in range(query + 1):
        if (
            layer_type == "full_attention"
            or (layer_type == "sliding_attention" and query - window < key)
            or (layer_type == "chunked_attention" and chunk * (query // chunk - lookback) <= key)
        ):
            inside.append(key)
        elif key < sinks:
            before.append(key)
    return before, inside


def oracle(
    model: OlmemForCausalLM,
    ids: torch.Tensor,
    kept: float = 1.0,
    attention_kept: float = 1.0,
    attentions: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits (T, vocab_size) of ids (T,) by sections 1 and 2 of the design, one token and one head at a time, in
    float64: every query lists the keys it sees and numbers them anew, 0, 1, 2 …, before they are rotated.

    Reads the configuration and the state dict, nothing else. `kept` and `attention_kept` multiply what residual and
    attention dropout would thin out. `attentions` is given the weights (H, T, T) of every layer.
    """
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if config.norm_type != "rms":
            x = x - x.mean()
        x = x / (x.pow(2).mean() + config.rms_norm_eps).sqrt()
        return (
            x if config.norm_type == "layer_plain" else x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)
        )

    def clip(stage: str, x: torch.Tensor) -> torch.Tensor:
        return (
            x
            if config.clip_qkv is None or config.clip_qkv_stage != stage
            else x.clip(-config.clip_qkv, config.clip_qkv)
        )

    def rotate(x: torch.Tensor, position: int, layer_type: str) -> torch.Tensor:
        rope, half = config.rope_parameters[layer_type], size // 2
        theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
        if rope["rope_type"] == "dynamic":  # of a text that ends there
            length, trained = max(position + 1, config.max_position_embeddings), config.max_position_embeddings
            theta, factor = theta * (factor * length / trained - (factor - 1)) ** (size / (size - 2)), 1.0
        turned = x.clone()
        for k in range(half):
            angle = position / factor * theta ** (-2 * k / size)
            turned[k] = x[k] * math.cos(angle) - x[k + half] * math.sin(angle)
            turned[k + half] = x[k + half] * math.cos(angle) + x[k] * math.sin(angle)
        return turned

    def scaled(x: torch.Tensor, distance: float) -> torch.Tensor:
        """xpos: each pair of dimensions by its ζ to the power of distance / 512."""
        zeta = [(2 * k / size + 0.4) / 1.4 for k in range(size // 2)] * 2
        return x * torch.tensor([base ** (distance / 512) for base in zeta], dtype=x.dtype)

    def project(prefix: str, letter: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys or values of one token, one for each head, without a position."""
        shared = config.shared_projections
        if letter == "q" and shared in ("query_key", "query_key_value"):
            return project(prefix, "k", x)
        if letter == "v" and shared in ("key_value", "query_key_value"):
            return project(prefix, "k", x)
        if letter == "v" and shared == "value_difference":
            return [q - k for q, k in zip(project(prefix, "q", x), project(prefix, "k", x), strict=True)]
        name = f"{prefix}.{letter}_proj"
        x = clip("projection", linear(name, x))
        qk_norm = "none" if letter == "v" else config.qk_norm
        norm_name = name.replace("_proj", "_norm")
        x = norm(norm_name, x) if qk_norm == "full" else x
        split = [x[start : start + size] for start in range(0, len(x), size)]
        return [norm(norm_name, head) for head in split] if qk_norm == "head" else split

    clips_rotated = config.clip_qkv is not None and config.clip_qkv_stage == "rotary"

    def attention(prefix: str, layer_type: str, scheme: str, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        queries, keys, values = ([project(prefix, letter, x) for x in stream] for letter in "qkv")
        span = {
            FULL: config.max_position_embeddings,
            SLIDING: config.sliding_window,
            CHUNKED: (config.attention_chunk_size or 0) * (config.attention_chunk_lookback + 1),
        }[layer_type]
        weights_seen = torch.zeros(heads, len(stream), len(stream), dtype=torch.float64)
        rotated = {}

        def place(name: str, states: list[list[torch.Tensor]], token: int, head: int, slot: int) -> torch.Tensor:
            slot = token if clips_rotated else slot  # a clip is of vectors rotated at their own index
            at = (name, token, head, slot)
            if at not in rotated:
                x = states[token][head]
                if scheme in ("rope", "xpos"):
                    x = rotate(x, slot, layer_type)
                if scheme == "xpos":
                    x = scaled(x, slot if name == "query" else -slot)
                if scheme == "linspace" and name == "key":
                    x = x + 0.1 * slot / max(span - 1, 1) * weights[f"{prefix}.linspace_scale"]
                rotated[at] = clip("rotary", x)
            return rotated[at]

        outputs = []
        for i in range(len(stream)):
            before, inside = seen_by(
                i,
                layer_type,
                config.sliding_window,
                config.attention_chunk_size,
                config.attention_chunk_lookback,
                config.num_sink_tokens,
            )
            listed = before + inside
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                query = place("query", queries, i, head, listed.index(i))
                scores = [
                    query @ place("key", keys, j, shared, slot) / math.sqrt(size) for slot, j in enumerate(listed)
                ]
                shares = torch.stack(scores).softmax(0) * attention_kept
                weights_seen[head, i, listed] = shares
                mixed.append(
                    sum(share * clip("rotary", values[j][shared]) for j, share in zip(listed, shares, strict=True))
                )
            outputs.append(linear(f"{prefix}.o_proj", torch.cat(mixed)))
        if attentions is not None:
            attentions.append(weights_seen)
        return outputs

    def activate(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + x.abs() ** 8) if config.hidden_act == "elephant" else x / (1 + (-x).exp())

    def mlp(prefix: str, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            linear(f"{prefix}.down_proj", activate(linear(f"{prefix}.gate_proj", x)) * linear(f"{prefix}.up_proj", x))
            for x in stream
        ]

    stream = [weights["model.embed_tokens.weight"][token] for token in ids]
    schemes = config.position_embedding
    schemes = [schemes] * config.num_hidden_layers if isinstance(schemes, str) else schemes
    for index, (layer_type, scheme) in enumerate(zip(config.layer_types, schemes, strict=True)):
        layer = f"model.layers.{index}"
        if config.norm_placement == "parallel":
            normed = [norm(f"{layer}.input_layernorm", x) for x in stream]
            attended = attention(f"{layer}.self_attn", layer_type, scheme, normed)
            sublayers = zip(stream, attended, mlp(f"{layer}.mlp", normed), strict=True)
            stream = [x + kept * attended + kept * transformed for x, attended, transformed in sublayers]
            continue
        for sublayer in ("attention", "feedforward"):
            inner = stream
            if config.norm_placement in ("pre", "peri"):
                inner = [norm(f"{layer}.pre_{sublayer}_layernorm", x) for x in stream]
            is_mlp = sublayer == "feedforward"
            inner = mlp(f"{layer}.mlp", inner) if is_mlp else attention(f"{layer}.self_attn", layer_type, scheme, inner)
            if config.norm_placement in ("post", "peri"):
                inner = [norm(f"{layer}.post_{sublayer}_layernorm", x) for x in inner]
            stream = [x + kept * added for x, added in zip(stream, inner, strict=True)]
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return torch.stack([linear(head, norm("model.norm", x)) / config.logits_scaling for x in stream])
