"""Parabolas find an interior minimum, and refuse where there is none."""

import numpy as np
import pytest

from pretrain.scaling.cells import LADDER, Cell
from pretrain.scaling.isoflop import optimum_exponent, parabola, parabolas


def cells_at(budget, sizes, lowest, seed=0):
    return [
        Cell(
            name=f"{budget}-{n}", role=LADDER, params=int(n), params_total=int(n), tokens=int(budget / 6 / n),
            unique_tokens=10**15, flops=budget, budget_flops=budget, seed=seed,
            loss=float(2.0 + 0.1 * np.log(n / lowest) ** 2),
        )
        for n in sizes
    ]  # fmt: skip


def test_the_minimum_of_an_exact_parabola_is_found():
    found = parabola(1e12, cells_at(1e12, [1e5, 2e5, 4e5, 8e5, 16e5], 3.3e5))
    assert found.params == pytest.approx(3.3e5, rel=1e-4)
    assert found.loss == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("sizes", "lowest", "reason"),
    [
        ([1e5, 2e5, 4e5, 8e5], 1e7, "not interior, it lies at the largest"),
        ([1e5, 2e5, 4e5, 8e5], 1e4, "not interior, it lies at the smallest"),
        ([1e5, 2e5, 4e5], 2e5, "3 sizes"),
    ],
)
def test_a_budget_without_an_interior_minimum_is_refused(sizes, lowest, reason):
    found = parabola(1e12, cells_at(1e12, sizes, lowest))
    assert found.params is None
    assert reason in found.refused


def test_the_exponent_of_the_optimum_comes_from_the_minima():
    sizes = np.geomspace(1e5, 1e7, 9)
    cells = [c for b in (1e12, 4e12, 16e12) for c in cells_at(b, sizes, 1e6 * (b / 4e12) ** 0.4)]
    assert optimum_exponent(parabolas(cells)) == pytest.approx(0.4, abs=1e-3)
    assert optimum_exponent(parabolas(cells_at(1e12, sizes, 1e6))) is None
