"""The effective compute multiplier of a change: how much more compute the base recipe needs for the same loss.

One loss difference depends on where it was measured; a multiplier is comparable over scales. For each cell the base
law is solved for the k at which (N sqrt(k), D sqrt(k)) has a given loss. Changed and base run of one cell are solved
both and their ratio is taken, so that what the law misses at this cell cancels.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from pretrain.config import ConfigError
from pretrain.scaling.cells import Cell, Columns, columns
from pretrain.scaling.fit import Fit, Interval

LIMITS = (1e-4, 1e4)  # of a multiple; beyond them the law says only on which side it lies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplier:
    """`value` 1.2: the base recipe needs 1.2 times the compute. `cells` are (name, multiplier) of each pair.

    Attributes:
      doubt: what the interval cannot be blamed for; empty when there is nothing to say.
    """

    arm: str
    value: float
    interval: Interval
    cells: tuple[tuple[str, float], ...]
    doubt: str = ""

    @property
    def better(self) -> bool | None:
        """Whether the change helps; None when the interval holds 1."""
        return None if 1.0 in self.interval else self.value > 1.0


def compute_multiples(
    law_values: np.ndarray, found: Fit, cells: Sequence[Cell], losses: np.ndarray
) -> np.ndarray:
    """For each cell the k at which the law at (N sqrt(k), D sqrt(k)) is its loss [cell].

    Infinite below the law's floor and above `LIMITS`, zero under them.
    """
    at = columns(cells)

    def excess(log_k: np.ndarray) -> np.ndarray:
        scale = np.exp(log_k / 2)
        moved = Columns(at.params * scale, at.tokens * scale, at.unique * scale, at.loss)
        return found.law.loss(law_values, moved) - losses

    low, high = (np.full(len(at), math.log(limit)) for limit in LIMITS)
    never, always = excess(high) > 0, excess(low) < 0
    for _ in range(60):
        middle = (low + high) / 2
        above = excess(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(never, np.inf, np.where(always, 0.0, np.exp((low + high) / 2)))


def multiplier(arm: str, base: Sequence[Cell], changed: Sequence[Cell], found: Fit) -> Multiplier:
    """Geometric mean over the pairs of cells, with an interval over pairs and over the fits of the law.

    Raises:
      ConfigError: fewer than two pairs of equal size, steps and seed.
    """
    of_base = {(c.params, c.tokens, c.seed): c for c in base}
    pairs = [(of_base[key], c) for c in changed if (key := (c.params, c.tokens, c.seed)) in of_base]
    if len(pairs) < 2:
        raise ConfigError(f"arm {arm} needs at least two cells that the base has too, got {len(pairs)}")
    bases = [b for b, _ in pairs]
    losses = np.array([[pair[i].loss for pair in pairs] for i in (0, 1)])

    def multiples(values: np.ndarray) -> np.ndarray:
        """Of the base runs and of the changed ones, [2, pair]."""
        return np.stack([compute_multiples(values, found, bases, row) for row in losses])

    def logs(both: np.ndarray) -> np.ndarray:
        needed, reached = np.log(np.clip(both, *LIMITS))
        return np.clip(reached - needed, *np.log(LIMITS))

    both = multiples(found.vector)
    here = logs(both)
    rng = np.random.default_rng(found.seed)
    draws = []
    for sample in found.samples:
        ratios = logs(multiples(sample))
        draws.append(ratios[rng.integers(0, len(pairs), len(pairs))].mean())
    tail = (1 - found.confidence) / 2
    # Means of few pairs: the plain bootstrap is too narrow by sqrt((n - 1) / n), and its tails are a normal's.
    spare = len(pairs) - 1
    widening = math.sqrt(len(pairs) / spare) * float(stats.t.ppf(1 - tail, spare) / stats.norm.ppf(1 - tail))
    spread = widening * (np.array(draws) - np.mean(draws))
    low, high = np.exp(np.clip(np.quantile(here.mean() + spread, [tail, 1 - tail]), *np.log(LIMITS)))
    beyond = (both < LIMITS[0]) | (both > LIMITS[1])
    if beyond[0].any() or (both[1] < LIMITS[0]).any():
        low = LIMITS[0]
    if beyond[0].any() or (both[1] > LIMITS[1]).any():
        high = LIMITS[1]
    count = int(beyond.any(axis=0).sum())
    return Multiplier(
        arm=arm,
        value=float(np.exp(here.mean())),
        interval=Interval(float(low), float(high)),
        cells=tuple((c.name, float(np.exp(x))) for (_, c), x in zip(pairs, here, strict=True)),
        doubt=f"{count} of {len(pairs)} pairs lie beyond what the law can say, below its floor or far off its runs"
        if count
        else "",
    )
