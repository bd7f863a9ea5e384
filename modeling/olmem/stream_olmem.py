# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Reads and writes text without end, whose state is an `OlmemCache` and a few ids.

`generate()` takes ids beside a cache for the whole text, which nobody keeps of an endless one. An `OlmemStream` takes
what is new. The last token of each row waits: the model reads it when the next token is written, or with what is read
next. So a stream is its cache, the token that waits, and what the text of the next tokens depends on: the ids of a
character that is not complete, and the messages of a chat. All of it is in its file.

`write` is a generator that `generate()` returns in place of its own loop, so that it needs no thread.

Shapes: B batch, T tokens.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging

from .cache_olmem import OlmemCache
from .generation_olmem import OlmemGenerationMixin
from .reading_olmem import PIECE
from .texts_olmem import DELAY, Message, Row, Texts, as_row

Given = str | torch.Tensor | Sequence[int] | Sequence[Message]  # of one row

PIECES = {"cpu": 1024}  # tokens that are read at once, on a device where `PIECE` would hide how far it is
ENDLESS = 2**60  # tokens that are written if no number is given
# Arguments of `generate()` that a stream gives itself, or has no use for.
NO_ARGUMENTS = {
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "use_cache",
    "cache_implementation",
    "custom_generate",
    "assistant_model",
    "assistant_tokenizer",
    "synced_gpus",
    "streamer",
    "tokenizer",
    "max_length",
    "min_length",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
}


class OlmemStream:
    """Reads and writes one text, or a batch of texts, with a state of bounded size.

    Args:
        model (`OlmemForCausalLM`): The model, whose `stream` method makes this object.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer. Without one a stream reads and writes ids.
        path (`str`, *optional*): A file of `save`, from which the stream goes on.

    Attributes:
        cache (`OlmemCache`): What the model remembers.
        rows: What else the stream knows of each row. There are none before the first `read`.
    """

    def __init__(
        self,
        model: OlmemGenerationMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        path: str | os.PathLike | None = None,
    ):
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            kind = type(tokenizer).__name__
            raise ValueError(
                f"`tokenizer` must be a tokenizer of Transformers, or None for a stream of ids (got a {kind}); load it "
                "by `AutoTokenizer.from_pretrained`, and give a file as `path`."
            )
        self.model, self.texts = model, Texts(tokenizer)
        self.rows: list[Row] = []
        self.is_batch = False  # whether it was given a list, and gives one
        self.calls = 0  # of methods that change the stream
        self.is_reading = False  # also after a reading that was broken off
        self.cache = self.new_cache()
        if path is not None:
            self.cache = OlmemCache.load(path, model.config, device=model.device)
            self.take(self.cache.notes, path)

    def new_cache(self) -> OlmemCache:
        """Returns a cache that has read nothing."""
        cache = self.model.make_cache()
        if not isinstance(cache, OlmemCache):
            used = self.model.config._attn_implementation
            raise ValueError(
                f"`attn_implementation` must be 'sdpa' or 'eager' for a stream, which needs an OlmemCache (got "
                f'{used!r}); call `model.set_attn_implementation("sdpa")`.'
            )
        return cache

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the cache, which stay once all windows are full, unless a layer has full attention."""
        return self.cache.nbytes

    # Reading

    def read(self, new: Given | Sequence[Given | None]) -> None:
        """Reads what is new: a text, ids (T,), or messages of a chat, of any length.

        A batch of streams reads a list of these, one for each row, or ids (B, T); None is for a row that reads nothing.
        Messages are those that have not been read: the tokenizer's chat template renders them as it does behind all
        earlier ones, and what `write` has written is the assistant's turn between them.
        """
        given, is_batch = as_rows(new)
        rows = self.rows or [Row() for _ in given]
        if len(given) != len(rows):
            raise ValueError(
                f"`new` must have one text for each row of the stream, {len(rows)} (got {len(given)}); give None for a "
                "row that reads nothing, or make another stream."
            )
        self.change()
        read: list[torch.Tensor | None] = []
        after: list[dict[str, Any]] = []
        for index, (row, each) in enumerate(zip(rows, given, strict=True)):
            name = f"`new[{index}]`" if is_batch else "`new`"
            ids, changes = (None, {}) if each is None else self.prepare(row, each, name)
            read.append(ids)
            after.append(changes)
        if all(ids is None for ids in read):
            raise ValueError("`new` must have something to read in some row (got None in each); do not call `read`.")
        if not self.rows:
            self.rows, self.is_batch = rows, is_batch
        self.is_reading = True
        self.feed(read)
        for row, changes in zip(self.rows, after, strict=True):
            for name, value in changes.items():
                setattr(row, name, value)
        self.is_reading = False

    def prepare(self, row: Row, given: Given, name: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns the ids (T,) that a row is to read, and what changes in the row then."""
        changes: dict[str, Any] = {}
        if isinstance(given, str):
            if row.ended:
                raise ValueError(
                    f"{name} must not be a text after the row has written its end (got {given[:20]!r}); `reset` the "
                    "row to begin another text, or read a message or ids."
                )
            given = self.texts.tokenize(given, begins=not row.tail)
        elif isinstance(given, list | tuple) and len(given) and isinstance(given[0], Mapping):
            text, messages = self.texts.render_new(row, given, name)
            given = self.texts.tokenize(text, begins=False)
            changes = {"messages": messages, "turn": None}
        ids = as_ids(given, name, self.model.config.vocab_size)
        if not len(ids):
            raise ValueError(f"{name} must have at least one token (got none); leave it out, or give None in a batch.")
        if row.turn is not None and "turn" not in changes:  # what is read within a turn is part of it
            changes["turn"] = [*row.turn, *ids.tolist()]
        return ids, changes

    def feed(self, new: Sequence[torch.Tensor | None]) -> None:
        """Lets the model read ids (T,) of each row, piece by piece, up to the last of them."""
        queues = [
            as_row(row.tail[-1:]) if ids is None else torch.cat((as_row(row.tail[-1:]), ids))
            for row, ids in zip(self.rows, new, strict=True)
        ]
        lengths = [max(len(queue) - 1, 0) for queue in queues]
        width = max(lengths)
        ids = torch.zeros(len(queues), width, dtype=torch.long)
        for row, queue, length in zip(ids, queues, lengths, strict=True):
            row[width - length :] = queue[:length]
        firsts = torch.tensor([width - length for length in lengths])
        size = max(PIECES.get(self.model.device.type, PIECE) // len(queues), 1)
        with logging.tqdm(total=width, desc="Reading", unit=" tokens", unit_scale=True, delay=DELAY) as bar:
            for start in range(0, width, size):
                piece = ids[:, start : start + size]
                stop = start + piece.shape[1]
                is_token = torch.arange(start, stop) >= firsts[:, None]
                self.forward(piece, is_token)
                for row, queue, length, count in zip(
                    self.rows, queues, lengths, is_token.sum(-1).tolist(), strict=True
                ):
                    row.count += count
                    if count:
                        row.wait(int(queue[stop - width + length]))
                bar.update(stop - start)
        for row, ids, queue in zip(self.rows, new, queues, strict=True):
            if ids is not None:
                row.wait(int(queue[-1]))

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the last logits (B, vocab_size) of ids (B, T), of which the mask says where they are tokens."""
        device = self.model.device
        given = None if bool(mask.all()) else mask.to(device)
        outputs = self.model(
            ids.to(device), attention_mask=given, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return outputs.logits[:, -1]

    def refuse_broken(self) -> None:
        """Raises an error if a call was broken off, or the cache was used beside the stream."""
        count = [row.count for row in self.rows]
        seen = self.cache.counters.read_seen() if self.cache.is_initialized else [0] * len(count)
        if self.is_reading or self.cache.half_read or seen != count:
            raise ValueError(
                f"the stream must have read as many tokens as its cache, {seen} (got {count}), but a call was broken "
                "off, or the cache was used without the stream; go on from a file, or `reset()` the stream."
            )

    def change(self) -> int:
        """Returns the number of a call that changes the stream, which is refused where one was broken off."""
        self.refuse_broken()
        self.calls += 1
        return self.calls

    def begin_turns(self) -> None:
        """Reads the beginning of the assistant's turn in rows whose chat goes on with it."""
        begun = [row for row in self.rows if row.messages and row.turn is None]
        prompts = [self.texts.prompt(row.messages) if row in begun else "" for row in self.rows]
        if any(prompts):
            self.is_reading = True
            self.feed([self.texts.tokenize(text, begins=False) if text else None for text in prompts])
        for row in begun:
            row.turn = []
        self.is_reading = False

    # Writing

    def write(self, max_new_tokens: int | None = None, **arguments: Any) -> Iterator[Any]:
        """Yields what the model writes as it comes: pieces of text of whole characters, or ids without a tokenizer.

        A batch yields lists, with a piece for each row, which is empty (an id: None) where a row has no new one.
        What was written is part of the stream, also if its reader leaves the loop. Text ends with `eos_token_id` or
        `stop_strings`, or after `max_new_tokens`; without these it goes on until the loop is left.

        Args:
            max_new_tokens: the most tokens that each row writes.
            arguments: further arguments of `generate()`, for greedy decoding or sampling. Penalties count what this
                call writes, since a stream does not keep its text.
        """
        refused = sorted(NO_ARGUMENTS & arguments.keys())
        if refused:
            raise ValueError(
                f"`{refused[0]}` must not be given to `write` (got {arguments[refused[0]]!r}), because the stream sets "
                "it, or has no use for it; leave it out, and limit a text by `max_new_tokens`."
            )
        call = self.change()
        if not self.rows or not all(row.tail for row in self.rows):
            empty = [index for index, row in enumerate(self.rows) if not row.tail]
            raise ValueError(
                "each row must have read something before it writes (got nothing in "
                f"{f'rows {empty}' if empty else 'any'}); `read` a text first."
            )
        self.begin_turns()
        if all(row.ended for row in self.rows):
            raise ValueError(
                "`write` must not go on after the end of a text, which every row has written; `read` the next message "
                "or ids, or `reset()` the stream to begin another text."
            )
        config = arguments.get("generation_config") or self.model.generation_config
        if max_new_tokens is None:
            max_new_tokens = config.max_new_tokens or ENDLESS
        criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or [])
        strings = arguments.get("stop_strings", config.stop_strings)
        if strings is not None:
            criteria.append(StopStringCriteria(self.texts.needed(), strings))
        ids = torch.tensor([row.tail[-1:] for row in self.rows], device=self.model.device)
        steps: Iterator[list[int | None]] = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            custom_generate=self.steps,
            max_new_tokens=max_new_tokens,
            stopping_criteria=criteria,
            **arguments,
        )
        while (tokens := self.next_of(steps, call)) is not None:
            if self.texts.tokenizer is None:
                yield tokens if self.is_batch else tokens[0]
                continue
            pieces = [
                "" if token is None else self.texts.show(row) for row, token in zip(self.rows, tokens, strict=True)
            ]
            if any(pieces):
                yield pieces if self.is_batch else pieces[0]

    def next_of(self, steps: Iterator[list[int | None]], call: int) -> list[int | None] | None:
        """Returns the tokens of the next step of a call, or None after the last one."""
        if call != self.calls:
            raise ValueError(
                "`write` must be left before the stream reads, writes or is reset again (got a loop that goes on); "
                "call `write` again to go on."
            )
        return next(steps, None)

    def steps(
        self,
        model: OlmemGenerationMixin,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of each row, or None for a row that has ended, as the loop of `generate()` finds them.

        Args:
            input_ids: the tokens (B, 1) that wait.
        """
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or len(input_ids) != len(self.rows):
            raise ValueError(
                f"`write` must be greedy or sample one text a row (got {mode.value}, {len(input_ids)} texts of "
                f"{len(self.rows)} rows), because it yields tokens that it cannot take back; leave beams, assistants "
                "and `num_return_sequences` to `generate()`."
            )
        of_ends = [each for each in stopping_criteria if isinstance(each, EosTokenCriteria)]
        ends = {int(token) for each in of_ends for token in each.eos_token_id.flatten()}
        going = [not row.ended for row in self.rows]
        while any(going):
            logits = self.forward(input_ids[:, -1:], torch.tensor(going)[:, None])
            with torch.no_grad():
                scores = logits_processor(input_ids, logits.to(input_ids.device, torch.float32, copy=True))
                if generation_config.do_sample:
                    chosen = torch.multinomial(scores.softmax(-1), num_samples=1)
                else:
                    chosen = scores.argmax(-1, keepdim=True)
                input_ids = torch.cat((input_ids, chosen), dim=1)
                is_done = stopping_criteria(input_ids, None).tolist()  # pyright: ignore[reportArgumentType]
            tokens = [token if goes else None for token, goes in zip(chosen[:, 0].tolist(), going, strict=True)]
            for row, token in zip(self.rows, tokens, strict=True):
                if token is not None:
                    row.count += 1  # the one that waited
                    row.tail.append(token)
                    if self.texts.tokenizer is None:
                        row.wait(token)
                    if row.turn is not None:
                        row.turn.append(token)
                    row.ended = token in ends
            going = [goes and not done for goes, done in zip(going, is_done, strict=True)]
            yield tokens

    # The state

    def reset(self, rows: int | Sequence[int] | None = None) -> None:
        """Forgets all that these rows have read and written, or all rows, which then begin another text."""
        if rows is None:
            self.calls += 1
            self.rows, self.cache, self.is_reading = [], self.new_cache(), False
            return
        chosen = [rows] if isinstance(rows, int) else list(rows)
        if not all(type(row) is int and 0 <= row < len(self.rows) for row in chosen):
            raise ValueError(
                f"`rows` must be among the {len(self.rows)} of the stream (got {rows!r}); count them from 0."
            )
        self.change()
        self.cache.forget(chosen)
        for row in chosen:
            self.rows[row] = Row()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the stream to a file, from which `model.stream(tokenizer, path)` goes on, in any process."""
        self.refuse_broken()
        if self.cache.fresh:
            raise ValueError(
                "`save` needs a stream whose rows have read two tokens or more, of which the last one waits (got "
                f"{sum(len(row.tail) for row in self.rows)}); `read` a text first."
            )
        self.cache.notes = {"is_batch": self.is_batch, "rows": [asdict(row) for row in self.rows]}
        try:
            self.cache.save(path)
        finally:
            self.cache.notes = None

    def take(self, notes: object, path: str | os.PathLike) -> None:
        """Takes over what a file says of the rows."""
        if notes is None:
            raise ValueError(
                f"`path` must be a file of `OlmemStream.save` (got {path}, of a cache without its stream); load it by "
                "`OlmemCache.load`, or read the text again by a stream."
            )
        facts = notes if isinstance(notes, dict) else {}
        described, seen = facts.get("rows"), self.cache.counters.read_seen()
        described = described if isinstance(described, list) else []
        vocab_size = self.model.config.vocab_size
        rows = [Row.of(fact, count, vocab_size) for fact, count in zip(described, seen, strict=False)]
        found = [row for row in rows if row is not None]
        is_batch = facts.get("is_batch")
        if len(found) != len(seen) or len(described) != len(seen) or not isinstance(is_batch, bool):
            raise ValueError(
                f"`path` must be a whole file of `OlmemStream.save` (got {path}: what it says of its rows is damaged); "
                "save it anew."
            )
        self.rows, self.is_batch, self.cache.notes = found, is_batch, None


def as_rows(new: Any) -> tuple[list[Any], bool]:
    """Returns what each row is to read, and whether it was given for a batch."""
    if isinstance(new, str):
        return [new], False
    if isinstance(new, torch.Tensor):
        return ([new], False) if new.dim() < 2 else (list(new), True)
    if not isinstance(new, list | tuple) or not new:
        kind = "an empty list" if isinstance(new, list | tuple) else f"a {type(new).__name__}"
        raise ValueError(
            f"`new` must be a text, ids or messages, or a list of them, one for each row (got {kind}); put a single "
            "message into a list, and give `tokenizer(text).input_ids` of what a tokenizer returns."
        )
    is_one = isinstance(new[0], int | Mapping)
    return ([new], False) if is_one else (list(new), True)


def as_ids(given: Any, name: str, vocab_size: int) -> torch.Tensor:
    """Returns ids (T,) on the CPU, or raises an error for what cannot be ids of a vocabulary."""
    try:
        ids = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0, 0)
    is_empty = ids.dim() == 1 and not len(ids)
    if ids.dim() != 1 or (not is_empty and ids.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"{name} must be a text, or a list of ids or messages (got {type(given).__name__} of another kind); give "
            "ids of one row as integers."
        )
    if not is_empty and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"{name} must have ids from 0 to {vocab_size - 1} (got {int(ids.min())} to {int(ids.max())}); use the "
            "tokenizer of the model."
        )
    return ids.long()


__all__ = ["OlmemStream"]
