"""The forward pass of OLMo-core, read anew from allenai/OLMo-core (`olmo_core/nn`, package ai2-olmo-core 1.8.0 to
3.0.0)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from .native_forward import (
    IGNORED,
    REQUIRED,
    Norm,
    Stages,
    Weights,
    causal_attention,
    inverse_frequencies,
    read_fields,
    rotate,
)

# fmt: off
MODEL = dict(
    name=("default",), d_model=REQUIRED, vocab_size=REQUIRED, n_layers=REQUIRED, block_pattern=(None,), block=REQUIRED,
    block_overrides={}, lm_head=REQUIRED, tie_word_embeddings=False,
    embed_scale=(None, 1.0),
    ac_config=IGNORED, compile=IGNORED, cp_config=IGNORED, dp_config=IGNORED, dtype=IGNORED, embedding_init_std=IGNORED,
    ep_config=IGNORED, float8_config=IGNORED, fused_ops=IGNORED,
    freeze_params=IGNORED, init_method=IGNORED, init_seed=IGNORED, init_std=IGNORED,
    tp_config=IGNORED,
)
BLOCK = dict(
    name=("default", "reordered_norm", "peri_norm"), layer_norm=REQUIRED, feed_forward=REQUIRED, dropout=IGNORED,
    attention=None, sequence_mixer=None, attention_residual_alpha=(1.0,), feed_forward_residual_alpha=(1.0,),
)
ATTENTION = dict(
    type=("attention",), name=("default",), n_heads=16, n_kv_heads=None, head_dim=None, bias=True, clip_qkv=None,
    qk_norm=None, use_head_qk_norm=False, rope=None, sliding_window=None,
    dropout=IGNORED,  # 3.0.0 drops at inference as well: its own logits are then random
    backend=IGNORED, dtype=IGNORED, use_flash=IGNORED, mxfp8_projections=IGNORED, mxfp8_qkv_projection=IGNORED,
    mxfp8_out_projection=IGNORED, mxfp8_save_qkv_for_backward=IGNORED,
    use_recompute_qkv_prep=IGNORED,
)
SLIDING_WINDOW = dict(
    pattern=REQUIRED, force_full_attention_on_first_layer=True, force_full_attention_on_last_layer=True
)
ROPE = dict(
    name=("default",), theta=500_000, scaling=None, no_global_rope=False, partial_rotary_factor=(1.0,),
    full_precision=IGNORED,
)
SCALING = dict(
    ABFRoPEScalingConfig=dict(attention_rescale_factor=1.0, new_theta=8_000_000),
    PIRoPEScalingConfig=dict(attention_rescale_factor=1.0, factor=2.0),
    StepwiseRoPEScalingConfig=dict(
        attention_rescale_factor=1.0, factor=32.0, low_freq_proportion=0.0, high_freq_proportion=0.25,
        old_context_len=8192,
    ),
    RoPEScalingConfig=dict(  # what stepwise was called before 2.2.0
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192
    ),
    YaRNRoPEScalingConfig=dict(
        factor=8.0, beta_fast=32, beta_slow=1, old_context_len=8192,
        attention_rescale_factor=IGNORED,  # native YaRN derives it from `factor`, whatever the config says
    ),
)
NORM = dict(  # the kinds of RMSNorm differ in kernel and in where they round to a lower precision
    name=("default", "rms", "fused_rms", "cute_rms", "qwen_rms", "nemotron_rms"), eps=1e-5, elementwise_affine=True,
    bias=True, dtype=IGNORED, full_precision=IGNORED,
)
FEED_FORWARD = dict(
    name=("default",), hidden_size=REQUIRED, bias=True, activation=("silu", "gelu_tanh"), dtype=IGNORED
)
LM_HEAD = dict(name=("default",), layer_norm=None, bias=True, dtype=IGNORED, loss_implementation=IGNORED)
# fmt: on
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def read_olmo_core(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json's `model`, with a list of blocks, one per layer, as `block`."""
    config = read_fields("model", given, MODEL)
    layers = range(config["n_layers"])
    blocks = {str(layer): ("model.block", config["block"]) for layer in layers}
    for layer, block in config["block_overrides"].items():  # JSON has made strings of the layers
        if str(layer) not in blocks:
            raise CheckpointError(f"`model.block_overrides` must name layers of {layers} (got {layer}); remove it")
        blocks[str(layer)] = f"model.block_overrides.{layer}", block  # a whole block, not a patch of `block`
    config["block"] = [read_block(*blocks[str(layer)], layer, config) for layer in layers]
    config["lm_head"] = read_fields("model.lm_head", config["lm_head"], LM_HEAD)
    config["lm_head"]["layer_norm"] = read_norm("model.lm_head.layer_norm", config["lm_head"]["layer_norm"])
    return config


def read_block(where: str, given: Any, layer: int, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of one layer, with its attention or sequence mixer as `attention` and its number of keys `window`."""
    block = read_fields(where, given, BLOCK)
    mixers = [name for name in ("attention", "sequence_mixer") if block[name] is not None]
    if len(mixers) != 1:
        raise CheckpointError(f"`{where}` must have `attention` or `sequence_mixer` (got {mixers}); correct the config")
    mixer = f"{where}.{mixers[0]}"
    attention = read_fields(mixer, block[mixers[0]], ATTENTION)
    attention["n_kv_heads"] = attention["n_kv_heads"] or attention["n_heads"]
    attention["head_dim"] = attention["head_dim"] or config["d_model"] // attention["n_heads"]
    attention["qk_norm"] = read_norm(f"{mixer}.qk_norm", attention["qk_norm"])
    attention["rope"] = read_rope(f"{mixer}.rope", attention["rope"])
    attention["window"] = read_window(f"{mixer}.sliding_window", attention["sliding_window"], layer, config["n_layers"])
    if attention["window"] is None and attention["rope"] is not None and attention["rope"]["no_global_rope"]:
        attention["rope"] = None
    block["attention"] = attention
    block["layer_norm"] = read_norm(f"{where}.layer_norm", block["layer_norm"])
    block["feed_forward"] = read_fields(f"{where}.feed_forward", block["feed_forward"], FEED_FORWARD)
    return block


def read_norm(where: str, given: Any) -> Norm | None:
    """A norm, None for none."""
    if given is None:
        return None
    norm = read_fields(where, given, NORM)
    return Norm(norm["name"] != "default", norm["eps"], norm["elementwise_affine"], norm["bias"])


def read_window(where: str, given: Any, layer: int, layers: int) -> int | None:
    """How many keys a query of this layer sees, itself included; None for all."""
    if given is None:
        return None
    sliding = read_fields(where, given, SLIDING_WINDOW)
    first, last = sliding["force_full_attention_on_first_layer"], sliding["force_full_attention_on_last_layer"]
    if (first and layer == 0) or (last and layer == layers - 1):
        return None
    window = sliding["pattern"][(layer - bool(first)) % len(sliding["pattern"])]  # it starts after a forced first layer
    if window <= 0 and window != -1:
        raise CheckpointError(f"`{where}.pattern` must hold positive sizes or -1 (got {window}); correct the config")
    return None if window == -1 else window


def read_rope(where: str, given: Any) -> dict[str, Any] | None:
    """RoPE's fields, with `scaling` as None or (class name, fields); None for no positions at all."""
    if given is None:
        return None
    rope = read_fields(where, given, ROPE)
    if (scaling := rope["scaling"]) is not None:
        name = str(scaling.get("_CLASS_")).rpartition(".")[2]
        if name not in SCALING:
            raise CheckpointError(
                f"`{where}.scaling._CLASS_` must be one of {', '.join(SCALING)} (got {name}); name it"
            )
        rope["scaling"] = name, read_fields(f"{where}.scaling", scaling, SCALING[name])
    return rope


@torch.no_grad()
def olmo_core(config: dict[str, Any], weights: Weights, ids: Tensor) -> Stages:
    """`Transformer.forward`: ids [B, T] to named hidden states [B, T, E] and logits [B, T, V]."""
    rows, width, head = config["vocab_size"], config["d_model"], config["lm_head"]
    h = F.embedding(ids, weights.read("embeddings.weight", rows, width))
    yield "embeddings", h
    for layer, block in enumerate(config["block"]):
        h = olmo_core_block(block, weights, f"blocks.{layer}", h)
        yield f"block {layer}", h
    if head["layer_norm"] is not None:
        h = weights.norm("lm_head.norm", h, head["layer_norm"])
    yield "final norm", h
    # A tied checkpoint holds a copy in `lm_head.w_out.weight` all the same.
    weight = weights.read("embeddings.weight" if config["tie_word_embeddings"] else "lm_head.w_out.weight", rows, width)
    yield "logits", F.linear(h, weight, weights.read("lm_head.w_out.bias", rows) if head["bias"] else None)


def olmo_core_block(block: dict[str, Any], weights: Weights, name: str, h: Tensor) -> Tensor:
    """`TransformerBlock` (default), `ReorderedNorm...` or `PeriNormTransformerBlock`, h [B, T, E] to [B, T, E]."""
    for part, layer in (("attention", olmo_core_attention), ("feed_forward", olmo_core_feed_forward)):
        x = h if block["name"] == "reordered_norm" else weights.norm(f"{name}.{part}_norm", h, block["layer_norm"])
        x = layer(block[part], weights, f"{name}.{part}", x)
        if block["name"] == "reordered_norm":
            x = weights.norm(f"{name}.{part}_norm", x, block["layer_norm"])
        elif block["name"] == "peri_norm":
            x = weights.norm(f"{name}.post_{part}_norm", x, block["layer_norm"])
        h = h + x
    return h


def olmo_core_attention(fields: dict[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    """`Attention.forward`, x [B, T, E] to [B, T, E]: clip, QK-norm over all heads or within each, RoPE, attention."""
    head_dim, bias, clip = fields["head_dim"], fields["bias"], fields["clip_qkv"]
    q = weights.linear(f"{name}.w_q", x, fields["n_heads"] * head_dim, bias)
    k = weights.linear(f"{name}.w_k", x, fields["n_kv_heads"] * head_dim, bias)
    v = weights.linear(f"{name}.w_v", x, fields["n_kv_heads"] * head_dim, bias)
    if clip is not None:
        q, k, v = (part.clamp(-clip, clip) for part in (q, k, v))
    if fields["use_head_qk_norm"]:
        q, k = q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim))
    if fields["qk_norm"] is not None:
        q, k = (
            weights.norm(f"{name}.q_norm", q, fields["qk_norm"]),
            weights.norm(f"{name}.k_norm", k, fields["qk_norm"]),
        )
    q, k, v = (part.reshape(*x.shape[:2], -1, head_dim) for part in (q, k, v))
    if fields["rope"] is not None:
        frequencies, factor = scaled_frequencies(fields["rope"], head_dim, x)
        q, k = (rotate(part, frequencies, weights.exact_from, factor) for part in (q, k))
    return weights.linear(f"{name}.w_out", causal_attention(q, k, v, fields["window"]), x.shape[-1], bias)


def olmo_core_feed_forward(fields: dict[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    """`FeedForward.forward`, x [B, T, E] to [B, T, E]: w1 is the gate, w3 is up, w2 is down."""
    hidden, bias, activation = (fields[field] for field in ("hidden_size", "bias", "activation"))
    gate = ACTIVATION[activation](weights.linear(f"{name}.w1", x, hidden, bias))
    return weights.linear(f"{name}.w2", gate * weights.linear(f"{name}.w3", x, hidden, bias), x.shape[-1], bias)


def scaled_frequencies(rope: dict[str, Any], head_dim: int, like: Tensor) -> tuple[Tensor, float]:
    """`compute_scaled_inv_freq` of rope.py: the frequencies of a layer, [D/2], and the factor on cos and sin."""
    frequencies = inverse_frequencies(rope["theta"], head_dim, like)
    if rope["scaling"] is None:
        return frequencies, 1.0
    name, fields = rope["scaling"]
    if name == "YaRNRoPEScalingConfig":
        return yarn(frequencies, rope["theta"], fields), 0.1 * math.log(fields["factor"]) + 1.0
    if name == "ABFRoPEScalingConfig":
        return inverse_frequencies(fields["new_theta"], head_dim, like), fields["attention_rescale_factor"]
    if name == "PIRoPEScalingConfig":  # position interpolation, arXiv 2306.15595
        return frequencies / fields["factor"], fields["attention_rescale_factor"]
    if name == "RoPEScalingConfig":
        return stepwise(frequencies, fields, fields["low_freq_factor"], fields["high_freq_factor"]), 1.0
    low, high = 1.0 / (1 - fields["low_freq_proportion"]), 1.0 / fields["high_freq_proportion"]
    return stepwise(frequencies, fields, low, high), fields["attention_rescale_factor"]


def yarn(frequencies: Tensor, theta: float, fields: dict[str, Any]) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2), [D/2] to [D/2]: a ramp from the same to a `factor`-th of the frequency."""
    half = len(frequencies)
    low, high = (  # the dimensions that turn `beta_fast` and `beta_slow` times within the old context
        2 * half * math.log(fields["old_context_len"] / (fields[beta] * 2.0 * math.pi)) / (2.0 * math.log(theta))
        for beta in ("beta_fast", "beta_slow")
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), half - 1)
    index = torch.arange(half, device=frequencies.device, dtype=frequencies.dtype)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / fields["factor"] * ramp + frequencies * (1.0 - ramp)


def stepwise(frequencies: Tensor, fields: dict[str, Any], low: float, high: float) -> Tensor:
    """Llama 3.1's scaling (arXiv 2407.21783), [D/2] to [D/2]: long waves get `factor` times longer, short ones stay."""
    factor, old_length = fields["factor"], fields["old_context_len"]
    wavelengths = 2 * math.pi / frequencies
    blend = (old_length / wavelengths - low) / (high - low)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelengths > old_length / low, frequencies / factor, between)
    return torch.where(wavelengths < old_length / high, frequencies, scaled)


def forward(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    input_ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    trained_length: int = 0,
) -> Stages:
    """The forward pass of the `model` of config.json, as `native_forward.Forward` says."""
    return olmo_core(read_olmo_core(config), Weights.of(tensors, input_ids, dtype, trained_length), input_ids)
