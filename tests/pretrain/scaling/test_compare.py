"""The effective compute multiplier of a change is the factor that was planted."""

import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.scaling.cells import LADDER, Cell, columns
from pretrain.scaling.compare import compute_multiple, multiplier
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


def test_a_cell_that_follows_the_law_needs_its_own_compute():
    base = base_cells(np.random.default_rng(0))
    found = fit("chinchilla", columns(base), FitConfig(num_bootstrap=20))
    assert compute_multiple(found.vector, found, base[3], base[3].loss) == pytest.approx(1.0, rel=1e-3)
    assert compute_multiple(found.vector, found, base[3], 1.0) == np.inf


def test_an_arm_without_pairs_is_refused():
    base = base_cells(np.random.default_rng(0))
    found = fit("chinchilla", columns(base), FitConfig(num_bootstrap=20))
    with pytest.raises(ConfigError, match="at least two cells"):
        multiplier("arm", base, [cell(123, 456, role="arm")], found)
