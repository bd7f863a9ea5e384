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


def left_padded(*rows: torch.Tensor, pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of ids as one batch with its attention mask."""
    width = max(len(row) for row in rows)
    ids = [nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows]
    masks = [nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}


def oracle(model: OlmemForCausalLM, ids: torch.Tensor, kept: float = 1.0, attention_kept: float = 1.0) -> torch.Tensor:
    """Logits (T, vocab_size) of ids (T,) by section 2 of the design, one token and one head at a time, in float64.

    Reads the configuration and the state dict, nothing else. `kept` and `attention_kept` multiply what residual and
    attention dropout would thin out.
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
        turned = x.clone()
        for k in range(half):
            angle = position / rope.get("factor", 1.0) * rope["rope_theta"] ** (-2 * k / size)
            turned[k] = x[k] * math.cos(angle) - x[k + half] * math.sin(angle)
            turned[k + half] = x[k + half] * math.cos(angle) + x[k] * math.sin(angle)
        return turned

    def project(name: str, x: torch.Tensor, position: int, layer_type: str) -> list[torch.Tensor]:
        """Queries, keys or values of one token, one for each head."""
        letter = name[-6]
        x = clip("projection", linear(name, x))
        qk_norm = "none" if letter == "v" else config.qk_norm
        norm_name = name.replace("_proj", "_norm")
        x = norm(norm_name, x) if qk_norm == "full" else x
        split = [x[start : start + size] for start in range(0, len(x), size)]
        split = [norm(norm_name, head) for head in split] if qk_norm == "head" else split
        split = split if letter == "v" else [rotate(head, position, layer_type) for head in split]
        return [clip("rotary", head) for head in split]

    def attention(prefix: str, layer_type: str, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        queries, keys, values = (
            [project(f"{prefix}.{letter}_proj", x, i, layer_type) for i, x in enumerate(stream)] for letter in "qkv"
        )
        outputs = []
        for i in range(len(stream)):
            first = max(0, i - config.sliding_window + 1) if layer_type == "sliding_attention" else 0
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = [queries[i][head] @ keys[j][shared] / math.sqrt(size) for j in range(first, i + 1)]
                shares = torch.stack(scores).softmax(0) * attention_kept
                mixed.append(sum(share * values[first + n][shared] for n, share in enumerate(shares)))
            outputs.append(linear(f"{prefix}.o_proj", torch.cat(mixed)))
        return outputs

    def activate(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + x.abs() ** 8) if config.hidden_act == "elephant" else x / (1 + (-x).exp())

    def mlp(prefix: str, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            linear(f"{prefix}.down_proj", activate(linear(f"{prefix}.gate_proj", x)) * linear(f"{prefix}.up_proj", x))
            for x in stream
        ]

    stream = [weights["model.embed_tokens.weight"][token] for token in ids]
    for index, layer_type in enumerate(config.layer_types):
        layer = f"model.layers.{index}"
        if config.norm_placement == "parallel":
            normed = [norm(f"{layer}.input_layernorm", x) for x in stream]
            sublayers = zip(
                stream, attention(f"{layer}.self_attn", layer_type, normed), mlp(f"{layer}.mlp", normed), strict=True
            )
            stream = [x + kept * attended + kept * transformed for x, attended, transformed in sublayers]
            continue
        for sublayer in ("attention", "feedforward"):
            inner = stream
            if config.norm_placement in ("pre", "peri"):
                inner = [norm(f"{layer}.pre_{sublayer}_layernorm", x) for x in stream]
            is_mlp = sublayer == "feedforward"
            inner = mlp(f"{layer}.mlp", inner) if is_mlp else attention(f"{layer}.self_attn", layer_type, inner)
            if config.norm_placement in ("post", "peri"):
                inner = [norm(f"{layer}.post_{sublayer}_layernorm", x) for x in inner]
            stream = [x + kept * added for x, added in zip(stream, inner, strict=True)]
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return torch.stack([linear(head, norm("model.norm", x)) / config.logits_scaling for x in stream])
