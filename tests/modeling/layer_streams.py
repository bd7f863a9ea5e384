"""Random keys and values that a layer's state reads as a stream, without a model, and what a query must find."""

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, FULL, ROPE, SLIDING, TINY
from modeling.numbering import listed, number, real_tokens
from modeling.streams import cuts
from olmem import OlmemConfig
from olmem.backends_olmem import BACKENDS
from olmem.contracts_olmem import Part, Plan
from olmem.counters_olmem import Counters
from olmem.inputs_olmem import Tokens
from olmem.ops_olmem import PLAIN
from olmem.plan_olmem import Call, Earlier, Past, Planner
from olmem.positions_olmem import OlmemRotaryEmbedding, rotate, to_pairs
from olmem.rules_olmem import POSITION_EMBEDDINGS, ROTATING
from olmem.state_olmem import OlmemCacheLayer, OlmemTape
from olmem.visibility_olmem import Visibility

HEADS, SIZE = TINY["num_key_value_heads"], TINY["head_dim"]


class Stream:
    """Reads random keys and values as a stream, and knows which a query must find.

    Args:
        changes: of a configuration with one layer.
        real: (B, N) which columns are tokens; the others hold no numbers.
    """

    def __init__(self, changes: dict[str, Any], real: torch.Tensor, seed: int = 0, max_length: int | None = None):
        many = {"num_hidden_layers": 1, "rope_parameters": ROPE, "attention_chunk_size": 3} | changes
        if many.get("layer_types") == FULL:  # in whose windows every sink stays
            many |= {"num_sink_tokens": 0}
        self.config = OlmemConfig(**TINY | many)
        self.rotary = OlmemRotaryEmbedding(self.config)
        self.planner = Planner(self.config, self.rotary, BACKENDS, PLAIN)
        [self.kind] = self.planner.kinds
        self.visibility = Visibility.of(self.config, self.kind.layer_type)
        self.generator = torch.Generator().manual_seed(seed)
        self.one_tensor = self.config.caches_one_tensor
        self.max_length = max_length
        self.batch_size = len(real)
        self.drawn = self.states(real.shape[1])
        self.pad(real)
        self.counters = Counters()
        self.counters.begin(self.batch_size, real.device)
        self.layer = OlmemCacheLayer(
            self.visibility,
            self.counters,
            max_length,
            one_tensor=self.one_tensor,
            rotates=self.kind.position_embedding in ROTATING,
            store_capacity=self.config.retrieval_capacity if self.kind.retrieves else 0,
            store_selects=self.config.selects,
        )
        self.seen, self.before = torch.zeros(self.batch_size, dtype=torch.long), 0
        self.memory = self.states(0)
        self.written = self.states(0)

    def pad(self, real: torch.Tensor, padding: float = torch.nan) -> None:
        """Makes padding of all columns that are not real, of which keys and values are but one number."""
        self.real = real
        self.columns = [row.nonzero()[:, 0].tolist() for row in real]  # of each token by its number
        self.key, value = (states.masked_fill(~real[:, None, :, None], padding) for states in self.drawn)
        self.value = self.key if self.one_tensor else value

    def states(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values (B, K, length, D), which are one where the configuration says so."""
        shape = self.batch_size, HEADS, length, SIZE
        key, value = (torch.randn(shape, generator=self.generator) for _ in range(2))
        return key, key if self.one_tensor else value

    def past(self) -> Past:
        """States what the cache's layer has read before the next call."""
        return Past(self.seen, int(self.seen.min()), self.max_length, self.one_tensor)

    def call(
        self, length: int, has_cache: bool = True, writes: bool = False, **more: Any
    ) -> tuple[Call, torch.Tensor, torch.Tensor]:
        """Returns the call of the next columns, and its keys and values with those of memory."""
        part = slice(self.before, self.before + length)
        real = self.real[:, part]
        tokens = Tokens(number(real, self.seen), not bool(real.all()))
        call = Call(tokens, self.before, self.past() if has_cache else None, **more)
        pairs = [(self.key[:, :, part], self.value[:, :, part])]
        if call.reads:
            old, new = self.memory, self.states(self.visibility.num_memory)
            pairs.insert(0, new)
            self.memory = new
            if call.begins is not None:
                rows = call.begins[:, None, None, None]
                self.memory = torch.where(rows, new[0], old[0]), torch.where(rows, new[1], old[1])
        if writes:
            call.written_after = self.seen + real.sum(-1)
            self.written = self.states(self.visibility.num_memory)
            pairs.append(self.written)
        key, value = (torch.cat(each, dim=2) for each in zip(*pairs, strict=True))
        return call, key, value

    def plan(self, call: Call) -> Plan:
        """Returns the plan of the layer for a call."""
        return self.planner.plans(call)[self.kind]

    def advance(self, length: int) -> None:
        """Counts so many columns."""
        self.seen = self.seen + self.real[:, self.before : self.before + length].sum(-1)
        self.before += length
        counted = {"seen": self.seen, "columns": torch.tensor(self.before), "gaps": torch.tensor(False)}
        self.counters.set(**counted)

    def step(self, length: int = 1, **more: Any) -> tuple[Plan, list[list[Part]]]:
        """Reads the next columns with the cache's layer."""
        call, key, value = self.call(length, **more)
        plan = self.plan(call)
        with torch.no_grad():
            parts = self.layer.write(key, value, plan, ())
        self.advance(length)
        return plan, parts

    def token(self, row: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the key and the value (K, D) of a row's token by its number."""
        column = self.columns[row][index]
        return self.key[row, :, column], self.value[row, :, column]

    def expect(self, part: Part, row: int, column: int, states: tuple[torch.Tensor, torch.Tensor], place: int) -> None:
        """Checks that a part holds a token's key at its place, and its value, in a column of a row."""
        key, value = states
        if part.is_bare:
            key = value = to_pairs(key) if part.in_pairs else key
        elif self.kind.position_embedding in ROTATING:
            position = torch.tensor([[place]])
            key = rotate(key[None, :, None], *self.rotary(key, position, self.kind.layer_type))[0, :, 0]
        assert torch.equal(part.key[row, :, column], key)
        assert torch.equal(part.value[row, :, column], value)

    def check(self, plan: Plan, parts: list[list[Part]], before_call: torch.Tensor) -> None:
        """Checks what every section of a plan sees, token by token, by the table of the design."""
        memory = self.visibility.num_memory
        assert len(parts) == len(plan.sections)
        for section, seen in zip(plan.sections, parts, strict=True):
            view, window = section.view, seen[-1]
            keys = view.key_numbers
            if view.role == "read":
                for row in range(self.batch_size):
                    if plan.writes is None or plan.begins is None or plan.begins[row]:
                        self.check_memory(window, row)
                continue
            first = window.key.shape[2] - keys.shape[1]  # where prefix and window are one part
            prefix = window if first else seen[0]
            for row in range(self.batch_size):
                own = keys[row if len(keys) > 1 else 0].tolist()
                queries = [query for query in view.numbers[row].tolist() if query >= 0]
                if view.role == "write":
                    queries = [int(view.numbers[row, 0]) - 1]
                    if int(before_call[row]) > queries[0]:
                        continue  # a row without a token in this call writes nothing that is kept
                    columns = range(first + len(own) - memory, first + len(own))
                    for index, column in enumerate(columns):
                        states = self.written[0][row, :, index], self.written[1][row, :, index]
                        self.expect(window, row, column, states, memory + queries[0] + 1 + index)
                    own = own[:-memory]
                for query in queries:
                    before, inside = listed(self.visibility, query)
                    for key in inside:
                        self.expect(window, row, first + own.index(key), self.token(row, key), memory + key)
                    for sink in before:
                        assert first or prefix.is_prefix
                        self.expect(prefix, row, memory + sink, self.token(row, sink), memory + sink)
                if queries and memory:
                    self.check_memory(prefix, row)

    def check_memory(self, part: Part, row: int) -> None:
        """Checks that the first slots of a part hold the memory of a row's running segment."""
        for slot in range(self.visibility.num_memory):
            self.expect(part, row, slot, (self.memory[0][row, :, slot], self.memory[1][row, :, slot]), slot)


@st.composite
def streams(draw, least: int = 1, most: int = 20, memory: bool | None = None, **fixed: Any) -> Stream:
    """Draws a stream of one to three rows of any kind of layer, padded anywhere, with memory or not."""
    memory = draw(st.booleans()) if memory is None else memory
    layer_type = draw(st.sampled_from([FULL, SLIDING, CHUNKED]))
    changes = {
        "layer_types": layer_type,
        "sliding_window": draw(st.integers(1, 6)),
        "attention_chunk_size": draw(st.integers(1, 4)),
        "attention_chunk_lookback": draw(st.integers(0, 2)),
        "num_sink_tokens": 0 if layer_type == FULL else draw(st.integers(0, 4)),
        "sink_logit_init": draw(st.sampled_from([None, 0.0])),
        "position_embedding": draw(st.sampled_from(POSITION_EMBEDDINGS)),
        "shared_projections": draw(st.sampled_from(["none", "key_value"])),
    }
    if memory:
        changes |= {"num_memory_tokens": 2, "memory_segment_length": 7}
    rows, length = draw(st.integers(1, 3)), draw(st.integers(least, most))
    real = draw(real_tokens(rows, length, draw(st.sampled_from(["none", "anywhere"]))))
    max_length = draw(st.sampled_from([None, length + 2]))
    return Stream(changes | fixed, real, draw(st.integers(0, 99)), max_length)


@st.composite
def cuts_after_a_cache(draw, length: int) -> tuple[list[int], int]:
    """Draws lengths of the pieces of a stream, and how many of them are read before a forward with gradients."""
    before = draw(st.sampled_from(range(1, length)))
    first = draw(cuts(before))
    return [*first, *draw(cuts(length - before))], len(first)


def flags(draw, rows: int) -> torch.Tensor:
    """Draws a flag for each row."""
    return torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))


def on_tape(
    stream: Stream, pieces: list[int], first: int, draw, padding: float = torch.nan
) -> Iterator[tuple[Plan, list[list[Part]]]]:
    """Reads some pieces of a stream with the cache's layer, and the rest in one forward with a tape, which it yields.

    Where `first` is 0 there is no cache. Calls of a forward after its first one begin in their first column.
    """
    memory = stream.visibility.num_memory > 0
    masks = stream.real.split(pieces, dim=1)
    packed = [mask.sort(dim=-1, descending=True, stable=True).values for mask in masks[first + 1 :]]
    stream.pad(torch.cat((*masks[: first + 1], *packed), dim=1), padding)
    for index, length in enumerate(pieces[:first]):
        stream.step(length, reads=memory and index == 0)
    tape = OlmemTape(stream.layer if first else None)
    seen_first, before_first = stream.seen, stream.before
    earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
    numbers: list[torch.Tensor] = []
    for index, length in enumerate(pieces[first:]):
        reads = memory and (not first or index > 0 or draw(st.booleans()))
        begins = flags(draw, stream.batch_size) if reads and first and draw(st.booleans()) else None
        before = Earlier({stream.kind: list(numbers)}, bool(numbers), seen_first if first else None, before_first)
        more = {"reads": reads, "begins": begins, "writes": memory and draw(st.booleans()), "earlier": before}
        call, key, value = stream.call(length, bool(first), **more)
        plan, seen = stream.plan(call), stream.seen
        parts = tape.write(key, value, plan, earlier)
        stream.check(plan, parts, seen)
        yield plan, parts
        tokens = plan.columns("token")
        earlier.append((key[:, :, tokens], value[:, :, tokens]))
        numbers.append(call.numbers)
        stream.advance(length)
