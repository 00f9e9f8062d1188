"""The effective compute multiplier of a change is the factor that was planted."""

import dataclasses

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.scaling.cells import LADDER, Cell, columns
from pretrain.scaling.compare import LIMITS, compute_multiples, multiplier
from pretrain.scaling.fit import FitConfig, fit

E, A, B, ALPHA, BETA = 1.8, 480.0, 2000.0, 0.35, 0.37


def cell(n, d, *, role=LADDER, gain=1.0, noise=0.0, seed=0):
    """A cell whose recipe makes `gain` times the compute out of what it gets."""
    scale = gain**0.5
    loss = E + A * (n * scale) ** -ALPHA + B * (d * scale) ** -BETA
    return Cell(
        name=f"{role}-{n:.0f}-{seed}", role=role, params=int(n), params_total=int(n), tokens=int(d), unique_tokens=10**15,
        flops=6 * n * d, budget_flops=6 * n * d, seed=seed, loss=loss * (1 + noise),
    )  # fmt: skip


def base_cells(rng, noise=0.0):
    sizes = np.geomspace(1e7, 1e9, 5)
    return [
        cell(n, c / 6 / n, noise=noise * rng.standard_normal()) for c in (1e18, 4e18, 16e18) for n in sizes
    ]


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.5])
def test_a_planted_gain_is_found(gain):
    rng = np.random.default_rng(0)
    base = base_cells(rng, noise=5e-4)
    changed = [
        cell(c.params, c.tokens, role="arm", gain=gain, noise=5e-4 * rng.standard_normal()) for c in base[:10]
    ]
    found = multiplier("arm", base, changed, fit("chinchilla", columns(base), FitConfig(num_bootstrap=40)))
    assert found.value == pytest.approx(gain, rel=0.1)
    assert gain in found.interval
    assert found.better is {0.7: False, 1.0: None, 1.5: True}[gain]


@pytest.mark.parametrize("num_pairs", [2, 6])
def test_intervals_of_few_pairs_cover_the_planted_gain(num_pairs):
    """A share of 0.9 of 100 has a standard error of 0.03; percentiles of means of so few pairs covered 0.6."""
    rng = np.random.default_rng(0)
    exact = base_cells(rng)
    law = fit("chinchilla", columns(exact), FitConfig(num_bootstrap=40))
    hits = []
    for _ in range(100):
        base = [dataclasses.replace(c, loss=c.loss * (1 + 2e-3 * rng.standard_normal())) for c in exact]
        changed = [
            cell(c.params, c.tokens, role="arm", gain=1.3, noise=2e-3 * rng.standard_normal())
            for c in base[:num_pairs]
        ]
        hits.append(1.3 in multiplier("arm", base, changed, law).interval)
    assert 0.83 <= np.mean(hits) <= 0.97


def test_a_cell_that_follows_the_law_needs_its_own_compute():
    base = base_cells(np.random.default_rng(0))
    found = fit("chinchilla", columns(base), FitConfig(num_bootstrap=20))
    losses = np.array([c.loss for c in base])
    assert compute_multiples(found.vector, found, base, losses) == pytest.approx(np.ones(len(base)), rel=1e-3)
    assert compute_multiples(found.vector, found, base[:2], np.array([1.0, 50.0])).tolist() == [np.inf, 0.0]


def test_a_loss_below_the_floor_of_the_law_has_a_bound_on_one_side_only():
    base = base_cells(np.random.default_rng(0))
    found = fit("chinchilla", columns(base), FitConfig(num_bootstrap=20))
    changed = [dataclasses.replace(c, role="arm", loss=1.0) for c in base[:3]]
    wonder = multiplier("arm", base, changed, found)
    assert wonder.better
    assert wonder.interval.high == LIMITS[1]
    assert "3 of 3 pairs lie beyond what the law can say" in wonder.doubt


def test_base_runs_below_the_floor_say_nothing_about_the_change():
    exact = base_cells(np.random.default_rng(0))
    found = fit("chinchilla", columns(exact), FitConfig(num_bootstrap=20))
    base = [dataclasses.replace(c, loss=1.0) for c in exact[:3]]
    silent = multiplier("arm", base, [dataclasses.replace(c, role="arm", loss=0.9) for c in base], found)
    assert silent.better is None
    assert (silent.interval.low, silent.interval.high) == LIMITS
    assert np.isfinite(silent.value)


def test_an_arm_without_pairs_is_refused():
    base = base_cells(np.random.default_rng(0))
    found = fit("chinchilla", columns(base), FitConfig(num_bootstrap=20))
    with pytest.raises(ConfigError, match="at least two cells"):
        multiplier("arm", base, [cell(123, 456, role="arm")], found)
