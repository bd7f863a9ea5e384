"""Long recall: exact match by distance and position, of given answers or of a task: long_recall.md is its card."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .recall_tasks import TASKS, Example, make_example
from .streams import cache_name, read

DESCRIPTION = """
Exact match by how far back a text told what is asked for, and by how much of the text was read before.
"""
ANSWERS = """
Args:
    predictions: what was answered (`list` of `str`).
    references: what is right (`list` of `str`).
    distances: tokens from what is asked for to the question (`list` of `int`).
    positions: tokens before what is asked for (`list` of `int`).
Returns:
    exact_match, questions; cells: the same by `distance` and `position`.
"""
CELLS = """
Args:
    distances, positions: cells of the task, as many of the one as of the other (`list` of `int`, in tokens).
    model: a causal language model of Transformers.
    tokenizer: its tokenizer.
    count: texts of a cell.
    seed: of the texts.
    held_out: names of evaluation; False for those of training.
    chunk: the tokens of a call, which change no figure.
    advance: is called with the number of tokens that were read, in place of a progress bar.
Returns:
    exact_match of what the model generates greedily, likeliest (the share of answers each token of which is the
    likeliest one behind those before it), nats_per_token (the loss of answers), questions;
    cells: the same by `distance` and `position`.
"""


class LongRecall(evaluate.Metric):
    """Exact match of answers, or of a task, which is the configuration's name."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        if self.config_name not in ("default", *TASKS):
            raise ValueError(
                f"`config_name` must be one of {', '.join(TASKS)}, or left out for answers of your own (got "
                f"{self.config_name!r}); choose one."
            )
        whole, text = datasets.Value("int64"), datasets.Value("string")
        answers = {} if self.config_name in TASKS else {"predictions": text, "references": text}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=CELLS if self.config_name in TASKS else ANSWERS,
            features=datasets.Features({**answers, "distances": whole, "positions": whole}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]  whose arguments are the features
        self, distances: Sequence[int], positions: Sequence[int], **given: Any
    ) -> dict[str, Any]:
        places = list(zip(distances, positions, strict=True))
        return (self.try_task if self.config_name in TASKS else score)(places, **given)

    def try_task(
        self,
        places: Sequence[tuple[int, int]],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int = 8,
        seed: int = 0,
        held_out: bool = True,
        chunk: int = 512,
        advance: Callable[[int], object] | None = None,
    ) -> dict[str, Any]:
        """Asks the model the questions of `count` texts of each cell."""
        rows = []
        total = count * sum(distance + position for distance, position in places)
        with tqdm(total=total, unit="token", disable=True if advance else None) as bar:
            for distance, position in places:
                for number in range(count):
                    example = make_example(self.config_name, tokenizer, distance, position, seed, number, held_out)
                    told = at_most(distance + position, advance or bar.update)
                    for answered in ask(model, tokenizer, example, chunk, told):
                        rows.append({"distance": distance, "position": position, **answered})
        return summary(rows, ("exact_match", "likeliest", "nats_per_token"))


def score(places: Sequence[tuple[int, int]], predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Compares answers with what is right."""
    rows = [
        {"distance": distance, "position": position, "exact_match": float(said.strip() == right.strip())}
        for (distance, position), said, right in zip(places, predictions, references, strict=True)
    ]
    return summary(rows, ("exact_match",))


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Returns means over all rows, and over those of each cell."""

    def means(of: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"questions": len(of), **{name: sum(row[name] for row in of) / len(of) for name in names}}

    places = sorted({(row["distance"], row["position"]) for row in rows})
    cells = [
        {"distance": distance, "position": position}
        | means([row for row in rows if (row["distance"], row["position"]) == (distance, position)])
        for distance, position in places
    ]
    return means(rows) | {"cells": cells}


def at_most(total: int, advance: Callable[[int], object]) -> Callable[[int], object]:
    """Returns a function that passes on no more than so many tokens in all: a passage's own are not counted."""
    left = total

    def pass_on(tokens: int) -> None:
        nonlocal left
        advance(min(tokens, left))
        left -= min(tokens, left)

    return pass_on


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: Any, example: Example, chunk: int, advance: Callable[[int], object]
) -> list[dict[str, float]]:
    """Reads a text once, and answers each question from a copy of the state: by generation, and by loss."""
    context = torch.tensor([example.context], device=model.device)
    state = None
    for piece in context.split(chunk, dim=1):
        _, state = read(model, piece, state, keep=1)
        advance(piece.shape[1])
    rows = []
    for question, answer, right in example.questions:
        asked = torch.tensor([question], device=model.device)
        told = torch.tensor([answer], device=model.device)
        logits, _ = read(model, torch.cat((asked, told[:, :-1]), dim=1), copy.deepcopy(state), keep=len(answer))
        said = generated(model, torch.cat((context, asked), dim=1), copy.deepcopy(state), len(answer))
        rows.append(
            {
                "exact_match": float(tokenizer.decode(said, skip_special_tokens=True).strip() == right),
                "likeliest": float(torch.equal(logits.argmax(-1), told[0])),
                "nats_per_token": float(cross_entropy(logits.float(), told[0])),
            }
        )
    return rows


def generated(model: PreTrainedModel, ids: torch.Tensor, state: Any, length: int) -> torch.Tensor:
    """Returns what `generate` says greedily behind ids (1, T), the first of which the state has read."""
    config = GenerationConfig(
        max_new_tokens=length, do_sample=False, num_beams=1, repetition_penalty=1.0, pad_token_id=0
    )
    generate: Any = model.generate
    given = {"attention_mask": torch.ones_like(ids), cache_name(model): state}
    made = generate(ids, generation_config=config, **given)
    return made[0, ids.shape[1] :]
