"""Reads texts of many lengths with a trained model, piece by piece, and counts right answers and bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from arms import Shape
from olmem import OlmemCache, OlmemForCausalLM
from pairs import STAGES, make_texts
from torch import nn

PIECE = 8192  # tokens of a call
TIMES = (1, 4, 16, 64, 256)  # the trained length
PAIRS = (256, 320, 384, 512, 640, 1024)  # told in a text, of which a store holds one token each of 640
LONG, FEWER_ROWS = 64, 4  # from so many times the trained length on there are so many times fewer rows
ONE_CALL = 2**17  # tokens that are read in one call where there is no state to go on with


@dataclass
class Reading:
    """Holds what was read: the share of right answers, and the bytes of state of a row, or None for a peer."""

    right: float
    state: int | None


@torch.no_grad()
def read(model: nn.Module, ids: torch.Tensor, asked: torch.Tensor, piece: int = PIECE) -> Reading:
    """Reads ids (R, T) and answers at columns (n,)."""
    length, tail = ids.shape[1], ids.shape[1] - int(asked[0]) + 1
    state = None
    if isinstance(model, OlmemForCausalLM):
        cache = OlmemCache(model.config)
        for part in ids[:, : length - tail].split(piece, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = model(ids[:, -tail:], past_key_values=cache, use_cache=True).logits[:, asked - 1 - (length - tail)]
        state = cache.nbytes // len(ids)
    else:
        logits = model(input_ids=ids, logits_to_keep=asked - 1, use_cache=False).logits
    right = (logits.argmax(-1) == ids[:, asked]).float().mean()
    return Reading(float(right), state)


def without_store(model: OlmemForCausalLM) -> OlmemForCausalLM:
    """Returns the same weights with retrieval and memory off."""
    config = type(model.config).from_dict(
        model.config.to_dict() | {"retrieval_layers": [], "num_memory_tokens": 0, "retrieval_admission": "recent"}
    )
    other = OlmemForCausalLM(config).to(model.device)  # pyright: ignore[reportArgumentType]
    other.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in other.state_dict()})
    return other.eval()


def recall(model: nn.Module, shape: Shape, seed: int, most: int, rows: int, device: str) -> dict[str, Any]:
    """Tries texts of up to so many times the trained length, with more pairs, later ones, and without memory.

    Only what may have learned something is asked for more: more pairs than a store has room for, and later ones.
    """
    model.eval()
    found: dict[str, Any] = {"length": {}, "pairs": {}, "state": {}}

    def trial(times: int, pairs: int, before: int = 0, of: nn.Module = model) -> Reading:
        generator = torch.Generator().manual_seed(10**6 + seed)
        count = max(1, rows // FEWER_ROWS) if times >= LONG else rows
        texts = make_texts(count, pairs, times * shape.length, generator, before)
        return read(of, texts.ids.to(device), texts.asked.to(device))

    bounded = (
        model if isinstance(model, OlmemForCausalLM) and "full_attention" not in model.config.layer_types else None
    )
    for times in TIMES:
        if times > most or not (bounded or times * shape.length <= ONE_CALL):
            continue
        reading = trial(times, PAIRS[0])
        found["length"][times] = reading.right
        found["state"][times] = reading.state
    middle = min(16, most)
    if bounded is not None and bounded.config.retrieval_layers:
        if middle > 1:
            for pairs in PAIRS:
                found["pairs"][pairs] = trial(middle, pairs).right
            found["late"] = trial(middle, PAIRS[0], middle * shape.length // 2).right
        found["off"] = trial(1, PAIRS[0], of=without_store(bounded)).right
    return found


@torch.no_grad()
def progress(model: nn.Module, seed: int, device: str) -> float:
    """Returns the share of right answers in texts of every stage of the curriculum, each of the same weight."""
    model.eval()
    shares = []
    for pairs, kinds, length, decoys in STAGES:
        generator = torch.Generator().manual_seed(10**6 + seed)
        texts = make_texts(max(1, 2**14 // length), pairs, length, generator, 0, kinds, decoys)
        ids, asked = texts.ids.to(device), texts.asked.to(device)
        logits = model(input_ids=ids, logits_to_keep=asked - 1, use_cache=False).logits
        shares.append(float((logits.argmax(-1) == ids[:, asked]).float().mean()))
    return sum(shares) / len(shares)
