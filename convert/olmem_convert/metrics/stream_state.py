"""Bytes of a stream's state, and time a token, against its length: stream_state.md is its card."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import evaluate
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .streams import read

DESCRIPTION = """
Reads random tokens as one stream, and gives the bytes of its state and the time a token at lengths of it.
"""
INPUTS = """
Args:
    lengths: numbers of tokens at which the stream is looked at (`list` of `int`).
    model: a causal language model of Transformers.
    chunk: the tokens of a call.
    steps: calls of one token at the end of each stretch, the median of which is the time of a step.
    seed: of the tokens.
    advance: is called with the number of tokens that were read, in place of a progress bar.
Returns:
    rows: by `tokens`, in order: `bytes` of the state, `seconds_per_token` in calls of `chunk` tokens (None where there
    was none), and `seconds_per_step`.
"""


class StreamState(evaluate.Metric):
    """Bytes of a stream's state, and time a token, by length."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"lengths": datasets.Value("int64")}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]  whose arguments are the features
        self,
        lengths: Sequence[int],
        model: PreTrainedModel,
        chunk: int = 512,
        steps: int = 8,
        seed: int = 0,
        advance: Callable[[int], object] | None = None,
    ) -> dict[str, Any]:
        marks = sorted(set(lengths))
        if marks[0] < 1 or chunk < 1 or steps < 1:
            raise ValueError(
                f"`lengths`, `chunk` and `steps` must be at least 1 (got {marks[0]}, {chunk} and {steps}); give more."
            )
        generator = torch.Generator().manual_seed(seed)
        vocab_size = model.config.get_text_config().vocab_size
        with tqdm(total=marks[-1], unit="token", disable=True if advance else None) as bar:
            make = partial(torch.randint, vocab_size, generator=generator)
            Reader(model, make, lambda size: None).warm_up(chunk)
            reader, rows = Reader(model, make, advance or bar.update), []
            for before, mark in zip([0, *marks[:-1]], marks, strict=True):
                few = min(steps, mark - before)
                reading = [(size, reader.read(size)) for size in pieces(mark - before - few, chunk)]
                stepping = [reader.read(1) for _ in range(few)]
                count = sum(size for size, _ in reading)
                rows.append(
                    {
                        "tokens": mark,
                        "bytes": bytes_of(reader.state),
                        "seconds_per_token": sum(seconds for _, seconds in reading) / count if count else None,
                        "seconds_per_step": statistics.median(stepping),
                    }
                )
        return {"rows": rows, "chunk": chunk}


class Reader:
    """A stream of a model over tokens that are made as they are needed."""

    def __init__(
        self, model: PreTrainedModel, make: Callable[[tuple[int, int]], torch.Tensor], advance: Callable[[int], object]
    ):
        self.model, self.make, self.advance = model, make, advance
        self.state: Any = None

    def read(self, size: int) -> float:
        """Reads so many tokens in one call, and returns its seconds."""
        ids = self.make((1, size)).to(self.model.device)
        self.wait()
        start = time.perf_counter()
        _, self.state = read(self.model, ids, self.state, keep=1)
        self.wait()
        seconds = time.perf_counter() - start
        self.advance(size)
        return seconds

    def warm_up(self, chunk: int) -> None:
        """Computes each kind of call once."""
        for size in (chunk, 1, 1):
            self.read(size)

    def wait(self) -> None:
        """Waits until the device has done what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def pieces(count: int, chunk: int) -> list[int]:
    """Returns the sizes of the calls that read so many tokens."""
    return [chunk] * (count // chunk) + ([count % chunk] if count % chunk else [])


def bytes_of(state: Any) -> int:
    """Returns the bytes of a cache: what it says of itself, or else those of all tensors in it."""
    if isinstance(size := getattr(state, "nbytes", None), int):
        return size
    found: dict[int, int] = {}
    collect(state, found, set())
    return sum(found.values())


def collect(value: Any, found: dict[int, int], seen: set[int]) -> None:
    """Notes the bytes of each storage of tensors within an object."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for each in value.values():
            collect(each, found, seen)
    elif isinstance(value, list | tuple):
        for each in value:
            collect(each, found, seen)
    elif type(value).__module__.split(".")[0] == "transformers" and hasattr(value, "__dict__"):
        collect(vars(value), found, seen)
