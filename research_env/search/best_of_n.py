"""Best of N: independent ideas on the baseline. The control that every other method is drawn beside.

"Simple Baselines are Competitive with Code Evolution" (arXiv 2602.16805) finds it hard to beat, so it always runs.
"""

from collections.abc import Sequence

from research_env.search.proposal import Proposal, Told


class BestOfN:
    """Every wish is the same: something new on the baseline."""

    name = "best_of_n"

    def __init__(self, seed: int):
        self._seed, self._count = seed, 0

    def ask(self, count: int) -> list[Proposal]:
        """`count` independent explorations."""
        first = self._count
        self._count += count
        return [
            Proposal(key=f"{self.name}/{self._seed}/{i}", kind="explore") for i in range(first, first + count)
        ]

    def tell(self, told: Sequence[Told]) -> None:
        """Nothing is learned: that is the point."""
