"""The forward pass of OLMo, read anew from allenai/OLMo (`olmo/model.py`, package ai2-olmo 0.6.0)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from .native_forward import (
    IGNORED,
    Norm,
    Stages,
    Weights,
    causal_attention,
    inverse_frequencies,
    read_fields,
    rotate,
)

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
def olmo(config: dict[str, Any], weights: Weights, ids: Tensor) -> Stages:
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


def forward(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    input_ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    trained_length: int = 0,
) -> Stages:
    """The forward pass of the `model` of config.yaml, as `native_forward.Forward` says."""
    return olmo(read_olmo(config), Weights.of(tensors, input_ids, dtype, trained_length), input_ids)
