"""Attention over sequences without padding, and prompts in pieces, against what each token and each row means alone.

On a CPU the plain form of the operation computes; the tests at the end run the operation itself on a GPU.
"""

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import CHUNKED, MEMORIES, SLIDING, STREAMS, TINY, shake, span, tiny, tokens
from modeling.streams import alone, choices, close, cuts, make, paddings, read
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM, reading_olmem, varlen_olmem, windows_olmem
from olmem.compat_olmem import can_attend_in_blocks
from olmem.contracts_olmem import Needs
from olmem.sequences_olmem import Sequences, starts_of
from olmem.varlen_olmem import AttendParts, Varlen, attend_forward, plain_forward
from torch.testing import assert_close

SCALING = 0.4


def sequences(queries: list[int], keys: list[int], is_causal: bool = False, before: int = -1) -> Sequences:
    """Returns sequences of these lengths of queries and of keys."""
    starts = [starts_of(torch.tensor(each)) for each in (queries, keys)]
    return Sequences(None, None, *starts, max(queries), max(keys), is_causal, before)


def one_softmax(
    triples, some: list[Sequences], gate: torch.Tensor | None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attends in plain loops over queries; with a gate, the first part is memory, and sinks have no value."""
    rows, heads = triples[0][0].shape[:2]
    output = []
    for query in range(rows):
        scores, values = [], []
        for (queries, key, value), each in zip(triples, some, strict=True):
            row = int((each.query_starts[1:] <= query).sum())
            first, stop = int(each.key_starts[row]), int(each.key_starts[row + 1])
            place = stop - int(each.query_starts[row + 1]) + query  # of the query's own key
            if each.is_causal:
                first, stop = max(first, place - each.before) if each.before >= 0 else first, place + 1
            groups = heads // key.shape[1]
            keys, of_part = (states[first:stop].repeat_interleave(groups, dim=1) for states in (key, value))
            scores.append(torch.einsum("hd,shd->hs", queries[query], keys) * SCALING)
            values.append(of_part)
        if sinks is not None:
            scores.append(sinks[:, None])
            values.append(values[0].new_zeros(1, *values[0].shape[1:]))
        whole = torch.cat(scores, dim=1).softmax(-1)
        if gate is not None:
            rest = torch.cat([torch.full_like(scores[0], -torch.inf), *scores[1:]], dim=1).softmax(-1)
            whole = gate[:, None] * whole + (1 - gate[:, None]) * rest
        output.append(torch.einsum("hs,shd->hd", whole, torch.cat(values)))
    return torch.stack(output)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_parts_are_merged_as_one_softmax_with_its_gradients(data):
    """Some of the first parts' sequences have no keys; their gradients take no way through a log-sum-exp."""
    queries = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    extra = [data.draw(st.integers(0, 4)) for _ in queries]
    some = [
        sequences(queries, [a + b for a, b in zip(queries, extra, strict=True)], True, data.draw(st.integers(-1, 3)))
    ]
    for _ in range(data.draw(st.integers(0, 2))):
        some.insert(0, sequences(queries, [data.draw(st.integers(0, 3)) for _ in queries]))
    gate = torch.rand(4, dtype=torch.float64) if len(some) > 1 and data.draw(st.booleans()) else None
    torch.manual_seed(data.draw(st.integers(0, 99)))
    sinks = torch.randn(4, dtype=torch.float64) if data.draw(st.booleans()) else None
    leaves = [each.requires_grad_() for each in (gate, sinks) if each is not None]
    triples = []
    for each in some:
        sizes = (sum(queries), 4), (int(each.key_starts[-1]), 2), (int(each.key_starts[-1]), 2)
        triples.append([torch.randn(*size, 3, dtype=torch.float64, requires_grad=True) for size in sizes])
        leaves += triples[-1]
    found: Any = AttendParts.apply(SCALING, some, gate, sinks, *(state for triple in triples for state in triple))
    expected = one_softmax(triples, some, gate, sinks)
    assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for own, other in zip(*(torch.autograd.grad(each, leaves, gradient) for each in (found, expected)), strict=True):
        assert_close(own, other)


def test_a_gate_that_is_wide_open_has_gradients():
    """Where no rest is let through, nothing is divided by zero."""
    triples = [torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    gate = torch.ones(1, dtype=torch.float64)
    some = [sequences([2], [2]), sequences([2], [2], True)]
    found: Any = AttendParts.apply(SCALING, some, gate, None, *triples)
    expected = one_softmax([triples[:3], triples[3:]], some, gate)
    for own, other in zip(*(torch.autograd.grad(each.sum(), triples) for each in (found, expected)), strict=True):
        assert_close(own, other)


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("has_past", [False, True])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_two_causal_calls_a_block_are_a_window(window, blocks, has_past, by_kernel, monkeypatch):
    if by_kernel:
        fused = pytest.importorskip("olmem.fused_olmem")
        plain, device = windows_olmem.joined, "cuda" if torch.cuda.is_available() else "cpu"

        def joined(own, before, first):
            if before is None:
                return plain(own, before, first)
            parts = (tuple(each.to(device) for each in result) for result in (own, before))
            return tuple(each.cpu() for each in fused.merge_blocks(*parts, first))

        monkeypatch.setattr(windows_olmem, "joined", joined)
    generator = torch.Generator().manual_seed(0)
    count, past = blocks * window, (window - 1) * has_past
    query, key, value = (torch.randn(count + extra, 3, 8, generator=generator) for extra in (0, past, past))
    some = sequences([count], [count + past], True, window - 1)
    assert windows_olmem.is_in_blocks(query, key, some)
    found = windows_olmem.attend_in_blocks(query, key, value, window, SCALING)
    for own, other in zip(found, plain_forward(query, key, value, some, SCALING), strict=True):
        assert_close(own, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_past", [False, True])
def test_blocks_on_a_gpu_are_rounded_once_more_than_windows(dtype, has_past):
    window, count, past = 128, 512, 127 * has_past
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(count + extra, 4, 64, generator=generator).to(dtype) for extra in (0, past, past)]
    some = sequences([count], [count + past], True, window - 1)
    exact = plain_forward(*(each.double() for each in states), some, SCALING)
    moved = [each.cuda() for each in states]
    on_gpu = replace(some, query_starts=some.query_starts.cuda(), key_starts=some.key_starts.cuda())
    assert can_attend_in_blocks(moved[0], window) == (torch.cuda.get_device_capability()[0] == 9)
    assert not can_attend_in_blocks(moved[0], 64)
    for blocks, whole, right in zip(
        windows_olmem.attend_in_blocks(*moved, window, SCALING),
        attend_forward(*moved, on_gpu, SCALING, trains=True),
        exact,
        strict=True,
    ):
        apart = [(each.cpu().double() - right).norm() for each in (blocks, whole)]
        assert apart[0] < 1.5 * apart[1] + 1e-6  # two roundings of one size are 1.41 times one


# Whole models


@contextmanager
def sequences_and_pieces(size: int):
    """Attention over sequences on any device, and prompts in pieces of that many tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_olmem, "can_flash", lambda *_: True)
        patch.setattr(reading_olmem, "PIECE", size)
        yield


@pytest.mark.parametrize("changes", [{}, {"num_sink_tokens": 2}, {"sink_logit_init": 0.5}], ids=str)
def test_prompts_attend_in_blocks_where_nothing_trains(changes, monkeypatch):
    model, pasts = make({"layer_types": SLIDING, "num_key_value_heads": 4} | changes), []
    window = span(model)
    ids = tokens(1, 4 * window)
    expected = model(ids, use_cache=False).logits.detach()

    def counted(query, key, *given):
        pasts.append(len(key) - len(query))
        return windows_olmem.attend_in_blocks(query, key, *given)

    monkeypatch.setattr(varlen_olmem, "can_attend_in_blocks", lambda *_: True)
    monkeypatch.setattr(varlen_olmem, "attend_in_blocks", counted)
    with sequences_and_pieces(2 * window):
        with torch.no_grad():
            close(model(ids, past_key_values=OlmemCache(model.config)).logits, expected)
        assert set(pasts) == {0, window - 1}
        pasts.clear()
        close(model(ids, use_cache=False).logits, expected)
        assert not pasts


SIZES = st.sampled_from([3, 7, 500])


@settings(max_examples=40, deadline=None)
@given(changes=choices(), size=SIZES, data=st.data())
def test_streams_are_what_they_are_without(changes, size, data):
    """Rows that are padded anywhere, in one call or many, with a cache or not."""
    model = make(changes)
    rows = data.draw(st.integers(1, 3))
    pieces = data.draw(cuts(data.draw(st.integers(1, 4 * span(model)))))
    ids, masks = tokens(rows, sum(pieces)), data.draw(paddings(rows, pieces))
    mask = torch.cat(masks, dim=1)
    with torch.no_grad(), sequences_and_pieces(size):
        found = read(model, ids.split(pieces, dim=1), masks)
        whole = model(ids, attention_mask=mask.long(), use_cache=False).logits
    for row in range(rows):
        if mask[row].any():
            expected = alone(model, ids[row][mask[row]])
            close(found[row][mask[row]], expected)
            close(whole[row][mask[row]], expected)
    assert found.isfinite().all() and whole.isfinite().all()


@pytest.mark.parametrize("changes", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("gate", [None, 0.3])
def test_what_remembers_is_what_it_is_without(changes, gate):
    """Memory, retrieval and both: logits in pieces, and every gradient."""
    model = tiny(**changes, **({"memory_gate_init": gate} if "num_memory_tokens" in changes else {}))
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :11] = mask[0, 20:23] = 0

    def found() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.no_grad():
            parts = [read(model, ids.split([9, 1, 13, 17], dim=1), mask.split([9, 1, 13, 17], dim=1))]
        parts.append(model(ids, attention_mask=mask, use_cache=False).logits)
        (parts[-1] * mask[..., None]).square().sum().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return [each.detach()[mask.bool()] for each in parts] + [each.clone() for each in gradients]

    expected = found()
    with sequences_and_pieces(7):
        for own, other in zip(found(), expected, strict=True):
            assert_close(own, other, rtol=0, atol=1e-4 * max(1, float(other.abs().max())))


@pytest.mark.parametrize(
    "changes", [STREAMS["window"], STREAMS["sinks"], STREAMS["chunks"]], ids=["window", "sinks", "chunks"]
)
def test_packed_documents_train_as_they_do_alone(changes):
    model = tiny(**changes)
    lengths = [9, 1, 14, 6]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with sequences_and_pieces(500):
        found = model(ids, position_ids=positions, use_cache=False).logits
        found.square().sum().backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    expected = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    sum(each.square().sum() for each in expected).backward()
    close(found, torch.cat(expected, dim=1))
    for own, weight in zip(gradients, model.parameters(), strict=True):
        assert_close(own, weight.grad, rtol=0, atol=1e-4 * float(weight.grad.abs().max()))


@pytest.mark.parametrize("changes", [STREAMS["mixed"], MEMORIES["both with sinks"]], ids=["mixed", "both with sinks"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_twice_have_the_same_gradients(changes, reentrant):
    """A checkpoint lets what was saved for the backward pass be read once only."""
    model = tiny(**changes).train()
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with sequences_and_pieces(500):
            (model(ids, attention_mask=mask, use_cache=False).logits * mask[..., None]).square().sum().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for own, other in zip(gradients(), expected, strict=True):
        assert_close(own, other, rtol=0, atol=1e-5 * max(1, float(other.abs().max())))


@pytest.mark.parametrize("changes", [STREAMS["mixed"], STREAMS["one tensor"]], ids=["mixed", "one tensor"])
def test_a_padded_batch_leaves_the_same_state(changes):
    """Counters, what padding inside a row forbids, and what is read on, token by token."""
    model = tiny(**changes)
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, :31] = mask[2] = 0
    expected, cache = OlmemCache(model.config), OlmemCache(model.config)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=expected).logits
        with sequences_and_pieces(16):
            last = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=3).logits
        real = mask[:, -3:].bool()
        close(last[real], logits[:, -3:][real])
        for inside in (False, True):
            assert cache.counters.read_seen() == expected.counters.read_seen() == cache.seen.tolist()
            assert cache.get_seq_length() == expected.get_seq_length()
            assert bool(cache.counters.gaps) is bool(expected.counters.gaps) is inside
            new = tokens(3, 8, seed=1)
            hole = torch.ones(3, 8, dtype=torch.long)
            hole[0, 2:4] = 0
            found = []
            for each, size in ((cache, 2), (expected, 500)):
                with sequences_and_pieces(size):
                    found.append(model(new, attention_mask=hole, past_key_values=each).logits[hole.bool()])
            close(*found)
        steps = [model(new[:, :1], past_key_values=each).logits for each in (cache, expected)]
    close(*steps)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_long_prompt_is_embedded_in_pieces_and_keeps_what_is_asked_for(use_cache, monkeypatch):
    model = tiny(layer_types=SLIDING)
    ids = tokens(2, 50)
    embedded: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: embedded.append(output.shape[1]))
    monkeypatch.setattr(reading_olmem, "PIECE", 12)
    whole = torch.stack([alone(model, row) for row in ids])
    for keep in (1, 15, 0):
        embedded.clear()
        with torch.no_grad():
            output = model(ids, use_cache=use_cache, logits_to_keep=keep)
        assert embedded == [12, 12, 12, 12, 2]
        close(output.logits, whole[:, -keep:])
        assert output.logits.shape[1] == (keep or 50)
    with torch.no_grad():
        stages = model(ids, use_cache=use_cache, output_hidden_states=True).hidden_states
    assert all(stage.shape[:2] == (2, 50) for stage in stages)
    output = model(ids, use_cache=use_cache)  # gradients go back through the whole
    close(output.logits, whole)


def test_hidden_states_of_a_prompt_that_nobody_keeps_are_not_kept(monkeypatch):
    """A view of no column would hold those of a whole piece."""
    monkeypatch.setattr(reading_olmem, "PIECE", 12)
    kept: list[int] = []
    leave = reading_olmem.Schedule.leave

    def watched(schedule, *given):
        leave(schedule, *given)
        kept.append(sum(each.untyped_storage().nbytes() for output in schedule.outputs for each in output))

    monkeypatch.setattr(reading_olmem.Schedule, "leave", watched)
    model = tiny(layer_types=SLIDING)
    with torch.no_grad():
        model(tokens(1, 50), logits_to_keep=1)
    assert kept == [0, 0, 0, 0, model.config.hidden_size * 4]


def test_what_sequences_lack_is_left_to_other_backends():
    varlen, plan = Varlen(), Needs(flash=True)
    view: Any = type("View", (), dict(is_step=False, role="token", prefix=False, causal=False, documents=None))
    assert varlen.supports(view, plan)
    for lacking in (Needs(), plan._replace(plain=True), plan._replace(by_slot=True)):
        assert not varlen.supports(view, lacking)
    view.causal = True  # one call of torch's attention, which is faster
    assert not varlen.supports(view, plan)
    assert varlen.supports(view, plan._replace(sink_logits=True))  # which that call cannot have
    view.prefix = True
    assert varlen.supports(view, plan)
    view.is_step = True
    assert not varlen.supports(view, plan)


# On a GPU

VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"layer_types": SLIDING},
    "mixed": {},
    "sinks": {"layer_types": SLIDING, "num_sink_tokens": 3},
    "chunks": {"layer_types": CHUNKED, "attention_chunk_size": 11, "attention_chunk_lookback": 1, "num_sink_tokens": 2},
    "memory": {"num_memory_tokens": 3, "memory_segment_length": 33, "num_sink_tokens": 2},
    "learned sinks": {"sink_logit_init": 0.0},
    "gates, learned sinks": {
        "num_memory_tokens": 3,
        "memory_segment_length": 33,
        "num_sink_tokens": 2,
        "memory_gate_init": 0.3,
        "sink_logit_init": 0.0,
    },
    "one tensor": {"shared_projections": "key_value", "num_sink_tokens": 2},
    "no positions": {"position_embedding": "none", "num_sink_tokens": 2},
    "grouped": {"num_key_value_heads": 1},
    "retrieval": {"layer_types": SLIDING, "retrieval_layers": [1], "retrieval_top_k": 4, "retrieval_capacity": 30},
}


def half_model(changes: dict[str, Any]) -> OlmemForCausalLM:
    """Returns a small model in bfloat16 on a GPU."""
    config = OlmemConfig(**(TINY | {"sliding_window": 20, "head_dim": 16} | changes))
    return shake(OlmemForCausalLM(config)).to(torch.bfloat16)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of a difference, as a part of the norm of what is expected."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-9))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_streams_on_a_gpu_are_those_of_the_cpu(changes, seed, monkeypatch):
    """Cuts at random, padding in front and between."""
    monkeypatch.setattr(reading_olmem, "PIECE", 48)
    model = half_model(changes)
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(61, (3, 150), generator=generator), torch.ones(3, 150, dtype=torch.long)
    mask[1, :31] = mask[0, 70:83] = mask[2, :9] = mask[2, 100:111] = 0
    exact = copy.deepcopy(model).double()
    expected = exact(ids, attention_mask=mask, use_cache=False).logits
    model.cuda()
    pieces = torch.randint(1, 60, (20,), generator=generator).cumsum(0).clamp(max=150).unique().tolist()
    found, cache = [], OlmemCache(model.config)
    for start, stop in zip([0, *pieces], [*pieces, 150], strict=True):
        if start < stop:
            given = ids[:, start:stop].cuda(), mask[:, :stop].cuda()
            found.append(model(given[0], attention_mask=given[1], past_key_values=cache).logits)
    whole = model(ids.cuda(), attention_mask=mask.cuda(), use_cache=False).logits
    for logits in (torch.cat(found, dim=1), whole):
        assert logits.isfinite().all()
        assert apart(logits.cpu()[mask.bool()], expected[mask.bool()]) < 0.06


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_on_a_gpu_are_no_further_from_float64_than_those_by_blocks(changes, monkeypatch):
    model = half_model(changes)
    ids, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, :31] = mask[0, 70:83] = 0

    def gradients(model: OlmemForCausalLM) -> list[torch.Tensor]:
        model.zero_grad()
        given = ids.to(model.device), mask.to(model.device)
        logits = model(given[0], attention_mask=given[1], use_cache=False).logits.double()
        (logits * given[1][..., None]).square().mean().backward()
        return [weight.grad.double().cpu() for weight in model.parameters()]

    exact = gradients(copy.deepcopy(model).double())
    model.cuda()
    own = torch.tensor([apart(*each) for each in zip(gradients(model), exact, strict=True)])
    monkeypatch.setattr(reading_olmem, "can_flash", lambda *_: False)
    by_blocks = torch.tensor([apart(*each) for each in zip(gradients(model), exact, strict=True)])
    assert own.mean() <= 1.1 * by_blocks.mean() + 0.002
    assert own.max() <= 1.3 * by_blocks.max() + 0.01
