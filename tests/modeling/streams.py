"""Models of any kind, texts cut and padded in any way, and what reads them."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, ROPE, SLIDING, tiny
from olmem import OlmemCache, OlmemForCausalLM, backends_olmem, retrieval_olmem, state_olmem, visibility_olmem
from olmem.rules_olmem import POSITION_EMBEDDINGS, SHARED_PROJECTIONS
from torch.testing import assert_close


def dynamic(factor: float) -> dict[str, Any]:
    """RoPE of full layers whose frequencies fall with each token beyond the trained length."""
    return {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": factor}


@st.composite
def choices(draw) -> dict[str, Any]:
    """Changes of the tiny configuration: each layer of its own type, windows from one token on."""
    layer_types = draw(st.lists(st.sampled_from([SLIDING, CHUNKED, FULL]), min_size=1, max_size=3))
    heads, kv_heads = draw(st.sampled_from([(4, 2), (4, 4), (4, 1), (6, 3)]))
    shared = SHARED_PROJECTIONS if heads == kv_heads else SHARED_PROJECTIONS[:2]
    schemes = st.sampled_from(POSITION_EMBEDDINGS)
    return {
        "shared_projections": draw(st.sampled_from(shared)),
        "position_embedding": draw(schemes | st.lists(schemes, min_size=len(layer_types), max_size=len(layer_types))),
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "rope_parameters": ROPE | draw(st.sampled_from([{}, {FULL: dynamic(2.0)}, {FULL: dynamic(5.0)}])),
        "max_position_embeddings": draw(st.sampled_from([8, 32])),
        "sliding_window": draw(st.integers(1, 6)),
        "attention_chunk_size": draw(st.integers(1, 4)),
        "attention_chunk_lookback": draw(st.integers(0, 2)),
        "num_sink_tokens": 0 if set(layer_types) == {FULL} else draw(st.integers(0, 5)),
        "sink_logit_init": draw(st.sampled_from([None, 0.0])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "norm_placement": draw(st.sampled_from(["post", "pre", "peri", "parallel"])),
        "qk_norm": draw(st.sampled_from(["full", "head", "none"])),
        "attn_implementation": draw(st.sampled_from(["sdpa", "eager"])),
    }


def make(changes: dict[str, Any]) -> OlmemForCausalLM:
    changes = dict(changes)
    backend = changes.pop("attn_implementation", "sdpa")
    model = tiny(**changes)
    model.set_attn_implementation(backend)
    return model


@st.composite
def cuts(draw, length: int) -> list[int]:
    """Lengths of the pieces of a stream, many of them of one token."""
    pieces = []
    while length:
        pieces.append(min(length, draw(st.sampled_from([1, 1, 2, 3, 4, 7, 11, 16, 30]))))
        length -= pieces[-1]
    return pieces


@st.composite
def paddings(draw, rows: int, pieces: list[int]) -> list[torch.Tensor]:
    """A mask for each piece of some rows: padding at its left, at its right, in holes, or a whole piece of it."""
    masks = []
    for length in pieces:
        column = torch.arange(length)
        mask = torch.ones(rows, length, dtype=torch.bool)
        for row in range(rows):
            padding = draw(st.sampled_from(["none", "left", "right", "holes", "all"]))
            if padding in ("left", "right"):
                edge = draw(st.integers(0, length))
                mask[row] = column >= edge if padding == "left" else column < edge
            if padding == "holes":
                mask[row] = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
            if padding == "all":
                mask[row] = False
        masks.append(mask)
    return masks


@contextmanager
def blocks_of(queries: int):
    """Attention and retrieval in blocks of that many queries, and of few keys, for short texts to have many."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (state_olmem, visibility_olmem):
            patch.setattr(module, "STORE_BLOCK", queries)
        patch.setattr(retrieval_olmem, "BLOCK", queries)
        patch.setattr(retrieval_olmem, "SCORES", 1)
        patch.setattr(backends_olmem, "BLOCK", {"cpu": queries})
        patch.setattr(backends_olmem, "WHOLE", 1)
        yield


BLOCKS = st.sampled_from([1, 3, 5, 128])


def read(model: OlmemForCausalLM, pieces, masks=None, cache: OlmemCache | None = None) -> torch.Tensor:
    """Logits of ids (B, T) read in pieces with one cache."""
    cache = OlmemCache(model.config) if cache is None else cache
    masks = [None] * len(pieces) if masks is None else masks
    with torch.no_grad():
        read_in = [
            model(piece, attention_mask=mask, past_key_values=cache).logits
            for piece, mask in zip(pieces, masks, strict=True)
        ]
    return torch.cat(read_in, dim=1)


def alone(model: OlmemForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, vocab_size) of one row in one forward without a cache."""
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0]


def write(model: Any, ids: torch.Tensor, **kwargs) -> Any:
    """What `generate` returns of ids without padding, with the logits of every step."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def close(found: torch.Tensor, logits: torch.Tensor) -> None:
    assert_close(found.double(), logits.double(), rtol=0, atol=1e-4)
