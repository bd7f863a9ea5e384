"""The parts of an evaluation, each measured by one of the metrics in `metrics`."""

import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmem import OlmemConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..metrics.long_recall import LongRecall
from ..metrics.perplexity_stream import PARTS, PerplexityStream, begins_with_bos, tokens_of, window_of
from ..metrics.stream_state import StreamState
from ..options import MODES, TASKS, EvaluateOptions
from ..reading.olmem_folder import load_tokenizer
from ..reading.plain import reading
from ..reading.tokenizer_file import quiet_panics, refusing
from .evaluating import Advance, Part, Row

UNBOUNDED = 256  # tokens, in place of a window where no layer has one
MEANS = ("exact_match", "likeliest", "nats_per_token")


@dataclass(frozen=True)
class Text:
    """A text to be read, what evaluation.json says of its file, and the number of tokens that are read of it."""

    text: str
    entry: dict[str, Any]
    tokens: int


class Measured:
    """What is asked for of a folder's model, as parts, as a report and as lines."""

    def __init__(self, out: Path, config: OlmemConfig, paths: list[Path], options: EvaluateOptions):
        self.options, self.config = options, config
        self.window = window_of(config)
        self.tokenizer = load_tokenizer(out, config.vocab_size) if paths or options.tasks else None
        self.texts = [read_text(path, self.tokenizer, options.max_tokens, config.vocab_size) for path in paths]
        modes = MODES if self.window else ("on", "off")
        self.modes = list(dict.fromkeys(options.memory)) or (list(modes) if config.has_memory else ["on"])
        if "reset" in self.modes and self.window is None:
            raise CheckpointError(
                "`memory` must not be reset at each window where no layer has one (got reset); leave it out."
            )
        self.tasks = list(TASKS) if "all" in options.tasks else list(dict.fromkeys(options.tasks))
        size = self.window or UNBOUNDED
        self.distances = sorted(set(options.distances)) or [size // 2, 2 * size, 8 * size]
        self.positions = sorted(set(options.positions)) or [0, 2 * size]

    def parts(self, model: PreTrainedModel) -> list[Part]:
        """Returns the parts, in the order of evaluation.json."""
        return [*self.of_texts(model), *self.of_tasks(model), *self.of_state(model)]

    def of_texts(self, model: PreTrainedModel) -> Iterator[Part]:
        """Yields a part for each text and each way of reading it."""
        for text in self.texts:
            for memory in self.modes:

                def measure(advance: Advance, text: Text = text, memory: str = memory) -> list[Row]:
                    found = computed(
                        PerplexityStream,
                        predictions=[text.text],
                        model=model,
                        tokenizer=self.tokenizer,
                        window=self.window,
                        memory=memory,
                        max_tokens=self.options.max_tokens,
                        chunk=self.options.chunk,
                        advance=advance,
                    )
                    require_finite(found["nats_per_token"], text.entry["name"])
                    named = ("nats_per_token", "perplexity", "bits_per_byte", *PARTS, "positions")
                    return [text.entry | {"memory": memory} | {name: found[name] for name in named}]

                settings = {"text": text.entry, "memory": memory, "chunk": self.options.chunk}
                yield Part("texts", settings, text.tokens, measure)

    def of_tasks(self, model: PreTrainedModel) -> Iterator[Part]:
        """Yields a part for each task at each distance and position."""
        for task in self.tasks:
            for distance in self.distances:
                for position in self.positions:
                    settings = {
                        "distances": [distance],
                        "positions": [position],
                        "count": self.options.questions,
                        "seed": self.options.seed,
                        "chunk": self.options.chunk,
                    }

                    def measure(advance: Advance, task: str = task, settings: dict = settings) -> list[Row]:
                        given = {"model": model, "tokenizer": self.tokenizer, "advance": advance}
                        found = computed(LongRecall, task, **settings, **given)
                        require_finite(found["nats_per_token"], task)
                        return [{"task": task, **cell} for cell in found["cells"]]

                    tokens = self.options.questions * (distance + position)
                    yield Part("recall", {"task": task, **settings}, tokens, measure)

    def of_state(self, model: PreTrainedModel) -> Iterator[Part]:
        """Yields one part, if lengths were asked for."""
        if self.options.state:
            settings = {"lengths": sorted(set(self.options.state)), "chunk": self.options.chunk}

            def measure(advance: Advance) -> list[Row]:
                return computed(StreamState, model=model, advance=advance, **settings)["rows"]

            yield Part("state", settings, max(self.options.state), measure)

    def report(self, found: dict[str, list[Row]]) -> dict[str, Any]:
        """Returns what evaluation.json holds of these rows."""
        recall = []
        for task in self.tasks:
            cells = [row for row in found["recall"] if row["task"] == task]
            questions = sum(cell["questions"] for cell in cells)
            means = {name: sum(cell["questions"] * cell[name] for cell in cells) / questions for name in MEANS}
            recall.append({"task": task, "questions": questions, **means, "seed": self.options.seed, "cells": cells})
        return {
            "texts": found.get("texts", []),
            "recall": recall,
            "state": found.get("state", []),
            "window": self.window,
            "bos_token": self.tokenizer is not None and begins_with_bos(self.tokenizer),
        }

    def lines(self, report: dict[str, Any]) -> Iterator[str]:
        """Yields what a person is told of each row."""
        for row in report["texts"]:
            told = f", memory {row['memory']}" if self.config.has_memory or row["memory"] != "on" else ""
            yield (
                f"{row['name']}: {row['nats_per_token']:.5g} nats per token, perplexity {row['perplexity']:.5g}, "
                f"{row['bits_per_byte']:.5g} bits per byte ({row['tokens']} tokens{told})"
            )
        for row in report["recall"]:
            yield (
                f"{row['task']}: {100 * row['exact_match']:.1f} % of {row['questions']} answers match, "
                f"{row['nats_per_token']:.5g} nats per token of an answer"
            )
        for row in report["state"]:
            yield (
                f"state after {row['tokens']:,} tokens: {row['bytes']:,} bytes, {1e6 * row['seconds_per_step']:.5g} µs "
                "a step"
            )


def computed(metric: Any, config_name: str | None = None, **given: Any) -> dict[str, Any]:
    """Returns what a metric computes, in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        return metric(config_name=config_name, keep_in_memory=True, cache_dir=scratch).compute(**given)


def require_finite(nats: float, name: str) -> None:
    """Raises CheckpointError for a loss that no sound model has."""
    if not nats < math.log(1e300):  # false for NaN
        raise CheckpointError(
            f"the loss on {name} must be finite (got {nats}); the weights are damaged, or the run that wrote them "
            "diverged: convert another step."
        )


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int | None, vocab_size: int) -> Text:
    """The text of a file, as the model is given it."""
    assert tokenizer is not None
    with reading(path, "choose a text file in UTF-8"):
        content = path.read_bytes()
        text = content.decode("utf-8")
    remedy = "choose another text, or convert again with --tokenizer PATH"
    with refusing(f"`{path}` must be a text that the tokenizer can read", remedy), quiet_panics():
        ids, num_bytes = tokens_of(text, tokenizer, max_tokens)
    if len(ids) < 2 or not num_bytes:
        raise CheckpointError(f"`text` must have at least 2 tokens (got {len(ids)} in {path}); choose a longer one.")
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"`vocab_size` must cover the tokens of {path} (got {vocab_size}, and a token {int(ids.max())}); convert "
            "again with --tokenizer PATH."
        )
    entry = {
        "name": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "tokens": len(ids),
    }
    return Text(text, entry, len(ids))
