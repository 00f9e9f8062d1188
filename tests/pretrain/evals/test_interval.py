"""Bootstrap intervals cover what they should, and pairing removes what two runs share."""

import numpy as np
import pytest

from pretrain.evals.interval import mean_interval, paired_difference, ratio_interval


def test_the_interval_of_a_mean_is_the_normal_one_for_many_items():
    values = np.random.default_rng(0).integers(0, 2, 2000).astype(float)
    found = mean_interval(values.tolist())
    error = 1.96 * values.std() / np.sqrt(values.size)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert found.items == 2000


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        found = mean_interval(random.normal(3.0, 2.0, 80).tolist())
        covered += found.low <= 3.0 <= found.high
    assert covered >= 51


def test_a_ratio_weighs_items_by_their_denominator():
    found = ratio_interval([10.0, 0.0], [1.0, 9.0])
    assert found.value == 1.0
    assert (found.low, found.high) == (0.0, 10.0)


def test_pairing_finds_a_small_change_among_items_that_differ_much():
    random = np.random.default_rng(2)
    before = random.normal(0.0, 10.0, 200)
    after = before + 0.1 + random.normal(0.0, 0.05, 200)
    found = paired_difference(before.tolist(), after.tolist())
    assert 0.08 < found.low < 0.1 < found.high < 0.12


def test_one_item_has_a_value_and_no_interval():
    assert mean_interval([0.3]).interval is None
    assert mean_interval([0.3]).value == 0.3
    found = mean_interval([0.0, 1.0])
    assert found.interval == (found.low, found.high)


def test_the_same_values_give_the_same_interval():
    assert mean_interval([0.0, 1.0, 1.0]) == mean_interval([0.0, 1.0, 1.0])
    same = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)
