"""Fits recover the constants of the published curve and of planted ones."""

import numpy as np
import pytest

from synth.theory.fit import PUBLISHED, Curve, bootstrap, choose_exponentials, fit_exponentials, fit_log


def test_the_published_curve_has_its_values():
    values = PUBLISHED(np.array([0, 1, 10, 29, 38, 100, 200, 455, 1000]))
    expected = [38.31, 42.92, 48.03, 50.79, 51.15, 52.15, 53.44, 56.16, 59.94]
    assert values == pytest.approx(expected, abs=0.006)


def test_the_published_constants_come_back_from_points_of_the_curve():
    x = np.concatenate([np.linspace(0, 4, 9), np.linspace(5, 40, 12), np.linspace(60, 2000, 20)])
    found = choose_exponentials(x, PUBLISHED(x))
    assert len(found.r) == 3
    assert found.a == pytest.approx(PUBLISHED.a, rel=1e-3)
    assert found.b == pytest.approx(PUBLISHED.b, rel=1e-2)
    assert found.r == pytest.approx(PUBLISHED.r, rel=1e-2)


def test_one_planted_rate_is_chosen_as_one_term():
    x = np.linspace(0, 50, 25)
    noise = np.random.default_rng(1).normal(0, 0.05, len(x))
    found = choose_exponentials(x, Curve(a=60.0, b=(20.0,), r=(0.9,))(x) + noise)
    assert len(found.r) == 1
    assert found.r[0] == pytest.approx(0.9, rel=0.05)
    assert found.a == pytest.approx(60.0, rel=0.05)


def test_a_log_line_comes_back():
    x = np.array([1.0, 4.0, 16.0, 64.0])
    assert fit_log(x, 3.0 + 2.0 * np.log(x)) == pytest.approx((3.0, 2.0))


def test_the_band_holds_the_planted_curve():
    x = np.linspace(0, 40, 12)
    planted = Curve(a=60.0, b=(20.0,), r=(0.9,))
    runs = planted(x) + np.random.default_rng(2).normal(0, 1.0, (6, len(x)))
    low, high = bootstrap(x, runs, np.array([20.0]), lambda a, b: fit_exponentials(a, b, 1, num_starts=1))
    assert low[0] <= planted(20.0) <= high[0]


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="need at least 5 points"):
        fit_exponentials(np.arange(4.0), np.arange(4.0), 2)
