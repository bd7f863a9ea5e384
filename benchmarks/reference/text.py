"""Text for the reference models: what is trained on, what is held out, and which models are compared.

Text is the sources of Python's standard library, in the order of a hash of their paths, in the tokens of the demo.
Whole files, the first that fit into a tenth of the text, are held out, but none that takes more than a tenth of that
tenth, as the help in English would. All others train. A long stream goes on after what is held out with the sources of
PyTorch. A token of the end stands after each file.

A step of a training reads spans that lie anywhere in the text, each once an epoch. A span is a row, or it is cut into
shorter rows, so that a model with memory sees one segment a row first and many later. Every row begins with the token
of the end. In a share of the rows the last part repeats an earlier one, which a window no longer holds. A step is made
from its number, so a training that goes on sees what it would have seen.

The arms `key_value`, `half heads` and `window` tell what one shared projection is worth at equal state, where `window`
has half as many tokens.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import arms
import torch
from arms import Arm, Shape, olmem
from tokenizers import Tokenizer
from torch.utils.data import Dataset

sys.path.append(str(Path(__file__).parents[1]))

from training import END_OF_TEXT, TOKENIZER, documents, pack, split_documents

HELD_OUT, LARGEST = 0.1, 0.1  # of the text, and of that
STREAMED = 2**20  # tokens of a long stream
CHARACTERS = 5  # of a token at most, in a text that is long enough
ROWS_OF_A_SPAN = (4, 2, 1)  # of each stage of the curriculum
BEGIN = (0.0, 0.1, 0.2)  # the share of the steps after which each is the longest
SHORTER = 4  # of so many steps one has rows of any stage so far
NARROWER = (2, 4)  # what a model's window is divided by, where windows are drawn at random
REPEATED = 8  # a part of a row, one in so many, that comes twice


@dataclass
class Text:
    """Holds token ids (N,) that train, that are held out, and of a long stream, and the token of the end."""

    training: torch.Tensor
    held_out: torch.Tensor
    stream: torch.Tensor
    end: int
    vocabulary: int


def make_text(characters: int) -> Text:
    """Reads at most so many characters of the standard library, and tokenizes them."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    end = tokenizer.encode(END_OF_TEXT).ids[0]

    def encode(texts: Iterable[str]) -> list[list[int]]:
        return [each.ids for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    training, held_out = split_documents(encode(documents(characters)), HELD_OUT, LARGEST)
    more = encode(documents(min(characters, CHARACTERS * STREAMED), Path(torch.__file__).parent))
    tried = pack(held_out, end)
    stream = torch.cat((tried, pack(more, end)))[:STREAMED]
    return Text(pack(training, end), tried, stream, end, tokenizer.get_vocab_size())


def begun(rows: torch.Tensor, end: int) -> torch.Tensor:
    """Returns rows (R, T) as (R, T + 1), after the token of the end."""
    return torch.cat((rows.new_full((len(rows), 1), end), rows), dim=1)


def repeat(rows: torch.Tensor, count: int, first: int) -> torch.Tensor:
    """Returns rows (R, T) whose last tokens, so many, are those from a column on."""
    return torch.cat((rows[:, :-count], rows[:, first : first + count]), dim=1)


class TextRows(Dataset[dict[str, torch.Tensor]]):
    """Makes the batches of a training: rows are short at first, and a store is as much smaller as a row is.

    Args:
        text: what trains.
        steps: the number of batches.
        tokens: of a batch.
        length: the tokens of a span, of which there is at least one in a batch.
        seed: decides the order, and all that is drawn.
        repeats: the share of rows that repeat a part of theirs.
        windows: the share of steps in which windows are drawn at random.
        window: the model's own, or 0.
        capacity: that of the model's stores, or 0.
        curriculum: whether rows are short at first.
    """

    stages = 1  # that wait for an answer

    def __init__(
        self, text: Text, steps: int, tokens: int, length: int, seed: int, repeats: float = 0.0, windows: float = 0.0,
        window: int = 0, capacity: int = 0, curriculum: bool = True,
    ):  # fmt: skip
        self.text, self.steps, self.length, self.seed = text, steps, length, seed
        self.repeats, self.windows, self.window, self.capacity = repeats, windows, window, capacity
        self.curriculum, self.begins = curriculum, [0]
        self.spans = max(1, tokens // length)
        self.batches = (len(text.training) - length) // length // self.spans
        if self.batches < 1:
            raise ValueError(f"{len(text.training)} tokens must be a batch of {self.spans} spans of {length} or more")
        self.epoch, self.starts = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, self.batches)
        if epoch != self.epoch:
            order = torch.Generator().manual_seed(2**20 * self.seed + epoch)
            offset = int(torch.randint(self.length, (), generator=order))
            spans = torch.randperm(self.batches * self.spans, generator=order)
            self.epoch, self.starts = epoch, offset + self.length * spans
        chosen = self.starts[place * self.spans : (place + 1) * self.spans]
        own = torch.Generator().manual_seed(2**40 + 2**20 * self.seed + index)
        stage = sum(index >= share * self.steps for share in BEGIN) - 1 if self.curriculum else len(BEGIN) - 1
        if self.curriculum and index % SHORTER == SHORTER - 1:
            stage = int(torch.randint(stage + 1, (), generator=own))
        parts = ROWS_OF_A_SPAN[stage]
        rows = self.text.training[chosen[:, None] + torch.arange(self.length)].long().view(parts * len(chosen), -1)
        count = rows.shape[1] // REPEATED
        first = int(torch.randint(rows.shape[1] - 2 * count + 1, (), generator=own))
        repeating = torch.rand(len(rows), 1, generator=own) < self.repeats
        rows = torch.where(repeating, repeat(rows, count, first), rows)
        is_narrow = float(torch.rand((), generator=own)) < self.windows
        divided = NARROWER[int(torch.randint(len(NARROWER), (), generator=own))]
        capacity = min(self.capacity, self.length // 2)  # so that what is kept is selected in training
        sizes = {"window": self.window // divided if is_narrow else 0, "capacity": capacity // parts}
        return {
            "input_ids": begun(rows, self.text.end),
            **{name: torch.tensor(size) for name, size in sizes.items()},
        }


def wide(factor: int) -> Callable[[Shape], int]:
    """Returns what makes windows so many times as wide as those that take the whole state."""
    return lambda shape: factor * shape.wide_window


SHARED = ("full", "window", "sinks", "memory", "recent", "selected", "all", "OlmoHybrid", "RMT")
ARMS: dict[str, Arm] = {name: arms.ARMS[name] for name in SHARED} | {
    "key_value": Arm(
        olmem(sliding_window=wide(2), shared_projections=lambda _: "key_value"),
        "sliding windows with one tensor for keys and values, so twice as many tokens",
    ),
    "half heads": Arm(
        olmem(sliding_window=wide(2), num_key_value_heads=lambda shape: shape.heads // 2),
        "sliding windows with half as many heads of keys and values, so twice as many tokens",
    ),
}
