"""Greedy: one parent; change it, keep the change when it is a real gain, else go back."""

from collections.abc import Callable, Sequence

from research_env.search.proposal import Proposal, Told


class Greedy:
    """`is_real(parent id, told)` decides whether a screened gain over the parent is kept: the promotion rule, or a margin."""

    name = "greedy"

    def __init__(self, seed: int, is_real: Callable[[str, Told], bool]):
        self._seed, self._is_real, self._count = seed, is_real, 0
        self._parent, self._gain = "", 0.0

    @property
    def parent(self) -> str:
        """The node that the next ideas change."""
        return self._parent

    def ask(self, count: int) -> list[Proposal]:
        """`count` changes of the current parent."""
        first = self._count
        self._count += count
        keys = [f"{self.name}/{self._seed}/{i}" for i in range(first, first + count)]
        kind = "exploit" if self._parent else "explore"
        return [Proposal(key=key, kind=kind, base=self._parent) for key in keys]

    def tell(self, told: Sequence[Told]) -> None:
        """Move to the best of the batch if it really beats the parent."""
        better = [item for item in told if item.gain is not None and item.gain > self._gain]
        for item in sorted(better, key=lambda item: -(item.gain or 0.0)):
            if self._is_real(self._parent, item):
                assert item.gain is not None
                self._parent, self._gain = item.node.id, item.gain
                return
