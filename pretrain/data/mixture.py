"""The mixture: (step, slot) -> (source, element), a pure function of sizes, stages, caps and seed.

Training reads rows 0, 1, 2, ..; step s takes the next `batch_rows` of them. Every source has a target, the
(real) number of rows it is due by row r: it grows with the source's share, shares change where a stage starts
and where a source reaches its epoch cap and leaves its share to the others. Rows are planned in blocks of 2,048,
cut where a stage starts. At each block boundary every source has its target rounded down or up: no source is
ever a row off. Rounding up by the earliest deadline, the row by which the target itself reaches the next
number, makes this possible for any shares (Tijdeman 1980, the chairman assignment problem; deadlines as in
Steiner and Yeomans 1993). Inside a block the order is a seeded permutation.
"""

import bisect
import dataclasses
import functools
import math
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from pretrain.config import ConfigError, stable_seed
from pretrain.data.pack import seeded_order

BLOCK_ROWS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """From `start_step` on, rows are drawn in proportion to `weights`; sources not named are not drawn."""

    start_step: int
    weights: dict[str, float]

    def __post_init__(self):
        faults = []
        if self.start_step < 0:
            faults.append(f"start_step must not be negative, got {self.start_step}")
        values = list(self.weights.values())
        if not all(math.isfinite(w) and w >= 0 for w in values) or not sum(values) > 0:
            faults.append(f"weights must not be negative, and one must be positive, got {self.weights}")
        if faults:
            raise ValueError("\n".join(faults))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStage:
    """From `start_step` on, a batch has `batch_rows` rows."""

    start_step: int
    batch_rows: int

    def __post_init__(self):
        if self.start_step < 0 or self.batch_rows < 1:
            raise ValueError(
                f"start_step must not be negative and batch_rows positive, got {self.start_step} and {self.batch_rows}"
            )


def replay_stages(
    domain: Mapping[str, float], replay: Mapping[str, float], shares: Sequence[tuple[int, float]]
) -> tuple[MixtureStage, ...]:
    """Stages in which `replay` gets a stated share of all rows and `domain` the rest.

    `shares` is ((start_step, share of replay), ..): continued pretraining starts high while the learning rate
    rises, for instance ((0, 0.5), (200, 0.1)). Weights inside each group keep their proportions.
    """
    stages = []
    for start_step, share in shares:
        if not 0 <= share <= 1:
            raise ConfigError(f"a replay share must lie in [0, 1], got {share}")
        weights = {name: (1 - share) * w / sum(domain.values()) for name, w in domain.items()}
        weights.update({name: share * w / sum(replay.values()) for name, w in replay.items()})
        stages.append(MixtureStage(start_step=start_step, weights=weights))
    return tuple(stages)


def check_starts(name: str, starts: Sequence[int]) -> list[str]:
    """Faults of a list of stages: it begins at step 0 and rises."""
    if starts and (starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False))):
        return [f"{name} must begin at start_step 0 and rise, got start steps {', '.join(map(str, starts))}"]
    return []


@dataclasses.dataclass(frozen=True)
class _Target:
    """Targets are linear from row `start` to the next piece: base + share * (row - start)."""

    start: Fraction
    base: tuple[Fraction, ...]
    share: tuple[Fraction, ...]


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows from `start` on: the source of each, and which element of it."""

    start: int
    source_R: np.ndarray
    element_R: np.ndarray


class MixturePlan:
    """Which element of which source fills each slot of each step. Safe to share between threads.

    Args:
      num_rows: rows in the table of each source.
      stages: in order of their first step, beginning at 0; rows are drawn in these proportions.
      batch_stages: rows in a batch, likewise.
      max_epochs: how often the rows of a source may be read at most; absent or None is no cap.
      seed: of the order inside blocks.

    Raises:
      ConfigError: stages do not rise from 0, or give weight to a source that is unknown or has no rows.
    """

    def __init__(
        self,
        num_rows: Mapping[str, int],
        stages: Sequence[MixtureStage],
        *,
        batch_stages: Sequence[BatchStage],
        seed: int,
        max_epochs: Mapping[str, float | None] | None = None,
    ):
        self.names = tuple(num_rows)
        self._seed = seed
        faults = check_starts("data.stages", [stage.start_step for stage in stages])
        faults += check_starts("data.batch_stages", [stage.start_step for stage in batch_stages])
        for stage in stages:
            for name, weight in stage.weights.items():
                if name not in num_rows:
                    faults.append(f"data.stages must weigh the sources {', '.join(self.names)}, got {name!r}")
                elif weight > 0 and not num_rows[name]:
                    faults.append(
                        f"data.stages must weigh sources that have train rows, got {name!r}, which has none"
                    )
        if faults:
            raise ConfigError(*faults)
        self._steps = [stage.start_step for stage in batch_stages]
        self._batch_rows = [stage.batch_rows for stage in batch_stages]
        self._rows = [0]
        for i in range(1, len(batch_stages)):
            self._rows.append(
                self._rows[-1] + (self._steps[i] - self._steps[i - 1]) * self._batch_rows[i - 1]
            )
        self._caps = [
            None if (cap := (max_epochs or {}).get(name)) is None else math.floor(cap * num_rows[name])
            for name in self.names
        ]
        self._stage_rows = [self.first_row(stage.start_step) for stage in stages]
        self._targets, self.num_feasible_rows = self._plan_targets(stages)
        self._block_bases = [0]  # number of blocks before each stage
        for a, b in zip(self._stage_rows, self._stage_rows[1:], strict=False):
            self._block_bases.append(self._block_bases[-1] + -(-(b - a) // BLOCK_ROWS))
        # Counts before each block, made as far as asked: a run does not know how long its schedule will be.
        self._counts: list[tuple[int, ...]] = [(0,) * len(self.names)]
        self._lock = threading.Lock()
        self._block = functools.lru_cache(maxsize=16)(self._make_block)

    # --- steps and rows

    def batch_rows(self, step: int) -> int:
        """Rows in the batch of `step`."""
        return self._batch_rows[bisect.bisect_right(self._steps, step) - 1]

    def first_row(self, step: int) -> int:
        """Rows that all steps before `step` read."""
        i = bisect.bisect_right(self._steps, step) - 1
        return self._rows[i] + (step - self._steps[i]) * self._batch_rows[i]

    @property
    def num_feasible_steps(self) -> int | None:
        """Steps until a batch cannot be filled because of the caps; None when there is no end."""
        if self.num_feasible_rows is None:
            return None
        i = bisect.bisect_right(self._rows, self.num_feasible_rows) - 1
        return self._steps[i] + (self.num_feasible_rows - self._rows[i]) // self._batch_rows[i]

    def check_steps(self, num_steps: int) -> None:
        """Refuse a run that is longer than the caps allow.

        Raises:
          ConfigError: names the last step that can be filled.
        """
        feasible = self.num_feasible_steps
        if feasible is not None and num_steps > feasible:
            caps = ", ".join(
                f"{n}: {c} rows" for n, c in zip(self.names, self._caps, strict=True) if c is not None
            )
            raise ConfigError(
                f"max_epochs of data.sources must leave rows for every step, they end after step {feasible} of "
                f"{num_steps} ({caps}); raise a max_epochs, weigh a source without one, or set run.num_steps={feasible}"
            )

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and element of every slot of `step`: two arrays [B]. Element k is the k-th row drawn of its source.

        Raises:
          ConfigError: the caps leave no rows for this step.
        """
        start, stop = self.first_row(step), self.first_row(step + 1)
        if self.num_feasible_rows is not None and stop > self.num_feasible_rows:
            self.check_steps(step + 1)
        sources, elements = [], []
        while start < stop:
            block = self._block(self._block_of(start))
            part = slice(start - block.start, min(stop - block.start, len(block.source_R)))
            sources.append(block.source_R[part])
            elements.append(block.element_R[part])
            start = block.start + part.stop
        return np.concatenate(sources), np.concatenate(elements)

    def counts(self, step: int) -> dict[str, int]:
        """Rows of each source that all steps before `step` read."""
        row = self.first_row(step)
        if row == 0:
            return dict.fromkeys(self.names, 0)
        block = self._block(self._block_of(row - 1))
        before = self._counts[self._block_of(row - 1)]
        inside = np.bincount(block.source_R[: row - block.start], minlength=len(self.names))
        return {name: before[i] + int(inside[i]) for i, name in enumerate(self.names)}

    # --- targets

    def _plan_targets(self, stages: Sequence[MixtureStage]) -> tuple[list[_Target], int | None]:
        """Pieces of the targets, and the first row that no source may fill (None: there is none)."""
        # Fractions keep the targets exact: their sum over the sources is the row, without rounding.
        reached = [Fraction(0)] * len(self.names)
        targets, row = [], Fraction(0)
        for i, stage in enumerate(stages):
            end = Fraction(self._stage_rows[i + 1]) if i + 1 < len(stages) else None
            weights = [Fraction(str(float(stage.weights.get(name, 0)))) for name in self.names]
            while end is None or row < end:
                active = [
                    w > 0 and (c is None or t < c)
                    for w, c, t in zip(weights, self._caps, reached, strict=True)
                ]
                total = sum((w for w, a in zip(weights, active, strict=True) if a), Fraction(0))
                if not total:
                    return targets, math.floor(row)
                share = tuple(w / total if a else Fraction(0) for w, a in zip(weights, active, strict=True))
                targets.append(_Target(row, tuple(reached), share))
                full = [
                    row + (c - t) / s
                    for c, t, s in zip(self._caps, reached, share, strict=True)
                    if s and c is not None
                ]
                stops = [*full, *([] if end is None else [end])]
                if not stops:
                    return targets, None
                stop = min(stops)
                reached = [t + s * (stop - row) for t, s in zip(reached, share, strict=True)]
                row = stop
        raise AssertionError("the last stage has no end")

    def _target(self, row: int) -> list[Fraction]:
        """Rows each source is due by `row`."""
        piece = self._targets[bisect.bisect_right(self._targets, row, key=lambda t: t.start) - 1]
        return [b + s * (row - piece.start) for b, s in zip(piece.base, piece.share, strict=True)]

    def _deadline(self, source: int, count: int) -> Fraction | None:
        """The row at which the target of `source` reaches `count`; None is never."""
        first = max(0, bisect.bisect_left(self._targets, count, key=lambda t: t.base[source]) - 1)
        for i, piece in enumerate(self._targets[first:], first):
            if piece.share[source]:
                row = piece.start + (count - piece.base[source]) / piece.share[source]
                if i + 1 == len(self._targets) or row <= self._targets[i + 1].start:
                    return row
        return None

    # --- blocks

    def _block_of(self, row: int) -> int:
        stage = bisect.bisect_right(self._stage_rows, row) - 1
        return self._block_bases[stage] + (row - self._stage_rows[stage]) // BLOCK_ROWS

    def _bounds(self, block: int) -> tuple[int, int]:
        """First row of the block, and of the next."""
        stage = bisect.bisect_right(self._block_bases, block) - 1
        start = self._stage_rows[stage] + (block - self._block_bases[stage]) * BLOCK_ROWS
        ends = [start + BLOCK_ROWS]
        if stage + 1 < len(self._stage_rows):
            ends.append(self._stage_rows[stage + 1])
        if self.num_feasible_rows is not None:
            ends.append(self.num_feasible_rows)
        return start, min(ends)

    def _counts_before(self, block: int) -> tuple[int, ...]:
        with self._lock:
            while len(self._counts) <= block:
                self._counts.append(self._next_counts(len(self._counts) - 1))
            return self._counts[block]

    def _next_counts(self, block: int) -> tuple[int, ...]:
        """Counts at the end of a block: targets rounded down, then up by earliest deadline until all rows are given."""
        before = self._counts[block]
        _, end = self._bounds(block)
        targets = self._target(end)
        counts = [max(n, math.floor(t)) for n, t in zip(before, targets, strict=True)]
        left = end - sum(counts)
        waiting = [i for i, t in enumerate(targets) if counts[i] < math.ceil(t)]
        assert 0 <= left <= len(waiting), (
            f"block {block} of the mixture has {left} rows for {len(waiting)} sources"
        )
        deadlines = [(d is None, d or 0, i) for i in waiting for d in [self._deadline(i, counts[i] + 1)]]
        for _, _, i in sorted(deadlines)[:left]:
            counts[i] += 1
        return tuple(counts)

    def _make_block(self, block: int) -> _Block:
        start, end = self._bounds(block)
        after, before = self._counts_before(block + 1), self._counts_before(block)
        sizes = [b - a for a, b in zip(before, after, strict=True)]
        order = seeded_order(end - start, stable_seed("mixture", self._seed, block))
        source_R = np.repeat(np.arange(len(sizes)), sizes)[order]
        element_R = np.empty(end - start, np.int64)
        for source, first in enumerate(before):
            of_source = source_R == source
            element_R[of_source] = first + np.arange(sizes[source])
        return _Block(start, source_R, element_R)
