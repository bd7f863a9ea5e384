"""What a forward call is given, as numbered tokens: padding, packed documents, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.numbering import number, real_tokens
from olmem.counters_olmem import Counters
from olmem.inputs_olmem import Tokens, find_documents, number_tokens
from olmem.view_olmem import inner_padding


def counters_of(seen: list[int]) -> Counters:
    """Returns the counters of rows that have read so many tokens."""
    counters = Counters()
    counters.begin(len(seen), torch.device("cpu"))
    counters.set(seen=torch.tensor(seen), columns=torch.tensor(max(seen)))
    return counters


def numbered(
    rows: int,
    length: int,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    counters: Counters | None = None,
    has_memory: bool = False,
) -> Tokens:
    """Returns the tokens of hidden states of that shape."""
    return number_tokens(torch.zeros(rows, length, 3), mask, positions, counters, has_memory, has_prefix=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_real_tokens_are_numbered_one_by_one_wherever_padding_stands(data):
    """They go on from what was read before, and a mask may cover the columns before them too."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    real = data.draw(real_tokens(rows, length, data.draw(st.sampled_from(["none", "anywhere"]))))
    seen = data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    counters = counters_of(seen) if data.draw(st.booleans()) else None
    before = data.draw(st.integers(0, 5))
    mask = torch.cat((data.draw(real_tokens(rows, before)), real), dim=1)
    mask = mask.to(data.draw(st.sampled_from([torch.bool, torch.long, torch.float])))
    tokens = numbered(rows, length, mask, counters=counters)
    expected = number(real, torch.tensor(seen) if counters else 0)
    assert tokens.numbers.expand(rows, -1).tolist() == expected.tolist()
    assert tokens.padded is not bool(real.all())
    assert tokens.documents is None and tokens.position_ids is None


@pytest.mark.parametrize("mask", [None, torch.ones(3, 4, dtype=torch.long), torch.ones(3, 9)], ids=str)
def test_one_row_of_numbers_stands_for_all_without_padding(mask):
    tokens = numbered(3, 4, mask)
    assert tokens.numbers.tolist() == [[0, 1, 2, 3]]
    assert not tokens.padded
    tokens = numbered(3, 4, mask, counters=counters_of([0, 7, 2]))
    assert tokens.numbers.tolist() == [[0, 1, 2, 3], [7, 8, 9, 10], [2, 3, 4, 5]]


def test_a_call_without_tokens_is_refused():
    with pytest.raises(ValueError, match="`input_ids` must hold at least one token"):
        numbered(2, 0)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (1, 4), (4, 9)], ids=str)
def test_a_mask_that_does_not_cover_the_input_is_refused(shape):
    with pytest.raises(ValueError, match=r"`attention_mask` must cover the input's 3 rows of 4 tokens"):
        numbered(3, 4, torch.ones(shape))


# Positions and documents


def test_positions_of_the_caller_are_kept_without_a_cache():
    """They are places of the caller's own beside a mask, and a cache has its own."""
    positions = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(numbered(2, 4, None, positions).position_ids, positions)
    assert numbered(2, 4, None, positions, counters_of([3, 3])).position_ids is None
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    tokens = numbered(2, 4, mask, torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]]))
    assert tokens.documents is None
    assert tokens.numbers.tolist() == [[-1, 0, 1, 2], [0, 1, 2, 3]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_of_packed_documents_are_numbered_from_their_own_beginnings(data):
    """A document begins wherever a position does not follow the one before it, from whatever number it counts."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 12))
    sizes, positions, numbers = [], [], []
    for _ in range(rows):
        stops = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
        sizes.append([*zip([0, *stops], [*stops, length], strict=True)])
        bases = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes[-1]), max_size=len(sizes[-1])))
        documents = zip(bases, sizes[-1], strict=True)
        positions.append([base * 50 + column for base, (start, stop) in documents for column in range(stop - start)])
        numbers.append([column for start, stop in sizes[-1] for column in range(stop - start)])
    has_memory = data.draw(st.booleans())
    mask = torch.ones(rows, length) if has_memory and data.draw(st.booleans()) else None
    tokens = numbered(rows, length, mask, torch.tensor(positions), None, has_memory)
    if max(len(row) for row in sizes) == 1:
        assert tokens.documents is None and tokens.numbers.tolist() == [list(range(length))]
        return
    assert tokens.documents == sizes
    assert tokens.numbers.tolist() == numbers
    assert not tokens.padded and tokens.position_ids is None


def test_a_mask_says_that_positions_pack_no_documents():
    """As in Transformers, positions that start anew beside a mask are only places, but memory tells texts apart."""
    positions = torch.tensor([[0, 1, 0, 1]])
    assert numbered(1, 4, torch.ones(1, 4), positions).documents is None
    assert numbered(1, 4, torch.ones(1, 4), positions, has_memory=True).documents == [[(0, 2), (2, 4)]]


def test_packed_documents_beside_padding_are_refused_where_there_is_memory():
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="pass packed documents without padding"):
        numbered(1, 5, mask, torch.tensor([[0, 0, 1, 0, 1]]), has_memory=True)
    counted = numbered(1, 5, mask, torch.tensor([[1, 0, 1, 2, 3]]), has_memory=True)
    assert counted.numbers.tolist() == [[-1, 0, 1, 2, 3]]
    counted = numbered(1, 5, mask.flip(1), torch.tensor([[0, 1, 2, 3, 1]]), has_memory=True)
    assert counted.numbers.tolist() == [[0, 1, 2, 3, -1]]
    assert numbered(1, 5, mask, torch.tensor([[0, 0, 1, 0, 1]])).documents is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_positions_with_a_cache_must_count_tokens_one_by_one(data):
    """They may begin anywhere, as after padding; one token, and padding, may have any."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    real = data.draw(real_tokens(rows, length))
    seen = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    shift = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows)))[:, None]
    junk = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=length, max_size=length)))
    numbers = number(real, torch.tensor(seen))
    positions = torch.where(real, numbers + shift, junk)
    assert numbered(rows, length, real, positions, counters_of(seen)).numbers.tolist() == numbers.tolist()
    wrong = (real.sum(-1) > 1).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        last = int(real[row].nonzero()[-1])
        positions[row, last] += data.draw(st.integers(1, 5))
        with pytest.raises(ValueError, match="must count a row's tokens one by one with an OlmemCache"):
            numbered(rows, length, real, positions, counters_of(seen))


def test_packed_documents_start_where_positions_do():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3]])
    assert find_documents(positions) == [[(0, 3), (3, 5), (5, 6)], [(0, 6)], [(0, 2), (2, 6)]]
    assert find_documents(positions[1:2]) is None
    assert find_documents(positions[1:2] + 7) is None


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_inner_padding_stands_between_real_tokens(data):
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    real = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(rows)]
    numbers = number(torch.tensor(real))
    for after_others in (False, True):
        most = 0
        for row in real:
            columns = [column for column, is_real in enumerate(row) if is_real]
            if columns:
                first = 0 if after_others else columns[0]
                most = max(most, sum(not row[column] for column in range(first, columns[-1])))
        assert inner_padding(numbers, after_others) == most


def test_consecutive_positions_are_taken_beside_padding():
    """Also where they begin below the row's first number."""
    mask = torch.tensor([[False, False, True, True, True]])
    counters = Counters()
    counters.begin(1, torch.device("cpu"))
    counters.set(seen=torch.tensor([9]), columns=torch.tensor(9), gaps=torch.tensor(False))
    positions = torch.tensor([[0, 0, 2, 3, 4]])
    found = number_tokens(torch.zeros(1, 5, 3), mask, positions, counters, False, False)
    assert found.numbers.tolist() == [[-1, -1, 9, 10, 11]]
    with pytest.raises(ValueError, match="`position_ids` must count"):
        number_tokens(torch.zeros(1, 5, 3), mask, 2 * positions, counters, False, False)
