"""Reads texts of up to millions of tokens with a trained model, and counts right answers, bytes and time."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from olmem import OlmemCache, OlmemForCausalLM
from olmem_convert.metrics.recall_tasks import make_example
from stories import Stories, make_tokenizer
from torch import nn
from tqdm import tqdm
from trials import without_store

LENGTHS = (4096, 16384, 65536, 262144, 1048576, 10485760)
PIECE, CALL = 4096, 2**15  # tokens of a call at most, in a row and in all rows
LONG = 2**20  # tokens from which on there is one text's filler for two
SHARE, LAST = 0.25, 0.9  # of the time that is left, which texts of a length may take, and those of the last one
TIMED = 4096  # tokens of a call that is timed
Tell = Callable[[dict[str, Any]], None]  # takes what was found so far


@torch.no_grad()
def read(model: OlmemForCausalLM, ids: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Reads ids (R, T) on any device, and says in which rows all answers in columns (n,) are right, and the bytes of
    state of a row."""
    cache, device = OlmemCache(model.config), model.device
    split = int(asked[0]) - 1  # the last token before the first answer is read with the answers
    for part in ids[:, :split].split(max(1, min(PIECE, CALL // len(ids))), dim=1):
        model(part.to(device).long(), past_key_values=cache, use_cache=True, logits_to_keep=1)
    tail = ids[:, split:].to(device).long()
    logits = model(tail, past_key_values=cache, use_cache=True).logits
    columns = asked.to(device) - 1 - split
    return (logits[:, columns].argmax(-1) == tail[:, columns + 1]).all(1).cpu(), cache.nbytes // len(ids)


def depths_of(rows: int) -> np.ndarray[Any, Any]:
    """Returns the depths of passages, spread evenly from the start of a text on."""
    return np.arange(rows) / rows


def try_lengths(
    model: OlmemForCausalLM, task: str, seed: int, rows: int, most: int, until: float, tell: Tell
) -> None:  # fmt: skip
    """Tries texts of all lengths up to the most, with their passages at all depths, as many as there is time for."""
    found: dict[str, Any] = {"length": {}, "rows": {}, "state": {}}
    texts = Stories(task, 2 * 10**6 + seed).make(rows, LENGTHS[0], depths_of(rows) / 2)
    found["off"] = float(read(without_store(model), texts.ids, texts.asked)[0].float().mean())
    found["recall_tasks"] = by_recall_tasks(model, task, seed, min(rows, 16), LENGTHS[0])
    tell(found)
    took = 0.0  # seconds of a token, in the texts before
    lengths = [each for each in LENGTHS if each <= most]
    if not lengths:
        raise ValueError(f"the longest text must have {LENGTHS[0]} tokens or more (got {most}); try longer ones")
    for length in lengths:
        left = until - time.perf_counter()
        share = LAST if length == lengths[-1] else SHARE
        count = min(rows, int(share * left / (took * length))) if took else rows
        if left <= 0 or not count:
            break
        begin = time.perf_counter()
        stories = Stories(task, 10**6 + seed, (8 if length < LONG else 2) * length)
        texts = stories.make(count, length, depths_of(count))
        right, state = read(model, texts.ids, texts.asked)
        end = time.perf_counter()
        took = (end - begin) / length / count
        found["length"][length], found["rows"][length] = float(right.float().mean()), count
        found["state"][length] = state
        tell(found)


def by_recall_tasks(model: nn.Module, task: str, seed: int, rows: int, length: int) -> float:
    """Returns the share of right answers to texts that `recall_tasks` makes itself, whose passage is at the start."""
    right = []
    for number in range(rows):
        example = make_example(task, make_tokenizer(), length, 0, seed, number, held_out=False)
        question, answer, _ = example.questions[0]
        ids = torch.tensor([example.context + question + answer])
        asked = ids.shape[1] - len(answer) + torch.arange(len(answer))
        assert isinstance(model, OlmemForCausalLM)
        right.append(bool(read(model, ids, asked)[0]))
    return statistics.fmean(right)


@torch.no_grad()
def time_stream(model: OlmemForCausalLM, task: str, most: int) -> dict[str, Any]:
    """Reads one long text, and returns the bytes of state and microseconds a token around each length."""
    ids = Stories(task, 0, 2 * most).make(1, most).ids.to(model.device)
    cache, times, states = OlmemCache(model.config), [], []
    for part in tqdm(ids.split(TIMED, dim=1), unit="call", disable=None):
        begin = time.perf_counter()
        model(part.long(), past_key_values=cache, use_cache=True, logits_to_keep=1)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin) / part.shape[1])
        states.append(cache.nbytes)
    found: dict[str, Any] = {"state": {}, "microseconds": {}}
    for length in (each for each in LENGTHS if each <= most):
        last = length // TIMED
        around = times[max(1, last - 8) : last + 8]
        found["state"][length] = states[last - 1]
        found["microseconds"][length] = statistics.median(around or times)
    return found
