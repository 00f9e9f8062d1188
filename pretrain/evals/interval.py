"""Means with bootstrap intervals, and differences paired by item."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pretrain.config import stable_seed

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over items (or a ratio of sums) and the 95% interval of the percentile bootstrap.

    Of a single item low and high are its value, which says nothing: a table takes `interval`.
    """

    value: float
    low: float
    high: float
    items: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None of a single item: nothing is known of how items vary."""
        return (self.low, self.high) if self.items > 1 else None


def mean_interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of `values`; items are resampled."""
    return ratio_interval(values, [1.0] * len(values), seed)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """sum(numerators) / sum(denominators), both of an item resampled together; deterministic in `seed`."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    assert above.shape == below.shape, (above.shape, below.shape)
    assert above.size > 0, "an estimate needs an item"
    random = np.random.default_rng(stable_seed("bootstrap", seed))
    ratios = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):  # one at a time: thousands of items by thousands of resamples would not fit
        drawn = random.integers(0, above.size, above.size)
        ratios[i] = above[drawn].sum() / below[drawn].sum()
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(
        value=float(above.sum() / below.sum()), low=float(low), high=float(high), items=above.size
    )


def paired_difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of after - before, item by item: what varies between items cancels."""
    return mean_interval((np.asarray(after, np.float64) - np.asarray(before, np.float64)).tolist(), seed)
