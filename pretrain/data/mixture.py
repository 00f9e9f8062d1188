"""The mixture: (seed, slot) -> (source, row), a pure function of the plan.

Slots are the rows of training in order: slot = step * batch_rows + place in the batch. They are planned in blocks
of 2,048, cut where a stage starts. In a block each source gets the rows it is owed so far, by largest remainder
on the cumulative target, so a source is never more than one row off its share; the order inside a block is a
seeded permutation. Element k of a source is row k mod n of a permutation drawn anew for every epoch. A source at
its epoch cap gives its weight to the others, pro rata.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import grain.python as grain
import numpy as np

from pretrain.config import ConfigError, stable_seed

BLOCK_ROWS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """From `start_step` on, sources are drawn in proportion to `weights`; those not named are not drawn."""

    start_step: int
    weights: dict[str, float]

    def __post_init__(self):
        faults = []
        if self.start_step < 0:
            faults.append(f"start_step must not be negative, got {self.start_step}")
        if any(not weight >= 0 for weight in self.weights.values()) or not sum(self.weights.values()) > 0:
            faults.append(f"weights must not be negative and one must be positive, got {self.weights}")
        if faults:
            raise ValueError("\n".join(faults))


class MixturePlan:
    """Which row fills each slot of a run.

    Args:
      num_rows: rows in the table of each source.
      stages: in order of their first step; the first starts at step 0.
      max_epochs: how often a source may be repeated at most; absent or None: no cap.

    Raises:
      ConfigError: stages are out of order or name unknown sources, or the caps leave no row for some step (names
        the last step that can be filled).
    """

    def __init__(
        self,
        num_rows: Mapping[str, int],
        stages: Sequence[MixtureStage],
        *,
        num_steps: int,
        batch_rows: int,
        seed: int,
        max_epochs: Mapping[str, float | None] | None = None,
    ):
        self.names = tuple(num_rows)
        self._batch_rows, self._seed = batch_rows, seed
        _check_stages(self.names, stages)
        limits = {n: (max_epochs or {}).get(n) for n in self.names}
        caps = np.array([np.inf if limits[n] is None else np.floor(limits[n] * num_rows[n]) for n in self.names])
        self._plan_blocks(stages, caps, num_steps * batch_rows)
        self._orders = [
            grain.MapDataset.range(num_rows[n]).shuffle(seed=stable_seed(seed, "rows", n) % 2**32) for n in self.names
        ]
        self._members = functools.lru_cache(maxsize=64)(self._block_members)

    def _plan_blocks(self, stages: Sequence[MixtureStage], caps: np.ndarray, num_slots: int) -> None:
        starts, counts = [], []
        given = np.zeros(len(self.names))
        firsts = [s.start_step * self._batch_rows for s in stages] + [num_slots]
        for stage, first, end in zip(stages, firsts, firsts[1:], strict=False):
            weights = np.array([stage.weights.get(name, 0.0) for name in self.names])
            owed = np.zeros(len(self.names))
            for start in range(first, min(end, num_slots), BLOCK_ROWS):
                size = min(start + BLOCK_ROWS, end, num_slots) - start
                taken = self._fill(size, weights, caps - given, owed, start)
                starts.append(start)
                counts.append(taken)
                given = given + taken
        self._starts = np.array([*starts, num_slots])
        self._counts = np.array(counts, np.int64).reshape(-1, len(self.names))
        self._before = np.vstack([np.zeros((1, len(self.names)), np.int64), np.cumsum(self._counts, axis=0)])

    def _fill(self, size: int, weights: np.ndarray, room: np.ndarray, owed: np.ndarray, start: int) -> np.ndarray:
        """Rows of each source in one block; `owed` (target so far minus rows given) is updated."""
        taken = np.zeros(len(weights))
        left = size
        while left:
            active = (weights > 0) & (room - taken > 0)
            if not active.any():
                step = (start + int(taken.sum())) // self._batch_rows
                raise ConfigError(
                    f"data.sources max_epochs must leave rows for every step, got none after step {step}; raise a "
                    f"max_epochs, or set run.num_steps={step}"
                )
            target = owed + np.where(active, left * weights / weights[active].sum(), 0.0)
            target = np.where(active, target, 0.0)
            counts = _largest_remainder(target, left, active)
            counts = np.minimum(counts, room - taken)
            owed[:] = np.where(counts < room - taken, target - counts, 0.0)
            taken += counts
            left = size - int(taken.sum())
        return taken

    def shares(self) -> dict[str, int]:
        """Rows of each source over the whole run."""
        return dict(zip(self.names, self._before[-1].tolist(), strict=True))

    def slot(self, slot: int) -> tuple[int, int]:
        """(index of the source, row in its table) that fills `slot`."""
        block = int(np.searchsorted(self._starts, slot, side="right")) - 1
        sources, ranks = self._members(block)
        offset = slot - int(self._starts[block])
        source = int(sources[offset])
        k = int(self._before[block, source] + ranks[offset])
        return source, int(self._orders[source][k])

    def _block_members(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and rank within the source for each offset of a block."""
        counts = self._counts[block]
        sources = np.repeat(np.arange(len(counts)), counts)
        order = np.random.default_rng(stable_seed(self._seed, "block", int(self._starts[block]))).permutation(len(sources))
        sources = sources[order]
        ranks = np.empty(len(sources), np.int64)
        for source in range(len(counts)):
            at = sources == source
            ranks[at] = np.arange(int(at.sum()))
        return sources, ranks


def _largest_remainder(target: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
    """Whole numbers near `target` that add up to `size`; ties go to the earlier source."""
    counts = np.where(active, np.maximum(np.floor(target + 1e-9), 0), 0)
    while counts.sum() > size:  # rounding in `owed` can only ever give one row too many
        counts[int(np.argmax(np.where(counts > 0, counts - target, -np.inf)))] -= 1
    order = np.argsort(-np.where(active, target - counts, -np.inf), kind="stable")
    for i in range(int(size - counts.sum())):
        counts[order[i % int(active.sum())]] += 1
    return counts


def _check_stages(names: Sequence[str], stages: Sequence[MixtureStage]) -> None:
    faults = []
    starts = [s.start_step for s in stages]
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        faults.append(f"data.stages must begin at step 0 and rise, got start steps {starts}")
    for i, stage in enumerate(stages):
        unknown = sorted(set(stage.weights) - set(names))
        if unknown:
            faults.append(f"data.stages.{i}.weights must name sources ({', '.join(names)}), got {', '.join(unknown)}")
    if faults:
        raise ConfigError(*faults)
