"""Associative recall of many pairs (MQAR): pairs are told, and asked for when they have left every window.

A text is filler with decoys, then pairs of a key and a value, one after the other, then filler with decoys again, then
questions: a key, and the value that was told of it, in another order. A decoy is a marker, a key and a value, and is
never asked for. So what may be asked fits into a store, and all that looks like it does not.

A text is made from its number, so a training that goes on sees what it would have seen.
"""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

KEYS, VALUES, FILLER = 1024, 64, 16  # kinds of tokens, numbered in this order
MARKER = KEYS + VALUES + FILLER  # stands before a decoy
VOCABULARY = MARKER + 1
CELL = 8  # tokens of filler in which there may be one decoy
DECOYS = 0.5  # the share of cells that have one
ASKED = 64  # questions at most
# Of each stage of the curriculum: pairs, keys they are drawn from, tokens, share of cells with decoys.
STAGES = (
    (4, 16, 16, 0.0),
    (8, 32, 32, 0.0),
    (8, 64, 64, 0.0),
    (16, 128, 128, DECOYS),
    (32, 256, 256, DECOYS),
    (64, 512, 512, DECOYS),
    (128, 1024, 1024, DECOYS),
    (256, 1024, 2048, DECOYS),
    (256, 1024, 2048, DECOYS),  # of fewer pairs and smaller stores
)
NARROW = 8  # tokens of the other window, which makes short texts long
ROOM = (1, 2, 4)  # times the share of a store that a text's share of the pairs gets
FEWER = (1, 4, 16)  # what the pairs of the last stage are divided by, so that a store must drop more than it keeps
TIGHT = (1, 2)  # … and the stores of that stage


@dataclass
class Texts:
    """Token ids (R, T), and the columns of the answers (n,), which are the same in all rows."""

    ids: torch.Tensor
    asked: torch.Tensor


def make_texts(
    rows: int, pairs: int, length: int, generator: torch.Generator, before: int = 0, kinds: int = KEYS,
    decoys: float = DECOYS,
) -> Texts:  # fmt: skip
    """Makes texts of so many tokens, in which so many stand before the pairs of keys of the first so many kinds."""
    asked = min(pairs, ASKED)
    room = length - 2 * pairs - 2 * asked - before
    if room < 0 or before < 0:
        raise ValueError(f"{length} tokens must hold {before} tokens, {pairs} pairs and {asked} questions")
    if before % CELL or room % CELL:
        raise ValueError(f"filler must be multiples of {CELL} tokens (got {before} and {room}); choose other lengths")

    def filler(count: int) -> torch.Tensor:
        ids = KEYS + VALUES + torch.randint(FILLER, (rows, count), generator=generator)
        cells = ids.unflatten(1, (-1, CELL))
        size = cells.shape[:2]
        keys, values = (torch.randint(most, size, generator=generator) for most in (kinds, VALUES))
        false = torch.stack((torch.full(size, MARKER), keys, KEYS + values), dim=-1)
        is_decoy = torch.rand(size, generator=generator) < decoys
        cells[..., :3] = torch.where(is_decoy[..., None], false, cells[..., :3])
        return ids

    keys = torch.rand(rows, kinds, generator=generator).topk(pairs).indices
    values = KEYS + torch.randint(VALUES, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).topk(asked).indices
    told = torch.stack((keys, values), dim=-1).flatten(1)
    questions = torch.stack((keys.gather(1, order), values.gather(1, order)), dim=-1).flatten(1)
    ids = torch.cat((filler(before), told, filler(room), questions), dim=1)
    return Texts(ids, length - 2 * asked + 1 + 2 * torch.arange(asked))


class PairTexts(Dataset[dict[str, torch.Tensor]]):
    """Batches of texts, one for each step of a training: a curriculum from few pairs in one window to many far away.

    Every second batch has texts of the longest stage so far, the others of any stage up to it. Where there is a store,
    half of the texts are read with a narrow window, and stores are small where there are few pairs. In the last stage
    windows are whole, pairs are fewer and stores are smaller.

    Args:
        steps: of the training.
        tokens: of a batch.
        capacity: of a store, or 0.
    """

    stages = len(STAGES)

    def __init__(self, steps: int, tokens: int, seed: int, capacity: int = 0):
        self.steps, self.tokens, self.seed, self.capacity = steps, tokens, seed, capacity
        self.begins = [0]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        longest = sum(begin <= index for begin in self.begins) - 1
        own = torch.Generator().manual_seed(2**24 * self.seed + index)

        def draw(choices: int) -> int:
            return int(torch.randint(choices, (), generator=own))

        stage = draw(longest + 1) if index % 2 else longest
        pairs, kinds, length, decoys = STAGES[stage]
        window, room, tight = NARROW * draw(2), ROOM[draw(len(ROOM))], 1
        if stage == len(STAGES) - 1:
            window, room, tight = 0, 1, TIGHT[draw(len(TIGHT))]
            pairs //= FEWER[draw(len(FEWER))]
        cells = (length - 2 * pairs - 2 * min(pairs, ASKED)) // 2 // CELL
        texts = make_texts(max(1, self.tokens // length), pairs, length, own, CELL * draw(cells + 1), kinds, decoys)
        share = room * self.capacity * pairs // STAGES[-1][0] // tight
        sizes = {"window": window, "capacity": min(self.capacity, share)} if self.capacity else {}
        return {
            "input_ids": texts.ids,
            "asked": texts.asked,
            "longest": torch.tensor(not index % 2),
            **{name: torch.tensor(size) for name, size in sizes.items()},
        }
