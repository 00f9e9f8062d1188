"""IsoFLOP parabolas: a picture of where the optimum lies, and a diagnostic beside the fitted law, never the estimate.

A parabola in log N through the losses at one budget is biased even without noise, because the true curve is not
symmetric and sizes are not centered (arXiv 2603.22339). A budget whose lowest loss is at its smallest or largest
size, or whose parabola opens downward, has no interior minimum: refused, with the reason.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pretrain.scaling.cells import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """One budget. `params` and `loss` are those of the minimum, None with `refused` saying why."""

    budget_flops: float
    params: float | None
    loss: float | None
    refused: str = ""


def parabola(budget_flops: float, cells: Sequence[Cell]) -> Parabola:
    """The minimum over N at one budget; seeds of a size are averaged."""

    def no(reason: str) -> Parabola:
        return Parabola(budget_flops=budget_flops, params=None, loss=None, refused=reason)

    by_size: dict[int, list[float]] = {}
    for cell in cells:
        by_size.setdefault(cell.params, []).append(cell.loss)
    sizes = sorted(by_size)
    if len(sizes) < 4:
        return no(f"{len(sizes)} sizes; a parabola with a check needs 4")
    losses = [float(np.mean(by_size[n])) for n in sizes]
    x = np.log(sizes)
    center = x.mean()
    a, b, c = np.polyfit(x - center, losses, 2)
    if a <= 0:
        return no("the parabola opens downward")
    lowest = -b / (2 * a) + center
    if not x[1] <= lowest <= x[-2] or int(np.argmin(losses)) in (0, len(sizes) - 1):
        end = "smallest" if losses[0] < losses[-1] else "largest"
        return no(f"the minimum is not interior, it lies at the {end} size")
    return Parabola(budget_flops=budget_flops, params=float(np.exp(lowest)), loss=float(c - b * b / (4 * a)))


def parabolas(cells: Sequence[Cell]) -> list[Parabola]:
    """One for each budget, smallest first."""
    budgets = sorted({cell.budget_flops for cell in cells})
    return [parabola(budget, [c for c in cells if c.budget_flops == budget]) for budget in budgets]


def optimum_exponent(found: Sequence[Parabola]) -> float | None:
    """a of N* ~ C^a through the minima of at least two budgets."""
    points = [(p.budget_flops, p.params) for p in found if p.params is not None]
    if len(points) < 2:
        return None
    budgets, params = np.log(np.array(points, float)).T
    return float(np.polyfit(budgets, params, 1)[0])
