"""The order of rows: a permutation in every epoch, computed from seed, source and number alone."""

import hypothesis
import hypothesis.strategies as st
import pytest

from pretrain.config import ConfigError
from pretrain.data.order import RowOrder


def epoch(rows, number, num_rows):
    return [rows.row(number * num_rows + k) for k in range(num_rows)]


@hypothesis.settings(max_examples=15)
@hypothesis.given(num_rows=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), number=st.integers(0, 10**6))
def test_an_epoch_reads_every_row_once(num_rows, seed, number):
    assert sorted(epoch(RowOrder(num_rows, source="a", seed=seed), number, num_rows)) == list(range(num_rows))


@hypothesis.settings(max_examples=15)
@hypothesis.given(elements=st.lists(st.integers(0, 10**9), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_the_row_of_an_element_does_not_depend_on_what_was_asked_before(elements, seed):
    rows = RowOrder(50, source="a", seed=seed)
    together = [rows.row(k) for k in elements]
    assert together[::-1] == [rows.row(k) for k in reversed(elements)]
    assert together == [RowOrder(50, source="a", seed=seed).row(k) for k in elements]


def test_epochs_seeds_and_sources_have_orders_of_their_own():
    """Neighboring seeds too: their epochs must not be each other's, one later."""
    orders = [
        epoch(RowOrder(50, source=source, seed=seed), number, 50)
        for source, seed in (("a", 0), ("a", 1), ("b", 0))
        for number in range(4)
    ]
    assert len(set(map(tuple, orders))) == len(orders)
    # Of 50 rows a random order leaves one in its place, on average.
    same = [sum(a == b for a, b in zip(x, y, strict=True)) for x in orders for y in orders if x is not y]
    assert sum(same) / len(same) < 2
    assert max(same) < 10


def test_a_large_table_is_not_stored_and_one_that_is_too_large_is_refused():
    assert 0 <= RowOrder(2**31 - 1, source="a", seed=0).row(10**12) < 2**31 - 1
    with pytest.raises(ConfigError, match=r"fewer than 2\*\*31 rows, 'a' has 2147483648; split the source"):
        RowOrder(2**31, source="a", seed=0)
    RowOrder(0, source="a", seed=0)
