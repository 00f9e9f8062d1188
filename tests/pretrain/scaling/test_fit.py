"""Fits: planted constants come back, intervals cover them, and data that do not support a fit are said not to."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.scaling.cells import Columns
from pretrain.scaling.fit import (
    FitConfig,
    fit,
    left_out_error,
    misfit,
    noise_sigma,
    optimal_params,
    optimal_share,
)
from pretrain.scaling.laws import LAWS, effective_tokens

# Near the constants of Besiroglu et al. (arXiv 2404.10102).
PLANTED = {"alpha": 0.348, "beta": 0.366, "E": 1.82, "A": 482.0, "B": 2085.0}
QUICK = FitConfig(num_bootstrap=60)


def ladder(budgets=6, sizes=7):
    """Sizes a factor 16 apart, centered where D = 20 N, at budgets from 1e17 to 1e20."""
    params = np.concatenate(
        [(c / 120) ** 0.5 * 4 ** np.linspace(-1, 1, sizes) for c in np.geomspace(1e17, 1e20, budgets)]
    )
    flops = np.repeat(np.geomspace(1e17, 1e20, budgets), sizes)
    tokens = flops / 6 / params
    return Columns(params, tokens, tokens, np.ones(len(params)))


def planted(design, law="chinchilla", noise=0.0, seed=0, **values):
    law = LAWS[law]
    vector = np.array([{**PLANTED, **values}[name] for name in law.names])
    rng = np.random.default_rng(seed)
    return design.with_loss(law.loss(vector, design) * (1 + noise * rng.standard_normal(len(design))))


def repeated(design, epochs):
    """The largest D of the design at each of these epochs."""
    n, d = float(np.median(design.params)), float(np.median(design.tokens))
    more = np.array(epochs, float)
    return Columns(
        np.concatenate([design.params, np.full(len(more), n)]),
        np.concatenate([design.tokens, np.full(len(more), d)]),
        np.concatenate([design.unique, d / more]),
        np.ones(len(design) + len(more)),
    )


def test_without_noise_the_planted_constants_come_back():
    found = fit("chinchilla", planted(ladder()), FitConfig(num_bootstrap=20))
    for name, value in PLANTED.items():
        assert found.values[name] == pytest.approx(value, rel=1e-6)
    assert found.doubts == ()


def test_with_noise_the_planted_constants_lie_in_the_stated_intervals():
    found = fit("chinchilla", planted(ladder(), noise=0.002, seed=1), QUICK)
    for name, value in PLANTED.items():
        assert value in found.intervals[name], name
    assert found.sigma == pytest.approx(0.002, rel=0.4)


def test_an_outlier_does_not_move_the_fit():
    cells = planted(ladder(), noise=0.001)
    loss = cells.loss.copy()
    loss[10] *= 1.3
    found = fit("chinchilla", cells.with_loss(loss), FitConfig(num_bootstrap=20))
    assert found.values["alpha"] == pytest.approx(PLANTED["alpha"], rel=0.05)
    assert found.values["E"] == pytest.approx(PLANTED["E"], rel=0.02)


def test_a_larger_run_is_predicted_within_the_interval_of_one_run():
    found = fit("chinchilla", planted(ladder(), noise=0.003, seed=2), QUICK)
    n = np.array([(4e20 / 120) ** 0.5])
    at = Columns(n, 20 * n, 20 * n, np.ones(1))
    truth = planted(at).loss[0]
    assert found.loss(at)[0] == pytest.approx(truth, rel=0.01)
    (prediction,), (band,) = found.prediction(at), found.band(at)
    assert truth in prediction
    assert prediction.high - prediction.low > band.high - band.low


@settings(max_examples=25)
@given(tokens=st.floats(1e3, 1e9), unique=st.floats(1e3, 1e9), half_life=st.floats(0.5, 100))
def test_repeated_tokens_are_worth_less_than_new_and_more_than_none(tokens, unique, half_life):
    unique = min(unique, tokens)
    worth = float(effective_tokens(np.array([tokens]), np.array([unique]), half_life)[0])
    assert unique * (1 - 1e-9) <= worth <= tokens * (1 + 1e-9)
    assert worth <= unique * (1 + half_life) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("law", "name", "value"), [("effective_data", "R_star", 12.0), ("penalty", "P", 2e-4)]
)
def test_the_repetition_laws_find_their_planted_constant(law, name, value):
    design = repeated(ladder(budgets=4, sizes=5), [1, 2, 4, 8, 16, 32, 64])
    found = fit(law, planted(design, law, noise=0.001, **{name: value}), FitConfig(num_bootstrap=40))
    assert value in found.intervals[name]
    assert found.values[name] == pytest.approx(value, rel=0.25)


def test_the_wrong_repetition_law_leaves_larger_residuals():
    design = repeated(ladder(budgets=4, sizes=5), [1, 2, 4, 8, 16, 32, 64])
    cells = planted(design, "penalty", P=1e-3)
    few = FitConfig(num_bootstrap=20)
    assert fit("penalty", cells, few).sigma < 0.1 * fit("effective_data", cells, few).sigma
    most = cells.tokens / cells.unique > 20
    errors = {law: left_out_error(law, cells, most) for law in ("penalty", "effective_data", "chinchilla")}
    assert errors["penalty"] < 0.1 * min(errors["effective_data"], errors["chinchilla"])


def test_fewer_cells_than_parameters_are_refused():
    few = planted(ladder()).take(np.arange(5))
    with pytest.raises(ConfigError, match="more cells than its 5 parameters, got 5"):
        fit("chinchilla", few, QUICK)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("column", ["params", "tokens", "unique", "loss"])
def test_cells_that_are_no_numbers_are_refused_by_name(column, bad):
    cells = planted(ladder())
    broken = getattr(cells, column).copy()
    broken[3] = bad
    with pytest.raises(
        ConfigError, match=f"{column} of a cell must be positive and finite, got .* in cell 3"
    ):
        fit("chinchilla", dataclasses.replace(cells, **{column: broken}), QUICK)


def test_one_budget_is_told():
    n = np.geomspace(1e7, 1e9, 8)
    d = 1e18 / 6 / n
    doubts = fit(
        "chinchilla", planted(Columns(n, d, d, np.ones(8)), noise=0.001), FitConfig(num_bootstrap=20)
    ).doubts
    assert any("N falls as D rises in all cells, as at one budget" in doubt for doubt in doubts)
    assert not any("rise together" in doubt for doubt in doubts)


def test_seeds_that_agree_to_the_last_digit_are_no_division_by_zero():
    cells = planted(ladder()).take(np.repeat(np.arange(42), 2))
    bent = cells.with_loss(np.round(cells.loss * (1 + 0.02 * np.sin(3 * np.log(cells.params))), 6))
    assert noise_sigma(bent) == (0.0, 42)
    assert "misses something" in (misfit(fit("chinchilla", bent, FitConfig(num_bootstrap=20)), bent) or "")


def test_sizes_and_tokens_that_rise_together_are_told():
    n = np.geomspace(1e6, 1e9, 12)
    line = Columns(n, 20 * n, 20 * n, np.ones(12))
    doubts = fit("chinchilla", planted(line, noise=0.002), FitConfig(num_bootstrap=20)).doubts
    assert any("rise together" in doubt for doubt in doubts)


def test_one_size_only_is_told():
    d = np.geomspace(1e8, 1e10, 12)
    cells = planted(Columns(np.full(12, 1e8), d, d, np.ones(12)), noise=0.001)
    doubts = fit("chinchilla", cells, FitConfig(num_bootstrap=20)).doubts
    assert any("parameters N take 1 values" in doubt for doubt in doubts)


def test_noise_that_drowns_the_exponents_is_told():
    doubts = fit("chinchilla", planted(ladder(budgets=2, sizes=5), noise=0.2, seed=3), QUICK).doubts
    assert any("alpha" in doubt or "beta" in doubt for doubt in doubts)


def test_a_law_of_the_wrong_shape_is_told_when_seeds_say_how_large_noise_is():
    design = ladder(budgets=4, sizes=5)
    thrice = design.take(np.repeat(np.arange(len(design)), 3))
    rng = np.random.default_rng(0)
    bent = 1 + 0.02 * np.sin(3 * np.log(thrice.params))
    quiet = 1 + 0.0005 * rng.standard_normal(len(thrice))
    wrong = thrice.with_loss(planted(thrice).loss * bent * quiet)
    right = thrice.with_loss(planted(thrice).loss * quiet)
    few = FitConfig(num_bootstrap=20)
    assert "misses something" in (misfit(fit("chinchilla", wrong, few), wrong) or "")
    assert misfit(fit("chinchilla", right, few), right) is None
    assert noise_sigma(right)[0] == pytest.approx(0.0005, rel=0.3)


def test_the_optimum_is_where_the_law_is_lowest():
    found = fit("chinchilla", planted(ladder()), FitConfig(num_bootstrap=20))
    best = optimal_params(found.values, 1e19)
    sizes = best * np.array([0.9, 1.0, 1.1])
    at = Columns(sizes, 1e19 / 6 / sizes, 1e19 / 6 / sizes, np.ones(3))
    assert int(np.argmin(found.loss(at))) == 1
    share, _ = optimal_share(found)
    assert best / optimal_params(found.values, 1e18) == pytest.approx(10**share)


@pytest.mark.slow
def test_ninety_percent_intervals_cover_the_planted_constants():
    """40 repeats, five constants; a share of 0.9 of 40 has a standard error of 0.05, the bound is the design's."""
    hits = []
    for repeat in range(40):
        cells = planted(ladder(), noise=0.002, seed=1000 + repeat)
        found = fit("chinchilla", cells, FitConfig(num_bootstrap=100, seed=repeat))
        hits.append([PLANTED[name] in found.intervals[name] for name in PLANTED])
    assert np.mean(hits) >= 0.85, np.mean(hits, axis=0)
