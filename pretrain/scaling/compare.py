"""The effective compute multiplier of a change: how much more compute the base recipe needs for the same loss.

One loss difference depends on where it was measured; a multiplier is comparable over scales. For each cell the base
law is solved for the k at which (N sqrt(k), D sqrt(k)) has a given loss. Changed and base run of one cell are solved
both and their ratio is taken, so that what the law misses at this cell cancels.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pretrain.config import ConfigError
from pretrain.scaling.cells import Cell, columns
from pretrain.scaling.fit import Fit, Interval

_MAX_LOG = math.log(1e4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplier:
    """`value` 1.2: the base recipe needs 1.2 times the compute. `cells` are (name, multiplier) of each pair."""

    arm: str
    value: float
    interval: Interval
    cells: tuple[tuple[str, float], ...]

    @property
    def better(self) -> bool | None:
        """Whether the change helps; None when the interval holds 1."""
        return None if 1.0 in self.interval else self.value > 1.0


def compute_multiple(law_values: np.ndarray, found: Fit, cell: Cell, loss: float) -> float:
    """k at which the law at (N sqrt(k), D sqrt(k)) is `loss`; infinite below its floor."""
    at = columns([cell])

    def excess(log_k: float) -> float:
        scale = math.exp(log_k / 2)
        moved = dataclasses.replace(
            at, params=at.params * scale, tokens=at.tokens * scale, unique=at.unique * scale
        )
        return float(found.law.loss(law_values, moved)[0]) - loss

    low, high = -_MAX_LOG, _MAX_LOG
    if excess(high) > 0:
        return math.inf
    if excess(low) < 0:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def multiplier(arm: str, base: Sequence[Cell], changed: Sequence[Cell], found: Fit) -> Multiplier:
    """Geometric mean over the pairs of cells, with an interval over pairs and over the fits of the law.

    Raises:
      ConfigError: fewer than two pairs of equal size, steps and seed.
    """
    of_base = {(c.params, c.tokens, c.seed): c for c in base}
    pairs = [(of_base[key], c) for c in changed if (key := (c.params, c.tokens, c.seed)) in of_base]
    if len(pairs) < 2:
        raise ConfigError(f"arm {arm} needs at least two cells that the base has too, got {len(pairs)}")

    def logs(values: np.ndarray) -> np.ndarray:
        ratios = [
            compute_multiple(values, found, b, c.loss) / max(compute_multiple(values, found, b, b.loss), 1e-4)
            for b, c in pairs
        ]
        return np.log(np.clip(ratios, 1e-4, 1e4))

    here = logs(found.vector)
    rng = np.random.default_rng(found.seed)
    # A fifth of the samples of the law is enough: the scatter between pairs dominates.
    draws = [logs(sample)[rng.integers(0, len(pairs), len(pairs))].mean() for sample in found.samples[::5]]
    spread = np.array(draws) - np.mean(draws)
    # Means of few pairs: the plain bootstrap is too narrow by sqrt((n - 1) / n).
    spread *= math.sqrt(len(pairs) / (len(pairs) - 1))
    tail = (1 - found.confidence) / 2
    low, high = np.quantile(here.mean() + spread, [tail, 1 - tail])
    return Multiplier(
        arm=arm,
        value=float(np.exp(here.mean())),
        interval=Interval(float(np.exp(low)), float(np.exp(high))),
        cells=tuple((c.name, float(np.exp(x))) for (_, c), x in zip(pairs, here, strict=True)),
    )
