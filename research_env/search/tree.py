"""Tree search after AIDE: draft, debug what failed, improve what works, best first.

5 drafts, debugging with probability one half and at most 3 deep; the node to improve is drawn by UCT on shrunken gains.
"""

import math
import random
from collections.abc import Callable, Sequence

from pretrain.config import stable_seed
from research_env.search.proposal import Proposal, Told


class Tree:
    """`shrink(gain)` turns a screened gain into its posterior mean, so that luck does not steer the tree."""

    name = "tree"

    def __init__(
        self,
        seed: int,
        shrink: Callable[[float], float],
        *,
        num_drafts: int = 5,
        debug_probability: float = 0.5,
        max_debug_depth: int = 3,
        exploration: float = 0.5,
    ):
        self._seed, self._shrink = seed, shrink
        self._num_drafts, self._debug_probability = num_drafts, debug_probability
        self._max_debug_depth, self._exploration = max_debug_depth, exploration
        self._count = 0
        self._good: dict[str, float] = {}
        self._failed: dict[str, int] = {}  # repairable failures that wait for a repair, with their depth
        self._visits: dict[str, int] = {}
        self._depth: dict[str, int] = {}  # wish key -> depth of the failure that it repairs

    def ask(self, count: int) -> list[Proposal]:
        """Drafts first, then repairs or improvements."""
        proposals = []
        for _ in range(count):
            key = f"{self.name}/{self._seed}/{self._count}"
            rng = random.Random(stable_seed(self._seed, key))
            self._count += 1
            if self._count <= self._num_drafts or not (self._good or self._failed):
                proposals.append(Proposal(key=key, kind="explore"))
            elif self._failed and (not self._good or rng.random() < self._debug_probability):
                base = rng.choice(sorted(self._failed))
                self._depth[key] = self._failed.pop(base)
                proposals.append(Proposal(key=key, kind="debug", base=base))
            else:
                base = self._best()
                self._visits[base] = self._visits.get(base, 0) + 1
                proposals.append(Proposal(key=key, kind="exploit", base=base))
        return proposals

    def _best(self) -> str:
        total = sum(self._visits.values()) + 1
        scale = max((abs(value) for value in self._good.values()), default=1.0) or 1.0

        def score(node: str) -> tuple[float, str]:
            bonus = self._exploration * math.sqrt(math.log(total + 1) / (1 + self._visits.get(node, 0)))
            return self._good[node] / scale + bonus, node

        return max(self._good, key=score)

    def tell(self, told: Sequence[Told]) -> None:
        """Successes may be improved, repairable failures may be repaired."""
        for item in told:
            if item.gain is not None:
                self._good[item.node.id] = self._shrink(item.gain)
            elif item.result.status.is_repairable:
                depth = self._depth.get(item.proposal.key, 0) + 1
                if depth <= self._max_debug_depth:
                    self._failed[item.node.id] = depth
