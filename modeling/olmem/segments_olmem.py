# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Cuts a forward call into calls of the layers, and carries memory from segment to segment between them
(Recurrent Memory Transformer, Bulatov et al., arXiv 2207.06881).

Before a segment the model holds M vectors. They enter the layers as read tokens, which see one another. The keys and
values of the read tokens, in every layer, are the memory that the segment's tokens see. After the segment's last token,
M write tokens enter with the same vectors as input. They see what that token sees, and one another. Their last hidden
states, through the norm of memory, are the vectors of the next segment.

A call of the layers holds [read | tokens | write]. Memory is written together with the segment's last token if the next
segment begins in the same forward call. If not, it is written in a call of its own when the next segment begins. Rows
of a batch begin their segments at different columns, so a forward call is cut into pieces with one segment in each row.

Shapes: B batch, T tokens of a call, K key/value heads, D head dim, M memory slots; R is B, or 1 if all rows are equal.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from .cache_olmem import OlmemCache
from .compat_olmem import assert_on_device, known, known_on_host, pieces, refuse_any, sent
from .configuration_olmem import OlmemConfig
from .contracts_olmem import LayerKind, LayerState, Plan
from .finite_olmem import refuse_nonfinite
from .inputs_olmem import Embeddings, Tokens
from .plan_olmem import Call, Earlier, Past
from .sequences_olmem import Span
from .state_olmem import OlmemTape
from .visibility_olmem import Visibility

# The way out that an error offers when memory is not finite.
REMEDY = (
    "load the model in bfloat16 or float32, or look for NaN in its weights and inputs; then `reset()` the cache, or go "
    "on from an earlier copy of it."
)


class OlmemMemory(nn.Module):
    """Holds the parameters of memory: the vectors of a stream's first segment, and the norm of written vectors.

    Args:
        config: the model's configuration.
        norm: a norm over hidden_size features, of the model's `norm_type`.
    """

    def __init__(self, config: OlmemConfig, norm: nn.Module):
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.norm = norm

    def forward(self, written: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the first memory (1, M, hidden_size), or the norm of written hidden states (B, M, hidden_size)."""
        return self.embeddings[None] if written is None else self.norm(written)


@dataclass(frozen=True)
class Piece:
    """Holds those new tokens of a forward call that belong to one segment of each row."""

    numbers: torch.Tensor  # (R, T) the numbers of the tokens; −1 is padding
    columns: slice | torch.Tensor  # the columns of the tokens in the forward call, as a tensor (B, T) if rows differ
    padded: bool  # whether some numbers are −1
    spans: list[Span] | None = None  # the tokens, where those of several rows are listed as one row


def cut_spans(spans: Sequence[Span], part: slice) -> list[Span]:
    """Returns the spans of those tokens that are in a range of their list."""
    found, before = [], 0
    for row, first, count in spans:
        start, stop = max(part.start - before, 0), min(part.stop - before, count)
        if start < stop:
            found.append(Span(row, first + start, stop - start))
        before += count
    return found


def cut_in_segments(numbers: torch.Tensor, padded: bool, phase: int | None, length: int) -> list[Piece]:
    """Cuts new tokens (R, T) into pieces, each of which holds at most one segment of each row.

    Args:
        phase: how many tokens of its segment come before the first token, or None if rows differ.
        length: the number of tokens in a segment.
    """
    columns = numbers.shape[1]
    if phase is not None:
        starts = [0, *range(length - phase, columns, length)]
        parts = [slice(start, stop) for start, stop in pairwise([*starts, columns])]
        return [Piece(numbers[:, part], part, padded) for part in parts]
    real = numbers >= 0
    if columns == 1 or not known(real.any(), True):
        return [Piece(numbers, slice(0, columns), padded)]
    segment = torch.where(real, numbers // length, -1)
    first = segment.where(real, torch.iinfo(segment.dtype).max).amin(-1, keepdim=True)
    column, pieces = torch.arange(columns, device=numbers.device), []
    for index in range(known((segment - first).max(), (columns - 1) // length) + 1):
        mine = segment == first + index
        width = known(mine.sum(-1).max(), min(length, columns))
        order = torch.where(mine, column, columns + column).argsort(dim=-1)[:, :width]
        its_numbers = torch.where(mine, numbers, -1).gather(1, order)
        pieces.append(Piece(its_numbers, order, known((its_numbers < 0).any(), True)))
    return pieces


def find_in_pieces(pieces: Sequence[Piece], columns: int) -> torch.Tensor:
    """Returns the column of each token in the concatenated pieces, (B, columns), and 0 for padding.

    The columns of the pieces must be tensors.
    """
    batch = len(pieces[0].numbers)
    found, before = pieces[0].numbers.new_zeros(batch, columns), 0
    for piece in pieces:
        assert isinstance(piece.columns, torch.Tensor)
        width = piece.numbers.shape[1]
        own = before + torch.arange(width, device=found.device).expand(batch, -1)
        own = found.gather(1, piece.columns).where(piece.numbers < 0, own)
        found = found.scatter(1, piece.columns, own)
        before += width
    return found


@dataclass
class Carried:
    """Holds the keys and values of a call that later calls of the same forward need, where gradients are wanted."""

    numbers: torch.Tensor  # (R, T) the numbers of the call's tokens
    padded: bool  # whether some numbers are −1
    has_sink: bool  # whether some tokens are sinks
    states: list[tuple[torch.Tensor, ...]]  # of each layer, new keys and values (B, K, T, D), and scores if it has any


class Schedule:
    """Plans the calls of one forward call, segment by segment.

    The caller runs the layers. For each of `calls` it enters the hidden states that `enter` returns, and gives the
    layers' outputs to `leave`. At last `result` returns the hidden states of all tokens.

    Args:
        config: the model's configuration.
        kinds: the kind of each layer.
        memory: the model's memory, or None without memory tokens.
        cache: the cache to go on from, or None. Without one, a model with memory makes one for this forward call,
            unless gradients are wanted.
        tokens: the new tokens.
        embeddings: gives the embeddings (B, T, hidden_size) of the new tokens.
        piece: the most tokens of a call without memory, or None without a limit; longer inputs are read in pieces.
        kept: the columns whose hidden states are wanted, in order; None for all.
        columns: the columns that the caller's input has, if its rows are listed as one.
    """

    def __init__(
        self,
        config: OlmemConfig,
        kinds: Sequence[LayerKind],
        memory: OlmemMemory | None,
        cache: OlmemCache | None,
        tokens: Tokens,
        embeddings: Embeddings,
        piece: int | None = None,
        kept: Sequence[int] | None = None,
        columns: int | None = None,
    ):
        self.config, self.kinds, self.memory_module = config, kinds, memory
        self.batch_size, self.length = embeddings.shape
        self.device = embeddings.device
        self.piece, self.kept = piece, kept
        self.columns = self.length if columns is None else columns
        self.differentiable = torch.is_grad_enabled()
        if memory is not None and cache is None and not self.differentiable:
            cache = OlmemCache(config)
            cache.begin(self.batch_size, self.device)
        self.cache, self.tokens, self.embeddings = cache, tokens, embeddings
        self.before = 0 if cache is None else cache.columns_before(self.columns)  # the columns that were read
        self.before_first = self.before or 0
        self.seen_first = cache.seen.clone() if cache is not None and self.differentiable else None
        self.states: list[LayerState] = [
            OlmemTape(None if cache is None else cache.layers[index])
            if self.differentiable or cache is None
            else cache.layers[index]
            for index in range(len(kinds))
        ]
        # The memory (B or 1, M, hidden_size) of each row's current segment.
        self.memory = None if cache is None or memory is None else cache.memory
        if self.memory is not None:
            self.memory = self.memory.clone()
        self.carried: list[Carried] = []  # where gradients are wanted
        self.outputs: list[list[torch.Tensor]] = []  # for each piece, hidden states (B, T, hidden_size)
        self.pieces = self.cut()

    def cut(self) -> list[Piece]:
        """Cuts the tokens into pieces with one segment in each row, or into long ones in a model without memory."""
        numbers, padded, segment = self.tokens.numbers, self.tokens.padded, self.config.memory_segment_length
        if self.cache is not None:
            numbers = numbers.expand(self.batch_size, -1)
        spans = self.tokens.spans
        if self.memory_module is None or segment is None:
            if self.piece is None or self.length <= self.piece:
                return [Piece(numbers, slice(0, self.length), padded, spans)]
            parts = pieces(self.length, self.piece, numbers)
            return [Piece(numbers[:, part], part, padded, spans and cut_spans(spans, part)) for part in parts]
        refuse_any(
            self.length,
            f"{self.config.memory_rule} to be exported for any length, as there is a pass for each segment; export for "
            "a fixed length.",
        )
        phase = None
        if self.cache is None or self.cache.fresh:
            phase = None if padded else 0
        elif self.length > 1:
            host_seen = self.host_seen()
            if host_seen is None:
                raise ValueError(
                    f"{self.config.memory_rule} to go on from a cache by several tokens (got {self.length}) in a graph "
                    "that is recorded; read them without a graph."
                )
            phases = {seen % segment for seen in host_seen}
            phase = None if padded or len(phases) > 1 else phases.pop()
        return cut_in_segments(numbers, padded, phase, segment)

    def host_seen(self) -> list[int] | None:
        """Returns the tokens that each row of the cache has read; while a graph is recorded, only the device knows."""
        if self.cache is None:
            return None
        return known_on_host(self.cache.counters.read_seen)

    def calls(self) -> Iterable[Call]:
        """Returns the calls in order. Each is made after `leave` was given the outputs of the one before."""
        if self.memory_module is None:
            return (self.call(piece) for piece in self.pieces)
        return self.segment_calls()

    def segment_calls(self) -> Iterator[Call]:
        """Yields the calls of a model with memory."""
        for index, piece in enumerate(self.pieces):
            reads, begins = self.begins(piece, index)
            if reads:
                if index == 0:
                    yield from self.first_memory(piece, begins)
                if self.cache is not None and self.memory is not None:
                    self.cache.remember(self.memory)
            after = self.pieces[index + 1 :]
            yield self.call(piece, reads, begins, writes=len(after) > 0)

    def call(self, piece: Piece, reads: bool = False, begins: torch.Tensor | None = None, writes: bool = False) -> Call:
        """Describes the call of one piece."""
        position_ids = None if self.cache is not None else self.tokens.position_ids
        return Call(
            Tokens(piece.numbers, piece.padded, self.tokens.documents, position_ids, piece.spans),
            self.before,
            self.past(),
            self.earlier(),
            reads=reads,
            begins=begins,
            written_after=(piece.numbers.amax(-1) + 1).clamp(min=0) if writes else None,
            carries=writes and self.differentiable,
        )

    def past(self) -> Past | None:
        """Returns what a call must know of the cache that it goes on from, or None without a cache."""
        if self.cache is None:
            return None
        host_seen = self.host_seen()
        least = None if host_seen is None else min(host_seen)
        return Past(self.cache.seen, least, self.cache.max_length, self.config.caches_one_tensor)

    def earlier(self) -> Earlier | None:
        """Returns what a call must know of earlier calls, or None if no gradients are wanted."""
        if not self.differentiable:
            return None
        kinds = set(self.kinds) if self.carried else ()
        numbers = {kind: [carried.numbers for carried in self.needed(kind)] for kind in kinds}
        return Earlier(numbers, any(carried.padded for carried in self.carried), self.seen_first, self.before_first)

    # Memory

    def begins(self, piece: Piece, index: int) -> tuple[bool, torch.Tensor | None]:
        """Returns whether any row begins a segment with a piece, and which rows (R,) do, or None if all do."""
        first, segment = piece.numbers[:, 0], self.config.memory_segment_length
        assert segment is not None
        if index == 0 and self.memory is None:  # the batch has read nothing yet
            return True, None
        host_seen = self.host_seen()
        if index == 0 and self.cache is not None and host_seen is None:
            inside = first % segment != 0
            assert_on_device(inside.all(), "A recorded step cannot begin a segment; read this token without a graph.")
            return False, None
        if index == 0 and not piece.padded and host_seen is not None:
            flags = [seen % segment == 0 for seen in host_seen]
            rows = None if all(flags) else torch.tensor(flags, device=self.device)
            return any(flags), rows
        if index > 0 and not piece.padded:
            return True, None
        rows = (first >= 0) & (first % segment == 0)
        return known(rows.any(), True), None if known(rows.all(), False) else rows

    def first_memory(self, piece: Piece, begins: torch.Tensor | None) -> Iterator[Call]:
        """Sets the memory of the rows that begin a segment with the first piece.

        Rows that begin a stream get the first memory. The others have ended a segment with an earlier forward call,
        which did not write their memory yet, so this yields a call that writes it.
        """
        assert self.memory_module is not None
        initial = self.memory_module().to(self.device)
        if self.memory is None:
            self.memory = initial if self.cache is None else initial.expand(self.batch_size, -1, -1)
            return
        first = piece.numbers[:, 0]
        rows = torch.ones_like(first, dtype=torch.bool) if begins is None else begins
        new = rows & (first <= 0)
        self.memory = torch.where(new[:, None, None], initial, self.memory)
        writers = self.writers(piece)
        if writers is None:
            writers = (rows & (first > 0)).nonzero()[:, 0]
        if not len(writers):
            return
        yield Call(
            Tokens(piece.numbers[writers, :0]),
            self.before,
            self.past(),
            self.earlier(),
            written_after=first[writers],
            chosen=None if len(writers) == self.batch_size else writers,
        )

    def writers(self, piece: Piece) -> torch.Tensor | None:
        """Returns the rows whose last segment has just ended, or None if the host would have to wait for them."""
        host_seen = self.host_seen()
        if host_seen is None or piece.padded:
            return None
        segment = self.config.memory_segment_length
        assert segment is not None
        rows = [row for row, seen in enumerate(host_seen) if seen and seen % segment == 0]
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def commit(self, call: Call, written: torch.Tensor) -> None:
        """Takes the last hidden states of write tokens as the memory of the rows whose next segment begins.

        Args:
            written: the hidden states (R, M, hidden_size), to which the norm of memory is applied.
        """
        assert self.memory_module is not None and self.memory is not None
        written = self.memory_module(written).to(self.memory.dtype)
        index = 0 if not call.numbers.shape[1] else len(self.outputs)
        keep = self.keeps_gradients(index)
        if keep is not None:
            keep = keep if call.chosen is None or len(keep) == 1 else keep[call.chosen]
            written = torch.where(keep[:, None, None], written, written.detach())
        if call.chosen is not None:
            memory = self.memory.expand(self.batch_size, -1, -1).index_copy(0, call.chosen, written)
        elif call.numbers.shape[1] and self.pieces[index].padded:
            goes_on = self.pieces[index].numbers[:, 0] >= 0
            memory = torch.where(goes_on[:, None, None], written, self.memory)
        else:
            memory = written
        refuse_nonfinite("`memory`", memory, "at the end of a segment", REMEDY)
        self.memory = memory

    def tie_norm(self, last: torch.Tensor) -> torch.Tensor:
        """Returns hidden states (B, T, hidden_size) with a gradient of zero for memory's norm, if none was written.

        Wrappers that average gradients over ranks wait for one of each parameter, also where no segment ends.
        """
        module, wrote = self.memory_module, len(self.pieces) > 1 or self.before_first > 0
        if module is None or self.memory is None or wrote or not (self.differentiable and module.training):
            return last
        return last + 0 * module(self.memory).to(last).sum()

    def keeps_gradients(self, index: int) -> torch.Tensor | None:
        """Returns for which rows (R,) gradients go back from a piece through the memory that it reads, or None for all.

        Counted back from a row's last piece, gradients pass `memory_bptt_segments` memories, then stop at one.
        """
        depth, length = self.config.memory_bptt_segments, self.config.memory_segment_length
        if depth is None or length is None or not self.differentiable:
            return None
        numbers = self.tokens.numbers
        real = numbers >= 0
        last = torch.where(real, numbers, -1).amax(-1) // length
        first = torch.where(real, numbers, last[:, None] * length).amin(-1) // length
        return (last - first + 1 - index) % (depth + 1) != 0

    # Passes

    def enter(self, call: Call) -> torch.Tensor:
        """Returns the hidden states (R, C, hidden_size) that enter the layers for a call, [read | tokens | write]."""
        parts = []
        if call.numbers.shape[1]:
            parts.append(self.embeddings.some(self.pieces[len(self.outputs)].columns))
        if call.reads or call.writes:
            assert self.memory is not None
            memory = self.memory.expand(self.batch_size, -1, -1).to(self.embeddings.dtype)
            memory = memory if call.chosen is None else memory[call.chosen]
            parts = [memory] * call.reads + parts + [memory] * call.writes
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def inputs(self, layer_index: int, call: Call) -> list[torch.Tensor]:
        """Returns the keys, values and scores of earlier calls that a layer needs, in turns."""
        found: list[torch.Tensor] = []
        if self.carried and call.numbers.shape[1]:
            for carried in self.needed(self.kinds[layer_index]):
                found += carried.states[layer_index]
        return found

    def needed(self, kind: LayerKind) -> list[Carried]:
        """Returns the earlier calls that hold keys which layers of that kind may see or retrieve."""
        visibility = Visibility.of(self.config, kind.layer_type)
        if visibility.span is None:
            return self.carried
        if kind.retrieves and self.config.selects:  # by scores that are known in the layer alone
            return self.carried
        reach = visibility.span + (self.config.retrieval_capacity if kind.retrieves else 0)
        found, between = [], 0
        for carried in reversed(self.carried):
            if between < reach or (carried.has_sink and visibility.num_sinks):
                found.insert(0, carried)
            count = carried.numbers.shape[1]
            between += known((carried.numbers >= 0).sum(-1).min(), 0) if carried.padded else count
        return found

    def leave(
        self,
        call: Call,
        plan: Plan,
        hidden_states: Sequence[torch.Tensor | None],
        states: list[tuple[torch.Tensor, ...]],
    ) -> None:
        """Takes the outputs of a call.

        Args:
            plan: the plan of the call for any kind of layer.
            hidden_states: the hidden states (R, C, hidden_size) that the caller wants, and at last those after the last
                layer.
            states: the new keys, values and scores of each layer, (R, K, C, …), where later calls need them.
        """
        tokens, write = plan.columns("token"), plan.columns("write")
        if tokens is not None:
            found = [each[:, tokens].to(self.device) for each in hidden_states if each is not None]
            wanted = self.wanted()
            self.outputs.append(found if wanted is None else [each[:, wanted].clone() for each in found])
        if write is not None and hidden_states[-1] is not None:
            self.commit(call, hidden_states[-1][:, write].to(self.device))
        if tokens is None:
            return
        last = len(self.outputs) == len(self.pieces)
        if call.carries:
            new = [tuple(each[:, :, tokens] for each in of_layer) for of_layer in states]
            count = self.config.num_sink_tokens
            real = call.numbers.where(call.numbers >= 0, count)
            has_sink = count > 0 and known((real < count).any(), True)
            self.carried.append(Carried(call.numbers, call.tokens.padded, has_sink, new))
        if self.before is not None:
            self.before += call.numbers.shape[1]
        if self.cache is not None:
            self.cache.unfinished = not last
            self.cache.advance(plan.view(), self.columns if last else 0)

    def wanted(self) -> slice | torch.Tensor | None:
        """Returns which columns of a call's tokens are kept for the result, or None for all."""
        columns = self.pieces[len(self.outputs)].columns
        if self.kept is None or not isinstance(columns, slice):
            return None
        first, stop = (bisect_left(self.kept, column) for column in (columns.start, columns.stop))
        if first == stop:
            return slice(0, 0)
        start, last = self.kept[first] - columns.start, self.kept[stop - 1] - columns.start
        if last - start == stop - first - 1:
            return slice(start, last + 1)
        return sent(torch.tensor(self.kept[first:stop]) - columns.start, self.device)

    def result(self) -> list[torch.Tensor]:
        """Returns the hidden states of all tokens, or of the last ones, which is (B, T, hidden_size) each.

        They are those that are wanted, then those after the last layer.
        """
        if len(self.outputs) == 1 and isinstance(self.pieces[0].columns, slice):
            return self.outputs[0]
        joined = [torch.cat(states, dim=1) for states in zip(*self.outputs, strict=True)]
        if isinstance(self.pieces[0].columns, slice):
            return joined
        columns = find_in_pieces(self.pieces, self.length)[..., None]
        return [states.gather(1, columns.expand(-1, -1, states.shape[2])) for states in joined]


@dataclass(frozen=True)
class Packed:
    """Holds packed documents of similar lengths as rows of a batch."""

    tokens: Tokens
    embeddings: torch.Tensor  # (B, T, hidden_size)
    real: torch.Tensor  # (B, T) which columns are tokens
    indices: torch.Tensor  # the indices of these tokens in the flattened input


def unpack_documents(tokens: Tokens, embeddings: torch.Tensor) -> list[Packed]:
    """Returns batches in which each document that is packed into embeddings (B, T, hidden_size) has its own row."""
    device, length = embeddings.device, embeddings.shape[1]
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for row, documents in enumerate(tokens.documents or ()):
        for start, stop in documents:
            groups.setdefault((stop - start).bit_length(), []).append((row, start, stop - start))
    found = []
    for group in groups.values():
        row, start, size = torch.tensor(group, device=device).T[:, :, None]
        column = torch.arange(max(span[2] for span in group), device=device)[None]
        real = column < size
        padded = len({span[2] for span in group}) > 1
        states = embeddings[row, (start + column).clamp(max=length - 1)]
        numbers = torch.where(real, column, -1) if padded else column
        found.append(Packed(Tokens(numbers, padded), states, real, (row * length + start + column)[real]))
    return found


def pack_documents(
    packed: Sequence[Packed], results: Sequence[Sequence[torch.Tensor]], like: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the hidden states of unpacked documents in the rows that they came from.

    Args:
        packed: the batches of `unpack_documents`.
        results: for each batch, its hidden states, as many tensors as are wanted.
        like: a tensor (B, T, hidden_size) of the shape to return.
    """
    back = torch.cat([each.indices for each in packed]).argsort()
    of_rows = [[states[each.real] for states in result] for each, result in zip(packed, results, strict=True)]
    return [torch.cat(parts)[back].view(like.shape) for parts in zip(*of_rows, strict=True)]


__all__ = ["OlmemMemory", "Schedule", "cut_in_segments", "find_in_pieces", "pack_documents", "unpack_documents"]
