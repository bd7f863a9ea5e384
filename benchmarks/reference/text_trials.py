"""Reads held-out text with a trained model: in rows, as one long stream, and where a passage comes twice.

R rows, T tokens, N tokens of a stream. Losses are in nats a token. They are summed in float64.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from arms import numbers
from olmem import OlmemCache, OlmemForCausalLM
from text import REPEATED, Text, begun, repeat
from torch import nn
from torch.nn.functional import cross_entropy
from trials import without_store

PIECE = 2**14  # tokens of a call
TIMES = (1, 4, 8)  # the trained length, in one call
PLACES = 16  # parts of a row that have a figure of their own
ROWS = 8  # streams side by side
COPIES = 32  # rows in which a passage comes twice


def autocast(device: torch.device) -> torch.autocast:
    """Returns what computes as in training: with bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the losses (R, T) of logits (R, T, vocabulary)."""
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape).double()


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits (R, T, vocabulary) after each token of rows (R, T)."""
    kept = torch.arange(ids.shape[1], device=ids.device)
    with autocast(ids.device):
        return model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits


@torch.no_grad()
def row_losses(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Returns the losses (R, T) of rows (R, T + 1), some of them a call."""
    some = rows.split(max(1, PIECE // rows.shape[1]))
    return torch.cat([nats(logits_of(model, part[:, :-1]), part[:, 1:]) for part in some])


def cut(ids: torch.Tensor, length: int, end: int) -> torch.Tensor:
    """Returns a text (N,) as rows (R, length + 1) that each begin with the token of the end."""
    return begun(ids[: len(ids) // length * length].view(-1, length), end)


@torch.no_grad()
def stream_losses(model: OlmemForCausalLM, ids: torch.Tensor, cache: OlmemCache) -> Iterator[torch.Tensor]:
    """Yields the losses (R, …) of texts (R, N + 1), read piece by piece with a state."""
    size = max(1, PIECE // len(ids))
    for start in range(0, ids.shape[1] - 1, size):
        part = ids[:, start : start + size + 1]
        with autocast(ids.device):
            logits = model(part[:, :-1], past_key_values=cache, use_cache=True).logits
        yield nats(logits, part[:, 1:])


def octaves(losses: torch.Tensor, first: int) -> list[list[float]]:
    """Returns, of losses (R, N), how many tokens lie before a part's end, and the part's mean: ever twice as many."""
    found, start, stop = [], 0, first
    while start < losses.shape[1]:
        stop = min(stop, losses.shape[1])
        found.append([stop, float(losses[:, start:stop].mean())])
        start, stop = stop, 2 * stop
    return found


def read_stream(model: OlmemForCausalLM, ids: torch.Tensor, first: int) -> dict[str, Any]:
    """Reads texts (R, N + 1) once, and returns perplexity, losses from octave to octave, and the bytes of state."""
    cache = OlmemCache(model.config)
    losses = torch.cat(list(stream_losses(model, ids, cache)), dim=1)
    found = {"tokens": losses.shape[1], "perplexity": perplexity(losses), "octaves": octaves(losses, first)}
    return found | {"state": cache.nbytes // len(ids)}


def perplexity(losses: torch.Tensor) -> float:
    """Returns the perplexity, which is infinite where it is no float64."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


@torch.no_grad()
def copying(model: nn.Module, ids: torch.Tensor, length: int, end: int) -> dict[str, float]:
    """Returns how much is right of a passage's second time, and its perplexity.

    A row of `length` tokens begins with a passage, and ends with the same.
    """
    count = length // REPEATED
    rows = cut(ids, length, end)[:COPIES, 1:]
    rows = begun(repeat(rows, count, 0), end)
    right, losses = [], []
    for part in rows.split(max(1, PIECE // length)):
        logits, targets = logits_of(model, part[:, :-1])[:, -count + 1 :], part[:, -count + 1 :]
        right.append((logits.argmax(-1) == targets).double())
        losses.append(nats(logits, targets))
    return {"right": float(torch.cat(right).mean()), "perplexity": perplexity(torch.cat(losses))}


def bounded(model: nn.Module) -> OlmemForCausalLM | None:
    """Returns the model if it is an Olmem whose state has a bound."""
    is_one = isinstance(model, OlmemForCausalLM) and "full_attention" not in model.config.layer_types
    return model if is_one and isinstance(model, OlmemForCausalLM) else None


def read_text(model: nn.Module, text: Text, length: int, tokens: int) -> dict[str, Any]:
    """Tries a model on the first so many held-out tokens."""
    model.eval()
    device = next(model.parameters()).device
    ids = text.held_out[:tokens].long().to(device)
    found: dict[str, Any] = {"numbers": numbers(model), "length": {}}
    for times in TIMES:
        if len(ids) < times * length:
            continue
        losses = row_losses(model, cut(ids, times * length, text.end))
        found["length"][times] = perplexity(losses)
        if times == 1:
            places = losses[:, : length // PLACES * PLACES].mean(0).view(min(PLACES, length), -1).mean(1)
            found["places"] = places.tolist()
    found["copying"] = copying(model, ids, length, text.end)
    streaming = bounded(model)
    if streaming is not None:
        rows = ids[: len(ids) // ROWS * ROWS].view(ROWS, -1)
        found["stream"] = read_stream(streaming, begun(rows, text.end), length)
        if streaming.config.retrieval_layers or streaming.config.num_memory_tokens:
            other = without_store(streaming)
            losses = row_losses(other, cut(ids, length, text.end))
            found["off"] = {"perplexity": perplexity(losses), "copying": copying(other, ids, length, text.end)}
    return found
