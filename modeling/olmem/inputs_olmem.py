# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Numbers the tokens that a forward call is given, finds padding and packed documents, and refuses malformed inputs.

Shapes: B batch, T tokens; R is B, or 1 where one row stands for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from .compat_olmem import known, surely
from .counters_olmem import Counters
from .sequences_olmem import Span

Document = tuple[int, int]  # first column, and the one after the last


@dataclass
class Tokens:
    """Holds the numbers of the new tokens of a forward call.

    The numbers of a row's real tokens go on from those of earlier calls. Those of a packed document begin at 0.
    """

    numbers: torch.Tensor  # (R, T) the number of each token; −1 is padding
    padded: bool = False  # whether some numbers may be −1
    documents: list[list[Document]] | None = None  # the documents of each row, where documents are packed
    position_ids: torch.Tensor | None = None  # (R, T) the caller's positions, in a call without a cache
    spans: list[Span] | None = None  # where the tokens of several rows are listed as one row, without padding


class Embeddings:
    """Gives the embeddings (B, T, hidden_size) of the tokens of a forward call, some columns at a time.

    Args:
        given: the embeddings, or ids (B, T) that are embedded when they are asked for.
        table: embeds ids; None where the embeddings are given.

    Attributes:
        shape: the numbers of rows and of columns.
        device: where the embeddings are.
        dtype: of the embeddings.
    """

    def __init__(self, given: torch.Tensor, table: nn.Embedding | None = None):
        self.given, self.table = given, table
        self.shape = tuple(given.shape if table is not None else given.shape[:-1])
        self.device = given.device
        self.dtype = given.dtype if table is None else table.weight.dtype

    def some(self, columns: slice | torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of some columns, which are other ones in each row if they are a tensor (B, T)."""
        found = self.given
        if isinstance(columns, torch.Tensor):
            shape = *columns.shape, *found.shape[2:]
            found = found.gather(1, columns.view(*columns.shape, *[1] * (found.dim() - 2)).expand(shape))
        else:
            found = found[:, columns]
        return found if self.table is None else self.table(found)

    def packed(self, packing: "Packing") -> "Embeddings":
        """Returns what gives the embeddings of tokens that are listed as one row."""
        return Embeddings(packing.pack(self.given), self.table)


class Packing:
    """Lists the tokens of a batch as one row without padding, and gives what was computed of them back to their rows.

    Args:
        tokens: the tokens of the batch.
        shape: the numbers B of rows and T of columns.
        seen: the real tokens that each row has read before, if the call goes on from a cache.
        keep: the number of last columns whose hidden states are wanted; 0 for all.
    """

    def __init__(self, tokens: Tokens, shape: tuple[int, ...], seen: Sequence[int] | None, keep: int):
        batch, length = shape
        numbers = tokens.numbers.expand(batch, -1)
        self.indices: torch.Tensor | None = None  # (N,) of the tokens among B · T, or None for all
        self.gaps = torch.zeros((), dtype=torch.bool, device=numbers.device)  # () whether padding follows a token
        counts = [length] * batch
        if tokens.padded:
            real = numbers >= 0
            self.indices, counts = real.flatten().nonzero()[:, 0], real.sum(-1).tolist()
            after = torch.tensor([bool(each) for each in seen or [0] * batch], device=real.device)[:, None]
            self.gaps = (~real & ((real.cumsum(-1) > 0) | after)).any()
        self.length = sum(counts)
        self.shape, self.first_kept = (batch, length), max(length - keep, 0) if keep else 0
        positions = tokens.position_ids
        if positions is not None:
            positions = self.pack(positions.expand(batch, -1))
        spans, documents = None, None
        if seen is None:
            stops = [*accumulate(counts, initial=0)]
            documents = [[document for document in pairwise(stops) if document[0] < document[1]]]
        else:
            spans = [Span(row, first, count) for row, (first, count) in enumerate(zip(seen, counts, strict=True))]
        self.tokens = Tokens(self.pack(numbers), False, documents, positions, spans)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Returns states (B, T, …) of tokens as one row (1, N, …)."""
        listed = states.flatten(0, 1)
        return (listed if self.indices is None else listed[self.indices])[None]

    def kept(self) -> list[int] | None:
        """Returns the columns of N whose hidden states are wanted, or None for all."""
        if not self.first_kept:
            return None
        (batch, length), first = self.shape, self.first_kept
        if self.indices is None:
            return [row * length + column for row in range(batch) for column in range(first, length)]
        return (self.indices % length >= first).nonzero()[:, 0].tolist()

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Returns hidden states (1, N, hidden_size) of those columns in their rows; padding has zeros."""
        (batch, length), first = self.shape, self.first_kept
        if self.indices is None:
            return states.view(batch, length - first, states.shape[-1])
        row, column = self.indices // length, self.indices % length
        if first:
            is_kept = column >= first
            row, column = row[is_kept], column[is_kept]
        whole = states.new_zeros(batch * (length - first), states.shape[-1])
        return whole.index_copy(0, row * (length - first) + column - first, states[0]).view(batch, length - first, -1)


def refuse_malformed(shape: tuple[int, ...], attention_mask: object, position_ids: object) -> None:
    """Raises an error for inputs whose types or shapes are not those of rows of tokens.

    Args:
        shape: that of the input ids.
        attention_mask: None, a tensor of two or four dimensions, or another object for an attention function.
        position_ids: None or integers (B or 1, T).
    """
    if len(shape) != 2 or not shape[0]:
        raise ValueError(
            f"`input_ids` must be (B, T) with at least one row (got {shape}); pass one row as `ids[None]`."
        )
    if isinstance(attention_mask, list | tuple | str | int | float):
        kind = type(attention_mask).__name__
        raise ValueError(f"`attention_mask` must be a tensor (B, T) (got a {kind}); pass `torch.tensor(...)`.")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"`attention_mask` must be (B, T), zeros for padding, or (B, 1, T, S) (got {tuple(attention_mask.shape)}); "
            "give a column for each token."
        )
    if position_ids is None:
        return
    if not isinstance(position_ids, torch.Tensor) or position_ids.dtype not in (torch.int32, torch.int64):
        kind = getattr(position_ids, "dtype", type(position_ids).__name__)
        raise ValueError(f"`position_ids` must be a tensor of integers (got {kind}); pass `position_ids.long()`.")
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] != shape[1]:
        raise ValueError(
            f"`position_ids` must be (1 or {shape[0]}, {shape[1]}) (got {tuple(position_ids.shape)}); give one for "
            "each token."
        )


def refuse_malformed_ids(input_ids: object, device: torch.device, any_device: bool) -> None:
    """Raises an error for ids that are no tensor of integers, or not on `device`, unless any device will do."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise ValueError(f"`input_ids` must be a tensor of integers (got {kind}); pass `input_ids.long()`.")
    if input_ids.device != device and not any_device:
        raise ValueError(
            f"`input_ids` must be on the model's device, {device} (got {input_ids.device}); pass "
            "`input_ids.to(model.device)`."
        )


def refuse_malformed_embeddings(inputs_embeds: torch.Tensor, hidden_size: int) -> None:
    """Raises an error for embeddings that are no tensor of floats (B, T, hidden_size)."""
    if not isinstance(inputs_embeds, torch.Tensor):
        kind = type(inputs_embeds).__name__
        raise ValueError(f"`inputs_embeds` must be a tensor of floats (got a {kind}); pass `torch.tensor(...)`.")
    if inputs_embeds.shape[-1] != hidden_size or not inputs_embeds.is_floating_point():
        raise ValueError(
            f"`inputs_embeds` must be floats (B, T, `hidden_size` = {hidden_size}) (got {inputs_embeds.dtype} "
            f"{tuple(inputs_embeds.shape)}); pass ids as `input_ids`."
        )


def number_tokens(
    embeddings: Embeddings | torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    counters: Counters | None,
    has_memory: bool,
    has_prefix: bool,
) -> Tokens:
    """Numbers the tokens of embeddings (B, T, hidden_size).

    Args:
        attention_mask: (B, S) with S at least T. Zeros are padding, which may stand anywhere.
        position_ids: (B or 1, T). Without a cache, each document of a row may begin at 0. At a step with a cache they
            are not read, because the host would have to wait for them.
        counters: the counters of the `OlmemCache` that the call goes on from, or None.
        has_memory: whether the model has memory tokens or retrieval.
        has_prefix: whether the model has sinks or memory tokens.

    Raises:
        ValueError: if mask and positions do not say which tokens there are.
    """
    batch, length = embeddings.shape[:2]
    if not length:
        raise ValueError("`input_ids` must hold at least one token (got none); do not call the model without tokens.")
    device = embeddings.device
    column = torch.arange(length, device=device)[None]
    mask = read_mask(attention_mask, batch, length, device)
    position_ids = None if position_ids is None else position_ids.to(device)
    if counters is None:
        documents = None
        if position_ids is not None and (attention_mask is None or (mask is None and has_memory)):
            documents = find_documents(position_ids.expand(batch, -1))
        elif position_ids is not None and has_memory and mask is not None and length > 1:
            refuse_packed_padding(position_ids, mask)
        if documents is not None:
            starts = torch.tensor(
                [[start for start, stop in row for _ in range(start, stop)] for row in documents], device=device
            )
            return Tokens(column - starts, False, documents)
    numbers = column if mask is None else mask.cumsum(-1) - 1
    if counters is not None:
        numbers = numbers + counters.seen[:, None]
    if mask is not None:
        numbers = torch.where(mask, numbers, -1)
    if position_ids is not None and length > 1 and (counters is not None or has_prefix):
        refuse_other_positions(position_ids, numbers, has_cache=counters is not None)
    return Tokens(numbers, mask is not None, position_ids=position_ids if counters is None else None)


def read_mask(
    attention_mask: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> torch.Tensor | None:
    """Returns which of the new columns are real tokens, (B, T), or None if all are.

    While a graph is recorded the mask is returned even if all of them are real, because no value may be read then.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` must cover the input's {batch} rows of {length} tokens, and may cover earlier tokens "
            f"(got {tuple(attention_mask.shape)}); give a column for each token."
        )
    mask = attention_mask[:, -length:].to(device)
    if mask.is_floating_point() and not known(((mask == 0) | (mask == 1)).all(), True):
        raise ValueError(
            "`attention_mask` must be made of ones, and zeros for padding (got other numbers); pass `mask == 0` if "
            "it is a mask that is added to scores."
        )
    mask = mask != 0
    return None if surely(mask.all()) else mask


def refuse_packed_padding(position_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises an error for positions (R, T) that begin anew in a padded row, whose documents cannot be found."""
    follow = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if not known((follow | ~mask[:, 1:] | ~mask[:, :-1]).all(), True):
        raise ValueError(
            "`position_ids` must count a row's tokens one by one with a padded `attention_mask` (got others); pass "
            "packed documents without padding and without a mask."
        )


def refuse_other_positions(position_ids: torch.Tensor, numbers: torch.Tensor, has_cache: bool) -> None:
    """Raises an error for positions (R, T) that do not count a row's tokens (B, T) one by one."""
    shift, real = position_ids - numbers, numbers >= 0
    whole = torch.iinfo(shift.dtype)
    one = shift.where(real, whole.min).amax(-1) <= shift.where(real, whole.max).amin(-1)
    if not known(one.all(), True):
        reason, remedy = "sinks or memory tokens, which have slots of their own", "leave the positions out."
        if has_cache:
            reason = "an OlmemCache"
            remedy = "pass use_cache=False for packed documents or positions of your own."
        raise ValueError(f"`position_ids` must count a row's tokens one by one with {reason} (got others); {remedy}")


def find_documents(position_ids: torch.Tensor) -> list[list[Document]] | None:
    """Finds packed documents, each of which begins where the positions (B, T) do not go on by one.

    Returns (start, stop) of each document of each row, or None if no row holds more than one.
    """
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not known(starts.any(), False):
        return None
    documents = []
    for row in starts:
        cuts = [0, *(row.nonzero()[:, 0] + 1).tolist(), position_ids.shape[1]]
        documents.append(list(pairwise(cuts)))
    return documents


__all__ = [
    "Embeddings",
    "Packing",
    "Tokens",
    "find_documents",
    "number_tokens",
    "read_mask",
    "refuse_malformed",
    "refuse_malformed_embeddings",
    "refuse_malformed_ids",
]
