"""Passkey, needles and bAbI's stories as arrays of token ids, made many at a time by the rules of `recall_tasks`.

A text is filler, a passage that tells something, filler again, and questions with their answers at the end. Sentences
and names are those of `olmem_convert.metrics.recall_tasks` for training. A model of words that is trained from scratch
knows no other names, so texts of a trial have the same names, in other stories, with other numbers and filler.

For a training a story may have fewer sentences than its task has, and be followed by several questions, also those of
another task.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from olmem_convert.metrics import recall_tasks as rules
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PERSONS, PLACES, OBJECTS, THINGS = (each[0] for each in (rules.PERSONS, rules.PLACES, rules.OBJECTS, rules.THINGS))
SENTENCES = {"passkey": 1, "niah_single_1": 1, "qa1": 8, "qa2": 12, "qa3": 20}  # of a whole passage
DIGITS = {"passkey": 5, "niah_single_1": 7}
STEP = 0.4  # the share of steps in which a person takes or drops something
STREAM = 2**19  # tokens of filler that are made at a time for a training
MOVES, TAKES, DROPS = range(3)
Integers = np.ndarray[Any, np.dtype[np.int64]]


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of the words, signs and single digits that any text of these tasks has."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    texts = [*rules.REPEATED, *rules.WHO, *rules.DOES, *rules.WHAT, *rules.WHEN, *rules.KINDS, *rules.MOVE]
    texts += [*rules.TAKE, *rules.DROP, "0123456789", "What is Where was Remember it before mentioned provided text"]
    texts += ["The pass key is: special magic number numbers for One of in the and back again."]
    texts += [
        word for lists in (rules.PERSONS, rules.PLACES, rules.OBJECTS, rules.THINGS) for each in lists for word in each
    ]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text + " . ?")})
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = splitter
    between = decoders.Replace(Regex(r"(?<=\d) (?=\d)| (?=[.:?])"), "")  # spaces that a text does not have
    parts = [decoders.Replace(Regex("^"), " "), decoders.Fuse(), between, decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def encode(text: str) -> list[int]:
    """Returns the ids of a text, all of which must be known."""
    tokenizer = make_tokenizer()
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"the words of a text must be known (got {text!r}); add them to `make_tokenizer`.")
    return ids


def table(texts: Sequence[str]) -> Integers:
    """Returns the ids (n, L) of texts, with −1 after the end of each."""
    return np.array(list(itertools.zip_longest(*map(encode, texts), fillvalue=-1)), dtype=np.int64).T.copy()


def joined(ids: Integers) -> tuple[Integers, Integers]:
    """Returns ids (R, C) without what is −1 between them, which comes to stand behind them, and their counts (R,)."""
    order = np.argsort(ids < 0, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), (ids >= 0).sum(1)


class Filler:
    """Gives filler that ends with a sentence, from a stream that is made anew whenever it was given out twice over.

    Args:
        repeats: whether the same few sentences are repeated; else they are varied.
        size: the number of tokens of the stream.
    """

    def __init__(self, repeats: bool, size: int, random: np.random.Generator):
        self.repeats, self.size, self.random = repeats, size, random
        texts = rules.REPEATED
        if not repeats:
            parts = itertools.product(rules.WHO, rules.DOES, rules.WHAT, rules.WHEN)
            texts = [f" {' '.join(words)}." for words in parts]
        self.sentences = table(texts)
        self.renew()

    def renew(self) -> None:
        """Makes another stream."""
        counts = (self.sentences >= 0).sum(1)
        number = 1 + int(self.size / counts.mean() * 1.02)
        order = np.arange(number) % len(counts)
        if not self.repeats:
            order = self.random.integers(len(counts), size=number)
        found = self.sentences.astype(np.int16)[order].ravel()
        self.stream, self.ends, self.given = found[found >= 0], counts[order].cumsum(), 0

    def before(self, ends: int, length: int) -> np.ndarray[Any, np.dtype[np.int16]]:
        """Returns the ids (ends, length) before random ends of sentences."""
        if self.given > 2 * self.size and not self.repeats:
            self.renew()
        self.given += ends * length
        first = int(np.searchsorted(self.ends, length))
        if first >= len(self.ends):
            raise ValueError(f"`size` of a stream of filler must be above {length} tokens (got {self.size}).")
        chosen = self.ends[self.random.integers(first, len(self.ends), size=ends)]
        return self.stream[chosen[:, None] - length + np.arange(length)]

    def some(self, shape: tuple[int, ...]) -> Integers:
        """Returns single sentences, (*shape, L)."""
        return self.sentences[self.random.integers(len(self.sentences), size=shape)]


@dataclass
class Told:
    """Holds passages and questions of many texts."""

    passage: Integers  # (R, C) ids, and −1 anywhere between them
    questions: Integers  # (R, L) ids of questions with their answers
    sizes: Sequence[int]  # the number of tokens of each question with its answer
    answer: int  # the number of tokens of an answer
    counts: np.ndarray[Any, np.dtype[np.bool_]]  # (R, Q) which questions can be asked and come for the first time


@cache
def number_tables(task: str) -> tuple[Integers, Integers]:
    """Returns the ids of all passages and of all questions that tell and ask a number of zeros."""
    if task == "passkey":
        told, asked = (
            " The pass key is {0}. Remember it. {0} is the pass key.",
            " What is the pass key? The pass key is {0}",
        )
        names = [""]
    else:
        subject = "special magic number for {1} mentioned in the provided text"
        told = " One of the special magic numbers for {1} is: {0}."
        asked = f" What is the {subject}? The {subject} is {{0}}"
        names = [f"{kind} {thing}" for kind in rules.KINDS for thing in THINGS]
    zeros = "0" * DIGITS[task]
    passages, questions = (table([text.format(zeros, name) for name in names]) for text in (told, asked))
    return passages, questions


def tell_number(task: str, rows: int, random: np.random.Generator) -> Told:
    """Tells a number, of a pass key or of a needle."""
    size, digits = DIGITS[task], np.array([encode(digit)[0] for digit in "0123456789"])
    number = random.integers(10, size=(rows, size))
    number[:, 0] = random.integers(1, 10, size=rows)
    passage, asked = number_tables(task)
    which = random.integers(len(passage), size=rows)
    passage, asked = passage[which], asked[which]
    for ids in (passage, asked):
        zeros = ids == digits[0]
        ids[zeros] = np.tile(digits[number], zeros[0].sum() // size).ravel()
    return Told(passage, asked, [asked.shape[1]], size, np.ones((rows, 1), dtype=bool))


@dataclass
class Worlds:
    """What was told in many worlds, (R, n) each, and how they are at last, by the rules of `recall_tasks.World`."""

    kind: Integers
    person: Integers
    thing: Integers  # a place, where a person moves
    place: Integers  # (R, persons), −1 before a person has moved
    where: Integers  # (R, objects) the last place of each object's trace, −1 if it has none
    before: Integers  # (R, objects) the place before that, −1 if there is none
    visits: Integers  # (R, objects, places) how often a place is in a trace


def live(rows: int, sentences: int, handles: bool, random: np.random.Generator, again: bool = True) -> Worlds:
    """Lets as many worlds live until so many sentences are told in each, of each person once if not `again`."""
    turns = random.random((rows, len(PERSONS))).argsort(1)
    row, told = np.arange(rows), np.zeros(rows, dtype=np.int64)
    kind, person, thing = (np.zeros((rows, sentences + 1), dtype=np.int64) for _ in range(3))
    place = np.full((rows, len(PERSONS)), -1)
    holder, where, before = (np.full((rows, len(OBJECTS)), -1) for _ in range(3))
    visits = np.zeros((rows, len(OBJECTS), len(PLACES)), dtype=np.int64)
    while (told < sentences).any():
        goes_on = told < sentences
        handled = goes_on & handles & (random.random(rows) < STEP)
        moved = goes_on & ~handled
        who = random.integers(len(PERSONS), size=rows) if again else turns[row, told % len(PERSONS)]
        at = place[row, who]
        to = (at + 1 + random.integers(len(PLACES) - 1, size=rows)) % len(PLACES)
        to = np.where(at < 0, random.integers(len(PLACES), size=rows), to)
        what = random.integers(len(OBJECTS), size=rows)
        held_by, lies = holder[row, what], where[row, what]
        near = (place >= 0) & ((lies < 0)[:, None] | (place == lies[:, None]))
        taker = np.where(near, random.random(near.shape), -1).argmax(1)
        drops, takes = handled & (held_by >= 0), handled & (held_by < 0) & near.any(1)

        carried = moved[:, None] & (holder == who[:, None])
        before = np.where(carried, where, before)
        where = np.where(carried, to[:, None], where)
        np.add.at(visits, (*carried.nonzero(), to[carried.nonzero()[0]]), 1)
        place[row[moved], who[moved]] = to[moved]
        holder[row[drops], what[drops]] = -1
        holder[row[takes], what[takes]] = taker[takes]
        first = takes & (lies < 0)
        where[row[first], what[first]] = place[row[first], taker[first]]
        visits[row[first], what[first], place[row[first], taker[first]]] += 1

        kind[row, told] = np.select([moved, takes], [MOVES, TAKES], DROPS)
        person[row, told] = np.select([moved, takes], [who, taker], held_by)
        thing[row, told] = np.where(moved, to, what)
        told += moved | takes | drops
    kind, person, thing = (each[:, :sentences] for each in (kind, person, thing))
    return Worlds(kind, person, thing, place, where, before, visits)


@cache
def story_tables() -> tuple[Integers, list[int]]:
    """Returns the ids of all sentences of stories, and where those of each kind begin: by person, thing, verb."""
    kinds = ((PLACES, rules.MOVE), (OBJECTS, rules.TAKE), (OBJECTS, rules.DROP))
    texts, begins = [], []
    for things, verbs in kinds:
        begins.append(len(texts))
        texts += [f" {who} {verb} the {what}." for who in PERSONS for what in things for verb in verbs]
    return table(texts), begins


@cache
def question_table(task: str) -> Integers:
    """Returns the ids of all questions of a task without their answers, by person or by object, and in qa3 by place."""
    if task == "qa1":
        return table([f" Where is {person}? {person} is in the" for person in PERSONS])
    if task == "qa2":
        return table([f" Where is the {thing}? The {thing} is in the" for thing in OBJECTS])
    return table(
        [f" Where was the {thing} before the {place}? The {thing} was in the" for thing in OBJECTS for place in PLACES]
    )


def askable(task: str, worlds: Worlds) -> tuple[Integers, Integers]:
    """Returns what can be asked of worlds: rows of `question_table` (R, n), and the places (R, n) or −1."""
    if task == "qa1":
        answer = worlds.place
    elif task == "qa2":
        answer = worlds.where
    else:
        last = np.maximum(worlds.where, 0)
        once = np.take_along_axis(worlds.visits, last[..., None], axis=2)[..., 0] == 1
        answer = np.where(once & (worlds.where >= 0), worlds.before, -1)
        return len(PLACES) * np.arange(len(OBJECTS)) + last, answer
    return np.broadcast_to(np.arange(answer.shape[1]), answer.shape), answer


def tell_story(
    asked: Sequence[str], rows: int, random: np.random.Generator, filler: Filler, sentences: int, gaps: Sequence[int],
    handles: bool, again: bool,
) -> Told:  # fmt: skip
    """Tells stories of so many sentences, and asks questions of these tasks, of which all can be asked of each story.

    Where a task has fewer questions than are asked of it, the last ones do not count.
    """
    found: list[tuple[Integers, ...]] = []
    while sum(len(each[0]) for each in found) < rows:
        worlds = live(2 * rows, sentences, handles, random, again)
        some = np.ones(2 * rows, dtype=bool)
        columns: dict[str, list[tuple[Integers, Integers]]] = {}
        for task in sorted(set(asked)):
            question, answer = askable(task, worlds)
            some &= (answer >= 0).any(1)
            order = np.where(answer >= 0, random.random(answer.shape), 2.0).argsort(1)[:, : asked.count(task)]
            is_asked = np.take_along_axis(answer >= 0, order, axis=1)
            order = np.where(is_asked, order, order[:, :1])
            question, answer = (np.take_along_axis(each, order, axis=1) for each in (question, answer))
            columns[task] = list(zip(question.T, np.where(is_asked, answer, -1 - answer).T, strict=True))
        chosen = [columns[task].pop(0) for task in asked]
        question, answer = (np.stack(each, axis=1) for each in zip(*chosen, strict=True))
        found.append(tuple(each[some] for each in (worlds.kind, worlds.person, worlds.thing, question, answer)))
    kind, person, thing, question, answer = (np.concatenate(each)[:rows] for each in zip(*found, strict=True))

    texts, begins = story_tables()
    things = np.array([len(PLACES), len(OBJECTS), len(OBJECTS)])[kind]
    verbs = np.array([len(rules.MOVE), len(rules.TAKE), len(rules.DROP)])[kind]
    index = np.array(begins)[kind] + (person * things + thing) * verbs + random.integers(verbs)
    told = texts[index]
    between = filler.some((rows, sentences, max(gaps)))
    gap = random.choice(gaps, size=(rows, sentences))
    gap[:, 0] = 0  # nothing stands before the first sentence
    between[np.arange(max(gaps)) >= gap[..., None]] = -1
    passage = np.concatenate((between.reshape(rows, sentences, -1), told), axis=2).reshape(rows, -1)

    counts, places = answer >= 0, np.array([encode(place)[0] for place in PLACES])
    answer = places[np.where(counts, answer, -1 - answer)]
    questions: list[Integers] = []
    for index, task in enumerate(asked):
        questions += [question_table(task)[question[:, index]], answer[:, index, None]]
    sizes = [questions[2 * index].shape[1] + 1 for index in range(len(asked))]
    return Told(passage, np.concatenate(questions, axis=1), sizes, 1, counts)


@dataclass
class Texts:
    """Holds texts, in all of which questions stand in the same columns."""

    ids: torch.Tensor  # (R, T) as 16-bit integers
    asked: torch.Tensor  # (n,) the columns of answers
    question: torch.Tensor  # (n,) the question to which each of them belongs
    counts: torch.Tensor  # (R, Q) which questions count


class Stories:
    """Makes texts of a task.

    Args:
        task: one of `SENTENCES`.
        seed: of all that is random.
        size: the number of tokens of the stream from which filler is taken.
    """

    def __init__(self, task: str, seed: int, size: int = STREAM):
        if task not in SENTENCES:
            raise ValueError(f"`task` must be one of {', '.join(SENTENCES)} (got {task!r}); choose one.")
        self.task, self.random = task, np.random.default_rng(seed)
        self.filler = Filler(task in DIGITS, size, self.random)

    def tell(self, rows: int, sentences: int, gaps: Sequence[int], asked: Sequence[str], again: bool) -> Told:
        """Returns passages and questions."""
        if self.task in DIGITS:
            return tell_number(self.task, rows, self.random)
        return tell_story(asked, rows, self.random, self.filler, sentences, gaps, self.task != "qa1", again)

    def make(
        self, rows: int, length: int, depths: np.ndarray[Any, Any] | None = None, sentences: int | None = None,
        gaps: Sequence[int] = (0, 0, 1, 2), asked: Sequence[str] = (),
        again: bool = True,
    ) -> Texts:  # fmt: skip
        """Makes texts of so many tokens.

        Args:
            depths: of each text, the share of its filler that stands before the passage; random if left out.
            sentences: of a story, as many as the task has if left out.
            gaps: numbers of sentences of filler between two of a story, one of which is drawn.
            asked: the tasks of the questions to a story; one question of the own task if left out.
            again: whether what is told of a person may be followed by more.
        """
        told = self.tell(rows, sentences or SENTENCES[self.task], gaps, asked or [self.task], again)
        passage, sizes = joined(told.passage)
        tail = told.questions.shape[1]
        room = length - tail - sizes
        if (room < 0).any():
            raise ValueError(f"texts must have room for {tail + sizes.max()} tokens (got {length}); give a `length`.")
        depths = self.random.random(rows) if depths is None else depths
        before = np.floor(depths * (room + 1)).astype(np.int64).clip(0, room)
        ids = np.empty((rows, length), dtype=np.int16)
        ids[:, : length - tail] = self.filler.before(rows, length - tail)  # it ends where questions begin
        if most := int(before.max()):
            first = self.filler.before(rows, most)
            for row, count in enumerate(before):
                ids[row, :count] = first[row, most - count :]  # it ends where the passage begins
        rows_of, columns = (np.arange(passage.shape[1]) < sizes[:, None]).nonzero()
        ids[rows_of, before[rows_of] + columns] = passage[rows_of, columns]
        ids[:, length - tail :] = told.questions
        ends = length - tail + np.cumsum(told.sizes)
        answers = (ends[:, None] - told.answer + np.arange(told.answer)).ravel()
        of = np.arange(len(ends)).repeat(told.answer)
        return Texts(*map(torch.from_numpy, (ids, answers, of, told.counts)))
