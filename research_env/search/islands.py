"""Islands with MAP-Elites cells: several populations that rarely meet, each keeping the best of every kind of change.

A cell is (size of the change, which files it touches), in ten bins each. Parents are drawn by sigmoid-weighted rank.
Values after ShinkaEvolve and OpenEvolve: 4 islands, 10 % migrate every 10 generations.
"""

import math
import random
from collections.abc import Sequence

from pretrain.config import stable_seed
from research_env.novelty import changed_lines
from research_env.search.proposal import Proposal, Told

NUM_BINS = 10
RANK_SHARPNESS = 10.0


def cell_of(diff: str) -> tuple[int, int]:
    """(bin of the number of changed lines on a log scale, bin of the set of touched files)."""
    num_lines = changed_lines(diff).count("\n")
    files = sorted(line[6:] for line in diff.split("\n") if line.startswith("+++ b/"))
    return min(NUM_BINS - 1, int(math.log2(1 + num_lines))), stable_seed(*files) % NUM_BINS


class Islands:
    """Wishes go round the islands; each island exploits its elites, and explores while it has none."""

    name = "islands"

    def __init__(
        self, seed: int, *, num_islands: int = 4, migrate_every: int = 10, migrate_share: float = 0.1
    ):
        self._seed, self._migrate_every, self._migrate_share = seed, migrate_every, migrate_share
        self._islands: list[dict[tuple[int, int], Told]] = [{} for _ in range(num_islands)]
        self._count = 0
        self._generation = 0

    def elites(self, island: int) -> list[Told]:
        """The best of each cell of an island, best first."""
        return sorted(self._islands[island].values(), key=lambda item: (-(item.gain or 0.0), item.node.id))

    def ask(self, count: int) -> list[Proposal]:
        """The next wishes, one island after another."""
        proposals = []
        for _ in range(count):
            island = self._count % len(self._islands)
            key = f"{self.name}/{self._seed}/{island}/{self._count}"
            rng = random.Random(stable_seed(self._seed, key))
            self._count += 1
            elites = self.elites(island)
            if not elites or rng.random() < 0.2:
                proposals.append(Proposal(key=key, kind="explore"))
                continue
            base = self._draw(elites, rng)
            others = tuple(item.node.id for item in elites if item is not base)
            proposals.append(Proposal(key=key, kind="exploit", base=base.node.id, others=others[:3]))
        return proposals

    @staticmethod
    def _draw(elites: Sequence[Told], rng: random.Random) -> Told:
        middle = (len(elites) - 1) / 2
        span = max(1, len(elites) - 1)
        weights = [
            1.0 / (1.0 + math.exp(-RANK_SHARPNESS * (middle - rank) / span)) for rank in range(len(elites))
        ]
        return rng.choices(list(elites), weights)[0]

    def tell(self, told: Sequence[Told]) -> None:
        """Put each success into its island's cell if it beats the holder; migrate when it is time."""
        for item in told:
            if item.gain is None:
                continue
            island = int(item.proposal.key.split("/")[2])
            self._keep(island, item)
        self._generation += 1
        if self._generation % self._migrate_every == 0:
            best = [self.elites(i) for i in range(len(self._islands))]
            for i, elites in enumerate(best):
                for item in elites[: math.ceil(self._migrate_share * len(elites))]:
                    self._keep((i + 1) % len(self._islands), item)

    def _keep(self, island: int, item: Told) -> None:
        cell = cell_of(item.node.diff)
        holder = self._islands[island].get(cell)
        if holder is None or (item.gain or 0.0) > (holder.gain or 0.0):
            self._islands[island][cell] = item
