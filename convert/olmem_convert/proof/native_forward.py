"""The forward passes of OLMo, OLMo-core and BakaLLM, read anew in plain torch: the oracle of the converter's
verification.

Sources: allenai/OLMo (`olmo/model.py`, package ai2-olmo 0.6.0), allenai/OLMo-core (`olmo_core/nn`, package
ai2-olmo-core 1.8.0 to 3.0.0) and Maykeye/BakaLLM (`baka3.py`, branches 001_pristine and 002_baka_elephant). Nothing
is shared with the converter, so that a mistake on either side shows. Every config field is computed, known to leave the
logits alone, or refused: none is skipped.

Shapes: B batch, T queries, E model width, H query heads, K key-value heads, D head width, V vocabulary rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError


def native_forward(
    family: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    input_ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    trained_length: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Yields ('embeddings', [B, T, E]), ('block 0', [B, T, E]), ..., ('final norm', [B, T, E]), ('logits', [B, T, V]).

    `config` is the `model` dict of config.yaml (family 'olmo') or config.json ('olmo_core'), or all fields of
    `BakaConfig` ('baka'), checked at once, before any weight is read. `tensors` is indexed by native name, one tensor
    at a time, each once: only tied embeddings are read again for the head, since holding them would cost more than a
    block.

    Native code rounds the angle of every position to float32, by up to 5e-4 at position 16,384. That error is no part
    of a model, so angles are exact from `trained_length` on, and the native ones, bit for bit, before it and before
    position 1024.
    """
    weights = Weights(tensors, input_ids.device, dtype, max(trained_length, 1024))
    if family == "olmo":
        return olmo(read_olmo(config), weights, input_ids)
    if family == "olmo_core":
        return olmo_core(read_olmo_core(config), weights, input_ids)
    if family == "baka":
        return baka(read_fields("config", config, BAKA), weights, input_ids)
    raise CheckpointError(
        f"`family` must be 'olmo', 'olmo_core' or 'baka' (got {family!r}); pass the family that was detected"
    )


# ---- Layers of several families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the last dimension; no bias without weight."""

    rms: bool
    eps: float
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Weights:
    """Reads one tensor at a time, in the precision of the forward pass, and keeps none; says where angles are exact."""

    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    exact_from: int  # the first position whose angles are not rounded

    def read(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have this shape."""
        try:
            tensor = self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"`{name}` must be in the checkpoint (got no such tensor); check the config"
            ) from None
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"`{name}` must have shape {shape} (got {tuple(tensor.shape)}); check the config")
        return tensor.to(self.device, self.dtype)

    def linear(self, name: str, x: Tensor, width: int, bias: bool) -> Tensor:
        """[..., input width] to [..., width]."""
        weight = self.read(f"{name}.weight", width, x.shape[-1])
        return F.linear(x, weight, self.read(f"{name}.bias", width) if bias else None)

    def norm(self, name: str, x: Tensor, norm: Norm) -> Tensor:
        """[..., width] to the same shape."""
        width = x.shape[-1]
        weight = self.read(f"{name}.weight", width) if norm.weight else None
        bias = self.read(f"{name}.bias", width) if norm.weight and norm.bias else None
        if not norm.rms:
            return F.layer_norm(x, (width,), weight, bias, norm.eps)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        x = x if weight is None else weight * x
        return x if bias is None else x + bias


def inverse_frequencies(theta: float, head_dim: int, like: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): theta^(-2i/D) for i < D/2, in the precision of `like`; returns [D/2]."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=like.dtype) / head_dim
    return 1.0 / theta**exponents


def cosines_and_sines(length: int, frequencies: Tensor, exact_from: int) -> tuple[Tensor, Tensor]:
    """Of positions 0 to T-1 and frequencies [D], both [T, 1, D]; from float64 angles at positions from `exact_from`."""
    positions = torch.arange(length, device=frequencies.device)
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    if length > exact_from:
        angles = torch.outer(positions[exact_from:].double(), frequencies.double())[:, None, :]
        cos[exact_from:], sin[exact_from:] = angles.cos(), angles.sin()
    return cos, sin


def rotate(x: Tensor, frequencies: Tensor, exact_from: int, factor: float = 1.0) -> Tensor:
    """RoPE on x [B, T, H or K, D]: dimension i turns with i + D/2; `factor` scales cos and sin (YaRN)."""
    cos, sin = cosines_and_sines(x.shape[1], frequencies.repeat(2), exact_from)
    first, second = x.chunk(2, dim=-1)
    return x * (cos * factor) + torch.cat((-second, first), dim=-1) * (sin * factor)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """q [B, T, H, D] over k and v [B, T, K, D], scale 1/sqrt(D); returns [B, T, H * D].

    With a window W, query i sees the keys i-W+1 to i. For grouped queries native code too repeats k and v.
    """
    batch, length, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1) for x in (q, k, v))
    mask = None
    if window is not None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).reshape(batch, length, -1)


# ---- Config fields -------------------------------------------------------------------------------------------------

REQUIRED, IGNORED = object(), object()


def read_fields(where: str, given: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config dict `given`, found at `where`, with absent and null ones replaced by native defaults.

    `schema` maps a field to its default, to a tuple of the values that this file computes (the default first), to
    REQUIRED, or to IGNORED where the logits do not depend on it. Any other field switches something on: it must be off.
    """
    if not isinstance(given, Mapping):
        raise CheckpointError(f"`{where}` must be a dict (got {given!r}); pass the checkpoint's own config")
    defaults = {name: rule[0] if isinstance(rule, tuple) else rule for name, rule in schema.items()}
    fields = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    for name, value in fields.items():
        if value is REQUIRED:
            raise CheckpointError(f"`{where}.{name}` must be set (got nothing); pass the checkpoint's own config")
        rule = IGNORED if name.startswith("_") else schema.get(name, (None, False))  # such as `_CLASS_`
        if isinstance(rule, tuple) and value not in rule:
            allowed = " or ".join(map(repr, rule))
            raise CheckpointError(
                f"`{where}.{name}` must be {allowed} (got {value!r}); compare with the native package"
            )
    return fields


# ---- OLMo ----------------------------------------------------------------------------------------------------------

# The defaults describe a GPT-2 without positions rather than an OLMo: a partial config.yaml relies on them.
# fmt: off
OLMO = dict(
    block_type=("sequential",), activation_type=("swiglu",), alibi=(False,), rope=(False, True), rope_theta=10_000,
    d_model=768, n_layers=12, block_group_size=1, mlp_ratio=4, mlp_hidden_size=None, norm_after=False,
    n_heads=12, n_kv_heads=None, multi_query_attention=None, clip_qkv=None,
    layer_norm_type=("default", "low_precision", "rms"),  # low precision acts under autocast alone
    layer_norm_eps=1e-5, layer_norm_with_affine=True, attention_layer_norm=False, attention_layer_norm_with_affine=True,
    include_bias=True, bias_for_layer_norm=None,
    vocab_size=50_257, embedding_size=50_304, weight_tying=True, scale_logits=False,
    alibi_bias_max=IGNORED, attention_dropout=IGNORED, emb_init_std=IGNORED, embedding_dropout=IGNORED,
    eos_token_id=IGNORED, flash_attention=IGNORED, init_cutoff_factor=IGNORED, init_device=IGNORED, init_fn=IGNORED,
    init_std=IGNORED, max_sequence_length=IGNORED, pad_token_id=IGNORED, precision=IGNORED, residual_dropout=IGNORED,
    rope_full_precision=IGNORED, scale_emb_init=IGNORED,
)
# fmt: on


def read_olmo(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.yaml's `model`, with those that follow from others filled in."""
    config = read_fields("model", given, OLMO)
    if not config["rope"]:
        raise CheckpointError("`model.rope` must be True (got False); compare with the native package")
    for name in ("rope_theta", "layer_norm_eps", "clip_qkv"):  # YAML 1.1 reads 1e-6 as a string
        config[name] = None if config[name] is None else float(config[name])
    if "embedding_size" in given and given["embedding_size"] is None:  # unlike an absent one
        config["embedding_size"] = config["vocab_size"]
    if config["mlp_hidden_size"] is None:
        config["mlp_hidden_size"] = config["mlp_ratio"] * config["d_model"]
    if config["bias_for_layer_norm"] is None:
        config["bias_for_layer_norm"] = config["include_bias"]
    implied = 1 if config["multi_query_attention"] else config["n_heads"]
    if config["n_kv_heads"] is None:
        config["n_kv_heads"] = implied
    elif config["multi_query_attention"] is not None and config["n_kv_heads"] != implied:
        rule = f"{implied} with `multi_query_attention: {config['multi_query_attention']}`"
        raise CheckpointError(f"`model.n_kv_heads` must be {rule} (got {config['n_kv_heads']}); correct one of the two")
    return config


@torch.no_grad()
def olmo(config: dict[str, Any], weights: Weights, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`OLMo.forward`: ids [B, T] to named hidden states [B, T, E] and logits [B, T, V]."""
    rms = config["layer_norm_type"] == "rms"
    norm = Norm(rms, config["layer_norm_eps"], config["layer_norm_with_affine"], config["bias_for_layer_norm"])
    rows, width, group_size = config["embedding_size"], config["d_model"], config["block_group_size"]
    h = F.embedding(ids, weights.read("transformer.wte.weight", rows, width))
    yield "embeddings", h
    grouped = any(name.startswith("transformer.block_groups.") for name in weights.tensors)
    for layer in range(config["n_layers"]):
        block = f"block_groups.{layer // group_size}.{layer % group_size}" if grouped else f"blocks.{layer}"
        h = olmo_block(config, norm, weights, f"transformer.{block}", h)
        yield f"block {layer}", h
    h = weights.norm("transformer.ln_f", h, norm)
    yield "final norm", h
    if config["weight_tying"]:
        logits = F.linear(h, weights.read("transformer.wte.weight", rows, width))
    else:
        logits = weights.linear("transformer.ff_out", h, rows, config["include_bias"])
    yield "logits", logits * (1 / math.sqrt(width)) if config["scale_logits"] else logits


def olmo_block(config: dict[str, Any], norm: Norm, weights: Weights, name: str, h: Tensor) -> Tensor:
    """`OLMoSequentialBlock.forward`, h [B, T, E] to [B, T, E]: OLMo-1's (norms first) or OLMo-2's (`norm_after`)."""
    after, bias = config["norm_after"], config["include_bias"]

    x = h if after else weights.norm(f"{name}.attn_norm", h, norm)
    x = olmo_attention(config, norm, weights, name, x)
    h = h + (weights.norm(f"{name}.attn_norm", x, norm) if after else x)

    x = h if after else weights.norm(f"{name}.ff_norm", h, norm)
    up, gate = weights.linear(f"{name}.ff_proj", x, config["mlp_hidden_size"], bias).chunk(2, dim=-1)  # up comes first
    x = weights.linear(f"{name}.ff_out", F.silu(gate) * up, config["d_model"], bias)
    return h + (weights.norm(f"{name}.ff_norm", x, norm) if after else x)


def olmo_attention(config: dict[str, Any], norm: Norm, weights: Weights, name: str, x: Tensor) -> Tensor:
    """`OLMoBlock.attention`, x [B, T, E] to [B, T, E]: clip, QK-norm over all heads at once, RoPE, attention."""
    width, clip, bias = config["d_model"], config["clip_qkv"], config["include_bias"]
    head_dim = width // config["n_heads"]
    sizes = (width, config["n_kv_heads"] * head_dim, config["n_kv_heads"] * head_dim)
    qkv = weights.linear(f"{name}.att_proj", x, sum(sizes), bias)
    q, k, v = (qkv if clip is None else qkv.clamp(-clip, clip)).split(sizes, dim=-1)
    if config["attention_layer_norm"]:
        qk_norm = replace(norm, weight=config["attention_layer_norm_with_affine"])
        q, k = weights.norm(f"{name}.q_norm", q, qk_norm), weights.norm(f"{name}.k_norm", k, qk_norm)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in (q, k, v))
    frequencies = inverse_frequencies(config["rope_theta"], head_dim, x)
    q, k = (rotate(part, frequencies, weights.exact_from) for part in (q, k))
    x = causal_attention(q, k, v)
    return weights.linear(f"{name}.attn_out", x, width, bias)


# ---- OLMo-core -----------------------------------------------------------------------------------------------------

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
def olmo_core(config: dict[str, Any], weights: Weights, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
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


# ---- BakaLLM -------------------------------------------------------------------------------------------------------

BAKA_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "elephant": lambda x: 1 / (1 + x.abs() ** 8),  # arXiv 2310.01365 with a = 1, d = 8
    "BakaElephant": lambda x: 1 / (1 + x.abs() ** 8),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
BAKA = dict(
    **dict.fromkeys(("dim_model", "dim_ff", "dim_attn", "n_layers", "n_heads", "n_vocab", "n_ctx"), REQUIRED),
    act_fn=tuple(BAKA_ACTIVATION),
    model_type=(None, "baka", "baka_pristine", "baka_elephant", "001_pristine", "002_baka_elephant"),
)


@torch.no_grad()
def baka(config: dict[str, Any], weights: Weights, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`BakaNetCausalLM.forward`: ids [B, T] to named hidden states [B, T, E] and logits [B, T, V].

    Native code runs one window of `n_ctx` tokens after the other through all layers. As windows do not see each other,
    each layer may as well run all of them.
    """
    rows, width, hidden = config["n_vocab"], config["dim_model"], config["dim_ff"]
    norm = Norm(rms=False, eps=1e-5, weight=True, bias=True)
    h = F.embedding(ids, weights.read("vocab_in.weight", rows, width))
    yield "embeddings", h
    for layer in range(config["n_layers"]):
        name = f"model.layers.{layer}"
        x = weights.norm(f"{name}.norm_in", h, norm)
        gate = BAKA_ACTIVATION[config["act_fn"]](weights.linear(f"{name}.mlp.fc_gate", x, hidden, bias=False))
        up = weights.linear(f"{name}.mlp.fc_up", x, hidden, bias=False)
        h = h + baka_attention(config, weights, f"{name}.attn", x)
        h = h + weights.linear(f"{name}.mlp.fc_down", up * gate, width, bias=False)
        yield f"block {layer}", h
    h = weights.norm("norm_out", h, norm)
    yield "final norm", h
    yield "logits", weights.linear("vocab_out", h, rows, bias=False)


def baka_attention(config: dict[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    """`BakaAttention.forward` of every window, x [B, T, E] to [B, T, E]: positions start from 0 in each."""
    heads, width = config["n_heads"], config["dim_attn"]
    frequencies = weights.read(f"{name}.rot.freqs", width // heads // 2)
    q = weights.linear(f"{name}.q", x, width, bias=False).unflatten(-1, (heads, -1))
    k = weights.linear(f"{name}.k", x, width, bias=False).unflatten(-1, (heads, -1))
    v = weights.linear(f"{name}.v", x, x.shape[-1], bias=False).unflatten(-1, (heads, -1))
    windows = zip(*(part.split(config["n_ctx"], dim=1) for part in (q, k, v)), strict=True)
    turn = partial(rotate_pairs, frequencies=frequencies, exact_from=weights.exact_from)
    seen = [causal_attention(turn(q), turn(k), v) for q, k, v in windows]
    return weights.linear(f"{name}.o", torch.cat(seen, dim=1), x.shape[-1], bias=False)


def rotate_pairs(x: Tensor, frequencies: Tensor, exact_from: int) -> Tensor:
    """RoPE on x [B, T, H, D] as rotary-embedding-torch has it: dimension 2j turns with 2j + 1."""
    cos, sin = cosines_and_sines(x.shape[1], frequencies, exact_from)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * cos - odd * sin, odd * cos + even * sin
    return torch.stack(turned, dim=-1).flatten(-2)
