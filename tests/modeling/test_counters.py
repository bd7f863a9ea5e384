"""What a batch has read, counted on the device and in the host's mirror, which must say the same or nothing."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import FULL, SLIDING
from modeling.numbering import number, real_tokens
from olmem import counters_olmem
from olmem.counters_olmem import Counters
from olmem.inputs_olmem import Tokens
from olmem.plan_olmem import Call, Frame, Past
from olmem.view_olmem import View
from olmem.visibility_olmem import Visibility

CPU = torch.device("cpu")


def begun(rows: int) -> Counters:
    """Returns the counters of rows that have read nothing."""
    counters = Counters()
    counters.begin(rows, CPU)
    return counters


def view_of(counters: Counters, real: torch.Tensor, before: int) -> View:
    """Returns the view of the next tokens, padded or not, of a batch of streams."""
    tokens = Tokens(number(real, counters.seen), not bool(real.all()))
    call = Call(tokens, before, Past(counters.seen.clone()))
    return Frame(Visibility(SLIDING, sliding_window=3), call, [], 0).sections[0][1]


def check(counters: Counters, seen: list[int], columns: int) -> None:
    """Checks that device and host have counted this, where the host need not be asked to know."""
    assert counters.seen.tolist() == seen
    assert int(counters.columns) == columns
    assert counters.host_seen is None or counters.host_seen == seen
    assert counters.host_columns is None or counters.host_columns == columns
    assert counters.seen.dtype == counters.columns.dtype == torch.long


@contextmanager
def recorded():
    """Lets counters believe that a graph is recorded, in which no value may be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counters_olmem, "known_on_host", lambda read: None)
        patch.setattr(counters_olmem, "known", lambda tensor, otherwise: otherwise)
        yield


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_device_and_host_count_the_same(data):
    """They do after any calls, reorderings, rows that begin anew, and tokens that are taken back."""
    rows = data.draw(st.integers(1, 3))
    counters, seen, columns = begun(rows), [0] * rows, 0
    check(counters, seen, columns)
    actions = st.sampled_from(["advance", "advance", "advance", "select", "forget", "reset", "crop", "set", "recorded"])
    for action in data.draw(st.lists(actions, max_size=8)):
        if action in ("advance", "recorded"):
            length = data.draw(st.integers(1, 4))
            real = data.draw(real_tokens(len(seen), length, data.draw(st.sampled_from(["none", "anywhere"]))))
            view = view_of(counters, real, columns)
            if action == "recorded":
                with recorded():
                    counters.advance(view, length)
                assert counters.host_seen is None and counters.host_columns is None
            else:
                counters.advance(view, length)
                assert counters.host_seen is not None and counters.host_columns is not None
            seen, columns = (
                [each + int(count) for each, count in zip(seen, real.sum(-1), strict=True)],
                columns + length,
            )
            assert not counters.fresh
        elif action == "select":
            chosen = data.draw(st.lists(st.integers(0, len(seen) - 1), min_size=1, max_size=4))
            counters.select(torch.tensor(chosen))
            seen = [seen[row] for row in chosen]
        elif action == "forget":
            chosen = data.draw(st.lists(st.integers(0, len(seen) - 1), min_size=1, max_size=2, unique=True))
            counters.forget(torch.tensor(chosen))
            seen = [0 if row in chosen else each for row, each in enumerate(seen)]
            columns = max(seen)
            assert counters.has_gaps
        elif action == "reset":
            counters.reset()
            seen, columns = [0] * len(seen), 0
            assert counters.fresh and not counters.has_gaps
            assert counters.host_seen == seen and counters.host_columns == 0
        elif action == "crop":
            removed = data.draw(st.integers(0, columns))
            counters.crop(removed)
            seen, columns = [max(each - removed, 0) for each in seen], columns - removed
        else:
            seen, columns = [each + 5 for each in seen], columns + 5
            counters.set(seen=torch.tensor(seen), columns=torch.tensor(columns))
            assert counters.host_seen is None and counters.host_columns is None and not counters.fresh
        check(counters, seen, columns)
        if data.draw(st.booleans()):
            assert counters.read_seen() == counters.host_seen == seen
            assert counters.read_columns() == counters.host_columns == columns


def test_a_mirror_that_was_set_is_unknown_until_somebody_asks():
    counters = begun(2)
    counters.set(seen=torch.tensor([4, 7]), columns=torch.tensor(9), gaps=torch.tensor(True))
    assert counters.host_seen is None and counters.host_columns is None
    assert counters.read_seen() == [4, 7] and counters.read_columns() == 9
    assert counters.host_seen == [4, 7] and counters.host_columns == 9
    assert counters.has_gaps and not counters.fresh


@pytest.mark.parametrize("act", ["forget", "crop"])
def test_a_mirror_is_unknown_after_counting_back(act):
    counters = begun(2)
    counters.advance(view_of(counters, torch.ones(2, 3, dtype=torch.bool), 0), 3)
    counters.forget(torch.tensor([0])) if act == "forget" else counters.crop(1)
    assert counters.host_seen is None
    assert counters.read_seen() == ([0, 3] if act == "forget" else [2, 2])
    assert counters.read_columns() == (3 if act == "forget" else 2)


class Unreadable(torch.Tensor):
    """Refuses to be read on the host, as a tensor on a busy device should not be."""

    def tolist(self):
        raise AssertionError("the host waits for the device")

    __int__ = __bool__ = item = tolist


def test_rows_that_are_all_equal_are_reordered_without_reading():
    """Beams of one prompt are; rows that differ need the indices on the host, to keep the mirror."""
    counters = begun(3)
    counters.advance(view_of(counters, torch.ones(3, 4, dtype=torch.bool), 0), 4)
    indices = torch.tensor([2, 0, 0]).as_subclass(Unreadable)
    counters.select(indices)
    assert counters.host_seen == [4, 4, 4]
    counters.select(torch.tensor([1, 0]).as_subclass(Unreadable))
    assert counters.host_seen == [4, 4] and counters.host_columns == 4
    counters.advance(view_of(counters, torch.tensor([[True], [False]]), 4), 1)
    with pytest.raises(AssertionError, match="waits for the device"):
        counters.select(indices[1:])
    counters.select(torch.tensor([1, 0]))
    check(counters, [4, 5], 5)
    assert counters.host_seen == [4, 5]


def test_rows_of_an_unknown_mirror_are_reordered_without_reading():
    counters = begun(2)
    counters.set(seen=torch.tensor([3, 5]))
    counters.select(torch.tensor([1, 0]).as_subclass(Unreadable))
    assert counters.host_seen is None
    assert counters.read_seen() == [5, 3]


def test_counters_advance_in_place():
    """A captured step goes on reading the tensors that it was captured with."""
    counters = begun(2)
    addresses = {name: counter.data_ptr() for name, counter in counters.tensors.items()}
    assert set(addresses) == {"seen", "columns", "gaps"}
    counters.advance(view_of(counters, torch.tensor([[True], [False]]), 0), 1)
    counters.select(torch.tensor([1, 0]))
    counters.crop(1)
    counters.forget(torch.tensor([0]))
    counters.reset()
    counters.set(seen=torch.tensor([1, 2]), columns=torch.tensor(2))
    assert {name: counter.data_ptr() for name, counter in counters.tensors.items()} == addresses


@pytest.mark.parametrize(
    "real, gaps",
    [
        ([[0, 0, 1, 1], [1, 1, 1, 1]], False),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], True),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], True),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], False),
    ],
    ids=["left", "hole", "right", "none"],
)
def test_gaps_are_padding_after_a_rows_first_token(real, gaps):
    """At the left there are none, until a token has come before, and a row that began anew has them for good."""
    counters = begun(2)
    counters.advance(view_of(counters, torch.tensor(real) > 0, 0), 4)
    assert counters.has_gaps is gaps
    counters.advance(view_of(counters, torch.tensor([[True], [False]]), 4), 1)
    assert counters.has_gaps


def test_columns_of_several_passes_count_once():
    """A forward in passes counts its tokens with each, and its columns, padding included, with the last."""
    counters = begun(1)
    for length, columns in ((3, 0), (2, 6)):
        counters.advance(view_of(counters, torch.ones(1, length, dtype=torch.bool), int(counters.columns)), columns)
    check(counters, [5], 6)
    assert counters.host_seen == [5] and counters.host_columns == 6


@pytest.mark.parametrize("layer_type", [FULL, SLIDING])
def test_tokens_of_one_row_of_numbers_count_for_each_row(layer_type):
    """Numbers stand for all rows where they are one; the mirror must count every row too."""
    counters = begun(3)
    numbers = torch.arange(4)[None]
    counters.advance(View(Visibility(layer_type, sliding_window=3), numbers, numbers), 4)
    check(counters, [4, 4, 4], 4)
    assert counters.host_seen == [4, 4, 4]
