"""What a search asks for and what it is told: the seam between methods, ideators and the environment."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from research_env.records import Node, Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A wish for one idea. `base` is the node to change ("" is the baseline), `others` are further parents or examples."""

    key: str  # slot in the campaign: everything random about the idea derives from it
    kind: str  # explore, exploit, debug
    base: str = ""
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Told:
    """One finished candidate. `gain` over the baseline is positive when better, None for a failure or an early end.

    The result's seconds are those of all that was run for it: each rung, each attempt that was repaired.
    """

    proposal: Proposal
    node: Node
    result: Result
    gain: float | None


class Search(Protocol):
    """Chooses what to try next; its state is a pure function of its seed and of what it was told, in order."""

    name: str

    def ask(self, count: int) -> list[Proposal]:
        """The next `count` wishes."""
        ...

    def tell(self, told: Sequence[Told]) -> None:
        """The outcomes of the last wishes, in their order (duplicates and budget cuts leave gaps)."""
        ...
