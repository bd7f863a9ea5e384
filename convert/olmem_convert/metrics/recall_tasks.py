"""Texts that tell something, and questions about it, made from code alone: passkey, needles, pairs, bAbI's stories.

A passage tells what is asked for. `position` tokens of filler stand before it and `distance` tokens after it, to the
token. The same seed makes the same text. Names and places of evaluation are held out: `held_out=False`, for training,
has others. Pieces are tokenized one by one, so that no token lies across their borders.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Of each pair of lists the first is for training, the second held out. Persons, places and objects for training are
# those of bAbI.
PERSONS = ("Mary", "John", "Daniel", "Sandra"), ("Greta", "Omar", "Lucia", "Felix")
PLACES = (
    ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"),
    ("attic", "balcony", "cellar", "garage", "library", "studio"),
)
OBJECTS = ("apple", "football", "milk"), ("kettle", "lantern", "violin")
THINGS = (
    ("anchor", "barrel", "candle", "drum", "feather", "hammer", "ladder", "mirror", "pillow", "ribbon", "wheel"),
    ("basket", "compass", "flute", "goblet", "helmet", "kite", "marble", "rope", "saddle", "trumpet", "vase"),
)
KINDS = ("amber", "blue", "copper", "dusty", "empty", "golden", "heavy", "ivory", "plain", "round", "silver", "tiny")

REPEATED = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
WHO = ("The farmer", "A neighbour", "The old teacher", "My sister", "The captain", "One of the guests", "A stranger")
DOES = ("talked about", "remembered", "wrote down", "forgot", "wondered about", "laughed at", "complained about")
WHAT = ("the weather", "a long winter", "the price of bread", "an old song", "the next train", "a letter", "the news")
WHEN = ("after lunch", "in the evening", "without a reason", "for an hour", "once more", "before the rain", "all week")

MOVE = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKE = ("took", "got", "grabbed", "picked up")
DROP = ("dropped", "left", "discarded", "put down")

Sentences = Iterator[str]


@dataclass(frozen=True)
class Story:
    """What a passage tells, sentence by sentence, questions with their answers, and filler to go around it."""

    passage: Sequence[str]
    questions: Sequence[tuple[str, str]]
    filler: Sentences
    gaps: tuple[int, ...] = (0,)  # numbers of sentences of filler between two of the passage, one of which is drawn


@dataclass(frozen=True)
class Example:
    """A text's token ids, and of each question its ids, its answer's ids, and the answer."""

    context: list[int]
    questions: list[tuple[list[int], list[int], str]]


def make_example(
    task: str, tokenizer: Any, distance: int, position: int, seed: int = 0, number: int = 0, held_out: bool = True
) -> Example:
    """Returns a text of the task with its passage at this position and at this distance, in tokens, from its end. A
    seed has texts of any number."""
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)} (got {task!r}); choose one.")
    for name, value in (("distance", distance), ("position", position)):
        if value < 0:
            raise ValueError(f"`{name}` must be at least 0 (got {value}); give a number of tokens.")
    rng = random.Random(f"{task} {distance} {position} {seed} {number} {held_out}")
    story = TASKS[task](rng, int(held_out))

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def filler(count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count:
            ids += ids_of(next(story.filler))
        return ids[len(ids) - count :]

    bos = tokenizer.bos_token_id
    context = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
    context += filler(position)
    for index, sentence in enumerate(story.passage):
        for _ in range(rng.choice(story.gaps) if index else 0):
            context += ids_of(next(story.filler))
        context += ids_of(sentence)
    context += filler(distance)
    questions = []
    for question, answer in story.questions:
        asked, whole = ids_of(question), ids_of(question + answer)
        is_prefix = whole[: len(asked)] == asked
        questions.append((asked, whole[len(asked) :] if is_prefix else ids_of(answer), answer.strip()))
    return Example(context, questions)


# Filler


def repeated() -> Sentences:
    """Yields the same few sentences over and over."""
    while True:
        yield from REPEATED


def varied(rng: random.Random) -> Sentences:
    """Yields sentences that have no person, place, object or number of any passage in them."""
    while True:
        yield f" {rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(WHAT)} {rng.choice(WHEN)}."


# Needles and pairs


def digits(rng: random.Random, count: int) -> str:
    """Returns a number of so many digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def passkey(rng: random.Random, held_out: int) -> Story:
    """Mohtashami and Jaggi's pass key, without their instruction at the top, so that a position is a position."""
    key = digits(rng, 5)
    told = f" The pass key is {key}. Remember it. {key} is the pass key."
    return Story([told], [(" What is the pass key? The pass key is", f" {key}")], repeated())


def needle(rng: random.Random, held_out: int, filler: Sentences) -> Story:
    """RULER's single needle of a word and a number of seven digits."""
    word, number = f"{rng.choice(KINDS)} {rng.choice(THINGS[held_out])}", digits(rng, 7)
    subject = f"special magic number for {word} mentioned in the provided text"
    told = f" One of the special magic numbers for {word} is: {number}."
    return Story([told], [(f" What is the {subject}? The {subject} is", f" {number}")], filler)


def niah_single_1(rng: random.Random, held_out: int) -> Story:
    """RULER's S-NIAH-1: a needle in sentences that repeat."""
    return needle(rng, held_out, repeated())


def niah_single_2(rng: random.Random, held_out: int) -> Story:
    """S-NIAH-2: a needle in running text, which here is made of templates in place of essays."""
    return needle(rng, held_out, varied(rng))


def mqar(rng: random.Random, held_out: int) -> Story:
    """Pairs of keys and values, some told anew with another value, four asked for, among pairs that are not."""
    keys = [f"{kind} {thing}" for kind in KINDS for thing in THINGS[held_out]]
    rng.shuffle(keys)
    told, others = keys[:8], keys[8:]
    pairs = [(key, digits(rng, 4)) for key in told]
    pairs += [(key, digits(rng, 4)) for key in rng.sample(told, 4)]
    rng.shuffle(pairs)
    last = dict(pairs)

    def filler() -> Sentences:
        for sentence in varied(rng):
            yield tell(rng.choice(others), digits(rng, 4)) if rng.random() < 0.25 else sentence

    def tell(key: str, value: str) -> str:
        return f" The code of the {key} is {value}."

    questions = [(f" What is the code now? The code of the {key} is", f" {last[key]}") for key in rng.sample(told, 4)]
    return Story([tell(*pair) for pair in pairs], questions, filler())


# bAbI's first three tasks, by its rules


class World:
    """Persons who go from place to place, take things and put them down, as told in sentences."""

    def __init__(self, rng: random.Random, held_out: int):
        self.rng = rng
        self.persons, self.places, self.objects = PERSONS[held_out], PLACES[held_out], OBJECTS[held_out]
        self.place: dict[str, str] = {}  # of a person who has moved
        self.holder: dict[str, str] = {}  # of an object that is held
        self.trace: dict[str, list[str]] = {}  # of an object that was taken: where it has been, one after the other
        self.told: list[str] = []

    def move(self) -> None:
        """Lets a person go to another place, with what the person holds."""
        person = self.rng.choice(self.persons)
        place = self.rng.choice([place for place in self.places if place != self.place.get(person)])
        self.place[person] = place
        self.told.append(f" {person} {self.rng.choice(MOVE)} the {place}.")
        for thing in (thing for thing, holder in self.holder.items() if holder == person):
            self.trace[thing].append(place)

    def handle(self) -> None:
        """Lets a person who has moved take a thing that lies there, or put down what the person holds."""
        thing = self.rng.choice(self.objects)
        if thing in self.holder:
            self.told.append(f" {self.holder.pop(thing)} {self.rng.choice(DROP)} the {thing}.")
            return
        near = [each for each, place in self.place.items() if self.trace.get(thing, [place])[-1] == place]
        if near:
            self.holder[thing] = person = self.rng.choice(near)
            self.trace.setdefault(thing, [self.place[person]])
            self.told.append(f" {person} {self.rng.choice(TAKE)} the {thing}.")


def make_story(
    rng: random.Random,
    held_out: int,
    length: int,
    handles: bool,
    ask: Callable[[World], list[tuple[str, str]]],
) -> Story:
    """Returns a story of so many sentences with one of the questions that can be asked of it."""
    while True:
        world = World(rng, held_out)
        while len(world.told) < length:
            if handles and rng.random() < 0.4:
                world.handle()
            else:
                world.move()
        if questions := ask(world):
            return Story(world.told, [rng.choice(questions)], varied(rng), gaps=(0, 0, 1, 2))


def qa1(rng: random.Random, held_out: int) -> Story:
    """One supporting fact: where a person is."""

    def ask(world: World) -> list[tuple[str, str]]:
        return [(f" Where is {person}? {person} is in the", f" {place}") for person, place in world.place.items()]

    return make_story(rng, held_out, 8, False, ask)


def qa2(rng: random.Random, held_out: int) -> Story:
    """Two supporting facts: where a thing is that somebody has taken."""

    def ask(world: World) -> list[tuple[str, str]]:
        return [
            (f" Where is the {thing}? The {thing} is in the", f" {trace[-1]}") for thing, trace in world.trace.items()
        ]

    return make_story(rng, held_out, 12, True, ask)


def qa3(rng: random.Random, held_out: int) -> Story:
    """Three supporting facts: where a thing was before it came to where it is, and has not been before."""

    def ask(world: World) -> list[tuple[str, str]]:
        return [
            (f" Where was the {thing} before the {trace[-1]}? The {thing} was in the", f" {trace[-2]}")
            for thing, trace in world.trace.items()
            if len(trace) > 1 and trace.count(trace[-1]) == 1
        ]

    return make_story(rng, held_out, 20, True, ask)


TASKS: dict[str, Callable[[random.Random, int], Story]] = {
    task.__name__: task for task in (passkey, mqar, niah_single_1, niah_single_2, qa1, qa2, qa3)
}
