"""The forward pass of BakaLLM, read anew from Maykeye/BakaLLM (`baka3.py`, branches 001_pristine and
002_baka_elephant)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .native_forward import REQUIRED, Norm, Stages, Weights, causal_attention, cosines_and_sines, read_fields

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
def baka(config: dict[str, Any], weights: Weights, ids: Tensor) -> Stages:
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


def forward(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    input_ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    trained_length: int = 0,
) -> Stages:
    """The forward pass of a model by all fields of `BakaConfig`, as `native_forward.Forward` says."""
    return baka(read_fields("config", config, BAKA), Weights.of(tensors, input_ids, dtype, trained_length), input_ids)
