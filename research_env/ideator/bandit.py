"""Which model has the next idea: UCB1 (Auer et al. 2002) on improvements per dollar.

The reward of an idea is 1 when it screened better than the baseline, else 0. A model's mean is divided by its relative price
to the power `cost_weight`, so that a model at ten times the price must be that much better only if the weight is 1.
"""

import math
from collections.abc import Sequence


class Bandit:
    """Its state is what it was told, in order."""

    def __init__(self, prices: Sequence[float], *, cost_weight: float = 0.0, exploration: float = 0.5):
        cheapest = min((price for price in prices if price > 0), default=1.0)
        self._discounts = [max(price / cheapest, 1.0) ** -cost_weight for price in prices]
        self._exploration = exploration
        self._counts = [0] * len(prices)
        self._pending = [0] * len(prices)
        self._sums = [0.0] * len(prices)

    def choose(self) -> int:
        """The arm with the largest upper bound; one that was never tried comes first. Counts as tried at once."""
        tried = [count + pending for count, pending in zip(self._counts, self._pending, strict=True)]
        total = sum(tried)

        def bound(arm: int) -> float:
            if tried[arm] == 0:
                return math.inf
            mean = self._sums[arm] / max(self._counts[arm], 1)
            return self._discounts[arm] * mean + self._exploration * math.sqrt(
                math.log(total + 1) / tried[arm]
            )

        arm = max(range(len(tried)), key=lambda i: (bound(i), -i))
        self._pending[arm] += 1
        return arm

    def tell(self, arm: int, reward: float) -> None:
        """An idea of this arm was worth that much, in [0, 1]."""
        self._pending[arm] -= 1
        self._counts[arm] += 1
        self._sums[arm] += reward
