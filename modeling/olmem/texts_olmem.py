# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Turns the texts and chats of a stream into ids, and its ids into text as they come.

Shapes: T tokens.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

Message = Mapping[str, Any]

PART = 2**20  # characters that are tokenized at once
BETWEEN = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")  # two words, where tokenizers split a text into words
DELAY = 2.0  # seconds after which a bar shows
LONGEST = 16  # ids that may wait for a character to be complete; no character has so many bytes


@dataclass
class Row:
    """Holds what a stream knows of one of its rows beside the cache."""

    tail: list[int] = field(default_factory=list)  # the last ids, of which the model has read all but the last
    shown: int = 0  # the ids of `tail` whose text is complete; the others are part of a character
    count: int = 0  # the tokens that the model has read
    ended: bool = False  # whether the last token is one that ends a text, and was written
    messages: list[Message] = field(default_factory=list)  # the chat, without a turn that is open
    turn: list[int] | None = None  # the ids of the assistant's turn, while it is open

    def wait(self, token: int) -> None:
        """Takes a token as the one that waits, with which the text goes on."""
        self.tail, self.shown, self.ended = [token], 1, False

    @classmethod
    def of(cls, fact: object, seen: int, vocab_size: int) -> Self | None:
        """Returns the row that a fact of a file describes, or None if it cannot be one that has read `seen` tokens."""
        if not isinstance(fact, dict) or fact.keys() != cls.__dataclass_fields__.keys():
            return None
        row = cls(**fact)
        lists = isinstance(row.tail, list) and isinstance(row.messages, list) and isinstance(row.turn, list | None)
        if not lists or type(row.ended) is not bool or {type(row.shown), type(row.count)} != {int}:
            return None
        ids = [*row.tail, *(row.turn or [])]
        are_ids = all(type(each) is int and 0 <= each < vocab_size for each in ids)
        is_row = 0 <= row.shown <= len(row.tail) and row.count == seen and bool(row.tail) >= bool(seen)
        return row if are_ids and is_row and all(map(is_message, row.messages)) else None


class Texts:
    """Turns texts and chats into ids, and ids into text, by a tokenizer.

    Args:
        tokenizer: None if there are only ids. All that needs it is an error then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer

    def tokenize(self, text: str, begins: bool) -> torch.Tensor:
        """Returns the ids of a text, with the token before it that the tokenizer gives to a text that begins."""
        tokenizer = self.needed()
        parts = logging.tqdm(cut(text), desc="Tokenizing", unit=" parts", delay=DELAY)
        found = [as_row(list(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)) for part in parts]
        bos = tokenizer.bos_token_id
        if begins and found and bos is not None and tokenizer("").input_ids[:1] == [bos]:
            found.insert(0, as_row([bos]))
        return torch.cat(found) if found else as_row([])

    def needed(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, or raises an error if there is none."""
        if self.tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given to a stream of text (got None); call `model.stream(tokenizer)`."
            )
        return self.tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without tokens that are no text."""
        given = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.needed().decode(list(ids), **given))

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Returns a chat as the template renders it, with the beginning of the assistant's turn as a `prompt`."""
        tokenizer = self.needed()
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "`tokenizer.chat_template` must be set to read messages (got None), which a base model does not have; "
                "read text, or set the template that the model was trained with."
            )
        if not messages:
            return ""
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))  # pyright: ignore

    def render_new(self, row: Row, new: Sequence[Any], name: str) -> tuple[str, list[Message]]:
        """Returns the text that new messages add to a row, and the chat with them."""
        if not all(map(is_message, new)):
            raise ValueError(
                f'{name} must have only messages, each with a `role` (got {new!r}); write {{"role": "user", '
                '"content": …}.'
            )
        before, start = row.messages, ""
        if row.turn is not None:
            written = row.turn[:-1] if row.ended else row.turn
            before = [*before, {"role": "assistant", "content": self.decode(written)}]
            start = self.end_of_turn(row, before)
        rendered, whole = self.render(before), self.render([*before, *new])
        if not whole.startswith(rendered):
            raise other_rendering(rendered, whole)
        text = start + whole[len(rendered) :]
        if not before and row.tail:  # the chat does not begin the text
            text = text.removeprefix(str(self.needed().bos_token or ""))
        return text, [*before, *new]

    def end_of_turn(self, row: Row, messages: Sequence[Message]) -> str:
        """Returns what the template renders behind the content of the last message, and the row has not written."""
        prompt, closed = self.render(messages[:-1], prompt=True), self.render(messages)
        content = messages[-1]["content"]
        for each in (content, content.lstrip(), content.rstrip(), content.strip()):  # as templates have it
            if closed.startswith(prompt + each):
                ended = str(self.needed().decode(row.tail[-1:])) if row.ended else ""
                return closed[len(prompt + each) :].removeprefix(ended)
        raise other_rendering(prompt + content, closed)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Returns the beginning of the assistant's turn behind these messages."""
        rendered, whole = self.render(messages), self.render(messages, prompt=True)
        if not whole.startswith(rendered):
            raise other_rendering(rendered, whole)
        return whole[len(rendered) :]

    def show(self, row: Row) -> str:
        """Returns the text that the last token of a row has made complete, which is empty within a character.

        What text a token is depends on those before it, so it is decoded behind the ids of the last complete text.
        """
        before, text = self.decode(row.tail[: row.shown]), self.decode(row.tail)
        if text.endswith("\ufffd") and not row.ended and len(row.tail) - row.shown < LONGEST:
            return ""
        row.tail = row.tail[row.shown :]
        row.shown = len(row.tail)
        return text[len(before) :]


def as_row(ids: Sequence[Any]) -> torch.Tensor:
    """Returns ids as a tensor (T,)."""
    return torch.tensor(ids, dtype=torch.long)


def is_message(message: object) -> bool:
    """Tells whether an object is a message of a chat."""
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def cut(text: str) -> list[str]:
    """Returns a text in parts that can be tokenized one by one, because each ends with a word before a space."""
    parts, start = [], 0
    while start < len(text):
        found = BETWEEN.search(text, start + PART)
        stop = found.end() if found else len(text)
        parts.append(text[start:stop])
        start = stop
    return parts


def other_rendering(before: str, after: str) -> ValueError:
    """Returns the error for a chat template that renders earlier turns otherwise once another one follows."""
    place = len(os.path.commonprefix((before, after)))
    return ValueError(
        "`tokenizer.chat_template` must render the turns that were read as it did before others follow them (got "
        f"{after[place : place + 40]!r} in the place of {before[place : place + 40]!r}); render the new turn yourself "
        "and `read` it as text, or set a template that leaves earlier turns as they are."
    )


__all__ = ["DELAY", "Message", "Row", "Texts", "as_row"]
